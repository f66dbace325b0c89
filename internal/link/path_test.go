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
	"github.com/pergolafl/pergola/internal/problem"
)

// pipe is one direction of a simulated network: bytes come out delay after they went in, at rate bytes per second
// (0: at once), and writers wait while queue bytes are under way (0: never). Time is the bubble's.
type pipe struct {
	delay time.Duration
	rate  float64
	queue int

	mu       sync.Mutex
	changed  *sync.Cond
	segments []segment // guarded by mu, as all below
	queued   int
	free     time.Time // when the line has sent what is queued
	closed   bool
	dead     bool // swallows everything from now on
	readBy   time.Time
	writeBy  time.Time
}

type segment struct {
	at   time.Time
	data []byte
}

func newPipe(delay time.Duration, rate float64, queue int) *pipe {
	p := &pipe{delay: delay, rate: rate, queue: queue}
	p.changed = sync.NewCond(&p.mu)
	return p
}

// waitLocked waits for a change, or until a time.
func (p *pipe) waitLocked(until time.Time) {
	if !until.IsZero() {
		t := time.AfterFunc(time.Until(until), p.changed.Broadcast)
		defer t.Stop()
	}
	p.changed.Wait()
}

func past(t time.Time) bool { return !t.IsZero() && !time.Now().Before(t) }

func (p *pipe) read(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		if past(p.readBy) {
			return 0, os.ErrDeadlineExceeded
		}
		until := p.readBy
		if len(p.segments) > 0 {
			s := &p.segments[0]
			if !s.at.After(time.Now()) {
				n := copy(b, s.data)
				if s.data = s.data[n:]; len(s.data) == 0 {
					p.segments = p.segments[1:]
				}
				p.queued -= n
				p.changed.Broadcast()
				return n, nil
			}
			if until.IsZero() || s.at.Before(until) {
				until = s.at
			}
		} else if p.closed {
			return 0, io.EOF
		}
		p.waitLocked(until)
	}
}

func (p *pipe) write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	total := 0
	for total < len(b) {
		switch {
		case p.closed:
			return total, net.ErrClosed
		case past(p.writeBy):
			return total, os.ErrDeadlineExceeded
		case p.queue > 0 && p.queued >= p.queue:
			p.waitLocked(p.writeBy)
			continue
		}
		n := min(len(b)-total, 16<<10)
		if now := time.Now(); p.free.Before(now) {
			p.free = now
		}
		if p.rate > 0 {
			p.free = p.free.Add(time.Duration(float64(n) / p.rate * float64(time.Second)))
		}
		if !p.dead {
			p.segments = append(p.segments, segment{p.free.Add(p.delay), bytes.Clone(b[total : total+n])})
		}
		p.queued += n
		total += n
		p.changed.Broadcast()
	}
	return total, nil
}

// end is one end of two pipes.
type end struct{ in, out *pipe }

func (e end) Read(b []byte) (int, error)  { return e.in.read(b) }
func (e end) Write(b []byte) (int, error) { return e.out.write(b) }
func (e end) LocalAddr() net.Addr         { return &net.UnixAddr{Name: "simulated", Net: "unix"} }
func (e end) RemoteAddr() net.Addr        { return e.LocalAddr() }

func set(p *pipe, f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f()
	p.changed.Broadcast()
}

func (e end) Close() error {
	set(e.in, func() { e.in.closed, e.in.segments = true, nil })
	set(e.out, func() { e.out.closed = true })
	return nil
}

func (e end) SetReadDeadline(t time.Time) error { set(e.in, func() { e.in.readBy = t }); return nil }

func (e end) SetWriteDeadline(t time.Time) error {
	set(e.out, func() { e.out.writeBy = t })
	return nil
}

func (e end) SetDeadline(t time.Time) error {
	return errors.Join(e.SetReadDeadline(t), e.SetWriteDeadline(t))
}

