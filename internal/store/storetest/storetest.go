// Package storetest is the contract of a store of jobs, as tests that every store passes. It knows
// nothing of files or servers: what only one kind of store can suffer is tested beside that store.
// Start with [Run].
package storetest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/store"
)

// DB is all that a store can do.
type DB = store.Store

// Opener opens a store. The first call in a test gives an empty one, each further call the same one
// again, as after a restart; whoever calls closes it.
type Opener func() DB

// Run runs the suite. It asks fresh for a new place for each test.
func Run(t *testing.T, fresh func(t *testing.T) Opener) {
	for _, c := range []struct {
		name string
		test func(t *testing.T, open Opener)
	}{
		{"a job is read back as it was stored, also after a restart", testRoundTrip},
		{"a repeated submission is the same job", testKey},
		{"what does not exist is not found", testNotFound},
		{"only the moves of the table are made, from every state", testMoves},
		{"only the party moves of the table are made, from every state", testPartyMoves},
		{"the first cause stays", testFirstCause},
		{"no job ends badly without a cause", testUntold},
		{"a job with a cause cannot succeed", testNoSuccessWithCause},
		{"a report that is delivered twice counts once", testReports},
		{"events come in order and in pages", testEventPages},
		{"jobs come in pages, by state, from both ends", testJobPages},
		{"a reason follows what a job waits for", testReason},
		{"sites become known later", testAddParty},
		{"subscribers wake after commits, and only for their job", testSubscribe},
		{"who gathers hears which jobs changed, each once", testGather},
		{"no event is lost between a subscriber and many writers", testConcurrent},
		{"bundles are noted once", testBundles},
		{"a call whose context is over changes nothing", testContext},
		{"a party begins anew in another attempt", testAttempts},
		{"any text is kept", testTexts},
		{"what a job is found by has an end", testLongTexts},
		{"who reads on from a number misses no event of many writers", testManyWriters},
		{"jobs are found by how their IDs begin", testFind},
		{"jobs are chosen by submitter, name and prefix", testFilters},
		{"jobs are counted by state", testCount},
		{"an observer hears of calls, and of what was stored", testObserve},
		{"a job that is over can be deleted, with all that belongs to it", testDelete},
		{"the parties of many jobs come at once", testPartiesOf},
		{"a bundle that a job needs stays", testDeleteBundle},
		{"a lease has one holder at a time", testLease},
		{"of many that claim a job one gets it", testLeaseRace},
		{"whom the hub knows", testIdentities},
		{"a site's declarations and draining", testSites},
		{"a token is good once, and until it is over", testTokens},
		{"of many that use a token one succeeds", testTokenRace},
		{"a job starts with its sites in one step, by who may say so", testStart},
		{"a site joins a job later, and is given back with its part", testAllocate},
		{"a duty is one hub's at a time", testDuty},
		{"what has changed is told once", testChanges},
		{"any sequence of events ends with a cause", testProperty},
	} {
		t.Run(c.name, func(t *testing.T) { c.test(t, fresh(t)) })
	}
}

// t0 is when everything in the suite happens; stores keep nanoseconds.
var t0 = time.Date(2026, 3, 4, 5, 6, 7, 89, time.UTC)

type tb interface {
	Helper()
	Fatalf(string, ...any)
	Errorf(string, ...any)
	Context() context.Context
}

