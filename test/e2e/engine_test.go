package e2e

import (
	"context"
	"fmt"
	"io/fs"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/localrun"
	"github.com/pergolafl/pergola/internal/pyenv"
)

// newest is the newest flwr that the tests use; oldest has the driver API.
const (
	oldest = "1.12.0"
	newest = "1.41.0"
)

// tinyRounds are the numbers of test/apps/tiny with two sites: client p adds 1 + p to each of four zeros per round, so
// that the mean grows by 1.5 a round and the sum by 6.
var tinyRounds = []localrun.RoundMetrics{
	{Round: 1, Phases: map[string]job.Values{"train": {"sum": 0}, "evaluate": {"loss": 6, "accuracy": 1. / 7}}},
	{Round: 2, Phases: map[string]job.Values{"train": {"sum": 6}, "evaluate": {"loss": 12, "accuracy": 1. / 13}}},
}

// The same app gives the same numbers with the programs of every generation.
func TestVersions(t *testing.T) {
	t.Parallel()
	for _, v := range []string{oldest, "1.18.0", "1.30.0", newest} {
		t.Run(v, func(t *testing.T) {
			t.Parallel()
			home := poisonedHome(t, v == oldest || v == "1.18.0")
			before := listTree(t, home)
			r := start(t, spec{app: "tiny", args: []string{"--flwr", v}, env: []string{
				"HOME=" + home, "PERGOLA_CACHE=" + pyenv.DefaultCache(), "XDG_DATA_HOME=", "FLWR_TELEMETRY_ENABLED=1", "PYENV_ROOT=" + pyenvRoot(),
			}})
			r.round(1)
			environs := r.flowerEnvirons()
			res := r.end()
			r.succeeded(res, v, 2)
			for path, is := range listTree(t, filepath.Join(home, ".flwr")) {
				if before[path] != is {
					t.Errorf("the user's %s was %q, is %q", path, before[path], is)
				}
			}
			if len(environs) < 3 {
				t.Errorf("the environments of %d programs were seen, want a superlink's and two supernodes'", len(environs))
			}
			for who, env := range environs {
				if !strings.Contains(env["FLWR_HOME"], r.out) && !strings.Contains(env["FLWR_HOME"], r.tmp) || env["FLWR_TELEMETRY_ENABLED"] != "0" {
					t.Errorf("%s has FLWR_HOME=%q and FLWR_TELEMETRY_ENABLED=%q", who, env["FLWR_HOME"], env["FLWR_TELEMETRY_ENABLED"])
				}
			}
			sameRounds(t, res.Summary.Rounds, tinyRounds)
			r.cleanLogs()
			for _, a := range r.listened() {
				addr, who, _ := strings.Cut(a, " ")
				if !plain(t, addr).Addr().IsLoopback() {
					t.Errorf("%s listens at %s", who, addr)
				}
			}
		})
	}
}

// troubled finds a line that tells of an error: a level word of Flower's or of Pergola's own logs, or Python's last words.
var troubled = regexp.MustCompile(`(?m)^.*(?:\b(?:ERROR|CRITICAL|FATAL)\b|Traceback \(most recent call last\)|level=(?:ERROR|WARN)|^(?:[\w.]+\.)?\w+(?:Error|Exception)\b|raised an exception|StatusCode\.).*$`)

var colours = regexp.MustCompile("\x1b\\[[0-9;]*m")

// troubles gives the lines of a log that tell of errors.
func troubles(log string) []string {
	return troubled.FindAllString(colours.ReplaceAllString(log, ""), 5)
}

// cleanLogs checks that no program and no part of Pergola has an error in its log.
func (r *run) cleanLogs() {
	r.t.Helper()
	seen := 0
	err := filepath.WalkDir(filepath.Join(r.out, "logs"), func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || d.Name() == "environment_log.txt" {
			return err // what installers say is theirs
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		seen++
		if bad := troubles(string(b)); len(bad) > 0 {
			r.t.Errorf("a good run has errors in logs/%s:\n%s\nthe log:\n%s", d.Name(), strings.Join(bad, "\n"), b)
		}
		return nil
	})
	if want := 4 + 3*2; err != nil || seen < want {
		r.t.Errorf("%d logs were looked through, want at least %d (%v)", seen, want, err)
	}
}

