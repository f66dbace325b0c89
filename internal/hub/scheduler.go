package hub

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/schedule"
	"github.com/pergolafl/pergola/internal/store"
)

const (
	// holdAfter is for how long later jobs may take what one before them needs and cannot use yet.
	holdAfter = 10 * time.Minute

	// lookBack is for how long what a submitter has used is looked up when the hub starts; after it, it counts next to nothing.
	lookBack = 6 * schedule.HalfLife
	// maxLookBack bounds how many jobs are read for that, the newest first.
	maxLookBack = 10_000

	// identityAge is how old what is known of drained and removed sites may be when something happens. What this hub does itself
	// is known at once; it is for what other processes do.
	identityAge = 2 * time.Second

	// tellPlaces is how far back in the queue jobs are told by an event when they wait for something else; all are told when asked.
	tellPlaces = 50
	// tellPause is the least time between two such events of a job.
	tellPause = 10 * time.Second
)

// scheduler says which queued job starts when. It has in memory what it needs of jobs that are not over, as read once and kept up
// by what the store says has changed; each decision is written down, in one transaction a job, before anything acts upon it. One
// goroutine calls turn.
type scheduler struct {
	hub   *Hub
	duty  lease
	begin func(job.ID) // sees to an active job; nil: nobody does

	loaded bool
	cursor int64 // the last event whose change is known
	queued map[job.ID]*waiting
	active map[job.ID]*running
	shapes map[[sha256.Size]byte]*schedule.Shape
	ledger schedule.Ledger

	sites     map[string]*schedule.Site
	sitesRead time.Time
	dirty     bool      // something has changed since the last decision
	next      time.Time // when to decide anew, whatever happens; zero: never

	stale atomic.Bool // the sites are to be looked at again

	mu      sync.Mutex // guards the rest
	seen    view
	touched map[job.ID]bool // what may have changed without an event
}

// waiting is a job that has not started.
type waiting struct {
	schedule.Job
	queued bool      // it is in that state already
	told   string    // schedule.Wait.Key of what people were told last
	at     time.Time // when they were told by an event
	known  bool      // that told is so
}

// running is a job that prepares, runs or ends.
type running struct {
	*schedule.Active
	share float64 // of all sites together, also of those that have left
}

// view is what the last decision was, for those who ask. What it points to does not change.
type view struct {
	waits  map[job.ID]*schedule.Wait
	active map[job.ID]*schedule.Active
	who    map[job.ID]string // submitters
}

func newScheduler(h *Hub) *scheduler {
	return &scheduler{
		hub: h, duty: lease{db: h.db, duty: store.Scheduling, owner: h.id}, touched: map[job.ID]bool{},
		queued: map[job.ID]*waiting{}, active: map[job.ID]*running{}, shapes: map[[sha256.Size]byte]*schedule.Shape{},
	}
}

// touch has a job looked at again, of which no event may tell.
func (s *scheduler) touch(id job.ID) {
	s.mu.Lock()
	s.touched[id] = true
	s.mu.Unlock()
	s.hub.changed.Wake("")
}

// load reads all jobs that are not over, and what their submitters have used lately.
func (s *scheduler) load(ctx context.Context) error {
	_, upTo, err := s.hub.db.Changes(ctx, -1)
	if err != nil {
		return err
	}
	if err := s.readSites(ctx); err != nil {
		return err
	}
	js, err := s.hub.unfinished(ctx)
	if err != nil {
		return err
	}
	since := s.hub.wall().Add(-lookBack)
	f := store.Filter{Ended: since, Newest: true, Limit: 500}
	var ended []job.Job
	for len(ended) < maxLookBack {
		page, err := s.hub.db.Jobs(ctx, f)
		if err != nil {
			return err
		}
		ended = append(ended, page...)
		if len(page) < f.Limit {
			break
		}
		f.After = page[len(page)-1].ID
	}
	var ids []job.ID
	for _, j := range slices.Concat(js, ended) {
		if j.State.Active() || !j.Started.IsZero() {
			ids = append(ids, j.ID)
		}
	}
	ps, err := s.hub.db.PartiesOf(ctx, ids)
	if err != nil {
		return err
	}
	s.ledger = schedule.Ledger{}
	slices.SortFunc(ended, func(a, b job.Job) int { return a.Ended.Compare(b.Ended) })
	for _, j := range ended {
		if !j.Started.IsZero() {
			s.ledger.Add(j.Submitter, s.share(j, ps[j.ID]), latest(j.Started, since), j.Ended)
		}
	}
	s.queued, s.active = map[job.ID]*waiting{}, map[job.ID]*running{}
	for _, j := range js {
		s.take(j, ps[j.ID])
	}
	s.cursor, s.loaded, s.dirty = upTo, true, true
	return nil
}

