package hub

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pergolafl/pergola/internal/api"
	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/enrol"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/link"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/store"
)

// patience is how long a test waits for what it wants; it asserts no time.
const patience = 20 * time.Second

// tokenFor makes a token at the hub.
func (s *served) tokenFor(id pki.Identity) enrol.Token {
	s.Helper()
	now := time.Now()
	t := enrol.Token{Kind: id.Kind, Name: id.Name, Hubs: []string{s.addr}, CA: s.auth.Fingerprint(), Secret: enrol.NewSecret(), Expires: now.Add(time.Hour)}
	if err := s.hub.db.PutToken(s.Context(), store.Token{Hash: enrol.Hash(t.Secret), Kind: string(id.Kind), Name: id.Name, Created: now, Expires: t.Expires, By: "test"}); err != nil {
		s.Fatal(err)
	}
	return t
}

// joins enrols somebody by a token.
func (s *served) joins(id pki.Identity) pki.Keypair {
	s.Helper()
	k, err := enrol.Join(s.Context(), s.tokenFor(id), "")
	if err != nil {
		s.Fatal(err)
	}
	return k
}

// issued is a key pair of the hub's authority.
func (s *served) issued(id pki.Identity, g pki.Grant) pki.Keypair {
	s.Helper()
	if g.TTL == 0 {
		g.TTL = time.Hour
	}
	k, err := s.auth.Keypair(id, g)
	if err != nil {
		s.Fatal(err)
	}
	return k
}

func (s *served) tls(k pki.Keypair, alpn ...string) *tls.Config {
	s.Helper()
	cert, err := k.Certificate()
	if err != nil {
		s.Fatal(err)
	}
	return pki.ClientTLS(cert, s.auth.Roots(), pki.HubName, alpn...)
}

func (s *served) with(k pki.Keypair) *api.Client {
	s.Helper()
	c := api.NewClient(s.addr, s.tls(k))
	s.Cleanup(c.Close)
	return c
}

func enrolledIn(t *testing.T, k pki.Keypair) time.Time {
	t.Helper()
	c, err := k.Certificate()
	if err != nil {
		t.Fatal(err)
	}
	return pki.Enrolled(c.Leaf)
}

// watching opens a site's stream, and gives what ends it.
func (s *served) watching(c *api.Client) <-chan error {
	s.Helper()
	w, err := c.Sites.WatchDesired(s.Context(), &pb.WatchDesiredRequest{Protocol: api.Protocol})
	if err != nil {
		s.Fatal(err)
	}
	if _, err := w.Receive(); err != nil {
		s.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		for {
			if _, err := w.Receive(); err != nil {
				_ = w.Close() // it has ended
				ended <- err
				return
			}
		}
	}()
	return ended
}

// comes waits for what a stream ends with.
func comes(t *testing.T, what string, ended <-chan error, code problem.Code, text string) {
	t.Helper()
	began := time.Now()
	select {
	case err := <-ended:
		if problem.CodeOf(err) != code || !strings.Contains(err.Error(), text) {
			t.Errorf("%s ended with %v, want %s: %s", what, err, code, text)
		}
		t.Logf("%s ended after %v", what, time.Since(began))
	case <-time.After(patience):
		t.Fatalf("%s goes on", what)
	}
}

