package native

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"slices"
	"sync"
	"testing"
)

// hooked calls f before its last byte is read.
type hooked struct {
	io.Reader
	left int
	f    func()
}

func (h *hooked) Read(b []byte) (int, error) {
	if h.left == 1 {
		h.f()
	}
	n, err := h.Reader.Read(b[:min(len(b), max(h.left-1, 1))])
	h.left -= n
	return n, err
}

// Whoever does not hear that a pack is here sends it again; nobody waits for it any more, and nothing of it stays.
func TestPackThatComesAgain(t *testing.T) {
	files := &memFiles{}
	defer files.close()
	a := newArrivals(files)
	defer a.close()
	b := append(encoded(t, frame{head: head{T: tPack, Name: "p", Size: 5}}), "bytes"...)
	taken := func() {
		t.Helper()
		if _, err := a.of("p").wait(t.Context(), "p"); err != nil {
			t.Fatal(err)
		}
		files.put(a.drop("p"))
	}
	// The first comes while the second is read.
	if err := a.take(&hooked{bytes.NewReader(b), len(b), func() {
		if err := a.take(bytes.NewReader(b)); err != nil {
			t.Error(err)
		}
		taken()
	}}); err != nil {
		t.Error(err)
	}
	// And afterwards.
	r := bytes.NewReader(b)
	if err := a.take(r); err != nil || r.Len() > 0 {
		t.Errorf("%d bytes were left unread, %v", r.Len(), err)
	}
	if len(a.packs) > 0 {
		t.Errorf("%d packs are kept", len(a.packs))
	}
	for i := range 2 * maxDropped {
		name := fmt.Sprint("other", i)
		if err := a.take(bytes.NewReader(encoded(t, frame{head: head{T: tPack, Name: name}}))); err != nil {
			t.Fatal(err)
		}
		files.put(a.drop(name))
	}
	if len(a.dropped) != maxDropped || len(a.packs) > 0 {
		t.Errorf("%d names are kept, and %d packs", len(a.dropped), len(a.packs))
	}
}

// Large packs take a lane while that works, and the way that outlives outages where it does not.
func TestPacksTakeLanes(t *testing.T) {
	for _, c := range []struct {
		name string
		size int64
		lane flaw
		none bool // there are no lanes
		want []string
	}{
		{"a small one", laneFrom - 1, sound, false, []string{"stream"}},
		{"a large one", laneFrom, sound, false, []string{"lane"}},
		{"without lanes", laneFrom, sound, true, []string{"stream"}},
		{"a lane that does not open", laneFrom, unopened, false, []string{"lane", "stream"}},
		{"a lane that breaks", laneFrom, cut, false, []string{"lane", "stream"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			files := &memFiles{}
			defer files.close()
			got := newArrivals(files)
			defer got.close()
			link := &fakeLink{t: t}
			var wg sync.WaitGroup
			defer wg.Wait()
			var ways []string
			way := func(name string, bad flaw) OpenFunc {
				return func(context.Context, string) (Stream, error) {
					ways = append(ways, name)
					if bad == unopened {
						return nil, io.ErrClosedPipe
					}
					a, b := link.pair()
					wg.Go(func() {
						defer b.Close()
						_ = got.accept(bad.apply(b))
					})
					return a, nil
				}
			}
			by := Opener{Open: way("stream", sound), Lane: way("lane", c.lane)}
			if c.none {
				by.Lane = nil
			}
			file, err := files.get("model", c.size)
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			if _, err := file.WriteAt([]byte("end"), c.size-3); err != nil {
				t.Fatal(err)
			}
			pack := got.of("p")
			if err := sendPack(t.Context(), by, "p", file, c.size, func() {}); err != nil {
				t.Fatal(err)
			}
			size, err := pack.wait(t.Context(), "p")
			if err != nil || size != c.size || !same(file, pack.file, size) {
				t.Errorf("%d bytes of %d came, or others: %v", size, c.size, err)
			}
			if !slices.Equal(ways, c.want) {
				t.Errorf("it went by %q, want %q", ways, c.want)
			}
		})
	}
}
