// Package store holds what every store of jobs shares: what can be asked for, and how a store
// refuses. Package sqlite keeps the jobs in one file beside the hub; storetest is the contract that
// each store passes. [Store] is all that a store can do.
//
// It decides nothing: which move is allowed stands in package job, when to move is the hub's affair.
// Start with sqlite.Open.
package store

import (
	"context"
	"encoding/json"
	"fmt"
	"sync"
	"time"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/problem"
)

// Filter chooses jobs. The zero value is the first DefaultLimit jobs in the order of submission.
type Filter struct {
	States    []job.State // none = all
	Submitter string      // "" = everybody's
	Name      string      // "" = any
	Bundle    string      // digest; "" = any
	Prefix    string      // how the ID begins; "" = any
	Limit     int         // 0 = DefaultLimit
	After     job.ID      // the last job of the page before
	Newest    bool        // newest first
	Ended     time.Time   // only those that have ended after it; zero: all
}

// DefaultLimit is how many jobs or events a call gives that names no limit.
const DefaultLimit = 100

// Scheduling is the duty to say which job starts when.
const Scheduling = "schedule"

// Bundle is the bookkeeping of one bundle; its bytes lie elsewhere.
type Bundle struct {
	Digest  string    // "sha256:…"
	Size    int64     // bytes as packed
	Created time.Time // when the hub had it whole
}

// Identity is a site or a user that the hub knows.
type Identity struct {
	Kind     string          // as in its certificate: "site", "user"
	Name     string          //
	Enrolled time.Time       // when it last came by a token, each time later than before; zero: never, as one that stands in the hub's configuration
	Removed  time.Time       // zero: it may come
	Drained  bool            // a site that takes no new jobs
	Info     json.RawMessage // what a site declared last; none = nothing yet
	Seen     time.Time       // when it declared that
	Version  string          // of its Pergola, then
}

// Token is a secret that lets somebody enrol, once. The store knows its hash only.
type Token struct {
	Hash    string // hex SHA-256 of the secret
	Kind    string // of whom it enrols
	Name    string // of whom it enrols
	Created time.Time
	Expires time.Time
	Used    time.Time // zero: not yet
	By      string    // who made it
}

// MoveError is a move that the tables of package job do not allow. It comes within a *problem.Error;
// use errors.As.
type MoveError struct {
	Job      job.ID
	Party    string // "" = the job itself
	From, To string
}

// Error says which move was refused, of what.
func (e *MoveError) Error() string {
	if e.Party != "" {
		return fmt.Sprintf("party %s of job %s cannot go from %s to %s", e.Party, e.Job, e.From, e.To)
	}
	return fmt.Sprintf("job %s cannot go from %s to %s", e.Job, e.From, e.To)
}

// Problem wraps e for people. A move after the end is what a late request brings about; any other
// illegal move is a defect.
func (e *MoveError) Problem() error {
	code, next := problem.Internal, "please report this with the job's events"
	over := job.State(e.From).Terminal()
	if e.Party != "" {
		over = job.PartyState(e.From).Terminal()
	}
	if over {
		code, next = problem.Usage, "it is over; see how it ended with: pergola show "+string(e.Job)
	}
	return problem.Wrap(e, code, next, "the move is not allowed")
}

// Store keeps jobs, their parties and events, and whom the hub knows. What a method means is said at those of
// sqlstore.DB, and tested in storetest. A call that returned nil is on disk. While a store cannot be reached, calls
// return a problem with the code unavailable, and do again what they should once it can.
type Store interface {
	CreateJob(ctx context.Context, j job.Job, sites []string) (job.Job, error)
	Job(ctx context.Context, id job.ID) (job.Job, error)
	Jobs(ctx context.Context, f Filter) ([]job.Job, error)
	FindJob(ctx context.Context, prefix string) (job.ID, error)
	CountJobs(ctx context.Context) (map[job.State]int, error)
	DeleteJob(ctx context.Context, id job.ID) error
	Move(ctx context.Context, id job.ID, to job.State, cause *job.Cause, reason string, now time.Time) error
	SetReason(ctx context.Context, id job.ID, reason string) error
	SetEngine(ctx context.Context, id job.ID, c job.EngineChoice, now time.Time) error

	Parties(ctx context.Context, id job.ID) ([]job.Party, error)
	Party(ctx context.Context, id job.ID, party string) (job.Party, error)
	PartiesOf(ctx context.Context, ids []job.ID) (map[job.ID][]job.Party, error)
	AddParty(ctx context.Context, id job.ID, site string) error
	MoveParty(ctx context.Context, id job.ID, party string, to job.PartyState, cause *job.Cause, reason string, now time.Time) error
	MoveAttempt(ctx context.Context, id job.ID, party string, attempt int, to job.PartyState, cause *job.Cause, reason string, now time.Time) error
	Again(ctx context.Context, id job.ID, party, reason string, now time.Time) error

	Append(ctx context.Context, e job.Event, partySeq int64) (seq int64, dup bool, err error)
	PartySeq(ctx context.Context, id job.ID, party string) (int64, error)
	Events(ctx context.Context, id job.ID, after int64, limit int) ([]job.Event, error)
	Subscribe(id job.ID) (wake <-chan struct{}, cancel func())
	Gather() *Gathering

	Claim(ctx context.Context, id job.ID, owner string, until, now time.Time) (bool, error)
	Release(ctx context.Context, id job.ID, owner string) error

	ClaimDuty(ctx context.Context, duty, owner string, until, now time.Time) (held, taken bool, err error)
	Start(ctx context.Context, id job.ID, sites []string, owner string, now time.Time) error
	Allocate(ctx context.Context, id job.ID, site, owner string) error
	Changes(ctx context.Context, after int64) (ids []job.ID, upTo int64, err error)

	PutBundle(ctx context.Context, digest string, size int64, now time.Time) error
	Bundle(ctx context.Context, digest string) (Bundle, error)
	Bundles(ctx context.Context) ([]Bundle, error)
	DeleteBundle(ctx context.Context, digest string) error

	PutIdentity(ctx context.Context, i Identity) error
	Introduce(ctx context.Context, i Identity) error
	Identity(ctx context.Context, kind, name string) (Identity, error)
	Identities(ctx context.Context, kind string) ([]Identity, error)
	RemoveIdentity(ctx context.Context, kind, name string, now time.Time) error
	SetDrained(ctx context.Context, site string, drained bool) error
	SawSite(ctx context.Context, site string, info json.RawMessage, version string, now time.Time) error

	PutToken(ctx context.Context, t Token) error
	Enrol(ctx context.Context, hash string, now time.Time, sign func(t Token, enrolled time.Time) error) (Token, error)
	Tokens(ctx context.Context) ([]Token, error)
	RemoveToken(ctx context.Context, hash string) error

	Backup(ctx context.Context, path string) error
	Ready(ctx context.Context) error
	Observe(Observer)
	Close() error
}

