// Package clock tells how long ago something was that was noted by the wall clock, however often somebody has set that clock
// since: deadlines that count from stored times do not jump with it.
//
// The kernel's clock since boot (CLOCK_BOOTTIME) is never set and goes on while the machine sleeps. A Clock remembers, in
// a file, which wall time belonged to it from when to when; so a stored time of this boot has its place on it, also for a
// process that began later. Of times before the machine's boot only the wall clock tells.
//
// It sets no clock, and knows nothing of clocks of other machines. Start with [Open] and [Clock.Instant].
package clock

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Instant is a point of time that no one can set: how long the machine had been up.
type Instant time.Duration

// Sub gives the time from o to i.
func (i Instant) Sub(o Instant) time.Duration { return time.Duration(i - o) }

// A difference of less than slack between the two clocks is none: clocks that are kept right by NTP run a little faster or
// slower at times. keep is how many changes are remembered.
const (
	slack = time.Second
	keep  = 200
)

// Clock compares the wall clock with the clock since boot. A nil *Clock is one of which the wall clock was never set.
type Clock struct {
	path string
	wall func() time.Time
	boot func() Instant

	mu    sync.Mutex // guards the rest
	table table
}

// table is what the file holds.
type table struct {
	Boot   string  `json:"boot"` // of which boot; see random(4)
	Pieces []piece `json:"pieces"`
}

// piece says that from an instant on the wall clock showed Zero plus the instant.
type piece struct {
	From Instant   `json:"from"`
	Zero time.Time `json:"zero"`
}

// Open reads what is known of this boot from path, or begins anew. Errors are those of the file; the Clock works all the
// same, and only forgets with its process what it has seen.
func Open(path string) (*Clock, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	c := newClock(path, strings.TrimSpace(string(boot)), wallClock, sinceBoot)
	if err != nil {
		c.path = "" // no file can be of this boot
		return c, err
	}
	return c, c.load()
}

// Imagined is a Clock for tests: of clocks that they set, of one boot for ever.
func Imagined(path string, wall func() time.Time, sinceBoot func() Instant) (*Clock, error) {
	c := newClock(path, "imagined", wall, sinceBoot)
	return c, c.load()
}

func newClock(path, boot string, wall func() time.Time, since func() Instant) *Clock {
	return &Clock{path: path, wall: wall, boot: since, table: table{Boot: boot}}
}

func sinceBoot() Instant {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic(err) // only for a clock that the kernel lacks: it has this one since 2.6.39
	}
	return Instant(ts.Nano())
}

func (c *Clock) load() error {
	b, err := os.ReadFile(c.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var t table
	if err := json.Unmarshal(b, &t); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if t.Boot == c.table.Boot {
		c.table = t
	}
	return nil
}

// Now gives the time by both clocks, and notes if the wall clock was set.
func (c *Clock) Now() (time.Time, Instant) {
	if c == nil {
		now := time.Now()
		return now, Instant(now.UnixNano())
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.nowLocked()
}

func (c *Clock) nowLocked() (time.Time, Instant) {
	wall, boot := c.wall(), c.boot()
	zero := wall.Round(0).Add(-time.Duration(boot))
	ps := c.table.Pieces
	if len(ps) > 0 {
		if d := zero.Sub(ps[len(ps)-1].Zero); d < slack && d > -slack {
			return wall, boot
		}
	}
	ps = append(ps, piece{From: boot, Zero: zero})
	c.table.Pieces = ps[max(0, len(ps)-keep):]
	c.saveLocked()
	return wall, boot
}

// saveLocked writes the table. On an error, a full disk say, it is only not known to a later process that the clock was set.
func (c *Clock) saveLocked() {
	if c.path == "" {
		return
	}
	b, err := json.Marshal(c.table)
	if err != nil {
		return
	}
	tmp := filepath.Join(filepath.Dir(c.path), "."+filepath.Base(c.path))
	if os.WriteFile(tmp, b, 0o600) == nil {
		_ = os.Rename(tmp, c.path) // see above
	}
}

// Instant gives when t was, which was noted by the wall clock of this machine. A time that the clock has shown twice since
// it was set back is taken to be the later one; one that is still to come to be now.
func (c *Clock) Instant(t time.Time) Instant {
	if c == nil {
		return Instant(t.UnixNano())
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	_, now := c.nowLocked()
	ps := c.table.Pieces
	t = t.Round(0)
	end := now + Instant(slack)
	for k := len(ps) - 1; k >= 0; k-- {
		if at := Instant(t.Sub(ps[k].Zero)); at <= end && (at >= ps[k].From || k == 0) {
			return min(at, now)
		}
		end = ps[k].From
	}
	// The clock was set forward over it, and that was noticed a little later.
	for k := len(ps) - 1; k > 0; k-- {
		if Instant(t.Sub(ps[k-1].Zero)) >= ps[k].From && Instant(t.Sub(ps[k].Zero)) < ps[k].From {
			return ps[k].From
		}
	}
	return now
}