func TestTroubled(t *testing.T) {
	for line, want := range map[string]bool{
		"\x1b[91mERROR\x1b[0m :     something":                      true,
		"ERROR :      ServerApp":                                    true,
		"Traceback (most recent call last):":                        true,
		"grpc._channel._InactiveRpcError: <_InactiveRpcError of":    true,
		"KeyboardInterruptException":                                true,
		"time=x level=ERROR msg=y":                                  true,
		"\tstatus = StatusCode.UNAVAILABLE":                         true,
		"INFO :      aggregate_fit: received 2 results, 0 failures": false,
		"time=x level=INFO msg=y":                                   false,
	} {
		if got := len(troubles(line)) > 0; got != want {
			t.Errorf("%q: %v, want %v", line, got, want)
		}
	}
}

// poisonedHome is a home with a ~/.flwr on which every program of Flower that reads it fails. Old releases do read one file of it,
// wherever FLWR_HOME is and even without telemetry: the id that they would report (flwr/common/telemetry.py, _get_source_id).
func poisonedHome(t *testing.T, old bool) string {
	t.Helper()
	home := t.TempDir()
	dir := filepath.Join(home, ".flwr")
	if err := os.MkdirAll(filepath.Join(dir, "apps"), 0o700); err != nil {
		t.Fatal(err)
	}
	files := map[string]string{"config.toml": "[superlink\ndefault = ]\n", "state.db": "not a database", "source": "\xff\xfe"}
	if old {
		files["source"] = "3c1f0a51-6d9e-4f39-9d0c-5a8f3f1c7a55"
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return home
}

// pyenvRoot keeps shims of pyenv, where python3 is one, working with another HOME.
func pyenvRoot() string {
	if root := os.Getenv("PYENV_ROOT"); root != "" {
		return root
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return ""
	}
	return filepath.Join(home, ".pyenv")
}

// flowerEnvirons gives the environments of the run's superlink and supernodes, by their command and pid.
func (r *run) flowerEnvirons() map[string]map[string]string {
	found := map[string]map[string]string{}
	for _, p := range r.processes() {
		at := slices.IndexFunc(p.args, func(a string) bool { return strings.HasPrefix(filepath.Base(a), "flower-super") })
		if at < 0 {
			continue
		}
		raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", p.pid))
		if err != nil {
			continue // it has ended
		}
		env := map[string]string{}
		for kv := range strings.SplitSeq(string(raw), "\x00") {
			k, v, _ := strings.Cut(kv, "=")
			env[k] = v
		}
		found[fmt.Sprintf("%s %d", filepath.Base(p.args[at]), p.pid)] = env
	}
	return found
}

// Apps in the styles of older versions run with the oldest and, where Flower's programs take them, with newer ones.
func TestOldStyles(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ app, flwr string }{
		{"tiny-components", oldest}, {"tiny-modules", oldest}, {"tiny-components", newest}, {"tiny-modules", newest},
	} {
		t.Run(c.app+" with "+c.flwr, func(t *testing.T) {
			t.Parallel()
			r := start(t, spec{app: c.app, args: []string{"--flwr", c.flwr}})
			res := r.end()
			r.succeeded(res, c.flwr, 2)
			sameRounds(t, res.Summary.Rounds, tinyRounds)
		})
	}
}

func TestQuickstart(t *testing.T) {
	t.Parallel()
	r := start(t, spec{app: filepath.Join(apps, "..", "..", "examples", "quickstart"), args: []string{"--run-config", "num-server-rounds=2 model-path='final.npz'"}})
	res := r.end()
	r.succeeded(res, "", 2)
	if n := len(res.Summary.Rounds); n != 2 {
		t.Fatalf("metrics of %d rounds, want 2: %+v", n, res.Summary.Rounds)
	}
	for _, round := range res.Summary.Rounds {
		for _, phase := range []string{"train", "evaluate"} {
			if len(round.Phases[phase]) == 0 {
				t.Errorf("round %d has no metrics of phase %s: %+v", round.Round, phase, round.Phases)
			}
		}
	}
	if acc := res.Summary.Rounds[1].Phases["evaluate"]["accuracy"]; acc < 0.8 || acc > 1 {
		t.Errorf("the accuracy is %v, want one of a model that has learned: %+v", acc, res.Summary.Rounds)
	}
	if fi, err := os.Stat(filepath.Join(r.out, "results", "final.npz")); err != nil || fi.Size() == 0 {
		t.Errorf("what the server app wrote is not in results: %v", err)
	}
}

