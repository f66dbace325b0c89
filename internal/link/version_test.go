package link

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pergolafl/pergola/internal/compat"
	"github.com/pergolafl/pergola/internal/problem"
)

// Ends of different ages speak the newest version that both do, over a cut too, or each says what both speak.
func TestVersions(t *testing.T) {
	for name, c := range map[string]struct {
		site, hub compat.Range
		want      uint16 // 0: none
		older     string // who is to be updated
	}{
		"the same":                      {compat.Range{Min: 2, Max: 2}, compat.Range{Min: 2, Max: 2}, 2, ""},
		"an older hub":                  {compat.Range{Min: 2, Max: 5}, compat.Range{Min: 1, Max: 3}, 3, ""},
		"a newer hub":                   {compat.Range{Min: 2, Max: 3}, compat.Range{Min: 3, Max: 9}, 3, ""},
		"a hub that knows one of many":  {compat.Range{Min: 1, Max: 9}, compat.Range{Min: 4, Max: 4}, 4, ""},
		"a hub that is too old":         {compat.Range{Min: 3, Max: 4}, compat.Range{Min: 1, Max: 2}, 0, "the other end"},
		"a hub that is too new":         {compat.Range{Min: 1, Max: 2}, compat.Range{Min: 3, Max: 4}, 0, "this end of the link"},
		"a hub of one version, too new": {compat.Range{Min: 2, Max: 2}, compat.Range{Min: 3, Max: 3}, 0, "this end of the link"},
	} {
		t.Run(name, func(t *testing.T) {
			a, d := socket(t, Options{speak: c.hub})
			var dialled atomic.Int64
			var conn atomic.Pointer[net.Conn]
			site, err := Dial(t.Context(), func(ctx context.Context) (net.Conn, error) {
				dialled.Add(1)
				x, err := d(ctx)
				conn.Store(&x)
				return x, err
			}, Options{speak: c.site, Retry: time.Hour})
			if c.want == 0 {
				if problem.CodeOf(err) != problem.Version || !strings.Contains(err.Error(), c.site.Words()) || !strings.Contains(err.Error(), c.hub.Words()) || !strings.Contains(err.Error(), "update pergola at "+c.older) {
					t.Errorf("%v", err)
				}
				if n := dialled.Load(); n != 1 {
					t.Errorf("dialled %d times", n)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer site.Close()
			hub, err := a.Accept(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer hub.Close()
			if v, w := site.line.speaksIn(), hub.line.speaksIn(); v != c.want || w != c.want {
				t.Errorf("the ends speak versions %d and %d, want %d", v, w, c.want)
			}
			echo(t, site, hub)
			before := dialled.Load()
			(*conn.Load()).Close()
			echo(t, site, hub)
			if dialled.Load() == before {
				t.Error("the link was not cut")
			}
		})
	}
}

// echo sends something from one end to the other.
func echo(t *testing.T, from, to *Session) {
	t.Helper()
	done := make(chan error, 1)
	go func() {
		s, err := to.Accept(t.Context())
		if err == nil {
			_, err = io.ReadAll(s)
			err = errors.Join(err, s.Close())
		}
		done <- err
	}()
	s, err := from.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	if err := s.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// Whoever dials in a version between those that it has said, and an acceptor whose session speaks another one, get nowhere.
func TestSessionKeepsItsVersion(t *testing.T) {
	a, d := socket(t, Options{speak: compat.Range{Min: 2, Max: 3}})
	site, err := Dial(t.Context(), d, Options{speak: compat.Range{Min: 2, Max: 3}})
	if err != nil {
		t.Fatal(err)
	}
	defer site.Close()
	hub, err := a.Accept(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer hub.Close()
	c, err := d(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	g := site.line.hello()
	if _, err := c.Write(appendFrame(nil, helloFrame(g).in(2))); err != nil {
		t.Fatal(err)
	}
	f, err := readFrame(c)
	if err != nil || f.kind != frameRefuse || f.version != 2 || f.body[0] != refuseGone {
		t.Errorf("resumed in another version: %+v, %v", f, err)
	}
	echo(t, site, hub)
}

// Refuse tells a dialling end of any version that it has no business here.
func TestRefuse(t *testing.T) {
	for _, v := range []int{2, 7} {
		near, far := net.Pipe()
		done := make(chan error, 1)
		go func() { done <- Refuse(far) }()
		_, err := Dial(t.Context(), func(context.Context) (net.Conn, error) { return near, nil }, Options{Retry: time.Hour, speak: compat.Range{Min: v, Max: v}})
		if problem.CodeOf(err) != problem.Denied {
			t.Errorf("version %d: %v", v, err)
		}
		if err := <-done; err != nil {
			t.Errorf("version %d: %v", v, err)
		}
	}
}
