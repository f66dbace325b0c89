package runner

import (
	"context"
	"fmt"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/metrics"
)

// takeMetrics starts to take what the app's code logs at this party, and tells the programs where. What is logged is a sign
// of progress: a trainer may be silent for hours but for that.
func (r *runner) takeMetrics(ctx context.Context, p *prepared) error {
	s, err := metrics.Serve(ctx, metrics.Options{
		IP: p.ip, Dir: r.spec.Logs, Site: r.spec.Party, Log: r.log,
		OnRecords: func() { r.progressed("metrics were logged") }, OnError: r.diskError,
	})
	if err != nil {
		return fmt.Errorf("take metrics: %w", err)
	}
	p.metrics = s
	p.env = append(p.env, s.Env(p.env)...)
	return nil
}

// close gives up what is held for the programs, after them.
func (r *runner) close(p *prepared) {
	if err := p.metrics.Close(); err != nil {
		r.log.Warn("the metrics file could not be closed", "err", err)
		r.note(job.KindWarning, job.Text{Message: fmt.Sprintf("the last metrics of %s may not be on disk: %v", r.spec.Party, err)})
	}
	_ = p.claim.Close() // a socket that nobody connects to
}
