package proc

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/pergolafl/pergola/internal/problem"
)

// TestMain runs the tests, or, in a child of a test, the role that the test has given it.
func TestMain(m *testing.M) {
	if role := os.Getenv("PROC_TEST_ROLE"); role != "" {
		if err := roles[role](os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// roles are what needs a process of its own: being killed, being a subreaper, having a small cgroup.
var roles = map[string]func(args []string) error{}

// asRole gives a command that runs this test binary in a role.
func asRole(t *testing.T, role string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), "PROC_TEST_ROLE="+role)
	cmd.Stderr = os.Stderr
	return cmd
}

func sh(script string) []string { return []string{"/bin/sh", "-c", script} }

// python writes a script and gives the command that runs it.
func python(t *testing.T, script string) []string {
	t.Helper()
	path, err := exec.LookPath("python3")
	if err != nil {
		t.Skip("no python3 here")
	}
	file := filepath.Join(t.TempDir(), "script.py")
	if err := os.WriteFile(file, []byte(script), 0o600); err != nil {
		t.Fatal(err)
	}
	return []string{path, "-u", file}
}

// begin starts a program that is stopped with the test.
func begin(t *testing.T, spec Spec) *Process {
	t.Helper()
	p, err := Start(spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Stop(0) })
	return p
}

func contents(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// lines gives an OnLine that sends to a channel.
func lines() (func(string), <-chan string) {
	c := make(chan string, 1000)
	return func(l string) { c <- l }, c
}

// pidFrom reads a line "pid" that a program prints of a process, and gives its identity.
func pidFrom(t *testing.T, p *Process, c <-chan string) stat {
	t.Helper()
	select {
	case l := <-c:
		pid, err := strconv.Atoi(l)
		if err != nil {
			t.Fatalf("wanted a pid, got %q", l)
		}
		s, err := readStat(pid)
		if err != nil {
			t.Fatal(err)
		}
		return s
	case <-p.Done():
		t.Fatalf("the program has ended: %v %q", p.Exit(), p.Tail(50))
	}
	return stat{}
}

func gone(t *testing.T, what string, s stat) {
	t.Helper()
	if Alive(s.pid, s.start) {
		t.Errorf("%s (process %d) still runs", what, s.pid)
		_ = syscall.Kill(s.pid, syscall.SIGKILL)
	}
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func TestExitCodes(t *testing.T) {
	for _, c := range []struct {
		name, script string
		want         Exit
	}{
		{"ends well", "exit 0", Exit{}},
		{"its own code", "exit 42", Exit{Code: 42}},
		{"kills itself", "kill -9 $$", Exit{Code: -9, Signal: syscall.SIGKILL}},
		{"is terminated", "kill -15 $$", Exit{Code: -15, Signal: syscall.SIGTERM}},
		{"crashes", "kill -SEGV $$", Exit{Code: -11, Signal: syscall.SIGSEGV}},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := begin(t, Spec{Args: sh(c.script)})
			if got := p.Exit(); got != c.want {
				t.Errorf("exit %+v, want %+v", got, c.want)
			}
			if got := p.Stop(time.Minute); got != c.want {
				t.Errorf("Stop after the end gave %+v, want %+v", got, c.want)
			}
			if c.want.OK() != p.Exit().OK() {
				t.Error("OK is wrong")
			}
		})
	}
}

func TestCannotStart(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	plain := write("plain", "echo hello\n", 0o600)
	script := write("script", "#!/nowhere/bin/python3\n", 0o700)
	odd := write("odd", "\x00\x01\x02", 0o700)
	for _, c := range []struct {
		name string
		spec Spec
		want string // part of the message
	}{
		{"no command", Spec{}, "no command was given"},
		{"a program that is not there", Spec{Args: []string{"/nowhere/flower-superlink"}}, "flower-superlink could not start: there is no /nowhere/flower-superlink"},
		{"a name without a path", Spec{Args: []string{"sh-but-not-here"}}, "not a path"},
		{"a directory", Spec{Args: []string{dir}}, "is a directory"},
		{"a file that may not be executed", Spec{Args: []string{plain}}, "may not be executed"},
		{"a script without its interpreter", Spec{Args: []string{script}}, `"/nowhere/bin/python3", does not exist`},
		{"not a program", Spec{Args: []string{odd}}, "not a program for this machine"},
		{"no such working directory", Spec{Args: sh("true"), Dir: "/nowhere"}, "working directory cannot be used"},
		{"a file for a working directory", Spec{Args: sh("true"), Dir: plain}, "is not a directory"},
		{"a NUL byte in an argument", Spec{Args: sh("true \x00")}, "NUL byte"},
		{"a log that cannot be opened", Spec{Args: sh("true"), Log: "/nowhere/log.txt"}, "log cannot be opened"},
		{"too many arguments", Spec{Args: append(sh("true"), strings.Repeat("x", 4<<20))}, "too long"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p, err := Start(c.spec)
			if err == nil {
				p.Stop(0)
				t.Fatal("it did start")
			}
			e, ok := errors.AsType[*problem.Error](err)
			if !ok || e.Code != problem.ProgramFailed || e.Next == "" || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v\nwant a %s with a next step and %q", err, problem.ProgramFailed, c.want)
			}
			if _, err := Run(t.Context(), c.spec); problem.CodeOf(err) != problem.ProgramFailed {
				t.Errorf("Run gave %v", err)
			}
		})
	}
}

