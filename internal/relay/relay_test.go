package relay_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/pergolafl/pergola/internal/link"
	"github.com/pergolafl/pergola/internal/relay"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// sessions gives both ends of a link over loopback TCP.
func sessions(t *testing.T) (near, far *link.Session) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	a := link.NewAcceptor(link.Options{})
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := a.Serve(ctx, ln); err != nil {
			t.Errorf("serve links: %v", err)
		}
	})
	near, err = link.Dial(t.Context(), func(ctx context.Context) (net.Conn, error) {
		c, err := new(net.Dialer).DialContext(ctx, "tcp", ln.Addr().String())
		if err != nil {
			return nil, err
		}
		return c, link.WritePreface(c, link.Peer{Job: "job", Site: "st-anna"})
	}, link.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if far, err = a.Accept(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_, _ = near.Close(), far.Close()
		cancel()
		wg.Wait()
	})
	return near, far
}

// chain is a relay whose ends are programs of the test: dial gives a connection through it, and accepted the far
// program's end of it.
type chain struct {
	near, far *link.Session
	addr      string
	program   net.Listener // the far program
	cancel    context.CancelFunc
	ended     sync.WaitGroup // Listen and Serve have returned
}

func newChain(t *testing.T, dial func(context.Context, string) (net.Conn, error)) *chain {
	t.Helper()
	c := &chain{}
	c.near, c.far = sessions(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c.addr = ln.Addr().String()
	if c.program, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	if dial == nil {
		dial = func(ctx context.Context, target string) (net.Conn, error) {
			if target != "fleet" {
				return nil, errors.New("no such target")
			}
			return new(net.Dialer).DialContext(ctx, "tcp", c.program.Addr().String())
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	c.cancel = cancel
	c.ended.Go(func() {
		if err := relay.Listen(ctx, ln, "fleet", c.near.Open); err != nil {
			t.Errorf("Listen: %v", err)
		}
	})
	c.ended.Go(func() {
		// A test may end the link below the relay.
		if err := relay.Serve(ctx, c.far.Accept, dial); err != nil && c.far.Err() == nil {
			t.Errorf("Serve: %v", err)
		}
	})
	t.Cleanup(func() {
		cancel()
		c.program.Close()
		c.ended.Wait()
	})
	return c
}

// connect gives both programs' ends of one connection.
func (c *chain) connect(t *testing.T) (near, far *net.TCPConn) {
	t.Helper()
	a, err := net.Dial("tcp", c.addr)
	if err != nil {
		t.Fatal(err)
	}
	b, err := c.program.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	// A test that hangs says where.
	_ = a.SetDeadline(time.Now().Add(time.Minute))
	_ = b.SetDeadline(time.Now().Add(time.Minute))
	near, ok := a.(*net.TCPConn)
	far, ok2 := b.(*net.TCPConn)
	if !ok || !ok2 {
		t.Fatalf("not TCP: %T, %T", a, b)
	}
	return near, far
}

func wantReset(t *testing.T, who string, c net.Conn) {
	t.Helper()
	if n, err := io.Copy(io.Discard, c); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("%s: read %d bytes and %v, want a reset", who, n, err)
	}
}

func wantEnd(t *testing.T, who string, c net.Conn, want string) {
	t.Helper()
	if got, err := io.ReadAll(c); err != nil || string(got) != want {
		t.Errorf("%s: read %q and %v, want %q and the end", who, got, err, want)
	}
}

func send(t *testing.T, c net.Conn, s string) {
	t.Helper()
	if _, err := io.WriteString(c, s); err != nil {
		t.Fatalf("write: %v", err)
	}
}

func TestHalfCloseBothWays(t *testing.T) {
	c := newChain(t, nil)
	for _, swap := range []bool{false, true} {
		a, b := c.connect(t)
		if swap {
			a, b = b, a
		}
		send(t, a, "question")
		if err := a.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		wantEnd(t, "the one asked", b, "question")
		send(t, b, "answer")
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
		wantEnd(t, "the one that asked", a, "answer")
	}
}

func TestResetBothWays(t *testing.T) {
	kill := func(t *testing.T, c *net.TCPConn) {
		t.Helper()
		if err := errors.Join(c.SetLinger(0), c.Close()); err != nil {
			t.Fatal(err)
		}
	}
	c := newChain(t, nil)
	for _, swap := range []bool{false, true} {
		pair := func() (*net.TCPConn, *net.TCPConn) {
			a, b := c.connect(t)
			if swap {
				return b, a
			}
			return a, b
		}
		t.Run("in the open", func(t *testing.T) {
			a, b := pair()
			kill(t, a)
			wantReset(t, "the other", b)
		})
		t.Run("of one that had sent its end", func(t *testing.T) {
			a, b := pair()
			send(t, a, "q")
			if err := a.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			wantEnd(t, "the other", b, "q")
			kill(t, a)
			// The other learns it when it goes on writing, as its kernel would tell it.
			var err error
			for err == nil {
				_, err = b.Write(make([]byte, 64<<10))
			}
			if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
				t.Errorf("writing on gave %v", err)
			}
		})
		t.Run("of one that was told the end", func(t *testing.T) {
			a, b := pair()
			if err := b.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			wantEnd(t, "the one told", a, "")
			kill(t, a)
			wantReset(t, "the other", b)
		})
		t.Run("closed while the other still sends", func(t *testing.T) {
			a, b := pair()
			if err := a.Close(); err != nil {
				t.Fatal(err)
			}
			var err error
			for err == nil {
				_, err = b.Write(make([]byte, 64<<10))
			}
			if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
				t.Errorf("writing on gave %v", err)
			}
		})
	}
}

