// Package e2e runs the real command with real Flower programs, as a user does, and looks at what it says and what it
// leaves behind. Start with [start] and [run.end] in the harness; a test acts between the two.
//
// Environments are built once and kept in the user's cache folder, as for any other run.
package e2e

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/localrun"
	"github.com/pergolafl/pergola/internal/store/sqlite"
)

// limit is how long a run may take in all, environments included; it only keeps a hang from lasting for ever.
const limit = 8 * time.Minute

// endLimit is the design's promise: a job ends within 60 s of the event that ends it.
const endLimit = 60 * time.Second

var (
	binary string // the built command
	apps   string // test/apps
	slots  = make(chan struct{}, slotCount())
	idle   = make(chan struct{}, slotCount()+1) // for runs that mostly wait
)

// slotCount is how many runs may go on at once: each is a dozen processes, half of them Python.
func slotCount() int {
	if n, err := strconv.Atoi(os.Getenv("PERGOLA_E2E_SLOTS")); err == nil && n > 0 {
		return n
	}
	return 3
}

func TestMain(m *testing.M) {
	flag.Parse()
	// The slots decide how much goes on at once, not the number of cores: many runs mostly wait.
	if err := flag.Set("test.parallel", "32"); err != nil {
		panic(err)
	}
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "pergola-e2e-")
		if err != nil {
			panic(err)
		}
		defer os.RemoveAll(dir)
		if apps, err = filepath.Abs("../apps"); err != nil {
			panic(err)
		}
		binary = filepath.Join(dir, "pergola")
		build := exec.Command("go", "build", "-buildvcs=false", "-trimpath", "-o", binary, "github.com/pergolafl/pergola/cmd/pergola")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "cannot build pergola: %v\n%s", err, out)
			return 1
		}
		return m.Run()
	}())
}

// lookAtSources looks at what the command is built from: go test takes the outcome of an earlier run only if no file that a
// test (not TestMain) has looked at has changed since.
var lookAtSources = sync.OnceValue(func() error {
	for _, dir := range []string{"cmd", "internal", "go.mod"} {
		if err := filepath.WalkDir(filepath.Join("../..", dir), func(path string, d fs.DirEntry, err error) error {
			if err == nil && !d.IsDir() {
				_, err = os.Stat(path)
			}
			return err
		}); err != nil {
			return err
		}
	}
	return nil
})

// spec says how to run the command. Only app is needed.
type spec struct {
	app  string   // name of a folder of test/apps, or a path
	args []string // flags and further arguments; --json and --out come by themselves
	env  []string // in addition to the test's own
	wrap []string // a command that execs its arguments; the pid must stay the same
	out  string   // --out; default a new folder of its own
	idle bool     // it mostly waits: it takes a slot of those for such runs
	pair bool     // it goes on together with another run of its test, whose slot is for both: that one waits for this one
}

// event is a line of --json.
type event struct {
	Time  time.Time       `json:"time"`
	Kind  string          `json:"kind"`
	Party string          `json:"party"`
	Job   job.ID          `json:"job"`
	Body  json.RawMessage `json:"body"`
}

// as decodes the event's body.
func as[T any](t testing.TB, e event) T {
	t.Helper()
	var v T
	if err := json.Unmarshal(e.Body, &v); err != nil {
		t.Fatalf("%s: %v in %s", e.Kind, err, e.Body)
	}
	return v
}

// run is a `pergola run` that goes on.
type run struct {
	t    *testing.T
	spec spec
	out  string // absolute
	tmp  string // its TMPDIR, which also marks every process of this run
	app  string // path of the app
	hash string // of the app at the start
	cmd  *exec.Cmd
	exit chan struct{} // closed when the command has ended and all its output was read
	free func()        // gives the slot back

	struck time.Time // when the event happened that is to end the job
	began  time.Time

	mu      sync.Mutex // guards the rest
	events  []event
	more    chan struct{} // closed and replaced with each event
	bad     []string      // lines of stdout that are not JSON
	ports   map[string]string
	stderr  bytes.Buffer
	ended   time.Time
	waitErr error
}

// result is how a run ended.
type result struct {
	Code    int // exit status; -9 when it was killed
	Summary localrun.Summary
	Events  []event
	Stderr  string
	Seconds float64       // of the whole run
	Took    time.Duration // from strike to the end of the command; 0 without a strike
	Job     job.Job       // as the store has it; its ID is empty if no job came to be
	Parties []job.Party
	Out     string
}