func TestRelativePathIsBelowDir(t *testing.T) {
	dir := t.TempDir()
	if err := os.Symlink("/bin/sh", filepath.Join(dir, "shell")); err != nil {
		t.Fatal(err)
	}
	out, err := Run(t.Context(), Spec{Args: []string{"./shell", "-c", "pwd"}, Dir: dir})
	if err != nil || strings.TrimSpace(out.Stdout) != dir {
		t.Errorf("got %q, %v, want %s", out.Stdout, err, dir)
	}
}

func TestEnvironment(t *testing.T) {
	t.Setenv("FROM_PARENT", "yes")
	const script = `echo "$A,$FROM_PARENT"`
	for _, c := range []struct {
		name string
		env  []string
		want string
	}{
		{"nil is ours", nil, ",yes"},
		{"what is given is complete, the last of a key counts", []string{"A=1", "A=2"}, "2,"},
		{"empty is empty", []string{}, ","},
	} {
		out, err := Run(t.Context(), Spec{Args: sh(script), Env: c.env})
		if err != nil || strings.TrimSpace(out.Stdout) != c.want {
			t.Errorf("%s: got %q %v, want %q", c.name, out.Stdout, err, c.want)
		}
	}
}

func TestLogEchoAndOrder(t *testing.T) {
	log := filepath.Join(t.TempDir(), "superlink_log.txt")
	if err := os.WriteFile(log, []byte("of the first start\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var echo syncBuffer
	var want, wantEcho strings.Builder
	want.WriteString("of the first start\n")
	for i := range 200 {
		fmt.Fprintf(&want, "out %d\nerr %d\n", i, i)
		fmt.Fprintf(&wantEcho, "[FLWR-SL@hub] out %d\n[FLWR-SL@hub] err %d\n", i, i)
	}
	var got []string
	p := begin(t, Spec{
		Args: sh(`i=0; while [ $i -lt 200 ]; do echo out $i; echo err $i >&2; i=$((i+1)); done`),
		Log:  log, Prefix: "FLWR-SL@hub", Echo: &echo, OnLine: func(l string) { got = append(got, l) },
	})
	<-p.Done()
	if s := contents(t, log); s != want.String() {
		t.Errorf("log:\n%s", s)
	}
	if s := echo.String(); s != wantEcho.String() {
		t.Errorf("echo:\n%s", s)
	}
	if want := strings.Split(strings.TrimSpace(want.String()), "\n")[1:]; !slices.Equal(got, want) {
		t.Errorf("lines: %q", got)
	}
	if tail := p.Tail(2); !slices.Equal(tail, []string{"out 199", "err 199"}) {
		t.Errorf("Tail(2) = %q", tail)
	}
	if n := len(p.Tail(1000)); n != tailLines {
		t.Errorf("%d lines kept, want %d", n, tailLines)
	}
	if n := len(p.Tail(-1)); n != 0 {
		t.Errorf("Tail(-1) gave %d", n)
	}
}

// A line is in the file by the time it is told of, while the program still runs.
func TestFlushedPerLine(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log.txt")
	on, c := lines()
	p := begin(t, Spec{Args: sh("echo here; exec sleep 1000"), Log: log, OnLine: on})
	select {
	case <-c:
	case <-p.Done():
		t.Fatalf("ended: %v", p.Exit())
	}
	if got := contents(t, log); got != "here\n" {
		t.Errorf("log %q", got)
	}
}

// Reference row 17: one byte that is not UTF-8 ended the log there.
func TestInvalidUTF8Survives(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log.txt")
	on, c := lines()
	p := begin(t, Spec{Args: sh(`printf 'a\377b\n\303\nend\000\n'; printf 'no newline \360\237'`), Log: log, OnLine: on})
	<-p.Done()
	if got, want := contents(t, log), "a\xffb\n\xc3\nend\x00\nno newline \xf0\x9f\n"; got != want {
		t.Errorf("log %q, want %q", got, want)
	}
	for _, want := range []string{"a\uFFFDb", "\uFFFD", "end\x00", "no newline \uFFFD"} {
		if got := <-c; got != want {
			t.Errorf("line %q, want %q", got, want)
		}
	}
}

func TestHugeLineInBoundedMemory(t *testing.T) {
	const size = 100_000_000
	log := filepath.Join(t.TempDir(), "log.txt")
	var echo syncBuffer
	on, c := lines()
	args := python(t, fmt.Sprintf("import sys\nfor i in range(100): sys.stdout.write('é' * %d)\nsys.stdout.write('\\nafter\\n')\n", size/100/2))
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	p := begin(t, Spec{Args: args, Log: log, OnLine: on, Prefix: "X", Echo: &echo, Env: append(os.Environ(), "PYTHONUTF8=1")})
	<-p.Done()
	runtime.ReadMemStats(&after)
	if used := after.TotalAlloc - before.TotalAlloc; used > 16<<20 {
		t.Errorf("%d bytes allocated for a line of %d", used, size)
	}
	st, err := os.Stat(log)
	if err != nil || st.Size() != size+int64(len("\nafter\n")) {
		t.Errorf("log has %d bytes, %v", st.Size(), err)
	}
	if l := <-c; len(l) != MaxLine || strings.Trim(l, "é") != "" {
		t.Errorf("OnLine got %d bytes, %q…", len(l), l[:20])
	}
	if l := <-c; l != "after" {
		t.Errorf("then %q", l)
	}
	if !strings.Contains(echo.String(), fmt.Sprintf("… (%d bytes in all)\n[X] after\n", size)) {
		t.Error("the echo does not tell that the line was cut")
	}
}

func TestProgressLinesAreStoredOnce(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log.txt")
	args := python(t, `
import sys
w = sys.stdout.write
w("start\n")
for i in range(5001): w(f"\r{i}/5000"); i % 500 or sys.stdout.flush()
w("\nend\r\n")
`)
	for _, progress := range []bool{false, true} {
		if err := os.RemoveAll(log); err != nil {
			t.Fatal(err)
		}
		var echo syncBuffer
		on, c := lines()
		p := begin(t, Spec{Args: args, Log: log, OnLine: on, Prefix: "P", Echo: &echo, Progress: progress})
		<-p.Done()
		if got, want := contents(t, log), "start\n5000/5000\nend\r\n"; got != want {
			t.Errorf("log %q, want %q", got, want)
		}
		for _, want := range []string{"start", "5000/5000", "end"} {
			if got := <-c; got != want {
				t.Errorf("line %q, want %q", got, want)
			}
		}
		want := "[P] start\n[P] 5000/5000\n[P] end\n"
		if progress {
			want = "\r[P] 4999/5000\r[P] 5000/5000\n[P] end\n"
		}
		if got := echo.String(); !strings.HasSuffix(got, want) || (!progress && got != want) {
			t.Errorf("Progress %v: echo ends %q, want %q", progress, got[max(0, len(got)-100):], want)
		}
	}
}

func TestFullDiskIsToldOnceAndTheProgramGoesOn(t *testing.T) {
	var errs []error
	n := 0
	p := begin(t, Spec{
		Args: sh(`i=0; while [ $i -lt 20000 ]; do echo a line that is long enough to fill the pipe; i=$((i+1)); done; exit 5`),
		Log:  "/dev/full", OnLine: func(string) { n++ }, OnLogError: func(err error) { errs = append(errs, err) },
	})
	if e := p.Exit(); e.Code != 5 {
		t.Errorf("exit %v", e)
	}
	if len(errs) != 1 || !errors.Is(errs[0], syscall.ENOSPC) {
		t.Errorf("errors %v, want ENOSPC once", errs)
	}
	if n != 20000 {
		t.Errorf("%d lines, want 20000", n)
	}
}

type brokenEcho struct{ n int }

func (b *brokenEcho) Write([]byte) (int, error) { b.n++; return 0, io.ErrClosedPipe }

func TestBrokenEchoIsGivenUp(t *testing.T) {
	var e brokenEcho
	log := filepath.Join(t.TempDir(), "log.txt")
	p := begin(t, Spec{Args: sh("echo a; echo b"), Log: log, Echo: &e})
	if <-p.Done(); e.n != 1 || contents(t, log) != "a\nb\n" {
		t.Errorf("%d writes, log %q", e.n, contents(t, log))
	}
}

func TestStop(t *testing.T) {
	for _, c := range []struct {
		name   string
		script string // prints a line when ready
		grace  time.Duration
		want   int
	}{
		{"one that obeys", "echo r; exec sleep 1000", time.Minute, -15},
		{"one that ends orderly", `trap 'exit 7' TERM; echo r; while :; do sleep 1000 & wait $!; done`, time.Minute, 7},
		{"one that ignores SIGTERM", `trap '' TERM; echo r; while :; do sleep 1000; done`, time.Millisecond, -9},
		{"no grace", "trap 'exit 7' TERM; echo r; while :; do sleep 1000; done", 0, -9},
		{"a stopped one is continued so that it hears", "echo r; kill -STOP $$; exec sleep 1000", time.Minute, -15},
		{"a stopped one that ignores SIGTERM", "trap '' TERM; echo r; while :; do kill -STOP $$; done", time.Millisecond, -9},
	} {
		t.Run(c.name, func(t *testing.T) {
			on, ready := lines()
			p := begin(t, Spec{Args: sh(c.script), OnLine: on})
			<-ready
			if got := p.Stop(c.grace); got.Code != c.want || got.OOM {
				t.Errorf("exit %+v, want %d", got, c.want)
			}
			gone(t, "the program", p.begun)
			if _, err := readStat(p.Pid()); err == nil {
				t.Error("it is still a zombie")
			}
		})
	}
}

func TestManyStopsAtOnce(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log.txt")
	on, ready := lines()
	p := begin(t, Spec{
		Args: sh(`trap 'echo term' TERM; echo r; while :; do sleep 1000 & wait $!; done`), Log: log, OnLine: on,
	})
	<-ready
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			if e := p.Stop(time.Duration(200+10*i) * time.Millisecond); e.Code != -9 {
				t.Errorf("exit %v", e)
			}
			if Alive(p.Pid(), p.StartTime()) {
				t.Error("Stop came back before the end")
			}
		})
	}
	wg.Wait()
	if got := contents(t, log); strings.Count(got, "term") > 1 {
		t.Errorf("log %q, want at most one SIGTERM", got)
	}
}

