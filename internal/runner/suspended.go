package runner

import (
	"context"
	"fmt"
	"os"
	"syscall"
	"time"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/proc"
)

// A program that somebody has stopped by a signal does nothing, and none of Flower's programs misses another that way: the
// job would wait for it until no-progress. After suspendPatience it is taken for dead; who stops one for a moment, to look
// at it or to have its memory written out, does no harm.
const (
	suspendPatience = 30 * time.Second
	suspendLook     = 3 * time.Second
)

// suspensions remembers since when processes are stopped.
type suspensions map[proc.Suspended]time.Time

// overdue takes in what is stopped now, and gives those that have been for patience.
func (s suspensions) overdue(found []proc.Suspended, now time.Time, patience time.Duration) []proc.Suspended {
	still := map[proc.Suspended]bool{}
	var out []proc.Suspended
	for _, p := range found {
		still[p] = true
		since, ok := s[p]
		if !ok {
			s[p] = now
		} else if now.Sub(since) >= patience {
			out = append(out, p)
		}
	}
	for p := range s {
		if !still[p] {
			delete(s, p)
		}
	}
	return out
}

// endSuspended kills the party's processes that have been stopped by a signal for suspendPatience, until ctx is done: what
// becomes of the party then is as after any kill.
func (r *runner) endSuspended(ctx context.Context) {
	seen := suspensions{}
	tick := time.NewTicker(suspendLook)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		found, err := proc.SuspendedBelow(os.Getpid())
		if err != nil {
			r.log.Warn("the party's processes cannot be looked at", "err", err)
			continue
		}
		for _, p := range seen.overdue(found, time.Now(), suspendPatience) {
			if !proc.Alive(p.Pid, p.Start) {
				continue
			}
			r.note(job.KindWarning, job.Text{Message: fmt.Sprintf("%s (process %d) at %s has been stopped by a signal (SIGSTOP) for %s and is ended", p.Name, p.Pid, r.spec.Party, suspendPatience)})
			// ESRCH: it went by itself in between.
			_ = syscall.Kill(p.Pid, syscall.SIGKILL)
		}
	}
}
