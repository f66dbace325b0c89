package hub

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/runner"
	"github.com/pergolafl/pergola/internal/store/sqlite"
)

// rig is a hub's control of one job with a real store and the bubble's clock; runners are imagined.
type rig struct {
	*testing.T
	h  *Hub
	c  *control
	wg sync.WaitGroup
}

func newRig(t *testing.T, s job.Spec) *rig {
	t.Helper()
	dir := t.TempDir()
	db, err := sqlite.Open(t.Context(), filepath.Join(dir, DatabaseFile))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	})
	h := &Hub{dir: dir, db: db, log: slog.New(slog.DiscardHandler), sites: map[string]*siteState{}, jobs: map[job.ID]*control{}}
	h.sched = newScheduler(h)
	h.wants = newWants(db, h.killing, h.log)
	h.conf.Sites = []string{"a", "b"}
	h.conf.SiteGrace = job.Duration(5 * time.Second)
	if len(s.Sites) > 0 {
		h.conf.Sites = s.Sites
	}
	s.Sites = h.conf.Sites
	now := time.Now()
	j, err := db.CreateJob(t.Context(), job.Job{ID: job.NewID(now), Name: "app", Spec: s.WithDefaults(), Created: now}, s.Sites)
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{T: t, h: h, c: newControl(h, j.ID)}
	r.c.runner = make(chan struct{}) // it was started
	return r
}

// desired is what a site should be running, as soon as the hub has looked at what changed.
func (r *rig) desired(site string) []*pb.DesiredParty {
	r.Helper()
	if err := r.h.wants.refresh(r.Context(), []job.ID{r.c.id}, false); err != nil {
		r.Fatal(err)
	}
	return r.h.wants.of(site)
}

// step lets the scheduler and, once the job is active, its controller look until nothing is left to do at this moment; it gives when
// they want to look again.
func (r *rig) step() time.Duration {
	r.Helper()
	for range 20 {
		before := r.job()
		over, next, err := r.once()
		if err != nil {
			r.Fatal(err)
		}
		if after := r.job(); over || after.State == before.State && after.Reason == before.Reason {
			return next
		}
	}
	r.Fatal("the controller finds no rest")
	return 0
}

// once lets both look once.
func (r *rig) once() (over bool, next time.Duration, err error) {
	r.h.sched.stale.Store(true)
	turn, err := r.h.sched.turn(r.Context())
	if err != nil || !r.job().State.Active() && !r.job().State.Terminal() {
		return false, turn, err
	}
	over, next, err = r.c.step(r.Context(), &r.wg)
	if turn > 0 {
		next = min(next, turn)
	}
	return over, next, err
}

func (r *rig) job() job.Job {
	r.Helper()
	j, err := r.h.db.Job(r.Context(), r.c.id)
	if err != nil {
		r.Fatal(err)
	}
	return j
}

// reason gives why the job waits, as those hear who ask.
func (r *rig) reason() string {
	r.Helper()
	out := &pb.Job{Id: string(r.c.id), State: string(r.job().State)}
	r.h.explain(out)
	return out.GetReason()
}

// is wants a state, and a cause "code of party", "" for none.
func (r *rig) is(s job.State, cause string) {
	r.Helper()
	j := r.job()
	got := ""
	if j.Cause != nil {
		got = fmt.Sprintf("%s of %s", j.Cause.Code, j.Cause.Party)
	}
	if j.State != s || got != cause {
		r.Errorf("the job is %s (%q), cause %q; want %s, %q", j.State, j.Reason, got, s, cause)
	}
	if j.Cause != nil && (j.Cause.Msg == "" || j.Cause.Next == "") {
		r.Errorf("the cause says too little: %+v", j.Cause)
	}
}

func (r *rig) party(name string, to job.PartyState, cause *job.Cause) {
	r.Helper()
	e, err := job.NewEvent(r.c.id, name, job.KindPartyState, job.PartyStateChange{To: to, Cause: cause}, r.h.wall())
	if err != nil {
		r.Fatal(err)
	}
	if err := r.h.record(r.Context(), 0, runner.Entry{Seq: 1, Event: e}); err != nil {
		r.Fatal(err)
	}
}