// Reference row 20: what the program has started outlived it there.
func TestNothingOutlivesTheProgram(t *testing.T) {
	const quiet = " </dev/null >/dev/null 2>&1 "
	for _, c := range []struct {
		name   string
		script string // prints the pid of the one that wants to outlive it
		hidden bool   // once its parent is gone nothing shows to whom it belongs: TestSubreaper has that case
	}{
		{"a child", `sleep 1000 & echo $!`, false},
		{"a child in its own session", `setsid sleep 1000 & echo $!`, false},
		{"a child in its own session without environment and output", `setsid env -i sleep 1000` + quiet + `& echo $!`, true},
		{"an orphan in its own session", `(setsid sh -c 'echo $$; exec sleep 1000' &)`, false},
		{"an orphan that ignores signals", `(setsid sh -c 'trap "" TERM HUP INT; echo $$; while :; do sleep 1000; done' &)`, false},
		{"an orphan without environment", `(setsid env -i sh -c 'echo $$; exec sleep 1000' &)`, false},
		{"an orphan without output", `(setsid sh -c 'echo $$; exec sleep 1000` + quiet + `' &)`, false},
		{"a child that stands still", `setsid sh -c 'echo $$; kill -STOP $$; sleep 1000' &`, false},
		{"an orphan that forks on and on", `(setsid sh -c 'echo $$; while :; do (sleep 1000 &); sleep 0.01; done' &)`, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, grace := range []time.Duration{time.Minute, 0} {
				on, pids := lines()
				p := begin(t, Spec{Args: sh(c.script + "\nexec sleep 1000"), OnLine: on})
				child := pidFrom(t, p, pids)
				p.Stop(grace)
				gone(t, "what was started", child)
			}
			if c.hidden {
				return
			}
			fifo := filepath.Join(t.TempDir(), "end")
			if err := syscall.Mkfifo(fifo, 0o600); err != nil {
				t.Fatal(err)
			}
			on, pids := lines()
			p := begin(t, Spec{Args: sh(c.script + "\nread x <'" + fifo + "'; exit 3"), OnLine: on})
			child := pidFrom(t, p, pids)
			if err := os.WriteFile(fifo, []byte("x\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			if e := p.Exit(); e.Code != 3 {
				t.Errorf("exit %v %q", e, p.Tail(9))
			}
			gone(t, "what was started", child)
		})
	}
}

