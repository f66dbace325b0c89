package hub

import (
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/runner"
)

// says is what an attempt of a party says of its state.
func (r *rig) says(name string, attempt int, to job.PartyState, cause *job.Cause) {
	r.Helper()
	e, err := job.NewEvent(r.c.id, name, job.KindPartyState, job.PartyStateChange{To: to, Cause: cause}, time.Now())
	if err != nil {
		r.Fatal(err)
	}
	if err := r.h.record(r.Context(), attempt, runner.Entry{Seq: 1, Event: e}); err != nil {
		r.Fatal(err)
	}
}

// at wants a party's state and attempt.
func (r *rig) at(name string, s job.PartyState, attempt int) {
	r.Helper()
	ps, err := r.h.db.Parties(r.Context(), r.c.id)
	if err != nil {
		r.Fatal(err)
	}
	i := slices.IndexFunc(ps, func(p job.Party) bool { return p.Name == name })
	if ps[i].State != s || ps[i].Attempt != attempt {
		r.Errorf("%s is %s in attempt %d, want %s in %d", name, ps[i].State, ps[i].Attempt, s, attempt)
	}
}

// toldOf counts the notes and warnings that hold a text.
func (r *rig) toldOf(text string, want int) {
	r.Helper()
	es, err := r.h.db.Events(r.Context(), r.c.id, 0, 1000)
	if err != nil {
		r.Fatal(err)
	}
	n := 0
	for _, e := range es {
		var t job.Text
		if (e.Kind == job.KindNote || e.Kind == job.KindWarning) && e.Decode(&t) == nil && strings.Contains(t.Message, text) {
			n++
		}
	}
	if n != want {
		r.Errorf("people were told of %q %d times, want %d", text, n, want)
	}
}

// up makes all of the sites that are given ready, and runs the app with them.
func (r *rig) up(sites ...string) {
	r.Helper()
	for _, s := range sites {
		r.h.siteUp(s)
	}
	r.step()
	for _, s := range append([]string{job.HubParty}, sites...) {
		r.says(s, 0, job.PartyPreparing, nil)
		r.says(s, 0, job.PartyReady, nil)
	}
	r.step()
	r.wants(pb.Desired_DESIRED_RUN, len(sites))
	r.says(job.HubParty, 0, job.PartyRunning, nil)
	r.step()
	r.is(job.Running, "")
	time.Sleep(time.Second)
}

func cause(code problem.Code, party string) *job.Cause {
	c := problem.New(code, "do something", "something happened to %s", party)
	c.Party = party
	return c
}

