package storetest

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/store"
)

// testObserve: an observer hears of every call, and of events once they are stored, and of no others.
func testObserve(t *testing.T, open Opener) {
	db := start(t, open)
	type call struct {
		doing  string
		write  bool
		failed problem.Code
	}
	var calls []call
	var events []string
	db.Observe(store.Observer{
		Call: func(doing string, write bool, took time.Duration, err error) {
			if took <= 0 {
				t.Errorf("%q took %s", doing, took)
			}
			calls = append(calls, call{doing, write, problem.CodeOf(err)})
		},
		Event: func(e job.Event) {
			if e.Seq <= 0 || e.Job == "" || e.At.IsZero() {
				t.Errorf("an event is %+v", e)
			}
			text := e.Kind
			var s job.JobState
			if e.Kind == job.KindJobState {
				ok(t, e.Decode(&s))
				text += " " + string(s.To)
			}
			events = append(events, text)
		},
	})
	heard := func(what string, wantCalls []call, wantEvents ...string) {
		t.Helper()
		if !slices.Equal(calls, wantCalls) {
			t.Errorf("%s: calls %v, want %v", what, calls, wantCalls)
		}
		if !slices.Equal(events, wantEvents) {
			t.Errorf("%s: events %v, want %v", what, events, wantEvents)
		}
		calls, events = nil, nil
	}
	j := create(t, db, "a")
	heard("a submission", []call{{"store the job", true, ""}}, "job-state submitted")
	_, err := db.Job(t.Context(), j.ID)
	ok(t, err)
	heard("a read", []call{{"read a job", false, ""}})
	_, err = db.Jobs(t.Context(), store.Filter{})
	ok(t, err)
	heard("a list", []call{{"list jobs", false, ""}})
	ok(t, db.Move(t.Context(), j.ID, job.Queued, nil, "", t0))
	heard("a move", []call{{"store a job's move", true, ""}}, "job-state queued")
	ok(t, db.Move(t.Context(), j.ID, job.Queued, nil, "", t0))
	heard("no move", []call{{"store a job's move", true, ""}})
	if err := db.Move(t.Context(), j.ID, job.Succeeded, nil, "", t0); err == nil {
		t.Error("a queued job succeeded")
	}
	heard("a move that is refused", []call{{"store a job's move", true, problem.Internal}})
	for range 2 {
		_, _, err = db.Append(t.Context(), job.Event{Job: j.ID, Party: "a", Kind: job.KindNote}, 1)
		ok(t, err)
	}
	heard("an event that comes twice", []call{{"store an event", true, ""}, {"store an event", true, ""}}, "note")
	ok(t, db.Ready(t.Context()))
	heard("readiness", []call{{"write to the store", true, ""}})
	over, cancel := context.WithCancel(t.Context())
	cancel()
	if err := db.Ready(over); !errors.Is(err, context.Canceled) {
		t.Errorf("with a context that is over: %v", err)
	}
	// Whoever it is about, a call has the same name.
	var first []call
	for _, name := range []string{"st-anna", "charite"} {
		calls = nil
		ok(t, db.Introduce(t.Context(), store.Identity{Kind: "site", Name: name}))
		ok(t, db.PutIdentity(t.Context(), store.Identity{Kind: "site", Name: name, Enrolled: t0}))
		ok(t, db.SawSite(t.Context(), name, nil, "1", t0))
		ok(t, db.SetDrained(t.Context(), name, true))
		_, err := db.Identity(t.Context(), "site", name)
		ok(t, err)
		ok(t, db.RemoveIdentity(t.Context(), "site", name, t0))
		if first == nil {
			first = calls
		}
		if !slices.Equal(calls, first) || len(calls) != 6 {
			t.Errorf("about %s: calls %v, want %v", name, calls, first)
		}
	}
}