// One that we may not kill holds the output: ourselves.
func TestHeldOutputDoesNotBlockDone(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log.txt")
	on, c := lines()
	p := begin(t, Spec{Args: sh("echo r; exec sleep 1000"), Log: log, OnLine: on})
	<-c
	held, err := os.OpenFile(procPath(p.Pid(), "fd/1"), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	if _, err := held.WriteString("from elsewhere\n"); err != nil {
		t.Fatal(err)
	}
	p.Stop(time.Minute)
	if got := contents(t, log); got != "r\nfrom elsewhere\n" {
		t.Errorf("log %q", got)
	}
}

// A listener that is slow, and a pipe that is held: what was written before is not lost.
func TestSlowListenerLosesNothing(t *testing.T) {
	release, left := make(chan struct{}), make(chan struct{})
	n := 0
	p := begin(t, Spec{
		Args:   sh(`i=0; while [ $i -lt 3000 ]; do echo line number $i; i=$((i+1)); done`),
		OnLine: func(string) { <-release; n++ },
	})
	go func() {
		defer close(left)
		<-p.left
		close(release)
	}()
	<-p.Done()
	<-left
	if n != 3000 {
		t.Errorf("%d lines, want 3000", n)
	}
}

func TestPdeathsigFollowsTheProcessNotTheThread(t *testing.T) {
	on, c := lines()
	p := begin(t, Spec{Args: sh("echo r; exec sleep 1000"), OnLine: on})
	<-c
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(runtime.LockOSThread) // a goroutine that ends locked takes its thread with it
	}
	wg.Wait()
	if e := p.Stop(time.Minute); e.Code != -15 {
		t.Errorf("exit %v, want -15: it was killed with a thread of ours", e)
	}
}