// Sites that are late, go and come back.
func TestSites(t *testing.T) {
	three := []string{"a", "b", "c"}
	wait := job.Duration(20 * time.Second)
	for _, c := range []struct {
		name string
		spec job.Spec
		do   func(r *rig)
	}{
		{"the job starts when those that it needs are there and the others have had their time", job.Spec{Sites: three, MinSites: 2, JoinWait: wait}, func(r *rig) {
			r.h.siteUp("a")
			time.Sleep(time.Minute)
			r.step()
			r.is(job.Queued, "")
			r.h.siteUp("b")
			r.step()
			time.Sleep(wait.Std() - time.Second)
			if next := r.step(); next != time.Second {
				r.Errorf("the next look is in %s, want after join-wait", next)
			}
			r.h.siteDown("b") // too few again: the time begins anew
			r.step()
			r.h.siteUp("b")
			r.step()
			time.Sleep(wait.Std() - time.Second)
			r.step()
			r.is(job.Queued, "")
			time.Sleep(time.Second)
			r.step()
			r.is(job.Preparing, "")
		}},
		{"the app starts when those that it needs are ready and the others have had their time", job.Spec{Sites: three, MinSites: 2, JoinWait: wait}, func(r *rig) {
			for _, s := range three {
				r.h.siteUp(s)
			}
			r.step()
			r.is(job.Preparing, "")
			for _, s := range []string{job.HubParty, "a", "c"} {
				r.says(s, 0, job.PartyPreparing, nil)
				r.says(s, 0, job.PartyReady, nil)
			}
			r.step()
			r.wants(pb.Desired_DESIRED_UNSPECIFIED, 0)
			time.Sleep(wait.Std())
			r.step()
			r.wants(pb.Desired_DESIRED_RUN, 2)
			r.toldOf("starts without b", 1)
		}},
		{"a mandatory site is waited for", job.Spec{Sites: three, MinSites: 1, MandatorySites: []string{"b"}, JoinWait: wait, WaitTimeout: job.Duration(5 * time.Minute)}, func(r *rig) {
			r.h.siteUp("a")
			r.h.siteUp("c")
			time.Sleep(4 * time.Minute)
			r.step()
			r.is(job.Queued, "")
			time.Sleep(time.Minute)
			r.step()
			r.is(job.Failed, "start-timeout of b")
		}},
		{"a mandatory site that fails ends the job", job.Spec{Sites: three, MinSites: 1, MandatorySites: []string{"b"}}, func(r *rig) {
			r.up(three...)
			r.says("a", 0, job.PartyFailed, cause(problem.LinkLost, "a"))
			r.step()
			r.is(job.Running, "")
			r.says("b", 0, job.PartyFailed, cause(problem.LinkLost, "b"))
			r.step()
			r.is(job.Stopping, "link-lost of b")
		}},
		{"one that never comes costs nothing", job.Spec{Sites: three, MinSites: 2, JoinWait: wait}, func(r *rig) {
			late(r, wait.Std())
			time.Sleep(time.Hour / 2)
			r.event(50, "a", job.KindProgress, job.Text{Message: "moves"})
			r.step()
			r.is(job.Running, "")
			r.at("c", job.PartyAbsent, 0)
			r.toldOf("starts without c", 1)
		}},
		{"one that comes joins", job.Spec{Sites: three, MinSites: 2, JoinWait: wait}, func(r *rig) {
			late(r, wait.Std())
			time.Sleep(time.Hour / 2)
			r.h.siteUp("c")
			r.step()
			ds := r.desired("c")
			if len(ds) != 1 || ds[0].GetDesired() != pb.Desired_DESIRED_UP {
				r.Errorf("the late site is told %v", ds)
			}
			r.says("c", 0, job.PartyPreparing, nil)
			r.says("c", 0, job.PartyReady, nil)
			r.step()
			r.step()
			r.is(job.Running, "")
			r.toldOf("c has joined the running job", 1)
			r.toldOf("a has joined", 0)
		}},
		{"one that never came is none of those that are left", job.Spec{Sites: three, MinSites: 2, JoinWait: wait}, func(r *rig) {
			late(r, wait.Std())
			time.Sleep(time.Minute)
			r.says("a", 0, job.PartyFailed, appError())
			r.step()
			r.is(job.Stopping, "app-error of a")
		}},
		{"a site that was lost begins anew when its agent is there again", job.Spec{Sites: three, MinSites: 2}, func(r *rig) {
			r.up(three...)
			r.h.siteDown("b")
			time.Sleep(5 * time.Second)
			r.step()
			r.step()
			r.is(job.Running, "")
			r.at("b", job.PartyFailed, 0)
			r.toldOf("the job goes on without b: the agent of b went away", 1)
			if ds := r.desired("b"); len(ds) != 0 {
				r.Errorf("the lost site is told %v", ds)
			}
			time.Sleep(time.Minute)
			r.h.siteUp("b")
			r.step()
			r.at("b", job.PartyAbsent, 1)
			r.step()
			ds := r.desired("b")
			if len(ds) != 1 || ds[0].GetAttempt() != 1 {
				r.Errorf("the site that came back is told %v", ds)
			}
			// What the attempt before has to say comes too late.
			r.says("b", 0, job.PartyFailed, appError())
			r.at("b", job.PartyAbsent, 1)
			r.says("b", 1, job.PartyPreparing, nil)
			r.says("b", 1, job.PartyReady, nil)
			r.step()
			r.at("b", job.PartyReady, 1)
			r.toldOf("b has joined the running job", 1)
			r.is(job.Running, "")
		}},
		{"a site that dies again and again gets longer pauses", job.Spec{Sites: three, MinSites: 2}, func(r *rig) {
			r.up(three...)
			for i, pause := range []time.Duration{0, 10 * time.Second, 20 * time.Second, 40 * time.Second} {
				r.says("b", i, job.PartyFailed, cause(problem.SiteRunnerDied, "b"))
				if pause > 0 {
					time.Sleep(pause - time.Millisecond)
					if next := r.step(); next != time.Millisecond {
						r.Errorf("the next look is in %s", next)
					}
					r.at("b", job.PartyFailed, i)
					time.Sleep(time.Millisecond)
				}
				r.step()
				r.at("b", job.PartyAbsent, i+1)
				r.says("b", i+1, job.PartyPreparing, nil)
			}
		}},
		{"one whose own part failed does not begin anew", job.Spec{Sites: three, MinSites: 2}, func(r *rig) {
			r.up(three...)
			r.says("b", 0, job.PartyFailed, cause(problem.ProgramFailed, "b"))
			time.Sleep(time.Minute)
			r.step()
			r.at("b", job.PartyFailed, 0)
			r.is(job.Running, "")
			r.toldOf("goes on without b: something happened to b", 1)
			r.says("c", 0, job.PartyDone, nil) // a supernode that left by itself is one fewer
			r.step()
			r.is(job.Stopping, "program-failed of b")
		}},
		{"with strict-clients a failure ends the job", job.Spec{Sites: three, MinSites: 1, StrictClients: true}, func(r *rig) {
			r.up(three...)
			r.says("a", 0, job.PartyFailed, cause(problem.LinkLost, "a"))
			r.step()
			r.is(job.Running, "")
			r.says("b", 0, job.PartyFailed, cause(problem.ProgramFailed, "b"))
			r.step()
			r.is(job.Stopping, "program-failed of b")
		}},
		{"a program that cannot be started ends the job, as in the reference system", job.Spec{Sites: three, MinSites: 1}, func(r *rig) {
			for _, s := range three {
				r.h.siteUp(s)
			}
			r.step()
			r.says("b", 0, job.PartyPreparing, nil)
			r.says("b", 0, job.PartyFailed, cause(problem.ProgramFailed, "b"))
			r.step()
			r.is(job.Stopping, "program-failed of b")
		}},
		{"an environment that cannot be built costs one site", job.Spec{Sites: three, MinSites: 2}, func(r *rig) {
			for _, s := range three {
				r.h.siteUp(s)
			}
			r.step()
			r.says("b", 0, job.PartyPreparing, nil)
			r.says("b", 0, job.PartyFailed, cause(problem.EnvBuildFailed, "b"))
			r.step()
			r.is(job.Preparing, "")
		}},
		{"a hub that was started again waits for the agents before it gives them up", job.Spec{Sites: three}, func(r *rig) {
			r.up(three...)
			time.Sleep(time.Minute)
			r.h.sites = map[string]*siteState{}
			r.h.opened = time.Now()
			time.Sleep(4 * time.Second)
			r.step()
			r.is(job.Running, "")
			time.Sleep(time.Second)
			r.step()
			r.is(job.Stopping, "site-lost of a")
		}},
		{"without restarts the hub's runner takes the job with it", job.Spec{}, func(r *rig) {
			r.running()
			r.says(job.HubParty, 0, job.PartyFailed, cause(problem.HubRunnerDied, "hub"))
			r.step()
			r.is(job.Stopping, "hub-runner-died of hub")
		}},
		{"the hub's runner takes the job with it, whoever says first that all machines lost their power", job.Spec{}, func(r *rig) {
			r.running()
			gone := make(chan struct{})
			close(gone)
			r.c.hubGone = gone
			r.says("a", 0, job.PartyFailed, cause(problem.SiteRunnerDied, "a"))
			r.says("b", 0, job.PartyFailed, cause(problem.SiteRunnerDied, "b"))
			r.step()
			r.is(job.Running, "")
			r.says(job.HubParty, 0, job.PartyFailed, cause(problem.HubRunnerDied, "hub"))
			r.step()
			r.is(job.Failed, "hub-runner-died of hub")
		}},
		{"with restarts all parties begin anew, as often as allowed", job.Spec{Server: job.Server{Restarts: 1, Database: "db"}}, func(r *rig) {
			r.running()
			r.event(10, job.HubParty, job.KindNote, job.Text{Message: "the run is finished"})
			r.says(job.HubParty, 0, job.PartyFailed, cause(problem.HubRunnerDied, "hub"))
			r.step()
			r.is(job.Running, "")
			for _, p := range []string{job.HubParty, "a", "b"} {
				r.at(p, job.PartyAbsent, 1)
			}
			r.toldOf("attempt 2 of 2 begins", 1)
			r.wants(pb.Desired_DESIRED_UNSPECIFIED, 0)
			r.step()
			for _, p := range []string{job.HubParty, "a", "b"} {
				r.says(p, 0, job.PartyFailed, appError()) // too late
				r.says(p, 1, job.PartyPreparing, nil)
				r.says(p, 1, job.PartyReady, nil)
			}
			r.step()
			r.wants(pb.Desired_DESIRED_RUN, 2)
			r.says(job.HubParty, 1, job.PartyRunning, nil)
			r.step()
			r.is(job.Running, "") // what the attempt before said of the run's end does not count
			r.says(job.HubParty, 1, job.PartyFailed, cause(problem.HubRunnerDied, "hub"))
			r.step()
			r.is(job.Stopping, "hub-runner-died of hub")
		}},
		{"another failure of the hub's is no reason to begin anew", job.Spec{Server: job.Server{Restarts: 1, Database: "db"}}, func(r *rig) {
			r.running()
			r.says(job.HubParty, 0, job.PartyFailed, cause(problem.AppError, "hub"))
			r.step()
			r.is(job.Stopping, "app-error of hub")
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { c.do(newRig(t, c.spec)) })
		})
	}
}

