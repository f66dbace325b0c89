package link

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pergolafl/pergola/test/chaos"
)

// An outage is told once while it lasts, if it lasts, and once when it is over, and it is counted.
func TestOutagesAreTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex // guards what follows
		var cuts []time.Time
		var ended []Outage
		n := &chaos.Network{}
		_, hub := over(t, n, Options{
			OnCut:    func(_ Peer, since time.Time) { mu.Lock(); defer mu.Unlock(); cuts = append(cuts, since) },
			OnOutage: func(o Outage) { mu.Lock(); defer mu.Unlock(); ended = append(ended, o) },
		})
		for _, c := range []struct {
			down time.Duration
			told int // of ends that say that it lasts
		}{{0, 0}, {time.Second, 0}, {42 * time.Second, 2}} {
			synctest.Wait()
			mu.Lock()
			cuts, ended = nil, nil
			mu.Unlock()
			before, at := hub.Stats(), time.Now()
			n.SetDown(c.down > 0)
			n.Cut()
			if c.down > 0 {
				time.Sleep(c.down)
				synctest.Wait()
				mu.Lock()
				if len(cuts) != c.told || len(ended) != 0 || len(cuts) > 0 && !cuts[0].Equal(at) {
					t.Errorf("after %v of an outage that began at %v, told %v and %v", c.down, at, cuts, ended)
				}
				mu.Unlock()
			}
			n.SetDown(false)
			time.Sleep(10 * time.Second)
			synctest.Wait()
			mu.Lock()
			if len(cuts) != c.told || len(ended) != 2 {
				t.Errorf("after an outage of %v, told %v and %v", c.down, cuts, ended)
			}
			mu.Unlock()
			after := hub.Stats()
			if away := after.Away - before.Away; after.Cuts != before.Cuts+1 || after.Resumes != before.Resumes+1 || away < c.down || away > c.down+6*time.Second {
				t.Errorf("an outage of %v is counted as %v: %+v", c.down, away, after)
			}
		}
	})
}
