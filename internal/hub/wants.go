package hub

import (
	"context"
	"encoding/json"
	"log/slog"
	"slices"
	"sync"
	"time"

	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/store"
)

// wants is what each site should be running, as the stored jobs say. It is worked out once per change, for all sites, and only
// of jobs that changed; a site's stream is woken only when something of its own did. So an event costs what it concerns,
// however many sites are connected and however many jobs are queued.
type wants struct {
	db      store.Store
	killing func(job.ID) bool // whether the job's parties are to end at once
	log     *slog.Logger

	mu     sync.Mutex // guards the rest
	loaded bool       // all jobs were read: before, nothing is known, and nobody may be told to run nothing
	jobs   map[job.ID]*wantedJob
	sites  map[string]*wantedSite
}

// wantedJob is a job that runs, or ends.
type wantedJob struct {
	job     job.Job
	spec    string                      // as JSON
	parties map[string]*pb.DesiredParty // of sites, those that are not over; what is in it is never changed
}

// wantedSite is a site that runs something, or whose agent is there.
type wantedSite struct {
	parties map[job.ID]*pb.DesiredParty
	streams map[*wish]struct{}
}

// wish is an agent's stream.
type wish struct {
	of   *wants
	site string
	wake chan struct{} // holds a value when the site's wants are to be sent
}

const (
	// settle is how long what changes shortly after another change waits for it: a job of a thousand sites changes a thousand
	// times while it starts. Where looking takes long, most of the time is left for others.
	settlePause = 10 * time.Millisecond
	settleRatio = 4
	// resync is how often everything is read anew, whoever may have forgotten to tell of something.
	resync = time.Minute
)

func newWants(db store.Store, killing func(job.ID) bool, log *slog.Logger) *wants {
	return &wants{db: db, killing: killing, log: log, jobs: map[job.ID]*wantedJob{}, sites: map[string]*wantedSite{}}
}

// run follows the store until ctx is done. Changed wakes it when what killing tells may be another.
func (w *wants) run(ctx context.Context, changed *store.Fanout) {
	news := w.db.Gather()
	defer news.Close()
	kills, cancel := changed.Subscribe("")
	defer cancel()
	news.Put(nil, true)
	var failures int
	for next := time.Now(); ; {
		began := time.Now()
		ids, all := news.Take()
		all = all || began.After(next)
		err := w.refresh(ctx, ids, all)
		pause := max(settlePause, settleRatio*time.Since(began))
		if err != nil {
			if ctx.Err() != nil {
				return
			}
			news.Put(ids, all)
			failures++
			pause = min(time.Duration(failures)*100*time.Millisecond, 2*time.Second)
			if failures == 1 {
				w.log.Error("what sites should run cannot be read; they go on as they are", "err", err)
			}
		} else {
			failures = 0
			if all {
				next = time.Now().Add(resync)
			}
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return
		}
		if err != nil {
			continue
		}
		select {
		case <-news.Wake():
		case <-kills:
		case <-time.After(time.Until(next)):
		case <-ctx.Done():
			return
		}
	}
}

// refresh reads the given jobs, or all that run.
func (w *wants) refresh(ctx context.Context, ids []job.ID, all bool) error {
	if all {
		return w.refreshAll(ctx)
	}
	for _, id := range ids {
		if id == "" {
			continue // nothing about a job
		}
		j, err := w.db.Job(ctx, id)
		if problem.CodeOf(err) == problem.NotFound {
			w.forget(id)
			continue
		}
		if err != nil {
			return err
		}
		if !runs(j.State) {
			w.forget(id)
			continue
		}
		ps, err := w.db.Parties(ctx, id)
		if problem.CodeOf(err) == problem.NotFound {
			w.forget(id)
			continue
		}
		if err != nil {
			return err
		}
		w.set(j, ps)
	}
	w.again()
	return nil
}

// runs tells whether sites have to do with a job.
func runs(s job.State) bool { return s.Active() || s == job.Stopping }

func (w *wants) refreshAll(ctx context.Context) error {
	f := store.Filter{Limit: 500}
	for _, s := range job.States() {
		if runs(s) {
			f.States = append(f.States, s)
		}
	}
	there := map[job.ID]bool{}
	for {
		js, err := w.db.Jobs(ctx, f)
		if err != nil {
			return err
		}
		for _, j := range js {
			ps, err := w.db.Parties(ctx, j.ID)
			if problem.CodeOf(err) == problem.NotFound {
				continue
			}
			if err != nil {
				return err
			}
			there[j.ID] = true
			w.set(j, ps)
		}
		if len(js) < f.Limit {
			break
		}
		f.After = js[len(js)-1].ID
	}
	w.mu.Lock()
	var gone []job.ID
	for id := range w.jobs {
		if !there[id] {
			gone = append(gone, id)
		}
	}
	first := !w.loaded
	w.loaded = true
	w.mu.Unlock()
	for _, id := range gone {
		w.forget(id)
	}
	if first {
		w.mu.Lock()
		for name := range w.sites {
			w.wakeLocked(name)
		}
		w.mu.Unlock()
	}
	w.again()
	return nil
}

// again looks at jobs that are ending: whether they are to end at once does not stand in the store.
func (w *wants) again() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for id, wj := range w.jobs {
		if wj.job.State == job.Stopping {
			w.putLocked(id, wj, w.desires(wj))
		}
	}
}

