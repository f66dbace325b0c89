package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"io"
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

	"github.com/pergolafl/pergola/internal/flower"
	"github.com/pergolafl/pergola/internal/hub"
	"github.com/pergolafl/pergola/internal/pyenv"
)

// A machine is as much of one as the kernel gives without another kernel: its own network, processes, host name and file
// systems. Of this machine's disk it sees the programs, and can write to none of it. Its first process ends with the test,
// however that ends, and with it everything that runs there, and its network.
type machine struct {
	t    *testing.T
	name string
	dir  string // its disk: home, tmp, state, cache, …
	home string
	ip   string
	init *exec.Cmd

	python string // an interpreter
	points int    // what is below its folder for temporary files from the start: where a cache or a Python that is there was mounted
}

// boot is what a machine's first process does: $1 has the disk, $2 the home, $3 the folder for temporary files, $4 the cache, $5 the
// folder of a Python, which may be below the home. Bash takes in processes that have lost their parents, as an init has to.
const boot = `set -e
mount --make-rprivate /
mount -t proc proc /proc
mount --bind "$1" /mnt
mount --bind "$5" /mnt/python; mount -o remount,bind,ro /mnt/python
cover() { [ ! -d "$2" ] || [ -L "$2" ] || mount --bind "/mnt/$1" "$2"; }
cover home "$2"; [ "$2" = /home ] || cover homes /home
cover state /var/lib; cover run /run; cover vartmp /var/tmp; cover shm /dev/shm; cover tmp /tmp; [ "$3" = /tmp ] || cover tmp "$3"
mkdir -p "$4" "$5"
mount --bind /mnt/cache "$4"
mount --bind /mnt/python "$5"; mount -o remount,bind,ro "$5"
umount -l /mnt
mount -o remount,bind,ro /
echo up
while read -r _; do :; done`

