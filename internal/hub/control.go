package hub

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/runner"
)

// How long a job waits for its parties while it ends. A runner gives its programs runner.Grace and is ended by its starter
// 15 s later; together with what a site's loss takes to be noticed that stays below a minute.
const (
	stopPatience  = runner.Grace + 25*time.Second
	backPatience  = 10 * time.Second // for an agent that is away: after an outage it looks for the hub every 5 s
	leavePatience = 10 * time.Second // for the sites to take their leave after a good run, before the superlink goes
)

// control sees one job to its end. What it does follows from the stored state and the clock; it may be stopped and made
// anew at any time.
type control struct {
	hub *Hub
	id  job.ID

	runner   chan struct{}       // closed when the hub's party is over; nil before its start
	hubGone  <-chan struct{}     // closed when the process of the hub's runner has ended, which runner follows
	cursor   int64               // the last event that was looked at
	looked   time.Time           // when the events were read last
	times    map[int64]time.Time // what when has given
	moved    time.Time           // the last event that shows progress
	prep     time.Time           // the last event that shows progress of the preparation
	begun    bool                // the run has begun: the hub's party runs, or ran in its present attempt
	over     bool                // the app has finished
	ending   time.Time           // since when the job is stopping
	enough   time.Time           // since when as many sites as the job needs are connected, or ready
	ready    map[string]bool     // parties that have been ready in their present attempt
	told     map[int64]bool      // what once has stored
	exported bool                // sumUp was done

	mu     sync.Mutex   // guards the rest
	want   *runner.Want // of the hub's own party
	kill   bool
	forced *job.Cause // the end that is decided but could not be stored
	failed bool       // that storing it failed, too
}

func newControl(h *Hub, id job.ID) *control {
	return &control{hub: h, id: id, want: runner.NewWant(), ready: map[string]bool{}, told: map[int64]bool{}}
}

func (c *control) killNow() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.kill = true
	c.want.Set(pb.Desired_DESIRED_KILL, 0)
}

// tell sets what the hub's own party should be doing.
func (c *control) tell(d pb.Desired, sites int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.want.Set(d, sites)
}

func (c *control) killing() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.kill
}

// unstorable gives the cause of an end that could not be stored.
func (c *control) unstorable() *job.Cause {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.failed {
		return c.forced
	}
	return nil
}

// run goes on until the job is over, which it tells, another hub sees to the job, or this hub ends. While it acts, the job's lease
// is this hub's.
func (c *control) run(ctx context.Context) (over bool) {
	wake, cancel := c.hub.db.Subscribe(c.id)
	defer cancel()
	sites, cancel2 := c.hub.changed.Subscribe("")
	defer cancel2()
	own := lease{db: c.hub.db, job: c.id, owner: c.hub.id}
	var wg sync.WaitGroup
	defer wg.Wait()
	inner, end := context.WithCancel(ctx)
	defer end()
	var failures int
	for {
		var next time.Duration
		held, err := own.hold(ctx)
		switch {
		case err == nil && !held:
			return c.deleted(ctx)
		case err == nil, problem.CodeOf(err) == problem.DiskFull: // that is for the job to end by; nobody else can claim it either
			over, next, err = c.step(inner, &wg)
		}
		if over {
			wg.Wait()
			c.hub.sweep(c.id)
			own.release(ctx, c.hub.log)
			return true
		}
		if err != nil {
			if ctx.Err() != nil {
				return false
			}
			failures++
			next = c.trouble(err, failures)
		} else {
			failures = 0
		}
		t := time.NewTimer(min(next, renewal))
		select {
		case <-wake:
		case <-sites:
		case <-t.C:
		case <-c.runner: // nil until there is one
			c.runner = nil
		case <-ctx.Done():
			t.Stop()
			return false
		}
		t.Stop()
	}
}

// deleted tells whether there is no such job any more: then nobody ever needs a controller of it again.
func (c *control) deleted(ctx context.Context) bool {
	_, err := c.hub.db.Job(ctx, c.id)
	return problem.CodeOf(err) == problem.NotFound
}

// trouble deals with a step that failed, and says when to try again.
func (c *control) trouble(err error, failures int) time.Duration {
	c.hub.log.Error("a job cannot be moved on", "job", c.id, "err", err)
	if problem.CodeOf(err) == problem.DiskFull {
		c.full()
		if failures > 5 {
			c.mu.Lock()
			c.failed = true
			c.mu.Unlock()
			c.tell(pb.Desired_DESIRED_KILL, 0)
		}
	}
	return min(time.Duration(failures)*100*time.Millisecond, 2*time.Second)
}

