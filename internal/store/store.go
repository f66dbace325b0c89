// Package store holds what every store of jobs shares: what can be asked for, and how a store
// refuses. Package sqlite keeps the jobs in one file beside the hub; storetest is the contract that
// each store passes. Interfaces are declared by those who use a store, with the methods they use.
//
// It decides nothing: which move is allowed stands in package job, when to move is the hub's affair.
// Start with sqlite.Open.
package store

import (
	"fmt"
	"sync"
	"time"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/problem"
)

// Filter chooses jobs. The zero value is the first DefaultLimit jobs in the order of submission.
type Filter struct {
	States []job.State // none = all
	Limit  int         // 0 = DefaultLimit
	After  job.ID      // the last job of the page before
	Newest bool        // newest first
}

// DefaultLimit is how many jobs or events a call gives that names no limit.
const DefaultLimit = 100

// Bundle is the bookkeeping of one bundle; its bytes lie elsewhere.
type Bundle struct {
	Digest  string    // "sha256:…"
	Size    int64     // bytes as packed
	Created time.Time // when the hub had it whole
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

// Fanout wakes whoever waits for something to be committed. The zero value is ready.
type Fanout struct {
	mu   sync.Mutex // guards the rest
	subs map[job.ID]map[chan struct{}]struct{}
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
