package runner

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/bundle"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/proc"
)

// The test binary is also the runner that Start starts.
func TestMain(m *testing.M) {
	if len(os.Args) == 4 && os.Args[1] == "runner" {
		ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM)
		defer cancel()
		if err := Main(ctx, os.Args[3], slog.New(slog.NewTextHandler(os.Stderr, nil))); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

// patience is how long anything may take before a test gives up.
const patience = 30 * time.Second

func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// party is one whose runner waits for an interpreter that never answers.
func party(t *testing.T) (dir string, spec Spec, pidFile string) {
	t.Helper()
	dir = t.TempDir()
	app := t.TempDir()
	pyproject := "[project]\nname = \"app\"\nversion = \"1\"\ndependencies = [\"flwr\"]\n[tool.flwr.app.components]\nserverapp = \"app:server\"\nclientapp = \"app:client\"\n"
	for name, text := range map[string]string{"app.py": "", "pyproject.toml": pyproject} {
		if err := os.WriteFile(filepath.Join(app, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	b, err := bundle.Build(app, bundle.Input{App: bundle.Meta{Name: "app", Version: "1"}, Lock: []byte("x"), Job: []byte("{}")})
	if err != nil {
		t.Fatal(err)
	}
	packed, err := os.Create(filepath.Join(t.TempDir(), "packed"))
	if err != nil {
		t.Fatal(err)
	}
	defer packed.Close()
	if err := b.Write(packed); err != nil {
		t.Fatal(err)
	}
	if _, err := packed.Seek(0, 0); err != nil {
		t.Fatal(err)
	}
	unpacked := filepath.Join(t.TempDir(), "bundle")
	if _, err := bundle.Extract(packed, unpacked, b.Digest, bundle.Limits{}); err != nil {
		t.Fatal(err)
	}
	pidFile = filepath.Join(t.TempDir(), "pid")
	if err := syscall.Mkfifo(pidFile, 0o600); err != nil {
		t.Fatal(err)
	}
	python := filepath.Join(t.TempDir(), "python")
	if err := os.WriteFile(python, []byte("#!/bin/sh\necho $$ > "+pidFile+"\nexec sleep 1000\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	id := job.NewID(time.Now())
	return dir, Spec{
		Job: id, Party: job.HubParty, Count: 1, Spec: job.Spec{}.WithDefaults(), Bundle: unpacked, Logs: filepath.Join(dir, "logs"),
		Results: filepath.Join(dir, "results"), Cache: t.TempDir(), Python: python, Existing: true, Mark: "test-" + string(id),
	}, pidFile
}

func start(t *testing.T, dir string, spec Spec) *Handle {
	t.Helper()
	h, err := Start(dir, spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		h.Kill()
		<-h.Gone()
		h.Release()
		if err := h.Clean(spec.Mark); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			b, err := os.ReadFile(OutputFile(dir))
			t.Logf("the runner said (%v):\n%s", err, b)
		}
	})
	return h
}

// asked waits until the interpreter was started, and gives its pid.
func asked(t *testing.T, pidFile string) int {
	t.Helper()
	pid := make(chan string, 1)
	go func() {
		b, err := os.ReadFile(pidFile) // a fifo: until somebody has written
		if err != nil {
			t.Error(err)
		}
		pid <- string(b)
	}()
	select {
	case text := <-pid:
		n, err := strconv.Atoi(strings.TrimSpace(text))
		if err != nil {
			t.Fatal(err)
		}
		return n
	case <-time.After(patience):
		f, err := os.OpenFile(pidFile, os.O_WRONLY, 0)
		if err == nil {
			f.Close() // frees the reader
		}
		t.Fatal("the interpreter was not started")
		return 0
	}
}

// gone waits until a process is no more: one that is not a child gives no sign.
func gone(t *testing.T, pid int) {
	t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || strings.Contains(string(b), ") Z ") {
			return
		}
	}
	t.Errorf("process %d is left", pid)
}

// told collects entries and checks their order.
type told struct {
	t  *testing.T
	es []Entry
}

func (k *told) add(e Entry) error {
	if want := int64(len(k.es)) + 1; e.Seq != want {
		k.t.Errorf("entry %d came where %d was due", e.Seq, want)
	}
	k.es = append(k.es, e)
	return nil
}

func (k *told) states() string {
	var out []string
	for _, e := range k.es {
		var c job.PartyStateChange
		if e.Event.Kind == job.KindPartyState && e.Event.Decode(&c) == nil {
			s := string(c.To)
			if c.Cause != nil {
				s += " " + string(c.Cause.Code)
			}
			out = append(out, s)
		}
	}
	return strings.Join(out, ", ")
}

func TestAPartyThatFailsSaysWhy(t *testing.T) {
	dir, spec, _ := party(t)
	spec.Python = "/nowhere/python"
	h := start(t, dir, spec)
	k := &told{t: t}
	if err := h.Keep(within(t), 0, spec.Mark, NewWant(), k.add); err != nil {
		t.Fatal(err)
	}
	if got := k.states(); got != "preparing, failed python-unsuitable" {
		t.Errorf("its states were %s", got)
	}
	var last job.PartyStateChange
	if err := k.es[len(k.es)-1].Event.Decode(&last); err != nil || last.Cause == nil || last.Cause.Party != job.HubParty {
		t.Errorf("the cause is %+v (%v), want one of the hub", last.Cause, err)
	}
	// Who comes later reads the same from what it left.
	h2, err := Attach(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer h2.Release()
	k2 := &told{t: t}
	if err := h2.Watch(within(t), 0, k2.add); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(k.states(), k2.states()); d != "" {
		t.Error(d)
	}
	for _, name := range []string{"app", "flwr"} {
		if _, err := os.Stat(filepath.Join(dir, name)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", name, err)
		}
	}
}

func TestAPartyEndsWhenAsked(t *testing.T) {
	for _, d := range []pb.Desired{pb.Desired_DESIRED_STOP, pb.Desired_DESIRED_KILL} {
		t.Run(d.String(), func(t *testing.T) {
			dir, spec, pidFile := party(t)
			h := start(t, dir, spec)
			child := asked(t, pidFile)
			want := NewWant()
			want.Set(d, 0)
			k := &told{t: t}
			if err := h.Keep(within(t), 0, spec.Mark, want, k.add); err != nil {
				t.Fatal(err)
			}
			if got := k.states(); got != "preparing, done" {
				t.Errorf("its states were %s, want it done without a fault", got)
			}
			gone(t, h.Pid())
			gone(t, child)
		})
	}
}

func TestARunnerThatIsKilledHasDied(t *testing.T) {
	dir, spec, pidFile := party(t)
	h := start(t, dir, spec)
	child := asked(t, pidFile)
	k := &told{t: t}
	err := h.Keep(within(t), 0, spec.Mark, NewWant(), func(e Entry) error {
		h.Kill() // with the first entry
		return k.add(e)
	})
	if !errors.Is(err, ErrDied) || !strings.Contains(err.Error(), "killed") {
		t.Errorf("the end is %v, want that it died, and how", err)
	}
	gone(t, child)
	// A later starter sees the same, without knowing how.
	h2, err := Attach(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer h2.Release()
	k2 := &told{t: t}
	if err := h2.Watch(within(t), 0, k2.add); !errors.Is(err, ErrDied) || k2.states() != "preparing" {
		t.Errorf("attached: %v, %s", err, k2.states())
	}
}

// A runner outlives its starter's interest, and serves the next one from any entry on.
func TestAttachToALivingRunner(t *testing.T) {
	dir, spec, pidFile := party(t)
	h := start(t, dir, spec)
	asked(t, pidFile)
	ctx, cancel := context.WithCancel(within(t))
	if err := h.Keep(ctx, 0, spec.Mark, NewWant(), func(Entry) error { cancel(); return nil }); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	h2, err := Attach(dir)
	if err != nil {
		t.Fatal(err)
	}
	if h2.Pid() != h.Pid() {
		t.Errorf("attached to %d, started %d", h2.Pid(), h.Pid())
	}
	select {
	case <-h2.Gone():
		t.Fatal("the runner ended with its first starter's interest")
	default:
	}
	want := NewWant()
	want.Set(pb.Desired_DESIRED_STOP, 0)
	var seqs []int64
	if err := h2.Keep(within(t), 1, spec.Mark, want, func(e Entry) error { seqs = append(seqs, e.Seq); return nil }); err != nil {
		t.Fatal(err)
	}
	for i, n := range seqs {
		if n != int64(i)+2 {
			t.Errorf("from entry 1 on came %v", seqs)
			break
		}
	}
	if _, err := Attach(t.TempDir()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("attached to nothing: %v", err)
	}
}

// A runner on a leash ends by itself when the process at the other end is gone, however it went.
func TestLeash(t *testing.T) {
	holder := exec.Command("sleep", "1000")
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	begun, err := proc.StartTime(holder.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv(LeashVar, fmt.Sprintf("%d:%d", holder.Process.Pid, begun))
	dir, spec, pidFile := party(t)
	h := start(t, dir, spec)
	child := asked(t, pidFile)
	if err := holder.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = holder.Wait() // says that it was killed
	k := &told{t: t}
	if err := h.Keep(within(t), 0, spec.Mark, NewWant(), k.add); err != nil {
		t.Fatal(err)
	}
	if got := k.states(); got != "preparing, done" {
		t.Errorf("its states were %s", got)
	}
	gone(t, child)
	t.Setenv(LeashVar, "nonsense")
	if _, err := leash(); err == nil {
		t.Error("a leash to nothing was accepted")
	}
}

// What is wanted goes one way only, and whoever waits hears of each step.
func TestCellGoesOneWay(t *testing.T) {
	for seed := range uint64(200) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		c := newCell()
		var top pb.Desired
		sites := 0
		for range 20 {
			d, n := pb.Desired(rnd.IntN(5)), rnd.IntN(4)
			_, _, changed := c.get()
			c.set(d, n)
			woken := false
			select {
			case <-changed:
				woken = true
			default:
			}
			if higher := d > top; higher != woken {
				t.Fatalf("seed %d: from %s to %s: woken %t", seed, top, d, woken)
			} else if higher {
				top, sites = d, n
			}
			if got, n, _ := c.get(); got != top || n != sites {
				t.Fatalf("seed %d: %s with %d, want %s with %d", seed, got, n, top, sites)
			}
		}
	}
	c := newCell()
	ctx, cancel := context.WithCancelCause(t.Context())
	got := make(chan error, 1)
	go func() {
		_, err := c.running(ctx)
		got <- err
	}()
	c.set(pb.Desired_DESIRED_UP, 0)
	c.set(pb.Desired_DESIRED_STOP, 0)
	cancel(errStop)
	if err := <-got; !errors.Is(err, errStop) {
		t.Errorf("a stop before the run: %v", err)
	}
}

// No two parties ever have the same address, however many ask at once; it is free again when its holder is gone.
func TestClaimedAddressesAreTheirOwn(t *testing.T) {
	var (
		mu  sync.Mutex
		all = map[string]net.Listener{}
		wg  sync.WaitGroup
	)
	for range 200 {
		wg.Go(func() {
			ip, ln, err := claimAddress(t.Context())
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			if all[ip] != nil {
				t.Errorf("%s was given twice", ip)
			}
			all[ip] = ln
		})
	}
	wg.Wait()
	own := netip.MustParsePrefix("127.64.0.0/10")
	for ip, ln := range all {
		addr := netip.MustParseAddr(ip)
		if last := addr.As4()[3]; !own.Contains(addr) || last == 0 || last == 255 {
			t.Errorf("%s is not one of those to be had", ip)
		}
		var lc net.ListenConfig
		if l, err := lc.Listen(t.Context(), "unix", ln.Addr().String()); !errors.Is(err, syscall.EADDRINUSE) {
			if err == nil {
				l.Close()
			}
			t.Errorf("%s could be claimed twice: %v", ip, err)
		}
		ln.Close()
		l, err := lc.Listen(t.Context(), "unix", ln.Addr().String())
		if err != nil {
			t.Errorf("%s is not free again: %v", ip, err)
			continue
		}
		l.Close()
	}
}
