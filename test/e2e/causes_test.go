package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/problem"
)

// The versions of flwr that the cases run with: the oldest starts fastest, the newest starts a process per message.
const (
	oldFlwr = "1.12.0"
	newFlwr = "1.41.0"
)

// ending is a case: what is run, what happens to it, and how it has to end. Everything that holds for every end is
// checked by run.end.
type ending struct {
	name string // a sentence
	app  string
	args []string
	flwr string // "" = oldFlwr; "-" = no --flwr
	prep func(t *testing.T, s *spec)
	act  func(r *run) // what happens; nil: nothing

	state job.State // "" = failed
	code  problem.Code
	party string
	says  []string // in the message
	next  string   // in what to do
	exit  int      // where it is not that of the code
	more  func(t *testing.T, res result)
}

// sleepy are arguments for the app slow, so that it is surely in its first round when something happens to it.
var sleepy = []string{"--run-config", "sleep=40"}

// goesOn are arguments for the app late, so that one site is enough after the first round.
var goesOn = []string{"--min-sites", "1", "--run-config", "clients=1", "--run-config", "sleep=10.0"}

// inRound kills a process when round 1 goes on.
func inRound(which func(r *run) int) func(*run) {
	return func(r *run) {
		r.round(1)
		r.kill(which(r))
	}
}

func service(role, party string) func(*run) int {
	return func(r *run) int { return r.service(role, party) }
}

func program(party, name string) func(*run) int {
	return func(r *run) int { return r.program(party, name) }
}