// Fanout wakes whoever waits for something to be committed. The zero value is ready.
type Fanout struct {
	mu      sync.Mutex // guards the rest
	subs    map[job.ID]map[chan struct{}]struct{}
	gathers map[*Gathering]struct{}
}

// Gathering collects about which jobs something was committed, for whoever follows all of them: see [Fanout.Gather].
type Gathering struct {
	f    *Fanout
	wake chan struct{}
	ids  map[job.ID]struct{} // guarded by f.mu, as is all
	all  bool
}

// Gather collects from now on about which jobs something is committed. Gather first and read then, so that nothing falls in between.
func (f *Fanout) Gather() *Gathering {
	g := &Gathering{f: f, wake: make(chan struct{}, 1), ids: map[job.ID]struct{}{}}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.gathers == nil {
		f.gathers = map[*Gathering]struct{}{}
	}
	f.gathers[g] = struct{}{}
	return g
}

// Wake holds a value when there is something to take.
func (g *Gathering) Wake() <-chan struct{} { return g.wake }

// Take gives the jobs of which there is news since the last Take, each once, and "" where there is news of something that is no
// job's. All means that there may be news of any job.
func (g *Gathering) Take() (ids []job.ID, all bool) {
	g.f.mu.Lock()
	defer g.f.mu.Unlock()
	for id := range g.ids {
		ids = append(ids, id)
	}
	all, g.all = g.all, false
	clear(g.ids)
	return ids, all
}

// Put gives back what was taken and could not be used. Nobody is woken by it.
func (g *Gathering) Put(ids []job.ID, all bool) {
	g.f.mu.Lock()
	defer g.f.mu.Unlock()
	for _, id := range ids {
		g.ids[id] = struct{}{}
	}
	g.all = g.all || all
}

// Close ends the collecting.
func (g *Gathering) Close() {
	g.f.mu.Lock()
	defer g.f.mu.Unlock()
	delete(g.f.gathers, g)
}

func (g *Gathering) wakeLocked() {
	select {
	case g.wake <- struct{}{}:
	default:
	}
}

// Subscribe gives a channel that holds a value after something about job id ("" = any job) was
// committed since the last receive. Many commits make one value: read on from your cursor until
// nothing is left. Subscribe first and read then, so that nothing falls in between. Cancel ends it
// and may be called twice; the channel is never closed.
func (f *Fanout) Subscribe(id job.ID) (wake <-chan struct{}, cancel func()) {
	c := make(chan struct{}, 1)
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.subs == nil {
		f.subs = map[job.ID]map[chan struct{}]struct{}{}
	}
	if f.subs[id] == nil {
		f.subs[id] = map[chan struct{}]struct{}{}
	}
	f.subs[id][c] = struct{}{}
	return c, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		delete(f.subs[id], c)
		if len(f.subs[id]) == 0 {
			delete(f.subs, id)
		}
	}
}

// Wake tells the subscribers of id and those of all jobs. It never blocks.
func (f *Fanout) Wake(id job.ID) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for g := range f.gathers {
		g.ids[id] = struct{}{}
		g.wakeLocked()
	}
	for _, to := range []job.ID{id, ""} {
		for c := range f.subs[to] {
			select {
			case c <- struct{}{}:
			default: // it has not looked yet, and will see this too when it does
			}
		}
		if id == "" {
			return
		}
	}
}

// WakeAll tells every subscriber: something may have happened that nobody told of.
func (f *Fanout) WakeAll() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for g := range f.gathers {
		g.all = true
		g.wakeLocked()
	}
	for _, subs := range f.subs {
		for c := range subs {
			select {
			case c <- struct{}{}:
			default:
			}
		}
	}
}