// start starts `pergola run --json --out DIR` and returns at once, when one of the few slots is free.
func start(t *testing.T, s spec) *run {
	t.Helper()
	if err := lookAtSources(); err != nil {
		t.Fatal(err)
	}
	r := &run{t: t, spec: s, out: s.out, app: s.app, exit: make(chan struct{}), more: make(chan struct{}), ports: map[string]string{}}
	if !strings.ContainsRune(s.app, '/') && s.app != "" {
		r.app = filepath.Join(apps, s.app)
	}
	if r.out == "" {
		r.out = filepath.Join(t.TempDir(), "out")
	}
	r.tmp = t.TempDir()
	r.hash = hashTree(t, r.app)
	pool := slots
	if s.idle {
		pool = idle
	}
	r.free = func() {}
	if !s.pair {
		pool <- struct{}{}
		r.free = sync.OnceFunc(func() { <-pool })
	}

	args := append(slices.Clone(s.wrap), binary, "run", r.app, "--json", "--out", r.out)
	if !slices.Contains(s.args, "--engine") && !slices.Contains(s.args, "--clients") {
		args = append(args, "--engine", "flower") // most of these tests are about Flower's programs; those of the native engine say so
	}
	args = append(args, s.args...)
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	r.cmd = exec.CommandContext(ctx, args[0], args[1:]...)
	r.cmd.Env = append(append(os.Environ(), "TMPDIR="+r.tmp), s.env...)
	r.cmd.Dir = t.TempDir()
	r.cmd.Stderr = lockedWriter{&r.mu, &r.stderr}
	// A group of its own, so that an interrupt can go to the whole group as from a terminal.
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	// Whatever a killed command leaves must not hold up the test through an inherited pipe.
	r.cmd.WaitDelay = 10 * time.Second
	pr, pw, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.cmd.Stdout = pw
	r.began = time.Now()
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pw.Close()
	read := make(chan struct{})
	go func() {
		defer close(read)
		defer pr.Close()
		r.read(pr)
	}()
	go func() {
		defer close(r.exit)
		defer cancel()
		err := r.cmd.Wait()
		at := time.Now()
		select {
		case <-read:
		case <-time.After(30 * time.Second): // somebody else holds the pipe; what is left is found below
			pr.Close()
			<-read
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		r.waitErr, r.ended = err, at
	}()
	t.Cleanup(func() {
		select {
		case <-r.exit:
		default:
			_ = r.cmd.Process.Kill() // the test has failed on the way
			<-r.exit
		}
		for _, p := range r.processes() {
			_ = syscall.Kill(p.pid, syscall.SIGKILL) // reported before, if it matters
		}
		r.free()
		if t.Failed() {
			r.dump()
		}
	})
	return r
}

// lockedWriter lets a test read what was written so far.
type lockedWriter struct {
	mu *sync.Mutex
	b  *bytes.Buffer
}

func (w lockedWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.b.Write(p)
}

func (r *run) read(f *os.File) {
	sc := bufio.NewScanner(f)
	sc.Buffer(nil, 8<<20)
	for sc.Scan() {
		var e event
		err := json.Unmarshal(sc.Bytes(), &e)
		if err == nil && (e.Kind == job.KindPartyState || e.Kind == job.KindRound || e.Kind == job.KindJobState) {
			r.notePorts()
		}
		r.mu.Lock()
		if err != nil {
			r.bad = append(r.bad, sc.Text())
		} else {
			r.events = append(r.events, e)
			close(r.more)
			r.more = make(chan struct{})
		}
		r.mu.Unlock()
	}
}

// wait gives the first event, from the beginning on, for which ok is true; the test fails if the run ends without one.
func (r *run) wait(what string, ok func(event) bool) event {
	r.t.Helper()
	for n := 0; ; {
		r.mu.Lock()
		es, more := r.events, r.more
		r.mu.Unlock()
		for ; n < len(es); n++ {
			if ok(es[n]) {
				return es[n]
			}
		}
		select {
		case <-more:
		case <-r.exit:
			r.mu.Lock()
			last := len(r.events) == n
			r.mu.Unlock()
			if last {
				r.t.Fatalf("the run ended before there was: %s", what)
			}
		}
	}
}

// round waits until round n begins.
func (r *run) round(n int) event {
	r.t.Helper()
	return r.wait(fmt.Sprintf("round %d", n), func(e event) bool {
		return e.Kind == job.KindRound && as[job.Round](r.t, e).Round == n
	})
}

// jobState waits until the job is in that state.
func (r *run) jobState(s job.State) event {
	r.t.Helper()
	return r.wait("job state "+string(s), func(e event) bool {
		return e.Kind == job.KindJobState && as[job.JobState](r.t, e).To == s
	})
}

// program waits until a program was started at a party, and gives its pid.
func (r *run) program(party, name string) int {
	r.t.Helper()
	e := r.wait(name+" at "+party, func(e event) bool {
		return e.Kind == job.KindProgramStarted && e.Party == party && as[job.Program](r.t, e).Name == name
	})
	return as[job.Program](r.t, e).Pid
}

// service gives the pid of a process of Pergola's own: role is hub, site or runner, party "hub" or a site's name.
func (r *run) service(role, party string) int {
	r.t.Helper()
	dir := filepath.Join(r.out, ".state", party)
	for _, p := range r.processes() {
		i := slices.Index(p.args, "--dir")
		if len(p.args) < 2 || p.args[1] != role || i < 0 || i+1 >= len(p.args) {
			continue
		}
		if d := p.args[i+1]; d == dir || strings.HasPrefix(d, dir+"/") {
			return p.pid
		}
	}
	r.t.Fatalf("there is no %s of %s; there are:\n%s", role, party, list(r.processes()))
	return 0
}

// kill ends a process with SIGKILL: the event from which the 60 s count.
func (r *run) kill(pid int) {
	r.t.Helper()
	r.strike()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		r.t.Fatalf("kill %d: %v", pid, err)
	}
}

