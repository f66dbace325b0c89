package proc

import (
	"context"
	"os/exec"
	"sync"
	"testing"
)

// What this process starts by itself, without this package, is nobody's remains, also while it is being born: then it holds all
// descriptors that this process has, the output of programs among them.
func TestOthersAreBorn(t *testing.T) {
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for ctx.Err() == nil {
				if out, err := exec.CommandContext(t.Context(), "echo", "born").Output(); err != nil || string(out) != "born\n" {
					t.Errorf("a process that has nothing to do with others said %q and ended with %v", out, err)
					return
				}
			}
		})
	}
	for range 100 {
		p, err := Start(Spec{Name: "short", Args: sh(`exit 0`)})
		if err != nil {
			t.Error(err)
			break
		}
		<-p.Done()
	}
	stop()
	wg.Wait()
}
