// Package schedule decides which queued jobs start, with which of their sites, and says of each other one why it waits. A decision
// is a function of what is given: the jobs, the sites, what is in use, and the time. docs/scheduling.md says the same for people.
//
// It stores nothing, starts nothing and reads no clock; the hub does. Start with [Decide].
package schedule

import (
	"cmp"
	"container/heap"
	"slices"
	"time"

	"github.com/pergolafl/pergola/internal/job"
)

// Site is what is known of a site.
type Site struct {
	Name    string
	Up      bool // its agent is connected
	Drained bool // it takes no new jobs
	Removed bool // it may take part in nothing any more
	Known   bool // it has said what it has
	job.Declared
}

// Request is what a job asks for at a site.
type Request struct {
	Site string
	Ask  job.Resources
}

// Shape is what jobs have in common that ask for the same. Jobs of one shape share it, so that a decision looks at it once.
type Shape struct {
	Sites     []Request // in the order of the job
	Need      int       // how many of them it needs
	Mandatory []string  // without which it cannot go
}

// Job is a job in the queue.
type Job struct {
	ID        job.ID
	Submitter string
	Priority  int
	Since     time.Time // when it was submitted
	*Shape

	JoinWait time.Duration // how long others are waited for once enough sites can take it; 0: for ever
	Limit    time.Duration // its longest time in the queue; 0: none

	// Enough is since when enough sites can take it, while others may still come. Whoever calls keeps it from decision to decision:
	// it is set to now where a decision's Joining has the job without a time, and to zero where it has not.
	Enough time.Time
}

// Active is a job that runs, starts or ends.
type Active struct {
	ID        job.ID
	Submitter string
	Priority  int
	Started   time.Time
	Holds     []Request
	Late      []Request // at sites of which it holds nothing, and which may join it
}

// Input is all that a decision depends on.
type Input struct {
	Now    time.Time
	Sites  map[string]*Site
	Queued []*Job
	Active []*Active
	Lately map[string]float64 // what submitters have used, see Ledger; what Active holds is in it up to now

	MaxJobs int // how many jobs may be active at a time; 0 = any number

	// Patience is how long later jobs may take what one before them needs and cannot use yet. From then on it is kept for that job.
	Patience time.Duration
}

// Placement says that a job gets what it asks for at sites.
type Placement struct {
	ID    job.ID
	Sites []string
}

// Decision is what follows from an Input.
type Decision struct {
	Start   []Placement // queued jobs, in this order
	Join    []Placement // active jobs that get a further site each
	Expired []*Wait     // jobs whose time in the queue is over
	Cannot  []*Wait     // jobs of which so many sites were removed that they cannot run
	Waits   []*Wait     // the other queued jobs, in the order of the queue
	Next    time.Time   // when to decide anew if nothing changes before; zero: never
}

// Wait is why a job waits.
type Wait struct {
	ID      job.ID
	Place   int       // in the queue, from 1
	Lacks   []Lack    // by site, in the job's order; those of sites that could take it are missing
	Able    int       // how many sites could take it now
	Needed  int       // how many it needs
	Joining bool      // enough could take it: it waits for the others
	Until   time.Time // until then; zero: for ever
	Never   bool      // too few sites have what it asks for, whoever uses it now
	HubFull bool      // the hub runs as many jobs as it may
	shape   *Shape
}

// Kind is why a site cannot take a job.
type Kind string

// The kinds, from what may last longest to what is over soonest.
const (
	Removed    Kind = "removed"    // it may take part in nothing
	TooSmall   Kind = "too-small"  // it has not as much as is asked for
	Undeclared Kind = "undeclared" // its agent does not say what it has
	Drained    Kind = "drained"    // it takes no new jobs
	Away       Kind = "away"       // its agent is not connected
	Busy       Kind = "busy"       // others use what is asked for
	MaxJobs    Kind = "max-jobs"   // it has as many jobs as it takes
	Held       Kind = "held"       // what is free is kept for jobs before this one
)

