package flower

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/pyenv"
)

// The tests of this file run Flower itself, in environments that are built here and cached as for any other run. PERGOLA_TEST_FLWR
// names other versions, separated by commas.

func TestMain(m *testing.M) {
	if fault := os.Getenv(fakeVar); fault != "" {
		fakeSuperlink(fault, os.Args[1:])
		return
	}
	goleak.VerifyTestMain(m)
}

// realVersion is run here; the spread of versions is for test/e2e, all of them for test/parity.
const realVersion = "1.41.0"

// realEnvironment gives the cached environment of test/apps/tiny with that flwr.
func realEnvironment(t *testing.T, flwr string) pyenv.Env {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 6*time.Minute)
	defer cancel()
	in, err := pyenv.Find(ctx, "")
	if err != nil {
		t.Fatal(err)
	}
	req := pyenv.Requirements{Names: []string{"flwr>=1.12", "numpy"}, Flwr: flwr}
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

// eachInstallation runs f for every version whose generation is at least from.
func eachInstallation(t *testing.T, from Generation, f func(t *testing.T, inst *Installation)) {
	t.Helper()
	versions := []string{realVersion}
	if list := os.Getenv("PERGOLA_TEST_FLWR"); list != "" {
		versions = strings.Split(list, ",")
	}
	for _, version := range versions {
		if from >= GenControl && before(version, 21) {
			continue // the message API is newer
		}
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			env := realEnvironment(t, version)
			inst, err := Probe(t.Context(), Env{Bin: env.Bin, Python: env.Python}, filepath.Join(t.TempDir(), "probe.json"))
			if err != nil {
				t.Fatal(err)
			}
			f(t, inst)
		})
	}
}

// run is one run of an app: a server, and clients connected directly to it.
type run struct {
	t      *testing.T
	inst   *Installation
	dir    string
	mark   string
	begun  time.Time
	server *Server
	nodes  []*Client
	echo   lockedBuffer

	mu     sync.Mutex // guards the rest
	events []Event
	onEach func(Event)
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

var addresses struct {
	sync.Mutex
	n int
}

// testIP gives a loopback address that no other test of this process has.
func testIP() string {
	addresses.Lock()
	defer addresses.Unlock()
	addresses.n++
	return fmt.Sprintf("127.%d.%d.%d", 64+os.Getpid()%64, os.Getpid()/64%250+1, addresses.n)
}

func (r *run) on(e Event) {
	r.mu.Lock()
	r.events = append(r.events, e)
	each := r.onEach
	r.mu.Unlock()
	if each != nil {
		each(e)
	}
}

func (r *run) all(kind EventKind) []Event {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(r.events), func(e Event) bool { return e.Kind != kind })
}

func (r *run) stage(name, appDir string) string {
	r.t.Helper()
	app, err := LoadApp(appDir)
	if err != nil {
		r.t.Fatal(err)
	}
	dst := filepath.Join(r.dir, name, "app")
	if err := Stage(app, appDir, dst, r.inst); err != nil {
		r.t.Fatal(err)
	}
	return dst
}

// begin starts a server and nodes for the app and waits until all are registered. What is left of
// processes after the test fails it.
func begin(t *testing.T, inst *Installation, appDir string, nodes int, cfg ServerConfig) *run {
	t.Helper()
	r := &run{t: t, inst: inst, dir: t.TempDir(), mark: fmt.Sprintf("%d-%s", os.Getpid(), t.Name()), begun: time.Now()}
	if keep := os.Getenv("PERGOLA_TEST_KEEP"); keep != "" {
		var err error
		if r.dir, err = os.MkdirTemp(keep, inst.Version+"-*"); err != nil {
			t.Fatal(err)
		}
	}
	// A proxy that leads nowhere: nothing may use it for loopback.
	env := append(os.Environ(), "PERGOLA_FLOWER_TEST="+r.mark, "http_proxy=http://127.0.0.1:1", "HTTP_PROXY=http://127.0.0.1:1", "PYTHONDONTWRITEBYTECODE=1")
	t.Cleanup(func() {
		if left := marked(r.mark); len(left) > 0 {
			t.Errorf("processes are left: %v", left)
		}
	})
	hub := filepath.Join(r.dir, "hub")
	cfg.Install, cfg.AppDir, cfg.RunDir, cfg.LogDir, cfg.FlwrHome = inst, r.stage("hub", appDir), hub, hub, filepath.Join(hub, "flwr")
	cfg.IP, cfg.Env, cfg.OnEvent, cfg.Echo, cfg.Party = testIP(), env, r.on, &r.echo, "hub"
	cfg.OnLogError = func(err error) { t.Error("log:", err) }
	var err error
	if r.server, err = StartServer(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.stop)
	r.logf("superlink ready")
	for i := range nodes {
		name := fmt.Sprintf("site-%d", i)
		dir := filepath.Join(r.dir, name)
		c, err := StartClient(t.Context(), ClientConfig{
			Install: inst, AppDir: r.stage(name, appDir), RunDir: dir, LogDir: dir, FlwrHome: filepath.Join(dir, "flwr"), IP: testIP(),
			Superlink: r.server.FleetAddr(), NodeConfig: map[string]any{"partition-id": i, "num-partitions": nodes, "name": "it's me", "x": 0.5},
			RunConfig: cfg.RunConfig, Env: env, OnEvent: r.on, Echo: &r.echo, Party: name, OnLogError: cfg.OnLogError,
		})
		if err != nil {
			t.Fatal(err)
		}
		r.nodes = append(r.nodes, c)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	defer cancel()
	if err := r.server.WaitNodes(ctx, nodes); err != nil {
		t.Fatal(err)
	}
	r.logf("%d nodes registered", nodes)
	return r
}

func (r *run) logf(format string, args ...any) {
	r.t.Helper()
	r.t.Logf("%6.2f s  %s", time.Since(r.begun).Seconds(), fmt.Sprintf(format, args...))
}

func (r *run) app(limit time.Duration) error {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), limit)
	defer cancel()
	err := r.server.RunApp(ctx)
	r.logf("the run ended: %v", err)
	return err
}

