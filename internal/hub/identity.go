package hub

import (
	"context"
	"slices"
	"time"

	"connectrpc.com/connect/v2/connecthttp"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/pergolafl/pergola/internal/api"
	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/problem"
)

// DefaultCertTTL is for how long certificates are good where hub.toml says nothing; the shortest and longest that it may say.
const (
	DefaultCertTTL  = 30 * 24 * time.Hour
	shortestCertTTL = time.Hour
	longestCertTTL  = 2 * 365 * 24 * time.Hour
)

// certTTL is for how long the hub issues certificates, its own as well.
func (c *Config) certTTL() time.Duration {
	return c.CertificateLifetime.Or(job.Duration(DefaultCertTTL)).Std()
}

func (c *Config) checkCertTTL() error {
	if ttl := c.certTTL(); ttl < shortestCertTTL || ttl > longestCertTTL {
		return problem.New(problem.Usage, `write it like certificate-lifetime = "30d", between 1h and 730d`, "certificate-lifetime cannot be %s", c.CertificateLifetime)
	}
	return nil
}

type identityService struct{ *Hub }

// Renew implements the API. Who calls was let in by the gate: it was not removed, and its certificate is of its last enrolment.
func (s identityService) Renew(ctx context.Context, req *pb.RenewRequest) (*pb.RenewResponse, error) {
	who, err := caller(ctx, pki.KindSite, pki.KindUser)
	if err != nil {
		return nil, err
	}
	if who.Kind == pki.KindSite {
		if err := s.enrolledSite(ctx, who.Name); err != nil {
			return nil, err
		}
	}
	info, _ := connecthttp.ServerInfoForContext(ctx) // caller has looked
	leaf := info.TLS().PeerCertificates[0]
	cert, err := s.auth.Sign([]byte(req.GetCsrPem()), func(id pki.Identity) error {
		if id != who {
			return problem.New(problem.Denied, "renew your own", "%s may not have the certificate of %s renewed", who, id)
		}
		return nil
	}, pki.Grant{TTL: s.conf.certTTL(), Enrolled: enrolledOf(ctx)})
	if err != nil {
		return nil, err
	}
	s.log.Info("a certificate is renewed", "identity", who.String(), "was good until", leaf.NotAfter.UTC().Format(time.RFC3339))
	return &pb.RenewResponse{CertificatePem: string(cert)}, nil
}

// Remove implements the API.
func (s identityService) Remove(ctx context.Context, req *pb.RemoveRequest) (*pb.RemoveResponse, error) {
	by, err := caller(ctx, pki.KindUser)
	if err != nil {
		return nil, err
	}
	who := pki.Identity{Kind: pki.Kind(req.GetKind()), Name: req.GetName()}
	if who.Kind != pki.KindSite && who.Kind != pki.KindUser {
		return nil, problem.New(problem.Usage, "name a site or a user", "%q is neither site nor user", req.GetKind())
	}
	i, err := s.db.Identity(ctx, req.GetKind(), req.GetName())
	if problem.CodeOf(err) == problem.NotFound && (who.Kind != pki.KindSite || !slices.Contains(s.conf.Sites, who.Name)) {
		return nil, s.nobody(ctx, who)
	}
	if err != nil && problem.CodeOf(err) != problem.NotFound {
		return nil, err
	}
	out := &pb.RemoveResponse{}
	if who.Kind == pki.KindSite {
		if out.JobIds, err = s.partsOf(ctx, who.Name); err != nil {
			return nil, err
		}
	}
	if i.Removed.IsZero() {
		if err := s.db.RemoveIdentity(ctx, req.GetKind(), req.GetName(), time.Now()); err != nil {
			return nil, err
		}
		s.log.Warn("removed", "identity", who.String(), "by", by.Name, "jobs", len(out.GetJobIds()))
	}
	if i, err = s.db.Identity(ctx, req.GetKind(), req.GetName()); err != nil {
		return nil, err
	}
	out.RemovedTime = timestamppb.New(i.Removed)
	return out, nil
}

// nobody refuses a name that the hub has not heard of.
func (h *Hub) nobody(ctx context.Context, who pki.Identity) error {
	ids, err := h.db.Identities(ctx, string(who.Kind))
	if err != nil {
		return err
	}
	var names []string
	for _, i := range ids {
		names = append(names, i.Name)
	}
	see := "pergola user ls"
	if who.Kind == pki.KindSite {
		names = append(names, h.conf.Sites...)
		see = "pergola sites"
	}
	return problem.New(problem.NotFound, "see them with: "+see, "no %s is named %q%s", who.Kind, who.Name, problem.DidYouMean(who.Name, names))
}