// refresh looks at a job of which something has changed.
func (s *scheduler) refresh(ctx context.Context, id job.ID) error {
	j, err := s.hub.db.Job(ctx, id)
	if problem.CodeOf(err) == problem.NotFound {
		s.drop(id)
		return nil
	}
	if err != nil {
		return err
	}
	var ps []job.Party
	if j.State.Active() {
		if ps, err = s.hub.db.Parties(ctx, id); err != nil {
			return err
		}
	}
	s.take(j, ps)
	return nil
}

func (s *scheduler) drop(id job.ID) {
	if s.queued[id] != nil || s.active[id] != nil {
		s.dirty = true
	}
	delete(s.queued, id)
	delete(s.active, id)
}

// take notes what a job is now.
func (s *scheduler) take(j job.Job, ps []job.Party) {
	switch {
	case j.State.Terminal():
		if r := s.active[j.ID]; r != nil {
			s.ledger.Add(j.Submitter, r.share, j.Started, j.Ended)
		}
		s.drop(j.ID)
	case j.State.Active():
		a := s.activeOf(j, ps)
		old := s.active[j.ID]
		if old == nil || !sameSites(old.Holds, a.Holds) || !sameSites(old.Late, a.Late) {
			s.dirty = true
		}
		delete(s.queued, j.ID)
		s.active[j.ID] = &running{a, s.share(j, ps)}
		if old == nil && s.begin != nil {
			s.begin(j.ID)
		}
	case s.queued[j.ID] == nil:
		s.dirty = true
		wait := j.Spec.JoinWait.Or(job.DefaultJoinWait)
		if wait == job.NoLimit {
			wait = j.Spec.StartTimeout
		}
		s.queued[j.ID] = &waiting{
			Job: schedule.Job{
				ID: j.ID, Submitter: j.Submitter, Priority: j.Spec.Priority, Since: s.hub.since(j.Created), Shape: s.shape(j.Spec),
				JoinWait: wait.Std(), Limit: j.Spec.WaitTimeout.Std(),
			},
			queued: j.State == job.Queued,
		}
	default:
		s.queued[j.ID].queued = j.State == job.Queued
	}
}

func sameSites(a, b []schedule.Request) bool {
	return slices.EqualFunc(a, b, func(x, y schedule.Request) bool { return x.Site == y.Site })
}

func (s *scheduler) activeOf(j job.Job, ps []job.Party) *schedule.Active {
	a := &schedule.Active{ID: j.ID, Submitter: j.Submitter, Priority: j.Spec.Priority, Started: j.Started}
	shape := s.shape(j.Spec)
	for i, p := range ps {
		if p.Name == job.HubParty {
			continue
		}
		r := schedule.Request{Site: p.Name}
		if at := i - 1; at < len(shape.Sites) && shape.Sites[at].Site == p.Name {
			r = shape.Sites[at]
		} else {
			r.Ask = j.Spec.ResourcesFor(p.Name)
		}
		switch {
		case j.Holds(p):
			a.Holds = append(a.Holds, r)
		case p.State == job.PartyAbsent && j.State != job.Stopping:
			a.Late = append(a.Late, r)
		}
	}
	return a
}

// share is what a job's sites count together, of those that it was given.
func (s *scheduler) share(j job.Job, ps []job.Party) (sum float64) {
	for _, p := range ps {
		if !p.Allocated {
			continue
		}
		var d job.Declared
		if site := s.sites[p.Name]; site != nil {
			d = site.Declared
		}
		sum += schedule.Share(d, j.Spec.ResourcesFor(p.Name))
	}
	return sum
}

// shape gives the shape that a job shares with all that ask for the same.
func (s *scheduler) shape(spec job.Spec) *schedule.Shape {
	out := shapeOf(spec)
	b, err := json.Marshal(out)
	if err != nil {
		return out // numbers and names: it can
	}
	key := sha256.Sum256(b)
	if have := s.shapes[key]; have != nil {
		return have
	}
	if len(s.shapes) > 2*(len(s.queued)+len(s.active))+100 { // those of jobs that are over
		used := map[*schedule.Shape]bool{}
		for _, w := range s.queued {
			used[w.Shape] = true
		}
		maps.DeleteFunc(s.shapes, func(_ [sha256.Size]byte, x *schedule.Shape) bool { return !used[x] })
	}
	s.shapes[key] = out
	return out
}