// over gives both ends of a session over two pipes.
func over(t *testing.T, up, down *pipe) (site, hub *Session) {
	t.Helper()
	rtt := up.delay + down.delay
	site, err := newSession(end{down, up}, true, Peer{}, sessionID{}, rtt)
	if err != nil {
		t.Fatal(err)
	}
	if hub, err = newSession(end{up, down}, false, Peer{}, sessionID{}, rtt); err != nil {
		t.Fatal(err)
	}
	return site, hub
}

func TestDeadPathIsFoundWithinSilence(t *testing.T) {
	for name, kill := range map[string]func(up, down *pipe){
		"both directions": func(up, down *pipe) { set(up, func() { up.dead = true }); set(down, func() { down.dead = true }) },
		"up alone":        func(up, _ *pipe) { set(up, func() { up.dead = true }) },
		"down alone":      func(_, down *pipe) { set(down, func() { down.dead = true }) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				up, down := newPipe(50*time.Millisecond, 0, 1<<20), newPipe(50*time.Millisecond, 0, 1<<20)
				site, hub := over(t, up, down)
				time.Sleep(10 * time.Hour) // an idle session lives
				if site.Err() != nil || hub.Err() != nil {
					t.Fatalf("idle for hours: %v, %v", site.Err(), hub.Err())
				}
				s, err := site.Open(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				kill(up, down)
				start := time.Now()
				var wg sync.WaitGroup
				wg.Go(func() { // a writer that is held up does not hide it
					var err error
					for err == nil {
						_, err = s.Write(make([]byte, 64<<10))
					}
					if !errors.Is(err, ErrReset) {
						t.Errorf("the writer was told %v", err)
					}
				})
				<-site.Done()
				<-hub.Done()
				if took := time.Since(start); took > Silence+time.Second {
					t.Errorf("found after %v", took)
				}
				for _, s := range []*Session{site, hub} {
					if p := problem.From(s.Err()); p.Code != problem.LinkLost || errors.Is(s.Err(), ErrClosed) {
						t.Errorf("ended with %v", s.Err())
					}
					s.Close()
				}
				wg.Wait()
			})
		})
	}
}

// 1 Mbit/s with megabytes queued before it, as home uplinks are: pings take half a minute, and nobody is dead.
func TestSlowPathIsNotDead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up, down := newPipe(20*time.Millisecond, 125e3, 4<<20), newPipe(20*time.Millisecond, 0, 1<<20)
		site, hub := over(t, up, down)
		var wg sync.WaitGroup
		const size = 20 << 20
		wg.Go(func() {
			s, err := site.Open(t.Context())
			if err == nil {
				_, err = s.Write(make([]byte, size))
			}
			if err == nil {
				err = s.Close()
			}
			if err != nil {
				t.Errorf("send: %v", err)
			}
		})
		s, err := hub.Accept(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if n, err := io.Copy(io.Discard, s); n != size || err != nil {
			t.Errorf("received %d of %d bytes, %v", n, size, err)
		}
		s.Close()
		wg.Wait()
		site.Close()
		hub.Close()
	})
}

func TestWindowFillsALongFatPath(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const rate, warm, size = 125e6, 64 << 20, 128 << 20 // 1 Gbit/s: 1.1 s for the second part
		up, down := newPipe(50*time.Millisecond, rate, 32<<20), newPipe(50*time.Millisecond, rate, 32<<20)
		site, hub := over(t, up, down)
		time.Sleep(time.Second) // the round trip has been measured
		var wg sync.WaitGroup
		wg.Go(func() {
			s, err := site.Open(t.Context())
			b := make([]byte, 1<<20)
			for n := 0; err == nil && n < warm+size; n += len(b) {
				_, err = s.Write(b)
			}
			if err == nil {
				err = s.Close()
			}
			if err != nil {
				t.Errorf("send: %v", err)
			}
		})
		s, err := hub.Accept(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		if _, err := io.CopyN(struct{ io.Writer }{io.Discard}, s, warm); err != nil {
			t.Fatal(err)
		}
		grown := time.Now()
		n, err := io.Copy(struct{ io.Writer }{io.Discard}, s)
		took := time.Since(grown).Seconds()
		s.Close()
		wg.Wait()
		site.Close()
		hub.Close()
		t.Logf("%d MiB took %.1f s, further %d MiB %.1f s: %.0f %% of the line", warm>>20, grown.Sub(began).Seconds(), size>>20, took, size/rate/took*100)
		// The first window, 256 KiB, would carry 2 % of the line.
		if err != nil || n != size || took > 1.3*size/rate {
			t.Errorf("%d bytes took %.1f s, %v", n, took, err)
		}
	})
}

