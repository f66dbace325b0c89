package main

import (
	"bytes"
	"cmp"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pergolafl/pergola/internal/flower"
	"github.com/pergolafl/pergola/internal/pyenv"
	"github.com/pergolafl/pergola/test/internal/plain"
)

// The goals of the native engine, each a ratio to plain Flower in the same run.
const (
	goalSmallTotal  = 20  // small app, from nothing to finished
	goalSmallRound  = 200 // and per round
	goalLargeTotal  = 12  // arrays of 100 MB, from nothing to finished
	goalLargeApp    = 20  // and inside the ServerApp
	goalClients     = 4   // many clients, per round, to Flower's simulation engine
	goalGoMemory    = 64  // MiB of a Go process, beside twice the largest message
	bytesPerNumber  = 4
	linearApp       = "test/bench/apps/linear"
	simulationLimit = 15 * time.Minute // for one run of either side
)

//go:embed sim.py
var simulation []byte

type benchmark struct {
	name string
	run  func(ctx context.Context, o nativeOptions, version string) error
}

// benchmarks by name, in the order of `bench native`.
var benchmarks = []benchmark{
	{"small", small}, {"large", large}, {"clients", clients}, {"idle", idle}, {"messages", messages},
}

// nativeOptions are the flags of the native engine's benchmarks.
type nativeOptions struct {
	pergola, app, cache, engine string
	versions                    []string
	runs, rounds, megabytes     int
	many                        []int
	window                      time.Duration
	quick, check                bool
	loaded                      *flower.App
	stdout, stderr              io.Writer
	missed                      *bool
	work                        string
}

// runNative runs one benchmark of the native engine, or with the name "native" all of them.
func runNative(ctx context.Context, name string, args []string, stdout, stderr io.Writer) error {
	o := nativeOptions{stdout: stdout, stderr: stderr, missed: new(bool)}
	var versions, many string
	f := flag.NewFlagSet("bench "+name, flag.ContinueOnError)
	f.SetOutput(stderr)
	f.StringVar(&o.pergola, "pergola", "bin/pergola", "the `binary` to measure")
	f.StringVar(&o.app, "app", linearApp, "the app's `folder`")
	f.StringVar(&o.cache, "cache", pyenv.DefaultCache(), "`folder` for environments, the same for both sides")
	f.StringVar(&o.engine, "engine", "native", "Pergola's `engine`")
	f.StringVar(&versions, "flwr", "1.30.0,1.41.0", "flwr `versions`, separated by commas")
	f.BoolVar(&o.quick, "quick", false, "small parameters: to see that it works, not to measure")
	f.IntVar(&o.runs, "runs", 3, "counted runs of each side (small), or of Pergola alone (large)")
	f.IntVar(&o.rounds, "rounds", 0, "rounds per run (default 3; 10 for clients and messages)")
	f.IntVar(&o.megabytes, "mb", 100, "megabytes of arrays in a message (large)")
	f.StringVar(&many, "clients", "", "numbers of clients, separated by commas (default 50,200 for clients; 2,10,50,200 for messages)")
	f.DurationVar(&o.window, "window", 20*time.Second, "how long to watch a job that waits (idle)")
	f.BoolVar(&o.check, "check", false, "end with status 1 when a goal is missed")
	if err := f.Parse(args); err != nil {
		return err
	}
	o.versions = strings.Split(versions, ",")
	if o.quick {
		o.runs, o.rounds, o.megabytes, o.window = 1, 2, min(o.megabytes, 8), min(o.window, 3*time.Second)
		if many == "" {
			many = "4"
		}
	}
	for _, n := range strings.FieldsFunc(many, func(r rune) bool { return r == ',' }) {
		k, err := strconv.Atoi(n)
		if err != nil || k < 2 {
			return fmt.Errorf("--clients: %q is no number of at least 2", n)
		}
		o.many = append(o.many, k)
	}
	if f.NArg() > 0 || o.runs < 1 || o.rounds < 0 || o.megabytes < 1 || o.window < time.Second {
		return errors.New("no further arguments, please, and at least one run and megabyte, and a second to watch")
	}
	for _, path := range []*string{&o.pergola, &o.app, &o.cache} {
		abs, err := filepath.Abs(*path)
		if err != nil {
			return err
		}
		*path = abs
	}
	var err error
	if o.loaded, err = flower.LoadApp(o.app); err != nil {
		return err
	}
	if o.work, err = os.MkdirTemp("", "pergola-bench."); err != nil {
		return err
	}
	defer os.RemoveAll(o.work) //nolint:errcheck // scratch space: what cannot be removed hinders nobody
	for _, version := range o.versions {
		for _, b := range benchmarks {
			if name == "native" || name == b.name {
				if err := b.run(ctx, o, version); err != nil {
					return fmt.Errorf("%s, flwr %s: %w", b.name, version, err)
				}
			}
		}
	}
	if *o.missed && o.check {
		return errors.New("a goal was missed")
	}
	return nil
}