func init() {
	roles["parent"] = func([]string) error {
		p, err := Start(Spec{Args: sh("echo $$; exec sleep 1000"), Echo: os.Stdout})
		if err != nil {
			return err
		}
		<-p.Done()
		return nil
	}
}

func TestKillOfTheParentKillsTheProgram(t *testing.T) {
	cmd := asRole(t, "parent")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		t.Fatal(err)
	}
	s, err := readStat(pid)
	if err != nil {
		t.Fatal(err)
	}
	v, ok := catch(s)
	if !ok {
		t.Fatal("the program does not run")
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait() // killed, as we know
	if left := awaitGone([]victim{v}, time.Now().Add(time.Minute)); len(left) != 0 {
		t.Error("the program outlives the process that watched it")
	}
}

func init() {
	roles["subreaper"] = func([]string) error {
		if err := Subreaper(); err != nil {
			return err
		}
		// Children of others, whose exit codes are not ours to take: one waited for late, in our
		// group and in its own.
		var cmds []*exec.Cmd
		for i := range 10 {
			cmd := exec.Command("/bin/sh", "-c", "exit 9")
			cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: i%2 == 0}
			if err := cmd.Start(); err != nil {
				return err
			}
			cmds = append(cmds, cmd)
		}
		on, c := lines()
		// An orphan that ends by itself, and one that hides: no environment, no output, own session.
		const quiet = " </dev/null >/dev/null 2>&1 "
		p, err := Start(Spec{
			Args: sh(`(setsid true &)& (setsid true &)& wait
				(setsid env -i sh -c 'sleep 1000 & echo $!; exec sleep 1000` + quiet + `' &)& wait; exec sleep 1000`), OnLine: on,
		})
		if err != nil {
			return err
		}
		hidden, err := strconv.Atoi(<-c)
		if err != nil {
			return err
		}
		// Two more, so that something happens while the first runs.
		for range 2 {
			if _, err := Run(context.Background(), Spec{Args: sh("(setsid true &) & wait")}); err != nil {
				return err
			}
		}
		s, err := readStat(hidden)
		if err != nil {
			return fmt.Errorf("the hidden one was ended too early: %w", err)
		}
		p.Stop(time.Minute)
		if Alive(s.pid, s.start) {
			return fmt.Errorf("the hidden process %d outlives the last program", hidden)
		}
		for _, cmd := range cmds {
			if err := cmd.Wait(); err == nil || err.Error() != "exit status 9" {
				return fmt.Errorf("an exit code was taken from who waited for it: %w", err)
			}
		}
		all, err := processes()
		if err != nil {
			return err
		}
		if left := childrenOf(os.Getpid(), all); len(left) != 0 {
			return fmt.Errorf("children left: %+v", left)
		}
		return nil
	}
}