func start(t *testing.T, open Opener) DB {
	t.Helper()
	db := open()
	t.Cleanup(func() {
		if err := db.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return db
}

func ok(t tb, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%v", err)
	}
}

func code(t tb, err error, want problem.Code) {
	t.Helper()
	if e, is := errors.AsType[*problem.Error](err); !is || e.Code != want {
		t.Errorf("got error %v, want a problem with code %s", err, want)
	}
}

func create(t tb, db DB, sites ...string) job.Job {
	t.Helper()
	j, err := db.CreateJob(t.Context(), job.Job{Name: "quickstart", Created: t0}, sites)
	ok(t, err)
	return j
}

func get(t tb, db DB, id job.ID) job.Job {
	t.Helper()
	j, err := db.Job(t.Context(), id)
	ok(t, err)
	return j
}

func events(t tb, db DB, id job.ID) []job.Event {
	t.Helper()
	var out []job.Event
	for after := int64(0); ; {
		page, err := db.Events(t.Context(), id, after, 7)
		ok(t, err)
		if len(page) == 0 {
			return out
		}
		out = append(out, page...)
		after = page[len(page)-1].Seq
	}
}

// lead takes a new job to state to by the shortest way.
func lead(t tb, db DB, id job.ID, to job.State) {
	t.Helper()
	for _, s := range way(job.Submitted, func(s job.State) bool { return s == to }, job.State.Next) {
		ok(t, db.Move(t.Context(), id, s, nil, "", t0))
	}
}

// way gives the shortest sequence of moves from from to a state that is wanted, without from.
func way[S comparable](from S, wanted func(S) bool, next func(S) []S) []S {
	type node struct {
		s   S
		via []S
	}
	seen := map[S]bool{from: true}
	for queue := []node{{s: from}}; len(queue) > 0; queue = queue[1:] {
		n := queue[0]
		if wanted(n.s) {
			return n.via
		}
		for _, s := range next(n.s) {
			if !seen[s] {
				seen[s] = true
				queue = append(queue, node{s, append(slices.Clone(n.via), s)})
			}
		}
	}
	return nil
}

var sameJob = cmp.Options{cmpopts.IgnoreFields(problem.Error{}, "Err"), cmpopts.EquateEmpty()}

func testRoundTrip(t *testing.T, open Opener) {
	in := job.Job{
		ID: job.NewID(t0), Name: "quickstart", Key: "k", Submitter: "ada", Bundle: "sha256:00", Reason: "new", Created: t0,
		Spec: job.Spec{
			Engine: "flower", Sites: []string{"st-anna", "charite"}, MinSites: 2, Deadline: job.Duration(time.Hour), NoProgress: job.NoLimit,
			Server: job.Server{Args: []string{"--run-config", "a=1 b='x'"}, Env: map[string]string{"A": "ä\n"}},
			Site: job.Site{
				NodeConfig: job.NodeConfig{"i": int64(1), "f": 1.0, "s": "x", "b": true},
				Named:      map[string]job.Site{"st-anna": {Env: map[string]string{"DATA": "/d"}}},
			},
			FlwrVersion: "1.30.0", App: job.App{Name: "q", Version: "1"},
		},
	}
	cause := problem.Wrap(errors.New("secret detail"), problem.SiteLost, "look at the site", "site charite went away")
	cause.Party, cause.Log = "charite", "agent.log:3"
	db := open()
	made, err := db.CreateJob(t.Context(), in, []string{"st-anna", "charite"})
	ok(t, err)
	want := in
	want.State = job.Submitted
	if d := cmp.Diff(want, made, sameJob); d != "" {
		t.Errorf("CreateJob (-want +got):\n%s", d)
	}
	ok(t, db.Move(t.Context(), in.ID, job.Queued, nil, "waits for charite", t0.Add(1)))
	ok(t, db.Move(t.Context(), in.ID, job.Preparing, nil, "", t0.Add(2)))
	ok(t, db.MoveParty(t.Context(), in.ID, "charite", job.PartyFailed, cause, "gone", t0.Add(3)))
	ok(t, db.Move(t.Context(), in.ID, job.Stopping, cause, "a site is gone", t0.Add(4)))
	ok(t, db.Move(t.Context(), in.ID, job.Failed, nil, "ended", t0.Add(5)))
	ok(t, db.Close())

	db = start(t, open)
	want.State, want.Cause, want.Reason, want.Started, want.Ended = job.Failed, cause, "ended", t0.Add(2), t0.Add(5)
	if d := cmp.Diff(want, get(t, db, in.ID), sameJob); d != "" {
		t.Errorf("Job (-want +got):\n%s", d)
	}
	ps, err := db.Parties(t.Context(), in.ID)
	ok(t, err)
	if d := cmp.Diff([]job.Party{
		{Job: in.ID, Name: job.HubParty, State: job.PartyAbsent, Updated: t0},
		{Job: in.ID, Name: "st-anna", State: job.PartyAbsent, Updated: t0},
		{Job: in.ID, Name: "charite", State: job.PartyFailed, Reason: "gone", Cause: cause, Updated: t0.Add(3)},
	}, ps, sameJob); d != "" {
		t.Errorf("Parties (-want +got):\n%s", d)
	}
	var moves []job.JobState
	for _, e := range events(t, db, in.ID) {
		if e.Kind == job.KindJobState {
			var b job.JobState
			ok(t, e.Decode(&b))
			moves = append(moves, b)
		}
	}
	if d := cmp.Diff([]job.JobState{
		{To: job.Submitted, Reason: "new"},
		{From: job.Submitted, To: job.Queued, Reason: "waits for charite"},
		{From: job.Queued, To: job.Preparing},
		{From: job.Preparing, To: job.Stopping, Cause: cause, Reason: "a site is gone"},
		{From: job.Stopping, To: job.Failed, Cause: cause, Reason: "ended"},
	}, moves, sameJob); d != "" {
		t.Errorf("events (-want +got):\n%s", d)
	}
}

func testKey(t *testing.T, open Opener) {
	db := start(t, open)
	ctx := t.Context()
	a, err := db.CreateJob(ctx, job.Job{Name: "a", Key: "k", Submitter: "ada", Created: t0}, []string{"s1"})
	ok(t, err)
	ok(t, db.Move(ctx, a.ID, job.Queued, nil, "", t0))
	again, err := db.CreateJob(ctx, job.Job{ID: job.NewID(t0), Name: "b", Key: "k", Submitter: "ada", Created: t0}, []string{"s2"})
	ok(t, err)
	if again.ID != a.ID || again.Name != "a" || again.State != job.Queued {
		t.Errorf("the second submission gave %+v, want job %s as it is", again, a.ID)
	}
	other, err := db.CreateJob(ctx, job.Job{Name: "c", Key: "k", Submitter: "bob", Created: t0}, nil)
	ok(t, err)
	if other.ID == a.ID {
		t.Error("a key gave one submitter the job of another")
	}
	x, y := create(t, db), create(t, db)
	if x.ID == y.ID {
		t.Error("two jobs without a key are one")
	}
	_, err = db.CreateJob(ctx, job.Job{ID: a.ID, Name: "d", Created: t0}, nil)
	code(t, err, problem.Exists)
	_, err = db.CreateJob(ctx, job.Job{Name: "d", Created: t0}, []string{"hub"})
	code(t, err, problem.Usage)
	js, err := db.Jobs(ctx, store.Filter{})
	ok(t, err)
	if len(js) != 4 {
		t.Errorf("%d jobs are stored, want 4", len(js))
	}
}

func testNotFound(t *testing.T, open Opener) {
	db := start(t, open)
	ctx, id := t.Context(), job.NewID(t0)
	_, err := db.Job(ctx, id)
	code(t, err, problem.NotFound)
	_, err = db.Parties(ctx, id)
	code(t, err, problem.NotFound)
	code(t, db.Move(ctx, id, job.Queued, nil, "", t0), problem.NotFound)
	code(t, db.SetReason(ctx, id, "x"), problem.NotFound)
	code(t, db.AddParty(ctx, id, "s1"), problem.NotFound)
	code(t, db.MoveParty(ctx, id, job.HubParty, job.PartyDone, nil, "", t0), problem.NotFound)
	_, _, err = db.Append(ctx, job.Event{Job: id, Kind: job.KindNote}, 0)
	code(t, err, problem.NotFound)
	_, err = db.Bundle(ctx, "sha256:00")
	code(t, err, problem.NotFound)
	j := create(t, db, "s1")
	code(t, db.MoveParty(ctx, j.ID, "s2", job.PartyDone, nil, "", t0), problem.NotFound)
	if es, err := db.Events(ctx, id, 0, 0); err != nil || len(es) != 0 {
		t.Errorf("Events of no job: %v, %v", es, err)
	}
}

func testMoves(t *testing.T, open Opener) {
	db := start(t, open)
	for _, from := range job.States() {
		for _, to := range append(job.States(), "flying", "") {
			j := create(t, db)
			lead(t, db, j.ID, from)
			before := events(t, db, j.ID)
			err := db.Move(t.Context(), j.ID, to, nil, "", t0)
			want, grown := from, 0
			switch {
			case from == to:
				ok(t, err)
			case from.Can(to):
				ok(t, err)
				want, grown = to, 1
			default:
				me, is := errors.AsType[*store.MoveError](err)
				if !is || me.From != string(from) || me.To != string(to) || me.Job != j.ID {
					t.Errorf("%s → %q: got %v, want a MoveError", from, to, err)
				}
				if _, is := errors.AsType[*problem.Error](err); !is {
					t.Errorf("%s → %q: %v is no problem", from, to, err)
				}
			}
			if got := get(t, db, j.ID).State; got != want {
				t.Errorf("%s → %q left the job in %s, want %s", from, to, got, want)
			}
			if n := len(events(t, db, j.ID)) - len(before); n != grown {
				t.Errorf("%s → %q wrote %d events, want %d", from, to, n, grown)
			}
		}
	}
}

func testPartyMoves(t *testing.T, open Opener) {
	db := start(t, open)
	ctx := t.Context()
	for _, from := range job.PartyStates() {
		for _, to := range append(job.PartyStates(), "flying") {
			j := create(t, db, "s1", "s2")
			for _, s := range way(job.PartyAbsent, func(s job.PartyState) bool { return s == from }, job.PartyState.Next) {
				ok(t, db.MoveParty(ctx, j.ID, "s1", s, nil, "", t0))
			}
			before := len(events(t, db, j.ID))
			err := db.MoveParty(ctx, j.ID, "s1", to, nil, "why", t0.Add(9))
			want, grown := from, 0
			switch {
			case from == to:
				ok(t, err)
			case from.Can(to):
				ok(t, err)
				want, grown = to, 1
			default:
				if me, is := errors.AsType[*store.MoveError](err); !is || me.Party != "s1" {
					t.Errorf("%s → %s: got %v, want a MoveError of party s1", from, to, err)
				}
			}
			ps, err := db.Parties(ctx, j.ID)
			ok(t, err)
			if ps[1].State != want || ps[0].State != job.PartyAbsent || ps[2].State != job.PartyAbsent {
				t.Errorf("%s → %s left %v, want %s in the middle only", from, to, ps, want)
			}
			if ps[1].State == job.PartyFailed && ps[1].Cause == nil {
				t.Errorf("%s → %s: the party failed without a cause", from, to)
			}
			if n := len(events(t, db, j.ID)) - before; n != grown {
				t.Errorf("%s → %s wrote %d events, want %d", from, to, n, grown)
			}
		}
	}
}

func testFirstCause(t *testing.T, open Opener) {
	db := start(t, open)
	ctx := t.Context()
	first, second := problem.New(problem.SiteLost, "", "first"), problem.New(problem.Deadline, "", "second")
	j := create(t, db, "s1")
	lead(t, db, j.ID, job.Running)
	ok(t, db.Move(ctx, j.ID, job.Stopping, first, "why", t0))
	ok(t, db.Move(ctx, j.ID, job.Stopping, second, "other", t0))
	if got := get(t, db, j.ID); got.Cause == nil || got.Cause.Msg != "first" || got.Reason != "why" {
		t.Errorf("after a second stop: cause %v, reason %q; want those of the first", got.Cause, got.Reason)
	}
	ok(t, db.Move(ctx, j.ID, job.Failed, second, "", t0.Add(5)))
	ok(t, db.Move(ctx, j.ID, job.Failed, second, "", t0.Add(9)))
	if got := get(t, db, j.ID); got.Cause.Msg != "first" || !got.Ended.Equal(t0.Add(5)) {
		t.Errorf("ended at %v with %v, want the first end and the first cause", got.Ended, got.Cause)
	}
	var last job.JobState
	es := events(t, db, j.ID)
	ok(t, es[len(es)-1].Decode(&last))
	if last.Cause == nil || last.Cause.Msg != "first" {
		t.Errorf("the event of the end has cause %v, want the first", last.Cause)
	}
}

func testUntold(t *testing.T, open Opener) {
	db := start(t, open)
	for _, c := range []struct {
		from, to job.State
		want     problem.Code
	}{
		{job.Queued, job.Failed, problem.Internal},
		{job.Stopping, job.Failed, problem.Internal},
		{job.Stopping, job.Aborted, problem.AbortedByUser},
		{job.Waiting, job.Rejected, problem.PolicyDenied},
		{job.Stopping, job.Succeeded, ""},
	} {
		j := create(t, db)
		lead(t, db, j.ID, c.from)
		ok(t, db.Move(t.Context(), j.ID, c.to, nil, "", t0))
		got := get(t, db, j.ID)
		switch {
		case c.want == "" && got.Cause != nil:
			t.Errorf("%s → %s has cause %v, want none", c.from, c.to, got.Cause)
		case c.want != "" && (got.Cause == nil || got.Cause.Code != c.want):
			t.Errorf("%s → %s has cause %v, want code %s", c.from, c.to, got.Cause, c.want)
		}
	}
}

func testNoSuccessWithCause(t *testing.T, open Opener) {
	db := start(t, open)
	j := create(t, db)
	lead(t, db, j.ID, job.Running)
	ok(t, db.Move(t.Context(), j.ID, job.Stopping, problem.New(problem.AppError, "", "it raised"), "", t0))
	err := db.Move(t.Context(), j.ID, job.Succeeded, nil, "", t0)
	if _, is := errors.AsType[*store.MoveError](err); !is {
		t.Errorf("got %v, want a MoveError", err)
	}
	ok(t, db.Move(t.Context(), j.ID, job.Failed, nil, "", t0))
}

func testReports(t *testing.T, open Opener) {
	db := start(t, open)
	ctx := t.Context()
	a, b := create(t, db, "s1", "s2"), create(t, db, "s1")
	app := func(id job.ID, party string, n int64) (int64, bool) {
		t.Helper()
		e, err := job.NewEvent(id, party, job.KindRound, job.Round{Round: int(n)}, t0)
		ok(t, err)
		seq, dup, err := db.Append(ctx, e, n)
		ok(t, err)
		return seq, dup
	}
	first, dup := app(a.ID, "s1", 1)
	if dup || first <= 0 {
		t.Errorf("the first report: seq %d, dup %v", first, dup)
	}
	if seq, dup := app(a.ID, "s1", 1); !dup || seq != first {
		t.Errorf("the report again: seq %d, dup %v; want %d, true", seq, dup, first)
	}
	for _, o := range []struct {
		id    job.ID
		party string
		n     int64
	}{{a.ID, "s2", 1}, {b.ID, "s1", 1}, {a.ID, "s1", 2}, {a.ID, "s1", 9}, {a.ID, "s1", 5}, {a.ID, "s1", 0}, {a.ID, "s1", 0}} {
		if seq, dup := app(o.id, o.party, o.n); dup || seq <= first {
			t.Errorf("report %v: seq %d, dup %v; want a new one", o, seq, dup)
		}
	}
	for party, want := range map[string]int64{"s1": 9, "s2": 1, job.HubParty: 0} {
		if n, err := db.PartySeq(ctx, a.ID, party); err != nil || n != want {
			t.Errorf("PartySeq(%s) = %d, %v; want %d", party, n, err, want)
		}
	}
	_, _, err := db.Append(ctx, job.Event{Job: a.ID, Kind: job.KindJobState}, 0)
	code(t, err, problem.Internal)
	_, _, err = db.Append(ctx, job.Event{Job: a.ID, Kind: job.KindNote, Body: json.RawMessage("{")}, 0)
	code(t, err, problem.Internal)
}

func testEventPages(t *testing.T, open Opener) {
	db := start(t, open)
	a, b := create(t, db), create(t, db)
	for i := range 20 {
		for _, j := range []job.Job{a, b} {
			e, err := job.NewEvent(j.ID, job.HubParty, job.KindNote, job.Text{Message: fmt.Sprint(i)}, t0.Add(time.Duration(i)))
			ok(t, err)
			_, _, err = db.Append(t.Context(), e, 0)
			ok(t, err)
		}
	}
	for _, c := range []struct {
		id   job.ID
		want int
	}{{a.ID, 21}, {b.ID, 21}, {"", 42}} {
		es := events(t, db, c.id)
		if len(es) != c.want || !slices.IsSortedFunc(es, func(x, y job.Event) int { return int(x.Seq - y.Seq) }) {
			t.Errorf("%q has %d events, want %d, in order", c.id, len(es), c.want)
		}
	}
	es := events(t, db, a.ID)
	var text job.Text
	ok(t, es[20].Decode(&text))
	if text.Message != "19" || es[20].Party != job.HubParty || !es[20].At.Equal(t0.Add(19)) {
		t.Errorf("the last event is %+v", es[20])
	}
}

func testJobPages(t *testing.T, open Opener) {
	db := start(t, open)
	ctx := t.Context()
	var all, queued []job.ID
	for i := range 10 {
		j := create(t, db)
		all = append(all, j.ID)
		if i%3 == 0 {
			lead(t, db, j.ID, job.Queued)
			queued = append(queued, j.ID)
		}
	}
	backwards := func(ids []job.ID) []job.ID {
		r := slices.Clone(ids)
		slices.Reverse(r)
		return r
	}
	for _, c := range []struct {
		f    store.Filter
		want []job.ID
	}{
		{store.Filter{}, all},
		{store.Filter{Limit: 3}, all},
		{store.Filter{Limit: 4, Newest: true}, backwards(all)},
		{store.Filter{States: []job.State{job.Queued}, Limit: 1}, queued},
		{store.Filter{States: []job.State{job.Queued}, Limit: 3, Newest: true}, backwards(queued)},
		{store.Filter{States: []job.State{job.Queued, job.Submitted}, Limit: 2}, all},
		{store.Filter{States: []job.State{job.Running}}, nil},
	} {
		var got []job.ID
		for f := c.f; ; f.After = got[len(got)-1] {
			page, err := db.Jobs(ctx, f)
			ok(t, err)
			if f.Limit > 0 && len(page) > f.Limit {
				t.Fatalf("%+v gave %d jobs", f, len(page))
			}
			for _, j := range page {
				got = append(got, j.ID)
			}
			if len(page) == 0 {
				break
			}
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%+v: got %v, want %v", c.f, got, c.want)
		}
	}
}

func testReason(t *testing.T, open Opener) {
	db := start(t, open)
	j := create(t, db)
	ok(t, db.Move(t.Context(), j.ID, job.Queued, nil, "waits for 2 sites", t0))
	n := len(events(t, db, j.ID))
	ok(t, db.SetReason(t.Context(), j.ID, "waits for st-anna"))
	if got := get(t, db, j.ID).Reason; got != "waits for st-anna" {
		t.Errorf("reason %q", got)
	}
	if m := len(events(t, db, j.ID)); m != n {
		t.Errorf("a reason wrote %d events", m-n)
	}
	ok(t, db.Move(t.Context(), j.ID, job.Failed, nil, "it ended", t0))
	ok(t, db.SetReason(t.Context(), j.ID, "late"))
	if got := get(t, db, j.ID).Reason; got != "it ended" {
		t.Errorf("the reason of an ended job became %q", got)
	}
}

func testAddParty(t *testing.T, open Opener) {
	db := start(t, open)
	ctx := t.Context()
	j := create(t, db, "z")
	for _, s := range []string{"y", "x", "y", "z"} {
		ok(t, db.AddParty(ctx, j.ID, s))
	}
	ok(t, db.MoveParty(ctx, j.ID, "y", job.PartyPreparing, nil, "", t0))
	ok(t, db.AddParty(ctx, j.ID, "y"))
	ps, err := db.Parties(ctx, j.ID)
	ok(t, err)
	var got []string
	for _, p := range ps {
		got = append(got, p.Name+":"+string(p.State))
	}
	if want := []string{"hub:absent", "z:absent", "y:preparing", "x:absent"}; !slices.Equal(got, want) {
		t.Errorf("parties %v, want %v", got, want)
	}
	code(t, db.AddParty(ctx, j.ID, "hub"), problem.Usage)
	code(t, db.AddParty(ctx, j.ID, "St Anna"), problem.Usage)
	ok(t, db.Move(ctx, j.ID, job.Failed, nil, "", t0))
	code(t, db.AddParty(ctx, j.ID, "w"), problem.Usage)
	ok(t, db.AddParty(ctx, j.ID, "y"))
}

func testSubscribe(t *testing.T, open Opener) {
	db := start(t, open)
	a, b := create(t, db, "s1"), create(t, db)
	mine, cancelMine := db.Subscribe(a.ID)
	all, cancelAll := db.Subscribe("")
	defer cancelMine()
	defer cancelAll()
	awake := func(c <-chan struct{}) bool {
		select {
		case <-c:
			return true
		default:
			return false
		}
	}
	// A call that has returned has woken already, so nothing here waits.
	expect := func(what string, wantMine, wantAll bool) {
		t.Helper()
		if m, a := awake(mine), awake(all); m != wantMine || a != wantAll {
			t.Errorf("%s: woke job %v, all %v; want %v, %v", what, m, a, wantMine, wantAll)
		}
	}
	ctx := t.Context()
	expect("nothing", false, false)
	ok(t, db.Move(ctx, a.ID, job.Queued, nil, "", t0))
	expect("a move", true, true)
	ok(t, db.Move(ctx, a.ID, job.Queued, nil, "", t0))
	expect("a move to where it is", false, false)
	if db.Move(ctx, a.ID, job.Succeeded, nil, "", t0) == nil {
		t.Error("a queued job succeeded")
	}
	expect("an illegal move", false, false)
	ok(t, db.MoveParty(ctx, a.ID, "s1", job.PartyPreparing, nil, "", t0))
	expect("a party's move", true, true)
	ok(t, db.SetReason(ctx, a.ID, "r"))
	expect("a reason", true, true)
	ok(t, db.AddParty(ctx, a.ID, "s2"))
	expect("a party", true, true)
	for range 3 {
		_, _, err := db.Append(ctx, job.Event{Job: a.ID, Party: "s1", Kind: job.KindNote, At: t0}, 1)
		ok(t, err)
	}
	expect("a report, three times", true, true)
	ok(t, db.Move(ctx, b.ID, job.Queued, nil, "", t0))
	expect("another job", false, true)
	create(t, db)
	expect("a new job", false, true)
	cancelMine()
	cancelMine()
	ok(t, db.Move(ctx, a.ID, job.Preparing, nil, "", t0))
	expect("after cancel", false, true)
}

// Writers and a follower at once: the follower sees each event once, in order, with no timer.
func testConcurrent(t *testing.T, open Opener) {
	db := start(t, open)
	j := create(t, db, "s1")
	const writers, each = 4, 25
	wake, cancel := db.Subscribe(j.ID)
	defer cancel()
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := range each {
				for range 2 { // each report is delivered twice
					e := job.Event{Job: j.ID, Party: fmt.Sprintf("p%d", w), Kind: job.KindNote, At: t0}
					if _, _, err := db.Append(t.Context(), e, int64(i+1)); err != nil {
						t.Error(err)
						return
					}
				}
			}
		})
	}
	ctx, stop := context.WithTimeout(t.Context(), time.Minute)
	defer stop()
	var seen []job.Event
	for after := int64(0); len(seen) < writers*each+1; {
		page, err := db.Events(ctx, j.ID, after, 10)
		ok(t, err)
		if len(page) > 0 {
			seen = append(seen, page...)
			after = page[len(page)-1].Seq
			continue
		}
		select {
		case <-wake:
		case <-ctx.Done():
			t.Fatalf("the follower saw %d events and was not woken for more", len(seen))
		}
	}
	wg.Wait()
	if rest, err := db.Events(t.Context(), j.ID, seen[len(seen)-1].Seq, 0); err != nil || len(rest) > 0 {
		t.Errorf("%d events too many, %v", len(rest), err)
	}
}

