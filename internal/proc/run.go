package proc

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/pergolafl/pergola/internal/problem"
)

// Output is what a one-shot command gave.
type Output struct {
	Stdout, Stderr string // the first Spec.MaxOutput bytes of each, unchanged
	Truncated      bool   // at least one of them had more
	Exit           Exit
	Took           time.Duration
}

// Run runs a one-shot command to its end. Both streams are read all the time, whatever their size,
// and beyond what Output keeps go to the log, echo and OnLine of spec line by line. An exit code
// other than 0 is not an error: see Output.Exit.
//
// When ctx ends the whole group is stopped (SIGTERM, SIGKILL one second later); the error then wraps
// the context's cause, and Output has what came until then. An error to start is as from [Start].
func Run(ctx context.Context, spec Spec) (Output, error) {
	if ctx.Err() != nil {
		return Output{}, stopped(ctx, spec)
	}
	limit := spec.MaxOutput
	if limit <= 0 {
		limit = DefaultMaxOutput
	}
	stdout, stderr := capture{limit: limit}, capture{limit: limit}
	begun := time.Now()
	p, err := start(spec, stdout.write, stderr.write)
	if err != nil {
		return Output{}, err
	}
	cut := false
	select {
	case <-p.Done():
	case <-ctx.Done():
		select {
		case <-p.Done(): // it was finished before
		default:
			cut = true
			p.Stop(runGrace)
		}
	}
	out := Output{
		Stdout: string(stdout.b), Stderr: string(stderr.b), Truncated: stdout.more || stderr.more,
		Exit: p.Exit(), Took: time.Since(begun),
	}
	if cut {
		return out, stopped(ctx, p.spec)
	}
	return out, nil
}

func stopped(ctx context.Context, spec Spec) error {
	cause, name := context.Cause(ctx), nameOr(spec.Name)
	if _, ok := errors.AsType[*problem.Error](cause); ok {
		return fmt.Errorf("%s was stopped: %w", name, cause)
	}
	if errors.Is(cause, context.DeadlineExceeded) {
		return problem.Wrap(cause, problem.ProgramFailed, "see why it takes so long, or allow more time", "%s did not end in its time and was stopped", name)
	}
	return problem.Wrap(cause, problem.ProgramFailed, "start again", "%s was stopped", name)
}

// capture keeps the beginning of a stream. One goroutine writes; it is read after Done.
type capture struct {
	b     []byte
	limit int
	more  bool
}

func (c *capture) write(b []byte) {
	if n := c.limit - len(c.b); len(b) > n {
		b, c.more = b[:n], true
	}
	c.b = append(c.b, b...)
}