// figures are what came of one run.
type figures struct {
	clock
	total    time.Duration
	app      float64 // seconds inside the ServerApp, as itself says
	own      float64 // of those in its aggregation
	clients  float64 // and in the slowest client of each phase
	losses   []float64
	idle     time.Duration // CPU time within the window, while all clients waited
	used     *samples
	rounded  time.Duration // per round
	later    time.Duration // per round after the first, in which Ray and workers start; the first where there is no other
	started  time.Duration // from nothing to the first round
	messages int
}

// line takes a line of the server app.
func (f *figures) line(at time.Time, line string) {
	f.clock.line(at, line)
	_, text, ok := strings.Cut(line, "BENCH {")
	if !ok {
		return
	}
	var told struct {
		App, Aggregation, Clients float64
		Losses                    []float64
	}
	if json.Unmarshal([]byte("{"+text), &told) == nil {
		f.app, f.own, f.clients, f.losses = told.App, told.Aggregation, told.Clients, told.Losses
	}
}

// setting is the job of one run.
type setting struct {
	clients, rounds, numbers int
	wait                     time.Duration // how long the clients wait in their first message; the CPU time within is measured
	window                   time.Duration
	unweighed                bool // memory is not summed up, which takes its time where there is much
}

func (s setting) config() []string {
	return []string{
		fmt.Sprintf("clients=%d", s.clients), fmt.Sprintf("num-server-rounds=%d", s.rounds), fmt.Sprintf("numbers=%d", s.numbers), fmt.Sprintf("wait=%.1f", s.wait.Seconds()),
	}
}

// measured runs something, watches its processes, and works out the figures.
func (o nativeOptions) measured(ctx context.Context, side string, s setting, do func(ctx context.Context, dir string, f *figures) error) (*figures, error) {
	dir, err := os.MkdirTemp(o.work, side+".")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir) //nolint:errcheck // it goes with the folder above
	ctx, cancel := context.WithTimeoutCause(ctx, simulationLimit, errors.New("it took too long"))
	defer cancel()
	f := &figures{used: newSamples(dir), messages: 2 * s.clients * s.rounds}
	f.used.unweighed = s.unweighed
	watching, stop := context.WithCancel(ctx)
	var all sync.WaitGroup
	all.Go(func() { f.used.watch(watching) })
	if s.window > 0 {
		all.Go(func() { f.idle = quiet(watching, dir, s) })
	}
	f.start = time.Now()
	err = do(ctx, dir, f)
	gone := time.Now()
	stop()
	all.Wait()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", side, err)
	}
	f.total = gone.Sub(f.start)
	f.begin(f.start) // where nothing told when the run was asked for
	m, err := f.measure(s.rounds, gone)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", side, err)
	}
	f.rounded, f.started, f.later = m.perRound, m.app+m.first, m.perRound
	if s.rounds > 1 {
		f.later = f.end.Sub(f.rounds[1]) / time.Duration(s.rounds-1)
	}
	if f.losses == nil {
		return nil, fmt.Errorf("%s: the app told no figures", side)
	}
	fmt.Fprintf(o.stderr, "%s: %.2f s, %.3f s in the app, %.3f s per round\n", side, f.total.Seconds(), f.app, f.rounded.Seconds())
	return f, nil
}