func (r *rig) event(seq int64, party, kind string, body any) {
	r.Helper()
	e, err := job.NewEvent(r.c.id, party, kind, body, r.h.wall())
	if err != nil {
		r.Fatal(err)
	}
	if err := r.h.record(r.Context(), 0, runner.Entry{Seq: seq, Event: e}); err != nil {
		r.Fatal(err)
	}
}

// wants tells what the hub's runner is told.
func (r *rig) wants(d pb.Desired, sites int) {
	r.Helper()
	if gotD, gotN := r.c.want.Get(); gotD != d || gotN != sites {
		r.Errorf("the hub's runner is told %s with %d sites, want %s with %d", gotD, gotN, d, sites)
	}
}

// prepared brings the job to preparing, with all agents connected.
func (r *rig) prepared() {
	r.Helper()
	r.h.siteUp("a")
	r.h.siteUp("b")
	r.step()
	r.is(job.Preparing, "")
	for _, p := range []string{job.HubParty, "a", "b"} {
		r.party(p, job.PartyPreparing, nil)
	}
}

// running brings it to running.
func (r *rig) running() {
	r.Helper()
	r.prepared()
	for _, p := range []string{job.HubParty, "a", "b"} {
		r.party(p, job.PartyReady, nil)
	}
	r.step()
	r.wants(pb.Desired_DESIRED_RUN, 2)
	r.party(job.HubParty, job.PartyRunning, nil)
	r.step()
	r.is(job.Running, "")
}

func appError() *job.Cause {
	return problem.New(problem.AppError, "look into the log", "the app raised")
}

