package hub

import (
	"context"
	"encoding/json"
	"errors"
	goflag "flag" // flag is a function of this package
	"fmt"
	"log/slog"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pergolafl/pergola/internal/api"
	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/store"
	"github.com/pergolafl/pergola/internal/store/pgtest"
	"github.com/pergolafl/pergola/internal/store/postgres"
	"github.com/pergolafl/pergola/internal/store/sqlite"
)

// manyQueued is how many jobs TestManyQueued has; make soak gives it 10,000.
var manyQueued = goflag.Int("queued", 300, "how many jobs are in the queue in TestManyQueued")

// bench is a hub's scheduler over a store, with sites that are made up.
type bench struct {
	*testing.T
	db store.Store
	h  *Hub
}

// hub begins a hub on the store, as after a start.
func (b *bench) hub(id string) {
	b.h = &Hub{db: b.db, id: id, log: slog.New(slog.DiscardHandler), sites: map[string]*siteState{}, jobs: map[job.ID]*control{}}
	b.h.sched = newScheduler(b.h)
	for _, n := range []string{"a", "b"} {
		b.h.siteUp(n)
	}
}

// Over both kinds of store.
func TestScheduler(t *testing.T) {
	server := pgtest.Start(t)
	for name, test := range map[string]func(b *bench){"a queue, over new starts of the hub": theQueue, "one hub of several decides": oneHubDecides, "a hub takes over": dutyIsTakenOver} {
		t.Run(name, func(t *testing.T) {
			t.Run("sqlite", func(t *testing.T) {
				db, err := sqlite.Open(t.Context(), filepath.Join(t.TempDir(), DatabaseFile))
				if err != nil {
					t.Fatal(err)
				}
				defer db.Close()
				test(newBench(t, db))
			})
			t.Run("postgres", func(t *testing.T) {
				db, err := postgres.Open(t.Context(), server.Fresh(t))
				if err != nil {
					t.Fatal(err)
				}
				defer db.Close()
				test(newBench(t, db))
			})
		})
	}
}

// newBench has sites a and b with four CPUs each.
func newBench(t *testing.T, db store.Store) *bench {
	t.Helper()
	b := &bench{T: t, db: db}
	for _, n := range []string{"a", "b"} {
		b.declare(n, job.Declared{Resources: job.Resources{job.CPUs: 4}})
		if err := db.PutIdentity(t.Context(), store.Identity{Kind: "site", Name: n, Enrolled: time.Now()}); err != nil {
			t.Fatal(err)
		}
	}
	b.hub("me")
	return b
}

func (b *bench) declare(site string, d job.Declared) {
	b.Helper()
	info, err := json.Marshal(d)
	if err == nil {
		err = b.db.SawSite(b.Context(), site, info, "v1", time.Now())
	}
	if err != nil {
		b.Fatal(err)
	}
}

// submit makes a job that asks for CPUs at sites.
func (b *bench) submit(who string, cpus int64, sites ...string) job.ID {
	b.Helper()
	return b.submitAs(who, job.Spec{Sites: sites, Site: job.Site{Resources: job.Resources{job.CPUs: cpus}}})
}

func (b *bench) submitAs(who string, spec job.Spec) job.ID {
	b.Helper()
	now := time.Now()
	j, err := b.db.CreateJob(b.Context(), job.Job{ID: job.NewID(now), Name: "app", Submitter: who, Spec: spec.WithDefaults(), Created: now}, spec.Sites)
	if err != nil {
		b.Fatal(err)
	}
	return j.ID
}

// turn lets the scheduler look; err is what it gives back.
func (b *bench) turn() error {
	b.h.sched.stale.Store(true)
	_, err := b.h.sched.turn(b.Context())
	return err
}

func (b *bench) look() {
	b.Helper()
	if err := b.turn(); err != nil {
		b.Fatal(err)
	}
}

// is wants which jobs run, and which wait in which order.
func (b *bench) is(runs []job.ID, waits ...job.ID) {
	b.Helper()
	v := b.h.sched.view()
	var active, queued []job.ID
	for id := range v.active {
		active = append(active, id)
	}
	slices.Sort(active)
	for id := range v.waits {
		queued = append(queued, id)
	}
	slices.SortFunc(queued, func(x, y job.ID) int { return v.waits[x].Place - v.waits[y].Place })
	if !slices.Equal(active, runs) || !slices.Equal(queued, waits) {
		b.Errorf("there run %v and wait %v; want %v and %v", active, queued, runs, waits)
	}
	for _, id := range active {
		if j := b.job(id); !j.State.Active() {
			b.Errorf("job %s runs and is stored as %s", id, j.State)
		}
	}
}

