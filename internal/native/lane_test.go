package native

import (
	"context"
	"io"
	"slices"
	"sync"
	"testing"
)

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