// Lack is why one site cannot take a job.
type Lack struct {
	Site     string
	Kind     Kind
	Resource string // with TooSmall, Busy and Held
	Asked    int64
	Free     int64    // of Resource, with Busy and Held
	Has      int64    // as declared; with MaxJobs how many jobs it takes
	By       []job.ID // who uses it; with Held, for whom it is kept; 20 at most
}

// mayEnd tells whether it is worth waiting for.
func (k Kind) mayEnd() bool { return k == Away || k == Busy || k == MaxJobs || k == Held }

// inUse tells whether it would not be so if nothing ran.
func (k Kind) inUse() bool { return k == Busy || k == MaxJobs || k == Held }

// projected is for how long a part that runs, or gets its turn, counts in advance.
const projected = time.Hour

// Decide decides.
func Decide(in Input) *Decision {
	p := &pass{Input: in, out: &Decision{}, rooms: map[string]*room{}, shapes: map[*Shape]*verdict{}, score: map[string]float64{}, totals: map[*Shape]float64{}, active: len(in.Active)}
	for who, n := range in.Lately {
		p.score[who] = n
	}
	for _, a := range in.Active {
		for _, r := range a.Holds {
			p.room(r.Site).take(r.Ask, a.ID)
			p.score[a.Submitter] += p.share(r) * projected.Hours()
		}
	}
	p.join()
	p.queue()
	return p.out
}

// pass is a decision in the making. What is free only becomes less in it.
type pass struct {
	Input
	out    *Decision
	rooms  map[string]*room
	shapes map[*Shape]*verdict // of shapes that cannot start any more in this pass
	score  map[string]float64
	totals map[*Shape]float64
	active int
}

// room is what a site has, of which use was made before or in this pass, and what is kept for jobs that cannot start yet.
type room struct {
	*Site
	used, held job.Resources
	jobs, kept int
	users      []user // of used
	keeps      []user // of held
}

type user struct {
	id  job.ID
	ask job.Resources
}

func (p *pass) room(site string) *room {
	r := p.rooms[site]
	if r == nil {
		s := p.Sites[site]
		if s == nil {
			s = &Site{Name: site, Removed: true}
		}
		r = &room{Site: s, used: job.Resources{}, held: job.Resources{}}
		p.rooms[site] = r
	}
	return r
}

func (r *room) take(ask job.Resources, id job.ID) {
	for k, n := range ask {
		r.used[k] += n
	}
	r.jobs++
	r.users = append(r.users, user{id, ask})
}

func (r *room) keep(ask job.Resources, id job.ID) {
	for k, n := range ask {
		r.held[k] += n
	}
	r.kept++
	r.keeps = append(r.keeps, user{id, ask})
}

// lack says why the site cannot take what is asked for now; no kind if it can.
func (r *room) lack(ask job.Resources) (l Lack) {
	l.Site = r.Name
	if r.Removed {
		l.Kind = Removed
		return l
	}
	names := make([]string, 0, len(ask))
	for k := range ask {
		names = append(names, k)
	}
	slices.Sort(names)
	if r.Known {
		for _, k := range names {
			if ask[k] > r.Resources[k] {
				l.Kind, l.Resource, l.Asked, l.Has = TooSmall, k, ask[k], r.Resources[k]
				return l
			}
		}
	}
	switch {
	case r.Drained:
		l.Kind = Drained
	case !r.Up:
		l.Kind = Away
	case !r.Known && len(ask) > 0:
		l.Kind = Undeclared
	case r.MaxJobs > 0 && r.jobs >= r.MaxJobs:
		l.Kind, l.Has, l.By = MaxJobs, int64(r.MaxJobs), ids(r.users, "")
	}
	if l.Kind != "" {
		return l
	}
	for _, k := range names {
		if free := r.Resources[k] - r.used[k]; free < ask[k] {
			l.Kind, l.Resource, l.Asked, l.Free, l.Has, l.By = Busy, k, ask[k], max(free, 0), r.Resources[k], ids(r.users, k)
			return l
		}
	}
	if r.MaxJobs > 0 && r.jobs+r.kept >= r.MaxJobs {
		l.Kind, l.Has, l.By = Held, int64(r.MaxJobs), ids(r.keeps, "")
		return l
	}
	for _, k := range names {
		if free := r.Resources[k] - r.used[k]; free-r.held[k] < ask[k] {
			l.Kind, l.Resource, l.Asked, l.Free, l.Has, l.By = Held, k, ask[k], free, r.Resources[k], ids(r.keeps, k)
			return l
		}
	}
	return l
}

