package hub

import (
	"context"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pergolafl/pergola/internal/clock"
	"github.com/pergolafl/pergola/internal/job"
)

// settable has the rig's machine have a wall clock that is off, as seen from the end of the test, until set is called. By restart
// the hub is started again.
func (r *rig) settable(off time.Duration) (set, restart func()) {
	r.Helper()
	begin := time.Now()
	path := filepath.Join(r.h.dir, clockFile)
	wall := func() time.Time { return time.Now().Add(off) }
	up := func() clock.Instant { return clock.Instant(time.Since(begin) + time.Hour) }
	restart = func() {
		k, err := clock.Imagined(path, wall, up)
		if err != nil {
			r.Fatal(err)
		}
		r.h.clock, r.h.opened = k, time.Now()
		r.c = newControl(r.h, r.c.id)
		r.c.runner = make(chan struct{})
	}
	restart()
	return func() { off = 0 }, restart
}

// Deadlines do not jump with the wall clock: neither in the hub that sees it set, nor in one that is started afterwards.
func TestClockIsSet(t *testing.T) {
	for _, c := range []struct {
		name    string
		jump    time.Duration
		restart bool
	}{
		{"a day ahead", 24 * time.Hour, false},
		{"a day ahead, and the hub is started again", 24 * time.Hour, true},
		{"a day back", -24 * time.Hour, false},
		{"a day back, and the hub is started again", -24 * time.Hour, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, job.Spec{Deadline: job.Duration(time.Hour), NoProgress: job.Duration(30 * time.Minute), StartTimeout: job.Duration(20 * time.Minute)})
				set, restart := r.settable(-c.jump)
				r.h.siteUp("a")
				r.h.siteUp("b")
				r.step()
				for _, p := range []string{job.HubParty, "a", "b"} {
					r.party(p, job.PartyPreparing, nil)
					r.party(p, job.PartyReady, nil)
				}
				r.step()
				r.party(job.HubParty, job.PartyRunning, nil)
				r.step()
				r.is(job.Running, "")
				time.Sleep(10 * time.Minute)
				r.step()
				set()
				if c.restart {
					restart()
				}
				r.step()
				r.is(job.Running, "")
				time.Sleep(15 * time.Minute) // 25 in all without progress
				r.step()
				r.is(job.Running, "")
				r.event(7, job.HubParty, job.KindRound, job.Round{Round: 1, Total: 2})
				r.step()
				time.Sleep(20 * time.Minute)
				r.step()
				r.is(job.Running, "")
				r.event(8, job.HubParty, job.KindRound, job.Round{Round: 2, Total: 2})
				r.step()
				time.Sleep(16 * time.Minute) // 61 in all
				r.step()
				r.is(job.Stopping, "deadline of ")
			})
		})
	}
}

// What a site says of the time, by a clock of its own that is wrong, is no progress that was long ago, nor one that is to come.
func TestSiteWithAWrongClock(t *testing.T) {
	for _, off := range []time.Duration{-5 * time.Hour, 5 * time.Hour} {
		synctest.Test(t, func(t *testing.T) {
			r := newRig(t, job.Spec{NoProgress: job.Duration(30 * time.Minute)})
			r.settable(0)
			r.h.siteUp("a")
			r.h.siteUp("b")
			r.step()
			for _, p := range []string{job.HubParty, "a", "b"} {
				r.party(p, job.PartyPreparing, nil)
				r.party(p, job.PartyReady, nil)
			}
			r.step()
			r.party(job.HubParty, job.PartyRunning, nil)
			r.step()
			for n := range int64(3) {
				time.Sleep(20 * time.Minute)
				e, err := job.NewEvent(r.c.id, "a", job.KindProgress, job.Text{Message: "on"}, r.h.wall().Add(off))
				if err != nil {
					t.Fatal(err)
				}
				if _, _, err := r.h.db.Append(context.Background(), e, 100+n); err != nil {
					t.Fatal(err)
				}
				r.step()
				r.is(job.Running, "")
			}
			time.Sleep(31 * time.Minute)
			r.step()
			r.is(job.Stopping, "no-progress of ")
		})
	}
}
