package chaos_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pergolafl/pergola/internal/link"
	"github.com/pergolafl/pergola/test/chaos"
)

// parcel sends size bytes over a stream from one end to the other, as those do who send packs: the receiver's end of its half is its word
// that it has them. It gives whether the receiver has them, and what the sender has heard. A lane of which the opener has not heard may be
// accepted as well; nothing comes over it.
func parcel(t *testing.T, open func(context.Context) (link.Stream, error), to *link.Session, size int) (arrived bool, sent error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	var mu sync.Mutex
	wg.Go(func() {
		for {
			far, err := to.Accept(ctx)
			if err != nil {
				return
			}
			wg.Go(func() {
				defer far.Close()
				err := receive(far, 1, size)
				mu.Lock()
				defer mu.Unlock()
				switch {
				case err == nil && arrived:
					t.Error("it came twice")
				case err == nil:
					arrived = true
				case !errors.Is(err, link.ErrReset):
					t.Errorf("the receiver: %v", err)
				default:
					_ = far.Reset()
				}
			})
		}
	})
	near, err := open(t.Context())
	if err == nil {
		err = send(near, 1, size, func() int { return 64 << 10 })
		if err == nil {
			_, err = near.Read(make([]byte, 1))
		}
		if errors.Is(err, io.EOF) {
			err = nil
		}
		if e := near.Close(); e != nil {
			t.Errorf("close: %v", e)
		}
	}
	// Whoever has not heard that its lane is broken hears that it stands still; and one that broke is no reason against the next.
	time.Sleep(11 * time.Minute)
	cancel()
	wg.Wait()
	return arrived, err
}

// Whatever the byte at which the connection of a lane fails, and however it does: nobody takes a part for the whole, the sender does not
// take what was lost for what has arrived, and the session carries it all the same.
func TestLanesFailAtEveryByte(t *testing.T) {
	const upTo, size = 200, 40
	step, first := int64(5), int64(0) // of each fate, the four cases try most bytes
	if *soak > 0 {
		step = 1
	}
	for _, f := range []struct {
		name string
		fate chaos.Fate
	}{{"cut", chaos.Cut}, {"end", chaos.End}, {"swallow", chaos.Swallow}, {"half-cut", chaos.HalfCut}} {
		for _, up := range []bool{true, false} {
			for _, opener := range []string{"site", "hub"} {
				first++
				from := first % step
				t.Run(fmt.Sprintf("%s %s, lane of the %s", f.name, map[bool]string{true: "up", false: "down"}[up], opener), func(t *testing.T) {
					t.Parallel()
					whole, broken := 0, 0
					for after := from; after <= upTo; after += step {
						bubble(t, fmt.Sprintf("after %d bytes", after), func(t *testing.T) {
							n := &chaos.Network{Next: func(i int) chaos.Script {
								var s chaos.Script
								if i == 1 && up {
									s.Up = chaos.Way{After: after, Then: f.fate}
								} else if i == 1 {
									s.Down = chaos.Way{After: after, Then: f.fate}
								}
								return s
							}}
							site, hub := pair(t, n.Listener(), dialer(n.Dial), link.Options{})
							from, to := site, hub
							if opener == "hub" {
								from, to = hub, site
							}
							arrived, err := parcel(t, from.OpenLane, to, size)
							switch {
							case err == nil && !arrived:
								t.Error("the sender takes for sent what has not arrived")
							case err == nil:
								whole++
							case !errors.Is(err, link.ErrReset) && !errors.Is(err, link.ErrNoLane):
								t.Errorf("the sender: %v", err)
							default:
								broken++
							}
							if arrived, err := parcel(t, from.Open, to, size); err != nil || !arrived {
								t.Errorf("by a stream: %v", err)
							}
							if c := site.Stats().Cuts; c != 0 {
								t.Errorf("the session's own connection was cut %d times", c)
							}
						})
					}
					t.Logf("%d lanes were whole and %d broken", whole, broken)
					if broken == 0 || whole == 0 {
						t.Error("the bytes tried are not those that matter")
					}
				})
			}
		}
	}
}

// Lanes over connections that fail anyhow, beside a session of which the same is true.
func TestLanesSoak(t *testing.T) {
	began := time.Now()
	for round := uint64(0); round == 0 || time.Since(began) < *soak; round++ {
		s := *seed
		if *soak > 0 {
			s = round
		}
		synctest.Test(t, func(t *testing.T) {
			rng := random(t, s)
			n := &chaos.Network{Next: func(i int) chaos.Script {
				if i > 100 || i%3 == 0 {
					return chaos.Script{}
				}
				return anyScript(rng, 1<<20)
			}}
			site, hub := pair(t, n.Listener(), dialer(n.Dial), link.Options{Tolerance: 24 * time.Hour})
			lanes := 0
			for i := range 40 {
				from, to := site, hub
				if i%2 == 1 {
					from, to = hub, site
				}
				size := 1 + rng.IntN(1<<20)
				arrived, err := parcel(t, from.OpenLane, to, size)
				if err == nil && !arrived {
					t.Error("the sender takes for sent what has not arrived")
				}
				if err == nil {
					lanes++
				}
				if arrived, err := parcel(t, from.Open, to, size); err != nil || !arrived {
					t.Errorf("by a stream: %v", err)
				}
			}
			t.Logf("%d of 40 lanes were whole, over %d connections", lanes, n.Count())
			if lanes == 0 {
				t.Error("no lane was whole")
			}
		})
		if t.Failed() {
			return
		}
	}
}