// interrupt is Ctrl-C: SIGINT to the command's whole process group.
func (r *run) interrupt() {
	r.t.Helper()
	if r.struck.IsZero() {
		r.strike()
	}
	if err := syscall.Kill(-r.cmd.Process.Pid, syscall.SIGINT); err != nil {
		r.t.Fatalf("interrupt: %v", err)
	}
}

// strike notes that the event which is to end the job happens now.
func (r *run) strike() { r.struck = time.Now() }

// end waits for the end and checks what holds for every run: that it came in time, that summary, summary.json and store
// agree, that nothing is left, and that the app is as it was.
func (r *run) end() result {
	r.t.Helper()
	t := r.t
	<-r.exit
	defer r.free()
	r.mu.Lock()
	res := result{Code: code(r.cmd.ProcessState), Events: r.events, Stderr: r.stderr.String(), Seconds: r.ended.Sub(r.began).Seconds(), Out: r.out}
	ended, bad := r.ended, r.bad
	r.mu.Unlock()
	if time.Since(r.began) >= limit {
		t.Errorf("the run did not end by itself within %s", limit)
	}
	if !r.struck.IsZero() {
		res.Took = ended.Sub(r.struck)
		if res.Took > endLimit {
			t.Errorf("the end came %.1f s after the event, want at most %s", res.Took.Seconds(), endLimit)
		}
	}
	if len(bad) > 0 {
		t.Errorf("lines of stdout that are not JSON: %q", bad)
	}
	if killed := res.Code < 0; !killed {
		if n := len(res.Events); n == 0 || res.Events[n-1].Kind != localrun.KindSummary {
			t.Errorf("the last line is not the summary")
		} else {
			res.Summary = as[localrun.Summary](t, res.Events[n-1])
			r.checkSummary(&res)
		}
		r.nothingLeft(0)
		if _, err := os.Stat(filepath.Join(r.out, ".state")); err == nil {
			t.Errorf("%s is left", filepath.Join(r.out, ".state"))
		}
	} else {
		// Nobody was there to tidy up: everything goes away by itself.
		r.nothingLeft(endLimit)
	}
	if got := hashTree(t, r.app); got != r.hash {
		t.Errorf("the app's folder was changed")
	}
	t.Logf("%s: exit %d, %s, %.1f s in all, %.1f s after the event", r.app, res.Code, causeText(res.Summary), res.Seconds, res.Took.Seconds())
	return res
}

func causeText(s localrun.Summary) string {
	if s.Cause == nil {
		return string(s.State)
	}
	return fmt.Sprintf("%s, cause %s of %q: %s; next: %s", s.State, s.Cause.Code, s.Cause.Party, s.Cause.Msg, s.Cause.Next)
}