// late brings the job of a, b and c to running while c is not there.
func late(r *rig, wait time.Duration) {
	r.Helper()
	r.h.siteUp("a")
	r.h.siteUp("b")
	r.step()
	time.Sleep(wait)
	r.step()
	r.is(job.Preparing, "")
	for _, s := range []string{job.HubParty, "a", "b"} {
		r.says(s, 0, job.PartyPreparing, nil)
		r.says(s, 0, job.PartyReady, nil)
	}
	r.step()
	time.Sleep(wait)
	r.step()
	r.wants(pb.Desired_DESIRED_RUN, 2)
	r.says(job.HubParty, 0, job.PartyRunning, nil)
	r.step()
	r.is(job.Running, "")
}

// A job's entries are stored once in each attempt, though every attempt counts from 1.
func TestEntriesOfAttempts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, job.Spec{})
		for _, attempt := range []int{0, 0, 1, 1, 0} {
			e, err := job.NewEvent(r.c.id, "a", job.KindNote, job.Text{Message: "x"}, time.Now())
			if err != nil {
				t.Fatal(err)
			}
			if err := r.h.record(t.Context(), attempt, runner.Entry{Seq: 3, Event: e}); err != nil {
				t.Fatal(err)
			}
		}
		r.toldOf("x", 2)
		e := job.Event{Job: r.c.id, Party: "a", Kind: job.KindNote}
		for _, bad := range []struct {
			attempt int
			seq     int64
		}{{-1, 1}, {0, -1}, {0, 1 << seqBits}, {1 << 30, 1}} {
			if err := r.h.record(t.Context(), bad.attempt, runner.Entry{Seq: bad.seq, Event: e}); problem.CodeOf(err) != problem.Usage {
				t.Errorf("entry %d of attempt %d was taken: %v", bad.seq, bad.attempt, err)
			}
		}
	})
}
