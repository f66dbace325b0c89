package link

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pergolafl/pergola/internal/compat"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/pki/pkitest"
)

// hubOf is a hub with one job's runner: it splices what comes to its port to the runner's socket, and tells how each splice ended. via
// gives the address to dial in the port's place; nil: the port itself.
func hubOf(t *testing.T, via func(port string) string) (a *Acceptor, dial Dialer, ended <-chan error) {
	t.Helper()
	ca := pkitest.Authority(t, "hub")
	port, err := tls.Listen("tcp", "127.0.0.1:0", pki.ServerTLS(pkitest.Cert(t, ca, pki.Identity{Kind: pki.KindHub, Name: "hub"}), ca.Roots(), ALPN))
	if err != nil {
		t.Fatal(err)
	}
	sock, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	a = accepting(t, sock, Options{})
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	spliced := make(chan error, 64) // more than a test has connections
	wg.Go(func() {
		for {
			c, err := port.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				u, err := net.Dial("unix", sock.Addr().String())
				if err == nil {
					err = HandOn(u, anna, c)
				}
				if err == nil {
					err = Splice(ctx, c, u)
				}
				spliced <- err
			})
		}
	})
	t.Cleanup(func() { cancel(); port.Close(); wg.Wait() })
	d := &tls.Dialer{Config: pki.ClientTLS(pkitest.Cert(t, ca, pki.Identity{Kind: pki.KindParty, Name: anna.Site, Job: anna.Job}), ca.Roots(), "hub", ALPN)}
	addr := port.Addr().String()
	if via != nil {
		addr = via(addr)
	}
	return a, func(ctx context.Context) (net.Conn, error) { return d.DialContext(ctx, "tcp", addr) }, spliced
}

// parcel sends over a lane, and gives what arrived and what the sender heard.
func parcel(t *testing.T, near, far Stream, sent []byte) ([]byte, error) {
	t.Helper()
	var wg sync.WaitGroup
	var serr error
	wg.Go(func() {
		if _, serr = near.Write(sent); serr == nil {
			serr = near.CloseWrite()
		}
	})
	got, err := io.ReadAll(far)
	wg.Wait()
	return got, errors.Join(err, serr, far.Close(), near.Close())
}

// A lane leaves the hub: its splice ends in order before anything of the lane passes. One of an end that does not know of it stays.
func TestLanesLeaveTheHub(t *testing.T) {
	for name, c := range map[string]struct {
		speak compat.Range
		leave bool
	}{"now": {leave: true}, "with a site of version 3": {speak: compat.Range{Min: 2, Max: 3}}} {
		t.Run(name, func(t *testing.T) {
			a, dial, spliced := hubOf(t, nil)
			site, hub := joined(t, a, dial, Options{speak: c.speak})
			for _, d := range [][2]*Session{{site, hub}, {hub, site}} {
				near, far := lanes(t, d[0], d[1])
				if c.leave {
					if err := <-spliced; err != nil {
						t.Errorf("the hub's part ended with %v", err)
					}
				}
				sent := bytes.Repeat([]byte("pergola"), 1<<20)
				got, err := parcel(t, near, far, sent)
				if err != nil || !bytes.Equal(got, sent) {
					t.Errorf("%d bytes came, equal: %v, %v", len(got), bytes.Equal(got, sent), err)
				}
				if !c.leave {
					if err := <-spliced; err != nil {
						t.Errorf("the hub's part ended with %v", err)
					}
				}
			}
		})
	}
}

// With its link, a lane that has left the hub is cut, for the hub cannot reach it; its place is free again.
func TestLanesOutsideAreCutWithTheLink(t *testing.T) {
	a, dial, _ := hubOf(t, nil)
	site, hub := joined(t, a, dial, Options{})
	for range 2 * maxLanes {
		near, far := lanes(t, site, hub)
		cutLink(hub)
		for _, end := range []Stream{far, near} {
			if _, err := end.Read(make([]byte, 1)); !errors.Is(err, ErrReset) {
				t.Fatalf("read %v", err)
			}
			if err := end.Close(); err != nil {
				t.Error(err)
			}
		}
		// The link is there again when a stream passes.
		near, far = streams(t, site, hub)
		if got, err := parcel(t, near, far, []byte("x")); err != nil || string(got) != "x" {
			t.Fatalf("%q, %v", got, err)
		}
	}
}