func TestRefusedFarEndIsAReset(t *testing.T) {
	c := newChain(t, func(ctx context.Context, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", "127.0.0.1:1") // tcpmux: nobody listens there
	})
	a, err := net.Dial("tcp", c.addr)
	if errors.Is(err, syscall.ECONNRESET) {
		return // it came that soon
	}
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	_ = a.SetDeadline(time.Now().Add(time.Minute))
	wantReset(t, "the program", a)
}

func TestOpenThatFailsIsAReset(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() {
		if err := relay.Listen(ctx, ln, "fleet", func(context.Context) (relay.Stream, error) { return nil, errors.New("no link") }); err != nil {
			t.Error(err)
		}
	})
	a, err := net.Dial("tcp", ln.Addr().String())
	if errors.Is(err, syscall.ECONNRESET) {
		return // it came that soon
	}
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	wantReset(t, "the program", a)
}

func TestProgramThatIsNotReadyYet(t *testing.T) {
	ready := make(chan struct{})
	var c *chain
	c = newChain(t, func(ctx context.Context, _ string) (net.Conn, error) {
		select {
		case <-ready:
			return new(net.Dialer).DialContext(ctx, "tcp", c.program.Addr().String())
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	})
	a, err := net.Dial("tcp", c.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	send(t, a, "early")
	close(ready)
	b, err := c.program.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	got := make([]byte, 5)
	if _, err := io.ReadFull(b, got); err != nil || string(got) != "early" {
		t.Errorf("read %q, %v", got, err)
	}
}

// A reader that does not read holds back its own connection's writer and nobody else.
func TestSlowReader(t *testing.T) {
	c := newChain(t, nil)
	a, b := c.connect(t)
	var wg sync.WaitGroup
	defer wg.Wait()
	sent := bytes.Repeat([]byte("0123456789abcdef"), 3<<20) // 48 MiB: more than windows and sockets hold
	stuck := make(chan struct{})
	wg.Go(func() {
		for n := 0; n < len(sent); {
			m := min(64<<10, len(sent)-n)
			if _, err := a.Write(sent[n : n+m]); err != nil {
				t.Errorf("write: %v", err)
				return
			}
			n += m
			if n == 4<<20 {
				close(stuck)
			}
		}
		if err := a.CloseWrite(); err != nil {
			t.Errorf("close for writing: %v", err)
		}
	})
	<-stuck
	for range 20 {
		x, y := c.connect(t)
		send(t, x, "quick")
		x.CloseWrite()
		wantEnd(t, "beside the slow reader", y, "quick")
		y.Close()
	}
	got, err := io.ReadAll(b)
	if err != nil || !bytes.Equal(got, sent) {
		t.Errorf("read %d of %d bytes, %v", len(got), len(sent), err)
	}
}

func TestThousandsOfShortConnections(t *testing.T) {
	c := newChain(t, nil)
	const workers, each = 32, 100
	var wg sync.WaitGroup
	wg.Go(func() {
		var echo sync.WaitGroup
		defer echo.Wait()
		for range workers * each {
			b, err := c.program.Accept()
			if err != nil {
				t.Errorf("accept: %v", err)
				return
			}
			echo.Go(func() {
				defer b.Close()
				if _, err := io.Copy(b, b); err != nil {
					t.Errorf("echo: %v", err)
				}
			})
		}
	})
	for w := range workers {
		wg.Go(func() {
			for i := range each {
				want := bytes.Repeat([]byte{byte(w), byte(i)}, 1+i)
				d := &net.Dialer{}
				a, err := d.DialTCP(t.Context(), "tcp", netip.AddrPort{}, netip.MustParseAddrPort(c.addr))
				if err != nil {
					t.Error(err)
					return
				}
				_, err = a.Write(want)
				err = errors.Join(err, a.CloseWrite())
				got, rerr := io.ReadAll(a)
				a.Close()
				if err = errors.Join(err, rerr); err != nil || !bytes.Equal(got, want) {
					t.Errorf("%d/%d: got %d bytes, %v, want %d", w, i, len(got), err, len(want))
					return
				}
			}
		})
	}
	wg.Wait()
}

func TestEndOfTheRelayAndOfTheLinkReset(t *testing.T) {
	t.Run("the relay ends", func(t *testing.T) {
		c := newChain(t, nil)
		a, b := c.connect(t)
		send(t, a, "x") // a dial that is cancelled while it ends would close its connection in order
		if _, err := b.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		c.cancel()
		wantReset(t, "near", a)
		wantReset(t, "far", b)
		c.ended.Wait()
		if _, err := net.Dial("tcp", c.addr); err == nil {
			t.Error("the relay listens still")
		}
	})
	t.Run("the link ends", func(t *testing.T) {
		c := newChain(t, nil)
		a, b := c.connect(t)
		send(t, a, "x") // as above
		if _, err := b.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		c.near.Close()
		wantReset(t, "near", a)
		wantReset(t, "far", b)
	})
}