// quiet gives the CPU time that the run's processes take within the window, from the moment at which all clients wait.
func quiet(ctx context.Context, dir string, s setting) time.Duration {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		if found, err := filepath.Glob(filepath.Join(dir, "waiting-*")); err == nil && len(found) == s.clients {
			break
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return 0
		}
	}
	settled := time.NewTimer(time.Second) // what leads up to the waiting has passed
	defer settled.Stop()
	used := newSamples(dir)
	select {
	case <-settled.C:
	case <-ctx.Done():
		return 0
	}
	used.look(false)
	before := maps.Clone(used.cpu)
	window := time.NewTimer(s.window)
	defer window.Stop()
	watching, stop := context.WithCancel(ctx)
	defer stop()
	go func() {
		select {
		case <-window.C:
		case <-ctx.Done():
		}
		stop()
	}()
	used.watch(watching) // also processes that come and go
	sum := used.total()
	for pid, d := range before {
		if _, ok := used.cpu[pid]; ok {
			sum -= d
		}
	}
	return sum
}

// onPlain runs the app on plain Flower, a supernode for each client.
func (o nativeOptions) onPlain(ctx context.Context, version string, s setting) (*figures, error) {
	python, err := plain.Environment(ctx, o.cache, o.loaded, version, o.stderr)
	if err != nil {
		return nil, err
	}
	return o.measured(ctx, "plain", s, func(ctx context.Context, dir string, f *figures) error {
		return plain.Run(ctx, plain.Options{
			Version: version, Python: python, App: o.loaded, Dir: filepath.Join(dir, "run"), Sites: s.clients, RunConfig: s.config(), Env: []string{markVar + "=" + dir},
			OnBegin: func() { f.begin(time.Now()) }, OnLine: func(line string) { f.line(time.Now(), line) },
		})
	})
}

// onPergola runs it by `pergola run`, on two sites.
func (o nativeOptions) onPergola(ctx context.Context, version string, s setting) (*figures, error) {
	return o.measured(ctx, "pergola", s, func(ctx context.Context, dir string, f *figures) error {
		args := []string{"run", o.app, "--json", "--engine", o.engine, "--flwr", version, "--sites", "2", "--out", filepath.Join(dir, "out")}
		if s.clients != 2 {
			args = append(args, "--clients", strconv.Itoa(s.clients))
		}
		args = append(args, "--run-config", strings.Join(s.config(), " "))
		cmd := exec.CommandContext(ctx, o.pergola, args...)
		cmd.Env = append(os.Environ(), "TMPDIR="+dir, markVar+"="+dir)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		stdout, err := piped(cmd)
		if err != nil {
			return err
		}
		var state string
		lines := 0
		err = events(stdout, func(e event) error {
			if e.Kind == "log" && (e.Party == "hub" || e.Party == "") {
				var b body
				if err := json.Unmarshal(e.Body, &b); err != nil {
					return err
				}
				f.line(e.Time, b.Line)
				lines++
				return nil
			}
			s, err := f.take(e)
			if s != "" {
				state = s
			}
			return err
		})
		if err := errors.Join(err, cmd.Wait()); err != nil || state != "succeeded" {
			return fmt.Errorf("the run ended %q after %d lines: %w\n%s", state, lines, err, stderr.Bytes())
		}
		return nil
	})
}