// Whatever the byte after which the connection of a lane is cut while it leaves the hub, the lane is whole or broken, and the session goes on.
func TestHandoverIsCutAnywhere(t *testing.T) {
	const most, step = 7000, 101
	for _, up := range []bool{true, false} {
		whole, broken := 0, 0
		for after := 1; after < most; after += step {
			conns := 0
			a, dial, _ := hubOf(t, func(port string) string {
				return cutting(t, port, func() (upTo, downTo int64) {
					conns++
					switch {
					case conns != 2:
						return -1, -1
					case up:
						return int64(after), -1
					}
					return -1, int64(after)
				})
			})
			site, hub := joined(t, a, dial, Options{})
			sent := []byte("what is sent")
			var arrived atomic.Int32
			ctx, cancel := context.WithCancel(t.Context())
			var accepting sync.WaitGroup
			accepting.Go(func() {
				for {
					far, err := hub.Accept(ctx)
					if err != nil {
						return
					}
					got, err := io.ReadAll(far)
					if err == nil && bytes.Equal(got, sent) {
						arrived.Add(1)
					} else if err == nil {
						t.Errorf("after %d bytes: %q came for a whole", after, got)
					}
					if err := far.Close(); err != nil {
						t.Error(err)
					}
				}
			})
			send := func(open func(context.Context) (Stream, error)) error {
				near, err := open(t.Context())
				if err != nil {
					return err
				}
				defer near.Close()
				if _, err = near.Write(sent); err == nil {
					err = near.CloseWrite()
				}
				if err == nil {
					_, err = near.Read(make([]byte, 1))
				}
				if errors.Is(err, io.EOF) {
					return nil
				}
				return err
			}
			switch err := send(site.OpenLane); {
			case err == nil:
				whole++
				if arrived.Load() != 1 {
					t.Errorf("after %d bytes: the sender takes for sent what has not arrived", after)
				}
			case errors.Is(err, ErrNoLane) || errors.Is(err, ErrReset):
				broken++
			default:
				t.Errorf("after %d bytes: %v", after, err)
			}
			if err := send(site.Open); err != nil {
				t.Errorf("after %d bytes, by a stream: %v", after, err)
			}
			cancel()
			accepting.Wait()
			if n := site.Stats().Cuts; n != 0 {
				t.Errorf("after %d bytes: the session's own connection was cut", after)
			}
		}
		t.Logf("up %v: %d whole, %d broken", up, whole, broken)
		if whole == 0 || broken == 0 {
			t.Error("the bytes tried are not those that matter")
		}
	}
}

// cutting is a path to a port that cuts connections after so many bytes up or down; -1: never.
func cutting(t *testing.T, port string, next func() (up, down int64)) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			up, down := next()
			wg.Go(func() {
				defer c.Close()
				to, err := net.Dial("tcp", port)
				if err != nil {
					t.Error(err)
					return
				}
				defer to.Close()
				var both sync.WaitGroup
				pass := func(to, from net.Conn, upTo int64) {
					if upTo < 0 {
						_, _ = io.Copy(to, from)
					} else {
						_, _ = io.CopyN(to, from, upTo)
					}
					_, _ = to.Close(), from.Close()
				}
				both.Go(func() { pass(to, c, up) })
				both.Go(func() { pass(c, to, down) })
				both.Wait()
			})
		}
	})
	t.Cleanup(func() { ln.Close(); wg.Wait() })
	return ln.Addr().String()
}

