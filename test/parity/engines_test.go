package main

import (
	"flag"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

func TestMain(m *testing.M) {
	flag.Parse()
	// The slots decide how much goes on at once, not the number of cores: runs mostly wait.
	if err := flag.Set("test.parallel", "16"); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

var whole = flag.Bool("whole", false, "run the whole corpus on all versions, not on the newest one alone")

// subset has the entries that run on the other versions in `make test`: what differs between generations shows in these.
var subset = []string{"message-strategy", "stateful", "probe"}

// Each engine gives what was recorded of plain Flower. `make parity` runs all of it, plain Flower too.
func TestEngines(t *testing.T) {
	o, err := parse([]string{"--root", "..", "--recorded"}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	o.pergola = build(t)
	slots := make(chan struct{}, 3)
	idle := make(chan struct{}, 4) // for those that mostly wait
	if *whole {
		slots = make(chan struct{}, 2) // many start processes of Flower all the time, and some apps have time limits of their own
		idle = slots
	}
	for _, v := range slices.Backward(fidelity) {
		for _, e := range corpus {
			if !e.fits(v) {
				continue
			}
			engines := []string{nativeEngine}
			newest := v == fidelity[len(fidelity)-1]
			if !newest && !*whole && !slices.Contains(subset, e.name()) {
				continue
			}
			if newest && e.app == "probe" || *whole {
				engines = append(engines, flowerEngine)
			}
			for _, engine := range engines {
				t.Run(v+"/"+engine+"/"+e.name(), func(t *testing.T) {
					t.Parallel()
					pool := slots
					if e.slow {
						pool = idle
					}
					pool <- struct{}{}
					defer func() { <-pool }()
					o := o
					o.engines = []string{engine}
					dir := t.TempDir()
					c := o.cell(t.Context(), v, e, dir)
					t.Log(c)
					if !c.ok() {
						t.Errorf("not as plain Flower has it")
						logs(t, dir)
					}
				})
			}
		}
	}
}

// build builds the command, and looks at what it is built from: go test takes the outcome of an earlier run only if no file that a
// test has looked at has changed since.
func build(t *testing.T) string {
	t.Helper()
	for _, dir := range []string{"cmd", "internal", "go.mod"} {
		if err := filepath.WalkDir(filepath.Join("../..", dir), func(path string, d fs.DirEntry, err error) error {
			if err == nil && !d.IsDir() {
				_, err = os.Stat(path)
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	binary := filepath.Join(t.TempDir(), "pergola")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-buildvcs=false", "-trimpath", "-o", binary, "github.com/pergolafl/pergola/cmd/pergola")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("cannot build pergola: %v\n%s", err, out)
	}
	return binary
}

var showLogs sync.Mutex // one run's at a time

// logs shows the ends of a run's logs.
func logs(t *testing.T, dir string) {
	t.Helper()
	showLogs.Lock()
	defer showLogs.Unlock()
	if err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".log") {
			return nil //nolint:nilerr // a file that is gone has nothing to show
		}
		raw, err := os.ReadFile(path)
		if err == nil {
			t.Logf("%s:\n%s", path, tail(string(raw)))
		}
		return nil
	}); err != nil {
		t.Log(err)
	}
}