func TestSubreaper(t *testing.T) {
	if out, err := asRole(t, "subreaper").Output(); err != nil {
		t.Errorf("%v %s", err, out)
	}
}

func init() {
	// oom CGROUP moves itself there, then runs a program that wants too much.
	roles["oom"] = func(args []string) error {
		if err := os.WriteFile(filepath.Join(args[0], "cgroup.procs"), []byte("0"), 0o600); err != nil {
			return err
		}
		p, err := Start(Spec{Args: args[1:], Echo: os.Stderr})
		if err != nil {
			return err
		}
		fmt.Print(p.Exit().OOM, " ", p.Exit().Code)
		p, err = Start(Spec{Args: sh("kill -9 $$")})
		if err != nil {
			return err
		}
		fmt.Print(" ", p.Exit().OOM)
		return nil
	}
}

func TestOutOfMemory(t *testing.T) {
	root := "/sys/fs/cgroup"
	if st, err := os.Stat(root + "/memory"); err == nil && st.IsDir() {
		root += "/memory"
	}
	group := filepath.Join(root, fmt.Sprintf("pergola-proc-test-%d", os.Getpid()))
	if err := os.Mkdir(group, 0o700); err != nil {
		t.Skipf("cannot make a cgroup: %v", err)
	}
	t.Cleanup(func() {
		if err := os.Remove(group); err != nil {
			t.Error(err)
		}
	})
	limited := false
	for _, f := range []string{"memory.max", "memory.limit_in_bytes"} {
		if os.WriteFile(filepath.Join(group, f), []byte("100000000"), 0o600) == nil {
			limited = true
		}
	}
	if !limited {
		t.Skip("cannot limit the memory of a cgroup")
	}
	args := python(t, "b = b'x' * 400_000_000")
	out, err := asRole(t, "oom", append([]string{group}, args...)...).Output()
	if err != nil || string(out) != "true -9 false" {
		t.Errorf("got %q, %v; want an out-of-memory kill that is told from another", out, err)
	}
}

func TestOOMFiles(t *testing.T) {
	root := t.TempDir()
	for name, text := range map[string]string{
		"a/b/memory.events":             "low 0\nhigh 3\noom 1\noom_kill 2\noom_group_kill 0\n",
		"memory/c/memory.oom_control":   "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n",
		"odd/memory.events":             "oom_kill many\n",
		"memory/old/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\n",
	} {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for cgroups, want := range map[string]OOMCount{
		"0::/a/b\n":                     {2, true},
		"4:memory:/c\n0::/\n":           {5, true},
		"4:memory:/old\n0::/\n":         {},
		"0::/odd\n":                     {},
		"0::/nowhere\n":                 {},
		"":                              {},
		"nonsense\n1:name=systemd:/a/b": {},
	} {
		if got := oomIn(root, cgroups); got != want {
			t.Errorf("%q: %+v, want %+v", cgroups, got, want)
		}
	}
}

func TestRun(t *testing.T) {
	// Reference row 18: more than a pipe holds, on both streams, with an exit code.
	out, err := Run(t.Context(), Spec{Args: python(t, `
import sys
for i in range(300): sys.stdout.write("o" * 1000); sys.stderr.write("e" * 1000)
sys.exit(4)
`)})
	if err != nil || out.Exit.Code != 4 || out.Truncated ||
		out.Stdout != strings.Repeat("o", 300_000) || out.Stderr != strings.Repeat("e", 300_000) {
		t.Errorf("exit %v, %d and %d bytes, truncated %v, %v", out.Exit, len(out.Stdout), len(out.Stderr), out.Truncated, err)
	}

	on, c := lines()
	out, err = Run(t.Context(), Spec{Args: sh(`printf 'a\377\r\nbcdef'; printf 12345 >&2`), MaxOutput: 5, OnLine: on})
	if err != nil || out.Stdout != "a\xff\r\nb" || out.Stderr != "12345" || !out.Truncated {
		t.Errorf("%+v, %v", out, err)
	}
	got := []string{<-c, <-c, <-c}
	slices.Sort(got)
	if want := []string{"12345", "a\uFFFD", "bcdef"}; !slices.Equal(got, want) {
		t.Errorf("lines %q, want %q", got, want)
	}
}

func TestRunEndsWithItsContext(t *testing.T) {
	mine := problem.New(problem.Deadline, "allow more", "the job's time is over")
	for _, c := range []struct {
		name  string
		cause error
		code  problem.Code
	}{
		{"cancelled", nil, problem.ProgramFailed},
		{"with a problem as cause", mine, problem.Deadline},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			var child stat
			out, err := Run(ctx, Spec{
				Name: "slow", Args: sh(`trap '' TERM; setsid sleep 1000 & echo $!; while :; do sleep 1000; done`),
				OnLine: func(l string) {
					pid, _ := strconv.Atoi(l)
					child, _ = readStat(pid)
					cancel(c.cause)
				},
			})
			if problem.CodeOf(err) != c.code || !strings.Contains(err.Error(), "slow was stopped") || out.Exit.Code != -9 || out.Stdout == "" {
				t.Errorf("%+v, %v", out, err)
			}
			gone(t, "its child", child)
			if _, err := Run(ctx, Spec{Args: sh("true")}); err == nil {
				t.Error("ran although the context had ended")
			}
		})
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := Run(ctx, Spec{Args: sh("exec sleep 1000")}); !errors.Is(err, context.DeadlineExceeded) || problem.CodeOf(err) != problem.ProgramFailed {
		t.Errorf("after the time limit: %v", err)
	}
}

