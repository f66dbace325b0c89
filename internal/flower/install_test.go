package flower

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pergolafl/pergola/internal/problem"
)

func readHelp(t testing.TB, version, program string) map[string]option {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join("testdata", "help", version+"."+program+".txt"))
	if os.IsNotExist(err) {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	return parseHelp(string(raw))
}

func TestCapsFromRealHelp(t *testing.T) {
	for version, want := range map[string]struct {
		gen     Generation
		adapter bool
		wire    string
		flags   []string // of the site's program
	}{
		"1.8.0":  {GenModule, false, "gRPC", []string{"--server", "--dir"}},
		"1.9.0":  {GenModule, false, "gRPC", []string{"--superlink", "--dir"}},
		"1.10.0": {GenModule, true, "gRPC (adapter)", []string{"--superlink", "--dir", "--node-config"}},
		"1.12.0": {GenDriver, true, "gRPC (adapter)", []string{"--superlink", "--node-config", "--supernode-address"}},
		"1.15.2": {GenExec, true, "gRPC", []string{"--superlink", "--node-config", "--clientappio-api-address"}},
		"1.30.0": {GenControl, true, "gRPC", []string{"--superlink", "--node-config", "--clientappio-api-address"}},
		"1.34.0": {GenControl, true, "gRPC", []string{"--superlink", "--node-config", "--clientappio-api-address"}},
		"1.36.0": {GenRuntime, true, "gRPC", []string{"--superlink", "--node-config", "--host"}},
		"1.37.0": {GenMixed, true, "gRPC", []string{"--superlink", "--node-config", "--host"}},
		"1.41.0": {GenHTTP, false, "HTTP", []string{"--superlink", "--node-config", "--host"}},
	} {
		c, err := capsOf(readHelp(t, version, "flower-superlink"), readHelp(t, version, clientProgram(version)), readHelp(t, version, "flower-server-app"))
		if err != nil {
			t.Fatal(err)
		}
		if c.Generation != want.gen || c.GRPCAdapter != want.adapter || c.FleetWire() != want.wire {
			t.Errorf("%s: %s, adapter %v, wire %s", version, c.Generation, c.GRPCAdapter, c.FleetWire())
		}
		for _, flag := range append(want.flags, "--insecure") {
			if _, ok := c.Supernode[flag]; !ok {
				t.Errorf("%s: no %s", version, flag)
			}
		}
		if c.Superlink["--database"] != "DATABASE" || c.Superlink["--insecure"] != "" {
			t.Errorf("%s: arguments %q", version, c.Superlink)
		}
	}
}

func TestCapsOfOtherFlags(t *testing.T) {
	o := func(flags ...string) map[string]option {
		m := map[string]option{}
		for _, f := range flags {
			m[f] = option{}
		}
		return m
	}
	for _, c := range []struct {
		name      string
		superlink map[string]option
		want      Generation
	}{
		{"1.35: Control on its own port", o("--host", "--port", "--control-api-address", "--fleet-api-address"), GenRuntime},
		{"1.38 without the deprecated flag", o("--host", "--port", "--fleet-api-address"), GenMixed},
		{"the old flags are gone altogether", o("--host", "--port"), GenHTTP},
		{"none that is known", o("--listen"), 0},
		{"driver without its server app", o("--driver-api-address"), 0},
	} {
		got, err := capsOf(c.superlink, o("--superlink"), nil)
		if c.want == 0 {
			if err == nil || problem.From(err).Next == "" {
				t.Errorf("%s: %v", c.name, err)
			}
		} else if err != nil || got.Generation != c.want {
			t.Errorf("%s: %s, %v", c.name, got.Generation, err)
		}
	}
}

func TestJudge(t *testing.T) {
	for version, known := range map[string]bool{"1.41.0": true, "1.42.1": true, "1.12.0": true, "1.43.0": false, "2.0": false, "nightly": false} {
		i := Installation{Version: version, Caps: Caps{Generation: GenHTTP}}
		i.judge()
		if i.Known != known || (i.Warning == "") != known {
			t.Errorf("%s: known %v, %q", version, i.Known, i.Warning)
		}
	}
}

func TestRuntimeInstalls(t *testing.T) {
	const allow, forbid = "--allow-runtime-dependency-installation", "--disable-runtime-dependency-installation"
	for version, want := range map[string][2]string{"1.12.0": {"", ""}, "1.30.0": {"", allow}, "1.34.0": {forbid, ""}, "1.41.0": {forbid, ""}} {
		flags := args(readHelp(t, version, "flower-superlink"))
		for i, wanted := range []bool{false, true} {
			if got := strings.Join(runtimeInstalls(flags, wanted), " "); got != want[i] {
				t.Errorf("%s, wanted %v: %q, want %q", version, wanted, got, want[i])
			}
		}
	}
	// A supernode installs nothing unless it is allowed to.
	if got := runtimeInstalls(args(readHelp(t, "1.41.0", "flower-supernode")), false); got != nil {
		t.Errorf("%q", got)
	}
}