func TestControl(t *testing.T) {
	minute := job.Duration(time.Minute)
	for _, c := range []struct {
		name string
		spec job.Spec
		do   func(r *rig)
	}{
		{"a job waits for its sites and says for which", job.Spec{}, func(r *rig) {
			r.step()
			r.is(job.Queued, "")
			if got := r.job().Reason; got != "place 1 of 1: waiting for a, b to connect" {
				r.Errorf("the reason is %q", got)
			}
			r.h.siteUp("b")
			if next := r.step(); next != tellPause {
				r.Errorf("the next look is in %s", next)
			}
			if got := r.reason(); got != "place 1 of 1: waiting for a to connect" {
				r.Errorf("the reason is %q", got)
			}
			r.toldOf("waiting for a to connect", 0)
			time.Sleep(tellPause)
			if next := r.step(); next != 0 {
				r.Errorf("the next look is in %s, and nothing is due", next)
			}
			r.toldOf("in the queue: place 1 of 1: waiting for a to connect", 1)
			r.h.siteUp("a")
			r.step()
			r.is(job.Preparing, "")
		}},
		{"a site that never connects ends the job at the wait-timeout", job.Spec{WaitTimeout: minute}, func(r *rig) {
			r.h.siteUp("a")
			time.Sleep(time.Minute - time.Second)
			if next := r.step(); next != time.Second {
				r.Errorf("the next look is in %s, want the second that is left", next)
			}
			r.is(job.Queued, "")
			time.Sleep(time.Second)
			r.step()
			r.is(job.Failed, "start-timeout of b")
		}},
		{"without wait-timeout it waits for ever", job.Spec{StartTimeout: minute}, func(r *rig) {
			r.h.siteUp("a")
			time.Sleep(1000 * time.Hour)
			r.step()
			r.is(job.Queued, "")
			r.h.siteUp("b")
			r.step()
			r.is(job.Preparing, "")
		}},
		{"with min-sites the start-timeout starts the job without the missing", job.Spec{StartTimeout: minute, MinSites: 1, JoinWait: job.NoLimit}, func(r *rig) {
			r.h.siteUp("a")
			r.step()
			r.is(job.Queued, "")
			time.Sleep(time.Minute)
			r.step()
			r.is(job.Preparing, "")
		}},
		{"nobody is told to run before all are ready", job.Spec{}, func(r *rig) {
			r.prepared()
			r.party(job.HubParty, job.PartyReady, nil)
			r.party("a", job.PartyReady, nil)
			r.step()
			r.wants(pb.Desired_DESIRED_UNSPECIFIED, 0)
			r.party("b", job.PartyReady, nil)
			r.step()
			r.wants(pb.Desired_DESIRED_RUN, 2)
			r.is(job.Preparing, "")
		}},
		{"a party that is not ready in time ends the job", job.Spec{StartTimeout: minute}, func(r *rig) {
			r.prepared()
			r.party(job.HubParty, job.PartyReady, nil)
			r.party("a", job.PartyReady, nil)
			time.Sleep(time.Minute)
			r.step()
			r.is(job.Stopping, "start-timeout of b")
		}},
		{"a build that goes on is not late", job.Spec{StartTimeout: minute}, func(r *rig) {
			r.prepared()
			for i := range int64(5) {
				time.Sleep(50 * time.Second)
				r.event(i+10, "a", job.KindEnvProgress, job.EnvProgress{Phase: "download"})
				r.step()
			}
			r.is(job.Preparing, "")
			time.Sleep(time.Minute)
			r.step()
			r.is(job.Stopping, "start-timeout of hub")
		}},
		{"with min-sites those that are ready run after the start-timeout", job.Spec{StartTimeout: minute, MinSites: 1, JoinWait: job.NoLimit}, func(r *rig) {
			r.prepared()
			r.party(job.HubParty, job.PartyReady, nil)
			r.party("b", job.PartyReady, nil)
			r.step()
			r.wants(pb.Desired_DESIRED_UNSPECIFIED, 0)
			time.Sleep(time.Minute)
			r.step()
			r.wants(pb.Desired_DESIRED_RUN, 1)
		}},
		{"the deadline counts from the start of the preparation", job.Spec{Deadline: minute}, func(r *rig) {
			time.Sleep(2 * time.Minute)
			r.running()
			time.Sleep(time.Minute - time.Millisecond)
			if next := r.step(); next != time.Millisecond {
				r.Errorf("the next look is in %s", next)
			}
			r.is(job.Running, "")
			time.Sleep(time.Millisecond)
			r.step()
			r.is(job.Stopping, "deadline of ")
		}},
		{"an agent that comes back within the grace costs nothing", job.Spec{}, func(r *rig) {
			r.running()
			r.h.siteDown("b")
			time.Sleep(4 * time.Second)
			r.step()
			r.is(job.Running, "")
			r.h.siteUp("b")
			time.Sleep(4 * time.Second)
			r.step()
			r.is(job.Running, "")
		}},
		{"an agent that stays away ends the job", job.Spec{}, func(r *rig) {
			r.running()
			r.h.siteDown("b")
			if next := r.step(); next != 5*time.Second {
				r.Errorf("the next look is in %s, want at the end of the grace", next)
			}
			time.Sleep(5 * time.Second)
			r.step()
			r.is(job.Stopping, "site-lost of b")
		}},
		{"with min-sites a lost site is no end, the second is", job.Spec{MinSites: 1}, func(r *rig) {
			r.running()
			r.party("a", job.PartyFailed, appError())
			r.step()
			r.is(job.Running, "")
			r.h.siteDown("b")
			time.Sleep(5 * time.Second)
			r.step()
			r.is(job.Stopping, "app-error of a")
		}},
		{"a site that fails names itself", job.Spec{}, func(r *rig) {
			r.prepared()
			r.party("b", job.PartyFailed, problem.New(problem.EnvBuildFailed, "see the log", "no wheel"))
			r.step()
			r.is(job.Stopping, "env-build-failed of b")
		}},
		{"the hub's failure comes before a site's", job.Spec{}, func(r *rig) {
			r.running()
			r.party("a", job.PartyFailed, problem.New(problem.ProgramFailed, "see the log", "the supernode ended"))
			r.party(job.HubParty, job.PartyFailed, appError())
			r.step()
			r.is(job.Stopping, "app-error of hub")
		}},
		{"a site that is done before the job is a failure", job.Spec{}, func(r *rig) {
			r.running()
			r.party("a", job.PartyDone, nil)
			r.step()
			r.is(job.Stopping, "program-failed of a")
		}},
		{"nothing moves for too long", job.Spec{NoProgress: minute}, func(r *rig) {
			r.running()
			for i := range int64(3) {
				time.Sleep(50 * time.Second)
				r.event(i+10, "a", job.KindProgress, job.Text{Message: "moves"})
				r.step()
			}
			r.is(job.Running, "")
			time.Sleep(50 * time.Second)
			r.event(20, "a", job.KindNote, job.Text{Message: "a note is no progress"})
			r.step()
			time.Sleep(10 * time.Second)
			r.step()
			r.is(job.Stopping, "no-progress of ")
		}},
		{"after a good run the sites leave first", job.Spec{}, func(r *rig) {
			r.running()
			r.event(10, job.HubParty, job.KindNote, job.Text{Message: "the run is finished"})
			r.step()
			r.is(job.Stopping, "")
			r.wants(pb.Desired_DESIRED_RUN, 2)
			r.party("a", job.PartyDone, nil)
			r.step()
			r.wants(pb.Desired_DESIRED_RUN, 2)
			r.party("b", job.PartyDone, nil)
			r.step()
			r.wants(pb.Desired_DESIRED_STOP, 0)
			r.is(job.Stopping, "")
			r.party(job.HubParty, job.PartyDone, nil)
			r.step()
			r.is(job.Succeeded, "")
		}},
		{"a site that does not leave holds nobody up for long", job.Spec{}, func(r *rig) {
			r.running()
			r.event(10, job.HubParty, job.KindNote, job.Text{Message: "the run is finished"})
			r.step()
			time.Sleep(leavePatience)
			r.step()
			r.wants(pb.Desired_DESIRED_STOP, 0)
			r.party(job.HubParty, job.PartyDone, nil)
			r.party("a", job.PartyDone, nil)
			time.Sleep(stopPatience - leavePatience)
			r.step()
			r.step()
			r.is(job.Succeeded, "")
		}},
		{"only the hub's word ends a run", job.Spec{}, func(r *rig) {
			r.running()
			r.event(10, "a", job.KindNote, job.Text{Message: "the run is finished"})
			r.step()
			r.is(job.Running, "")
		}},
		{"after a failure everybody stops at once, and in a minute all is over", job.Spec{}, func(r *rig) {
			r.running()
			r.party("a", job.PartyFailed, appError())
			r.step()
			r.wants(pb.Desired_DESIRED_STOP, 0)
			r.is(job.Stopping, "app-error of a")
			time.Sleep(stopPatience)
			r.step()
			r.step()
			r.is(job.Failed, "app-error of a")
			if stopPatience+r.h.conf.SiteGrace.Std() > time.Minute {
				r.Errorf("a lost site ends a job after %s", stopPatience+r.h.conf.SiteGrace.Std())
			}
		}},
		{"sites that are away are not waited for", job.Spec{}, func(r *rig) {
			r.running()
			r.h.siteDown("a")
			r.h.siteDown("b")
			time.Sleep(5 * time.Second)
			r.step()
			r.is(job.Stopping, "site-lost of a")
			r.party(job.HubParty, job.PartyDone, nil)
			r.step()
			r.step()
			r.is(job.Failed, "site-lost of a")
		}},
		{"an abort of a job that waits ends it at once", job.Spec{}, func(r *rig) {
			r.step()
			r.abort(r.job())
			r.is(job.Aborted, "aborted-by-user of ")
			r.step()
			if len(r.h.sched.queued) != 0 {
				r.Error("the job is in the queue")
			}
			if over, _, err := r.c.step(r.Context(), &r.wg); !over || err != nil {
				r.Errorf("the controller goes on: %v", err)
			}
		}},
		{"an abort of a job that runs stops it first", job.Spec{}, func(r *rig) {
			r.running()
			r.abort(r.job())
			r.is(job.Stopping, "aborted-by-user of ")
			r.step()
			r.wants(pb.Desired_DESIRED_STOP, 0)
			for _, p := range []string{job.HubParty, "a", "b"} {
				r.party(p, job.PartyDone, nil)
			}
			r.step()
			r.is(job.Aborted, "aborted-by-user of ")
		}},
		{"an abort is not lost when the job starts in the same moment", job.Spec{}, func(r *rig) {
			r.step()
			before := r.job() // as the caller has read it
			r.prepared()
			r.abort(before)
			r.is(job.Stopping, "aborted-by-user of ")
		}},
		{"the first cause stays", job.Spec{}, func(r *rig) {
			r.running()
			r.party("b", job.PartyFailed, appError())
			r.step()
			r.abort(r.job())
			r.party("a", job.PartyFailed, problem.New(problem.LinkLost, "x", "y"))
			r.step()
			r.is(job.Stopping, "app-error of b")
		}},
		{"where the native engine does not work before the run has begun, the job begins anew on the other", onNative(2), func(r *rig) {
			r.prepared()
			r.party("b", job.PartyFailed, unavailable())
			r.step() // decides
			r.step() // acts
			r.wants(pb.Desired_DESIRED_KILL, 0)
			r.engine(job.EngineFlower)
			r.party(job.HubParty, job.PartyFailed, problem.New(problem.ProgramFailed, "x", "it was ended"))
			r.step()
			r.is(job.Preparing, "")
			r.anew(1)
			r.holds("a", "b")
		}},
		{"that is decided though the run begins before it is ended", onNative(1), func(r *rig) {
			r.prepared()
			r.party(job.HubParty, job.PartyReady, nil)
			r.party("a", job.PartyReady, nil)
			r.party("b", job.PartyFailed, unavailable())
			r.step()
			r.step()
			r.party(job.HubParty, job.PartyRunning, nil)
			r.step()
			r.wants(pb.Desired_DESIRED_KILL, 0)
			r.party(job.HubParty, job.PartyFailed, problem.New(problem.ProgramFailed, "x", "it was ended"))
			r.step()
			r.anew(1)
		}},
		{"a site at which the native engine does not work ends no run: it is gone alone", onNative(1), func(r *rig) {
			r.running()
			r.party("b", job.PartyFailed, unavailable())
			r.step()
			r.step()
			r.is(job.Running, "")
			r.wants(pb.Desired_DESIRED_RUN, 2)
			r.engine(job.EngineNative)
			r.anew(0)
			r.told("the job goes on without b: not here")
			r.holds("a")
			time.Sleep(2 * returnPause)
			r.step()
			r.anew(0) // nor does it come back, as one does that was away
			r.party("a", job.PartyFailed, appError())
			r.step()
			r.is(job.Stopping, "app-error of a")
		}},
		{"and it is its own cause where the job cannot do without it", onNative(2), func(r *rig) {
			r.running()
			r.party("b", job.PartyFailed, unavailable())
			r.step()
			r.is(job.Stopping, "native-unavailable of b")
		}},
		{"a kill is not softened", job.Spec{}, func(r *rig) {
			r.running()
			r.abort(r.job())
			r.c.killNow()
			r.step()
			r.wants(pb.Desired_DESIRED_KILL, 0)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { c.do(newRig(t, c.spec)) })
		})
	}
}

