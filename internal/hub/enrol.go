package hub

import (
	"context"
	"slices"
	"time"

	"connectrpc.com/connect/v2/connecthttp"

	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/enrol"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/store"
)

// siteList gives the sites that may take part: those of hub.toml in its order, then those that came by a token, by name; with all also
// those that were removed.
func (h *Hub) siteList(ctx context.Context, all bool) ([]store.Identity, error) {
	ids, err := h.db.Identities(ctx, string(pki.KindSite))
	if err != nil {
		return nil, err
	}
	known := map[string]store.Identity{}
	var names []string
	for _, i := range ids {
		known[i.Name] = i
		if !slices.Contains(h.conf.Sites, i.Name) && (!i.Enrolled.IsZero() || !i.Removed.IsZero()) {
			names = append(names, i.Name)
		}
	}
	var out []store.Identity
	for _, n := range append(slices.Clone(h.conf.Sites), names...) {
		i := known[n]
		i.Kind, i.Name = string(pki.KindSite), n
		if all || i.Removed.IsZero() {
			out = append(out, i)
		}
	}
	return out, nil
}

// siteNames gives the names of the sites that may take part.
func (h *Hub) siteNames(ctx context.Context) ([]string, error) {
	list, err := h.siteList(ctx, false)
	var out []string
	for _, i := range list {
		out = append(out, i.Name)
	}
	return out, err
}

// enrolledSite refuses a calling site of which the hub has only its certificate.
func (h *Hub) enrolledSite(ctx context.Context, name string) error {
	i, _ := ctx.Value(callerKey{}).(store.Identity) // the gate has looked
	return h.isEnrolled(i, name)
}

// isEnrolled refuses a site that the hub's directory does not name, if the store knows of no enrolment of it.
func (h *Hub) isEnrolled(i store.Identity, name string) error {
	if i.Name != name || i.Enrolled.IsZero() && !slices.Contains(h.conf.Sites, name) {
		return problem.New(problem.Denied, "enrol it at the hub", "site %s is not enrolled", name)
	}
	return nil
}

// enrolledOf gives by which enrolment the caller's certificate was issued.
func enrolledOf(ctx context.Context) time.Time {
	info, ok := connecthttp.ServerInfoForContext(ctx)
	if !ok || info.TLS() == nil || len(info.TLS().PeerCertificates) == 0 {
		return time.Time{}
	}
	return pki.Enrolled(info.TLS().PeerCertificates[0])
}

// enrolled refuses a site that is not.
func (h *Hub) enrolled(ctx context.Context, sites []string) error {
	for _, n := range sites {
		i, err := h.db.Identity(ctx, string(pki.KindSite), n)
		unknown := problem.CodeOf(err) == problem.NotFound
		if err != nil && !unknown {
			return err
		}
		if i.Removed.IsZero() && (!i.Enrolled.IsZero() || slices.Contains(h.conf.Sites, n)) {
			continue // the others need not be read
		}
		names, err := h.siteNames(ctx)
		if err != nil {
			return err
		}
		if !slices.Contains(names, n) {
			return problem.New(problem.NotFound, "see the enrolled ones with: pergola sites", "no site is named %q%s", n, problem.DidYouMean(n, names))
		}
	}
	return nil
}

type enrolService struct{ *Hub }

// Enrol implements the API. The token is used up with the request that succeeds, and by no other; whoever had a certificate under that
// name is out from then on.
func (s enrolService) Enrol(ctx context.Context, req *pb.EnrolRequest) (*pb.EnrolResponse, error) {
	var cert []byte
	var want pki.Identity
	t, err := s.db.Enrol(ctx, enrol.Hash(req.GetSecret()), time.Now(), func(t store.Token, enrolled time.Time) (err error) {
		want = pki.Identity{Kind: pki.Kind(t.Kind), Name: t.Name}
		cert, err = s.auth.Sign([]byte(req.GetCsrPem()), func(id pki.Identity) error {
			if id != want {
				return problem.New(problem.Denied, "ask the hub's operator for a new token", "the token is for %s, not for %s", want, id)
			}
			return nil
		}, pki.Grant{TTL: s.conf.certTTL(), Enrolled: enrolled})
		return err
	})
	if err != nil {
		return nil, err
	}
	s.log.Info("enrolled", "identity", want.String(), "by", t.By)
	s.changed.Wake("")
	return &pb.EnrolResponse{CertificatePem: string(cert), CaPem: string(s.auth.CertPEM())}, nil
}