// A site that was removed is out with all that it has open, hears why, stays out when the hub is started again, and comes back with a
// new token; its old certificate never does.
func TestRemovedSite(t *testing.T) {
	s := serve(t)
	admin := s.as(user)
	siteC := pki.Identity{Kind: pki.KindSite, Name: "c"}
	k := s.joins(siteC)
	c := s.with(k)
	stream := s.watching(c)
	// A connection that is open and idle, as after calls.
	idle, err := tls.Dial("tcp", s.addr, s.tls(k, "http/1.1"))
	if err != nil {
		t.Fatal(err)
	}
	defer idle.Close()
	cut := make(chan error, 1)
	go func() {
		_, err := idle.Read(make([]byte, 1))
		if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) {
			err = nil
		}
		cut <- err
	}()
	kept := s.tokenFor(siteC)
	if _, err := admin.Who.Remove(t.Context(), &pb.RemoveRequest{Kind: "site", Name: "d"}); problem.CodeOf(err) != problem.NotFound || !strings.Contains(err.Error(), "no site is named") {
		t.Errorf("a site that is not there: %v", err)
	}
	if _, err := admin.Who.Remove(t.Context(), &pb.RemoveRequest{Kind: "hub", Name: "hub"}); problem.CodeOf(err) != problem.Usage {
		t.Errorf("the hub: %v", err)
	}
	if _, err := c.Who.Remove(t.Context(), &pb.RemoveRequest{Kind: "site", Name: "b"}); problem.CodeOf(err) != problem.Denied {
		t.Errorf("a site removes another one: %v", err)
	}
	began := time.Now()
	res, err := admin.Who.Remove(t.Context(), &pb.RemoveRequest{Kind: "site", Name: "c"})
	if err != nil || res.GetRemovedTime() == nil {
		t.Fatalf("%v, %v", res, err)
	}
	comes(t, "the site's stream", stream, problem.Removed, "site c was removed from the hub")
	select {
	case err := <-cut:
		if err != nil && !strings.Contains(err.Error(), "reset") {
			t.Errorf("the idle connection ended with %v", err)
		}
	case <-time.After(patience):
		t.Fatal("the idle connection goes on")
	}
	t.Logf("cut %v after the call", time.Since(began))
	again, err := admin.Who.Remove(t.Context(), &pb.RemoveRequest{Kind: "site", Name: "c"})
	if err != nil || !again.GetRemovedTime().AsTime().Equal(res.GetRemovedTime().AsTime()) {
		t.Errorf("removed twice: %v, %v", again, err)
	}
	if _, err := enrol.Join(t.Context(), kept, ""); problem.CodeOf(err) != problem.Denied {
		t.Errorf("a token that was made before the removal: %v", err)
	}
	out := func(addr string) {
		t.Helper()
		n := api.NewClient(addr, s.tls(k))
		defer n.Close()
		if _, err := n.Who.GetHub(t.Context(), &pb.GetHubRequest{}); problem.CodeOf(err) != problem.Removed {
			t.Errorf("a new call: %v", err)
		}
		key, err := pki.NewKey()
		if err != nil {
			t.Fatal(err)
		}
		csr, err := pki.NewRequest(key, siteC)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := n.Who.Renew(t.Context(), &pb.RenewRequest{CsrPem: string(csr)}); problem.CodeOf(err) != problem.Removed {
			t.Errorf("a renewal: %v", err)
		}
		// Its runners' links as well, and those hear that it is for good.
		p := s.issued(pki.Identity{Kind: pki.KindParty, Name: "c", Job: "01arz3ndektsv4rrffq69g5fav"}, pki.Grant{Enrolled: enrolledIn(t, k)})
		d := &tls.Dialer{Config: s.tls(p, link.ALPN)}
		if _, err := link.Dial(t.Context(), func(ctx context.Context) (net.Conn, error) { return d.DialContext(ctx, "tcp", addr) }, link.Options{Retry: patience}); problem.CodeOf(err) != problem.Denied {
			t.Errorf("a link: %v", err)
		}
	}
	out(s.addr)
	again2 := s.restarted()
	out(again2)

	list := func(all bool) (out []string) {
		res, err := admin.Jobs.ListSites(t.Context(), &pb.ListSitesRequest{All: all})
		if err != nil {
			t.Fatal(err)
		}
		for _, x := range res.GetSites() {
			out = append(out, x.GetName())
			if (x.GetRemovedTime() != nil) != (x.GetName() == "c") || (x.GetEnrolledTime() != nil) != (x.GetName() == "c") {
				t.Errorf("%v", x)
			}
		}
		return out
	}
	if got := list(false); !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("sites %q", got)
	}
	if got := list(true); !slices.Equal(got, []string{"a", "b", "c"}) {
		t.Errorf("all sites %q", got)
	}

	back := s.joins(siteC)
	if _, err := s.with(back).Who.GetHub(t.Context(), &pb.GetHubRequest{}); err != nil {
		t.Errorf("with a new token: %v", err)
	}
	if _, err := s.with(k).Who.GetHub(t.Context(), &pb.GetHubRequest{}); problem.CodeOf(err) != problem.Superseded {
		t.Errorf("with the old certificate: %v", err)
	}
	// One of hub.toml is out the same way.
	if _, err := admin.Who.Remove(t.Context(), &pb.RemoveRequest{Kind: "site", Name: "b"}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.as(siteB).Who.GetHub(t.Context(), &pb.GetHubRequest{}); problem.CodeOf(err) != problem.Removed {
		t.Errorf("a site of hub.toml: %v", err)
	}
	if _, err := s.with(s.joins(siteB)).Sites.GetLogOffsets(t.Context(), &pb.GetLogOffsetsRequest{JobId: "01arz3ndektsv4rrffq69g5fav"}); problem.CodeOf(err) != problem.NotFound {
		t.Errorf("a site of hub.toml that came back: %v", err)
	}
	if _, err := s.as(siteB).Who.GetHub(t.Context(), &pb.GetHubRequest{}); problem.CodeOf(err) != problem.Superseded {
		t.Errorf("its certificate of before: %v", err)
	}
}