// maxBy is how many users of a resource are named.
const maxBy = 20

// ids names those of us that have something of a resource, "" for all of them; not more than maxBy.
func ids(us []user, resource string) []job.ID {
	var out []job.ID
	for _, u := range us {
		if len(out) < maxBy && (resource == "" || u.ask[resource] > 0) {
			out = append(out, u.id)
		}
	}
	return out
}

// leastShare is what a part counts that asks for nothing of which the site has an end.
const leastShare = 0.01

// share is how much of a site a part has: its largest share of anything that the site has (as dominant resource fairness counts,
// Ghodsi et al., NSDI 2011).
func (p *pass) share(r Request) float64 {
	s := p.Sites[r.Site]
	if s == nil {
		return leastShare
	}
	return Share(s.Declared, r.Ask)
}

// Share is the largest share that ask is of anything that a site has. A place among its max-jobs is such a thing.
func Share(d job.Declared, ask job.Resources) float64 {
	out := leastShare
	if d.MaxJobs > 0 {
		out = max(out, 1/float64(d.MaxJobs))
	}
	for k, n := range ask {
		if has := d.Resources[k]; has > 0 {
			out = max(out, min(1, float64(n)/float64(has)))
		}
	}
	return out
}

// join gives active jobs the sites that have come since their start.
func (p *pass) join() {
	late := slices.Clone(p.Active)
	slices.SortFunc(late, func(a, b *Active) int {
		if a.Priority != b.Priority {
			return b.Priority - a.Priority
		}
		if c := a.Started.Compare(b.Started); c != 0 {
			return c
		}
		return cmp.Compare(a.ID, b.ID)
	})
	for _, a := range late {
		for _, r := range a.Late {
			if room := p.room(r.Site); room.lack(r.Ask).Kind == "" {
				room.take(r.Ask, a.ID)
				p.score[a.Submitter] += p.share(r) * projected.Hours()
				p.out.Join = append(p.out.Join, Placement{a.ID, []string{r.Site}})
			}
		}
	}
}

// queue goes through the queue in its order: higher priorities first; within one the submitter first who has used least, the jobs
// that start in this pass counted; of one submitter the oldest job first. A job that cannot start counts nothing, so that it does not
// stand in the way of what its submitter could have elsewhere.
func (p *pass) queue() {
	jobs := slices.Clone(p.Queued)
	slices.SortStableFunc(jobs, func(a, b *Job) int {
		if a.Priority != b.Priority {
			return b.Priority - a.Priority
		}
		return cmp.Compare(a.ID, b.ID)
	})
	for len(jobs) > 0 {
		n := 1
		for n < len(jobs) && jobs[n].Priority == jobs[0].Priority {
			n++
		}
		p.group(jobs[:n])
		jobs = jobs[n:]
	}
}