// onRay runs it by Flower's simulation engine, in an environment that has Ray.
func (o nativeOptions) onRay(ctx context.Context, version string, s setting) (*figures, error) {
	in, err := pyenv.Find(ctx, "")
	if err != nil {
		return nil, err
	}
	lock, err := pyenv.MakeLock(ctx, o.cache, in, pyenv.Requirements{Names: o.loaded.Dependencies, Flwr: version, Simulation: true}, pyenv.Options{})
	if err != nil {
		return nil, err
	}
	env, err := pyenv.Ensure(ctx, o.cache, in, lock, pyenv.Options{}, nil)
	if err != nil {
		return nil, err
	}
	return o.measured(ctx, "simulation", s, func(ctx context.Context, dir string, f *figures) error {
		script := filepath.Join(dir, "sim.py")
		if err := os.WriteFile(script, simulation, 0o644); err != nil {
			return err
		}
		config, err := json.Marshal(map[string]any{"clients": s.clients, "num-server-rounds": s.rounds, "numbers": s.numbers, "wait": s.wait.Seconds()})
		if err != nil {
			return err
		}
		cmd := exec.CommandContext(ctx, env.Python, script, o.app, strconv.Itoa(s.clients))
		cmd.Env = append(os.Environ(), "PYTHONUNBUFFERED=1", "FLWR_TELEMETRY_ENABLED=0", "RAY_USAGE_STATS_ENABLED=0", "FLWR_HOME="+dir, markVar+"="+dir, "BENCH_CONFIG="+string(config))
		var said bytes.Buffer
		out, err := piped(cmd)
		if err != nil {
			return err
		}
		defer func() { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }() // Ray's daemons, where they did not end by themselves
		err = eachLine(io.TeeReader(out, &said), func(line string) { f.line(time.Now(), line) })
		if err := errors.Join(err, cmd.Wait()); err != nil {
			return fmt.Errorf("%w\n%s", err, tailOf(said.Bytes()))
		}
		return nil
	})
}

// piped starts cmd in a group of its own, which gets an interrupt when the context ends, and gives what it writes to stdout, and to
// stderr where that has no other place.
func piped(cmd *exec.Cmd) (io.Reader, error) {
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGINT) } // it cleans up after itself
	cmd.WaitDelay = time.Minute
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C comes from here alone, once
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if cmd.Stderr == nil {
		cmd.Stderr = cmd.Stdout
	}
	return out, cmd.Start()
}

func tailOf(b []byte) []byte { return b[max(0, len(b)-2000):] }

// ratio prints a line of a table with plain Flower's (or the simulation's) figure and Pergola's.
func ratio(t io.Writer, name string, theirs, ours float64) float64 {
	if ours <= 0 {
		fmt.Fprintf(t, "%s\t%.3f\t%.3f\t-\t\n", name, theirs, ours)
		return 0
	}
	fmt.Fprintf(t, "%s\t%.3f\t%.3f\t%.1f ×\t\n", name, theirs, ours, theirs/ours)
	return theirs / ours
}