// restarted runs another hub on the same directory until the test ends, and gives its address.
func (s *served) restarted() string {
	s.Helper()
	h, err := Open(s.Context(), s.dir, slog.New(slog.DiscardHandler))
	if err != nil {
		s.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ready := make(chan string, 1)
	done := make(chan error, 1)
	go func() { done <- h.Run(ctx, func(a net.Addr) { ready <- a.String() }) }()
	s.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			s.Errorf("the hub ended with %v", err)
		}
	})
	return <-ready
}

// A user who was removed is out with the streams that are open.
func TestRemovedUser(t *testing.T) {
	s := serve(t)
	id, _ := s.submit()
	maria := pki.Identity{Kind: pki.KindUser, Name: "maria"}
	c := s.with(s.joins(maria))
	ended := map[string]chan error{"her events": make(chan error, 1), "her logs": make(chan error, 1)}
	w, err := c.Jobs.WatchJob(t.Context(), &pb.WatchJobRequest{Id: string(id)})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Receive(); err != nil {
		t.Fatal(err)
	}
	go func() {
		var err error
		for err == nil {
			_, err = w.Receive()
		}
		_ = w.Close() // it has ended
		ended["her events"] <- err
	}()
	go func() {
		l, err := c.Jobs.TailLogs(t.Context(), &pb.TailLogsRequest{Id: string(id)})
		for err == nil {
			if _, err = l.Receive(); err != nil {
				_ = l.Close() // it has ended
			}
		}
		ended["her logs"] <- err
	}()
	admin := s.as(user)
	users := func(all bool) (out []string) {
		res, err := admin.Who.ListUsers(t.Context(), &pb.ListUsersRequest{All: all})
		if err != nil {
			t.Fatal(err)
		}
		for _, u := range res.GetUsers() {
			out = append(out, u.GetName())
		}
		return out
	}
	if got := users(false); !slices.Equal(got, []string{"ann", "maria"}) {
		t.Errorf("users %q", got)
	}
	if _, err := admin.Who.Remove(t.Context(), &pb.RemoveRequest{Kind: "user", Name: "maria"}); err != nil {
		t.Fatal(err)
	}
	for what, e := range ended {
		comes(t, what, e, problem.Removed, "user maria was removed from the hub")
	}
	if got := users(false); !slices.Equal(got, []string{"ann"}) {
		t.Errorf("users %q", got)
	}
	if got := users(true); !slices.Equal(got, []string{"ann", "maria"}) {
		t.Errorf("all users %q", got)
	}
	if _, err := c.Jobs.ListJobs(t.Context(), &pb.ListJobsRequest{}); problem.CodeOf(err) != problem.Removed {
		t.Errorf("her next call: %v", err)
	}
	if _, err := s.as(siteA).Who.ListUsers(t.Context(), &pb.ListUsersRequest{}); problem.CodeOf(err) != problem.Denied {
		t.Errorf("a site lists the users: %v", err)
	}
}

// Who enrols again ends what came by the certificate before; and a removal is noticed that another hub, or somebody else, has stored.
func TestEnrolledAgain(t *testing.T) {
	s := serve(t)
	siteC := pki.Identity{Kind: pki.KindSite, Name: "c"}
	old := s.joins(siteC)
	stream := s.watching(s.with(old))
	news := s.joins(siteC)
	comes(t, "the older one's stream", stream, problem.Superseded, "site c has enrolled again")
	if !enrolledIn(t, news).After(enrolledIn(t, old)) {
		t.Errorf("enrolled at %v, then at %v", enrolledIn(t, old), enrolledIn(t, news))
	}
	// A certificate for a link that was had with the old one goes with it; its runner is not told that it is for good, since its
	// agent may have enrolled again and have it renewed.
	p := s.issued(pki.Identity{Kind: pki.KindParty, Name: "c", Job: "01arz3ndektsv4rrffq69g5fav"}, pki.Grant{Enrolled: enrolledIn(t, old)})
	conn, err := tls.Dial("tcp", s.addr, s.tls(p, link.ALPN))
	if err != nil {
		t.Fatal(err)
	}
	if n, err := conn.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Errorf("a link of the older enrolment read %d bytes, %v", n, err)
	}
	conn.Close()
	stream = s.watching(s.with(news))
	if err := s.hub.db.RemoveIdentity(t.Context(), "site", "c", time.Now()); err != nil {
		t.Fatal(err)
	}
	comes(t, "the stream of a site that was removed in the store", stream, problem.Removed, "")
}