// checkSummary compares what was printed with what was kept.
func (r *run) checkSummary(res *result) {
	t := r.t
	t.Helper()
	s := res.Summary
	if !s.State.Terminal() {
		t.Errorf("the summary's state is %q, which is no end", s.State)
	}
	if (s.State == job.Succeeded) != (s.Cause == nil) {
		t.Errorf("state %s with cause %v", s.State, s.Cause)
	}
	if c := s.Cause; c != nil && (c.Code == "" || c.Msg == "" || c.Next == "") {
		t.Errorf("the cause %+v lacks a code, a sentence or what to do", *c)
	}
	if s.Out == "" {
		return // nothing was started
	}
	if b, err := os.ReadFile(filepath.Join(r.out, "summary.json")); err != nil {
		t.Error(err)
	} else {
		var kept localrun.Summary
		if err := json.Unmarshal(b, &kept); err != nil {
			t.Errorf("summary.json: %v", err)
		} else if kept.State != s.State || !sameCause(kept.Cause, s.Cause) {
			t.Errorf("summary.json says %s, the last line %s", causeText(kept), causeText(s))
		}
	}
	if s.Job == "" {
		return
	}
	path := filepath.Join(r.out, "pergola.db")
	if _, err := os.Stat(path); err != nil {
		t.Error(err)
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	db, err := sqlite.Open(ctx, path)
	if err != nil {
		t.Errorf("the store: %v", err)
		return
	}
	defer db.Close()
	if res.Job, err = db.Job(ctx, s.Job); err != nil {
		t.Errorf("the store: %v", err)
		return
	}
	if res.Parties, err = db.Parties(ctx, s.Job); err != nil {
		t.Errorf("the store: %v", err)
	}
	if res.Job.State != s.State || !sameCause(res.Job.Cause, s.Cause) {
		t.Errorf("the store says %s, %+v, the summary %s", res.Job.State, res.Job.Cause, causeText(s))
	}
	for _, p := range res.Parties {
		if !p.State.Terminal() && (!res.Job.Started.IsZero() || p.State != job.PartyAbsent) {
			t.Errorf("in the store party %s is still %s", p.Name, p.State)
		}
	}
}

func sameCause(a, b *job.Cause) bool {
	if a == nil || b == nil {
		return a == b
	}
	return a.Code == b.Code && a.Party == b.Party && a.Msg == b.Msg && a.Next == b.Next
}

// nothingLeft checks that within patience no process, port or temporary file of the run is there.
func (r *run) nothingLeft(patience time.Duration) {
	r.t.Helper()
	until := time.Now().Add(patience)
	for {
		left := r.left()
		if len(left) == 0 {
			return
		}
		if !time.Now().Before(until) {
			r.t.Errorf("left behind:\n%s", strings.Join(left, "\n"))
			return
		}
		time.Sleep(50 * time.Millisecond) // processes that are not our children give no sign when they go
	}
}

func (r *run) left() []string {
	var out []string
	for _, p := range r.processes() {
		out = append(out, "process "+p.String())
	}
	for inode, addr := range listening() {
		if _, ours := r.ports[inode]; ours {
			out = append(out, "port "+addr)
		}
	}
	err := filepath.WalkDir(r.tmp, func(path string, _ fs.DirEntry, err error) error {
		if path != r.tmp {
			out = append(out, "file "+path)
		}
		return err
	})
	if err != nil {
		out = append(out, err.Error())
	}
	return out
}

func code(s *os.ProcessState) int {
	if ws, ok := s.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return -int(ws.Signal())
	}
	return s.ExitCode()
}

// process is one of a run.
type process struct {
	pid  int
	args []string
}

func (p process) String() string { return fmt.Sprintf("%d %s", p.pid, strings.Join(p.args, " ")) }

func list(ps []process) string {
	var b strings.Builder
	for _, p := range ps {
		fmt.Fprintln(&b, p)
	}
	return b.String()
}

// processes gives the living processes of this run, without the command itself while it runs: those that have its TMPDIR,
// leash or mark in their environment, or its folders in their command line or as their working directory.
func (r *run) processes() []process {
	es, err := os.ReadDir("/proc")
	if err != nil {
		r.t.Error(err)
	}
	leash, mark := fmt.Sprintf("PERGOLA_LEASH=%d:", r.cmd.Process.Pid), fmt.Sprintf("PERGOLA_MARK=run-%d-", r.cmd.Process.Pid)
	var out []process
	for _, e := range es {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == r.cmd.Process.Pid || pid == os.Getpid() {
			continue
		}
		dir := filepath.Join("/proc", e.Name())
		// Errors: it has gone meanwhile, or belongs to somebody else.
		env, _ := os.ReadFile(filepath.Join(dir, "environ"))
		line, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
		cwd, _ := os.Readlink(filepath.Join(dir, "cwd"))
		ours := bytes.Contains(line, []byte(r.out)) || within(cwd, r.out) || within(cwd, r.tmp)
		for kv := range bytes.SplitSeq(env, []byte{0}) {
			s := string(kv)
			ours = ours || s == "TMPDIR="+r.tmp || strings.HasPrefix(s, leash) || strings.HasPrefix(s, mark)
		}
		if ours {
			out = append(out, process{pid, strings.Split(strings.TrimRight(string(line), "\x00"), "\x00")})
		}
	}
	return out
}

