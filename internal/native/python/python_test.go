package python

import (
	"context"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pergolafl/pergola/internal/pyenv"
)

var everyVersion = flag.Bool("every-flwr", false, "run the Python tests on every supported version of flwr, not on three of them")

// The versions with which something that the Python side touches changed, and the newest. PERGOLA_TEST_FLWR names others.
var (
	few   = []string{"1.12.0", "1.21.0", "1.41.0"}
	every = []string{"1.12.0", "1.15.2", "1.18.0", "1.21.0", "1.30.0", "1.41.0"}
)

func environment(t *testing.T, req pyenv.Requirements) pyenv.Env {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	in, err := pyenv.Find(ctx, "")
	if err != nil {
		t.Fatal(err)
	}
	lock, err := pyenv.MakeLock(ctx, pyenv.DefaultCache(), in, req, pyenv.Options{})
	if err != nil {
		t.Fatal(err)
	}
	env, err := pyenv.Ensure(ctx, pyenv.DefaultCache(), in, lock, pyenv.Options{}, func(pyenv.Progress) {})
	if err != nil {
		t.Fatal(err)
	}
	return env
}

// The pytest suite passes on each version. pytest comes from an environment of its own beside the app's, which stays as a job has it.
func TestPython(t *testing.T) {
	versions := few
	if *everyVersion {
		versions = every
	}
	if list := os.Getenv("PERGOLA_TEST_FLWR"); list != "" {
		versions = strings.Split(list, ",")
	}
	found, err := filepath.Glob(filepath.Join(environment(t, pyenv.Requirements{Names: []string{"pytest"}}).Dir, "lib", "python*", "site-packages"))
	if err != nil || len(found) != 1 {
		t.Fatalf("the folder of pytest: %v, %v", found, err)
	}
	for i, version := range versions {
		t.Run(version, func(t *testing.T) {
			env := environment(t, pyenv.Requirements{Names: []string{"flwr>=1.12", "numpy"}, Flwr: version})
			// Behind the environment's own packages, so that those of the app are what is tested.
			code := "import sys; sys.path.append(sys.argv.pop(1)); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
			cmd := exec.CommandContext(t.Context(), env.Python, "-c", code, found[0], "-q", "-x", "--no-header", "-p", "no:cacheprovider", "tests")
			if !*everyVersion && i < len(versions)-1 {
				cmd.Args = append(cmd.Args, "-m", "not once")
			}
			cmd.Env = append(os.Environ(), "PYTHONDONTWRITEBYTECODE=1", "FLWR_TELEMETRY_ENABLED=0", "PERGOLA_EXPECT_FLWR="+version)
			cmd.WaitDelay = 10 * time.Second
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			lines := strings.Split(strings.TrimSpace(string(out)), "\n")
			t.Log(lines[len(lines)-1])
		})
	}
}