// Each site gets its place among the sites, the app's folder as working directory, the variables of --site-env, and the overrides of --run-config.
func TestWhatClientsGet(t *testing.T) {
	t.Parallel()
	r := start(t, spec{app: "look", args: []string{
		"--flwr", oldest, "--sites", "3", "--site-env", "LOOK=42.5", "--run-config", "clients=3", "--run-config", "num-server-rounds=2",
	}})
	res := r.end()
	r.succeeded(res, oldest, 2)
	evaluate := job.Values{"loss": 0}
	for p := range 3 {
		evaluate[fmt.Sprintf("partitions-%d", p)] = 3
		evaluate[fmt.Sprintf("look-%d", p)] = 42.5
	}
	var want []localrun.RoundMetrics
	for n := 1; n <= 2; n++ {
		want = append(want, localrun.RoundMetrics{Round: n, Phases: map[string]job.Values{"train": {"clients": 3}, "evaluate": evaluate}})
	}
	sameRounds(t, res.Summary.Rounds, want)
	for i, site := range res.Summary.Sites {
		b, err := os.ReadFile(filepath.Join(r.out, "logs", site, "client_app_log.txt"))
		if err != nil {
			t.Error(err)
		} else if line := fmt.Sprintf("LOOK partition %d of 3, found below config", i); !strings.Contains(string(b), line) {
			t.Errorf("the log of %s lacks %q:\n%s", site, line, b)
		}
	}
}

// Newer versions of `flwr run` move [tool.flwr.federations] out of the pyproject.toml that they find; the user's stays as
// it is (the harness compares). The folder's name has what shells and URLs trip over.
func TestFederationsStay(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "my app's #1 %41")
	if err := os.CopyFS(dir, os.DirFS(filepath.Join(apps, "tiny"))); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "pyproject.toml")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b = append(b, "\n[tool.flwr.federations]\ndefault = \"local-simulation\"\n\n[tool.flwr.federations.local-simulation]\noptions.num-supernodes = 10\n\n[tool.flwr.federations.remote]\naddress = \"127.0.0.1:1\"\ninsecure = true\n"...)
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	home := t.TempDir() // Flower would put them into its own configuration
	r := start(t, spec{app: dir, args: []string{"--flwr", newest, "--run-config", "num-server-rounds=1"}, env: []string{"FLWR_HOME=" + home, "FLWR_TELEMETRY_ENABLED=0"}})
	res := r.end()
	r.succeeded(res, newest, 1)
	sameRounds(t, res.Summary.Rounds, tinyRounds[:1])
	es, err := os.ReadDir(home)
	if err != nil || len(es) > 0 {
		t.Errorf("the user's own FLWR_HOME has %v (%v), want nothing of this run", es, err)
	}
}