func testBundles(t *testing.T, open Opener) {
	db := start(t, open)
	ctx := t.Context()
	ok(t, db.PutBundle(ctx, "sha256:aa", 7, t0))
	ok(t, db.PutBundle(ctx, "sha256:bb", 8, t0.Add(1)))
	ok(t, db.PutBundle(ctx, "sha256:aa", 7, t0.Add(2)))
	got, err := db.Bundles(ctx)
	ok(t, err)
	want := []store.Bundle{{Digest: "sha256:aa", Size: 7, Created: t0}, {Digest: "sha256:bb", Size: 8, Created: t0.Add(1)}}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("Bundles (-want +got):\n%s", d)
	}
	if b, err := db.Bundle(ctx, "sha256:bb"); err != nil || b != want[1] {
		t.Errorf("Bundle = %v, %v", b, err)
	}
}

func testContext(t *testing.T, open Opener) {
	db := start(t, open)
	j := create(t, db)
	boom := errors.New("boom")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(boom)
	if err := db.Move(ctx, j.ID, job.Queued, nil, "", t0); !errors.Is(err, boom) {
		t.Errorf("Move: %v, want the context's cause", err)
	}
	if _, err := db.Jobs(ctx, store.Filter{}); !errors.Is(err, boom) {
		t.Errorf("Jobs: %v, want the context's cause", err)
	}
	if got := get(t, db, j.ID).State; got != job.Submitted {
		t.Errorf("the job is %s", got)
	}
	ok(t, db.Move(t.Context(), j.ID, job.Queued, nil, "", t0))
}