func (b *bench) job(id job.ID) job.Job {
	b.Helper()
	j, err := b.db.Job(b.Context(), id)
	if err != nil {
		b.Fatal(err)
	}
	return j
}

// over ends a job that runs.
func (b *bench) over(id job.ID) {
	b.Helper()
	ps, err := b.db.Parties(b.Context(), id)
	if err == nil {
		err = b.db.Move(b.Context(), id, job.Stopping, problem.New(problem.AbortedByUser, "", "enough"), "", time.Now())
	}
	for _, p := range ps {
		if err == nil {
			err = b.db.MoveParty(b.Context(), id, p.Name, job.PartyDone, nil, "", time.Now())
		}
	}
	if err == nil {
		err = b.db.Move(b.Context(), id, job.Aborted, nil, "", time.Now())
	}
	if err != nil {
		b.Fatal(err)
	}
}

func (b *bench) reason(id job.ID) string {
	out := &pb.Job{Id: string(id), State: string(b.job(id).State)}
	b.h.explain(out)
	return out.GetReason()
}

// What starts when, what is told, and that a hub that is started again has the same queue.
func theQueue(b *bench) {
	first := b.submit("ann", 4, "a")
	b.look()
	b.is([]job.ID{first})
	second := b.submit("ann", 4, "a")
	gang := b.submit("bob", 2, "a", "b")
	b.look()
	b.is([]job.ID{first}, gang, second) // bob has used nothing
	if got, want := b.reason(gang), fmt.Sprintf("place 1 of 2: a has 0 of 4 cpus free, and 2 are asked for, in use by %s of ann", first); got != want {
		b.Errorf("the gang waits: %s\nwant %s", got, want)
	}
	if got := b.job(gang); got.State != job.Queued || !strings.Contains(got.Reason, "a has 0 of 4 cpus free") {
		b.Errorf("it is stored as %s: %q", got.State, got.Reason)
	}
	b.hub("me")
	b.look()
	b.is([]job.ID{first}, gang, second)
	b.over(first)
	b.look()
	b.is([]job.ID{gang}, second)
	used, jobs := b.h.inUse()
	if used["a"][job.CPUs] != 2 || used["b"][job.CPUs] != 2 || len(jobs["b"]) != 1 {
		b.Errorf("in use are %v by %v", used, jobs)
	}
	b.hub("me")
	b.look()
	b.is([]job.ID{gang}, second)

	// Draining, and what others change.
	if err := b.db.SetDrained(b.Context(), "a", true); err != nil {
		b.Fatal(err)
	}
	b.over(gang)
	b.look()
	b.is(nil, second)
	if got := b.reason(second); got != "place 1 of 1: a is drained" {
		b.Errorf("the second waits: %s", got)
	}
	if err := b.db.SetDrained(b.Context(), "a", false); err != nil {
		b.Fatal(err)
	}
	b.declare("a", job.Declared{Resources: job.Resources{job.CPUs: 3}})
	b.look()
	if got := b.reason(second); got != "can never start: a has 3 cpus, and 4 are asked for" {
		b.Errorf("the second waits: %s", got)
	}
	if err := b.h.feasible(b.Context(), b.job(second).Spec); problem.CodeOf(err) != problem.Usage {
		b.Errorf("submitted now it would be taken: %v", err)
	}
	if err := b.h.stop(b.Context(), b.job(second), problem.New(problem.AbortedByUser, "", "enough")); err != nil {
		b.Fatal(err)
	}
	b.look()
	b.is(nil)
}

// One hub of several decides. One that has lost that duty to another one starts nothing, also if it has not noticed.
func oneHubDecides(b *bench) {
	first := b.submit("ann", 4, "a")
	b.look()
	mine := b.h
	b.hub("other")
	other := b.h
	second := b.submit("ann", 1, "b")
	b.look() // the duty is mine for a while
	if got := b.job(second).State; got != job.Submitted {
		b.Errorf("the other hub has made the job %s", got)
	}
	if held, _, err := b.db.ClaimDuty(b.Context(), store.Scheduling, "other", time.Now().Add(2*leaseTime), time.Now().Add(leaseTime)); !held || err != nil {
		b.Fatalf("the duty of a hub that is gone: %v, %v", held, err)
	}
	b.h = mine
	if err := b.turn(); !errors.Is(err, errLost) {
		b.Errorf("who has lost the duty: %v", err)
	}
	if got := b.job(second).State; got == job.Preparing {
		b.Error("who has lost the duty starts a job")
	}
	b.h = other
	b.h.sched.dirty = true // as after its time
	b.look()
	b.is([]job.ID{first, second})
	b.h = mine // which sees what the other one does
	b.look()
	b.is([]job.ID{first, second})
}