func shapeOf(spec job.Spec) *schedule.Shape {
	out := &schedule.Shape{Need: spec.Need(len(spec.Sites)), Mandatory: spec.MandatorySites}
	for _, n := range spec.Sites {
		out.Sites = append(out.Sites, schedule.Request{Site: n, Ask: spec.ResourcesFor(n)})
	}
	return out
}

// readSites looks at what the store and this hub know of the sites.
func (s *scheduler) readSites(ctx context.Context) error {
	now := time.Now()
	sites, err := s.hub.knownSites(ctx)
	if err != nil {
		return err
	}
	for n, x := range sites {
		_, x.Up = s.hub.away(n)
	}
	same := func(a, b *schedule.Site) bool {
		return a.Up == b.Up && a.Drained == b.Drained && a.Removed == b.Removed && a.Known == b.Known && a.MaxJobs == b.MaxJobs && maps.Equal(a.Resources, b.Resources)
	}
	if !maps.EqualFunc(s.sites, sites, same) {
		s.dirty = true
	}
	s.sites, s.sitesRead = sites, now
	return nil
}

// knownSites gives what the store knows of sites; whether they are connected is left out.
func (h *Hub) knownSites(ctx context.Context) (map[string]*schedule.Site, error) {
	ids, err := h.db.Identities(ctx, string(pki.KindSite))
	if err != nil {
		return nil, err
	}
	return h.scheduled(h.conf.Sites, ids), nil
}

// fewSites is up to how many sites are read one by one and not all at once.
const fewSites = 32

// knownOf is knownSites for those named, and perhaps others.
func (h *Hub) knownOf(ctx context.Context, names []string) (map[string]*schedule.Site, error) {
	if len(names) > fewSites {
		return h.knownSites(ctx)
	}
	var conf []string
	var ids []store.Identity
	for _, n := range names {
		if slices.Contains(h.conf.Sites, n) {
			conf = append(conf, n)
		}
		i, err := h.db.Identity(ctx, string(pki.KindSite), n)
		if problem.CodeOf(err) == problem.NotFound {
			continue
		}
		if err != nil {
			return nil, err
		}
		ids = append(ids, i)
	}
	return h.scheduled(conf, ids), nil
}

// scheduled gives the scheduler's form of sites of hub.toml and of the store.
func (h *Hub) scheduled(conf []string, ids []store.Identity) map[string]*schedule.Site {
	out := map[string]*schedule.Site{}
	for _, n := range conf {
		out[n] = &schedule.Site{Name: n}
	}
	for _, i := range ids {
		x := &schedule.Site{Name: i.Name, Drained: i.Drained}
		x.Removed = !i.Removed.IsZero() || i.Enrolled.IsZero() && !slices.Contains(h.conf.Sites, i.Name)
		if len(i.Info) > 0 {
			if err := json.Unmarshal(i.Info, &x.Declared); err != nil {
				h.log.Error("what a site has declared cannot be read", "site", i.Name, "err", err)
			} else {
				x.Known = true
			}
		}
		out[i.Name] = x
	}
	return out
}

// turn learns what has changed, and decides if anything has. Next is when to do so again if nothing happens before; 0: never.
func (s *scheduler) turn(ctx context.Context) (next time.Duration, err error) {
	if !s.loaded {
		if err := s.load(ctx); err != nil {
			return 0, err
		}
	}
	ids, upTo, err := s.hub.db.Changes(ctx, s.cursor)
	if err != nil {
		return 0, err
	}
	s.mu.Lock()
	touched := slices.Collect(maps.Keys(s.touched))
	s.mu.Unlock()
	for _, id := range append(ids, touched...) {
		if err := s.refresh(ctx, id); err != nil {
			return 0, err // all of it again, which is harmless
		}
	}
	s.cursor = upTo
	s.mu.Lock()
	for _, id := range touched {
		delete(s.touched, id)
	}
	s.mu.Unlock()
	// After the jobs: one that was submitted after a site was drained does not start there.
	if s.stale.Swap(false) || time.Since(s.sitesRead) > identityAge {
		if err := s.readSites(ctx); err != nil {
			s.stale.Store(true)
			return 0, err
		}
	}
	if s.dirty || !s.next.IsZero() && !time.Now().Before(s.next) {
		if err := s.decide(ctx); err != nil {
			s.dirty = true
			return 0, err
		}
	}
	if s.next.IsZero() {
		return 0, nil
	}
	return max(time.Until(s.next), time.Nanosecond), nil
}