func (o nativeOptions) table(title string, args ...any) *tabwriter.Writer {
	fmt.Fprintf(o.stdout, "\n"+title+"\n", args...)
	return tabwriter.NewWriter(o.stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
}

func (o nativeOptions) goal(ok bool, format string, args ...any) {
	if !ok {
		*o.missed = true
	}
	fmt.Fprintf(o.stdout, "goal: "+format+": %s\n", append(args, map[bool]string{true: "met", false: "missed"}[ok])...)
}

// equal refuses to compare runs that did not compute the same. Flower adds up float32 (24 bits) of 50 or 200 clients in the order in
// which they happen to answer, so that the last bits differ from run to run.
func equal(a, b *figures) error {
	if !slices.EqualFunc(a.losses, b.losses, func(x, y float64) bool { return math.Abs(x-y) <= 1e-5*max(1, math.Abs(x)) }) {
		return fmt.Errorf("the losses differ: %v and %v", a.losses, b.losses)
	}
	return nil
}

func (o nativeOptions) orRounds(n int) int {
	if o.rounds > 0 {
		return o.rounds
	}
	return n
}

func seconds(all []*figures, of func(*figures) time.Duration) float64 {
	var v []time.Duration
	for _, f := range all {
		v = append(v, of(f))
	}
	return median(v).Seconds()
}

// small: 10 numbers, 2 clients.
func small(ctx context.Context, o nativeOptions, version string) error {
	s := setting{clients: 2, rounds: o.orRounds(3), numbers: 10}
	if _, err := o.onPergola(ctx, version, s); err != nil { // fills caches
		return err
	}
	var theirs, ours []*figures
	for range o.runs {
		a, err := o.onPlain(ctx, version, s)
		if err != nil {
			return err
		}
		b, err := o.onPergola(ctx, version, s)
		if err != nil {
			return err
		}
		if err := equal(a, b); err != nil {
			return err
		}
		theirs, ours = append(theirs, a), append(ours, b)
	}
	t := o.table("flwr %s, small app: %d rounds, 2 clients, engine %s; medians of %d runs, in seconds", version, s.rounds, o.engine, o.runs)
	fmt.Fprintln(t, "\tplain\tpergola\tratio\t")
	total := func(f *figures) time.Duration { return f.total }
	started := func(f *figures) time.Duration { return f.started }
	rounded := func(f *figures) time.Duration { return f.rounded }
	ratio(t, "from nothing to the first round", seconds(theirs, started), seconds(ours, started))
	round := ratio(t, "per round", seconds(theirs, rounded), seconds(ours, rounded))
	whole := ratio(t, "from nothing to finished", seconds(theirs, total), seconds(ours, total))
	if err := t.Flush(); err != nil {
		return err
	}
	o.goal(whole >= goalSmallTotal, "from nothing to finished %d ×", goalSmallTotal)
	o.goal(round >= goalSmallRound, "per round %d ×", goalSmallRound)
	return nil
}

// large: one array of many megabytes, 2 clients at 2 sites, across the hub.
func large(ctx context.Context, o nativeOptions, version string) error {
	s := setting{clients: 2, rounds: o.orRounds(3), numbers: o.megabytes * 1_000_000 / bytesPerNumber}
	if _, err := o.onPergola(ctx, version, setting{clients: 2, rounds: 1, numbers: 10}); err != nil { // fills caches
		return err
	}
	a, err := o.onPlain(ctx, version, s)
	if err != nil {
		return err
	}
	// Of plain Flower one run, which is long; of ours, which are short, the middle one, and another one for the memory.
	weighed, err := o.onPergola(ctx, version, s)
	if err != nil {
		return err
	}
	s.unweighed = true
	var ours []*figures
	for range o.runs {
		b, err := o.onPergola(ctx, version, s)
		if err != nil {
			return err
		}
		if err := equal(a, b); err != nil {
			return err
		}
		ours = append(ours, b)
	}
	slices.SortFunc(ours, func(x, y *figures) int { return cmp.Compare(x.total, y.total) })
	b := ours[len(ours)/2]
	t := o.table("flwr %s, %d MB of arrays in a message: %d rounds, 2 clients, engine %s; the middle of %d runs, in seconds", version, o.megabytes, s.rounds, o.engine, o.runs)
	fmt.Fprintln(t, "\tplain\tpergola\tratio\t")
	app := ratio(t, "in the app", a.app, b.app)
	ratio(t, "per round", a.rounded.Seconds(), b.rounded.Seconds())
	whole := ratio(t, "from nothing to finished", a.total.Seconds(), b.total.Seconds())
	ratio(t, "peak memory of all processes, GB", float64(a.used.peak)/1e9, float64(weighed.used.peak)/1e9)
	if err := t.Flush(); err != nil {
		return err
	}
	if err := o.steps(ctx, s, b); err != nil {
		return err
	}
	limit := int64(goalGoMemory<<20) + 2*int64(o.megabytes)*1_000_000
	largest := int64(0)
	fmt.Fprint(o.stdout, "anonymous memory of each Go process at most, MB:")
	for _, kind := range slices.Sorted(maps.Keys(weighed.used.anon)) {
		largest = max(largest, weighed.used.anon[kind])
		fmt.Fprintf(o.stdout, "  %s %.0f", kind, float64(weighed.used.anon[kind])/1e6)
	}
	fmt.Fprintln(o.stdout)
	o.goal(app >= goalLargeApp, "in the app %d ×", goalLargeApp)
	o.goal(whole >= goalLargeTotal, "from nothing to finished %d ×", goalLargeTotal)
	o.goal(largest <= limit, "at most %.0f MB in a Go process", float64(limit)/1e6)
	return nil
}

// steps tells where the time inside the app goes, beside what limits it on this machine.
func (o nativeOptions) steps(ctx context.Context, s setting, f *figures) error {
	size := float64(s.numbers * bytesPerNumber)
	copied := memcpy(s.numbers * bytesPerNumber)
	h, err := newLinkHouse(filepath.Join(o.work))
	if err != nil {
		return err
	}
	near, far, err := h.pairOf(ctx, true)
	if err != nil {
		return err
	}
	tls, err := carry(near, far, int64(max(s.numbers*bytesPerNumber, 64<<20)))
	if err := errors.Join(err, near.Close(), far.Close()); err != nil {
		return err
	}
	// The model goes to each site once a round (evaluate and the next train share it, and there is one more at the start), and each client's comes back.
	down, up := float64(2*s.rounds+2), float64(2*s.rounds)
	rest := f.app - f.own - f.clients
	t := o.table("where the %.2f s in the app go", f.app)
	fmt.Fprintln(t, "step\tseconds\tshare\tlimit, seconds\t")
	share := func(name string, v float64, limit string) {
		fmt.Fprintf(t, "%s\t%.3f\t%.0f %%\t%s\t\n", name, v, 100*v/f.app, limit)
	}
	share("clients' own arithmetic, the slower of each phase", f.clients, "the app's")
	share("aggregation of the strategy", f.own, "the app's")
	// Per message process, one copy in and one out; sites work side by side where there are cores.
	copies := (down + up) * 2 * size / copied
	// The model lies at the hub and at two sites, and two replies at their sites and at the hub: once each, if all memory is used again.
	fresh, err := touch(7 * s.numbers * bytesPerNumber)
	if err != nil {
		return err
	}
	share("everything else: Flower's objects, copies, the way", rest, fmt.Sprintf("%.3f copies (%.1f GB/s), %.3f TLS (%.1f GB/s), %.3f new memory (%.1f GB/s)",
		copies, copied/1e9, (down+up)*size/tls, tls/1e9, 7*size/fresh, fresh/1e9))
	if err := t.Flush(); err != nil {
		return err
	}
	by := f.used.byKind()
	fmt.Fprintf(o.stdout, "CPU time, s (%d cores):", runtime.NumCPU())
	for _, kind := range slices.Sorted(maps.Keys(by)) {
		if by[kind] >= 50*time.Millisecond {
			fmt.Fprintf(o.stdout, "  %s %.1f", kind, by[kind].Seconds())
		}
	}
	fmt.Fprintln(o.stdout)
	return nil
}

// memcpy is how many bytes a second one core copies, warm: the best of five.
func memcpy(n int) (best float64) {
	from, to := make([]byte, n), make([]byte, n)
	for range 6 {
		begun := time.Now()
		copy(to, from)
		best = max(best, float64(n)/time.Since(begun).Seconds())
	}
	return best
}

// touch is how many bytes a second one core gets of memory that it has not had before.
func touch(n int) (float64, error) {
	pages, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return 0, os.NewSyscallError("mmap", err)
	}
	begun := time.Now()
	for i := 0; i < n; i += os.Getpagesize() {
		pages[i] = 1
	}
	speed := float64(n) / time.Since(begun).Seconds()
	return speed, os.NewSyscallError("munmap", unix.Munmap(pages))
}