// onNative is a job that somebody left the engine of open, which needs so many sites.
func onNative(need int) job.Spec {
	return job.Spec{Engine: job.EngineNative, EngineAuto: true, MinSites: need}
}

func unavailable() *job.Cause {
	return problem.New(problem.NativeUnavailable, "use --engine flower", "not here")
}

func (r *rig) engine(want string) {
	r.Helper()
	if got := r.job().Spec.Engine; got != want {
		r.Errorf("the engine is %s, want %s", got, want)
	}
}

// anew wants every party in that attempt.
func (r *rig) anew(attempt int) {
	r.Helper()
	ps, err := r.h.db.Parties(r.Context(), r.c.id)
	if err != nil {
		r.Fatal(err)
	}
	for _, p := range ps {
		if p.Attempt != attempt {
			r.Errorf("%s is in its attempt %d, want %d", p.Name, p.Attempt, attempt)
		}
	}
}

// told wants an event with that text.
func (r *rig) told(text string) {
	r.Helper()
	es, err := r.h.db.Events(r.Context(), r.c.id, 0, 1000)
	if err != nil {
		r.Fatal(err)
	}
	for _, e := range es {
		var m job.Text
		if (e.Kind == job.KindWarning || e.Kind == job.KindNote) && e.Decode(&m) == nil && m.Message == text {
			return
		}
	}
	r.Errorf("nobody is told %q", text)
}

