package runner

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"

	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/problem"
)

// How long a runner may take to obey before its starter ends it: its programs have Grace, and it may wait 10 s for a
// reader of its last word.
const (
	stopPatience = Grace + 15*time.Second
	killPatience = 5 * time.Second
)

// A runner answers from memory, at once. One that has not for several asks in a row, each with time enough of its own, is
// stopped by a signal or hangs, and its party with it. Asks are counted, not seconds: a machine that slept, or a starter
// that was itself stopped, has had no answers for a long time either.
const (
	lookEvery    = 5 * time.Second // between two asks
	lookPatience = 4 * time.Second // for the answer
	looksMissed  = 6               // in a row: about half a minute in all; a runner that begins or ends has no socket for a few seconds
)

// errSilent says that a runner was there, and did not answer.
var errSilent = errors.New("it did not answer for half a minute")

// HowDied says how a runner ended of which Keep gives err.
func HowDied(err error) string {
	if p, ok := errors.AsType[*problem.Error](err); ok && p.Code == problem.Version {
		return "was started by a Pergola that is too different from this one, and was ended (" + p.Msg + ")"
	}
	if errors.Is(err, errSilent) {
		return "did not answer for half a minute, as a process that is stopped (SIGSTOP) or hangs, and was ended"
	}
	return "ended unexpectedly"
}

// Want is what a starter wants of a runner. It may be set at any time, from any goroutine.
type Want struct{ cell *cell }

// NewWant makes a Want that says nothing yet.
func NewWant() *Want { return &Want{newCell()} }

// Set changes what is wanted; stopping is not undone. Sites counts with DESIRED_RUN.
func (w *Want) Set(d pb.Desired, sites int) { w.cell.set(d, sites) }

// Get gives what was set last.
func (w *Want) Get() (d pb.Desired, sites int) {
	d, sites, _ = w.cell.get()
	return d, sites
}

// Gone tells the hub's party that an attempt of a site is over without the site having said so in its own link: the link is
// ended and the node taken for dead, so that nobody waits for it.
func (w *Want) Gone(site string, attempt int) { w.cell.drop(fmt.Sprintf("%s/%d", site, attempt)) }

// Keep follows a runner to its end: fn gets the journal's entries after seq, the runner is told what want says, and ended
// if it does not obey. When Keep returns because the party is over (nil) or the runner died (ErrDied), neither the runner
// nor any of its programs is left. When ctx is done first, the runner goes on.
func (h *Handle) Keep(ctx context.Context, seq int64, mark string, want *Want, fn func(Entry) error) error {
	over, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { h.push(over, want) })
	wg.Go(func() { h.look(over) })
	err := h.Watch(ctx, seq, fn)
	if ctx.Err() == nil {
		if h.other != nil {
			h.Kill() // it cannot be told anything
		}
		select {
		case <-h.gone:
		case <-time.After(killPatience):
			h.Kill()
			<-h.gone
		}
		if e := h.Clean(mark); e != nil && err == nil {
			err = e
		}
	}
	cancel()
	wg.Wait()
	h.Release()
	return err
}

// look ends a runner that does not answer any more.
func (h *Handle) look(ctx context.Context) {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for missed := 0; missed < looksMissed; {
		select {
		case <-tick.C:
		case <-h.gone:
			return
		case <-ctx.Done():
			return
		}
		call, cancel := context.WithTimeout(ctx, lookPatience)
		err := h.SetDesired(call, pb.Desired_DESIRED_UNSPECIFIED, 0) // changes nothing: nobody can want less
		cancel()
		if missed++; err == nil {
			missed = 0
		}
	}
	if ctx.Err() != nil {
		return
	}
	h.silent.Store(true)
	h.Kill()
}

// push tells the runner what is wanted until it has heard, and ends it if it does not do it.
func (h *Handle) push(ctx context.Context, want *Want) {
	bo := backoff.NewExponentialBackOff()
	bo.InitialInterval, bo.MaxInterval = 5*time.Millisecond, time.Second
	var told pb.Desired
	var toldGone int
	var kill <-chan time.Time
	var patient pb.Desired // for which kill was set
	for {
		d, n, changed := want.cell.get()
		gone := want.cell.dropped()
		var retry <-chan time.Time
		if d != told || len(gone) != toldGone {
			call, cancel := context.WithTimeout(ctx, 2*time.Second)
			err := h.SetDesired(call, d, n, gone...)
			cancel()
			if err == nil {
				told, toldGone = d, len(gone)
				bo.Reset()
			} else {
				retry = time.After(bo.NextBackOff())
			}
		}
		if d != patient {
			patient = d
			switch d {
			case pb.Desired_DESIRED_STOP:
				kill = time.After(stopPatience)
			case pb.Desired_DESIRED_KILL:
				kill = time.After(killPatience)
			}
		}
		select {
		case <-changed:
		case <-retry:
		case <-kill:
			h.Kill()
			return
		case <-h.gone:
			return
		case <-ctx.Done():
			return
		}
	}
}
