package pyenv

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/pergolafl/pergola/internal/problem"
)

// The texts are those of uv 0.13.9 and pip 23.2.1.
func TestFailuresOfResolversAreUnderstood(t *testing.T) {
	in := Interpreter{Path: "/usr/bin/python3", Version: "3.10.13"}
	for _, c := range []struct {
		name, said string
		code       problem.Code
		index      bool
		offered    []string
		words      []string
	}{
		{
			"uv: no such version of flwr", "error: No solution found when resolving dependencies\n  cause: Because there is no version of flwr==9.9.9 and you require flwr==9.9.9, we can conclude that your requirements are unsatisfiable.",
			problem.FlwrUnavailable, false, nil,
			[]string{"there is no flwr==9.9.9"},
		},
		{
			"uv folds and draws", "  × No solution found when resolving dependencies:\n  ╰─▶ Because there is no version of\n      flwr[foo]==9.9 and you require flwr[foo]==9.9, we can conclude that\n      your requirements are unsatisfiable.",
			problem.FlwrUnavailable, false, nil,
			[]string{"there is no flwr[foo]==9.9"},
		},
		{
			"uv: above the newest", "  cause: Because only flwr<=1.42.0 is available and you require flwr>=1.50, we can conclude that your requirements are unsatisfiable.",
			problem.FlwrUnavailable, false,
			[]string{"1.42.0"},
			[]string{"there is no flwr>=1.50", "the nearest is 1.42.0"},
		},
		{
			"uv: no such version of another", "Because only numpy<=2.5.5 is available and you require numpy>=99, we can conclude that your requirements are unsatisfiable.",
			problem.DependencyMissing, false,
			[]string{"2.5.5"},
			[]string{"there is no numpy>=99"},
		},
		{
			"uv: what flwr needs is not there", "  cause: Because only certifi<=2026.10.18 is available and flwr>=1.42.0 depends on certifi>=2026.10.19, we can conclude that flwr>=1.42.0 cannot be used.\n         And because you require flwr==1.42.0, we can conclude that your requirements are unsatisfiable.",
			problem.FlwrUnavailable, false,
			[]string{"2026.10.18"},
			[]string{"flwr>=1.42.0 cannot be installed", "certifi>=2026.10.19"},
		},
		{
			"uv: no such package", "  cause: Because flwrzzzq was not found in the package registry and you require flwrzzzq, we can conclude that your requirements are unsatisfiable.",
			problem.DependencyMissing, false, nil,
			[]string{`no package named "flwrzzzq"`},
		},
		{
			"uv: not among the wheels", "Because flwr was not found in the provided package locations and you require flwr, we can conclude that your requirements are unsatisfiable.",
			problem.FlwrUnavailable, false, nil,
			[]string{"no flwr"},
		},
		{
			"uv: another Python", "  cause: Because the current Python version (3.10.13) does not satisfy Python>=3.11,<4.0 and flwr==1.41.0 depends on Python>=3.11,<4.0, we can conclude that flwr==1.41.0 cannot be used.",
			problem.FlwrUnavailable, false, nil,
			[]string{"flwr==1.41.0 needs Python >=3.11,<4.0", "3.10.13"},
		},
		{
			"uv: contradiction", "error: No solution found when resolving dependencies\n  cause: Because flwr==1.30.0 depends on protobuf>=5.28.0,<7.0.0 and you require flwr==1.30.0, we can conclude that you require protobuf>=5.28.0,<7.0.0.\n         And because you require protobuf<3, we can conclude that your requirements are unsatisfiable.",
			problem.EnvBuildFailed, false, nil,
			[]string{"cannot be met together", "protobuf<3"},
		},
		{
			"uv: nobody answers", "error: Request failed after 3 retries in 9.8s\n  cause: Failed to fetch: https://127.0.0.1:1/simple/flwr/\n  cause: tcp connect error\n  cause: Connection refused (os error 111)",
			problem.EnvBuildFailed, true, nil,
			[]string{"index could not be asked"},
		},
		{
			"uv: offline", "  cause: Because flwr was not found in the cache and you require flwr==1.30.0, we can conclude that your requirements are unsatisfiable.\n\nhint: Packages were unavailable because the network was disabled. When the network is disabled, registry packages may only be read from the cache.",
			problem.EnvBuildFailed, true, nil, nil,
		},
		{"uv: disk full", "error: Failed to write to the client cache\n  cause: No space left on device (os error 28)", problem.DiskFull, false, nil, nil},
		{
			"pip: no such version of flwr", "ERROR: Could not find a version that satisfies the requirement flwr==9.9.9 (from versions: 0.1.0, 1.30.0, 1.42.0)\nERROR: No matching distribution found for flwr==9.9.9",
			problem.FlwrUnavailable, false,
			[]string{"0.1.0", "1.30.0", "1.42.0"},
			[]string{"there is no flwr==9.9.9"},
		},
		{
			"pip: no such package", "ERROR: Could not find a version that satisfies the requirement flwrzzzq (from versions: none)\nERROR: No matching distribution found for flwrzzzq",
			problem.DependencyMissing, false, nil,
			[]string{`"flwrzzzq"`},
		},
		{
			"pip: what flwr needs is not there", "ERROR: Could not find a version that satisfies the requirement certifi>=2026.10.19 (from flwr) (from versions: 1.0, 2026.10.18)",
			problem.FlwrUnavailable, false,
			[]string{"1.0", "2026.10.18"},
			[]string{"flwr cannot be installed", "certifi>=2026.10.19"},
		},
		{
			"pip: another Python", "ERROR: Ignored the following versions that require a different python version: 1.41.0 Requires-Python <4.0,>=3.11; 1.42.0 Requires-Python <4.0,>=3.11\nERROR: Could not find a version that satisfies the requirement flwr==1.41.0 (from versions: 1.30.0)",
			problem.FlwrUnavailable, false,
			[]string{"1.30.0"},
			[]string{"flwr==1.41.0 needs Python <4.0,>=3.11"},
		},
		{
			"pip: nobody answers", "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError('Failed to establish a new connection: [Errno 111] Connection refused')': /simple/flwr/\nERROR: Could not find a version that satisfies the requirement flwr (from versions: none)",
			problem.EnvBuildFailed, true, nil, nil,
		},
		{"pip: contradiction", "ERROR: Cannot install flwr==1.30.0 and protobuf<3 because these package versions have conflicting dependencies.\nERROR: ResolutionImpossible: for help visit", problem.EnvBuildFailed, false, nil, []string{"cannot be met together"}},
		{"a build from source", "error: Failed to build `pycurl==7.43.0`\n  cause: The build backend returned an error", problem.EnvBuildFailed, false, nil, []string{"pycurl could not be built"}},
		{"anything else", "thread 'main' panicked", problem.EnvBuildFailed, false, nil, []string{"panicked"}},
		{"nothing", "", problem.EnvBuildFailed, false, nil, nil},
	} {
		f := classify(c.said)
		err := f.resolveFailed("/cache", in)
		if problem.CodeOf(err) != c.code || errors.Is(err, ErrIndex) != c.index {
			t.Errorf("%s: got %s (%s), index %v: %v", c.name, problem.CodeOf(err), f.kind, errors.Is(err, ErrIndex), err)
		}
		if !slices.Equal(f.offered, c.offered) {
			t.Errorf("%s: offered %q, want %q", c.name, f.offered, c.offered)
		}
		for _, w := range c.words {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%s: %q lacks %q", c.name, err, w)
			}
		}
		if problem.From(err).Next == "" {
			t.Errorf("%s: nothing says what to do", c.name)
		}
	}
}

func TestFailuresOfInstallers(t *testing.T) {
	for said, code := range map[string]problem.Code{
		"error: Failed to download `six==1.16.0`\n  cause: Hash mismatch for `six==1.16.0`": problem.EnvBuildFailed,
		"ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.":         problem.EnvBuildFailed,
		"OSError: [Errno 28] No space left on device":                                       problem.DiskFull,
		"": problem.EnvBuildFailed,
	} {
		if err := installFailed(result{stderr: said}, "/cache", "it"); problem.CodeOf(err) != code {
			t.Errorf("%q became %v", said, err)
		}
	}
}

func TestNearestOf(t *testing.T) {
	offered := []string{"1.9.0", "1.30.0", "1.10.0", "1.31.0", "junk"}
	for want, near := range map[string][]string{"1.30.7": {"1.30.0", "1.31.0"}, "9": {"1.31.0"}, "0.1": {"1.9.0"}, "": {"1.31.0"}} {
		if got := nearestOf(want, offered); !slices.Equal(got, near) {
			t.Errorf("nearestOf(%q) = %q, want %q", want, got, near)
		}
	}
}