// full decides that the job ends because the hub has no space for it.
func (c *control) full() {
	c.hub.makeRoom()
	c.mu.Lock()
	first := c.forced == nil
	if first {
		c.forced = problem.New(problem.DiskFull, "make room on that disk, or choose another", "no space is left where the hub keeps its jobs (%s)", c.hub.dir)
		c.forced.Party = job.HubParty
	}
	c.mu.Unlock()
	if first {
		c.hub.changed.Wake("") // this controller, too
	}
}

// step looks at the job once and does what is due. Next is when to look again if nothing happens before.
func (c *control) step(ctx context.Context, wg *sync.WaitGroup) (over bool, next time.Duration, err error) {
	j, err := c.hub.db.Job(ctx, c.id)
	if problem.CodeOf(err) == problem.NotFound {
		return true, 0, nil // it was over, and somebody has removed it since
	}
	if err != nil {
		return false, 0, err
	}
	if j.State.Terminal() {
		return true, 0, nil
	}
	ps, err := c.hub.db.Parties(ctx, c.id)
	if err != nil {
		return false, 0, err
	}
	if err := c.read(ctx); err != nil {
		return false, 0, err
	}
	c.mu.Lock()
	forced := c.forced
	c.mu.Unlock()
	if forced != nil && j.State != job.Stopping {
		return false, 0, c.hub.stop(ctx, j, forced)
	}
	now := c.hub.wall()
	if ps, err = c.expel(ctx, j, ps, now); err != nil {
		return false, 0, err
	}
	due := deadlines{now: time.Now(), wall: now, next: time.Minute}
	switch j.State {
	case job.Preparing, job.Running:
		if c.runner == nil && !hubParty(ps).State.Terminal() {
			if err := c.startHub(ctx, wg, j, hubParty(ps)); err != nil {
				return false, 0, c.hub.stop(ctx, j, problem.From(err))
			}
		}
		err = c.active(ctx, j, ps, &due)
	case job.Stopping:
		// A hub that was started again finds the runner that an earlier one has left, and hears how its party ends.
		if c.runner == nil && !hubParty(ps).State.Terminal() && runner.Begun(c.hub.partyDir(c.id)) {
			if err := c.startHub(ctx, wg, j, hubParty(ps)); err != nil {
				return false, 0, err
			}
		}
		err = c.stopping(ctx, j, ps, &due)
	}
	return false, due.next, err
}

// deadlines collects when something is due.
type deadlines struct {
	now  time.Time // for comparing with times that this process has noted, and with those of control.when
	wall time.Time // for storing
	next time.Duration
}

// passed tells whether at + d is over; if not, the controller looks again when it is. No d, no deadline.
func (l *deadlines) passed(at time.Time, d time.Duration) bool {
	if d <= 0 {
		return false
	}
	left := at.Add(d).Sub(l.now)
	if left <= 0 {
		return true
	}
	l.next = min(l.next, left)
	return false
}

func hubParty(ps []job.Party) job.Party {
	for _, p := range ps {
		if p.Name == job.HubParty {
			return p
		}
	}
	return job.Party{}
}

// read takes in the events since the last look.
func (c *control) read(ctx context.Context) error {
	now := time.Now() // what is stored later may be read as well, and is seen as of now or later
	for {
		es, err := c.hub.db.Events(ctx, c.id, c.cursor, 500)
		if err != nil {
			return err
		}
		for _, e := range es {
			c.cursor = e.Seq
			c.over = c.over || runner.IsRunOver(e)
			c.follow(e)
			switch at := c.seen(e); e.Kind {
			case job.KindWarning, job.KindNote:
			case job.KindEnvProgress, job.KindPartyState:
				c.prep = latest(c.prep, at)
				c.moved = latest(c.moved, at)
			default:
				c.moved = latest(c.moved, at)
			}
		}
		if len(es) < 500 {
			c.looked = now
			return nil
		}
	}
}

