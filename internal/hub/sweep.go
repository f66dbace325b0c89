package hub

import (
	"context"
	"os"
	"path/filepath"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/runner"
)

// mark is in the environment of the programs of the hub's party in a job.
func (h *Hub) mark(id job.ID) string { return h.conf.Mark + "-" + string(id) + "-" + job.HubParty }

// sweep takes away what there may be of the hub's party in a job that is over; the runner's log stays.
func (h *Hub) sweep(id job.ID) {
	if err := runner.Sweep(h.partyDir(id), h.mark(id)); err != nil {
		h.log.Error("what is left of a job's runner could not be removed", "job", id, "err", err)
	}
}

// sweepAll does so for all jobs: an earlier hub may have ended between a job's end and that of its runner. Jobs that go on
// have controllers; jobs that the store does not know have nobody.
func (h *Hub) sweepAll(ctx context.Context) {
	es, err := os.ReadDir(filepath.Join(h.dir, "jobs"))
	if err != nil {
		h.log.Error("the jobs' folders cannot be read", "err", err)
		return
	}
	for _, e := range es {
		id, err := job.ParseID(e.Name())
		if err != nil || ctx.Err() != nil {
			continue // nothing of ours
		}
		j, err := h.db.Job(ctx, id)
		if err == nil && j.State.Terminal() || problem.CodeOf(err) == problem.NotFound {
			h.sweep(id)
		}
	}
}
