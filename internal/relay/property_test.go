package relay_test

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"

	"pgregory.net/rapid"
)

// half is what one program does with its direction: writes of these sizes, then its end, or a reset after them.
type half struct {
	Writes []int
	Reset  bool
	Buffer int // what it reads at a time
}

func drawHalf(t *rapid.T, name string) half {
	return half{
		Writes: rapid.SliceOfN(rapid.OneOf(rapid.IntRange(0, 3), rapid.IntRange(1, 4096), rapid.SampledFrom([]int{32<<10 - 1, 32 << 10, 32<<10 + 1, 300 << 10})), 0, 12).Draw(t, name+" writes"),
		Reset:  rapid.IntRange(0, 9).Draw(t, name+" resets") == 0,
		Buffer: rapid.SampledFrom([]int{1 << 9, 4096, 1 << 16}).Draw(t, name+" reads"),
	}
}

// play does h on c while it reads what comes. It gives the bytes read and how reading ended.
func (h half) play(c *net.TCPConn, data []byte) (got []byte, err error) {
	var wg sync.WaitGroup
	var told error
	wg.Go(func() {
		for _, n := range h.Writes {
			if _, told = c.Write(data[:n]); told != nil {
				return // a reset; the kernel tells it once, the reader may see an end now
			}
			data = data[n:]
		}
		if h.Reset {
			_ = c.SetLinger(0)
			c.Close()
			return
		}
		_ = c.CloseWrite()
	})
	b := make([]byte, h.Buffer)
	for err == nil {
		var n int
		n, err = c.Read(b)
		got = append(got, b[:n]...)
	}
	wg.Wait()
	if errors.Is(err, io.EOF) {
		err = told
	}
	return got, err
}

// Whatever two programs do, over several connections at a time: where nobody resets, each reads exactly what the other wrote, and
// its end; where one does, the other reads a beginning of it and then no orderly end (or everything, if its own
// end had gone before and nothing was left to say).
func TestByteExact(t *testing.T) {
	c := newChain(t, nil)
	rapid.Check(t, func(rt *rapid.T) {
		type conn struct {
			halves [2]half
			data   [2][]byte
		}
		n := rapid.IntRange(1, 4).Draw(rt, "connections")
		var wg sync.WaitGroup
		defer wg.Wait()
		for range n {
			var p conn
			rng := rand.NewChaCha8([32]byte{byte(rapid.IntRange(0, 255).Draw(rt, "seed"))})
			for i, name := range []string{"near", "far"} {
				p.halves[i] = drawHalf(rt, name)
				size := 0
				for _, w := range p.halves[i].Writes {
					size += w
				}
				p.data[i] = make([]byte, size)
				_, _ = rng.Read(p.data[i])
			}
			a, b := c.connect(t)
			wg.Go(func() {
				var got [2][]byte
				var errs [2]error
				var both sync.WaitGroup
				both.Go(func() { got[0], errs[0] = p.halves[0].play(a, p.data[0]) })
				both.Go(func() { got[1], errs[1] = p.halves[1].play(b, p.data[1]) })
				both.Wait()
				a.Close()
				b.Close()
				anyReset := p.halves[0].Reset || p.halves[1].Reset
				for i := range got {
					sent := p.data[1-i]
					if !bytes.HasPrefix(sent, got[i]) {
						rt.Errorf("end %d read %d bytes that are no beginning of the %d sent", i, len(got[i]), len(sent))
					}
					if !anyReset && (errs[i] != nil || len(got[i]) != len(sent)) {
						rt.Errorf("end %d read %d of %d bytes, %v", i, len(got[i]), len(sent), errs[i])
					}
					if p.halves[1-i].Reset && errs[i] == nil {
						rt.Errorf("end %d took the other's reset for an orderly end after %d of %d bytes", i, len(got[i]), len(sent))
					}
				}
			})
		}
	})
}
