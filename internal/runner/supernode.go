package runner

import (
	"context"
	"fmt"
	"time"

	"github.com/cenkalti/backoff/v5"
	human "github.com/dustin/go-humanize"

	"github.com/pergolafl/pergola/internal/flower"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/link"
	"github.com/pergolafl/pergola/internal/problem"
)

// Pauses before a supernode that has crashed is started again. They double from the first to the longest, each with half of
// it as jitter: sites whose supernodes crash for one reason do not all come back at once.
const (
	restartPause   = time.Second
	restartLongest = 30 * time.Second
)

// supernode runs the site's supernode until gctx ends, the link breaks or it has ended for good. One that has crashed is
// started again as often as the job allows (restarts, 0 by default as in the reference system): it joins the superlink as
// a new node with the same node config, and the party goes on. One that ended by itself with 0 is not started again, nor
// one that cannot start: the next would not do better. ctx is the party's, of which the grace depends.
func (r *runner) supernode(ctx, gctx context.Context, sess *link.Session, cfg flower.ClientConfig) error {
	allowed := r.spec.Spec.RestartsFor(r.spec.Party)
	bo := backoff.NewExponentialBackOff()
	bo.InitialInterval, bo.MaxInterval, bo.Multiplier = restartPause, restartLongest, 2
	for n := 1; ; n++ {
		err := r.oneSupernode(ctx, gctx, sess, cfg, n == 1)
		crash, ok := err.(*crashed) //nolint:errorlint // it is never wrapped
		if !ok {
			return err
		}
		if n > allowed {
			return crash.cause
		}
		pause := bo.NextBackOff().Round(10 * time.Millisecond)
		r.note(job.KindWarning, job.Text{Message: fmt.Sprintf("%s; starting it again in %s, for the %s time of at most %d", crash.cause.What(), pause, human.Ordinal(n), allowed)})
		t := time.NewTimer(pause)
		select {
		case <-t.C:
			continue
		case <-sess.Done():
			err = r.linkLost(sess)
		case <-gctx.Done():
			err = context.Cause(gctx)
		}
		t.Stop()
		return err
	}
}

// crashed is the error of a supernode that may be started again.
type crashed struct{ cause *problem.Error }

func (c *crashed) Error() string { return c.cause.Error() }

// oneSupernode runs one supernode.
func (r *runner) oneSupernode(ctx, gctx context.Context, sess *link.Session, cfg flower.ClientConfig, first bool) error {
	c, err := flower.StartClient(gctx, cfg)
	if err != nil {
		return err
	}
	defer func() { c.Stop(r.grace(ctx)) }()
	if first {
		r.move(job.PartyReady, nil)
	}
	select {
	case <-c.Done():
		r.buried(context.WithoutCancel(gctx), sess)
		if err := c.Err(); err != nil {
			return &crashed{problem.From(err)}
		}
		return problem.New(problem.ProgramFailed, "look into "+flower.ClientAppLog, "the supernode at %s ended by itself before the job did", r.spec.Party)
	case <-sess.Done():
		return r.linkLost(sess)
	case <-gctx.Done():
		return context.Cause(gctx)
	}
}

func (r *runner) linkLost(sess *link.Session) error {
	return problem.Wrap(sess.Err(), problem.LinkLost, "check the network between the site and the hub", "the link between %s and the hub broke", r.spec.Party)
}
