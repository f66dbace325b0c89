package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/pergolafl/pergola/internal/bundle"
	"github.com/pergolafl/pergola/internal/client"
	"github.com/pergolafl/pergola/internal/config"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/logs"
	"github.com/pergolafl/pergola/internal/site"
)

// cutter passes connections on to a hub, and cuts each after a number of bytes.
type cutter struct {
	addr, to string
	after    func() int64 // bytes of a connection, both ways together

	up, down, cuts atomic.Int64
	wg             sync.WaitGroup
}

func newCutter(t *testing.T, to string, after func() int64) *cutter {
	t.Helper()
	var lc net.ListenConfig
	ln, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &cutter{addr: ln.Addr().String(), to: to, after: after}
	var mu sync.Mutex // guards open
	open := map[net.Conn]bool{}
	c.wg.Go(func() {
		for {
			in, err := ln.Accept()
			if err != nil {
				return
			}
			var d net.Dialer
			out, err := d.DialContext(t.Context(), "tcp", to)
			if err != nil {
				in.Close()
				continue
			}
			mu.Lock()
			open[in], open[out] = true, true
			mu.Unlock()
			c.join(in, out)
		}
	})
	t.Cleanup(func() {
		ln.Close()
		mu.Lock()
		for conn := range open {
			conn.Close()
		}
		mu.Unlock()
		c.wg.Wait()
	})
	return c
}

func (c *cutter) join(in, out net.Conn) {
	var left atomic.Int64
	left.Store(c.after())
	pass := func(to, from net.Conn, count *atomic.Int64) {
		defer in.Close()
		defer out.Close()
		buf := make([]byte, 32<<10)
		for {
			n, err := from.Read(buf)
			if rest := left.Add(-int64(n)); rest < 0 && n > 0 {
				n = max(0, n+int(max(rest, int64(-n)))) // in the middle of whatever this is
				err = io.ErrClosedPipe
				if left.Swap(-1<<60) > -1<<59 {
					c.cuts.Add(1)
				}
			}
			count.Add(int64(n))
			if _, e := to.Write(buf[:n]); e != nil || err != nil {
				return
			}
		}
	}
	c.wg.Go(func() { pass(out, in, &c.up) })
	c.wg.Go(func() { pass(in, out, &c.down) })
}

