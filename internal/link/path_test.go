package link

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/pki/pkitest"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/test/chaos"
)

// network gives an acceptor and a dialer that are joined by a simulated network; both end with the test.
func network(t *testing.T, n *chaos.Network, opts Options) (*Acceptor, Dialer) {
	t.Helper()
	return accepting(t, n.Listener(), opts), as(n, anna)
}

// as dials for a peer, as the hub would.
func as(n *chaos.Network, p Peer) Dialer {
	return func(ctx context.Context) (net.Conn, error) {
		c, err := n.Dial(ctx)
		if err != nil {
			return nil, err
		}
		if err := WritePreface(c, p); err != nil {
			c.Close()
			return nil, err
		}
		return c, nil
	}
}

// over gives both ends of a session over such a network.
func over(t *testing.T, n *chaos.Network, opts Options) (site, hub *Session) {
	t.Helper()
	a, d := network(t, n, opts)
	opts.Retry = time.Hour
	return joined(t, a, d, opts)
}

// joined gives both ends of a session that d dials; they end with the test.
func joined(t *testing.T, a *Acceptor, d Dialer, opts Options) (site, hub *Session) {
	t.Helper()
	site, err := Dial(t.Context(), d, opts)
	if err != nil {
		t.Fatal(err)
	}
	if hub, err = a.Accept(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		var wg sync.WaitGroup
		wg.Go(func() { site.Close() })
		wg.Go(func() { hub.Close() })
		wg.Wait()
	})
	return site, hub
}

// same is a network of equal connections.
func same(s chaos.Script) *chaos.Network {
	return &chaos.Network{Next: func(int) chaos.Script { return s }}
}

func TestDeadPathIsReplacedWithinSilence(t *testing.T) {
	for _, c := range []struct {
		name     string
		up, down bool
	}{{"both directions", true, true}, {"up alone", true, false}, {"down alone", false, true}} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				way := chaos.Way{Delay: 50 * time.Millisecond}
				n := same(chaos.Script{Up: way, Down: way})
				told := make(chan Outage, 9)
				site, hub := over(t, n, Options{OnOutage: func(o Outage) { told <- o }})
				time.Sleep(2 * time.Hour) // an idle session keeps its transport
				if n.Count() != 1 || site.Err() != nil || hub.Err() != nil {
					t.Fatalf("idle for hours: %d connections; %v, %v", n.Count(), site.Err(), hub.Err())
				}
				near, far := streams(t, site, hub)
				n.Swallow(c.up, c.down)
				start := time.Now()
				var wg sync.WaitGroup
				wg.Go(func() { // a writer that is held up does not hide it
					if _, err := near.Write(make([]byte, 4<<20)); err != nil {
						t.Errorf("the writer was told %v", err)
					}
				})
				if _, err := io.CopyN(io.Discard, far, 4<<20); err != nil {
					t.Error(err)
				}
				wg.Wait()
				if took := time.Since(start); took > Silence+time.Second || n.Count() != 2 {
					t.Errorf("over %d connections after %v", n.Count(), took)
				}
				for range 2 {
					if o := <-told; o.Resumed.Sub(o.Cut) > Silence+time.Second || o.Resent > DefaultBuffer {
						t.Errorf("told of %+v", o)
					}
				}
			})
		})
	}
}

// 1 Mbit/s with megabytes queued before it, as home uplinks are: acknowledgements take half a minute, and nobody is dead.
func TestSlowPathIsNotDead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := same(chaos.Script{Up: chaos.Way{Delay: 20 * time.Millisecond, Rate: 125e3, Queue: 4 << 20}, Down: chaos.Way{Delay: 20 * time.Millisecond}})
		site, hub := over(t, n, Options{})
		const size = 20 << 20
		near, far := streams(t, site, hub)
		var wg sync.WaitGroup
		wg.Go(func() {
			_, err := near.Write(make([]byte, size))
			if err == nil {
				err = near.Close()
			}
			if err != nil {
				t.Errorf("send: %v", err)
			}
		})
		if got, err := io.Copy(io.Discard, far); got != size || err != nil {
			t.Errorf("received %d of %d bytes, %v", got, size, err)
		}
		far.Close()
		wg.Wait()
		if n.Count() != 1 || site.Stats().Cuts != 0 {
			t.Errorf("%d connections, %+v", n.Count(), site.Stats())
		}
	})
}

