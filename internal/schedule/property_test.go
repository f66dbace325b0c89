package schedule

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/pergolafl/pergola/internal/job"
)

// world runs jobs as decisions have them run, for as long as each takes.
type world struct {
	in     Input
	takes  map[job.ID]time.Duration
	ends   map[job.ID]time.Time
	began  map[job.ID]time.Time
	ledger Ledger
	order  []job.ID // in which they began
}

func newWorld(sites ...*Site) *world {
	w := &world{
		in:    Input{Now: t0, Sites: map[string]*Site{}, Patience: 10 * time.Minute},
		takes: map[job.ID]time.Duration{}, ends: map[job.ID]time.Time{}, began: map[job.ID]time.Time{},
	}
	for _, s := range sites {
		w.in.Sites[s.Name] = s
	}
	return w
}

func (w *world) submit(j *Job, takes time.Duration) {
	j.Since = w.in.Now
	w.in.Queued = append(w.in.Queued, j)
	w.takes[j.ID] = takes
}

type fataler interface {
	Helper()
	Fatalf(string, ...any)
}

// step decides and does what was decided, and holds what has to be true of every decision.
func (w *world) step(t fataler) *Decision {
	t.Helper()
	w.in.Lately = w.ledger.Lately(w.in.Now)
	for _, a := range w.in.Active {
		w.in.Lately[a.Submitter] += Used(float64(len(a.Holds)), a.Started, w.in.Now)
	}
	d := Decide(w.in)
	free := func(without func(*Active) bool) map[string]job.Resources {
		out := map[string]job.Resources{}
		for n, s := range w.in.Sites {
			out[n] = job.Resources{"jobs": int64(s.MaxJobs)}
			for k, v := range s.Resources {
				out[n][k] = v
			}
		}
		for _, a := range w.in.Active {
			if without != nil && without(a) {
				continue
			}
			for _, r := range a.Holds {
				out[r.Site]["jobs"]--
				for k, v := range r.Ask {
					out[r.Site][k] -= v
				}
			}
		}
		return out
	}
	before := free(nil)
	waiting := slices.Clone(w.in.Queued)
	for _, s := range d.Start {
		i := slices.IndexFunc(w.in.Queued, func(j *Job) bool { return j.ID == s.ID })
		if i < 0 {
			t.Fatalf("job %s starts, and is not in the queue", s.ID)
		}
		j := w.in.Queued[i]
		w.in.Queued = slices.Delete(slices.Clone(w.in.Queued), i, i+1)
		if len(s.Sites) < j.Need {
			t.Fatalf("job %s needs %d sites and starts with %v", j.ID, j.Need, s.Sites)
		}
		for _, m := range j.Mandatory {
			if !slices.Contains(s.Sites, m) {
				t.Fatalf("job %s starts without %s", j.ID, m)
			}
		}
		a := &Active{ID: j.ID, Submitter: j.Submitter, Priority: j.Priority, Started: w.in.Now}
		for _, r := range j.Sites {
			if site := w.in.Sites[r.Site]; slices.Contains(s.Sites, r.Site) {
				if !site.Up || site.Drained || site.Removed {
					t.Fatalf("job %s starts at %+v", j.ID, site)
				}
				a.Holds = append(a.Holds, r)
			} else {
				a.Late = append(a.Late, r)
			}
		}
		w.in.Active = append(slices.Clone(w.in.Active), a)
		w.began[j.ID], w.ends[j.ID] = w.in.Now, w.in.Now.Add(w.takes[j.ID])
		w.order = append(w.order, j.ID)
	}
	for _, p := range d.Join {
		a := w.in.Active[slices.IndexFunc(w.in.Active, func(a *Active) bool { return a.ID == p.ID })]
		for _, s := range p.Sites {
			i := slices.IndexFunc(a.Late, func(r Request) bool { return r.Site == s })
			a.Holds = append(slices.Clone(a.Holds), a.Late[i])
			a.Late = slices.Delete(slices.Clone(a.Late), i, i+1)
		}
	}
	for n, left := range free(nil) {
		for k, v := range left {
			if s := w.in.Sites[n]; v < 0 && v < before[n][k] && (k != "jobs" || s.MaxJobs > 0) {
				t.Fatalf("%s of %s is given away %d times too often", k, n, -v)
			}
		}
	}
	// Each queued job starts, is over, or is told why not, in one place.
	told := map[job.ID]bool{}
	for i, x := range d.Waits {
		if told[x.ID] = true; x.Place != i+1 || !x.Joining && !x.HubFull && len(x.Lacks) == 0 {
			t.Fatalf("job %s waits in place %d (number %d), and for nothing: %+v", x.ID, x.Place, i+1, x)
		}
	}
	if len(d.Waits)+len(d.Expired)+len(d.Cannot)+len(d.Start) != len(waiting) || len(told) != len(d.Waits) {
		t.Fatalf("of %d jobs %d start, %d wait, %d are over", len(waiting), len(d.Start), len(d.Waits), len(d.Expired))
	}
	for _, x := range d.Expired {
		w.in.Queued = slices.DeleteFunc(slices.Clone(w.in.Queued), func(j *Job) bool { return j.ID == x.ID })
	}
	// Nobody of a lower priority got what a higher one that waits could have used.
	waits := map[job.ID]*Wait{}
	for _, x := range d.Waits {
		waits[x.ID] = x
	}
	started := map[job.ID]bool{}
	for _, s := range d.Start {
		started[s.ID] = true
	}
	levels := map[int]map[string]job.Resources{} // what is free, by priority, without what lower ones have got now
	for _, j := range w.in.Queued {
		left := levels[j.Priority]
		if left == nil {
			left = free(func(a *Active) bool { return started[a.ID] && a.Priority < j.Priority })
			levels[j.Priority] = left
		}
		x := waits[j.ID]
		if able(w.in.Sites, left, j) >= j.Need && !x.Joining && !x.HubFull && !slices.ContainsFunc(x.Lacks, func(l Lack) bool { return l.Kind == Held }) {
			t.Fatalf("job %s of priority %d (%+v) waits although it could start:\n%s", j.ID, j.Priority, *j.Shape, show(d))
		}
	}
	// What the hub keeps from decision to decision.
	for _, j := range w.in.Queued {
		i := slices.IndexFunc(d.Waits, func(x *Wait) bool { return x.ID == j.ID })
		switch {
		case i < 0 || !d.Waits[i].Joining:
			j.Enough = time.Time{}
		case j.Enough.IsZero():
			j.Enough = w.in.Now
		}
	}
	return d
}

