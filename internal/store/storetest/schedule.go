package storetest

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/store"
)

// holding gives the parties that hold something of their sites.
func holding(t tb, db DB, id job.ID) []string {
	t.Helper()
	ps, err := db.Parties(t.Context(), id)
	ok(t, err)
	j, err := db.Job(t.Context(), id)
	ok(t, err)
	out := []string{}
	for _, p := range ps {
		if j.Holds(p) {
			out = append(out, p.Name)
		}
	}
	return out
}

func holds(t tb, db DB, id job.ID, want ...string) {
	t.Helper()
	if got := holding(t, db, id); !slices.Equal(got, append([]string{}, want...)) {
		t.Errorf("the job holds %v, want %v", got, want)
	}
}

func onDuty(t tb, db DB, owner string) {
	t.Helper()
	if held, _, err := db.ClaimDuty(t.Context(), store.Scheduling, owner, t0.Add(time.Hour), t0); !held || err != nil {
		t.Fatalf("%s has the duty: %v, %v", owner, held, err)
	}
}

func refused(t tb, err error) {
	t.Helper()
	if _, is := errors.AsType[*store.MoveError](err); !is {
		t.Errorf("got %v, want a refused move", err)
	}
}

func testStart(t *testing.T, open Opener) {
	db := start(t, open)
	j := create(t, db, "s1", "s2", "s3")
	ok(t, db.Move(t.Context(), j.ID, job.Queued, nil, "its turn has not come", t0))
	code(t, db.Start(t.Context(), j.ID, []string{"s1"}, "me", t0), problem.Denied)
	onDuty(t, db, "me")
	code(t, db.Start(t.Context(), j.ID, []string{"s1"}, "other", t0), problem.Denied)
	code(t, db.Start(t.Context(), j.ID, []string{"s1", "s4"}, "me", t0), problem.NotFound)
	code(t, db.Start(t.Context(), j.ID, []string{job.HubParty}, "me", t0), problem.NotFound)
	holds(t, db, j.ID) // all or nothing
	if got := get(t, db, j.ID); got.State != job.Queued || !got.Started.IsZero() {
		t.Errorf("a refused start: %+v", got)
	}
	wake, cancel := db.Subscribe(j.ID)
	defer cancel()
	ok(t, db.Start(t.Context(), j.ID, []string{"s1", "s3"}, "me", t0.Add(5)))
	if len(wake) == 0 {
		t.Error("nobody hears of a start")
	}
	holds(t, db, j.ID, "s1", "s3")
	if got := get(t, db, j.ID); got.State != job.Preparing || !got.Started.Equal(t0.Add(5)) || got.Reason != "" {
		t.Errorf("started: %+v", got)
	}
	es := events(t, db, j.ID)
	var s job.JobState
	ok(t, es[len(es)-1].Decode(&s))
	if s.From != job.Queued || s.To != job.Preparing {
		t.Errorf("the event of the start is %+v", s)
	}
	refused(t, db.Start(t.Context(), j.ID, []string{"s2"}, "me", t0))
	holds(t, db, j.ID, "s1", "s3")
	for _, st := range job.States() {
		if st == job.Queued {
			continue
		}
		k := create(t, db, "s1")
		lead(t, db, k.ID, st)
		refused(t, db.Start(t.Context(), k.ID, []string{"s1"}, "me", t0))
		holds(t, db, k.ID)
	}

	// Of many that start it, at the same time, one does.
	k := create(t, db, "s1")
	ok(t, db.Move(t.Context(), k.ID, job.Queued, nil, "", t0))
	again := start(t, open)
	var wg sync.WaitGroup
	started := make([]bool, 8)
	for i := range started {
		wg.Go(func() { started[i] = []DB{db, again}[i%2].Start(t.Context(), k.ID, []string{"s1"}, "me", t0) == nil })
	}
	wg.Wait()
	if n := count(started); n != 1 {
		t.Errorf("the job was started %d times", n)
	}
}

