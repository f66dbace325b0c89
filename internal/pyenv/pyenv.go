// Package pyenv makes the Python environments that jobs run in. It finds an interpreter ([Find]), turns an app's
// dependencies into a lock that every site shares ([MakeLock]), and installs a lock into a cache that is keyed by the
// lock, the interpreter and the platform ([Ensure]). A site that brings an interpreter of its own has it looked at, and
// never changed, by [Existing].
//
// An environment is built once, in its final place, under a file lock; it counts only when its marker file, written
// last, is there. So builders may be killed at any moment and wait for one another across processes. Work is done by uv
// where it is present or can be had as a wheel, else by venv and pip; both always leave bytecode behind, without which
// every process of Flower takes seconds longer to start.
//
// It does not read pyproject.toml, does not run Flower, never installs into an interpreter it was given and never
// downloads Python itself. Start with [Ensure].
package pyenv

import (
	"errors"
	"os"
	"path/filepath"

	"github.com/pergolafl/pergola/internal/problem"
)

// Interpreter is a Python that can carry environments.
type Interpreter struct {
	Path     string `json:"path"`     // absolute; symlinks are kept, since a virtual environment's python is one
	Real     string `json:"real"`     // Path with all symlinks followed
	Version  string `json:"version"`  // "3.11.7"
	Platform string `json:"platform"` // sysconfig's platform and the ABI: "linux-x86_64-cpython-311-x86_64-linux-gnu"
}

// Options say how to resolve and install.
type Options struct {
	Installer string            // "uv", "pip", or "" for uv where it can be had, else pip
	Fresh     bool              // resolve again although a recent lock is cached
	ExtraEnv  []string          // "K=V" added to this process's environment for every program that is run
	Log       func(line string) // gets each line that the installer prints; nil is fine
}

func (o Options) log(line string) {
	if o.Log != nil {
		o.Log(line)
	}
}

// ErrIndex is in the chain of an error when a package index, or the way to it, failed: the same call may succeed later.
// Without it, the request itself cannot be met.
var ErrIndex = errors.New("the package index could not be reached")

// DefaultCache gives the folder that environments, locks and what was learned of interpreters are kept in:
// $PERGOLA_CACHE, or pergola below $XDG_CACHE_HOME or ~/.cache.
func DefaultCache() string {
	if dir := os.Getenv("PERGOLA_CACHE"); dir != "" {
		return dir
	}
	// The XDG specification has relative values ignored.
	if dir := os.Getenv("XDG_CACHE_HOME"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "pergola")
	}
	if home, err := os.UserHomeDir(); err == nil && home != "" {
		return filepath.Join(home, ".cache", "pergola")
	}
	return filepath.Join(os.TempDir(), "pergola-cache")
}

func installerKnown(name string) error {
	known := []string{"uv", "pip"}
	switch name {
	case "", "uv", "pip":
		return nil
	}
	return problem.New(problem.Usage, "use uv or pip, or leave it out", "no installer is named %q%s", name, problem.DidYouMean(name, known))
}