var endings = []ending{
	{
		name: "the server app raises in its second round",
		app:  "raise-server",
		code: problem.AppError, party: "hub", says: []string{"ZeroDivisionError: the server app was asked to fail in round 2"}, next: "correct the app",
	},
	{
		name: "the server app raises at once, newest flwr",
		app:  "raise-server", args: []string{"--run-config", "raise-at=0"}, flwr: newFlwr,
		code: problem.AppError, party: "hub", says: []string{"ZeroDivisionError: the server app was asked to fail at once"}, next: "correct the app",
	},
	{
		name: "the server app imports what is not there",
		app:  "import-error",
		code: problem.DependencyMissing, party: "hub", says: []string{"pergola_not_a_dependency"}, next: "dependencies in the app's pyproject.toml",
	},
	{
		name: "one client app raises and the strategy goes on",
		app:  "raise-client", state: job.Succeeded, more: toldOfClient,
	},
	{
		name: "one client app raises and the strategy goes on, newest flwr",
		app:  "raise-client", flwr: newFlwr, state: job.Succeeded, more: toldOfClient,
	},
	{
		name: "one client app raises and the strategy does not accept it",
		app:  "raise-client", args: []string{"--run-config", "accept-failures=false"},
		code: problem.AppError, party: "hub", says: []string{"1 clients failed in round 1"}, more: toldOfClient,
	},
	{
		name: "the server app exits with 0 before any client was asked",
		app:  "quits", state: job.Succeeded,
	},
	{
		name: "the server app exits with 3",
		app:  "quits", args: []string{"--run-config", "code=3"},
		code: problem.AppError, party: "hub", says: []string{"exit code 3"},
	},
	{
		// From 1.13 on Flower itself calls such a run failed, and the reference system does, too.
		name: "the server app exits with 0, newest flwr",
		app:  "quits", flwr: newFlwr, code: problem.ProgramFailed, party: "hub", says: []string{"its process ended without a result"}, next: "os._exit",
	},
	{
		name: "a supernode is killed and the job goes on without it",
		app:  "late", args: goesOn, act: func(r *run) {
			inRound(program("site-1", "flower-supernode"))(r)
			r.struck = time.Time{} // that is not the job's end
		},
		state: job.Succeeded, more: func(t *testing.T, res result) {
			if !slices.ContainsFunc(res.Summary.Warnings, func(w string) bool {
				return strings.Contains(w, "the job goes on without site-1") && strings.Contains(w, "killed")
			}) {
				t.Errorf("the warnings are %q", res.Summary.Warnings)
			}
		},
	},
	{
		name: "a supernode is killed, with strict-clients",
		app:  "late", args: append([]string{"--strict-clients"}, goesOn...), act: inRound(program("site-1", "flower-supernode")),
		code: problem.ProgramFailed, party: "site-1", says: []string{"flower-supernode", "killed"},
	},
	{
		name: "the directory is no Flower app",
		app:  "no-flwr", code: problem.AppInvalid, says: []string{"[tool.flwr.app]"}, next: "pyproject",
	},
	{
		name: "a dependency does not exist",
		app:  "missing-dep", code: problem.DependencyMissing, says: []string{"pergola-no-such-package-xyz"}, next: "dependencies",
	},
	{
		name: "the version of flwr does not exist",
		app:  "tiny", flwr: "99.0.0", code: problem.FlwrUnavailable, says: []string{"99.0.0"},
	},
	{
		name: "there is no Python where --python says",
		app:  "tiny", flwr: "-", args: []string{"--python", "/no/such/python"}, code: problem.PythonUnsuitable, says: []string{"/no/such/python"},
	},
	{
		name: "the Python is too old",
		app:  "tiny", flwr: "-", prep: oldPython, code: problem.PythonUnsuitable, says: []string{"3.8", "3.10"},
	},
	{
		name: "the Python lacks flwr and numpy",
		app:  "tiny", flwr: "-", prep: barePython, code: problem.DependencyMissing, says: []string{"flwr", "numpy"}, next: "install",
	},
	{
		name: "a site's agent is killed in a round",
		app:  "slow", args: sleepy, act: inRound(service("site", "site-1")),
		code: problem.SiteLost, party: "site-1", says: []string{"site-1"},
	},
	{
		name: "a site's agent is killed while its party prepares",
		app:  "slow", args: sleepy, act: func(r *run) {
			r.wait("site-2 preparing", func(e event) bool { return e.Kind == job.KindPartyState && e.Party == "site-2" })
			r.kill(r.service("site", "site-2"))
		},
		code: problem.SiteLost, party: "site-2", says: []string{"site-2"},
	},
	{
		name: "a site's runner is killed",
		app:  "slow", args: sleepy, act: inRound(service("runner", "site-2")),
		code: problem.SiteRunnerDied, party: "site-2", says: []string{"site-2"},
	},
	{
		name: "a site's runner is killed, newest flwr",
		app:  "slow", args: sleepy, flwr: newFlwr, act: inRound(service("runner", "site-2")),
		code: problem.SiteRunnerDied, party: "site-2", says: []string{"site-2"},
	},
	{
		name: "the hub's runner is killed",
		app:  "slow", args: sleepy, act: inRound(service("runner", "hub")),
		code: problem.HubRunnerDied, party: "hub", says: []string{"hub"},
	},
	{
		name: "the superlink is killed",
		app:  "slow", args: sleepy, act: inRound(program("hub", "flower-superlink")),
		code: problem.ProgramFailed, party: "hub", says: []string{"flower-superlink", "killed"},
	},
	{
		name: "the superlink is killed, newest flwr",
		app:  "slow", args: sleepy, flwr: newFlwr, act: inRound(program("hub", "flower-superlink")),
		code: problem.ProgramFailed, party: "hub", says: []string{"flower-superlink", "killed"},
	},
	{
		name: "a supernode is killed",
		app:  "slow", args: sleepy, act: inRound(program("site-1", "flower-supernode")),
		code: problem.ProgramFailed, party: "site-1", says: []string{"flower-supernode", "killed"},
	},
	{
		name: "a supernode is killed before the app runs",
		app:  "slow", args: sleepy, act: func(r *run) { r.kill(r.program("site-1", "flower-supernode")) },
		code: problem.ProgramFailed, party: "site-1", says: []string{"flower-supernode", "killed"},
	},
	{
		name: "a supernode is killed in its first round and started again",
		app:  "slow", flwr: "1.30.0", prep: copied(func(dir string) error {
			return appendTo(filepath.Join(dir, "pyproject.toml"), "\n[tool.pergola.site]\nrestarts = 1\n")
		}),
		// The evaluation needs both sites, so the round ends only after the second supernode has joined.
		args: []string{"--run-config", "num-server-rounds=1 sleep=4"}, act: func(r *run) {
			r.round(1)
			if err := syscall.Kill(r.program("site-1", "flower-supernode"), syscall.SIGKILL); err != nil {
				r.t.Fatal(err)
			}
		},
		state: job.Succeeded, more: restarted,
	},
	{
		name: "the server app is killed",
		app:  "slow", args: sleepy, act: inRound(program("hub", "flower-server-app")),
		code: problem.ProgramFailed, party: "hub", says: []string{"server app", "killed"}, next: "server_app_log.txt",
	},
	{
		name: "the hub is killed",
		app:  "slow", args: sleepy, act: inRound(service("hub", "hub")),
		code: problem.HubLost, party: "hub", says: []string{"hub"},
	},
	{
		name: "the hub is killed while the parties prepare, newest flwr",
		app:  "slow", args: sleepy, flwr: newFlwr, act: func(r *run) {
			r.jobState(job.Preparing)
			r.kill(r.service("hub", "hub"))
		},
		code: problem.HubLost, party: "hub", says: []string{"hub"},
	},
	{
		name: "the deadline passes in a round",
		app:  "slow", args: append([]string{"--deadline", "12s"}, sleepy...), act: after(job.Preparing, 12*time.Second),
		code: problem.Deadline, says: []string{"12s"}, next: "--deadline",
	},
	{
		name: "a client app hangs and nothing moves",
		app:  "hang-client", args: []string{"--no-progress", "30s"}, act: afterRound(30 * time.Second),
		code: problem.NoProgress, says: []string{"30s"},
	},
	{
		name: "a client app hangs and nothing moves, newest flwr",
		app:  "hang-client", args: []string{"--no-progress", "30s"}, flwr: newFlwr, act: afterRound(30 * time.Second),
		code: problem.NoProgress, says: []string{"30s"},
	},
	{
		name: "a client app hangs until the deadline",
		app:  "hang-client", args: []string{"--deadline", "15s"}, act: after(job.Preparing, 15*time.Second),
		code: problem.Deadline, says: []string{"15s"},
	},
	{
		name: "Ctrl-C in a round, newest flwr",
		app:  "slow", args: sleepy, flwr: newFlwr, act: func(r *run) {
			r.round(1)
			r.interrupt()
		},
		state: job.Aborted, code: problem.AbortedByUser, more: stoppedByFlower,
	},
	{
		name: "Ctrl-C before there is a job",
		app:  "slow", args: sleepy, act: func(r *run) {
			r.wait("the resolving of versions", func(e event) bool { return e.Kind == job.KindEnvProgress })
			r.interrupt()
		},
		state: job.Aborted, code: problem.AbortedByUser,
	},
	{
		name: "Ctrl-C while the parties prepare, newest flwr",
		app:  "slow", args: sleepy, flwr: newFlwr, act: func(r *run) {
			r.jobState(job.Preparing)
			r.interrupt()
		},
		state: job.Aborted, code: problem.AbortedByUser,
	},
	{
		name: "Ctrl-C twice",
		app:  "slow", args: sleepy, act: func(r *run) {
			r.round(1)
			r.interrupt()
			r.jobState(job.Stopping)
			r.interrupt()
		},
		state: job.Aborted, code: problem.AbortedByUser,
	},
	{
		name: "APPDIR is a file",
		app:  "tiny", prep: appAt(func(path string) error { return os.WriteFile(path, []byte("x"), 0o600) }),
		code: problem.AppInvalid, says: []string{"is a file"},
	},
	{
		name: "APPDIR does not exist",
		app:  "tiny", prep: appAt(func(string) error { return nil }),
		code: problem.AppInvalid,
	},
	{
		name: "APPDIR is empty",
		app:  "tiny", prep: appAt(func(path string) error { return os.Mkdir(path, 0o700) }),
		code: problem.AppInvalid,
	},
	{
		name: "APPDIR is a loop of symbolic links",
		app:  "tiny", prep: appAt(func(path string) error { return os.Symlink(filepath.Base(path), path) }),
		code: problem.AppInvalid,
	},
	{
		name: "APPDIR has a loop of symbolic links",
		app:  "tiny", prep: copied(func(dir string) error { return os.Symlink("round", filepath.Join(dir, "round")) }),
		code: problem.AppInvalid, says: []string{"round"},
	},
	{
		name: "APPDIR is huge",
		app:  "tiny", prep: copied(func(dir string) error {
			if err := os.WriteFile(filepath.Join(dir, "scan.bin"), nil, 0o600); err != nil {
				return err
			}
			return os.Truncate(filepath.Join(dir, "scan.bin"), 40<<30) // sparse
		}),
		code: problem.AppInvalid, says: []string{"scan.bin"},
	},
	{
		name: "APPDIR cannot be read",
		app:  "tiny", prep: unreadable, code: problem.AppInvalid, says: []string{"cannot be read"},
	},
	{
		name: "a key of [tool.pergola] is unknown",
		app:  "tiny", prep: copied(func(dir string) error {
			return appendTo(filepath.Join(dir, "pyproject.toml"), "\n[tool.pergola]\ndedline = \"6h\"\n")
		}),
		code: problem.Usage, says: []string{"dedline", "deadline", "pyproject.toml:27"},
	},
	{
		name: "a key of --run-config is unknown",
		app:  "tiny", args: []string{"--run-config", "num-server-round=3"},
		code: problem.Usage, says: []string{"num-server-round", "num-server-rounds"},
	},
	{
		name: "--sites 0",
		app:  "tiny", args: []string{"--sites", "0"}, code: problem.Usage, says: []string{"--sites 0"}, next: "1 to 64",
	},
	{
		name: "a duration is none",
		app:  "tiny", args: []string{"--deadline", "soon"}, code: problem.Usage, says: []string{"--deadline", "soon"}, next: "30m",
	},
}

