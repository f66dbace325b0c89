package hub

import (
	"context"
	"slices"
	"time"

	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/enrol"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/store"
)

// DefaultCertTTL is for how long the certificates of sites and users are good.
const DefaultCertTTL = 365 * 24 * time.Hour

// siteNames gives the sites that may take part: those of hub.toml in its order, then those that came by a token, by name.
func (h *Hub) siteNames(ctx context.Context) ([]string, error) {
	ids, err := h.db.Identities(ctx, string(pki.KindSite))
	if err != nil {
		return nil, err
	}
	gone := map[string]bool{}
	var came []string
	for _, i := range ids {
		switch {
		case !i.Removed.IsZero():
			gone[i.Name] = true
		case !slices.Contains(h.conf.Sites, i.Name) && !i.Enrolled.IsZero():
			came = append(came, i.Name)
		}
	}
	out := slices.DeleteFunc(slices.Clone(h.conf.Sites), func(n string) bool { return gone[n] })
	return append(out, came...), nil
}

// enrolled refuses a site that is not.
func (h *Hub) enrolled(ctx context.Context, sites []string) error {
	names, err := h.siteNames(ctx)
	if err != nil {
		return err
	}
	for _, n := range sites {
		if !slices.Contains(names, n) {
			return problem.New(problem.NotFound, "see the enrolled ones with: pergola sites", "no site is named %q%s", n, problem.DidYouMean(n, names))
		}
	}
	return nil
}

type enrolService struct{ *Hub }

// Enrol implements the API. The token is used up before the certificate is made: rather a token that was of no use than one that was of two.
func (s enrolService) Enrol(ctx context.Context, req *pb.EnrolRequest) (*pb.EnrolResponse, error) {
	now := time.Now()
	t, err := s.db.UseToken(ctx, enrol.Hash(req.GetSecret()), now)
	if err != nil {
		return nil, err
	}
	want := pki.Identity{Kind: pki.Kind(t.Kind), Name: t.Name}
	cert, err := s.auth.Sign([]byte(req.GetCsrPem()), func(id pki.Identity) error {
		if id != want {
			return problem.New(problem.Denied, "ask the hub's operator for a new token", "the token is for %s, not for %s", want, id)
		}
		return nil
	}, DefaultCertTTL)
	if err != nil {
		return nil, err
	}
	if err := s.db.PutIdentity(ctx, store.Identity{Kind: t.Kind, Name: t.Name, Enrolled: now}); err != nil {
		return nil, err
	}
	s.log.Info("enrolled", "identity", want.String(), "by", t.By)
	s.changed.Wake("")
	return &pb.EnrolResponse{CertificatePem: string(cert), CaPem: string(s.auth.CertPEM())}, nil
}
