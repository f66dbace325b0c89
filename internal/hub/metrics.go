package hub

import (
	"context"
	"fmt"
	"path/filepath"
	"time"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/logs"
	"github.com/pergolafl/pergola/internal/metrics"
)

// sumUp does, once, what is to be done when all parties have ended, before the job's last move.
func (c *control) sumUp(ctx context.Context, j job.Job, ps []job.Party) {
	if c.exported {
		return
	}
	c.exported = true
	c.exportMetrics(ctx, j, ps)
	c.tellGaps(ctx, j, ps)
}

// exportMetrics makes files of what the app's code logged at all parties, for the job's results, once all has arrived. The
// lines stay where they are, so that nothing is lost if it fails: that is a warning, not the job's end.
func (c *control) exportMetrics(ctx context.Context, j job.Job, ps []job.Party) {
	var from []metrics.Source
	for _, p := range ps {
		from = append(from, metrics.Source{Site: p.Name, Path: filepath.Join(c.hub.logDir(j.ID, p.Name), logs.MetricsFile)})
	}
	out, err := metrics.Export(ctx, filepath.Join(c.hub.jobDir(j.ID), "results"), from)
	if err != nil {
		c.warn(ctx, "the metrics could not be exported, and are in the parties' logs/*/%s only: %v", logs.MetricsFile, err)
	}
	if out.Skipped > 0 {
		c.warn(ctx, "%d broken lines of the parties' %s were left out of the export", out.Skipped, logs.MetricsFile)
	}
	if out.Merged > 0 {
		c.warn(ctx, "there are so many runs that TensorBoard's files of some are in one folder, more-runs; %s has them apart", metrics.MetricsCSV)
	}
	if out.Dir != "" {
		c.hub.log.Info("metrics were exported", "job", j.ID, "records", out.Records, "dir", out.Dir)
	}
}

// warn adds a warning to the job's events. One that cannot be stored is in the hub's log.
func (c *control) warn(ctx context.Context, format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	c.hub.log.Warn(text, "job", c.id)
	e, err := job.NewEvent(c.id, "", job.KindWarning, job.Text{Message: text}, time.Now())
	if err == nil {
		_, _, err = c.hub.db.Append(ctx, e, 0)
	}
	if err != nil {
		c.hub.log.Error("a warning could not be stored", "job", c.id, "err", err)
	}
}
