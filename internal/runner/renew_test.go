package runner

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/problem"
)

// What there is of a party goes, except for its runner's log; whether or not anybody noted which process its runner is.
func TestSweep(t *testing.T) {
	for _, c := range []struct {
		name   string
		before func(dir string) error
	}{
		{"of a runner that goes on", func(string) error { return nil }},
		{"of one that nobody has noted", func(dir string) error { return os.Remove(filepath.Join(dir, runnerFile)) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir, spec, pidFile := party(t)
			h := start(t, dir, spec)
			child := asked(t, pidFile)
			tmp := TempDir(dir)
			if err := c.before(dir); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if err := Sweep(dir, spec.Mark); err != nil {
					t.Fatal(err)
				}
			}
			<-h.Gone()
			gone(t, child)
			if _, err := os.Stat(tmp); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("%s is left: %v", tmp, err)
			}
			es, err := os.ReadDir(dir)
			if err != nil || len(es) != 1 || es[0].Name() != outputFile {
				t.Errorf("left are %v, %v", es, err)
			}
		})
	}
}

// A runner of which nobody has noted which process it is does not run beside the next one.
func TestStartEndsAForsakenRunner(t *testing.T) {
	dir, spec, pidFile := party(t)
	first := start(t, dir, spec)
	child := asked(t, pidFile)
	for _, name := range []string{runnerFile, journalFile} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	second := start(t, dir, spec)
	<-first.Gone()
	gone(t, child)
	if n := asked(t, pidFile); n == child {
		t.Error("the second runner has the first one's program")
	}
	if h, err := Attach(dir); err != nil || h.Pid() != second.Pid() {
		t.Errorf("attached to %v, %v; want %d", h, err, second.Pid())
	}
}

// A signal from outside is no wish: the party has failed, and says so.
func TestARunnerThatIsSignalledSaysSo(t *testing.T) {
	dir, spec, pidFile := party(t)
	h := start(t, dir, spec)
	asked(t, pidFile)
	k := &told{t: t}
	var cause *job.Cause
	if err := h.Keep(within(t), 0, spec.Mark, NewWant(), func(e Entry) error {
		if e.Seq == 1 {
			if err := syscall.Kill(h.Pid(), syscall.SIGTERM); err != nil {
				t.Error(err)
			}
		}
		if c, final := e.Final(); final {
			cause = c.Cause
		}
		return k.add(e)
	}); err != nil {
		t.Fatal(err)
	}
	if k.states() != "preparing, failed hub-runner-died" || cause == nil || cause.Code != problem.HubRunnerDied || !strings.Contains(cause.Msg, "from outside") {
		t.Errorf("the states are %s, the cause %+v", k.states(), cause)
	}
}

// A runner of an earlier boot is not whatever has its pid now.
func TestAttachAfterABoot(t *testing.T) {
	dir, spec, pidFile := party(t)
	h := start(t, dir, spec)
	asked(t, pidFile)
	id := h.id
	id.Boot = "another"
	if err := writeFile(filepath.Join(dir, runnerFile), id); err != nil {
		t.Fatal(err)
	}
	old, err := Attach(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer old.Release()
	<-old.Gone()
	old.Kill()
	select {
	case <-h.Gone():
		t.Error("somebody else's process was killed")
	default:
	}
}