func TestEndings(t *testing.T) {
	for _, c := range endings {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := spec{app: c.app, args: slices.Clone(c.args)}
			switch c.flwr {
			case "":
				s.args = append(s.args, "--flwr", oldFlwr)
			case "-":
			default:
				s.args = append(s.args, "--flwr", c.flwr)
			}
			if c.prep != nil {
				c.prep(t, &s)
			}
			r := start(t, s)
			if c.act != nil {
				c.act(r)
			}
			c.check(t, r.end())
		})
	}
}

// check compares an end with what the case says.
func (c ending) check(t *testing.T, res result) {
	t.Helper()
	want := c.state
	if want == "" {
		want = job.Failed
	}
	if res.Summary.State != want {
		t.Errorf("state %s, want %s", res.Summary.State, want)
	}
	exit := c.exit
	if exit == 0 && c.code != "" {
		exit = problem.Codes[c.code].Exit
	}
	if res.Code != exit {
		t.Errorf("exit status %d, want %d", res.Code, exit)
	}
	if c.more != nil {
		defer c.more(t, res)
	}
	if c.code == "" {
		return
	}
	cause := res.Summary.Cause
	if cause == nil {
		t.Errorf("no cause, want %s", c.code)
		return
	}
	if cause.Code != c.code || cause.Party != c.party {
		t.Errorf("cause %s of %q, want %s of %q", cause.Code, cause.Party, c.code, c.party)
	}
	for _, s := range c.says {
		if !strings.Contains(cause.Msg, s) {
			t.Errorf("the cause says %q, without %q", cause.Msg, s)
		}
	}
	if !strings.Contains(cause.Next, c.next) {
		t.Errorf("what to do is %q, without %q", cause.Next, c.next)
	}
}

