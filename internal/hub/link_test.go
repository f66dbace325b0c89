package hub

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/link"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/runner"
	"github.com/pergolafl/pergola/internal/sock"
	"github.com/pergolafl/pergola/internal/store"
)

// spliced is a hub's port for links, with the hub's end of a job that runs at site a. No controller looks after the job. Sites are those
// of hub.toml.
func spliced(t *testing.T, sites ...string) (h *Hub, id job.ID, addr string, accept func() *link.Session) {
	t.Helper()
	dir := t.TempDir()
	if _, err := Init(dir, []string{"hub.example.org:8443"}, "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	h, err := Open(t.Context(), dir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	h.conf.Sites = sites
	now := time.Now()
	id = job.NewID(now)
	if _, err := h.db.CreateJob(t.Context(), job.Job{ID: id, Name: "app", Spec: job.Spec{Sites: []string{"a"}}.WithDefaults(), Created: now}, []string{"a"}); err != nil {
		t.Fatal(err)
	}
	if err := h.db.Move(t.Context(), id, job.Queued, nil, "", now); err != nil {
		t.Fatal(err)
	}
	if ok, _, err := h.db.ClaimDuty(t.Context(), store.Scheduling, h.id, now.Add(time.Hour), now); err != nil || !ok {
		t.Fatal(ok, err)
	}
	if err := h.db.Start(t.Context(), id, []string{"a"}, h.id, now); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(h.partyDir(id), 0o700); err != nil {
		t.Fatal(err)
	}
	own, err := sock.Listen(runner.LinkSocket(h.partyDir(id)))
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	a := link.NewAcceptor(link.Options{})
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := a.Serve(ctx, own); err != nil {
			t.Error(err)
		}
	})
	wg.Go(func() {
		if err := newPort(ln, h.tls, h.log).run(ctx, func(c *tls.Conn) { h.splice(ctx, c) }); err != nil {
			t.Error(err)
		}
	})
	wg.Go(func() {
		if err := h.seeOut(ctx); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		cancel()
		wg.Wait()
		if err := h.db.Close(); err != nil {
			t.Error(err)
		}
	})
	return h, id, ln.Addr().String(), func() *link.Session {
		t.Helper()
		s, err := a.Accept(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = s.Close() }) // if the test has not
		return s
	}
}

// A site that was taken out of hub.toml has no link any more, though its part is alive.
func TestLinkOfAFormerSite(t *testing.T) {
	h, id, addr, _ := spliced(t, "b")
	pair, err := h.auth.NewKeypair(pki.Identity{Kind: pki.KindParty, Name: "a", Job: string(id)}, nil, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := pair.Certificate()
	if err != nil {
		t.Fatal(err)
	}
	d := tls.Dialer{Config: pki.ClientTLS(cert, h.auth.Roots(), pki.HubName, link.ALPN)}
	c, err := d.DialContext(t.Context(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if n, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) || n != 0 {
		t.Errorf("read %d, %v; want the end", n, err)
	}
}

// A job that runs for longer than its certificate is good goes on: the link is cut with each certificate and comes back with the one that was
// had meanwhile, and no byte is lost. When the site is removed the link is cut, and its runner hears that it is for good.
func TestLinkOutlivesItsCertificate(t *testing.T) {
	t.Parallel() // it waits
	h, id, addr, accept := spliced(t, "a")
	party := pki.Identity{Kind: pki.KindParty, Name: "a", Job: string(id)}
	issue := func() pki.Keypair {
		k, err := h.auth.Keypair(party, pki.Grant{TTL: 2 * time.Second})
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	dir := t.TempDir()
	if err := pki.SaveKeypair(dir, runner.CertName, issue()); err != nil {
		t.Fatal(err)
	}
	cred, err := pki.OpenCredential(dir, runner.CertName)
	if err != nil {
		t.Fatal(err)
	}
	conf, err := cred.ClientTLS(pki.HubName, link.ALPN)
	if err != nil {
		t.Fatal(err)
	}
	keeping, enough := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer enough()
	wg.Go(func() { // as the agent does
		cred.Keep(keeping, pki.Renewal{Renew: func(context.Context) (pki.Keypair, error) { return issue(), nil }})
	})
	var dialled atomic.Int64
	site, err := link.Dial(t.Context(), func(ctx context.Context) (net.Conn, error) {
		dialled.Add(1)
		return (&tls.Dialer{Config: conf}).DialContext(ctx, "tcp", addr)
	}, link.Options{Retry: patience})
	if err != nil {
		t.Fatal(err)
	}
	defer site.Close()
	hub := accept()
	// Bytes flow all the while, one way and back, until a certificate is over.
	far := make(chan error, 1)
	go func() {
		s, err := hub.Accept(t.Context())
		if err == nil {
			_, err = io.Copy(s, s)
		}
		far <- err
	}()
	s, err := site.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var n byte
	for began := time.Now(); hub.Stats().Resumes < 1; n++ {
		if _, err := s.Write([]byte{n}); err != nil {
			t.Fatal(err)
		}
		var b [1]byte
		if _, err := io.ReadFull(s, b[:]); err != nil || b[0] != n {
			t.Fatalf("byte %d came back as %d, %v", n, b[0], err)
		}
		if time.Since(began) > patience {
			t.Fatalf("the link was cut %d times", hub.Stats().Cuts)
		}
	}
	if dialled.Load() < 2 {
		t.Errorf("dialled %d times", dialled.Load())
	}
	began := time.Now()
	if err := h.db.RemoveIdentity(t.Context(), "site", "a", time.Now()); err != nil {
		t.Fatal(err)
	}
	select {
	case <-site.Done():
	case <-time.After(patience):
		t.Fatal("the link of a removed site goes on")
	}
	t.Logf("the link had ended %v after the removal", time.Since(began))
	if err := site.Err(); problem.CodeOf(err) != problem.Denied {
		t.Errorf("the link ended with %v", err)
	}
	_ = hub.Close() // nobody is at the other end
	if err := <-far; err == nil {
		t.Error("the hub's end of the stream ended well")
	}
}