// machines starts some, joined by a router as the Internet joins them: users and sites have a way to the hubs and to nobody else, and
// nobody has a way out.
func machines(t *testing.T, hubs, others []string) map[string]*machine {
	t.Helper()
	ip, err := exec.LookPath("ip")
	if err != nil {
		ip, err = exec.LookPath("/usr/sbin/ip")
	}
	if os.Geteuid() != 0 || err != nil {
		t.Skip("machines are imitated by namespaces: that takes root, and ip of iproute2")
	}
	all := map[string]*machine{}
	router := newMachine(t, "router")
	in := func(m *machine, args ...string) {
		t.Helper()
		// The network alone: a pid means the same outside.
		args = append([]string{"--target", strconv.Itoa(m.init.Process.Pid), "--net", "--"}, args...)
		if out, err := exec.CommandContext(t.Context(), "nsenter", args...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
	}
	in(router, "sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward")
	for i, name := range append(slices.Clone(hubs), others...) {
		m := newMachine(t, name)
		all[name] = m
		net := fmt.Sprintf("10.77.%d.", i+1)
		m.ip = net + "2"
		in(router, ip, "link", "add", fmt.Sprintf("to%d", i), "type", "veth", "peer", "name", "eth0", "netns", strconv.Itoa(m.init.Process.Pid))
		in(router, ip, "addr", "add", net+"1/24", "dev", fmt.Sprintf("to%d", i))
		in(router, ip, "link", "set", fmt.Sprintf("to%d", i), "up")
		in(m, ip, "link", "set", "lo", "up")
		in(m, ip, "addr", "add", m.ip+"/24", "dev", "eth0")
		in(m, ip, "link", "set", "eth0", "up")
	}
	for i, a := range others {
		gate := fmt.Sprintf("10.77.%d.1", len(hubs)+i+1)
		for j, h := range hubs {
			in(all[a], ip, "route", "add", all[h].ip, "via", gate)
			in(all[h], ip, "route", "add", all[a].ip, "via", fmt.Sprintf("10.77.%d.1", j+1))
		}
		for _, b := range others {
			in(router, ip, "rule", "add", "from", all[a].ip, "to", all[b].ip, "prohibit")
		}
	}
	return all
}

func newMachine(t *testing.T, name string) *machine {
	t.Helper()
	m := &machine{t: t, name: name, dir: filepath.Join(t.TempDir(), name)}
	var err error
	if m.home, err = os.UserHomeDir(); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"home", "homes", "state", "run", "vartmp", "shm", "tmp", "cache", "python"} {
		if err := os.MkdirAll(filepath.Join(m.dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	in, err := pyenv.Find(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	m.python = in.Real
	m.init = exec.CommandContext(t.Context(), "bash", "-c", boot, name, m.dir, m.home, filepath.Clean(os.TempDir()), pyenv.DefaultCache(), filepath.Dir(filepath.Dir(in.Real)))
	m.init.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWPID | syscall.CLONE_NEWNS | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC}
	m.init.WaitDelay = 10 * time.Second
	stdin, err := m.init.StdinPipe() // its end is the machine's
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := m.init.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var diag bytes.Buffer
	m.init.Stderr = &diag
	if err := m.init.Start(); err != nil {
		if errors.Is(err, fs.ErrPermission) {
			t.Skipf("no namespaces are to be had: %v", err)
		}
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		m.off()
	})
	if line, err := io.ReadAll(io.LimitReader(stdout, 3)); err != nil || string(line) != "up\n" {
		stdin.Close() // it ends by itself, and says how
		ended := m.init.Wait()
		t.Fatalf("machine %s did not start: it said %q (%v) and ended with %v: %s", name, line, err, ended, diag.String())
	}
	points, err := os.ReadDir(filepath.Join(m.dir, "tmp"))
	if err != nil {
		t.Fatal(err)
	}
	m.points = len(points)
	return m
}

// off is a power failure.
func (m *machine) off() {
	_ = m.init.Process.Kill() // it may have ended
	_ = m.init.Wait()
}

// command is one at that machine, which sees nothing of the test's own settings but what is about package indexes.
func (m *machine) command(args ...string) *exec.Cmd {
	in := []string{"--target", strconv.Itoa(m.init.Process.Pid), "--net", "--pid", "--mount", "--uts", "--ipc", "--", "sh", "-c", `cd && exec "$@"`, "sh"}
	c := exec.CommandContext(m.t.Context(), "nsenter", append(in, args...)...)
	c.Env = append(slices.DeleteFunc(os.Environ(), func(kv string) bool { return strings.HasPrefix(kv, "XDG_") || strings.HasPrefix(kv, "PERGOLA_") }),
		"HOME="+m.home, "TMPDIR=/tmp", "NO_PROXY=*", "PERGOLA_CACHE="+pyenv.DefaultCache(), "PERGOLA_PYTHON="+m.python)
	c.WaitDelay = 5 * time.Second
	return c
}

// exe is the command, which each machine has a copy of.
func (m *machine) exe() string { return filepath.Join(m.home, "pergola") }

// path gives the path by which the test sees one of the machine's home.
func (m *machine) path(rel ...string) string {
	return filepath.Join(append([]string{m.dir, "home"}, rel...)...)
}

// does runs pergola there, which has to succeed.
func (m *machine) does(args ...string) string {
	m.t.Helper()
	c := m.command(append([]string{m.exe()}, args...)...)
	var out, diag bytes.Buffer
	c.Stdout, c.Stderr = &out, &diag
	if err := c.Run(); err != nil {
		m.t.Fatalf("%s: pergola %s: %v\n%s%s", m.name, strings.Join(args, " "), err, out.String(), diag.String())
	}
	return strings.TrimSpace(out.String())
}

// unit is a hub or an agent at a machine.
type unit struct {
	m    *machine
	args []string
	cmd  *exec.Cmd
	pid  string        // there
	over chan struct{} // closed when it has ended; nil: it is not to end
	mu   sync.Mutex    // guards out
	out  bytes.Buffer
}

func (m *machine) service(args ...string) *unit {
	s := &unit{m: m, args: args}
	s.shown()
	s.start()
	return s
}

// shown has its output be shown if the test fails.
func (s *unit) shown() {
	s.m.t.Cleanup(func() {
		if s.m.t.Failed() {
			s.m.t.Logf("%s, %v:\n%s", s.m.name, s.args, s.text())
		}
	})
}

func (s *unit) start() {
	s.m.t.Helper()
	s.cmd = s.m.command(append([]string{"sh", "-c", `echo $$ && exec "$@"`, "sh", s.m.exe()}, s.args...)...)
	pr, pw := io.Pipe()
	s.cmd.Stdout, s.cmd.Stderr = pw, lockedWriter{&s.mu, &s.out}
	if err := s.cmd.Start(); err != nil {
		s.m.t.Fatal(err)
	}
	first := make(chan string, 1)
	go func() {
		var line []byte
		for one := make([]byte, 1); !bytes.HasSuffix(line, []byte("\n")); line = append(line, one...) {
			if _, err := pr.Read(one); err != nil {
				break
			}
		}
		first <- strings.TrimSpace(string(line))
		_, _ = io.Copy(lockedWriter{&s.mu, &s.out}, pr) // until the command has ended
	}()
	s.pid = <-first
}

// stop is what systemd does: SIGTERM to the service's own process alone.
func (s *unit) stop() {
	s.m.t.Helper()
	if out, err := s.m.command("kill", "-TERM", s.pid).CombinedOutput(); err != nil {
		s.m.t.Fatalf("%v: %s", err, out)
	}
	if err := s.cmd.Wait(); err != nil && !errors.Is(err, exec.ErrWaitDelay) { // its runners may hold its output
		s.m.t.Errorf("%s, %v: %v", s.m.name, s.args, err)
	}
}

// says waits until the service has logged something.
func (s *unit) says(what string) {
	s.m.t.Helper()
	for began := time.Now(); ; time.Sleep(20 * time.Millisecond) { // it is another process's log
		over := false
		select {
		case <-s.over:
			over = true
		default:
		}
		if strings.Contains(s.text(), what) {
			return
		}
		if over || time.Since(began) > limit {
			s.m.t.Fatalf("%s, %v never said %q", s.m.name, s.args, what)
		}
	}
}

// outside gives the addresses of its own, other than loopback, at which a machine listens.
func (m *machine) outside() []string {
	var out []string
	for _, a := range listeningOf(strconv.Itoa(m.init.Process.Pid)) {
		if !strings.HasPrefix(a, "127.") && !strings.HasPrefix(a, "[00000000000000000000000000000001]") && !strings.HasPrefix(a, "[00000000000000000000ffff7f") {
			out = append(out, a)
		}
	}
	return out
}

// running gives the command lines of what runs at a machine.
func (m *machine) running() []string {
	m.t.Helper()
	const list = `for p in /proc/[2-9]* /proc/1?*; do [ $p = /proc/$$ ] || tr '\0' ' ' <$p/cmdline; echo; done 2>/dev/null`
	out, err := m.command("sh", "-c", list).Output()
	if err != nil {
		m.t.Fatal(err)
	}
	var ps []string
	for l := range strings.Lines(string(out)) {
		if l = strings.TrimSpace(l); l != "" && !strings.HasPrefix(l, "tr ") && !strings.Contains(l, "/proc/[2-9]*") {
			ps = append(ps, l)
		}
	}
	return ps
}

// A hub, two sites and a user, each on a machine of its own that shares neither disk nor loopback with any other, come from
// nothing to a job's results by the two commands each that the documents say. Meanwhile services are restarted as systemd
// does it, with another binary in place, and the hub moves to another machine with another address.
func TestMachines(t *testing.T) {
	t.Parallel()
	idle <- struct{}{}
	defer func() { <-idle }()
	const version = "1.30.0"
	ms := machines(t, []string{"hub", "hub-2"}, []string{"site-a", "site-b", "user"})
	machineOf := func(name string) *machine { return ms[name] }

	// What these machines have been given: the command, an environment with flwr, and at the user's the app and its lock.
	app := filepath.Join(machineOf("user").path(), "app")
	if err := os.CopyFS(app, os.DirFS(filepath.Join(apps, "slow"))); err != nil {
		t.Fatal(err)
	}
	if err := appendTo(filepath.Join(app, "pyproject.toml"), "\n[tool.pergola.server]\ndatabase = \"state.db\"\nrestarts = 1\n"); err != nil {
		t.Fatal(err)
	}
	env := environmentOf(t, app, version)
	for name, m := range ms {
		if err := copyFile(binary, m.path("pergola")); err != nil {
			t.Fatal(err)
		}
		what := filepath.Join("envs", filepath.Base(env))
		if name == "user" {
			what = "locks"
		}
		to := filepath.Join(m.dir, "cache", what)
		if err := os.MkdirAll(filepath.Dir(to), 0o700); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.CommandContext(t.Context(), "cp", "-a", filepath.Join(pyenv.DefaultCache(), what), to).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}

	// A lock is of an index as pip and uv are configured for it.
	if home, err := os.UserConfigDir(); err == nil {
		for _, name := range []string{"pip", "uv"} {
			if err := os.CopyFS(machineOf("user").path(".config", name), os.DirFS(filepath.Join(home, name))); err != nil && !errors.Is(err, fs.ErrNotExist) {
				t.Fatal(err)
			}
		}
	}

	// The hub: two commands.
	h, h2 := machineOf("hub"), machineOf("hub-2")
	h.does("hub", "init", "--address", h.ip+":8443", "--address", h2.ip+":8443")
	hubService := h.service("hub")
	hubService.says("the hub listens")

	// Each site: two commands. Without its token's hub it has nobody to talk to.
	services := []*unit{hubService}
	for _, name := range []string{"site-a", "site-b"} {
		m := machineOf(name)
		if out, err := m.command("bash", "-c", fmt.Sprintf("exec 3<>/dev/tcp/%s/22", h.ip)).CombinedOutput(); err == nil || !strings.Contains(string(out), "refused") {
			t.Errorf("another port of the hub's machine: %v, %s", err, out)
		}
		if out, err := m.command("bash", "-c", fmt.Sprintf("exec 3<>/dev/tcp/%s/8443", machineOf("user").ip)).CombinedOutput(); err == nil || !strings.Contains(string(out), "unreachable") {
			t.Errorf("another machine than the hub's: %v, %s", err, out)
		}
		m.does("site", "join", h.does("hub", "token", "site", name))
		s := m.service("site")
		s.says("connected")
		services = append(services, s)
	}

	// The user: two commands.
	u := machineOf("user")
	u.does("login", h.does("hub", "token", "user", "maria"), "--context", "clinic")
	submit := u.command(u.exe(), "submit", "app", "--wait", "--engine", "flower", "--flwr", version, "--run-config", "sleep=4.0", "--run-config", "num-server-rounds=2")
	said := &unit{m: u, args: []string{"submit"}, over: make(chan struct{})}
	said.shown()
	w := lockedWriter{&said.mu, &said.out}
	submit.Stdout, submit.Stderr = w, w
	if err := submit.Start(); err != nil {
		t.Fatal(err)
	}
	var failed error
	go func() {
		defer close(said.over)
		failed = submit.Wait()
	}()
	said.says("round 1")
	for _, name := range []string{"site-a", "site-b", "user"} {
		if ports := machineOf(name).outside(); len(ports) > 0 {
			t.Errorf("%s listens to the outside at %v", name, ports)
		}
	}
	if ports := h.outside(); len(ports) != 1 || !strings.HasSuffix(ports[0], ":8443") {
		t.Errorf("the hub's machine listens at %v", ports)
	}

	// Everybody is upgraded in the middle of the round: nobody's runner notices, and the round ends.
	for _, s := range services {
		newer(t, s.m.path("pergola"))
		runners := countRunners(s.m.running())
		s.stop()
		if n := countRunners(s.m.running()); n != runners || n != 1 {
			t.Errorf("%s has %d runners, and had %d before its service was stopped", s.m.name, n, runners)
		}
	}
	for _, s := range services {
		s.start()
	}
	said.says("round 2")
	if text := said.text(); strings.Contains(text, "attempt 2") {
		t.Errorf("the upgrade cost an attempt:\n%s", text)
	}

	// The hub moves: as docs/store.md has it, with a copy of the store and of the other files. The old machine is switched off.
	hubService.stop()
	const state = "state/pergola/hub"
	h.does("hub", "backup", filepath.Join(h.home, "copy.db"))
	h.off()
	from, to := filepath.Join(h.dir, state), filepath.Join(h2.dir, state)
	if err := os.MkdirAll(to, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"ca.crt", "ca.key", "hub.crt", "hub.key", hub.ConfigFile, "hub.id", "bundles", "jobs"} {
		if out, err := exec.CommandContext(t.Context(), "cp", "-a", filepath.Join(from, name), to).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	if err := copyFile(h.path("copy.db"), filepath.Join(to, hub.DatabaseFile)); err != nil {
		t.Fatal(err)
	}
	h2.service("hub").says("the hub listens")
	<-said.over
	if failed != nil {
		t.Fatalf("submit --wait: %v", failed)
	}
	text := said.text()
	for _, want := range []string{"attempt 2 of 2 begins", "succeeded"} {
		if !strings.Contains(text, want) {
			t.Errorf("the user never read %q:\n%s", want, text)
		}
	}

	// The results are at the user's machine, and nothing is left at anybody's.
	id := u.does("jobs", "--state", "succeeded", "--json")
	_, id, _ = strings.Cut(id, `"id":"`)
	id, _, _ = strings.Cut(id, `"`)
	u.does("download", id, "--out", "got")
	for _, f := range []string{"got/results/state.db", "got/logs/hub/server_app_log.txt", "got/logs/site-a/client_app_log.txt", "got/logs/site-b/client_app_log.txt"} {
		if b, err := os.ReadFile(u.path(f)); err != nil || len(b) == 0 {
			t.Errorf("%s: %d bytes, %v", f, len(b), err)
		}
	}
	for _, s := range services[1:] {
		gone := func() bool { return countRunners(s.m.running()) == 0 }
		for began := time.Now(); !gone() && time.Since(began) < endLimit; time.Sleep(50 * time.Millisecond) { // nobody tells when a process is gone
		}
		if ps := s.m.running(); len(ps) != 1 {
			t.Errorf("at %s there still run:\n%s", s.m.name, strings.Join(ps, "\n"))
		}
		if left, err := os.ReadDir(filepath.Join(s.m.dir, "state/pergola/site/jobs")); err != nil || len(left) > 0 {
			t.Errorf("at %s there is left: %v, %v", s.m.name, left, err)
		}
		if left, err := os.ReadDir(filepath.Join(s.m.dir, "tmp")); err != nil || len(left) > s.m.points {
			t.Errorf("at %s there is left: %v, %v", s.m.name, left, err)
		}
	}
}

func (s *unit) text() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.out.String()
}

func countRunners(ps []string) int {
	n := 0
	for _, p := range ps {
		if strings.Contains(p, "pergola runner --dir ") {
			n++
		}
	}
	return n
}

// environmentOf builds the environment that an app runs in, if it is not there, and gives its folder.
func environmentOf(t *testing.T, app, version string) string {
	t.Helper()
	a, err := flower.LoadApp(app)
	if err != nil {
		t.Fatal(err)
	}
	in, err := pyenv.Find(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	lock, err := pyenv.MakeLock(t.Context(), pyenv.DefaultCache(), in, pyenv.Requirements{Names: a.Dependencies, Flwr: version, RequiresPython: a.RequiresPython}, pyenv.Options{})
	if err != nil {
		t.Fatal(err)
	}
	env, err := pyenv.Ensure(t.Context(), pyenv.DefaultCache(), in, lock, pyenv.Options{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return env.Dir
}

func copyFile(from, to string) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, b, 0o700)
}
