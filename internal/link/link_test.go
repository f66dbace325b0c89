package link

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/pergolafl/pergola/internal/problem"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var anna = Peer{Job: "01JABCDEFGHJKMNPQRSTVWXYZ0", Site: "st-anna"}

// accepting gives an acceptor of what comes to ln; it ends with the test.
func accepting(t *testing.T, ln net.Listener, opts Options) *Acceptor {
	t.Helper()
	a := NewAcceptor(opts)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := a.Serve(ctx, ln); err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	t.Cleanup(func() { cancel(); wg.Wait() })
	return a
}

// socket is a hub runner's unix socket with an acceptor on it.
func socket(t *testing.T, opts Options) (*Acceptor, Dialer) {
	t.Helper()
	ln, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	return accepting(t, ln, opts), func(ctx context.Context) (net.Conn, error) {
		c, err := new(net.Dialer).DialContext(ctx, "unix", ln.Addr().String())
		if err != nil {
			return nil, err
		}
		return c, WritePreface(c, anna)
	}
}

// pair gives both ends of a session over a unix socket.
func pair(t *testing.T) (site, hub *Session) {
	t.Helper()
	a, d := socket(t, Options{})
	site, err := Dial(t.Context(), d, Options{Peer: Peer{anna.Job, "hub"}})
	if err != nil {
		t.Fatal(err)
	}
	if hub, err = a.Accept(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(site.Close(), hub.Close()); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return site, hub
}

// streams gives both ends of a stream.
func streams(t *testing.T, from, to *Session) (near, far Stream) {
	t.Helper()
	return opened(t, from.Open, to)
}

func opened(t *testing.T, open func(context.Context) (Stream, error), to *Session) (near, far Stream) {
	t.Helper()
	near, err := open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if far, err = to.Accept(t.Context()); err != nil {
		t.Fatal(err)
	}
	return near, far
}

func TestStreamsBothWays(t *testing.T) {
	site, hub := pair(t)
	if hub.Peer() != anna || site.Peer().Site != "hub" || hub.line.id != site.line.id {
		t.Errorf("peers %v %v, sessions %v %v", hub.Peer(), site.Peer(), hub.line.id, site.line.id)
	}
	for i, d := range [][2]*Session{{site, hub}, {hub, site}, {site, hub}, {hub, site}} {
		open := streams
		if i >= 2 {
			open = lanes
		}
		near, far := open(t, d[0], d[1])
		sent := make([]byte, 3<<20)
		_, _ = rand.Read(sent)
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := near.Write(sent); err != nil {
				t.Errorf("write: %v", err)
			}
			if err := near.CloseWrite(); err != nil {
				t.Errorf("close for writing: %v", err)
			}
		})
		got, err := io.ReadAll(far)
		if err != nil || !bytes.Equal(got, sent) {
			t.Fatalf("read %d bytes of %d, equal: %v, %v", len(got), len(sent), bytes.Equal(got, sent), err)
		}
		wg.Wait()
		// The other half is open still.
		if _, err := far.Write([]byte("answer")); err != nil {
			t.Fatal(err)
		}
		if err := far.Close(); err != nil {
			t.Error(err)
		}
		if got, err := io.ReadAll(near); err != nil || string(got) != "answer" {
			t.Errorf("read %q, %v", got, err)
		}
		if err := near.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestOrderlyCloseDeliversAndLossIsTold(t *testing.T) {
	site, hub := pair(t)
	near, far := streams(t, site, hub)
	open, farOpen := streams(t, site, hub)
	sent := make([]byte, 200<<10) // fits the window, is not read before the end
	if _, err := near.Write(sent); err != nil {
		t.Fatal(err)
	}
	if err := near.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if err := site.Close(); err != nil {
		t.Fatal(err)
	}
	<-hub.Done()
	if !errors.Is(site.Err(), ErrClosed) || errors.Is(site.Err(), ErrPeerClosed) {
		t.Errorf("the end that closed says %v", site.Err())
	}
	if !errors.Is(hub.Err(), ErrPeerClosed) || !errors.Is(hub.Err(), ErrClosed) {
		t.Errorf("the other end says %v", hub.Err())
	}
	if got, err := io.ReadAll(far); err != nil || len(got) != len(sent) {
		t.Errorf("%d of %d bytes were delivered: %v", len(got), len(sent), err)
	}
	for _, s := range []Stream{open, farOpen} {
		if _, err := s.Read(make([]byte, 1)); !errors.Is(err, ErrReset) {
			t.Errorf("a stream that was open reads %v", err)
		}
	}
	if _, err := hub.Open(t.Context()); !errors.Is(err, ErrPeerClosed) {
		t.Errorf("Open afterwards: %v", err)
	}
	if _, err := site.Accept(t.Context()); !errors.Is(err, ErrClosed) {
		t.Errorf("Accept afterwards: %v", err)
	}
}

func TestRefusals(t *testing.T) {
	t.Run("another version is told both versions, and so is the acceptor's log", func(t *testing.T) {
		_, d := socket(t, Options{})
		c, err := d(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := c.Write(appendFrame(nil, frame{kind: frameHello, version: 9, body: make([]byte, 100)})); err != nil {
			t.Fatal(err)
		}
		f, err := readFrame(c)
		if err != nil || f.kind != frameRefuse || f.version != Version || f.body[0] != refuseVersion {
			t.Errorf("answered %+v, %v", f, err)
		}
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			t.Errorf("then %v, want the end", err)
		}
	})
	t.Run("the dialling end names both versions", func(t *testing.T) {
		near, far := net.Pipe()
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := readFrame(far); err != nil {
				t.Error(err)
			}
			_, _ = far.Write(appendFrame(nil, frame{kind: frameRefuse, version: 7, body: []byte{refuseVersion}}))
		})
		defer wg.Wait()
		_, err := Dial(t.Context(), func(context.Context) (net.Conn, error) { return near, nil }, Options{Retry: time.Hour})
		if problem.CodeOf(err) != problem.Version || !strings.Contains(err.Error(), "versions 2 to 4 of the link protocol, the other end version 7") {
			t.Errorf("refused with %v", err)
		}
	})
	t.Run("a peer that may not", func(t *testing.T) {
		_, d := socket(t, Options{Allow: func(p Peer) error { return errors.New("not " + p.Site) }})
		if _, err := Dial(t.Context(), d, Options{Retry: time.Hour}); problem.CodeOf(err) != problem.Denied {
			t.Errorf("refused with %v", err)
		}
	})
}