// toldOfClient: the failure of the client app is in the events and in the summary, with its party and its exception.
func toldOfClient(t *testing.T, res result) {
	t.Helper()
	const want = "ZeroDivisionError: the client app was asked to fail"
	told := false
	for _, e := range res.Events {
		if e.Kind == job.KindClientFailure && e.Party == "site-2" && as[job.ClientFailure](t, e).Exception == want {
			told = true
		}
	}
	if !told {
		t.Errorf("no event tells of %s at site-2", want)
	}
	told = false
	for i, f := range res.Summary.Failures {
		told = told || res.Summary.FailedAt[i] == "site-2" && f.Exception == want
	}
	if !told {
		t.Errorf("the summary does not tell of %s at site-2: %+v at %v", want, res.Summary.Failures, res.Summary.FailedAt)
	}
}

// after: the event that ends the job comes d after it entered the state.
func after(s job.State, d time.Duration) func(*run) {
	return func(r *run) { r.struck = r.jobState(s).Time.Add(d) }
}

// afterRound: the event that ends the job comes d after round 1 began.
func afterRound(d time.Duration) func(*run) {
	return func(r *run) { r.struck = r.round(1).Time.Add(d) }
}

// appAt has make put something at the path of the app.
func appAt(put func(path string) error) func(*testing.T, *spec) {
	return func(t *testing.T, s *spec) {
		t.Helper()
		s.app = filepath.Join(t.TempDir(), "app")
		if err := put(s.app); err != nil {
			t.Fatal(err)
		}
	}
}