// partsOf gives the jobs in which a site has a part that is not over.
func (h *Hub) partsOf(ctx context.Context, site string) ([]string, error) {
	js, err := h.unfinished(ctx)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, j := range js {
		if j.State.Active() && h.hasPart(ctx, j, site) == nil {
			out = append(out, string(j.ID))
		}
	}
	return out, nil
}

// ListUsers implements the API.
func (s identityService) ListUsers(ctx context.Context, req *pb.ListUsersRequest) (*pb.ListUsersResponse, error) {
	if _, err := caller(ctx, pki.KindUser); err != nil {
		return nil, err
	}
	ids, err := s.db.Identities(ctx, string(pki.KindUser))
	if err != nil {
		return nil, err
	}
	out := &pb.ListUsersResponse{}
	for _, i := range ids {
		if i.Removed.IsZero() || req.GetAll() {
			out.Users = append(out.Users, &pb.User{Name: i.Name, EnrolledTime: stamp(i.Enrolled), RemovedTime: stamp(i.Removed)})
		}
	}
	return out, nil
}

func stamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

// GetHub implements the API.
func (s identityService) GetHub(ctx context.Context, _ *pb.GetHubRequest) (*pb.GetHubResponse, error) {
	who, err := caller(ctx, pki.KindSite, pki.KindUser)
	if err != nil {
		return nil, err
	}
	info, _ := connecthttp.ServerInfoForContext(ctx) // caller has looked
	speaks := map[string]*pb.VersionRange{}
	for name, r := range api.Protocols() {
		speaks[name] = &pb.VersionRange{Min: int32(r.Min), Max: int32(r.Max)}
	}
	return &pb.GetHubResponse{
		Version: api.BuildVersion(), Protocols: speaks,
		Kind: string(who.Kind), Name: who.Name, Time: timestamppb.Now(),
		CertificateEndTime: timestamppb.New(info.TLS().PeerCertificates[0].NotAfter),
	}, nil
}

// openCertificate opens the hub's own key pair, of which the hub itself is the authority: one that is due, or over, is replaced at
// once.
func (h *Hub) openCertificate() error {
	var err error
	if h.cert, err = pki.OpenCredential(h.dir, "hub"); err != nil {
		return err
	}
	leaf := h.cert.Certificate().Leaf
	if id, err := pki.CertIdentity(leaf); err != nil || id.Kind != pki.KindHub {
		return problem.New(problem.Usage, "restore hub.crt and hub.key from a backup", "the key pair in %s is not a hub's", h.dir)
	}
	if time.Now().Before(pki.Due(leaf)) {
		return nil
	}
	k, err := h.newCertificate(context.Background())
	if err != nil {
		return err
	}
	return h.cert.Replace(k)
}

func (h *Hub) newCertificate(context.Context) (pki.Keypair, error) {
	if left := time.Until(h.auth.NotAfter()); left < 365*24*time.Hour {
		h.log.Warn("the hub's authority ends: make a new hub before it does, since no certificate is good for longer", "ends", h.auth.NotAfter().UTC().Format(time.RFC3339))
	}
	leaf := h.cert.Certificate().Leaf
	id, err := pki.CertIdentity(leaf)
	if err != nil {
		return pki.Keypair{}, err
	}
	hosts := slices.Clone(leaf.DNSNames)
	for _, ip := range leaf.IPAddresses {
		hosts = append(hosts, ip.String())
	}
	k, err := h.auth.Keypair(id, pki.Grant{TTL: h.conf.certTTL(), Hosts: hosts})
	if err == nil {
		h.log.Info("the hub's own certificate is renewed", "was good until", leaf.NotAfter.UTC().Format(time.RFC3339))
	}
	return k, err
}

// keepCertificate renews the hub's own certificate when that is due; connections that are open go on.
func (h *Hub) keepCertificate(ctx context.Context) error {
	h.cert.Keep(ctx, pki.Renewal{Renew: h.newCertificate, Failed: func(err error, next time.Duration) {
		h.log.Error("the hub's own certificate could not be renewed", "err", err, "retry", next)
	}})
	return nil
}