// holds wants the scheduler to take the job to hold what it asks for at these sites.
func (r *rig) holds(sites ...string) {
	r.Helper()
	var got []string
	for _, h := range r.h.sched.view().active[r.c.id].Holds {
		got = append(got, h.Site)
	}
	if !slices.Equal(got, sites) {
		r.Errorf("the job holds %v, want %v", got, sites)
	}
}

func (r *rig) abort(j job.Job) {
	r.Helper()
	if err := r.h.stop(r.Context(), j, problem.New(problem.AbortedByUser, "submit it again", "somebody aborted the job")); err != nil {
		r.Fatal(err)
	}
}

// What a site should be running follows from the stored state.
func TestDesired(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, job.Spec{})
		want := func(site, what string) {
			t.Helper()
			ds := r.desired(site)
			var got []string
			for _, d := range ds {
				got = append(got, fmt.Sprintf("%s %d/%d", strings.TrimPrefix(d.GetDesired().String(), "DESIRED_"), d.GetIndex(), d.GetCount()))
			}
			if g := strings.Join(got, ","); g != what {
				t.Errorf("%s should run %q, want %q", site, g, what)
			}
		}
		r.step()
		want("a", "")
		r.running()
		want("a", "UP 0/2")
		want("b", "UP 1/2")
		want("c", "")
		r.abort(r.job())
		want("b", "STOP 1/2")
		r.h.jobs[r.c.id] = r.c
		r.c.killNow()
		want("b", "KILL 1/2")
		for _, p := range []string{job.HubParty, "a", "b"} {
			r.party(p, job.PartyDone, nil)
		}
		r.step()
		r.is(job.Aborted, "aborted-by-user of ")
		want("b", "")
	})
}