// stoppedByFlower checks that the run was stopped as by `flwr stop` before programs were, and that these ended in their order.
func stoppedByFlower(t *testing.T, res result) {
	t.Helper()
	told := false
	var ended []string
	for _, e := range res.Events {
		switch {
		case e.Party != job.HubParty:
		case e.Kind == job.KindNote:
			told = told || strings.HasSuffix(as[job.Text](t, e).Message, " is finished:stopped")
		case e.Kind == job.KindProgramEnded:
			g := as[job.Program](t, e)
			if ended = append(ended, g.Name); g.Name == "flower-server-app" && g.Code != -15 {
				t.Errorf("the server app's code is %d, want -15", g.Code)
			}
		}
	}
	if want := []string{"flower-server-app", "flower-superlink"}; !told || !slices.Equal(ended, want) {
		t.Errorf("told of the stop: %v; programs ended in the order %q, want %q", told, ended, want)
	}
}

// restarted checks that site-1's supernode died once, that a warning says so, and that the party stayed what it was.
func restarted(t *testing.T, res result) {
	t.Helper()
	var codes []int
	var warned, moved int
	for _, e := range res.Events {
		if e.Party != "site-1" {
			continue
		}
		switch e.Kind {
		case job.KindProgramEnded:
			codes = append(codes, as[job.Program](t, e).Code)
		case job.KindWarning:
			m := as[job.Text](t, e).Message
			if strings.Contains(m, "flower-supernode ended unexpectedly (ended by signal 9 (killed)); it last said: ") && strings.Contains(m, "; starting it again in ") {
				warned++
			}
		case job.KindPartyState:
			if c := as[job.PartyStateChange](t, e); c.To == job.PartyReady || c.To == job.PartyFailed {
				moved++
			}
		}
	}
	// The second ends with the job: by itself, or where it takes longer than that is given, killed as well.
	if len(codes) != 2 || codes[0] != -9 || warned != 1 || moved != 1 {
		t.Errorf("the supernodes of site-1 ended with %v, %d warnings, %d moves to ready or failed; want -9 and another, 1, 1", codes, warned, moved)
	}
	if rs := res.Summary.Rounds; len(rs) != 1 || len(rs[0].Phases["evaluate"]) == 0 {
		t.Errorf("the rounds are %+v, want one with an evaluation", rs)
	}
}

// copied has change alter a copy of the app.
func copied(change func(dir string) error) func(*testing.T, *spec) {
	return func(t *testing.T, s *spec) {
		t.Helper()
		dir := filepath.Join(t.TempDir(), "app")
		if err := os.CopyFS(dir, os.DirFS(filepath.Join(apps, s.app))); err != nil {
			t.Fatal(err)
		}
		if err := change(dir); err != nil {
			t.Fatal(err)
		}
		s.app = dir
	}
}

func appendTo(path, text string) error {
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	if _, err := f.WriteString(text); err != nil {
		f.Close()
		return err
	}
	return f.Close()
}

