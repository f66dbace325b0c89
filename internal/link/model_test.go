package link

import (
	"errors"
	"io"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/pergolafl/pergola/test/chaos"
)

// half is the model of one direction of a stream: how many bytes were written, and whether that was all. The k-th byte of
// a half is a function of its name and of k, so nothing needs to be remembered.
type half struct {
	name    uint64
	from    Stream
	to      Stream
	written int
	read    int
	ended   bool // CloseWrite was called
	done    bool // its end was read
}

func content(name uint64, k int) byte {
	x := (name<<40 ^ uint64(k)) * 0x9e3779b97f4a7c15
	return byte(x >> 56)
}

// write writes n bytes, of a stream whose window or session may be full: in time they go through.
func (h *half) write(t *rapid.T, n int) {
	b := make([]byte, n)
	for i := range b {
		b[i] = content(h.name, h.written+i)
	}
	h.written += n
	if got, err := h.from.Write(b); got != n || err != nil {
		t.Errorf("half %d: wrote %d of %d bytes, %v", h.name, got, n, err)
	}
}

// readUpTo reads until n bytes have been read in all.
func (h *half) readUpTo(t *rapid.T, n int) {
	b := make([]byte, 64<<10)
	for h.read < n {
		got, err := h.to.Read(b[:min(len(b), n-h.read)])
		for i := range got {
			if b[i] != content(h.name, h.read+i) {
				t.Fatalf("half %d: byte %d is wrong", h.name, h.read+i)
			}
		}
		h.read += got
		if err != nil {
			t.Fatalf("half %d: after %d of %d bytes: %v", h.name, h.read, n, err)
		}
	}
}

// bubbled hides from rapid that this is a testing.T, whose deadline a bubble may not ask for.
type bubbled struct{ *testing.T }

// Two sessions over a network that does anything, against a model in which it does nothing. A failing seed is printed by
// rapid, with the shortest list of steps that it found, and replays with -rapid.seed.
func TestModel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx := t.Context()
		rapid.Check(bubbled{t}, func(t *rapid.T) {
			buffer := rapid.SampledFrom([]int{64, 1 << 10, 64 << 10, 0}).Draw(t, "buffer")
			var mu sync.Mutex
			var scripts []chaos.Script // for the next connections; guarded by mu
			n := &chaos.Network{Next: func(int) chaos.Script {
				mu.Lock()
				defer mu.Unlock()
				if len(scripts) == 0 {
					return chaos.Script{}
				}
				s := scripts[0]
				scripts = scripts[1:]
				return s
			}}
			opts := Options{Buffer: buffer, Retry: time.Hour, Tolerance: 100 * time.Hour}
			a := NewAcceptor(opts)
			var wg sync.WaitGroup
			t.Cleanup(wg.Wait)
			t.Cleanup(func() { n.Listener().Close() })
			wg.Go(func() {
				_ = a.Serve(ctx, n.Listener()) // it ends with the listener
			})
			site, err := Dial(ctx, as(n, anna), opts)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { site.Close() })
			hub, err := a.Accept(ctx)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { hub.Close() })
			ends := [2]*Session{site, hub}
			var halves []*half
			way := rapid.Custom(func(t *rapid.T) chaos.Way {
				return chaos.Way{
					Delay: rapid.SampledFrom([]time.Duration{0, time.Millisecond, 300 * time.Millisecond}).Draw(t, "delay"),
					After: int64(rapid.IntRange(0, 3000).Draw(t, "after")),
					Then:  rapid.SampledFrom([]chaos.Fate{chaos.Whole, chaos.Cut, chaos.End, chaos.Swallow, chaos.HalfCut}).Draw(t, "then"),
				}
			})
			pick := func(ok func(*half) bool) *half {
				var some []*half
				for _, h := range halves {
					if ok(h) {
						some = append(some, h)
					}
				}
				if len(some) == 0 {
					t.Skip("nothing to do this with")
				}
				return some[rapid.IntRange(0, len(some)-1).Draw(t, "half")]
			}
			t.Repeat(map[string]func(*rapid.T){
				"open": func(t *rapid.T) {
					if len(halves) >= 12 {
						t.Skip("enough")
					}
					i := rapid.IntRange(0, 1).Draw(t, "end")
					near, err := ends[i].Open(ctx)
					if err != nil {
						t.Fatal(err)
					}
					far, err := ends[1-i].Accept(ctx)
					if err != nil {
						t.Fatal(err)
					}
					k := uint64(len(halves))
					halves = append(halves, &half{name: k, from: near, to: far}, &half{name: k + 1, from: far, to: near})
				},
				"write": func(t *rapid.T) {
					// Less than a window waits for its reader, so that a write cannot block for ever.
					h := pick(func(h *half) bool { return !h.ended && h.written-h.read < 200<<10 })
					most := 50 << 10
					if buffer > 0 {
						most = min(most, 32*buffer)
					}
					h.write(t, rapid.IntRange(1, most).Draw(t, "bytes"))
				},
				"read": func(t *rapid.T) {
					h := pick(func(h *half) bool { return h.read < h.written })
					h.readUpTo(t, rapid.IntRange(h.read+1, h.written).Draw(t, "up to"))
				},
				"end": func(t *rapid.T) {
					h := pick(func(h *half) bool { return !h.ended })
					h.ended = true
					if err := h.from.CloseWrite(); err != nil {
						t.Errorf("close for writing: %v", err)
					}
				},
				"read the end": func(t *rapid.T) {
					h := pick(func(h *half) bool { return h.ended && h.read == h.written && !h.done })
					h.done = true
					if _, err := h.to.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
						t.Errorf("half %d ended with %v", h.name, err)
					}
				},
				"cut": func(t *rapid.T) {
					mu.Lock()
					scripts = nil
					for range rapid.IntRange(0, 3).Draw(t, "more that fail") {
						scripts = append(scripts, chaos.Script{Up: way.Draw(t, "up"), Down: way.Draw(t, "down"), Refused: rapid.IntRange(0, 9).Draw(t, "refused") == 0})
					}
					mu.Unlock()
					n.Cut()
				},
				"swallow": func(t *rapid.T) {
					up := rapid.Bool().Draw(t, "up")
					n.Swallow(up, !up || rapid.Bool().Draw(t, "down"))
				},
				"wait": func(t *rapid.T) {
					time.Sleep(rapid.SampledFrom([]time.Duration{time.Microsecond, 30 * time.Millisecond, 4 * time.Second, 20 * time.Second}).Draw(t, "for"))
				},
				"": func(t *rapid.T) {
					for _, s := range ends {
						st := s.Stats()
						most := st.Cuts * int64(max(s.line.buf, 1))
						if s.Err() != nil || st.Resent > most {
							t.Fatalf("%v, %+v: more than %d bytes sent again", s.Err(), st, most)
						}
					}
				},
			})
			for _, h := range halves {
				h.readUpTo(t, h.written)
			}
			site.Close()
			hub.Close()
			if !errors.Is(site.Err(), ErrClosed) || !errors.Is(hub.Err(), ErrClosed) {
				t.Errorf("ended with %v, %v", site.Err(), hub.Err())
			}
		})
	})
}