// clients: many logical clients at 2 sites, beside Flower's simulation engine.
func clients(ctx context.Context, o nativeOptions, version string) error {
	many := o.many
	if many == nil {
		many = []int{50, 200}
	}
	for _, n := range many {
		s := setting{clients: n, rounds: o.orRounds(10), numbers: 10}
		a, err := o.onRay(ctx, version, s)
		if err != nil {
			return err
		}
		b, err := o.onPergola(ctx, version, s)
		if err != nil {
			return err
		}
		if err := equal(a, b); err != nil {
			return err
		}
		t := o.table("flwr %s, %d clients, %d rounds, engine %s, in seconds", version, n, s.rounds, o.engine)
		fmt.Fprintln(t, "\tsimulation (Ray)\tpergola\tratio\t")
		round := ratio(t, "per round, the first one apart", a.later.Seconds(), b.later.Seconds())
		ratio(t, "per round, all", a.rounded.Seconds(), b.rounded.Seconds())
		ratio(t, "from nothing to the first round", a.started.Seconds(), b.started.Seconds())
		ratio(t, "from nothing to finished", a.total.Seconds(), b.total.Seconds())
		ratio(t, "peak memory of all processes, GB", float64(a.used.peak)/1e9, float64(b.used.peak)/1e9)
		if err := t.Flush(); err != nil {
			return err
		}
		o.goal(round >= goalClients, "per round, the first one apart, %d ×", goalClients)
	}
	return nil
}