// unreadable takes all permissions from a copy of the app. To root they mean nothing, but they do to a user namespace to
// which no user is mapped.
func unreadable(t *testing.T, s *spec) {
	t.Helper()
	copied(func(string) error { return nil })(t, s)
	if os.Geteuid() == 0 {
		if out, err := exec.Command("unshare", "-U", "true").CombinedOutput(); err != nil {
			t.Skipf("as root, without a user namespace, every file can be read: %v: %s", err, out)
		}
		s.wrap = []string{"unshare", "-U"}
	}
	path := filepath.Join(s.app, "pyproject.toml")
	if err := os.Chmod(path, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Chmod(path, 0o600) }) // for the removal of the folder
}

// oldPython puts a program there that answers as Python 3.8 would.
func oldPython(t *testing.T, s *spec) {
	t.Helper()
	python, err := exec.LookPath("python3")
	if err != nil {
		t.Skip("no python3 here to imitate an older one")
	}
	path := filepath.Join(t.TempDir(), "python3.8")
	script := fmt.Sprintf("#!/bin/sh\n%q \"$@\" | sed -E 's/\"version\": \"[0-9.]+\"/\"version\": \"3.8.10\"/'\n", python)
	if err := os.WriteFile(path, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	s.args = append(s.args, "--python", path)
}

// barePython makes an interpreter that has no packages.
func barePython(t *testing.T, s *spec) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "bare")
	if out, err := exec.Command("python3", "-m", "venv", "--without-pip", dir).CombinedOutput(); err != nil {
		t.Skipf("no python3 with venv here: %v: %s", err, out)
	}
	s.args = append(s.args, "--python", filepath.Join(dir, "bin", "python"))
}

// The command itself is killed: nobody is left to tidy up, and everything goes away by itself.
func TestKilledCommandLeavesNothing(t *testing.T) {
	for _, c := range []struct {
		name, flwr string
		when       func(*run)
	}{
		{"in a round", oldFlwr, func(r *run) { r.round(1) }},
		{"while the parties prepare", oldFlwr, func(r *run) { r.jobState(job.Preparing) }},
		{"in a round, newest flwr", newFlwr, func(r *run) { r.round(1) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			r := start(t, spec{app: "slow", args: append([]string{"--flwr", c.flwr}, sleepy...)})
			c.when(r)
			r.kill(r.cmd.Process.Pid)
			if res := r.end(); res.Code != -9 {
				t.Errorf("exit %d, want a kill", res.Code)
			}
		})
	}
}

// Parties that are ended while one of them builds the environment.
func TestEndedWhileBuilding(t *testing.T) {
	uv, err := exec.Command("uv", "cache", "dir").Output()
	if err != nil {
		uv = nil // pip has its own folder, too
	}
	for _, c := range []struct {
		name string
		act  func(r *run, builder string)
		want func(builder string) ending
	}{
		{"Ctrl-C", func(r *run, _ string) { r.interrupt() }, func(string) ending {
			return ending{state: job.Aborted, code: problem.AbortedByUser}
		}},
		{"the builder's runner is killed", func(r *run, builder string) { r.kill(r.service("runner", builder)) }, func(builder string) ending {
			if builder == job.HubParty {
				return ending{code: problem.HubRunnerDied, party: builder}
			}
			return ending{code: problem.SiteRunnerDied, party: builder}
		}},
		{"the command is killed", func(r *run, _ string) { r.kill(r.cmd.Process.Pid) }, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := spec{app: "tiny", args: []string{"--flwr", oldFlwr}, env: []string{"PERGOLA_CACHE=" + t.TempDir()}}
			if uv != nil {
				s.env = append(s.env, "UV_CACHE_DIR="+strings.TrimSpace(string(uv)))
			}
			r := start(t, s)
			builder := r.wait("the installing of packages", func(e event) bool {
				return e.Kind == job.KindEnvProgress && e.Party != "" && slices.Contains([]string{"installing", "compiling"}, as[job.EnvProgress](t, e).Phase)
			}).Party
			c.act(r, builder)
			res := r.end()
			if c.want != nil {
				c.want(builder).check(t, res)
			} else if res.Code != -9 {
				t.Errorf("exit %d, want a kill", res.Code)
			}
		})
	}
}