// ends waits until the hub's part has ended, in whatever way.
func ends(t *testing.T, spliced <-chan error) {
	t.Helper()
	select {
	case err := <-spliced:
		t.Logf("the hub's part ended with %v", err)
	case <-t.Context().Done():
		t.Error("the hub's part goes on")
	}
}

// begun is a connection of a lane with that number, up to the START. stays tells that it is not to leave the hub.
func begun(t *testing.T, dial Dialer, l *line, number uint64) (conn net.Conn, pin []byte, greeting frame, stays bool) {
	t.Helper()
	conn, err := dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	greeting = laneFrame(l.id, l.secret, number)
	if _, err := conn.Write(appendFrame(nil, greeting)); err != nil {
		t.Fatal(err)
	}
	f, err := readFrame(conn)
	if err != nil {
		t.Fatal(err)
	}
	if pin, err = f.handedStart(l.id, Version); err != nil {
		t.Fatalf("a START of %d bytes: %v", len(f.body), err)
	}
	return conn, pin, greeting, pin == nil
}

func overTLS(t *testing.T, c net.Conn) *tls.Conn {
	t.Helper()
	tc, ok := c.(*tls.Conn)
	if !ok {
		t.Fatalf("a %T is dialled", c)
	}
	return tc
}

// nothing expects that no stream comes of what was tried, and that no place is taken.
func nothing(t *testing.T, hub *Session) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if s, err := hub.Accept(ctx); err == nil {
		t.Errorf("a stream came of it: %v", s)
	}
	hub.line.mu.Lock()
	defer hub.line.mu.Unlock()
	if hub.line.theirs != 0 {
		t.Errorf("%d places are taken", hub.line.theirs)
	}
}

// cutLink is what the hub does when it ends a link.
func cutLink(hub *Session) {
	hub.line.mu.Lock()
	tr := hub.line.tr
	hub.line.mu.Unlock()
	hub.line.detach(tr, errors.New("the hub has ended it"))
}

// Nobody takes over what a site has begun who lacks the session's secret, and no site goes on with a key of which the hub's TLS has not told it.
func TestStrangersTakeNoLaneOver(t *testing.T) {
	for name, harm := range map[string]func(pin, secret []byte){
		"secret": func(_, secret []byte) { secret[0] ^= 1 },
		"key":    func(pin, _ []byte) { pin[3] ^= 1 },
	} {
		t.Run(name, func(t *testing.T) {
			a, dial, spliced := hubOf(t, nil)
			site, hub := joined(t, a, dial, Options{})
			conn, pin, greeting, _ := begun(t, dial, site.line, 0)
			harm(pin, greeting.body[idSize:])
			over, err := leaveHub(t.Context(), conn, pin, greeting)
			if err == nil {
				_, err = over.Read(make([]byte, 1))
			}
			if err == nil {
				t.Error("a lane began")
			}
			hardClose(conn)
			ends(t, spliced)
			nothing(t, hub)
		})
	}
}

