package localrun

import (
	"context"
	"errors"
	"io"
	"time"

	"github.com/cenkalti/backoff/v5"
	"golang.org/x/sync/errgroup"

	"github.com/pergolafl/pergola/internal/api"
	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/bundle"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/prepare"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/proc"
)

func (r *run) submit(ctx context.Context, c *api.Client, packed *bundle.Bundle) (job.ID, error) {
	if err := prepare.Upload(ctx, c, packed, r.emit); err != nil {
		return "", err
	}
	j, err := r.app.Submit(ctx, c, packed.Digest, "")
	return job.ID(j.GetId()), err
}

// killPatience is how long a job has to end at once before this command ends it.
const killPatience = 5 * time.Second

// follow shows the job until it is over, and gives its cause.
func (r *run) follow(ctx context.Context, c *api.Client, id job.ID, hp *proc.Process, sites []*proc.Process) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	g, gctx := errgroup.WithContext(ctx)
	over := make(chan struct{})
	var lost error
	for i, s := range sites {
		g.Go(func() error { return r.mind(gctx, over, s, r.names[i]) })
	}
	g.Go(func() error { // the user's wishes, and the hub's life
		var late <-chan time.Time
		interrupted, killed := r.opt.Interrupted, r.opt.Killed
		for {
			select {
			case <-interrupted:
				interrupted = nil
				r.note("ending the job in order; interrupt again to end it at once")
				r.abort(gctx, c, &pb.AbortJobRequest{Id: string(id)})
			case <-killed:
				killed = nil
				late = time.After(killPatience)
				r.abort(gctx, c, &pb.AbortJobRequest{Id: string(id), Now: true})
			case <-late:
				return aborted() // what is left is ended by whoever called
			case <-hp.Done():
				lost = r.lost(hp)
				return lost
			case <-over:
				return nil
			case <-gctx.Done():
				return nil
			}
		}
	})
	g.Go(func() error {
		defer close(over)
		return r.watch(gctx, c, id)
	})
	g.Go(func() error {
		err := r.tail(gctx, c, id)
		if problem.CodeOf(err) == problem.HubUnreachable || gctx.Err() != nil {
			err = nil // the watcher decides what that means
		}
		return err
	})
	err := g.Wait()
	if err == nil || problem.CodeOf(err) == problem.AbortedByUser {
		if err == nil && r.summary.Cause != nil {
			return r.summary.Cause
		}
		return err
	}
	if lost == nil {
		lost = r.ended(hp)
	}
	if lost != nil {
		return lost
	}
	return err
}

// mindPatience is how long a job may wait for a site whose agent has ended. Once the job has begun, the hub looks after that.
const mindPatience = 15 * time.Second

// mind ends the run if a site's agent ends while the job still waits for it: nobody starts it again.
func (r *run) mind(ctx context.Context, over <-chan struct{}, p *proc.Process, site string) error {
	select {
	case <-p.Done():
	case <-over:
		return nil
	case <-ctx.Done():
		return nil
	}
	select {
	case <-time.After(mindPatience):
	case <-over:
		return nil
	case <-ctx.Done():
		return nil
	}
	r.mu.Lock()
	state := r.summary.State
	r.mu.Unlock()
	if state != job.Submitted && state != job.Queued {
		return nil
	}
	e := problem.New(problem.SiteLost, "look into logs/"+site+".log below "+r.out+", and run it again", "the agent of %s ended by itself (%s)", site, p.Exit())
	e.Party = site
	return e
}

// abortPatience is how long the hub may take to answer a request to abort: the user may have a second one.
const abortPatience = 3 * time.Second

// abort asks the hub for the job's end. A hub that does not answer is noticed by whoever watches the job.
func (r *run) abort(ctx context.Context, c *api.Client, req *pb.AbortJobRequest) {
	ctx, cancel := context.WithTimeout(ctx, abortPatience)
	defer cancel()
	if _, err := c.Jobs.AbortJob(ctx, req); err != nil && context.Cause(ctx) == nil {
		r.note("the hub refused: %v", err)
	}
}

// hubPatience is how long the hub may be silent before it counts as gone: a killed one is noticed at once, this is for
// one that hangs.
const hubPatience = 40 * time.Second

// watch shows events, and takes the summary from them.
func (r *run) watch(ctx context.Context, c *api.Client, id job.ID) error {
	var after int64
	bo := backoff.NewExponentialBackOff()
	bo.InitialInterval, bo.MaxInterval = 50*time.Millisecond, time.Second
	var broken time.Time // since when nothing came
	for {
		s, err := c.Jobs.WatchJob(ctx, &pb.WatchJobRequest{Id: string(id), After: after})
		opened := err == nil
		for err == nil {
			var m *pb.WatchJobResponse
			if m, err = s.Receive(); err != nil {
				break
			}
			e, e2 := api.FromEvent(m.GetEvent())
			if e2 != nil {
				return e2
			}
			after = e.Seq
			broken = time.Time{}
			bo.Reset()
			r.show(Event{Event: e})
		}
		if opened {
			_ = s.Close() // what ended it is known already
		}
		if broken.IsZero() {
			broken = time.Now()
		}
		switch {
		case r.sawEnd():
			return nil
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case problem.CodeOf(err) != problem.HubUnreachable && !errors.Is(err, io.EOF) && isProblem(err):
			return err
		case time.Since(broken) > hubPatience:
			return &problem.Error{Code: problem.HubLost, Party: job.HubParty, Msg: "the hub has not answered for " + hubPatience.String(), Err: err, Next: "look into logs/hub.log below " + r.out + ", and run it again"}
		}
		select { // the connection broke: go on behind the last event
		case <-time.After(bo.NextBackOff()):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