// set takes in a job as it is.
func (w *wants) set(j job.Job, ps []job.Party) {
	w.mu.Lock()
	defer w.mu.Unlock()
	wj := w.jobs[j.ID]
	if wj == nil || wj.job.Spec.Engine != j.Spec.Engine { // the one setting that changes while a job runs
		spec, err := json.Marshal(j.Spec)
		if err != nil {
			w.log.Error("a job's settings cannot be sent", "job", j.ID, "err", err) // they came as JSON
			return
		}
		if wj == nil {
			wj = &wantedJob{}
			w.jobs[j.ID] = wj
		}
		wj.spec = string(spec)
	}
	wj.job = j
	of := make(map[string]job.Party, len(ps))
	for _, p := range ps {
		of[p.Name] = p
	}
	d := w.desires(wj)
	parties := make(map[string]*pb.DesiredParty, len(j.Spec.Sites))
	for i, name := range j.Spec.Sites {
		p, ok := of[name]
		if !ok || p.State.Terminal() || !p.Allocated {
			continue // what may be left of it is to be gone
		}
		parties[name] = &pb.DesiredParty{
			JobId: string(j.ID), Desired: d, BundleDigest: j.Bundle, Index: int32(i), Count: int32(len(j.Spec.Sites)), SpecJson: wj.spec, Attempt: int32(p.Attempt),
		}
	}
	w.replaceLocked(j.ID, wj, parties)
}

// desires is what is wanted of a job's parties.
func (w *wants) desires(wj *wantedJob) pb.Desired {
	switch {
	case wj.job.State != job.Stopping:
		return pb.Desired_DESIRED_UP
	case w.killing(wj.job.ID):
		return pb.Desired_DESIRED_KILL
	}
	return pb.Desired_DESIRED_STOP
}

// putLocked has all of a job's parties do d.
func (w *wants) putLocked(id job.ID, wj *wantedJob, d pb.Desired) {
	parties := make(map[string]*pb.DesiredParty, len(wj.parties))
	for name, p := range wj.parties {
		if p.GetDesired() == d {
			return // they are all alike
		}
		parties[name] = &pb.DesiredParty{
			JobId: p.GetJobId(), Desired: d, BundleDigest: p.GetBundleDigest(), Index: p.GetIndex(), Count: p.GetCount(), SpecJson: p.GetSpecJson(), Attempt: p.GetAttempt(),
		}
	}
	w.replaceLocked(id, wj, parties)
}

// replaceLocked makes parties those of a job, and wakes the sites of which they are other ones now.
func (w *wants) replaceLocked(id job.ID, wj *wantedJob, parties map[string]*pb.DesiredParty) {
	for name, p := range wj.parties {
		if parties[name] == nil {
			delete(w.siteLocked(name).parties, id)
			w.wakeLocked(name)
			w.tidyLocked(name)
		} else if q := parties[name]; p.GetDesired() == q.GetDesired() && p.GetAttempt() == q.GetAttempt() && p.GetSpecJson() == q.GetSpecJson() {
			parties[name] = p // the rest of it never changes
		}
	}
	for name, p := range parties {
		if wj.parties[name] != p {
			w.siteLocked(name).parties[id] = p
			w.wakeLocked(name)
		}
	}
	wj.parties = parties
}

func (w *wants) forget(id job.ID) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if wj := w.jobs[id]; wj != nil {
		w.replaceLocked(id, wj, nil)
		delete(w.jobs, id)
	}
}

func (w *wants) siteLocked(name string) *wantedSite {
	s := w.sites[name]
	if s == nil {
		s = &wantedSite{parties: map[job.ID]*pb.DesiredParty{}, streams: map[*wish]struct{}{}}
		w.sites[name] = s
	}
	return s
}

// tidyLocked forgets a site of which there is nothing to remember.
func (w *wants) tidyLocked(name string) {
	if s := w.sites[name]; s != nil && len(s.parties) == 0 && len(s.streams) == 0 {
		delete(w.sites, name)
	}
}

// wakeLocked has a site be told, once all is known: with a part of it, it would end the rest.
func (w *wants) wakeLocked(site string) {
	if !w.loaded {
		return
	}
	for t := range w.siteLocked(site).streams {
		t.wakeUp()
	}
}

func (t *wish) wakeUp() {
	select {
	case t.wake <- struct{}{}:
	default: // it has not sent the last ones yet
	}
}

// watch gives a stream that is woken when the site's wants are known, and whenever they change.
func (w *wants) watch(site string) *wish {
	t := &wish{of: w, site: site, wake: make(chan struct{}, 1)}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.siteLocked(site).streams[t] = struct{}{}
	if w.loaded {
		t.wakeUp()
	}
	return t
}

func (t *wish) close() {
	t.of.mu.Lock()
	defer t.of.mu.Unlock()
	delete(t.of.siteLocked(t.site).streams, t)
	t.of.tidyLocked(t.site)
}

// of gives what a site should be running, in the order of submission. A party that is not in it is to be gone.
func (w *wants) of(site string) []*pb.DesiredParty {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := w.sites[site]
	if s == nil {
		return nil
	}
	out := make([]*pb.DesiredParty, 0, len(s.parties))
	for _, p := range s.parties {
		out = append(out, p)
	}
	slices.SortFunc(out, func(a, b *pb.DesiredParty) int {
		switch {
		case a.GetJobId() < b.GetJobId():
			return -1
		case a.GetJobId() > b.GetJobId():
			return 1
		}
		return 0
	})
	return out
}

// killing tells whether a job is to end at once.
func (h *Hub) killing(id job.ID) bool {
	c := h.controller(id)
	return c != nil && c.killing()
}