// A site and a user renew their own certificate, of the same enrolment, with a new key, for as long as hub.toml says.
func TestRenew(t *testing.T) {
	s := serveAs(t, Config{CertificateLifetime: job.Duration(48 * time.Hour)})
	for _, id := range []pki.Identity{{Kind: pki.KindSite, Name: "c"}, {Kind: pki.KindUser, Name: "maria"}} {
		k := s.joins(id)
		c := s.with(k)
		renew := func(as pki.Identity) (pki.Keypair, error) {
			return pki.NewSigned(as, k.CAPEM, func(csr string) (string, string, error) {
				res, err := c.Who.Renew(t.Context(), &pb.RenewRequest{CsrPem: csr})
				return res.GetCertificatePem(), "", err
			})
		}
		got, err := renew(id)
		if err != nil {
			t.Fatal(err)
		}
		cert, err := got.Certificate()
		if err != nil {
			t.Fatal(err)
		}
		if d := pki.Lifetime(cert.Leaf); d < 47*time.Hour || d > 49*time.Hour || !pki.Enrolled(cert.Leaf).Equal(enrolledIn(t, k)) || pki.Enrolled(cert.Leaf).IsZero() {
			t.Errorf("%s: renewed for %v, enrolment %v of %v", id, d, pki.Enrolled(cert.Leaf), enrolledIn(t, k))
		}
		hub, err := s.with(got).Who.GetHub(t.Context(), &pb.GetHubRequest{})
		if err != nil || hub.GetName() != id.Name || hub.GetKind() != string(id.Kind) || !hub.GetCertificateEndTime().AsTime().Equal(cert.Leaf.NotAfter) {
			t.Errorf("%s: %v, %v", id, hub, err)
		}
		for _, other := range []pki.Identity{{Kind: id.Kind, Name: "other"}, {Kind: pki.KindHub, Name: "hub"}, {Kind: pki.KindParty, Name: "c", Job: "j"}} {
			if _, err := renew(other); problem.CodeOf(err) != problem.Denied {
				t.Errorf("%s had the certificate of %s renewed: %v", id, other, err)
			}
		}
	}
	key, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	csr, err := pki.NewRequest(key, stranger)
	if err != nil {
		t.Fatal(err)
	}
	foreign := s.as(pki.Identity{Kind: pki.KindSite, Name: "nobody"})
	if _, err := foreign.Who.Renew(t.Context(), &pb.RenewRequest{CsrPem: string(csr)}); problem.CodeOf(err) != problem.Denied {
		t.Errorf("a site that is not enrolled: %v", err)
	}
}

// A call does not outlive the certificate that it came with, nor does a connection carry further calls.
func TestCallsEndWithTheCertificate(t *testing.T) {
	t.Parallel() // it waits
	s := serve(t)
	k := s.issued(siteA, pki.Grant{TTL: 2 * time.Second})
	c := s.with(k)
	stream := s.watching(c)
	comes(t, "the stream", stream, problem.Expired, "was good until")
	if _, err := c.Who.GetHub(t.Context(), &pb.GetHubRequest{}); err == nil {
		t.Error("a call after the certificate's end succeeded")
	}
	// A new connection is refused in the handshake, and whoever dials hears why.
	fresh := s.with(k)
	_, err := fresh.Who.GetHub(t.Context(), &pb.GetHubRequest{})
	if problem.CodeOf(err) != problem.Expired || !strings.Contains(err.Error(), "certificate is over") {
		t.Errorf("a new connection: %v", err)
	}
}