func TestKillMarked(t *testing.T) {
	mark := fmt.Sprintf("test-%d", os.Getpid())
	start := func(mark string) *exec.Cmd {
		cmd := exec.Command("/bin/sh", "-c", "setsid sleep 1000 & echo $!; wait")
		cmd.Env = append(os.Environ(), MarkVar+"="+mark)
		return cmd
	}
	read := func(cmd *exec.Cmd) stat {
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		line, err := bufio.NewReader(out).ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		pid, _ := strconv.Atoi(strings.TrimSpace(line))
		s, err := readStat(pid)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	one, other := start(mark), start(mark+"-other")
	child, otherChild := read(one), read(other)
	n, err := KillMarked(mark)
	_ = one.Wait()
	if err != nil || n != 2 {
		t.Errorf("killed %d, %v, want 2", n, err)
	}
	gone(t, "the child of the marked one", child)
	if !Alive(otherChild.pid, otherChild.start) {
		t.Error("another mark was killed too")
	}
	if n, err := KillMarked(mark); n != 0 || err != nil {
		t.Errorf("again: %d, %v", n, err)
	}
	if n, err := KillTree(other.Process.Pid); n != 2 || err != nil {
		t.Errorf("KillTree: %d, %v, want 2", n, err)
	}
	_ = other.Wait()
	gone(t, "the child", otherChild)
	if n, err := KillTree(other.Process.Pid); n != 0 || err != nil {
		t.Errorf("KillTree of one that is gone: %d, %v", n, err)
	}
	if _, err := KillMarked(""); err == nil {
		t.Error("an empty mark was accepted")
	}
}

func TestDescendants(t *testing.T) {
	on, c := lines()
	p := begin(t, Spec{Args: sh(`sh -c 'sleep 1000 & echo $!; wait' & wait`), OnLine: on})
	inner := pidFrom(t, p, c)
	got := Descendants(p.Pid())
	if len(got) != 2 || !slices.Contains(got, inner.pid) {
		t.Errorf("descendants of %d: %v, want two with %d", p.Pid(), got, inner.pid)
	}
	if !slices.Contains(Descendants(os.Getpid()), inner.pid) {
		t.Error("not among our own")
	}
}

// A pid that was reused is another process: it is neither alive in the old one's name nor killed.
func TestIdentity(t *testing.T) {
	p := begin(t, Spec{Args: sh("exec sleep 1000")})
	start, err := StartTime(p.Pid())
	if err != nil || start != p.StartTime() || !Alive(p.Pid(), start) {
		t.Errorf("start %d, %v, want %d and alive", start, err, p.StartTime())
	}
	if Alive(p.Pid(), start-1) {
		t.Error("alive in another's name")
	}
	other := p.begun
	other.start--
	if _, ok := catch(other); ok {
		t.Error("caught in another's name")
	}
	v := victim{stat: other, fd: -1} // as on a kernel without pidfds
	if err := v.signal(unix.SIGKILL); !errors.Is(err, unix.ESRCH) {
		t.Errorf("signalled in another's name: %v", err)
	}
	if !Alive(p.Pid(), start) {
		t.Error("it was killed")
	}
	v.stat = p.begun
	if err := v.signal(unix.SIGKILL); err != nil {
		t.Error(err)
	}
	if e := p.Exit(); e.Code != -9 {
		t.Errorf("exit %v", e)
	}
	if _, err := StartTime(p.Pid()); err == nil {
		t.Error("a process that is gone has a start time")
	}
}

func TestParseStat(t *testing.T) {
	tail := " S 10 20 30 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 98765 1 2\n"
	for in, want := range map[string]stat{
		"2 (kthreadd) S 0 0 0 0 -1 2129984 1 2 3 4 5 6 7 8 20 0 1 0 5 1 2\n": {2, 0, 0, 'S', true, 5},

		"7 (sh)" + tail:               {7, 10, 20, 'S', false, 98765},
		"7 (a) Z 1 (b) c\n(x)" + tail: {7, 10, 20, 'S', false, 98765},
		"7 ())" + tail:                {7, 10, 20, 'S', false, 98765},
	} {
		if got, err := parseStat([]byte(in)); err != nil || got != want {
			t.Errorf("%q: %+v, %v", in, got, err)
		}
	}
	for _, in := range []string{"", "7", "7 (sh", "7 )(" + tail, "7 (sh) S 1 2", "x (sh)" + tail, "7 (sh) SS" + tail[2:]} {
		if got, err := parseStat([]byte(in)); err == nil {
			t.Errorf("%q: %+v", in, got)
		}
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add([]byte("7 (sh) S 10 20 30 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 98765 1 2\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, err := parseStat(b); err == nil && s.state == 0 {
			t.Errorf("%q: no state", b)
		}
	})
}

// Programs that start while others end are let be: between its fork and its exec a child holds the others' pipes open.
func TestStartsWhileOthersEnd(t *testing.T) {
	t.Parallel()
	var wg sync.WaitGroup
	for range 6 {
		wg.Go(func() {
			for range 60 {
				out, err := Run(t.Context(), Spec{Name: "true", Args: []string{"/bin/true"}})
				if err != nil || !out.Exit.OK() {
					t.Errorf("it ended with %s, %v", out.Exit, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

func TestKillCommand(t *testing.T) {
	arg := fmt.Sprintf("100%d", os.Getpid())
	cmd, other := exec.Command("/bin/sleep", arg, "1"), exec.Command("/bin/sleep", arg)
	for _, c := range []*exec.Cmd{cmd, other} {
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
	}
	start, err := StartTime(other.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	// Its command line is there once it has become sleep.
	for s := time.Now(); time.Since(s) < 10*time.Second && !strings.Contains(string(readSome(cmd.Process.Pid, "cmdline")), arg); time.Sleep(time.Millisecond) {
	}
	if n, err := KillCommand(arg, "1"); n != 1 || err != nil {
		t.Errorf("killed %d, %v, want 1", n, err)
	}
	_ = cmd.Wait()
	if !Alive(other.Process.Pid, start) {
		t.Error("one with fewer arguments was killed too")
	}
	_ = other.Process.Kill()
	_ = other.Wait()
	if _, err := KillCommand(); err == nil {
		t.Error("no arguments were accepted")
	}
}

func TestSuspendedBelow(t *testing.T) {
	cmd := exec.Command("/bin/sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	find := func() (found []Suspended) {
		t.Helper()
		all, err := SuspendedBelow(os.Getpid())
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range all {
			if s.Pid == cmd.Process.Pid {
				found = append(found, s)
			}
		}
		return found
	}
	for _, c := range []struct {
		signal syscall.Signal
		want   int
	}{{syscall.SIGSTOP, 1}, {syscall.SIGCONT, 0}} {
		if err := cmd.Process.Signal(c.signal); err != nil {
			t.Fatal(err)
		}
		var found []Suspended
		for s := time.Now(); time.Since(s) < 10*time.Second; time.Sleep(time.Millisecond) {
			if found = find(); len(found) == c.want {
				break
			}
		}
		if len(found) != c.want || c.want == 1 && (found[0].Name != "sleep" || !Alive(found[0].Pid, found[0].Start)) {
			t.Errorf("after %s: %+v", c.signal, found)
		}
	}
}