// able is how many sites could take a job, with so much free; none if a mandatory one cannot.
func able(sites map[string]*Site, free map[string]job.Resources, j *Job) (n int) {
	for _, r := range j.Sites {
		s := sites[r.Site]
		ok := s.Up && !s.Drained && !s.Removed && (s.MaxJobs == 0 || free[r.Site]["jobs"] > 0) && (s.Known || len(r.Ask) == 0)
		for k, v := range r.Ask {
			ok = ok && free[r.Site][k] >= v
		}
		if ok {
			n++
		} else if slices.Contains(j.Mandatory, r.Site) {
			return -1
		}
	}
	return n
}

// pass lets time pass until the next thing happens; it tells whether anything will.
func (w *world) pass(d *Decision) bool {
	next := d.Next
	for id, e := range w.ends {
		if next.IsZero() || e.Before(next) {
			next = e
		}
		_ = id
	}
	if next.IsZero() {
		return false
	}
	w.advance(next)
	return true
}

func (w *world) advance(to time.Time) {
	w.in.Now = to
	w.in.Active = slices.DeleteFunc(slices.Clone(w.in.Active), func(a *Active) bool {
		if e := w.ends[a.ID]; e.After(to) {
			return false
		}
		w.ledger.Add(a.Submitter, float64(len(a.Holds)), a.Started, w.ends[a.ID])
		delete(w.ends, a.ID)
		return true
	})
}