// group goes through the jobs of one priority.
func (p *pass) group(jobs []*Job) {
	ls := &lines{}
	at := map[string]*line{}
	for _, j := range jobs {
		l := at[j.Submitter]
		if l == nil {
			l = &line{who: j.Submitter, score: p.score[j.Submitter]}
			at[j.Submitter] = l
			ls.ls = append(ls.ls, l)
		}
		l.jobs = append(l.jobs, j)
	}
	heap.Init(ls)
	var keep []*Job // that those of lower priorities must not get before
	for len(ls.ls) > 0 {
		l := ls.ls[0]
		j := l.jobs[0]
		l.jobs = l.jobs[1:]
		w, started, before := p.try(j)
		if before {
			keep = append(keep, j)
		}
		if w != nil {
			l.waits = append(l.waits, w)
		}
		if started {
			l.score += p.total(j.Shape)
		}
		if len(l.jobs) == 0 {
			heap.Pop(ls)
		} else {
			heap.Fix(ls, 0)
		}
	}
	for _, j := range keep {
		p.keep(j)
	}
	// The places are those that they would come to have their turn in if each counted from then on.
	for who, l := range at {
		p.score[who] = l.score
		if len(l.waits) > 0 {
			ls.ls = append(ls.ls, l)
		}
	}
	heap.Init(ls)
	for len(ls.ls) > 0 {
		l := ls.ls[0]
		w := l.waits[0]
		l.waits = l.waits[1:]
		w.Place = len(p.out.Waits) + 1
		p.out.Waits = append(p.out.Waits, w)
		l.score += p.total(w.shape)
		if len(l.waits) == 0 {
			heap.Pop(ls)
		} else {
			heap.Fix(ls, 0)
		}
	}
}

// total is what a job counts that gets its turn: its shares of all its sites, for the projected time.
func (p *pass) total(s *Shape) float64 {
	t, ok := p.totals[s]
	if !ok {
		for _, r := range s.Sites {
			t += p.share(r) * projected.Hours()
		}
		p.totals[s] = t
	}
	return t
}

// line is the jobs of one submitter and priority, oldest first.
type line struct {
	who   string
	score float64
	jobs  []*Job
	waits []*Wait // those of them that were looked at, and wait
}

// lines is a heap of them, least score first.
type lines struct{ ls []*line }

func (b *lines) Len() int      { return len(b.ls) }
func (b *lines) Swap(i, j int) { b.ls[i], b.ls[j] = b.ls[j], b.ls[i] }

// Push is for heap.Interface; the lines are all there from the start.
func (b *lines) Push(x any) {
	if l, ok := x.(*line); ok {
		b.ls = append(b.ls, l)
	}
}

func (b *lines) Pop() any {
	l := b.ls[len(b.ls)-1]
	b.ls = b.ls[:len(b.ls)-1]
	return l
}

func (b *lines) Less(i, j int) bool {
	x, y := b.ls[i], b.ls[j]
	if x.score != y.score {
		return x.score < y.score
	}
	if xi, yi := x.head(), y.head(); xi != yi {
		return xi < yi
	}
	return x.who < y.who
}

func (l *line) head() job.ID {
	if len(l.jobs) > 0 {
		return l.jobs[0].ID
	}
	if len(l.waits) > 0 {
		return l.waits[0].ID
	}
	return ""
}

// verdict is what was found of a shape that cannot start. Jobs of it that come later in the pass cannot either.
type verdict struct {
	lacks    []Lack
	able     int
	never    bool
	waitable bool
	kept     bool // what it needs is kept for its first job already
	cannot   bool // so many of its sites were removed
	full     bool // there are sites enough, but the hub runs as many jobs as it may
}

