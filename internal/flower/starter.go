package flower

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/proc"
)

// A supernode of newer versions (1.26 and later) has another program of its own start the client apps, and does not notice when
// that has ended: it takes messages and answers none.
const (
	programStarter = "flower-superexec"
	starterLook    = time.Second
	starterGone    = 5 * time.Second // for the supernode to end as well, or to start another
)

// starterOf gives the process that starts apps for the supernode or superlink with the given pid; 0 if there is none.
func starterOf(pid int) (starter int, start uint64) {
	for _, d := range proc.Descendants(pid) {
		comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", d)) // 15 bytes at most, see proc(5)
		if err != nil || strings.TrimSpace(string(comm)) != programStarter[:15] {
			continue
		}
		if at, err := proc.StartTime(d); err == nil {
			return d, at
		}
	}
	return 0, 0
}

// watchStarter ends the supernode when the program that starts its client apps was there and is no more.
func (c *Client) watchStarter(ctx context.Context) {
	tick := time.NewTicker(starterLook)
	defer tick.Stop()
	var pid int
	var start uint64
	var gone time.Time // since when it is no more
	for {
		select {
		case <-tick.C:
		case <-c.node.Done():
			return
		case <-ctx.Done():
			return
		}
		if pid != 0 && proc.Alive(pid, start) {
			continue
		}
		was := pid != 0 || !gone.IsZero()
		if pid, start = starterOf(c.node.Pid()); pid != 0 || !was {
			gone = time.Time{}
			continue
		}
		if gone.IsZero() {
			gone = time.Now()
		}
		if time.Since(gone) < starterGone {
			continue
		}
		c.mu.Lock()
		stopping := c.stopping
		if !stopping {
			c.lame = problem.New(problem.ProgramFailed, killedNext(ClientAppLog), "%s, which starts the supernode's client apps, ended unexpectedly", programStarter)
			c.lame.Log = ClientAppLog
		}
		c.mu.Unlock()
		if !stopping {
			c.node.Stop(0)
		}
		return
	}
}