// What cannot run is refused by its version alone.
func TestSupported(t *testing.T) {
	for version, c := range map[string]struct{ runs, config bool }{
		"1.7.0": {false, false}, "0.18.0": {false, false}, "1.8.0": {true, false}, "1.10.0": {true, false}, "1.11.1": {true, true}, "1.41.0": {true, true}, "2.0": {true, true}, "nightly": {true, true},
	} {
		err := Supported(version)
		if (err == nil) != c.runs || err != nil && (problem.CodeOf(err) != problem.FlwrUnavailable || !strings.Contains(err.Error(), "the oldest that Pergola runs is 1.8")) {
			t.Errorf("%s: %v", version, err)
		}
		err = TakesConfig(version, []string{"a=1"})
		if (err == nil) != c.config || err != nil && problem.CodeOf(err) != problem.Usage {
			t.Errorf("%s with a run config: %v", version, err)
		}
		if err := TakesConfig(version, nil); err != nil {
			t.Errorf("%s without: %v", version, err)
		}
	}
}

func TestProbeRefuses(t *testing.T) {
	dir := t.TempDir()
	if _, err := Probe(t.Context(), Env{Bin: dir}, ""); problem.CodeOf(err) != problem.ProgramFailed || !strings.Contains(err.Error(), "-m pip install --force-reinstall flwr") {
		t.Errorf("nothing installed: %v", err)
	}
	for _, name := range []string{"flower-superlink", "flower-supernode"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\necho broken >&2; exit 3\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := Probe(t.Context(), Env{Bin: dir}, ""); problem.CodeOf(err) != problem.ProgramFailed || !strings.Contains(err.Error(), "not an executable") {
		t.Errorf("not executable: %v", err)
	}
	for _, name := range []string{"flower-superlink", "flower-supernode"} {
		if err := os.Chmod(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	python := filepath.Join(dir, "python")
	if err := os.WriteFile(python, []byte("#!/bin/sh\necho 1.99.0\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := Probe(t.Context(), Env{Bin: dir, Python: python}, ""); problem.CodeOf(err) != problem.ProgramFailed || !strings.Contains(err.Error(), "exit code 3") || !strings.Contains(err.Error(), "broken") {
		t.Errorf("broken: %v", err)
	}
}

// An unknown newer version is used as its flags suggest, with a warning; the answer is cached until a
// program changes.
func TestProbeCaches(t *testing.T) {
	dir := t.TempDir()
	count := filepath.Join(dir, "count")
	script := func(text string) {
		for _, name := range []string{"flower-superlink", "flower-supernode"} {
			body := "#!/bin/sh\necho x >> " + count + "\ncat <<'X'\noptions:\n  --host HOST  Host.\n  --port PORT\n               Port.\n  --superlink S\n" + text + "X\n"
			if err := os.WriteFile(filepath.Join(dir, name), []byte(body), 0o755); err != nil {
				t.Fatal(err)
			}
		}
	}
	script("")
	python := filepath.Join(dir, "python")
	if err := os.WriteFile(python, []byte("#!/bin/sh\necho 1.99.0\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	cache := filepath.Join(dir, "probe.json")
	asked := func() int {
		raw, err := os.ReadFile(count)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Count(string(raw), "x")
	}
	for range 2 {
		inst, err := Probe(t.Context(), Env{Bin: dir, Python: python}, cache)
		if err != nil {
			t.Fatal(err)
		}
		if inst.Version != "1.99.0" || inst.Known || inst.Warning == "" || inst.Caps.Generation != GenHTTP || inst.Python != python {
			t.Errorf("%+v", inst)
		}
	}
	if n := asked(); n != 2 {
		t.Errorf("%d programs were asked, want 2 once", n)
	}
	script("  --new-flag\n")
	if inst, err := Probe(t.Context(), Env{Bin: dir, Python: python}, cache); err != nil || asked() != 4 {
		t.Errorf("after a change: %v, %v, asked %d", inst, err, asked())
	} else if _, ok := inst.Caps.Superlink["--new-flag"]; !ok {
		t.Error("the old answer was used")
	}
	if err := os.WriteFile(cache, []byte("{broken"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Probe(t.Context(), Env{Bin: dir, Python: python}, cache); err != nil || asked() != 6 {
		t.Errorf("after a damaged cache: %v, asked %d", err, asked())
	}
}

// What is parsed is a flag with dashes in front.
func FuzzParseHelp(f *testing.F) {
	files, err := filepath.Glob("testdata/help/*.txt")
	if err != nil {
		f.Fatal(err)
	}
	for _, name := range files {
		raw, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(raw))
	}
	f.Fuzz(func(t *testing.T, text string) {
		for flag := range parseHelp(text) {
			if !strings.HasPrefix(flag, "-") || strings.ContainsAny(flag, " \n=") {
				t.Errorf("flag %q", flag)
			}
		}
	})
}