// try starts a job if it can start, and else says why it waits; nothing of it, if it waits no more. Keep tells whether
// what it needs is to be kept from jobs of lower priorities: it could start but for others.
func (p *pass) try(j *Job) (w *Wait, started, keep bool) {
	v := p.shapes[j.Shape]
	late := j.Limit > 0 && !p.Now.Before(j.Since.Add(j.Limit))
	if v == nil {
		var able []string
		var hope, enough bool
		v, able, hope, enough = p.look(j.Shape)
		switch {
		case enough && p.MaxJobs > 0 && p.active >= p.MaxJobs:
			v.full = true // others may have its sites until there is room for it
		case enough && hope && !late && p.joins(j, able):
			w := p.wait(j, v, false)
			w.Joining = true
			if j.JoinWait > 0 {
				w.Until = p.from(j).Add(j.JoinWait)
				p.later(w.Until)
			}
			return w, false, false
		case enough:
			for _, r := range j.Sites {
				if slices.Contains(able, r.Site) {
					p.room(r.Site).take(r.Ask, j.ID)
				}
			}
			p.active++
			p.out.Start = append(p.out.Start, Placement{j.ID, able})
			return nil, true, false
		}
		p.shapes[j.Shape] = v
	}
	w = p.wait(j, v, late)
	if w == nil || v.full || !v.waitable || v.kept {
		return w, false, false
	}
	if p.Now.Before(j.Since.Add(p.Patience)) {
		return w, false, true
	}
	p.keep(j)
	return w, false, false
}

// from is since when enough sites can take a job.
func (p *pass) from(j *Job) time.Time {
	if j.Enough.IsZero() {
		return p.Now
	}
	return j.Enough
}

// joins tells whether a job that could start waits for further sites. What it could have must not be taken from under its feet.
func (p *pass) joins(j *Job, able []string) bool {
	if j.JoinWait > 0 && !p.Now.Before(p.from(j).Add(j.JoinWait)) {
		return false
	}
	for _, r := range j.Sites {
		if slices.Contains(able, r.Site) {
			p.room(r.Site).keep(r.Ask, j.ID)
		}
	}
	return true
}

// keep has no later job get what this one needs, where it could have it if nothing ran.
func (p *pass) keep(j *Job) {
	v := p.shapes[j.Shape]
	if v == nil || v.kept {
		return
	}
	v.kept = true
	for _, r := range j.Sites {
		if k := p.room(r.Site).lack(r.Ask).Kind; k == "" || k.inUse() {
			p.room(r.Site).keep(r.Ask, j.ID)
		}
	}
}

// look finds which of a shape's sites could take it now. Hope is that others may, too; enough that those that can suffice.
func (p *pass) look(s *Shape) (v *verdict, able []string, hope, enough bool) {
	v = &verdict{}
	could, ever, left := 0, 0, 0 // sites that could take it if nothing ran; that have what it asks for; that were not removed
	enough, v.waitable = true, true
	var mustNever bool
	for _, r := range s.Sites {
		l := p.room(r.Site).lack(r.Ask)
		must := slices.Contains(s.Mandatory, r.Site)
		if l.Kind == "" {
			able = append(able, r.Site)
		} else {
			v.lacks = append(v.lacks, l)
			hope = hope || l.Kind.mayEnd()
			enough = enough && !must
		}
		if l.Kind == "" || l.Kind.inUse() {
			could++
		} else if must {
			v.waitable = false
		}
		if l.Kind != Removed {
			left++
		} else if must {
			v.cannot = true
		}
		if l.Kind != TooSmall {
			ever++
		} else if must {
			mustNever = true
		}
	}
	v.able = len(able)
	enough = enough && len(able) >= s.Need
	v.waitable = v.waitable && could >= s.Need
	v.cannot = v.cannot || left < s.Need
	v.never = mustNever || ever < s.Need
	return v, able, hope, enough
}

// wait says why a job waits; nil if it has waited for too long, or would wait for nothing.
func (p *pass) wait(j *Job, v *verdict, late bool) *Wait {
	w := &Wait{ID: j.ID, Lacks: v.lacks, Able: v.able, Needed: j.Need, Never: v.never, HubFull: v.full, shape: j.Shape}
	switch {
	case v.cannot:
		p.out.Cannot = append(p.out.Cannot, w)
		return nil
	case late:
		p.out.Expired = append(p.out.Expired, w)
		return nil
	}
	if j.Limit > 0 {
		p.later(j.Since.Add(j.Limit))
	}
	return w
}

func (p *pass) later(t time.Time) {
	if !t.IsZero() && (p.out.Next.IsZero() || t.Before(p.out.Next)) {
		p.out.Next = t
	}
}