func TestWindowFillsALongFatPath(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const rate, warm, size = 125e6, 64 << 20, 128 << 20 // 1 Gbit/s: 1.1 s for the second part
		way := chaos.Way{Delay: 50 * time.Millisecond, Rate: rate, Queue: 32 << 20}
		site, hub := over(t, same(chaos.Script{Up: way, Down: way}), Options{})
		time.Sleep(time.Second) // the round trip has been measured
		near, far := streams(t, site, hub)
		var wg sync.WaitGroup
		wg.Go(func() {
			var err error
			b := make([]byte, 1<<20)
			for n := 0; err == nil && n < warm+size; n += len(b) {
				_, err = near.Write(b)
			}
			if err == nil {
				err = near.Close()
			}
			if err != nil {
				t.Errorf("send: %v", err)
			}
		})
		began := time.Now()
		if _, err := io.CopyN(struct{ io.Writer }{io.Discard}, far, warm); err != nil {
			t.Fatal(err)
		}
		grown := time.Now()
		n, err := io.Copy(struct{ io.Writer }{io.Discard}, far)
		took := time.Since(grown).Seconds()
		far.Close()
		wg.Wait()
		t.Logf("%d MiB took %.1f s, further %d MiB %.1f s: %.0f %% of the line", warm>>20, grown.Sub(began).Seconds(), size>>20, took, size/rate/took*100)
		// A window of 1 MiB would carry 8 % of the line, 8 MiB of replay buffer 67 %.
		if err != nil || n != size || took > 1.3*size/rate {
			t.Errorf("%d bytes took %.1f s, %v", n, took, err)
		}
	})
}