// decide decides until nothing follows from it any more.
func (s *scheduler) decide(ctx context.Context) error {
	for {
		s.dirty, s.next = false, time.Time{}
		began := time.Now()
		d := schedule.Decide(s.input())
		s.hub.measures.decided(d, time.Since(began))
		s.next = d.Next
		again, err := s.act(ctx, d)
		if err != nil {
			return err
		}
		if !again {
			s.show(d)
			return nil
		}
	}
}

func (s *scheduler) input() schedule.Input {
	now := s.hub.wall()
	in := schedule.Input{
		Now: time.Now(), Sites: s.sites, Lately: s.ledger.Lately(now), MaxJobs: s.hub.conf.MaxJobs, Patience: holdAfter,
		Queued: make([]*schedule.Job, 0, len(s.queued)), Active: make([]*schedule.Active, 0, len(s.active)),
	}
	for _, w := range s.queued {
		in.Queued = append(in.Queued, &w.Job)
	}
	for _, id := range slices.Sorted(maps.Keys(s.active)) {
		r := s.active[id]
		in.Active = append(in.Active, r.Active)
		in.Lately[r.Submitter] += schedule.Used(r.share, r.Started, now)
	}
	return in
}

// show gives the decision to those who ask.
func (s *scheduler) show(d *schedule.Decision) {
	v := view{waits: make(map[job.ID]*schedule.Wait, len(d.Waits)), active: make(map[job.ID]*schedule.Active, len(s.active)), who: make(map[job.ID]string, len(s.active))}
	var last *schedule.Lack // jobs of one shape share what they lack, and may be many
	for _, w := range d.Waits {
		v.waits[w.ID] = w
		if len(w.Lacks) == 0 || &w.Lacks[0] == last {
			continue
		}
		last = &w.Lacks[0]
		for _, l := range w.Lacks {
			for _, id := range l.By {
				if q := s.queued[id]; q != nil {
					v.who[id] = q.Submitter
				}
			}
		}
	}
	for id, r := range s.active {
		v.active[id], v.who[id] = r.Active, r.Submitter
	}
	s.mu.Lock()
	s.seen = v
	s.mu.Unlock()
}

// errLost says that another hub has the duty now.
var errLost = errors.New("another hub decides which jobs start")

// act does what was decided, and tells whether that makes another decision due.
func (s *scheduler) act(ctx context.Context, d *schedule.Decision) (again bool, err error) {
	now := time.Now()
	var tell []*schedule.Wait
	for _, w := range d.Waits {
		q := s.queued[w.ID]
		switch {
		case !w.Joining:
			q.Enough = time.Time{}
		case q.Enough.IsZero():
			q.Enough = now
		}
		if !q.queued {
			tell = append(tell, w)
		} else if w.Place <= tellPlaces {
			if key := w.Key(); q.known && q.told != key {
				tell = append(tell, w)
			} else {
				q.told, q.known = key, true
			}
		}
	}
	if len(d.Start)+len(d.Join)+len(d.Expired)+len(d.Cannot)+len(tell) == 0 {
		return false, nil
	}
	held, err := s.duty.hold(ctx)
	if err != nil {
		return false, err
	}
	if !held {
		s.next = now.Add(renewal)
		return false, nil
	}
	if s.duty.taken {
		// Not all that another hub does is told by an event: what it has given to jobs that wait for a site is not.
		if err := s.load(ctx); err != nil {
			return false, err
		}
		s.duty.taken = false
		return true, nil
	}
	for _, p := range d.Start {
		if err := s.start(ctx, p); err != nil {
			return false, err
		}
	}
	for _, p := range d.Join {
		for _, site := range p.Sites {
			if err := s.done(ctx, p.ID, s.hub.db.Allocate(ctx, p.ID, site, s.hub.id)); err != nil {
				return false, err
			}
		}
	}
	for _, w := range d.Expired {
		if err := s.end(ctx, w.ID, func(j job.Job) *job.Cause { return s.expired(j, w) }); err != nil {
			return false, err
		}
	}
	for _, w := range d.Cannot {
		if err := s.end(ctx, w.ID, func(j job.Job) *job.Cause { return wasRemoved(missed(j, w)) }); err != nil {
			return false, err
		}
	}
	if len(d.Start)+len(d.Join)+len(d.Expired)+len(d.Cannot) > 0 {
		return true, nil // people are told of what is so then
	}
	s.show(d)
	for _, w := range tell {
		if err := s.tell(ctx, w, len(d.Waits)); err != nil {
			return false, err
		}
	}
	return false, nil
}