// What another hub has given away while it had the duty is not given to a second job by the one that takes over.
func dutyIsTakenOver(b *bench) {
	past := time.Now().Add(-2 * leaseTime)
	if held, _, err := b.db.ClaimDuty(b.Context(), store.Scheduling, "other", past.Add(leaseTime), past); !held || err != nil {
		b.Fatal(held, err)
	}
	b.declare("b", job.Declared{Resources: job.Resources{job.CPUs: 3}})
	var late []job.ID // both run at a, and b may join one of them
	for priority := range 2 {
		id := b.submitAs("ann", job.Spec{Sites: []string{"a", "b"}, MinSites: 1, Priority: priority, Site: job.Site{Resources: job.Resources{job.CPUs: 2}}})
		err := b.db.Move(b.Context(), id, job.Queued, nil, "", past)
		if err == nil {
			err = b.db.Start(b.Context(), id, []string{"a"}, "other", past)
		}
		if err != nil {
			b.Fatal(err)
		}
		late = append(late, id)
	}
	if err := b.h.sched.load(b.Context()); err != nil {
		b.Fatal(err)
	}
	if err := b.db.Allocate(b.Context(), late[0], "b", "other"); err != nil {
		b.Fatal(err)
	}
	b.look()
	b.is(late)
	if used, by := b.h.inUse(); used["b"][job.CPUs] != 2 || !slices.Equal(by["b"], []string{string(late[0])}) {
		b.Errorf("of b is in use %v, by %v", used["b"], by["b"])
	}
}

// killed is a store whose hub is killed at the n-th of its writes: before it, or before its answer.
type killed struct {
	store.Store
	left   int
	before bool
}

var errKilled = errors.New("the hub was killed")

func (k *killed) write(fn func() error) error {
	k.left--
	switch {
	case k.left < 0, k.left == 0 && k.before:
		return errKilled
	case k.left == 0:
		return errors.Join(errKilled, fn())
	}
	return fn()
}

func (k *killed) Move(ctx context.Context, id job.ID, to job.State, cause *job.Cause, reason string, now time.Time) error {
	return k.write(func() error { return k.Store.Move(ctx, id, to, cause, reason, now) })
}

func (k *killed) Start(ctx context.Context, id job.ID, sites []string, owner string, now time.Time) error {
	return k.write(func() error { return k.Store.Start(ctx, id, sites, owner, now) })
}

func (k *killed) Allocate(ctx context.Context, id job.ID, site, owner string) error {
	return k.write(func() error { return k.Store.Allocate(ctx, id, site, owner) })
}

func (k *killed) Append(ctx context.Context, e job.Event, seq int64) (n int64, dup bool, err error) {
	err = k.write(func() error { n, dup, err = k.Store.Append(ctx, e, seq); return err })
	return n, dup, err
}