// The hub's loop acts by itself: woken by sites and by the store, and by the clock at deadlines.
func TestControlLoop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, job.Spec{WaitTimeout: job.Duration(time.Minute)})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			if err := r.h.control(ctx); err != nil {
				t.Error(err)
			}
		}()
		defer func() {
			cancel()
			<-done
		}()
		r.h.siteUp("a")
		time.Sleep(time.Minute - time.Second)
		synctest.Wait()
		r.is(job.Queued, "")
		time.Sleep(2 * time.Second)
		synctest.Wait()
		r.is(job.Failed, "start-timeout of b")
		if r.h.controller(r.c.id) != nil {
			t.Error("a job that never started has a controller")
		}
	})
}

// A job can be removed as soon as it is over, before its controller and its runner have seen that it is. Neither goes on for ever.
func TestControlOfARemovedJob(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, job.Spec{})
		if err := r.h.db.Move(t.Context(), r.c.id, job.Aborted, nil, "", time.Now()); err != nil {
			t.Fatal(err)
		}
		if err := r.h.db.DeleteJob(t.Context(), r.c.id); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour) // of the bubble's clock
		defer cancel()
		if over, _, err := r.c.step(ctx, &r.wg); !over || err != nil {
			t.Errorf("a look at it: over %v, %v", over, err)
		}
		e, err := job.NewEvent(r.c.id, job.HubParty, job.KindNote, job.Text{Message: "late"}, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		if err := r.c.record(ctx, 0, runner.Entry{Seq: 1, Event: e}); err != nil {
			t.Errorf("what its runner says: %v", err)
		}
		r.c.fail(ctx, 0, problem.New(problem.HubRunnerDied, "", "it died"))
		if ctx.Err() != nil {
			t.Error("the end of its runner was stored for an hour")
		}
		if !r.c.run(ctx) { // it cannot have the lease
			t.Error("its controller begins anew")
		}
		var wg sync.WaitGroup
		r.h.attend(ctx, &wg, r.c.id)
		wg.Wait()
		if ctx.Err() != nil || r.h.controller(r.c.id) != nil {
			t.Error("it is attended to for ever")
		}
	})
}