func (r *run) stop() {
	var wg sync.WaitGroup
	for _, n := range r.nodes {
		wg.Go(func() {
			n.Stop(30 * time.Second)
			r.logf("supernode stopped: %s", n.Exit())
		})
	}
	wg.Go(func() {
		r.server.Stop(30 * time.Second)
		r.logf("server stopped: %s", r.server.link.Exit())
	})
	wg.Wait()
}

// marked gives the command lines of living processes with the mark in their environment.
func marked(mark string) (left []string) {
	for _, pid := range markedPids(mark) {
		raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err == nil && len(raw) > 0 {
			left = append(left, strings.ReplaceAll(string(raw), "\x00", " "))
		}
	}
	return left
}

func markedPids(mark string) (pids []int) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
		if err == nil && bytes.Contains(raw, []byte("PERGOLA_FLOWER_TEST="+mark+"\x00")) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// table gives the metrics as "round phase name=value" lines, the last word on each.
func (r *run) table() []string {
	last := map[string]float64{}
	for _, e := range r.all(Metrics) {
		for k, v := range e.Metrics {
			last[fmt.Sprintf("%d %s %s", e.Round, e.Phase, k)] = v
		}
	}
	var out []string
	for k, v := range last {
		out = append(out, fmt.Sprintf("%s=%.6g", k, v))
	}
	slices.Sort(out)
	return out
}

func TestRealMessageApp(t *testing.T) {
	eachInstallation(t, GenControl, func(t *testing.T, inst *Installation) {
		r := begin(t, inst, "testdata/message-app", 2, ServerConfig{Args: []string{"--run-config", "num-server-rounds=1"}})
		if err := r.app(3 * time.Minute); err != nil {
			t.Fatal(err)
		}
		want := []string{
			"0 server central-sum=0", "0 server n=3", "1 evaluate eval_acc=0.5", "1 evaluate eval_loss=2", "1 server central-sum=6", "1 server n=3", "1 train train_loss=0.857143",
		}
		if got := r.table(); !slices.Equal(got, want) {
			t.Errorf("metrics %q", got)
		}
	})
}

// What the superlink says is asked of `flwr run` too, where options are given that only it has.
func TestRealFlwrRun(t *testing.T) {
	eachInstallation(t, GenControl, func(t *testing.T, inst *Installation) {
		r := begin(t, inst, "testdata/message-app", 0, ServerConfig{Args: []string{"--format", "json"}, RunConfig: []string{`end="raise"`}})
		err := r.app(time.Minute)
		if problem.CodeOf(err) != problem.AppError || !strings.Contains(err.Error(), "ZeroDivisionError: asked to, in the server app") {
			t.Error(err)
		}
	})
}

func TestRealFailures(t *testing.T) {
	for _, c := range []struct {
		name, app string
		over      []string
		from      Generation
		nodes     int
		code      problem.Code // "" ends well
		text      string
	}{
		{"the server app's process is killed", "testdata/message-app", []string{`end="kill"`}, GenControl, 0, problem.ProgramFailed, "its process ended without a result"},
		{"the server app exits", "testdata/message-app", []string{`end="exit"`}, GenControl, 0, problem.AppError, "the server app failed ("},
	} {
		t.Run(strings.ReplaceAll(c.name, " ", "-"), func(t *testing.T) {
			eachInstallation(t, c.from, func(t *testing.T, inst *Installation) {
				r := begin(t, inst, c.app, c.nodes, ServerConfig{RunConfig: c.over})
				err := r.app(time.Minute)
				code := c.code
				if strings.Contains(c.app, "message-app") && inst.Caps.Generation == GenHTTP {
					code = problem.ProgramFailed // this superlink does not tell how the process ended
				}
				if problem.CodeOf(err) != code || err != nil && !strings.Contains(err.Error(), c.text) {
					t.Errorf("%s: %v", problem.CodeOf(err), err)
				}
			})
		})
	}
}