// site runner ═ TLS ═ hub ═ unix socket ═ hub runner, as in a job.
func TestWholeWay(t *testing.T) {
	ca := pkitest.Authority(t, "test")
	sock, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	port, err := tls.Listen("tcp", "127.0.0.1:0", pki.ServerTLS(pkitest.Cert(t, ca, pki.Identity{Kind: pki.KindHub, Name: "hub"}), ca.Roots(), ALPN))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	t.Cleanup(func() { cancel(); port.Close(); wg.Wait() })
	a := NewAcceptor(Options{})
	wg.Go(func() {
		if err := a.Serve(ctx, sock); err != nil {
			t.Error(err)
		}
	})
	spliced := make(chan error, 9)
	wg.Go(func() { // the hub
		for {
			c, err := port.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				conn, ok := c.(*tls.Conn)
				if !ok {
					t.Errorf("the port gave a %T", c)
					return
				}
				if err := conn.HandshakeContext(ctx); err != nil {
					conn.Close()
					return
				}
				id, err := pki.Expect(conn.ConnectionState(), pki.KindParty)
				if err != nil {
					conn.Close()
					return
				}
				u, err := net.Dial("unix", sock.Addr().String())
				if err != nil {
					t.Error(err)
					return
				}
				if err := WritePreface(u, Peer{id.Job, id.Name}); err != nil {
					t.Error(err)
				}
				spliced <- Splice(ctx, conn, u)
			})
		}
	})
	dialer := func(id pki.Identity) Dialer {
		d := &tls.Dialer{Config: pki.ClientTLS(pkitest.Cert(t, ca, id), ca.Roots(), "hub", ALPN)}
		return func(ctx context.Context) (net.Conn, error) { return d.DialContext(ctx, "tcp", port.Addr().String()) }
	}

	if _, err := Dial(ctx, dialer(pki.Identity{Kind: pki.KindSite, Name: "st-anna"}), Options{}); problem.CodeOf(err) != problem.LinkLost {
		t.Errorf("a site's own certificate opens a link: %v", err)
	}
	site, err := Dial(ctx, dialer(pki.Identity{Kind: pki.KindParty, Name: anna.Site, Job: anna.Job}), Options{})
	if err != nil {
		t.Fatal(err)
	}
	hub, err := a.Accept(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if hub.Peer() != anna {
		t.Errorf("the hub's runner sees %v", hub.Peer())
	}
	want := bytes.Repeat([]byte("pergola"), 1<<20)
	carry := func(near, far Stream) {
		t.Helper()
		wg.Go(func() {
			if _, err := near.Write(want); err != nil {
				t.Error(err)
			}
			if err := near.CloseWrite(); err != nil {
				t.Error(err)
			}
		})
		if got, err := io.ReadAll(far); err != nil || !bytes.Equal(got, want) {
			t.Errorf("read %d of %d bytes, %v", len(got), len(want), err)
		}
	}
	carry(streams(t, site, hub))
	for _, d := range [][2]*Session{{site, hub}, {hub, site}} {
		near, far := lanes(t, d[0], d[1])
		carry(near, far)
		far.Close()
		if _, err := near.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			t.Errorf("the end of a lane: %v", err)
		}
		near.Close()
		if err := <-spliced; err != nil {
			t.Errorf("a lane that ended in order: Splice: %v", err)
		}
		// The hub closes its socket when the other side breaks, which looks like an end in order to the runner there.
		near, far = lanes(t, d[0], d[1])
		if _, err := near.Write([]byte("a part")); err != nil {
			t.Error(err)
		}
		if _, err := io.ReadFull(far, make([]byte, 6)); err != nil {
			t.Error(err)
		}
		if err := near.Reset(); err != nil {
			t.Error(err)
		}
		if _, err := far.Read(make([]byte, 1)); !errors.Is(err, ErrReset) {
			t.Errorf("a lane that broke: %v", err)
		}
		far.Close()
		t.Log("the hub was told", <-spliced)
	}
	site.Close()
	<-hub.Done()
	if !errors.Is(hub.Err(), ErrPeerClosed) {
		t.Errorf("the hub's runner sees %v", hub.Err())
	}
	hub.Close()
	// The hub's runner closes its socket with nothing unread, or resets it: both end the splice.
	if err := <-spliced; err != nil && !strings.Contains(err.Error(), "reset") && !strings.Contains(err.Error(), "broken pipe") {
		t.Errorf("Splice: %v", err)
	}
}

func TestSpliceEndsWithContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		a, x := net.Pipe()
		b, y := net.Pipe()
		defer x.Close()
		defer y.Close()
		why := errors.New("the site was revoked")
		time.AfterFunc(time.Hour, func() { cancel(why) })
		if err := Splice(ctx, a, b); !errors.Is(err, why) {
			t.Errorf("Splice: %v", err)
		}
	})
}

// One side of a splice has ended in order; the other is dead and says nothing any more.
func TestSpliceDoesNotWaitForTheDead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, x := net.Pipe()
		near, _ := chaos.Pipe(chaos.Script{})
		x.Close()
		start := time.Now()
		// The end is passed on without closing the direction that is waited for.
		err := Splice(t.Context(), a, near)
		if took := time.Since(start); took > Silence+time.Second || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("Splice took %v, %v", took, err)
		}
	})
}

// Strangers that hold connections open without saying who they are go away by themselves and keep nobody out.
func TestHalfOpenConnectionsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &chaos.Network{}
		a, d := network(t, n, Options{})
		var wg sync.WaitGroup
		for i := range 2 * maxHandshakes {
			near, err := n.Dial(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			wg.Go(func() {
				defer near.Close()
				b := []byte("PGLP\x01\x40")
				if _, err := near.Write(b[:i%(len(b)+1)]); err != nil {
					t.Error(err)
				}
				if _, err := near.Read(b); err == nil {
					t.Error("a stranger was answered")
				}
			})
		}
		site, err := Dial(t.Context(), d, Options{Retry: time.Minute})
		if err != nil {
			t.Fatal(err)
		}
		hub, err := a.Accept(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		site.Close()
		hub.Close()
		wg.Wait()
	})
}
