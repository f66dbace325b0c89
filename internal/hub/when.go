package hub

import (
	"time"

	"github.com/pergolafl/pergola/internal/job"
)

// wall is the time to be stored. Of times that a process has itself noted Go's own reading of the monotonic clock tells how long
// ago they were; of stored ones [control.when] does.
func (h *Hub) wall() time.Time {
	now, _ := h.clock.Now()
	return now
}

// when makes a time of a stored one that is as long before now as the stored one is, whatever the wall clock has shown between.
func (c *control) when(t time.Time) time.Time {
	if t.IsZero() || c.hub.clock == nil {
		return t
	}
	// Once found out it stays: a clock that is set back shows some times twice.
	if at, ok := c.times[t.UnixNano()]; ok {
		return at
	}
	if len(c.times) > 100 || c.times == nil { // a party that begins anew has another time each time
		c.times = map[int64]time.Time{}
	}
	at := c.uncached(t)
	c.times[t.UnixNano()] = at
	return at
}

func (c *control) uncached(t time.Time) time.Time { return c.hub.since(t) }

// since makes a time of a stored one that is as long before now as the stored one is; see control.when, which keeps what it found.
func (h *Hub) since(t time.Time) time.Time {
	if h.clock == nil {
		if now := time.Now(); now.Before(t) {
			return now
		}
		return t
	}
	_, up := h.clock.Now()
	return time.Now().Add(-up.Sub(h.clock.Instant(t)))
}

// seen is when an event counts as having happened that was not there at the last look: between then and now, whatever it says
// itself. Its own time may be by the clock of a site that is wrong.
func (c *control) seen(e job.Event) time.Time {
	return latest(c.uncached(e.At), c.looked)
}

func latest(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}