// A command line that cannot be meant is refused with what was probably meant, before anything is made or started.
// A version of Flower that cannot run the job is refused before anything starts: too old, or too old for a run config.
func TestTooOld(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		args []string
		code int
		says []string
	}{
		{[]string{"record-classic", "--flwr", "1.7.0"}, problem.ExitFailed, []string{"flwr 1.7.0 is too old", "1.8"}},
		{[]string{"record", "--flwr", "1.10.0", "--run-config", "rate=0.5"}, problem.ExitUsage, []string{"flwr 1.10.0 does not give a run config", "1.11"}},
	} {
		cmd := exec.Command(binary, append([]string{"run", filepath.Join(apps, c.args[0])}, c.args[1:]...)...)
		cmd.Dir = t.TempDir()
		out, err := cmd.CombinedOutput()
		if cmd.ProcessState.ExitCode() != c.code {
			t.Errorf("%q: exit %d (%v), want %d", c.args, cmd.ProcessState.ExitCode(), err, c.code)
		}
		for _, s := range append(c.says, "next: ") {
			if !strings.Contains(string(out), s) {
				t.Errorf("%q: without %q: %s", c.args, s, out)
			}
		}
		if es, err := os.ReadDir(cmd.Dir); err != nil || len(es) > 0 {
			t.Errorf("%q: the working folder has %v (%v), want nothing", c.args, es, err)
		}
	}
}

func TestRefused(t *testing.T) {
	tiny := filepath.Join(apps, "tiny")
	for _, c := range []struct {
		name string
		args []string
		says []string
	}{
		{"an unknown flag", []string{"run", tiny, "--stes", "3"}, []string{"--stes", "did you mean --sites?"}},
		{"an unknown command", []string{"rnu", tiny}, []string{"rnu", `did you mean "run"?`}},
		{"no app", []string{"run"}, []string{"the app's directory"}},
		{"two apps", []string{"run", tiny, tiny}, []string{"the app's directory", "2"}},
		{"no sites", []string{"run", tiny, "--sites", "0"}, []string{"--sites 0", "1 to 64"}},
		{"a number that is none", []string{"run", tiny, "--sites", "two"}, []string{"--sites", "two"}},
		{"more sites needed than there are", []string{"run", tiny, "--min-sites", "3"}, []string{"--min-sites 3"}},
		{"an unknown engine", []string{"run", tiny, "--engine", "flwer"}, []string{"flwer", `did you mean "flower"?`}},
		{"a run config without value", []string{"run", tiny, "--run-config", "num-server-rounds"}, []string{"num-server-rounds"}},
		{"a run config key that the app lacks", []string{"run", tiny, "--run-config", "num-server-round=3"}, []string{`did you mean "num-server-rounds"?`}},
		{"a bad duration", []string{"run", tiny, "--deadline", "soon"}, []string{"--deadline", "soon", "30m"}},
		{"a negative duration", []string{"run", tiny, "--deadline", "-5s"}, []string{"--deadline", "-5s"}},
		{"a site variable without value", []string{"run", tiny, "--site-env", "DATA"}, []string{"--site-env", "NAME=value"}},
		{"two wishes that contradict each other", []string{"run", tiny, "--python", "python3", "--flwr", oldFlwr}, []string{"--flwr", "--python"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			cmd := exec.Command(binary, c.args...)
			cmd.Dir = t.TempDir()
			var out, errs strings.Builder
			cmd.Stdout, cmd.Stderr = &out, &errs
			if err := cmd.Run(); cmd.ProcessState.ExitCode() != problem.ExitUsage {
				t.Errorf("exit %d (%v), want %d", cmd.ProcessState.ExitCode(), err, problem.ExitUsage)
			}
			if out.Len() > 0 {
				t.Errorf("stdout: %s", out.String())
			}
			for _, s := range append(c.says, "next: ") {
				if !strings.Contains(errs.String(), s) {
					t.Errorf("without %q: %s", s, errs.String())
				}
			}
			if es, err := os.ReadDir(cmd.Dir); err != nil || len(es) > 0 {
				t.Errorf("the working folder has %v (%v), want nothing", es, err)
			}
		})
	}
}