// Stop in the middle of a round ends everything, and RunApp with its context.
func TestRealStopInTheMiddle(t *testing.T) {
	eachInstallation(t, GenDriver, func(t *testing.T, inst *Installation) {
		r := begin(t, inst, "../../test/apps/slow", 2, ServerConfig{Database: "state.db", StopGrace: 30 * time.Second})
		ctx, cancel := context.WithCancelCause(t.Context())
		defer cancel(nil)
		why := errors.New("somebody asked for the end")
		r.mu.Lock()
		r.onEach = func(e Event) {
			if e.Kind == Round {
				cancel(why)
			}
		}
		r.mu.Unlock()
		if err := r.server.RunApp(ctx); !errors.Is(err, why) {
			t.Error(err)
		}
		r.logf("cancelled in a round")
		if _, err := os.Stat(filepath.Join(r.dir, "hub", "state.db")); err != nil {
			t.Error(err)
		}
		r.stop()
		if err := r.server.Failure(); err != nil {
			t.Error(err)
		}
		var ended []string
		for _, e := range r.all(ProgramEnded) {
			if e.Program != ProgramSupernode {
				ended = append(ended, e.Program)
			}
			if e.Program == ProgramServerApp && e.Exit.Code != -15 && inst.Caps.Generation > GenDriver {
				t.Errorf("the server app's code is %d, want -15", e.Exit.Code)
			}
		}
		if want := []string{ProgramServerApp, ProgramSuperlink}; !slices.Equal(ended, want) {
			t.Errorf("programs ended in the order %q, want %q", ended, want)
		}
		if inst.Caps.Generation > GenDriver {
			if e := r.all(Note); len(e) != 1 || !strings.HasSuffix(e[0].Message, " is finished:stopped") {
				t.Errorf("notes %+v, want that the run was stopped by way of Flower", e)
			}
		}
		for _, n := range r.nodes {
			if err := n.Err(); err != nil {
				t.Error(err)
			}
		}
	})
}

// Ports that another program holds on all addresses are passed over.
func TestRealPortsTaken(t *testing.T) {
	eachInstallation(t, GenDriver, func(t *testing.T, inst *Installation) {
		l, err := net.Listen("tcp", fmt.Sprintf(":%d", firstPort+1))
		if err != nil {
			t.Skip(err)
		}
		defer l.Close()
		r := begin(t, inst, "../../test/apps/tiny", 1, ServerConfig{})
		if _, port, _ := net.SplitHostPort(r.server.FleetAddr()); port == strconv.Itoa(firstPort+1) {
			t.Error("the port of another program is used")
		}
	})
}

func TestStartServerThatCannot(t *testing.T) {
	superlink := func(script string) *Installation {
		bin := t.TempDir()
		if err := os.WriteFile(filepath.Join(bin, ProgramSuperlink), []byte("#!/bin/sh\n"+script), 0o755); err != nil {
			t.Fatal(err)
		}
		return &Installation{Version: "1.41.0", Bin: bin, Known: true, Caps: Caps{Generation: GenHTTP}}
	}
	start := func(inst *Installation, ctx context.Context, ready time.Duration) error {
		dir := t.TempDir()
		s, err := StartServer(ctx, ServerConfig{
			Install: inst, AppDir: write(t, appFiles(goodApp)), RunDir: dir, LogDir: dir, FlwrHome: filepath.Join(dir, "flwr"), IP: testIP(), Env: os.Environ(), ReadyTimeout: ready,
		})
		if err == nil {
			s.Stop(0)
		}
		return err
	}
	if err := start(superlink("echo no such thing >&2; exit 3\n"), t.Context(), time.Minute); problem.CodeOf(err) != problem.ProgramFailed ||
		!strings.Contains(err.Error(), "flower-superlink ended unexpectedly (exit code 3)") || !strings.Contains(err.Error(), "no such thing") {
		t.Errorf("one that fails: %v", err)
	}
	if err := start(superlink("echo waiting; sleep 60\n"), t.Context(), 3*time.Second); problem.CodeOf(err) != problem.StartTimeout || !strings.Contains(err.Error(), "waiting") {
		t.Errorf("one that is never ready: %v", err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("changed my mind"))
	if err := start(superlink("sleep 60\n"), ctx, time.Minute); err == nil || !strings.Contains(err.Error(), "changed my mind") {
		t.Errorf("cancelled: %v", err)
	}
	if err := start(superlink("echo '[Errno 98] address already in use'; exit 1\n"), t.Context(), time.Minute); problem.CodeOf(err) != problem.ProgramFailed {
		t.Errorf("no port anywhere: %v", err)
	}
}