// Whenever the hub is killed, the next one goes on with the queue: no job is lost or started twice, and nothing is given to two.
func TestHubIsKilledWithAFullQueue(t *testing.T) {
	stored, err := sqlite.Open(t.Context(), filepath.Join(t.TempDir(), DatabaseFile))
	if err != nil {
		t.Fatal(err)
	}
	defer stored.Close()
	for n := 1; n < 16; n++ {
		for _, before := range []bool{true, false} {
			b := newBench(t, stored)
			late := b.submitAs("bob", job.Spec{Sites: []string{"a", "b"}, MinSites: 1, JoinWait: job.Duration(1), Site: job.Site{Resources: job.Resources{job.CPUs: 1}}})
			b.h.siteDown("b")
			b.look()
			time.Sleep(time.Millisecond) // its join-wait
			b.look()
			b.is([]job.ID{late})
			all := []job.ID{b.submit("ann", 3, "a"), b.submit("ann", 4, "a", "b"), b.submit("cid", 3, "b")}
			k := &killed{Store: stored, left: n, before: before}
			b.db = k
			b.hub("me")
			died := b.turn()
			if died != nil && !errors.Is(died, errKilled) {
				t.Fatal(died)
			}
			b.db = stored
			b.hub("me")
			for step := 0; step < 20; step++ {
				b.look()
				held := map[string]int64{}
				v := b.h.sched.view()
				for _, a := range v.active {
					for _, r := range a.Holds {
						held[r.Site] += r.Ask[job.CPUs]
					}
				}
				if held["a"] > 4 || held["b"] > 4 {
					t.Fatalf("killed at write %d (before it: %v), jobs have %v of 4", n, before, held)
				}
				if len(v.active) == 0 {
					break
				}
				for id := range v.active { // any of them
					b.over(id)
					break
				}
			}
			for i, id := range append(all, late) {
				es, err := stored.Events(t.Context(), id, 0, 1000)
				if err != nil {
					t.Fatal(err)
				}
				starts := 0
				for _, e := range es {
					var s job.JobState
					if e.Kind == job.KindJobState && e.Decode(&s) == nil && s.To == job.Preparing {
						starts++
					}
				}
				if starts != 1 || b.job(id).State != job.Aborted {
					t.Errorf("killed at write %d (before it: %v), job %d was started %d times and is %s", n, before, i, starts, b.job(id).State)
				}
			}
			if died == nil && before {
				return // the hub is through with all that it had to write
			}
		}
	}
	t.Error("the hub writes without end")
}

// reads counts how often jobs are read.
type reads struct {
	store.Store
	jobs int
}

func (r *reads) Job(ctx context.Context, id job.ID) (job.Job, error) {
	r.jobs++
	return r.Store.Job(ctx, id)
}

func (r *reads) Jobs(ctx context.Context, f store.Filter) ([]job.Job, error) {
	r.jobs++
	return r.Store.Jobs(ctx, f)
}

// Jobs that wait cost no goroutine, and no event has all of them read again.
func TestManyQueued(t *testing.T) {
	stored, err := sqlite.Open(t.Context(), filepath.Join(t.TempDir(), DatabaseFile))
	if err != nil {
		t.Fatal(err)
	}
	defer stored.Close()
	counting := &reads{Store: stored}
	b := newBench(t, counting)
	first := b.submit("ann", 4, "a")
	b.look()
	for i := range *manyQueued {
		b.submit(fmt.Sprint("u", i%7), 4, "a")
	}
	b.look()
	if n := len(b.h.sched.view().waits); n != *manyQueued {
		t.Fatalf("%d jobs wait", n)
	}

	// A whole hub on it, with its controllers.
	counting.jobs = 0
	began := time.Now()
	b.hub("me")
	b.h.dir = t.TempDir()
	before := runtime.NumGoroutine()
	b.look()
	t.Logf("%d queued jobs are loaded and decided on in %s, with %d reads", *manyQueued, time.Since(began).Round(time.Millisecond), counting.jobs)
	if n := runtime.NumGoroutine() - before; n > 20 { // the hub has some of its own
		t.Errorf("%d goroutines more for %d queued jobs", n, *manyQueued)
	}
	if most := *manyQueued/500 + 3; counting.jobs > most {
		t.Errorf("%d reads of jobs at the start, %d are plenty", counting.jobs, most)
	}
	counting.jobs = 0
	for range 50 {
		if _, _, err := stored.Append(t.Context(), job.Event{Job: first, Kind: job.KindProgress}, 0); err != nil {
			t.Fatal(err)
		}
		b.look()
	}
	if counting.jobs > 0 {
		t.Errorf("after events that change nothing in the queue, jobs were read %d times", counting.jobs)
	}
	b.over(first)
	began = time.Now()
	b.look()
	t.Logf("one ends, and the next starts, in %s", time.Since(began).Round(time.Microsecond))
	if v := b.h.sched.view(); len(v.active) != 1 || len(v.waits) != *manyQueued-1 || counting.jobs > 20 {
		t.Errorf("one job ended: %d run, %d wait, jobs were read %d times", len(v.active), len(v.waits), counting.jobs)
	}
}

// A job that another hub sees to is left alone until that hub's lease is over.
func TestAnotherHubsJob(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, job.Spec{})
		r.prepared()
		now := time.Now()
		if held, err := r.h.db.Claim(t.Context(), r.c.id, "another", now.Add(leaseTime), now); !held || err != nil {
			t.Fatal(held, err)
		}
		r.party(job.HubParty, job.PartyFailed, appError())
		r.h.sched = newScheduler(r.h) // this hub has just been started
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			if err := r.h.control(ctx); err != nil {
				t.Error(err)
			}
		}()
		time.Sleep(leaseTime - time.Second)
		synctest.Wait()
		r.is(job.Preparing, "")
		time.Sleep(renewal + 2*time.Second)
		synctest.Wait()
		r.is(job.Stopping, "app-error of hub")
		cancel()
		<-done
	})
}