// The hub has its own certificate renewed, also one that ended while it did not run; connections that are open go on.
func TestOwnCertificate(t *testing.T) {
	s := serve(t)
	leafOf := func() time.Time {
		c, err := tls.Dial("tcp", s.addr, s.tls(s.issued(user, pki.Grant{}), "h2"))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		return c.ConnectionState().PeerCertificates[0].NotAfter
	}
	c := s.as(siteA)
	stream := s.watching(c)
	before := leafOf()
	k, err := s.hub.newCertificate(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.hub.cert.Replace(k); err != nil {
		t.Fatal(err)
	}
	if after := leafOf(); !after.After(before.Add(24 * time.Hour)) {
		t.Errorf("the certificate was good until %v, and is until %v", before, after)
	}
	if _, err := enrol.Join(t.Context(), s.tokenFor(pki.Identity{Kind: pki.KindUser, Name: "maria"}), ""); err != nil {
		t.Errorf("a newcomer: %v", err)
	}
	select {
	case err := <-stream:
		t.Errorf("an open stream ended: %v", err)
	default:
	}
	if _, err := c.Who.GetHub(t.Context(), &pb.GetHubRequest{}); err != nil {
		t.Errorf("an open connection: %v", err)
	}

	dir := t.TempDir()
	auth, err := Init(dir, []string{"hub.example.org:8443", "192.0.2.7:8443"}, "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	old, err := auth.NewKeypair(pki.Identity{Kind: pki.KindHub, Name: pki.HubName}, []string{"hub.example.org", "192.0.2.7"}, time.Nanosecond)
	if err == nil {
		err = pki.SaveKeypair(dir, "hub", old)
	}
	if err != nil {
		t.Fatal(err)
	}
	h, err := Open(t.Context(), dir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer h.db.Close()
	got := h.cert.Certificate().Leaf
	if d := pki.Lifetime(got); d < 29*24*time.Hour || d > 31*24*time.Hour {
		t.Errorf("its own certificate is good for %v", d)
	}
	if !slices.Equal(got.DNSNames, []string{"hub", "hub.example.org"}) || len(got.IPAddresses) != 1 || got.IPAddresses[0].String() != "192.0.2.7" {
		t.Errorf("it is for %q and %v", got.DNSNames, got.IPAddresses)
	}
	site := s.issued(siteA, pki.Grant{})
	if err := pki.SaveKeypair(dir, "hub", pki.Keypair{CertPEM: site.CertPEM, KeyPEM: site.KeyPEM, CAPEM: auth.CertPEM()}); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), dir, slog.New(slog.DiscardHandler)); problem.CodeOf(err) != problem.Usage || !strings.Contains(err.Error(), "not a hub's") {
		t.Errorf("a hub with a site's key pair in %s: %v", filepath.Base(dir), err)
	}
}

// What becomes of jobs whose site is removed follows their own rules.
func TestJobsOfARemovedSite(t *testing.T) {
	remove := func(r *rig, site string) {
		r.Helper()
		if err := r.h.db.RemoveIdentity(r.Context(), "site", site, time.Now()); err != nil {
			r.Fatal(err)
		}
		r.h.siteDown(site)
		if err := r.h.look(r.Context()); err != nil {
			r.Fatal(err)
		}
		r.step()
	}
	for name, c := range map[string]struct {
		spec job.Spec
		do   func(*rig)
	}{
		"one that needs all sites fails": {job.Spec{}, func(r *rig) {
			r.up("a", "b")
			remove(r, "b")
			r.is(job.Stopping, "removed of b")
			r.at("b", job.PartyFailed, 0)
		}},
		"one that needs one goes on": {job.Spec{MinSites: 1, StrictClients: true}, func(r *rig) {
			r.up("a", "b")
			remove(r, "b")
			r.is(job.Running, "")
			r.at("b", job.PartyFailed, 0)
			r.toldOf("goes on without b", 1)
			// Also when it enrols again: it is another one then.
			if err := r.h.db.PutIdentity(r.Context(), store.Identity{Kind: "site", Name: "b", Enrolled: time.Now()}); err != nil {
				r.Fatal(err)
			}
			if err := r.h.look(r.Context()); err != nil {
				r.Fatal(err)
			}
			r.h.siteUp("b")
			time.Sleep(time.Hour)
			r.step()
			r.at("b", job.PartyFailed, 0)
		}},
		"a mandatory site": {job.Spec{MinSites: 1, MandatorySites: []string{"b"}}, func(r *rig) {
			r.up("a", "b")
			remove(r, "b")
			r.is(job.Stopping, "removed of b")
		}},
		"one that waits and needs all fails at once": {job.Spec{}, func(r *rig) {
			r.h.siteUp("b")
			r.step()
			r.is(job.Queued, "")
			remove(r, "b")
			r.is(job.Failed, "removed of b")
		}},
		"one that waits and needs one waits on": {job.Spec{MinSites: 1}, func(r *rig) {
			r.h.siteUp("b")
			r.h.siteDown("b")
			r.step()
			r.is(job.Queued, "")
			r.h.siteUp("b")
			remove(r, "b")
			r.is(job.Queued, "")
		}},
		"one that is stopping waits for it no longer": {job.Spec{}, func(r *rig) {
			r.up("a", "b")
			r.abort(r.job())
			r.step()
			r.is(job.Stopping, "aborted-by-user of ")
			remove(r, "b")
			r.at("b", job.PartyFailed, 0)
			r.is(job.Stopping, "aborted-by-user of ")
		}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { c.do(newRig(t, c.spec)) })
		})
	}
}