// follow keeps what the events of parties' states tell beyond the states themselves.
func (c *control) follow(e job.Event) {
	var s job.PartyStateChange
	if e.Kind != job.KindPartyState || e.Decode(&s) != nil {
		return
	}
	switch s.To {
	case job.PartyReady:
		c.ready[e.Party] = true
	case job.PartyRunning:
		c.begun = c.begun || e.Party == job.HubParty
	case job.PartyAbsent: // it begins anew
		delete(c.ready, e.Party)
		if e.Party == job.HubParty {
			c.begun, c.over = false, false
			c.enough = time.Time{}
		}
	}
}

// suffices tells whether the job may go on with the sites that have: with all of those that it waits for at once, with as many
// as it needs when the others have had join-wait.
func (c *control) suffices(j job.Job, have, waiting []string, due *deadlines) bool {
	enough := len(have) >= j.Spec.Need(len(j.Spec.Sites))
	for _, m := range j.Spec.MandatorySites {
		enough = enough && slices.Contains(have, m)
	}
	if !enough {
		c.enough = time.Time{}
		return false
	}
	if c.enough.IsZero() {
		c.enough = due.now
	}
	return len(waiting) == 0 || due.passed(c.enough, j.Spec.JoinWait.Or(job.DefaultJoinWait).Std())
}

// roll is how the sites of a job are.
type roll struct {
	ready   []string     // their programs run
	waiting []string     // they will be, as far as anybody knows
	away    []string     // they have not begun, and their agents are not there, or they have no room for it; they may still come
	lost    []string     // of away: for longer than the job waits for it
	gone    []job.Party  // failed, or done before the job
	causes  []*job.Cause // of gone
}

// alive is how many there are, or will be as far as anybody knows.
func (l roll) alive() int { return len(l.ready) + len(l.waiting) + len(l.away) - len(l.lost) }