// A lane that is leaving the hub while the link is cut does not come about, nor does one leave in an outage: the hub may have ended the link for good.
func TestNoLaneLeavesWithoutItsLink(t *testing.T) {
	a, dial, spliced := hubOf(t, nil)
	site, hub := joined(t, a, dial, Options{})
	conn, pin, greeting, _ := begun(t, dial, site.line, 0)
	defer hardClose(conn)
	if err := overTLS(t, conn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if err := <-spliced; err != nil {
		t.Fatal(err)
	}
	cutLink(hub)
	if over, err := leaveHub(t.Context(), conn, pin, greeting); err == nil {
		if _, err := over.Read(make([]byte, 1)); err == nil {
			t.Error("it goes on")
		}
	}
	nothing(t, hub)
}

func TestNoLaneLeavesInAnOutage(t *testing.T) {
	a, dial, _ := hubOf(t, nil)
	id, secret, err := newSessionID()
	if err != nil {
		t.Fatal(err)
	}
	l := newLine(id, secret, Peer{anna.Job, "hub"}, Options{})
	defer l.finish(nil)
	conn, err := l.connect(t.Context(), dial)
	if err != nil {
		t.Fatal(err)
	}
	hub, err := a.Accept(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer hub.abandon()
	hardClose(conn)
	cutLink(hub)
	lane, _, _, stays := begun(t, dial, l, 0)
	defer hardClose(lane)
	if !stays {
		t.Error("it leaves")
	}
}

// Whoever stalls in the middle holds up neither the end of the acceptor nor that of the session.
func TestStalledHandoverHoldsUpNobody(t *testing.T) {
	var conn net.Conn
	var began time.Time
	t.Cleanup(func() { // the last one: sessions and acceptor have ended
		hardClose(conn)
		if took := time.Since(began); took > closeWait+laneWait/2 {
			t.Errorf("it took %v", took)
		}
	})
	a, dial, _ := hubOf(t, nil)
	site, _ := joined(t, a, dial, Options{})
	conn, _, _, _ = begun(t, dial, site.line, 0)
	c := overTLS(t, conn)
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	tc := tls.Client(c.NetConn(), &tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true})
	if err := tc.SetDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	if err := tc.Handshake(); err != nil {
		t.Fatal(err)
	}
	began = time.Now()
}

// Something on the way does not let a second TLS begin on a connection: the next lane stays with the hub.
func TestLanesStayWhereTheyMust(t *testing.T) {
	a, dial, _ := hubOf(t, nil)
	var broken atomic.Int32
	site, hub := joined(t, a, dial, Options{DialLane: func(ctx context.Context) (net.Conn, error) {
		c, err := dial(ctx)
		if err != nil {
			return nil, err
		}
		return particular{overTLS(t, c), &broken}, nil
	}})
	if _, err := site.OpenLane(t.Context()); !errors.Is(err, ErrNoLane) || broken.Load() != 1 {
		t.Fatalf("the first lane: %v, %d broken", err, broken.Load())
	}
	for stays := false; !stays; { // what the acceptor learns of it comes by itself
		hub.line.mu.Lock()
		stays = hub.line.stays
		hub.line.mu.Unlock()
	}
	for _, d := range [][2]*Session{{site, hub}, {hub, site}} {
		near, far := lanes(t, d[0], d[1])
		if got, err := parcel(t, near, far, []byte("x")); err != nil || string(got) != "x" {
			t.Errorf("%q, %v", got, err)
		}
	}
}

// particular is a connection that takes no second TLS.
type particular struct {
	*tls.Conn
	broken *atomic.Int32
}

func (p particular) NetConn() net.Conn {
	return particularBelow{p.Conn.NetConn(), p.broken}
}

type particularBelow struct {
	net.Conn
	broken *atomic.Int32
}

func (p particularBelow) NetConn() net.Conn { return p.Conn }

func (p particularBelow) Write(b []byte) (int, error) {
	p.broken.Add(1)
	hardClose(p.Conn)
	return 0, net.ErrClosed
}

// A runner that knows nothing of handing on reads the same preface, and the descriptor goes.
func TestHandedOnToAnOlderRunner(t *testing.T) {
	sock, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer sock.Close()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	both := make([]net.Conn, 4)
	for i, dial := range []func() (net.Conn, error){
		func() (net.Conn, error) { return net.Dial("tcp", ln.Addr().String()) }, ln.Accept,
		func() (net.Conn, error) { return net.Dial("unix", sock.Addr().String()) }, sock.Accept,
	} {
		if both[i], err = dial(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { both[i].Close() })
	}
	if err := HandOn(both[2], anna, both[1]); err != nil {
		t.Fatal(err)
	}
	if p, err := ReadPreface(both[3]); err != nil || p != anna {
		t.Fatalf("%v, %v", p, err)
	}
	if err := both[1].Close(); err != nil { // nobody else has it
		t.Fatal(err)
	}
	if _, err := both[0].Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("read %v", err)
	}
}