// over has an agent reach its hub by way of a cutter.
func (s *daemon) over(t *testing.T, c *cutter) {
	t.Helper()
	path := filepath.Join(s.dir, site.ConfigFile)
	var conf site.Config
	err := config.Read(path, &conf)
	if err == nil {
		conf.Hub = []string{c.addr}
		err = config.Write(path, conf)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func (u *user) over(c *cutter) {
	u.t.Helper()
	if err := config.Write(filepath.Join(u.dir, "pergola", "contexts", "test", client.File), client.Context{Hubs: []string{c.addr}, User: "anna"}); err != nil {
		u.t.Fatal(err)
	}
}

// numberedLines counts in the output of `pergola logs --json` what each site's client app has numbered.
func numberedLines(t *testing.T, out string) map[string][]int {
	t.Helper()
	got := map[string][]int{}
	for line := range strings.Lines(out) {
		var l struct {
			Party, Line string
			Time        *time.Time
			LeftOut     int64 `json:"left_out"`
		}
		if err := json.Unmarshal([]byte(line), &l); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		if l.LeftOut != 0 {
			t.Errorf("something is left out: %s", line)
		}
		var round, n int
		if i := strings.Index(l.Line, "line "); i >= 0 {
			if _, err := fmt.Sscanf(l.Line[i:], "line %d %d", &round, &n); err == nil {
				got[l.Party] = append(got[l.Party], n)
				if l.Time == nil || time.Since(*l.Time) > time.Hour {
					t.Errorf("the line has no proper time: %s", line)
				}
			}
		}
	}
	return got
}

// While programs print numbered lines, all connections are cut again and again, in the middle of anything, and agent and hub are
// killed and started again in turn: the hub gets each line once, and whoever follows does as well.
func TestLogsOverOutages(t *testing.T) {
	t.Parallel()
	idle <- struct{}{}
	defer func() { <-idle }()
	const rate, seconds = 6000, 5
	f := daemons(t, "site-1", "site-2")
	c := newCutter(t, f.addrs[0], func() int64 { return 30_000 + rand.Int64N(150_000) })
	for _, s := range f.sites {
		s.over(t, c)
	}
	f.start()
	f.listens(t)
	u := f.user(t, "anna")
	u.over(c)
	id := f.submit(t, "faulty", job.Spec{RunConfig: []string{`fault="lines"`, "rate=" + strconv.Itoa(rate), "seconds=" + strconv.Itoa(seconds)}, Flwr: oldFlwr, Sites: []string{"site-1", "site-2"}})
	follow := u.command("logs", string(id), "--follow", "--json")
	var lines, diag bytes.Buffer
	follow.Stdout, follow.Stderr = &lines, &diag
	if err := follow.Start(); err != nil {
		t.Fatal(err)
	}
	f.watch(t, id, 0, func(e job.Event) bool { return e.Kind == job.KindRound })
	size := func() int64 {
		n, err := logs.Size(filepath.Join(f.hub.dir, "jobs", string(id), "logs", "site-1", "client_app_log.txt"))
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	grows := func(by int64) {
		t.Helper()
		for want, late := size()+by, time.Now().Add(time.Minute); size() < want; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(late) {
				t.Fatalf("the hub's copy has %d bytes, and does not grow", size())
			}
		}
	}
	for _, d := range []*daemon{f.sites[0], f.hub, f.sites[0]} {
		grows(20_000)
		d.kill()
		d.start()
	}
	if err := follow.Wait(); err != nil {
		t.Errorf("%v: %s", err, diag.String())
	}
	f.listens(t)
	u.dir, u.t = f.user(t, "anna").dir, t // not cut any more
	for what, out := range map[string]string{"what was followed": lines.String(), "the hub's copy": first2(u.does(0, "logs", string(id), "--json"))} {
		got := numberedLines(t, out)
		for _, party := range []string{"site-1", "site-2"} {
			if n := len(got[party]); n != rate*seconds {
				t.Errorf("%s has %d lines of %s, want %d", what, n, party, rate*seconds)
			}
			for i, n := range got[party] {
				if i != n {
					t.Errorf("%s of %s has line %d where %d should be", what, party, n, i)
					break
				}
			}
		}
	}
	if c.cuts.Load() < 3 {
		t.Errorf("only %d connections were cut", c.cuts.Load())
	}
	// By time, by number, by program.
	all := numberedLines(t, first2(u.does(0, "logs", string(id), "--since", "1h", "--program", "flwr-ca", "--party", "site-1", "--json")))
	if len(all) != 1 || len(all["site-1"]) != rate*seconds {
		t.Errorf("the last hour of site-1's client app has %d lines", len(all["site-1"]))
	}
	if out := first2(u.does(0, "logs", string(id), "--since", "2099-01-01")); out != "" {
		t.Errorf("since the future: %.200s", out)
	}
	if out := first2(u.does(0, "logs", string(id), "--program", "client_app_log.txt", "--party", "site-2", "--tail", "3")); strings.Count(out, "\n") != 3 {
		t.Errorf("the last three lines: %s", out)
	}
	for _, args := range [][]string{{"--since", "yesterday"}, {"--program", "FLWR-XX"}, {"--tail", "-1"}} {
		if _, diag := u.does(2, append([]string{"logs", string(id)}, args...)...); !strings.Contains(diag, args[0]) {
			t.Errorf("%v: %s", args, diag)
		}
	}
	t.Logf("%d connections were cut", c.cuts.Load())
}

func first2(a, _ string) string { return a }

// peak gives the most memory that a process has had, in MiB; 0 if it is gone.
func peak(pid int) int {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(b), "VmHWM:")
	fields := strings.Fields(rest)
	if len(fields) == 0 {
		return 0
	}
	kib, err := strconv.Atoi(fields[0])
	if err != nil {
		return 0
	}
	return kib >> 10
}

// bundleMiB is the size of the file in TestLargeBundle, and memoryMiB what each process may take at most, whatever that is.
const memoryMiB = 120

var bundleMiB = 160

// A large bundle goes up and down over connections that are cut again and again, from a command line, to a hub and to an agent
// that are killed in between: what is sent again is little, and no process has the bundle in memory.
func TestLargeBundle(t *testing.T) {
	t.Parallel()
	slots <- struct{}{}
	defer func() { <-slots }()
	if n, err := strconv.Atoi(os.Getenv("PERGOLA_E2E_BUNDLE_MIB")); err == nil {
		bundleMiB = n
	}
	size := int64(bundleMiB) << 20
	f := daemons(t, "site-1")
	cut := func() int64 { return size/8 + rand.Int64N(size/4) }
	forUser, forSite := newCutter(t, f.addrs[0], cut), newCutter(t, f.addrs[0], cut)
	f.sites[0].over(t, forSite)
	f.start()
	f.listens(t)
	u := f.user(t, "anna")
	u.over(forUser)
	app := filepath.Join(t.TempDir(), "tiny")
	if out, err := exec.Command("cp", "-a", filepath.Join(apps, "tiny"), app).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	file, err := os.Create(filepath.Join(app, "model.bin"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = io.CopyN(file, rand.NewChaCha8([32]byte{1}), size) // nothing that could be compressed
	if err := errors.Join(err, file.Close()); err != nil {
		t.Fatal(err)
	}

	most := map[string]int{}
	note := func(who string, c *exec.Cmd) { most[who] = max(most[who], peak(c.Process.Pid)) }
	uploaded := func() int64 {
		found, err := filepath.Glob(filepath.Join(f.hub.dir, "bundles", ".upload-*"))
		if err != nil || len(found) != 1 {
			return 0
		}
		info, err := os.Stat(found[0])
		if err != nil {
			return 0
		}
		return info.Size()
	}
	submit := func() (*exec.Cmd, *bytes.Buffer, chan error) {
		t.Helper()
		c := u.command("submit", app, "--flwr", oldest)
		var out bytes.Buffer
		c.Stdout, c.Stderr = &out, &out
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { done <- c.Wait() }()
		return c, &out, done
	}
	kills := 0
	// The command line is killed once on the way, and the hub twice.
	c, out, done := submit()
	for wait, next := true, size/5; wait; {
		select {
		case err := <-done:
			if err == nil {
				wait = false
				break
			}
			if ws, ok := c.ProcessState.Sys().(syscall.WaitStatus); !ok || ws.Signal() != syscall.SIGKILL {
				t.Fatalf("submit: %v: %s", err, out)
			}
			c, out, done = submit()
		case <-time.After(5 * time.Millisecond): // a look at the memory, and at how far it is
			note("submit", c)
			if kills < 3 && uploaded() > next {
				kills++
				next += size / 5
				if kills == 2 {
					if err := c.Process.Kill(); err != nil {
						t.Error(err)
					}
					continue
				}
				note("hub", f.hub.cmd)
				f.hub.kill()
				f.hub.start()
			}
		}
	}
	if kills < 3 {
		t.Errorf("only %d processes were killed on the way up", kills)
	}
	lines := strings.Fields(out.String())
	id := lines[len(lines)-1]
	f.jobs = append(f.jobs, job.ID(id))
	resent := func(what string, sent, cuts int64) {
		t.Helper()
		// TLS, HTTP and what else is said take some hundredths.
		if extra := sent - size; extra > (cuts+4)*(8<<20)+size/20 {
			t.Errorf("%s: %d MiB were sent in addition over %d cuts", what, extra>>20, cuts)
		}
		t.Logf("%s: %d MiB of %d were sent, %d cuts", what, sent>>20, size>>20, cuts)
	}
	resent("up", forUser.up.Load(), forUser.cuts.Load())

	// The agent fetches it as soon as the job begins, and is killed on the way.
	got := func() (part int64, whole bool) {
		parts, _ := filepath.Glob(filepath.Join(f.sites[0].dir, "bundles", "*.part"))
		if len(parts) == 1 {
			if info, err := os.Stat(parts[0]); err == nil {
				part = info.Size()
			}
		}
		app, _ := filepath.Glob(filepath.Join(f.sites[0].dir, "bundles", strings.Repeat("[0-9a-f]", 64), "app", "model.bin"))
		return part, len(app) == 1
	}
	killed := false
	for late := time.Now().Add(2 * time.Minute); ; time.Sleep(5 * time.Millisecond) {
		note("hub", f.hub.cmd)
		note("site", f.sites[0].cmd)
		part, whole := got()
		if whole {
			break
		}
		if !killed && part > size/3 {
			killed = true
			f.sites[0].kill()
			f.sites[0].start()
		}
		if time.Now().After(late) {
			t.Fatalf("the site has %d bytes of the bundle", part)
		}
	}
	if !killed {
		t.Error("the agent was not killed on the way down")
	}
	resent("down", forSite.down.Load(), forSite.cuts.Load())
	t.Logf("peak memory: %v MiB", most)
	for who, mib := range most {
		if mib == 0 || mib > memoryMiB {
			t.Errorf("%s took %d MiB", who, mib)
		}
	}
	dirs, err := filepath.Glob(filepath.Join(f.sites[0].dir, "bundles", strings.Repeat("[0-9a-f]", 64)))
	if err != nil || len(dirs) != 1 {
		t.Fatal(dirs, err)
	}
	if content, err := bundle.Read(dirs[0]); err != nil || content.Manifest.Size() < size {
		t.Errorf("the site's bundle: %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(f.hub.dir, "bundles", ".upload-*")); len(left) > 0 {
		t.Errorf("left at the hub: %v", left)
	}
	u.dir = f.user(t, "anna").dir
	u.does(0, "abort", id, "--now")
	f.watch(t, job.ID(id), 0, func(e job.Event) bool {
		var s job.JobState
		return e.Kind == job.KindJobState && e.Decode(&s) == nil && s.To == job.Aborted
	})
}