func testAllocate(t *testing.T, open Opener) {
	db := start(t, open)
	j, err := db.CreateJob(t.Context(), job.Job{Name: "quickstart", Created: t0, Spec: job.Spec{Engine: job.EngineNative, EngineAuto: true}}, []string{"s1", "s2"})
	ok(t, err)
	onDuty(t, db, "me")
	refused(t, db.Allocate(t.Context(), j.ID, "s2", "me")) // nothing runs yet
	ok(t, db.Move(t.Context(), j.ID, job.Queued, nil, "", t0))
	ok(t, db.Start(t.Context(), j.ID, []string{"s1"}, "me", t0))
	code(t, db.Allocate(t.Context(), j.ID, "s2", "other"), problem.Denied)
	code(t, db.Allocate(t.Context(), j.ID, "s3", "me"), problem.NotFound)
	ok(t, db.Allocate(t.Context(), j.ID, "s2", "me"))
	ok(t, db.Allocate(t.Context(), j.ID, "s2", "me"))
	holds(t, db, j.ID, "s1", "s2")

	party := func(name string, to job.PartyState) {
		t.Helper()
		ok(t, db.MoveParty(t.Context(), j.ID, name, to, nil, "", t0))
	}
	party("s1", job.PartyPreparing)
	ok(t, db.Again(t.Context(), j.ID, "s1", "the hub's side begins anew", t0))
	holds(t, db, j.ID, "s1", "s2") // it was not over
	party("s2", job.PartyFailed)
	holds(t, db, j.ID, "s1")
	refused(t, db.Allocate(t.Context(), create(t, db, "s1").ID, "s1", "me"))
	ok(t, db.Again(t.Context(), j.ID, "s2", "it is there again", t0))
	holds(t, db, j.ID, "s1")
	ok(t, db.Allocate(t.Context(), j.ID, "s2", "me"))
	holds(t, db, j.ID, "s1", "s2")

	unavailable := problem.New(problem.NativeUnavailable, "", "not here")
	ok(t, db.MoveParty(t.Context(), j.ID, "s2", job.PartyFailed, unavailable, "", t0))
	ok(t, db.Again(t.Context(), j.ID, "s2", "on the same engine", t0))
	holds(t, db, j.ID, "s1") // another job may have it by now
	ok(t, db.Allocate(t.Context(), j.ID, "s2", "me"))
	ok(t, db.MoveParty(t.Context(), j.ID, "s2", job.PartyFailed, unavailable, "", t0))
	holds(t, db, j.ID, "s1", "s2") // until it begins on another engine
	ok(t, db.SetEngine(t.Context(), j.ID, job.EngineChoice{Engine: job.EngineFlower, Why: "not there"}, t0))
	ok(t, db.Again(t.Context(), j.ID, "s2", "on another engine", t0))
	holds(t, db, j.ID, "s1", "s2")

	ok(t, db.Move(t.Context(), j.ID, job.Stopping, nil, "", t0))
	party("s2", job.PartyDone)
	holds(t, db, j.ID, "s1")
	party("s1", job.PartyDone)
	holds(t, db, j.ID)
	ps, err := db.PartiesOf(t.Context(), []job.ID{j.ID})
	ok(t, err)
	if p := ps[j.ID]; p[0].Allocated || !p[1].Allocated || !p[2].Allocated {
		t.Errorf("that they took part is forgotten: %+v", p)
	}
	k := create(t, db, "s1", "s2")
	ok(t, db.Move(t.Context(), k.ID, job.Queued, nil, "", t0))
	ok(t, db.Start(t.Context(), k.ID, []string{"s1"}, "me", t0))
	ok(t, db.Move(t.Context(), k.ID, job.Stopping, nil, "", t0))
	refused(t, db.Allocate(t.Context(), k.ID, "s2", "me")) // it is ending
}

func testDuty(t *testing.T, open Opener) {
	db := start(t, open)
	at := func(s int) time.Time { return t0.Add(time.Duration(s) * time.Second) }
	claim := func(duty, owner string, until, now int, wantHeld, wantTaken bool) {
		t.Helper()
		held, taken, err := db.ClaimDuty(t.Context(), duty, owner, at(until), at(now))
		ok(t, err)
		if held != wantHeld || taken != wantTaken {
			t.Errorf("at %d s: %s has the duty: %v, and has taken it: %v; want %v and %v", now, owner, held, taken, wantHeld, wantTaken)
		}
	}
	claim("d", "a", 30, 0, true, false) // nobody has had it
	claim("d", "b", 60, 29, false, false)
	claim("e", "b", 60, 29, true, false)
	claim("d", "a", 60, 29, true, false)
	claim("d", "b", 90, 60, true, true)
	claim("d", "a", 90, 61, false, false)
	claim("d", "b", 120, 100, true, false) // late, and nobody had it between
	claim("d", "a", 120, 101, false, false)
	claim("d", "a", 150, 120, true, true)

	other := start(t, open)
	held := make([]bool, 8)
	var wg sync.WaitGroup
	for i := range held {
		wg.Go(func() {
			var err error
			if held[i], _, err = []DB{db, other}[i%2].ClaimDuty(t.Context(), "race", fmt.Sprint("hub", i), at(60), at(0)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := count(held); n != 1 {
		t.Errorf("%d have the duty", n)
	}
}

func testChanges(t *testing.T, open Opener) {
	db := start(t, open)
	var at int64
	next := func(want ...job.ID) {
		t.Helper()
		ids, upTo, err := db.Changes(t.Context(), at)
		ok(t, err)
		slices.Sort(want)
		if d := cmp.Diff(want, ids); d != "" {
			t.Errorf("what has changed (-want +got):\n%s", d)
		}
		if upTo < at {
			t.Errorf("from %d on it is so up to %d", at, upTo)
		}
		at = upTo
	}
	next()
	a, b, c := create(t, db, "s1"), create(t, db), create(t, db)
	next(a.ID, b.ID, c.ID)
	next()
	_, _, err := db.Append(t.Context(), job.Event{Job: a.ID, Kind: job.KindNote, At: t0}, 0)
	ok(t, err)
	next()
	ok(t, db.SetReason(t.Context(), a.ID, "it waits"))
	next()
	ok(t, db.MoveParty(t.Context(), a.ID, "s1", job.PartyPreparing, nil, "", t0))
	ok(t, db.MoveParty(t.Context(), a.ID, "s1", job.PartyReady, nil, "", t0))
	ok(t, db.Move(t.Context(), b.ID, job.Queued, nil, "", t0))
	ok(t, db.Move(t.Context(), c.ID, job.Aborted, nil, "", t0))
	ok(t, db.DeleteJob(t.Context(), c.ID))
	next(a.ID, b.ID)
	next()
	if ids, upTo, err := db.Changes(t.Context(), -1); err != nil || len(ids) != 0 || upTo != at {
		t.Errorf("the newest number is %d, with %v, %v; want %d alone", upTo, ids, err, at)
	}

	js, err := db.Jobs(t.Context(), store.Filter{Ended: t0.Add(-1)})
	ok(t, err)
	if len(js) != 0 {
		t.Errorf("jobs that have ended: %v", js)
	}
	d := create(t, db)
	ok(t, db.Move(t.Context(), d.ID, job.Failed, nil, "", t0))
	for from, want := range map[time.Time]int{t0.Add(-1): 1, t0: 0} {
		if js, err := db.Jobs(t.Context(), store.Filter{Ended: from}); err != nil || len(js) != want {
			t.Errorf("jobs that ended after %v: %v, %v; want %d", from, js, err, want)
		}
	}
}