var names = []string{"a", "b", "c"}

func anyJob(t *rapid.T, n int) *Job {
	j := &Job{ID: job.ID(fmt.Sprintf("%04d", n)), Submitter: rapid.SampledFrom([]string{"ann", "bob", "cid"}).Draw(t, "submitter"), Priority: rapid.IntRange(-1, 1).Draw(t, "priority"), Shape: &Shape{}}
	for _, s := range rapid.SliceOfNDistinct(rapid.SampledFrom(names), 1, 3, rapid.ID).Draw(t, "sites") {
		ask := job.Resources{}
		for _, k := range []string{job.CPUs, job.GPUs} {
			if v := rapid.IntRange(0, 5).Draw(t, k); v > 0 {
				ask[k] = int64(v)
			}
		}
		j.Sites = append(j.Sites, Request{s, ask})
	}
	j.Need = rapid.IntRange(1, len(j.Sites)).Draw(t, "need")
	if rapid.Bool().Draw(t, "mandatory") {
		j.Mandatory = []string{j.Sites[0].Site}
	}
	j.JoinWait = time.Duration(rapid.IntRange(0, 3).Draw(t, "join")) * time.Minute
	if rapid.IntRange(0, 5).Draw(t, "limited") == 0 {
		j.Limit = time.Duration(rapid.IntRange(1, 60).Draw(t, "limit")) * time.Minute
	}
	return j
}

func anySites(t *rapid.T) []*Site {
	var out []*Site
	for _, n := range names {
		out = append(out, &Site{Name: n, Up: true, Known: rapid.IntRange(0, 9).Draw(t, "known") > 0, Declared: job.Declared{
			Resources: job.Resources{job.CPUs: int64(rapid.IntRange(0, 5).Draw(t, "cpus")), job.GPUs: int64(rapid.IntRange(0, 5).Draw(t, "gpus"))},
			MaxJobs:   rapid.IntRange(0, 3).Draw(t, "max-jobs"),
		}})
	}
	return out
}

// Whatever is submitted, and whatever sites do: no decision gives away what is not there, starts less than a gang, or lets a lower
// priority take what a higher one could use; and when all is quiet, every job that could run on an empty system has begun.
func TestNothingIsStarvedOrGivenTwice(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld(anySites(t)...)
		w.in.MaxJobs = rapid.IntRange(0, 3).Draw(t, "hub")
		for n := range rapid.IntRange(1, 25).Draw(t, "events") {
			switch s := w.in.Sites[rapid.SampledFrom(names).Draw(t, "site")]; rapid.IntRange(0, 7).Draw(t, "what") {
			case 0:
				s.Up = !s.Up
			case 1:
				s.Drained = !s.Drained
			case 2:
				w.advance(w.in.Now.Add(time.Duration(rapid.IntRange(1, 3600).Draw(t, "seconds")) * time.Second))
			case 3:
				s.Known, s.Resources = true, job.Resources{job.CPUs: int64(rapid.IntRange(0, 5).Draw(t, "cpus"))}
			default:
				w.submit(anyJob(t, n), time.Duration(rapid.IntRange(1, 7200).Draw(t, "takes"))*time.Second)
			}
			w.step(t)
		}
		for _, s := range w.in.Sites {
			s.Up, s.Drained, s.Known = true, false, true
		}
		for n := 0; ; n++ {
			d := w.step(t)
			if len(d.Start) > 0 || len(d.Join) > 0 {
				continue
			}
			if n > 1000 {
				t.Fatalf("no end is in sight: %+v", d)
			}
			if !w.pass(d) {
				break
			}
		}
		empty := map[string]job.Resources{}
		for n, s := range w.in.Sites {
			empty[n] = job.Resources{"jobs": int64(s.MaxJobs), job.CPUs: s.Resources[job.CPUs], job.GPUs: s.Resources[job.GPUs]}
		}
		for _, j := range w.in.Queued {
			hopeful := j.JoinWait == 0 // it waits for sites that will never do
			if n := able(w.in.Sites, empty, j); n >= j.Need && (!hopeful || n == len(j.Sites)) {
				t.Fatalf("job %s could run and never did: %+v", j.ID, *j.Shape)
			}
		}
	})
}