func within(path, dir string) bool { return path == dir || strings.HasPrefix(path, dir+"/") }

// notePorts remembers what the run's processes listen on, by the inodes of their sockets.
func (r *run) notePorts() {
	all := listening()
	for _, p := range append(r.processes(), process{pid: r.cmd.Process.Pid}) {
		dir := filepath.Join("/proc", strconv.Itoa(p.pid), "fd")
		fds, err := os.ReadDir(dir)
		if err != nil {
			continue // gone
		}
		for _, fd := range fds {
			l, err := os.Readlink(filepath.Join(dir, fd.Name()))
			if err != nil {
				continue
			}
			inode := strings.TrimSuffix(strings.TrimPrefix(l, "socket:["), "]")
			if addr, ok := all[inode]; ok {
				r.mu.Lock()
				r.ports[inode] = fmt.Sprintf("%s %s", addr, p)
				r.mu.Unlock()
			}
		}
	}
}

// listened gives the addresses that processes of the run were seen to listen on, each with its process.
func (r *run) listened() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []string
	for _, a := range r.ports {
		out = append(out, a)
	}
	slices.Sort(out)
	return out
}

// listening gives the TCP sockets of this machine that listen: inode → address as in /proc/net/tcp, decoded.
func listening() map[string]string { return listeningOf("self") }

// listeningOf does so for the network in which a process is.
func listeningOf(pid string) map[string]string {
	out := map[string]string{}
	for _, name := range []string{"/proc/" + pid + "/net/tcp", "/proc/" + pid + "/net/tcp6"} {
		b, err := os.ReadFile(name)
		if err != nil {
			continue // no IPv6 here
		}
		for line := range strings.Lines(string(b)) {
			f := strings.Fields(line)
			if len(f) > 9 && f[3] == "0A" { // TCP_LISTEN
				out[f[9]] = decodeAddr(f[1])
			}
		}
	}
	return out
}

// decodeAddr reads "0100007F:1F90": the address as 32-bit words of the machine's (little-endian) order, the port as it is.
func decodeAddr(s string) string {
	host, port, _ := strings.Cut(s, ":")
	p, err := strconv.ParseUint(port, 16, 16)
	b, err2 := hex.DecodeString(host)
	if err != nil || err2 != nil || len(b)%4 != 0 {
		return s
	}
	for i := 0; i < len(b); i += 4 {
		slices.Reverse(b[i : i+4])
	}
	parts := make([]string, len(b))
	if len(b) == 4 {
		for i, c := range b {
			parts[i] = strconv.Itoa(int(c))
		}
		return fmt.Sprintf("%s:%d", strings.Join(parts, "."), p)
	}
	return fmt.Sprintf("[%x]:%d", b, p)
}

// hashTree is over names, kinds, modes and contents of what is below path; a path that is no readable folder is no reason
// to fail, since that may be the case to be tested.
func hashTree(t *testing.T, path string) string {
	t.Helper()
	h := sha256.New()
	if err := filepath.WalkDir(path, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d == nil {
			fmt.Fprintln(h, p, "unreadable")
			return nil //nolint:nilerr // see above
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		fmt.Fprintln(h, p, info.Mode(), info.ModTime().UnixNano())
		if info.Mode().IsRegular() && info.Size() < 16<<20 {
			b, err := os.ReadFile(p)
			if err != nil && !errors.Is(err, fs.ErrPermission) {
				return err
			}
			h.Write(b)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// dump shows what a failed test's run has said.
func (r *run) dump() {
	r.mu.Lock()
	defer r.mu.Unlock()
	var b strings.Builder
	for _, e := range r.events[max(0, len(r.events)-40):] {
		fmt.Fprintf(&b, "%s %s %s %.300s\n", e.Time.Format("15:04:05.000"), e.Kind, e.Party, e.Body)
	}
	fmt.Fprintf(&b, "stderr: %s\n", r.stderr.String())
	// Error: the pattern is well-formed.
	logs, _ := filepath.Glob(filepath.Join(r.out, "logs", "*.log"))
	for _, l := range logs {
		if text, err := os.ReadFile(l); err == nil {
			fmt.Fprintf(&b, "%s:\n%s\n", filepath.Base(l), text[max(0, len(text)-3000):])
		}
	}
	r.t.Log(b.String())
}

// command runs another command of pergola and gives what went wrong, "" if nothing did.
func command(t *testing.T, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	if out, err := exec.CommandContext(ctx, binary, args...).CombinedOutput(); err != nil {
		return fmt.Sprintf("pergola %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return ""
}