// active looks after a job whose programs start or run.
func (c *control) active(ctx context.Context, j job.Job, ps []job.Party, due *deadlines) error {
	if due.passed(c.when(j.Started), j.Spec.Deadline.Std()) {
		return c.hub.stop(ctx, j, problem.New(problem.Deadline, "give it more with --deadline, or find out what takes so long", "the job was not finished within its deadline of %s", j.Spec.Deadline))
	}
	hub := hubParty(ps)
	if cause := c.refusal(j, ps); cause != nil {
		return c.fallBack(ctx, j, ps, cause, due)
	}
	if hub.State == job.PartyFailed {
		cause := causeOf(hub)
		if cause.Code == problem.HubRunnerDied && hub.Attempt < j.Spec.RestartsFor(job.HubParty) {
			return c.again(ctx, j, ps, cause, due.wall)
		}
		return c.hub.stop(ctx, j, cause)
	}
	if !hub.State.Terminal() && c.isHubGone() {
		// What it has left, or its death, is about to be stored, which wakes this. What sites say meanwhile, as when all machines
		// lost their power, is no cause before that.
		return nil
	}
	l, end, err := c.call(ctx, j, ps, due)
	if err != nil {
		return err
	}
	if end != nil {
		return c.hub.stop(ctx, j, end)
	}
	if c.over {
		return c.hub.stop(ctx, j, nil)
	}
	// Whoever is gone may come back while the rest goes on.
	for i, p := range l.gone {
		if c.mayReturn(p, l.causes[i], due) {
			if err := c.once(ctx, j, p, returns, fmt.Sprintf("%s is there again and begins anew", p.Name)); err != nil {
				return err
			}
			return ignoreMoved(c.hub.db.Again(ctx, j.ID, p.Name, "it was away: "+l.causes[i].Msg, due.wall))
		}
	}
	switch {
	case j.State == job.Preparing && hub.State == job.PartyRunning:
		return c.hub.db.Move(ctx, j.ID, job.Running, nil, "", due.wall)
	case hub.State != job.PartyRunning && hub.State != job.PartyDone: // before the app's start, also in a new attempt of a job that ran
		from := c.when(j.Started)
		if c.prep.After(from) {
			from = c.prep
		}
		late := due.passed(from, j.Spec.StartTimeout.Std())
		if hub.State != job.PartyReady {
			c.enough = time.Time{}
		}
		if hub.State == job.PartyReady && (c.suffices(j, l.ready, l.waiting, due) || late && !c.enough.IsZero()) {
			if others := append(slices.Clone(l.waiting), l.away...); len(others) > 0 {
				text := fmt.Sprintf("the app starts without %s, which may join later", strings.Join(others, ", "))
				if err := c.once(ctx, j, hub, without, text); err != nil {
					return err
				}
			}
			c.tell(pb.Desired_DESIRED_RUN, len(l.ready))
		} else if late {
			who := append(l.waiting, l.away...)
			if hub.State != job.PartyReady {
				who = append([]string{job.HubParty}, who...)
			}
			cause := problem.New(problem.StartTimeout, "look into the logs of these parties", "%s not ready within %s", strings.Join(who, ", "), j.Spec.StartTimeout)
			cause.Party = who[0]
			return c.hub.stop(ctx, j, cause)
		}
	case due.passed(c.moved, j.Spec.NoProgress.Std()):
		return c.hub.stop(ctx, j, problem.New(problem.NoProgress, "find out which client hangs from the logs' last lines, or allow more with no-progress", "no round, message or line of output came for %s", j.Spec.NoProgress))
	}
	if hub.State == job.PartyRunning {
		for _, p := range ps {
			if slices.Contains(l.ready, p.Name) && c.when(p.Updated).After(c.when(hub.Updated)) {
				if err := c.once(ctx, j, p, joins, p.Name+" has joined the running job"); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// isHubGone tells whether the process of the hub's runner has ended.
func (c *control) isHubGone() bool {
	select {
	case <-c.hubGone: // nil until there is one
		return true
	default:
		return false
	}
}

// call looks at each site, and tells whether the job cannot go on: a site that it cannot do without, a failure that it does
// not forgive, or fewer sites than it needs. It goes on without others, with a warning.
func (c *control) call(ctx context.Context, j job.Job, ps []job.Party, due *deadlines) (l roll, end *job.Cause, err error) {
	var absent *job.Cause
	for _, p := range ps {
		if p.Name == job.HubParty {
			continue
		}
		cause, err := c.look(ctx, j, p, due)
		if err != nil {
			return l, nil, err
		}
		mandatory := slices.Contains(j.Spec.MandatorySites, p.Name)
		switch {
		case cause != nil && p.State == job.PartyAbsent:
			l.away, l.lost = append(l.away, p.Name), append(l.lost, p.Name)
			if absent == nil {
				absent = cause
			}
			if mandatory && end == nil {
				end = cause
			}
		case cause != nil:
			l.gone, l.causes = append(l.gone, p), append(l.causes, cause)
			if end == nil && (mandatory || c.unforgivable(j, p, cause)) {
				end = cause
			}
		case p.State == job.PartyReady || p.State == job.PartyRunning:
			l.ready = append(l.ready, p.Name)
		default:
			if _, ok := c.hub.away(p.Name); p.State == job.PartyAbsent && (!ok || !p.Allocated) {
				l.away = append(l.away, p.Name)
				break
			}
			l.waiting = append(l.waiting, p.Name)
		}
	}
	if end != nil {
		return l, end, nil
	}
	if l.alive() < j.Spec.Need(len(j.Spec.Sites)) {
		if len(l.causes) > 0 {
			return l, l.causes[0], nil
		}
		return l, absent, nil // there is one: all sites are alive, gone or lost
	}
	for i, p := range l.gone {
		c.want.Gone(p.Name, p.Attempt)
		text := fmt.Sprintf("the job goes on without %s: %s", p.Name, l.causes[i].Msg)
		if err := c.once(ctx, j, p, goes, text); err != nil {
			return l, nil, err
		}
	}
	return l, nil, nil
}

// wentAway tells whether a cause is that a site was away, and no failure of what it does: the same need not happen again.
func wentAway(c *job.Cause) bool {
	switch c.Code {
	case problem.SiteLost, problem.LinkLost, problem.SiteRunnerDied:
		return true
	}
	return false
}

// unforgivable tells whether a site's end is the job's, however many others there are: a program that cannot be started, as in
// the reference system, and with strict-clients every failure.
func (c *control) unforgivable(j job.Job, p job.Party, cause *job.Cause) bool {
	if wentAway(cause) || cause.Code == problem.Removed {
		return false
	}
	return j.Spec.StrictClients || cause.Code == problem.ProgramFailed && !c.ready[p.Name]
}

// How long a site that has begun anew waits before it does so again.
const (
	returnPause    = 10 * time.Second
	maxReturnPause = 10 * time.Minute
)

// mayReturn tells whether a site that is gone can begin anew now.
func (c *control) mayReturn(p job.Party, cause *job.Cause, due *deadlines) bool {
	if _, ok := c.hub.away(p.Name); !ok || !wentAway(cause) || !p.State.Again() {
		return false
	}
	if p.Attempt == 0 {
		return true
	}
	return due.passed(c.when(p.Updated), min(returnPause<<min(p.Attempt-1, 20), maxReturnPause))
}

// beginPatience is how long an agent that is there may take to say that its part has begun.
const beginPatience = 20 * time.Second

// maxFallBacks is more than there can be: what is left of an attempt before may speak once more.
const maxFallBacks = 3

// refusal gives the cause of a party at which the native engine does not work, if the job may run on the other. What others have worked
// out is not thrown away for it: once the run has begun on the native engine, such a party fails as any other does.
func (c *control) refusal(j job.Job, ps []job.Party) *job.Cause {
	// A party that says so again and again, though it was told of the other engine, is not begun anew for ever.
	if !j.Spec.EngineAuto || hubParty(ps).Attempt > maxFallBacks+j.Spec.RestartsFor(job.HubParty) {
		return nil
	}
	if c.begun && j.Spec.Engine == job.EngineNative { // the other engine stands there once it is decided
		return nil
	}
	for _, p := range ps {
		if p.State == job.PartyFailed && p.Cause != nil && p.Cause.Code == problem.NativeUnavailable {
			return causeOf(p)
		}
	}
	return nil
}

// fallBack begins the job anew on Flower's own programs. It goes on where a hub that ended meanwhile has left off.
func (c *control) fallBack(ctx context.Context, j job.Job, ps []job.Party, cause *job.Cause, due *deadlines) error {
	hub, now := hubParty(ps), due.wall
	// Stored before anything ends, so that it stays decided though the run begins before it is ended.
	if j.Spec.Engine != job.EngineFlower {
		return c.hub.db.SetEngine(ctx, j.ID, job.EngineChoice{Engine: job.EngineFlower, Flwr: j.Spec.FlwrVersion, Why: cause.Msg}, now)
	}
	if !hub.State.Terminal() && c.runner != nil {
		c.tell(pb.Desired_DESIRED_KILL, 0) // its end is an event, at which this is looked at again
		return nil
	}
	for _, p := range ps {
		// Its agent has been told of the old engine, and may have started it: only what has begun can begin anew.
		if _, ok := c.hub.away(p.Name); ok && p.Name != job.HubParty && p.State == job.PartyAbsent && p.Allocated && !due.passed(c.when(hub.Updated), beginPatience) {
			return nil
		}
	}
	if err := c.once(ctx, j, hub, begins, cause.Msg+"; the job begins anew on Flower's own programs"); err != nil {
		return err
	}
	return c.anew(ctx, j, ps, "the job begins anew on another engine", now)
}

// again begins the whole job anew after the hub's runner died.
func (c *control) again(ctx context.Context, j job.Job, ps []job.Party, cause *job.Cause, now time.Time) error {
	hub := hubParty(ps)
	text := fmt.Sprintf("%s; attempt %d of %d begins", cause.Msg, hub.Attempt+2, j.Spec.RestartsFor(job.HubParty)+1)
	if err := c.once(ctx, j, hub, begins, text); err != nil {
		return err
	}
	return c.anew(ctx, j, ps, "the hub's side begins anew", now)
}

// anew begins a new attempt of every party.
func (c *control) anew(ctx context.Context, j job.Job, ps []job.Party, why string, now time.Time) error {
	hub := hubParty(ps)
	// The hub's party last: as long as it has failed, this goes on.
	for _, p := range append(slices.Clone(ps[1:]), hub) {
		if p.State == job.PartyAbsent {
			continue // it has not begun
		}
		if err := ignoreMoved(c.hub.db.Again(ctx, j.ID, p.Name, why, now)); err != nil {
			return err
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.want = runner.NewWant()
	if c.kill {
		c.want.Set(pb.Desired_DESIRED_KILL, 0)
	}
	return nil
}

// What people are told about a party's attempt. The values stand in the store.
type telling int

const (
	goes    telling = iota + 1 // it is gone, and the job goes on
	returns                    // it is there again
	joins                      // it is ready while the job runs
	begins                     // the job begins anew since the hub's party died
	without                    // hub's party: the app starts without some
)

// once tells something about a party's present attempt, one time however often it is looked at.
func (c *control) once(ctx context.Context, j job.Job, p job.Party, what telling, text string) error {
	// The job's own reports have no numbers: these are made of what they are about, so that the store takes each once.
	key := int64(slices.Index(j.Spec.Sites, p.Name)+1)<<32 | int64(p.Attempt)<<8 | int64(what)
	if c.told[key] {
		return nil
	}
	kind := job.KindNote
	if what == goes || what == begins || what == without {
		kind = job.KindWarning
	}
	e, err := job.NewEvent(j.ID, "", kind, job.Text{Message: text}, c.hub.wall())
	if err != nil {
		return err
	}
	if _, _, err = c.hub.db.Append(ctx, e, key); err == nil {
		c.told[key] = true
	}
	return err
}

func causeOf(p job.Party) *job.Cause {
	cause := *problem.From(errors.New("unknown"))
	if p.Cause != nil {
		cause = *p.Cause
	}
	if cause.Party == "" {
		cause.Party = p.Name
	}
	return &cause
}

// look tells whether a site has failed, by its own word or by its absence.
func (c *control) look(ctx context.Context, j job.Job, p job.Party, due *deadlines) (*job.Cause, error) {
	if p.State == job.PartyFailed {
		return causeOf(p), nil
	}
	if p.State == job.PartyDone {
		return &job.Cause{Code: problem.ProgramFailed, Party: p.Name, Msg: p.Name + " ended its part before the job was over", Next: "look into its client_app_log.txt"}, nil
	}
	since, ok := c.hub.away(p.Name)
	if ok {
		return nil, nil
	}
	if since.IsZero() {
		since = c.when(j.Started) // not seen since the hub itself started
		if c.hub.opened.After(since) {
			since = c.hub.opened
		}
	}
	// An agent that cannot be reached is no harm by itself: its runner and the link may be well, or come back.
	grace := c.hub.conf.SiteGrace.Or(j.Spec.OutageTolerance.Or(job.DefaultOutageTolerance))
	if !due.passed(since, grace.Std()) {
		return nil, nil
	}
	cause := problem.New(problem.SiteLost, "check the agent at that site, and its network", "the agent of %s went away and did not come back within %s", p.Name, grace)
	cause.Party = p.Name
	if p.State == job.PartyAbsent { // nothing of it is lost: it may still come
		return cause, nil
	}
	return cause, c.hub.db.MoveParty(ctx, j.ID, p.Name, job.PartyFailed, cause, "", due.wall)
}

// stopping waits for the parties, and settles the job.
func (c *control) stopping(ctx context.Context, j job.Job, ps []job.Party, due *deadlines) error {
	if c.ending.IsZero() {
		c.ending = due.now
		c.hub.changed.Wake("")
	}
	var sites, all []string
	for _, p := range ps {
		if p.State.Terminal() {
			continue
		}
		if p.Name != job.HubParty && p.State == job.PartyAbsent && !p.Allocated { // its site was never told of it
			if err := c.settle(ctx, j, p, due.wall); err != nil {
				return err
			}
			continue
		}
		if since, ok := c.hub.away(p.Name); !ok && p.Name != job.HubParty {
			if since.IsZero() {
				since = c.hub.opened // its agent has not come back to a hub that was started again
			}
			// Nobody is there to say so: what its runner has left is ended when its agent comes back.
			if p.State == job.PartyAbsent || due.passed(since, backPatience) {
				if err := c.settle(ctx, j, p, due.wall); err != nil {
					return err
				}
				continue
			}
		}
		if p.Name == job.HubParty && c.runner == nil {
			// No runner of this hub's: it was never started, or has died.
			if err := c.settle(ctx, j, p, due.wall); err != nil {
				return err
			}
			continue
		}
		all = append(all, p.Name)
		if p.Name != job.HubParty {
			sites = append(sites, p.Name)
		}
	}
	// After a good run the supernodes leave first, so that they can say so to the superlink.
	if j.Cause != nil || len(sites) == 0 || due.passed(c.ending, leavePatience) {
		if !c.killing() {
			c.tell(pb.Desired_DESIRED_STOP, 0)
		}
	}
	if len(all) == 0 {
		c.sumUp(ctx, j, ps)
		return c.hub.db.Move(ctx, j.ID, j.State.Outcome(j.Cause), j.Cause, "", due.wall)
	}
	if due.passed(c.ending, stopPatience) {
		for _, p := range ps {
			if !p.State.Terminal() {
				if err := c.settle(ctx, j, p, due.wall); err != nil {
					return err
				}
			}
		}
		return nil
	}
	return nil
}

// settle ends a party that does not speak for itself.
func (c *control) settle(ctx context.Context, j job.Job, p job.Party, now time.Time) error {
	to, reason := job.PartyDone, "ended with the job"
	if p.State == job.PartyAbsent {
		reason = "was never started"
	}
	return ignoreMoved(c.hub.db.MoveParty(ctx, j.ID, p.Name, to, nil, reason, now))
}

// startHub starts the hub's runner of the job, or finds the one that an earlier hub started.
func (c *control) startHub(ctx context.Context, wg *sync.WaitGroup, j job.Job, hub job.Party) error {
	dir := c.hub.partyDir(c.id)
	mark := c.hub.mark(c.id)
	attempt, want := hub.Attempt, c.want
	if err := runner.Renew(dir, attempt, mark); err != nil {
		return diskProblem(fmt.Errorf("clear the hub's part of the attempt before: %w", err))
	}
	hd, err := runner.Attach(dir)
	if errors.Is(err, os.ErrNotExist) {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return diskProblem(err)
		}
		if err := c.hub.unpacked(ctx, j.Bundle); err != nil {
			return diskProblem(err)
		}
		hd, err = runner.Start(dir, runner.Spec{
			Attempt: attempt,
			Job:     c.id, Party: job.HubParty, Count: len(j.Spec.Sites), Spec: j.Spec,
			Bundle: c.hub.bundleDir(j.Bundle), Logs: c.hub.logDir(c.id, job.HubParty), LogQuota: c.hub.logQuota(j).Bytes(), Results: filepath.Join(c.hub.jobDir(c.id), "results"),
			Cache: c.hub.conf.Cache, Python: c.hub.conf.Python, Existing: c.hub.conf.Existing, Apps: c.hub.conf.Apps, Mark: mark,
		})
	}
	if err != nil {
		return diskProblem(fmt.Errorf("start the hub's runner: %w", err))
	}
	seq, err := c.hub.db.PartySeq(ctx, c.id, job.HubParty)
	if err != nil {
		return err
	}
	if seq>>seqBits == int64(attempt) {
		seq &= 1<<seqBits - 1
	} else {
		seq = 0
	}
	gone := make(chan struct{})
	c.runner, c.hubGone = gone, hd.Gone()
	wg.Go(func() {
		defer close(gone)
		err := hd.Keep(ctx, seq, mark, want, func(e runner.Entry) error { return c.record(ctx, attempt, e) })
		if err == nil || ctx.Err() != nil {
			return
		}
		cause := problem.Wrap(err, problem.HubRunnerDied, "submit the job again", "the hub's runner of the job %s", runner.HowDied(err))
		if full := diskProblem(err); problem.CodeOf(full) == problem.DiskFull {
			cause = problem.From(full)
		}
		cause.Party, cause.Log = job.HubParty, "runner.log"
		c.fail(ctx, attempt, cause)
	})
	return nil
}

// record stores an entry of the hub's runner, as long as it takes: a store that is down is no reason to lose it. A disk
// that is full is one to end the job.
func (c *control) record(ctx context.Context, attempt int, e runner.Entry) error {
	for n := 1; ; n++ {
		err := c.hub.record(ctx, attempt, e)
		if err == nil || ctx.Err() != nil {
			return ctx.Err()
		}
		if problem.CodeOf(err) == problem.NotFound {
			return nil // the job was over and was removed: nobody asks any more what its runner says while it ends
		}
		if problem.CodeOf(err) == problem.Usage || problem.CodeOf(err) == problem.Denied {
			return err
		}
		wait := c.trouble(err, n)
		if c.unstorable() != nil {
			err = nil // it is known from memory, and nobody can do better
		}
		if err == nil {
			return nil
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// fail stores the failure of the hub's own party.
func (c *control) fail(ctx context.Context, attempt int, cause *job.Cause) {
	for n := 1; ctx.Err() == nil; n++ {
		err := ignoreMoved(c.hub.db.MoveAttempt(ctx, c.id, job.HubParty, attempt, job.PartyFailed, cause, "", c.hub.wall()))
		if err == nil || problem.CodeOf(err) == problem.NotFound || c.unstorable() != nil {
			return
		}
		select {
		case <-time.After(c.trouble(err, n)):
		case <-ctx.Done():
		}
	}
}