// What agents declare is shown and counts; draining is for users; what can never be is refused.
func TestSitesDeclareAndDrain(t *testing.T) {
	s := serve(t)
	u := s.as(user)
	digest := s.upload(u)
	submit := func(spec string) (*pb.Job, error) {
		res, err := u.Jobs.SubmitJob(t.Context(), &pb.SubmitJobRequest{Name: "app", BundleDigest: digest, SpecJson: spec})
		return res.GetJob(), err
	}
	if _, err := submit(`{"sites":["a"],"site":{"resources":{"cpus":100}}}`); err != nil {
		t.Errorf("what a site has is not known yet: %v", err)
	}
	if _, err := submit(`{"sites":["a"],"site":{"resources":{"cpus":-1}}}`); problem.CodeOf(err) != problem.Usage {
		t.Errorf("a negative number: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	watch, err := s.as(siteA).Sites.WatchDesired(ctx, &pb.WatchDesiredRequest{
		Protocol: api.Protocol, AgentVersion: "v7", Offer: &pb.SiteOffer{Resources: map[string]int64{"cpus": 8, "memory": 1 << 30}, MaxJobs: 2},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer watch.Close()
	if _, err := watch.Receive(); err != nil {
		t.Fatal(err)
	}
	list := func() map[string]*pb.Site {
		t.Helper()
		res, err := u.Jobs.ListSites(t.Context(), &pb.ListSitesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		out := map[string]*pb.Site{}
		for _, x := range res.GetSites() {
			out[x.GetName()] = x
		}
		return out
	}
	if a := list()["a"]; !a.GetConnected() || a.GetVersion() != "v7" || a.GetOffer().GetResources()["cpus"] != 8 || a.GetOffer().GetMaxJobs() != 2 || a.GetSince() == nil || a.GetDrained() {
		t.Errorf("site a: %v", a)
	}
	if b := list()["b"]; b.GetConnected() || b.GetOffer() != nil || b.GetSince() != nil {
		t.Errorf("site b: %v", b)
	}
	if _, err := submit(`{"sites":["a"],"site":{"resources":{"cpus":100}}}`); problem.CodeOf(err) != problem.Usage || !strings.Contains(err.Error(), "can never start: a has 8 cpus, and 100 are asked for") {
		t.Errorf("what can never be: %v", err)
	}
	if _, err := submit(`{"sites":["a","b"],"min-sites":1,"site":{"resources":{"cpus":100}}}`); err != nil {
		t.Errorf("another site may have it: %v", err)
	}
	res, err := u.Jobs.DrainSite(t.Context(), &pb.DrainSiteRequest{Name: "a", Drained: true})
	if err != nil || !res.GetSite().GetDrained() {
		t.Fatalf("%v, %v", res, err)
	}
	j, err := submit(`{"sites":["a"]}`)
	if err != nil {
		t.Fatal(err)
	}
	events, err := u.Jobs.WatchJob(ctx, &pb.WatchJobRequest{Id: j.GetId()})
	if err != nil {
		t.Fatal(err)
	}
	defer events.Close()
	for !strings.Contains(fmt.Sprint(j.GetReason()), "a is drained") { // each event is one more look
		if _, err := events.Receive(); err != nil {
			t.Fatalf("%v: the job waits for %q", err, j.GetReason())
		}
		got, err := u.Jobs.GetJob(t.Context(), &pb.GetJobRequest{Id: j.GetId()})
		if err != nil {
			t.Fatal(err)
		}
		j = got.GetJob()
	}
	if _, err := u.Jobs.DrainSite(t.Context(), &pb.DrainSiteRequest{Name: "nobody"}); problem.CodeOf(err) != problem.NotFound {
		t.Errorf("an unknown site: %v", err)
	}
	if w, err := s.as(siteB).Sites.WatchDesired(t.Context(), &pb.WatchDesiredRequest{Protocol: api.Protocol, Offer: &pb.SiteOffer{Resources: map[string]int64{"CPUS": 1}}}); first(w, err) == nil {
		t.Error("a declaration that cannot be is taken")
	}
}