// A gang of two busy sites gets its turn, however many small jobs come: after the patience nothing that it needs is given to later
// ones, so that it begins when those that had begun by then have ended.
func TestGangAmongSmallJobs(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld(site("a cpus=4"), site("b cpus=4"))
		longest := 0
		n := 0
		small := func() {
			n++
			takes := rapid.IntRange(60, 1200).Draw(t, "takes")
			longest = max(longest, takes)
			w.submit(queued(fmt.Sprintf("%05d ann %s cpus=%d", n, rapid.SampledFrom([]string{"a", "b"}).Draw(t, "site"), rapid.IntRange(1, 3).Draw(t, "cpus"))), time.Duration(takes)*time.Second)
		}
		for range 6 {
			small()
		}
		w.step(t)
		gang := queued("00000 ann a cpus=4 & b cpus=4")
		w.submit(gang, time.Hour)
		since := w.in.Now
		for w.began[gang.ID].IsZero() {
			for len(w.in.Queued) < 5 { // there is always something small to begin
				small()
			}
			w.step(t)
			if bound := w.in.Patience + time.Duration(longest+61)*time.Second; w.in.Now.Sub(since) > bound {
				t.Fatalf("the gang has waited %s; small jobs take %d s at most", w.in.Now.Sub(since), longest)
			}
			w.advance(w.in.Now.Add(time.Minute))
		}
	})
}

// Submitters who always have something queued get the same, whoever has more of it or submits first.
func TestFairness(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld(site("a max=1"))
		n := 0
		add := func(who string) {
			n++
			w.submit(queued(fmt.Sprintf("%05d %s a", n, who)), 10*time.Minute)
		}
		deep := rapid.IntRange(1, 40).Draw(t, "queued by ann at once")
		for range deep {
			add("ann")
		}
		got := map[string]int{}
		who := map[job.ID]string{}
		for range 30 {
			for _, s := range []string{"ann", "bob", "cid"} {
				if !slices.ContainsFunc(w.in.Queued, func(j *Job) bool { return j.Submitter == s }) {
					add(s)
				}
			}
			for _, j := range w.in.Queued {
				who[j.ID] = j.Submitter
			}
			for _, p := range w.step(t).Start {
				got[who[p.ID]]++
			}
			w.advance(w.in.Now.Add(10 * time.Minute))
		}
		for s, k := range got {
			if k < 9 || k > 11 {
				t.Fatalf("of 30 turns %s had %d: %v", s, k, got)
			}
		}
	})
}

// Two jobs that each need both of two sites, and others that need one: they never hold half each, and all get through.
func TestNoDeadlock(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld(site("a cpus=2"), site("b cpus=2"))
		for n := range rapid.IntRange(2, 12).Draw(t, "jobs") {
			text := rapid.SampledFrom([]string{"a cpus=2 & b cpus=2", "b cpus=2 & a cpus=2", "a cpus=1", "b cpus=2"}).Draw(t, "what")
			w.submit(queued(fmt.Sprintf("%04d %s %s", n, rapid.SampledFrom([]string{"ann", "bob"}).Draw(t, "who"), text)), time.Duration(rapid.IntRange(1, 60).Draw(t, "takes"))*time.Minute)
		}
		all := len(w.in.Queued)
		for {
			d := w.step(t)
			for _, a := range w.in.Active {
				if len(a.Late) > 0 {
					t.Fatalf("job %s has begun with half of what it needs", a.ID)
				}
			}
			if !w.pass(d) {
				break
			}
		}
		if len(w.order) != all {
			t.Fatalf("%d of %d jobs ran", len(w.order), all)
		}
	})
}