func TestReadersThatStallDoNotFillTheMemory(t *testing.T) {
	b := new(budget)
	first, err := b.span()
	if err != nil {
		t.Fatal(err)
	}
	second, err := b.span()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range []struct {
		m    interface{ ReserveMemory(int, uint8) error }
		size int
		prio uint8
		ok   bool
	}{
		{first, 256 << 10, 255, true},
		{first, MaxWindow, 128, true},
		{second, MaxWindow, 128, true},
		{second, 1, 128, false},
		{second, 256 << 10, 255, true}, // another stream can always be opened
	} {
		if err := m.m.ReserveMemory(m.size, m.prio); (err == nil) != m.ok {
			t.Errorf("reserve %d at %d: %v", m.size, m.prio, err)
		}
	}
	first.Done()
	if err := second.ReserveMemory(MaxWindow, 128); err != nil {
		t.Errorf("after a stream has ended: %v", err)
	}
	second.ReleaseMemory(1)
	second.Done()
	if b.used != 0 {
		t.Errorf("%d bytes are held by nobody", b.used)
	}
}

// site runner ═ TLS ═ hub ═ unix socket ═ hub runner, as in a job.
func TestWholeWay(t *testing.T) {
	ca, err := pki.NewAuthority("test")
	if err != nil {
		t.Fatal(err)
	}
	cert := func(id pki.Identity) tls.Certificate {
		k, err := ca.NewKeypair(id, nil, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		c, err := k.Certificate()
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	sock, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	port, err := tls.Listen("tcp", "127.0.0.1:0", pki.ServerTLS(cert(pki.Identity{Kind: pki.KindHub, Name: "hub"}), ca.Roots(), ALPN))
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
	spliced := make(chan error, 2)
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
		d := &tls.Dialer{Config: pki.ClientTLS(cert(id), ca.Roots(), "hub", ALPN)}
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
	near, far := streams(t, site, hub)
	want := bytes.Repeat([]byte("pergola"), 1<<20)
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
		up, down := newPipe(0, 0, 0), newPipe(0, 0, 0)
		x.Close()
		start := time.Now()
		// halfCloser: the end is passed on without closing the direction that is waited for.
		err := Splice(t.Context(), a, halfCloser{end{down, up}})
		if took := time.Since(start); took > Silence+time.Second || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("Splice took %v, %v", took, err)
		}
	})
}

type halfCloser struct{ end }

func (h halfCloser) CloseWrite() error { set(h.out, func() { h.out.closed = true }); return nil }

// Strangers that hold connections open without saying who they are go away by themselves and keep nobody out.
func TestHalfOpenConnectionsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := &listener{conns: make(chan net.Conn), closed: make(chan struct{})}
		a := NewAcceptor(Options{})
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := a.Serve(ctx, ln); err != nil {
				t.Error(err)
			}
		})
		for i := range 2 * maxHandshakes {
			near, far := net.Pipe()
			ln.conns <- far
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
		s, err := Dial(ctx, func(ctx context.Context) (net.Conn, error) {
			near, far := net.Pipe()
			select {
			case ln.conns <- far:
			case <-ctx.Done():
				return nil, ctx.Err()
			}
			return near, WritePreface(near, anna)
		}, Options{})
		if err != nil {
			t.Fatal(err)
		}
		hub, err := a.Accept(ctx)
		if err != nil {
			t.Fatal(err)
		}
		s.Close()
		hub.Close()
		cancel()
		wg.Wait()
	})
}

type listener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}
func (l *listener) Close() error   { l.once.Do(func() { close(l.closed) }); return nil }
func (l *listener) Addr() net.Addr { return &net.UnixAddr{} }
