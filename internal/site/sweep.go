package site

import (
	"os"
	"path/filepath"
	"sync"

	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/runner"
)

// sweepLocked ends what jobs have left that were over before this agent began: nobody told their runners. It is done when
// the hub has said for the first time what it wants.
func (a *Agent) sweepLocked(wg *sync.WaitGroup) {
	es, err := os.ReadDir(filepath.Join(a.dir, "jobs"))
	if err != nil {
		a.log.Error("the jobs' folders cannot be read", "err", err)
		return
	}
	for _, e := range es {
		id, err := job.ParseID(e.Name())
		if err != nil || a.parts[id] != nil || a.last[id] != nil {
			continue
		}
		p := newPart(a, id, &pb.DesiredParty{Attempt: int32(runner.AttemptIn(filepath.Join(a.jobDir(id), "party")))})
		a.last[id] = p // should the hub want the job again, that waits for this
		wg.Go(func() {
			defer close(p.ended)
			p.log.Info("a job of which the hub wants nothing more has left something: it is taken away")
			p.clear()
			a.mu.Lock()
			defer a.mu.Unlock()
			if a.last[id] == p {
				delete(a.last, id)
			}
		})
	}
}