// idle: what a job costs whose clients are at work for long.
func idle(ctx context.Context, o nativeOptions, version string) error {
	s := setting{clients: 2, rounds: 1, numbers: 10, wait: o.window + 5*time.Second, window: o.window}
	a, err := o.onPlain(ctx, version, s)
	if err != nil {
		return err
	}
	b, err := o.onPergola(ctx, version, s)
	if err != nil {
		return err
	}
	t := o.table("flwr %s, a job that waits, %.0f s: CPU time of all its processes", version, o.window.Seconds())
	fmt.Fprintln(t, "\tplain\tpergola\tratio\t")
	ratio(t, "% of a core", 100*a.idle.Seconds()/o.window.Seconds(), 100*b.idle.Seconds()/o.window.Seconds())
	return t.Flush()
}

// messages: what a message costs as clients grow.
func messages(ctx context.Context, o nativeOptions, version string) error {
	many := o.many
	if many == nil {
		many = []int{2, 10, 50, 200}
	}
	type row struct {
		n int
		f *figures
	}
	var rows []row
	for _, n := range many {
		f, err := o.onPergola(ctx, version, setting{clients: n, rounds: o.orRounds(10), numbers: 10})
		if err != nil {
			return err
		}
		rows = append(rows, row{n, f})
	}
	s := setting{clients: 2, rounds: o.orRounds(10), numbers: 10}
	if s.rounds > 3 {
		s.rounds = 3
	}
	a, err := o.onPlain(ctx, version, s)
	if err != nil {
		return err
	}
	t := o.table("flwr %s, cost of a message (train and evaluate of all clients)", version)
	fmt.Fprintln(t, "clients\tmessages\tper message, ms\tCPU of all processes from start to end per message, ms\tpeak memory, GB\t")
	for _, r := range rows {
		fmt.Fprintf(t, "%d\t%d\t%.2f\t%.2f\t%.2f\t\n", r.n, r.f.messages, 1e3*r.f.later.Seconds()/float64(2*r.n), 1e3*r.f.used.total().Seconds()/float64(r.f.messages), float64(r.f.used.peak)/1e9)
	}
	fmt.Fprintf(t, "plain, 2\t%d\t%.2f\t%.2f\t%.2f\t\n", a.messages, 1e3*a.later.Seconds()/float64(2*s.clients), 1e3*a.used.total().Seconds()/float64(a.messages), float64(a.used.peak)/1e9)
	return t.Flush()
}
