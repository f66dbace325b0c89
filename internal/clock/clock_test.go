package clock

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// machine has both clocks in the test's hand.
type machine struct {
	up   time.Duration
	wall time.Time // when it was booted, by the wall clock as it is set now
}

func (m *machine) clock(path, boot string) *Clock {
	return newClock(path, boot, func() time.Time { return m.wall.Add(m.up) }, func() Instant { return Instant(m.up) })
}

func newMachine() *machine {
	return &machine{up: time.Hour, wall: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)}
}

// However the clock is set, what was noted is as old as it is; also for a process that begins later.
func TestJumps(t *testing.T) {
	for _, c := range []struct {
		name  string
		jumps []time.Duration // an hour apart
	}{
		{"none", []time.Duration{0}},
		{"a day ahead", []time.Duration{24 * time.Hour}},
		{"a day back", []time.Duration{-24 * time.Hour}},
		{"ahead and back", []time.Duration{100 * time.Hour, -100 * time.Hour}},
		{"back and ahead", []time.Duration{-100 * time.Hour, 100 * time.Hour}},
		{"from 1970 on", []time.Duration{490_000 * time.Hour}},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newMachine()
			path := filepath.Join(t.TempDir(), "clock.json")
			k := m.clock(path, "b")
			noted, _ := k.Now()
			for _, j := range c.jumps {
				m.up += time.Hour
				k.Now()
				m.wall = m.wall.Add(j)
				k.Now()
			}
			m.up += time.Minute
			later := m.clock(path, "b")
			if err := later.load(); err != nil {
				t.Fatal(err)
			}
			want := time.Duration(len(c.jumps))*time.Hour + time.Minute
			for who, k := range map[string]*Clock{"the same": k, "a later one": later} {
				_, now := k.Now()
				if got := now.Sub(k.Instant(noted)); got != want {
					t.Errorf("%s: %s ago, want %s", who, got, want)
				}
			}
		})
	}
}

// A jump that nobody saw, since no process ran, is seen by the next one.
func TestJumpWhileNobodyLooks(t *testing.T) {
	m := newMachine()
	path := filepath.Join(t.TempDir(), "clock.json")
	noted, _ := m.clock(path, "b").Now()
	m.up += time.Hour
	m.wall = m.wall.Add(48 * time.Hour)
	m.up += time.Hour
	k := m.clock(path, "b")
	if err := k.load(); err != nil {
		t.Fatal(err)
	}
	_, now := k.Now()
	if got := now.Sub(k.Instant(noted)); got != 2*time.Hour {
		t.Errorf("%s ago, want 2h", got)
	}
}

// Over a boot only the wall clock tells.
func TestBoot(t *testing.T) {
	m := newMachine()
	path := filepath.Join(t.TempDir(), "clock.json")
	noted, _ := m.clock(path, "b").Now()
	m.wall, m.up = m.wall.Add(m.up+3*time.Hour), time.Minute
	k := m.clock(path, "another")
	if err := k.load(); err != nil {
		t.Fatal(err)
	}
	_, now := k.Now()
	if got := now.Sub(k.Instant(noted)); got != 3*time.Hour+time.Minute {
		t.Errorf("%s ago", got)
	}
}

func TestOddTimes(t *testing.T) {
	m := newMachine()
	k := m.clock("", "b")
	wall, now := k.Now()
	if got := k.Instant(wall.Add(time.Hour)); got != now {
		t.Errorf("what is still to come is %s from now, want now", got.Sub(now))
	}
	m.wall = m.wall.Add(10 * time.Hour)
	_, now = k.Now()
	if got := k.Instant(wall.Add(5 * time.Hour)); got != now {
		t.Errorf("what the clock was set over is %s from now, want now", got.Sub(now))
	}
	if got := k.Instant(wall.Add(-10 * time.Minute)); now.Sub(got) != 10*time.Minute {
		t.Errorf("what was before the first look is %s ago", now.Sub(got))
	}
	var none *Clock
	wall, now = none.Now()
	if got := now.Sub(none.Instant(wall.Add(-time.Minute))); got != time.Minute {
		t.Errorf("without a clock: %s ago", got)
	}
}

// Whatever happens, a time of which the clock's showing was noted has an instant that is not after now; and one that the
// clock has shown once has its own.
func TestRandomJumps(t *testing.T) {
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 1))
		m := newMachine()
		k := m.clock("", "b")
		type note struct {
			wall time.Time
			at   Instant
		}
		var notes []note
		for range 300 {
			m.up += time.Duration(r.Int64N(int64(time.Minute)))
			if r.IntN(20) == 0 {
				m.wall = m.wall.Add(time.Duration(r.Int64N(int64(4*time.Hour))) - 2*time.Hour)
			}
			wall, at := k.Now()
			notes = append(notes, note{wall, at})
		}
		_, now := k.Now()
		for _, n := range notes {
			got := k.Instant(n.wall)
			if got > now {
				t.Fatalf("seed %d: an instant after now", seed)
			}
			shown := 0
			for i, p := range k.table.Pieces {
				at, end := Instant(n.wall.Sub(p.Zero)), now+Instant(slack)
				if i+1 < len(k.table.Pieces) {
					end = k.table.Pieces[i+1].From
				}
				if at >= p.From && at <= end {
					shown++
				}
			}
			if d := got.Sub(n.at); shown == 1 && (d > 2*slack || d < -2*slack) {
				t.Fatalf("seed %d: %s off", seed, d)
			}
		}
	}
}

func TestOpen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "clock.json")
	c, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	wall, at := c.Now()
	if d := at.Sub(c.Instant(wall)); d > time.Second || d < -time.Second {
		t.Errorf("now is %s ago", d)
	}
	if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if c, err = Open(path); err == nil || c == nil {
		t.Errorf("a broken file gives %v and no error", c)
	}
}