// Agents and users of other ages: the newest version that both ends speak is used; where there is none, both are named and who has to be
// updated; and nothing that a later version adds to a message is in the way.
func TestCallersOfOtherAges(t *testing.T) {
	s := serve(t)
	call := func(as pki.Identity, path, speaks, body string) (status int, answer, header string) {
		t.Helper()
		tr := &http.Transport{TLSClientConfig: s.tls(s.issued(as, pki.Grant{}), "http/1.1")}
		defer tr.CloseIdleConnections()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+s.addr+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/json")
		if strings.HasSuffix(path, "WatchDesired") { // a stream of JSON
			req.Header.Set("Content-Type", "application/connect+json")
			req.Body = io.NopCloser(strings.NewReader("\x00\x00\x00\x00" + string(rune(len(body))) + body))
			req.ContentLength = -1
		}
		if speaks != "" {
			req.Header.Set(api.ProtocolHeader, speaks)
			req.Header.Set(api.BuildHeader, "v9.9.9")
		}
		res, err := tr.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		b := make([]byte, 4096)
		n, err := res.Body.Read(b) // of the stream its first message, or the refusal
		if err != nil && !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
		return res.StatusCode, string(b[:n]), res.Header.Get(api.ProtocolHeader)
	}
	const watch, list = "/pergola.v1.SiteService/WatchDesired", "/pergola.v1.JobService/ListJobs"
	for _, c := range []struct {
		name, path, speaks, body string
		refused                  bool
	}{
		{"an agent of version 1", watch, "", `{"protocol":1}`, false},
		{"an agent of this version", watch, api.Control.String(), `{"protocol":1}`, false},
		{"a newer agent that knows this version", watch, "2-7", `{"protocol":7,"fieldOfVersion7":[{}]}`, false},
		{"an agent that is too new", watch, "6-7", `{"protocol":7}`, true},
		{"a user of version 1", list, "", `{}`, false},
		{"a newer user that knows this version", list, "1-7", `{"fieldOfVersion7":{"x":1}}`, false},
		{"a user that is too new", list, "7", `{}`, true},
	} {
		as := user
		if c.path == watch {
			as = siteA
		}
		status, answer, header := call(as, c.path, c.speaks, c.body)
		if header != api.Control.String() {
			t.Errorf("%s: the hub says that it speaks %q", c.name, header)
		}
		refusal := strings.Contains(answer, "none in common")
		if refusal != c.refused || !c.refused && status != http.StatusOK {
			t.Errorf("%s: %d %s", c.name, status, answer)
		}
		if c.refused && (!strings.Contains(answer, "the hub (pergola ") || !strings.Contains(answer, as.String()+" (pergola v9.9.9)") || !strings.Contains(answer, "update pergola at the hub")) {
			t.Errorf("%s: both are to be named: %s", c.name, answer)
		}
	}
	res, err := s.as(user).Who.GetHub(t.Context(), &pb.GetHubRequest{})
	if err != nil || res.GetVersion() == "" || int(res.GetProtocols()["control"].GetMax()) != api.Control.Max || int(res.GetProtocols()["link"].GetMin()) != link.MinVersion || res.GetProtocols()["runner"] == nil {
		t.Errorf("the hub tells of itself %v, %v", res, err)
	}
}