// testProperty throws moves at random, most of them illegal, at a job and its parties, and compares
// with a model; then it ends the job from wherever it is. The events alone give the same history.
func testProperty(t *testing.T, open Opener) {
	db := start(t, open)
	codes := []problem.Code{problem.SiteLost, problem.AppError, problem.AbortedByUser, problem.DiskFull}
	rapid.Check(t, func(t *rapid.T) {
		j := create(t, db, "s1", "s2")
		parties := []string{job.HubParty, "s1", "s2"}
		state, party := job.Submitted, map[string]job.PartyState{job.HubParty: job.PartyAbsent, "s1": job.PartyAbsent, "s2": job.PartyAbsent}
		var first *job.Cause
		now := t0
		move := func(to job.State, cause *job.Cause) {
			err := db.Move(t.Context(), j.ID, to, cause, "r", now)
			c := first
			if c == nil {
				c = cause
			}
			switch {
			case to == state:
				ok(t, err)
			case !state.Can(to) || to == job.Succeeded && c != nil:
				if _, is := errors.AsType[*store.MoveError](err); !is {
					t.Fatalf("%s → %s with cause %v: got %v, want a MoveError", state, to, c, err)
				}
			default:
				ok(t, err)
				state, first = to, c
			}
		}
		cause := func() *job.Cause {
			if rapid.Bool().Draw(t, "told") {
				return problem.New(rapid.SampledFrom(codes).Draw(t, "code"), "", "because %d", now.UnixNano())
			}
			return nil
		}
		for range rapid.IntRange(0, 25).Draw(t, "events") {
			now = now.Add(1)
			switch rapid.IntRange(0, 2).Draw(t, "what") {
			case 0:
				move(rapid.SampledFrom(job.States()).Draw(t, "to"), cause())
			case 1: // likelier to get anywhere
				if next := state.Next(); len(next) > 0 {
					move(rapid.SampledFrom(next).Draw(t, "next"), cause())
				}
			case 2:
				p, to := rapid.SampledFrom(parties).Draw(t, "party"), rapid.SampledFrom(job.PartyStates()).Draw(t, "state")
				err := db.MoveParty(t.Context(), j.ID, p, to, nil, "", now)
				switch {
				case party[p] == to:
					ok(t, err)
				case party[p].Can(to):
					ok(t, err)
					party[p] = to
				case err == nil:
					t.Fatalf("party %s went from %s to %s", p, party[p], to)
				}
			}
		}
		for !state.Terminal() { // as the hub ends a job: stop what is active, then the outcome
			now = now.Add(1)
			switch {
			case state == job.Stopping || !state.Active():
				c := first
				if c == nil {
					c = cause()
				}
				move(state.Outcome(c), c)
			default:
				move(job.Stopping, cause())
			}
		}
		got := get(t, db, j.ID)
		if got.State != state || (got.Cause == nil) != (state == job.Succeeded) || got.Ended.IsZero() {
			t.Fatalf("ended as %s with cause %v at %v, want %s", got.State, got.Cause, got.Ended, state)
		}
		if first != nil && got.Cause.Msg != first.Msg {
			t.Fatalf("cause %q, want the first: %q", got.Cause.Msg, first.Msg)
		}
		replayed, replayedParty := job.State(""), map[string]job.PartyState{}
		for _, p := range parties {
			replayedParty[p] = job.PartyAbsent
		}
		for _, e := range events(t, db, j.ID) {
			switch e.Kind {
			case job.KindJobState:
				var b job.JobState
				ok(t, e.Decode(&b))
				if b.From != replayed {
					t.Fatalf("event %d goes from %s, after one that went to %s", e.Seq, b.From, replayed)
				}
				replayed = b.To
			case job.KindPartyState:
				var b job.PartyStateChange
				ok(t, e.Decode(&b))
				if b.From != replayedParty[e.Party] {
					t.Fatalf("event %d of %s goes from %s, after one that went to %s", e.Seq, e.Party, b.From, replayedParty[e.Party])
				}
				replayedParty[e.Party] = b.To
			}
		}
		if d := cmp.Diff(party, replayedParty); replayed != state || d != "" {
			t.Fatalf("the events give %s and %s", replayed, d)
		}
	})
}