// Two runs with different versions go on at the same time: each waits in its first round until the other is there.
func TestTwoVersionsAtOnce(t *testing.T) {
	t.Parallel()
	if cap(slots) < 2 {
		t.Skip("only one run may go on at a time")
	}
	dir := t.TempDir()
	var rs []*run
	for i, v := range []string{oldest, "1.30.0"} {
		rs = append(rs, start(t, spec{app: "look", args: []string{"--flwr", v, "--site-env", "GATE=" + filepath.Join(dir, "gate")}, pair: i > 0}))
	}
	for _, r := range rs {
		r.round(1)
	}
	if err := os.WriteFile(filepath.Join(dir, "gate"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for i, v := range []string{oldest, "1.30.0"} {
		res := rs[i].end()
		rs[i].succeeded(res, v, 1)
	}
}

// environment gives the cached environment of test/apps/tiny with that flwr.
func environment(t *testing.T, flwr string) pyenv.Env {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	in, err := pyenv.Find(ctx, "")
	if err != nil {
		t.Fatal(err)
	}
	lock, err := pyenv.MakeLock(ctx, pyenv.DefaultCache(), in, pyenv.Requirements{Names: []string{"flwr>=1.12", "numpy"}, Flwr: flwr}, pyenv.Options{})
	if err != nil {
		t.Fatal(err)
	}
	env, err := pyenv.Ensure(ctx, pyenv.DefaultCache(), in, lock, pyenv.Options{}, func(pyenv.Progress) {})
	if err != nil {
		t.Fatal(err)
	}
	return env
}

// copyEnvironment gives one that nobody else uses: its python, and the folder.
func copyEnvironment(t *testing.T, flwr string) (python, dir string) {
	t.Helper()
	env := environment(t, flwr)
	from := filepath.Dir(env.Bin)
	dir = filepath.Join(t.TempDir(), "env")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	// Links instead of copies where it is one file system: nothing below is written to, only replaced.
	if exec.Command("cp", "-al", from+"/.", dir).Run() != nil {
		if out, err := exec.Command("cp", "-a", from+"/.", dir).CombinedOutput(); err != nil {
			t.Fatalf("cp: %v\n%s", err, out)
		}
	}
	scripts, err := filepath.Glob(filepath.Join(dir, "bin", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range scripts {
		fi, err := os.Lstat(s)
		if err != nil || !fi.Mode().IsRegular() {
			continue
		}
		b, err := os.ReadFile(s)
		if err != nil {
			t.Fatal(err)
		}
		replace(t, s, []byte(strings.ReplaceAll(string(b), from, dir)), fi.Mode())
	}
	return filepath.Join(dir, "bin", "python"), dir
}

func replace(t *testing.T, path string, b []byte, mode os.FileMode) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, mode); err != nil {
		t.Fatal(err)
	}
}

// --python takes an environment as it is, and leaves it so.
func TestExistingEnvironment(t *testing.T) {
	t.Parallel()
	python, dir := copyEnvironment(t, oldest)
	before := listTree(t, dir)
	r := start(t, spec{app: "tiny", args: []string{"--python", python}})
	res := r.end()
	r.succeeded(res, oldest, 2)
	sameRounds(t, res.Summary.Rounds, tinyRounds)
	if slices.ContainsFunc(res.Events, func(e event) bool { return e.Kind == job.KindEnvProgress }) {
		t.Error("an environment was built, though one was given")
	}
	for path, is := range listTree(t, dir) {
		if before[path] != is {
			t.Errorf("%s was %q, is %q", path, before[path], is)
		}
	}
}

// listTree gives kind, size and time of change of all files below dir.
func listTree(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	err := filepath.Walk(dir, func(path string, fi os.FileInfo, err error) error {
		if err == nil {
			out[path] = fmt.Sprint(fi.Mode(), fi.Size(), fi.ModTime())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// A version that nobody knew when this was written is tried, and the user is told.
func TestVersionOfTheFuture(t *testing.T) {
	t.Parallel()
	python, dir := copyEnvironment(t, newest)
	infos, err := filepath.Glob(filepath.Join(dir, "lib", "python3*", "site-packages", "flwr-"+newest+".dist-info"))
	if err != nil || len(infos) != 1 {
		t.Fatalf("flwr's metadata: %v %v", infos, err)
	}
	future := strings.TrimSuffix(infos[0], newest+".dist-info") + "9.9.0.dist-info"
	if err := os.Rename(infos[0], future); err != nil {
		t.Fatal(err)
	}
	meta := filepath.Join(future, "METADATA")
	b, err := os.ReadFile(meta)
	if err != nil {
		t.Fatal(err)
	}
	replace(t, meta, []byte(strings.Replace(string(b), "Version: "+newest, "Version: 9.9.0", 1)), 0o600)
	r := start(t, spec{app: "tiny", args: []string{"--python", python, "--run-config", "num-server-rounds=1"}})
	res := r.end()
	r.succeeded(res, "9.9.0", 1)
	sameRounds(t, res.Summary.Rounds, tinyRounds[:1])
	if !slices.ContainsFunc(res.Summary.Warnings, func(w string) bool { return strings.Contains(w, "9.9.0") && strings.Contains(w, "newer") }) {
		t.Errorf("the warnings are %q, want one about version 9.9.0", res.Summary.Warnings)
	}
}

// succeeded checks all that a good run shows: flwr "" is any version.
func (r *run) succeeded(res result, flwr string, rounds int) {
	r.t.Helper()
	t, s := r.t, res.Summary
	if res.Code != 0 || s.State != job.Succeeded {
		t.Fatalf("exit %d, %s; want success\n%s", res.Code, causeText(s), res.Stderr)
	}
	if res.Stderr != "" {
		t.Errorf("with --json stderr has %q", res.Stderr)
	}
	if flwr != "" && s.Flwr != flwr {
		t.Errorf("it ran with flwr %q, want %s", s.Flwr, flwr)
	}
	if s.Engine != job.EngineFlower || s.App == "" || s.Seconds <= 0 || s.Seconds > res.Seconds || s.Job == "" || s.Out != r.out || len(s.Failures) > 0 {
		t.Errorf("the summary is %+v", s)
	}
	r.eventsInOrder(res, rounds)
	for _, p := range res.Parties {
		if p.State != job.PartyDone {
			t.Errorf("party %s ended as %s (%+v), want done", p.Name, p.State, p.Cause)
		}
	}
	if len(res.Parties) != len(s.Sites)+1 {
		t.Errorf("the store has %d parties for %d sites", len(res.Parties), len(s.Sites))
	}
	want := []string{"hub/superlink_log.txt", "hub/server_app_log.txt", "hub.log", "hub-runner.log"}
	for _, site := range s.Sites {
		want = append(want, site+"/client_app_log.txt", site+".log", site+"-runner.log")
	}
	for _, name := range want {
		fi, err := os.Stat(filepath.Join(r.out, "logs", filepath.FromSlash(name)))
		if err != nil {
			t.Error(err)
		} else if fi.Size() == 0 && strings.HasSuffix(name, "_log.txt") {
			t.Errorf("logs/%s is empty", name)
		}
	}
}

// eventsInOrder checks that the job went through its states, that all sites were there before the first round, and that
// the rounds came one after the other.
func (r *run) eventsInOrder(res result, rounds int) {
	r.t.Helper()
	t := r.t
	var states []job.State
	var seen []int
	ready, running := false, 0
	for _, e := range res.Events {
		switch e.Kind {
		case job.KindJobState:
			states = append(states, as[job.JobState](t, e).To)
		case job.KindPartyState:
			if as[job.PartyStateChange](t, e).To == job.PartyReady && len(seen) > 0 {
				t.Errorf("%s became ready after the first round", e.Party)
			}
		case job.KindSitesReady:
			g := as[job.SitesReady](t, e)
			ready = true
			if n := len(res.Summary.Sites); g.Ready != n || g.Wanted != n || len(g.Missing) > 0 {
				t.Errorf("sites-ready says %+v, want all %d", g, n)
			}
		case job.KindRound:
			g := as[job.Round](t, e)
			seen = append(seen, g.Round)
			if !ready {
				t.Errorf("round %d began before all sites were ready", g.Round)
			}
			if g.Total != 0 && g.Total != rounds {
				t.Errorf("round %d of %d, want of %d", g.Round, g.Total, rounds)
			}
		case job.KindProgramStarted:
			running++
		case job.KindProgramEnded:
			running--
		}
	}
	if want := []job.State{job.Submitted, job.Queued, job.Preparing, job.Running, job.Stopping, job.Succeeded}; !slices.Equal(states, want) {
		t.Errorf("the job's states were %v, want %v", states, want)
	}
	var want []int
	for n := range rounds {
		want = append(want, n+1)
	}
	if !slices.Equal(seen, want) {
		t.Errorf("the rounds were %v, want %v", seen, want)
	}
	if running != 0 {
		t.Errorf("%d programs were started and not seen to end", running)
	}
}

// sameRounds compares metrics, with the precision of what Flower's logs print.
func sameRounds(t *testing.T, got, want []localrun.RoundMetrics) {
	t.Helper()
	if len(got) != len(want) {
		t.Errorf("metrics of %d rounds, want %d: %+v", len(got), len(want), got)
		return
	}
	for i, w := range want {
		g := got[i]
		if g.Round != w.Round || len(g.Phases) != len(w.Phases) {
			t.Errorf("round %d has %+v, want %+v", w.Round, g, w)
			continue
		}
		for phase, values := range w.Phases {
			if len(g.Phases[phase]) != len(values) {
				t.Errorf("round %d, %s: got %v, want %v", w.Round, phase, g.Phases[phase], values)
				continue
			}
			for k, v := range values {
				if x, ok := g.Phases[phase][k]; !ok || math.Abs(x-v) > 1e-6 {
					t.Errorf("round %d, %s %s: got %v, want %v", w.Round, phase, k, x, v)
				}
			}
		}
	}
}
