package hub

import (
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/runner"
)

// Whatever sites, runners and people do, in whatever order, and however often the hub is started again meanwhile: once nothing
// more happens, the job ends by itself, with a cause if it ended otherwise than well, and stays as it ended.
func TestEveryJobEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, job.Spec{})
		rapid.Check(timeless{t}, func(t *rapid.T) { r.any(t) })
	})
}

// timeless hides the deadline of a test, which is none of the imagined time.
type timeless struct{ *testing.T }

// quiet is the longest time that a job may need to end when nothing happens any more: the longest of its own limits, and the rest.
const quiet = 2 * time.Hour

func (r *rig) any(t *rapid.T) {
	h := r.h
	spec := job.Spec{
		Sites: []string{"a", "b"}, MinSites: rapid.IntRange(0, 2).Draw(t, "min-sites"), StrictClients: rapid.Bool().Draw(t, "strict"),
		Deadline: rapid.SampledFrom([]job.Duration{0, job.Duration(10 * time.Minute)}).Draw(t, "deadline"),
	}
	if rapid.Bool().Draw(t, "mandatory") {
		spec.MandatorySites = []string{"b"}
	}
	// The jobs of earlier draws are over, or stay in the queue for ever.
	h.mu.Lock()
	h.sites = map[string]*siteState{}
	h.mu.Unlock()
	j, err := h.db.CreateJob(r.Context(), job.Job{ID: job.NewID(time.Now()), Name: "app", Spec: spec.WithDefaults()}, spec.Sites)
	if err != nil {
		t.Fatal(err)
	}
	begin := func() {
		h.sched = newScheduler(h)
		r.c = newControl(h, j.ID)
		r.c.runner = make(chan struct{}) // it was started
	}
	begin()
	read := func() job.Job {
		got, err := h.db.Job(r.Context(), j.ID)
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	step := func() (over bool, next time.Duration) {
		over, next, err := r.once()
		if err != nil && !refusedMove(err) {
			t.Fatalf("a step of a job that is %s: %v", read().State, err)
		}
		return over, max(next, time.Second)
	}
	parties := []string{job.HubParty, "a", "b"}
	seq := int64(0)
	report := func(party, kind string, attempt int, body any) {
		e, err := job.NewEvent(j.ID, party, kind, body, h.wall())
		if err != nil {
			t.Fatal(err)
		}
		seq++
		if err := h.record(r.Context(), attempt, runner.Entry{Seq: seq, Event: e}); err != nil && !refusedMove(err) {
			t.Fatal(err)
		}
	}
	for range rapid.IntRange(0, 40).Draw(t, "events") {
		party := rapid.SampledFrom(parties).Draw(t, "party")
		switch rapid.SampledFrom([]string{"step", "step", "step", "up", "up", "down", "state", "next", "next", "next", "round", "abort", "sleep", "restart"}).Draw(t, "what") {
		case "step":
			step()
		case "up":
			if party != job.HubParty {
				h.siteUp(party)
			}
		case "down":
			if _, up := h.away(party); up {
				h.siteDown(party)
			}
		case "state":
			report(party, job.KindPartyState, rapid.IntRange(0, 2).Draw(t, "attempt"), job.PartyStateChange{To: rapid.SampledFrom(job.PartyStates()).Draw(t, "to")})
		case "next": // likelier to get anywhere
			ps, err := h.db.Parties(r.Context(), j.ID)
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range ps {
				if next := p.State.Next(); p.Name == party && len(next) > 0 {
					c := job.PartyStateChange{To: rapid.SampledFrom(next).Draw(t, "next")}
					if c.To == job.PartyFailed && rapid.Bool().Draw(t, "told") {
						c.Cause = cause(problem.AppError, party)
					}
					report(party, job.KindPartyState, p.Attempt, c)
				}
			}
		case "round":
			report(job.HubParty, job.KindRound, 0, job.Round{Round: int(seq)})
		case "abort":
			if rapid.IntRange(0, 4).Draw(t, "rarely") == 0 {
				if err := h.stop(r.Context(), read(), cause(problem.AbortedByUser, "")); err != nil && problem.CodeOf(err) != problem.Usage {
					t.Fatal(err)
				}
			}
		case "sleep":
			time.Sleep(time.Duration(rapid.SampledFrom([]int{1, 5, 30, 300, 2000}).Draw(t, "seconds")) * time.Second)
		case "restart":
			begin()
		}
	}
	// Nothing happens any more, but that sites come for which it waits, or somebody gives it up.
	if s := read().State; s == job.Submitted || s == job.Queued {
		if rapid.Bool().Draw(t, "given up") {
			if err := h.stop(r.Context(), read(), cause(problem.AbortedByUser, "")); err != nil {
				t.Fatal(err)
			}
		} else {
			h.siteUp("a")
			h.siteUp("b")
		}
	}
	since := time.Now()
	for {
		over, next := step()
		if over {
			break
		}
		if time.Since(since) > quiet {
			ps, _ := h.db.Parties(r.Context(), j.ID) // for the message alone
			t.Fatalf("after %s without any event the job is %s (%s): %+v", quiet, read().State, read().Reason, ps)
		}
		time.Sleep(min(next, time.Minute))
	}
	end := read()
	if !end.State.Terminal() || (end.Cause == nil) != (end.State == job.Succeeded) || end.Ended.IsZero() {
		t.Fatalf("the job ended as %s at %v, cause %v", end.State, end.Ended, end.Cause)
	}
	if end.Cause != nil && (end.Cause.Code == "" || end.Cause.Msg == "") {
		t.Fatalf("the cause says nothing: %+v", end.Cause)
	}
	for _, p := range parties {
		report(p, job.KindPartyState, 0, job.PartyStateChange{To: job.PartyFailed, Cause: cause(problem.AppError, p)})
	}
	if over, _ := step(); !over || fmt.Sprint(read().State, read().Cause) != fmt.Sprint(end.State, end.Cause) {
		t.Fatalf("a job that had ended as %s is %s", end.State, read().State)
	}
}

// refusedMove tells whether the store refused a move, as it should.
func refusedMove(err error) bool {
	p, ok := errors.AsType[*problem.Error](err)
	return ok && p.Code == problem.Usage
}