// done looks at a job that was acted upon. That somebody was quicker is known then, too.
func (s *scheduler) done(ctx context.Context, id job.ID, err error) error {
	if problem.CodeOf(err) == problem.Denied {
		s.duty.renewed = time.Time{}
		return errLost
	}
	if err := ignoreMoved(err); err != nil && problem.CodeOf(err) != problem.NotFound {
		return err
	}
	return s.refresh(ctx, id)
}

func (s *scheduler) start(ctx context.Context, p schedule.Placement) error {
	if q := s.queued[p.ID]; q != nil && !q.queued {
		if err := s.hub.db.Move(ctx, p.ID, job.Queued, nil, "", s.hub.wall()); err != nil {
			return s.done(ctx, p.ID, err)
		}
		q.queued = true
	}
	err := s.hub.db.Start(ctx, p.ID, p.Sites, s.hub.id, s.hub.wall())
	if err == nil {
		s.hub.log.Info("a job starts", "job", p.ID, "sites", len(p.Sites))
	}
	return s.done(ctx, p.ID, err)
}

// end ends a job that is in the queue.
func (s *scheduler) end(ctx context.Context, id job.ID, cause func(job.Job) *job.Cause) error {
	j, err := s.hub.db.Job(ctx, id)
	if err == nil && !j.State.Active() {
		err = s.hub.stop(ctx, j, cause(j))
	}
	return s.done(ctx, id, err)
}

// expired is the cause of a job's end whose time in the queue is over.
func (s *scheduler) expired(j job.Job, w *schedule.Wait) *job.Cause {
	var away []string
	for _, l := range w.Lacks {
		if l.Kind == schedule.Away {
			away = append(away, l.Site)
		}
	}
	limit := j.Spec.WaitTimeout
	if len(away) == 0 {
		return problem.New(problem.WaitTimeout, "submit it again with a longer --wait-timeout, or ask for less", "the job was in the queue for %s: %s", limit, s.text(w, 0))
	}
	cause := problem.New(problem.StartTimeout, "check that the agents of these sites run and reach the hub", "%s did not connect within %s", strings.Join(away, ", "), limit)
	cause.Party = away[0]
	return cause
}

// missed names a removed site that a job cannot do without.
func missed(j job.Job, w *schedule.Wait) (site string) {
	for _, l := range w.Lacks {
		if l.Kind == schedule.Removed && (site == "" || slices.Contains(j.Spec.MandatorySites, l.Site)) {
			site = l.Site
		}
	}
	return site
}

// tell writes down why a job waits.
func (s *scheduler) tell(ctx context.Context, w *schedule.Wait, queued int) error {
	q := s.queued[w.ID]
	if !q.queued {
		if err := s.hub.db.Move(ctx, w.ID, job.Queued, nil, s.text(w, queued), s.hub.wall()); err != nil {
			return s.done(ctx, w.ID, err)
		}
		q.queued, q.told, q.at, q.known = true, w.Key(), time.Now(), true
		return nil
	}
	now := time.Now()
	if at := q.at.Add(tellPause); now.Before(at) {
		if s.next.IsZero() || at.Before(s.next) {
			s.next = at
		}
		return nil
	}
	e, err := job.NewEvent(w.ID, "", job.KindNote, job.Text{Message: "in the queue: " + s.text(w, queued)}, s.hub.wall())
	if err != nil {
		return err
	}
	if _, _, err := s.hub.db.Append(ctx, e, 0); err != nil {
		return s.done(ctx, w.ID, err)
	}
	q.told, q.at = w.Key(), now
	return nil
}

func (s *scheduler) text(w *schedule.Wait, queued int) string {
	return w.Text(queued, func(id job.ID) string {
		if r := s.active[id]; r != nil {
			return r.Submitter
		}
		if q := s.queued[id]; q != nil {
			return q.Submitter
		}
		return ""
	})
}

// view gives the last decision.
func (s *scheduler) view() view {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.seen
}

// feasible refuses a job that its sites, as they have declared themselves, could never run.
func (h *Hub) feasible(ctx context.Context, spec job.Spec) error {
	sites, err := h.knownOf(ctx, spec.Sites)
	if err != nil {
		return err
	}
	for _, x := range sites {
		x.Up, x.Drained = true, false // that may change
	}
	d := schedule.Decide(schedule.Input{Sites: sites, Queued: []*schedule.Job{{Shape: shapeOf(spec)}}})
	if len(d.Waits) == 0 || !d.Waits[0].Never {
		return nil
	}
	return problem.New(problem.Usage, "ask for less, or choose other sites; see what they have with: pergola sites", "the job %s", d.Waits[0].Text(1, func(job.ID) string { return "" }))
}
