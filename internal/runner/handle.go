package runner

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/cenkalti/backoff/v5"
	"golang.org/x/sys/unix"

	"github.com/pergolafl/pergola/internal/api"
	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/proc"
)

// ErrDied says that a runner ended without its last word.
var ErrDied = errors.New("the runner ended without saying how")

// Handle is a starter's end of a runner: of one that it started, or of one that it found.
type Handle struct {
	dir    string
	tmp    string // the party's TMPDIR
	id     identity
	client *api.Client
	once   sync.Once
	gone   <-chan struct{} // closed when the process is no more
	other  error           // it speaks no version that this starter does, and cannot be talked to
	silent atomic.Bool     // it was ended because it did not answer
	exit   *string         // how it ended, written before gone is closed; nil for one that another process started
}

// Start writes spec into dir and starts a runner for it: the program's own executable with "runner". The runner is a
// session of its own, so that it gets no signal of the starter's terminal and outlives the starter. Another one that an
// earlier starter has begun there, and that Attach did not find since it had not said yet who it is, is ended first.
func Start(dir string, spec Spec) (h *Handle, err error) {
	if _, err := os.Stat(filepath.Join(dir, specFile)); err == nil {
		if err := forsake(dir, spec.Mark); err != nil {
			return nil, err
		}
	}
	if spec.Tmp == "" {
		// Not below dir: the paths of the sockets that Python makes there may have 107 bytes.
		spec.Tmp = filepath.Join(os.TempDir(), "pergola-"+rand.Text()[:12])
	}
	spec.Starter = api.Runner
	if err := writeFile(filepath.Join(dir, specFile), spec); err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	out, err := os.OpenFile(filepath.Join(dir, outputFile), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	// Not CommandContext: the runner outlives whoever starts it, and is ended by SetDesired or Kill.
	cmd := exec.Command(self, "runner", "--dir", dir) //nolint:noctx // see above
	cmd.Stdout, cmd.Stderr = out, out
	// The service manager hears of the service from the service alone.
	cmd.Env = append(slices.DeleteFunc(os.Environ(), func(kv string) bool {
		return strings.HasPrefix(kv, "NOTIFY_SOCKET=") || strings.HasPrefix(kv, "WATCHDOG_")
	}), "TMPDIR="+spec.Tmp)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	// As late as can be: from here on the runner removes it, also if this process is killed.
	if err := os.Mkdir(spec.Tmp, 0o700); err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		_ = os.Remove(spec.Tmp) // empty; what failed before counts
		return nil, err
	}
	gone := make(chan struct{})
	exit := new(string)
	h = &Handle{dir: dir, tmp: spec.Tmp, gone: gone, exit: exit, client: api.NewRunnerClient(filepath.Join(dir, controlSock))}
	h.id.Pid = cmd.Process.Pid
	// An error means that it is gone already, which the goroutine below finds out too.
	h.id.Start, _ = proc.StartTime(h.id.Pid)
	go func() {
		defer close(gone)
		if err := cmd.Wait(); err != nil {
			*exit = err.Error()
		}
	}()
	return h, nil
}

// Attach finds the runner that was started in dir, by a starter that is gone. The runner may be gone as well: then Watch
// gives what it has left, and ErrDied if its last word is missing. Of one that speaks no version that this Pergola does, Watch
// says just that, and Keep ends it.
func Attach(dir string) (*Handle, error) {
	h := &Handle{dir: dir, client: api.NewRunnerClient(filepath.Join(dir, controlSock))}
	b, err := os.ReadFile(filepath.Join(dir, runnerFile))
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(b, &h.id); err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, runnerFile), err)
	}
	spec, err := readSpec(dir)
	if err != nil {
		return nil, err
	}
	h.tmp = spec.Tmp
	_, h.other = h.id.spoken()
	if boot := proc.BootID(); h.id.Boot != "" && boot != "" && h.id.Boot != boot {
		h.id = identity{} // whatever has that pid now is somebody else's
	}
	h.gone = untilGone(h.id.Pid, h.id.Start)
	return h, nil
}

// Pid is the runner's process id.
func (h *Handle) Pid() int { return h.id.Pid }

// Gone is closed when the runner's process has ended.
func (h *Handle) Gone() <-chan struct{} { return h.gone }

// Watch gives the journal's entries after seq, in order, each once, until the final one, whose giving ends it with nil.
// ErrDied: the runner is gone and said no last word. Other errors are fn's or ctx's.
func (h *Handle) Watch(ctx context.Context, seq int64, fn func(Entry) error) error {
	if h.other != nil {
		return fmt.Errorf("%w: %w", ErrDied, h.other)
	}
	bo := backoff.NewExponentialBackOff()
	bo.InitialInterval, bo.MaxInterval = 5*time.Millisecond, time.Second
	for {
		final, n, err := h.stream(ctx, seq, fn)
		if final || err != nil {
			return err
		}
		if n > seq {
			seq = n
			bo.Reset()
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-h.gone:
			return h.leftovers(seq, fn)
		case <-time.After(bo.NextBackOff()): // the socket is not there yet, or the stream broke
		}
	}
}

func (h *Handle) stream(ctx context.Context, seq int64, fn func(Entry) error) (final bool, last int64, err error) {
	s, e := h.client.Runner.WatchJournal(ctx, &pb.WatchJournalRequest{After: seq})
	if e != nil {
		return false, seq, nil // not reachable: Watch decides
	}
	defer s.Close()
	for {
		m, e := s.Receive()
		if e != nil {
			return false, seq, ctx.Err()
		}
		ev, e := api.FromEvent(m.GetEntry().GetEvent())
		if e != nil {
			return false, seq, e
		}
		en := Entry{Seq: m.GetEntry().GetSeq(), Event: ev}
		if e := fn(en); e != nil {
			return false, seq, e
		}
		seq = en.Seq
		if _, f := en.Final(); f {
			return true, seq, nil
		}
	}
}

func (h *Handle) leftovers(seq int64, fn func(Entry) error) error {
	es, err := readJournal(h.dir)
	if err != nil {
		return err
	}
	for _, e := range es {
		if e.Seq <= seq {
			continue
		}
		if err := fn(e); err != nil {
			return err
		}
		if _, final := e.Final(); final {
			return nil
		}
	}
	err = ErrDied
	if h.silent.Load() {
		err = fmt.Errorf("%w: %w", err, errSilent)
	} else if h.exit != nil && *h.exit != "" {
		err = fmt.Errorf("%w: %s", err, *h.exit)
	}
	// A runner that could not even set its reserve aside has no place for a last word.
	var st unix.Statfs_t
	if unix.Statfs(h.dir, &st) == nil && st.Bavail*uint64(st.Bsize) < ballastBytes {
		err = fmt.Errorf("%w: %w", err, syscall.ENOSPC)
	}
	return err
}

// SetDesired tells the runner what its party should be doing; sites counts with DESIRED_RUN; gone
// is as [Want.Gone] has it.
func (h *Handle) SetDesired(ctx context.Context, d pb.Desired, sites int, gone ...string) error {
	_, err := h.client.Runner.SetDesired(ctx, &pb.SetDesiredRequest{Desired: d, Sites: int32(sites), Gone: gone})
	return err
}

// Release lets go of the runner without ending it.
func (h *Handle) Release() { h.once.Do(h.client.Close) }

// Clean ends whatever is left of the party's programs after its runner is gone, and removes their temporary files.
func (h *Handle) Clean(mark string) error {
	_, err := proc.KillMarked(mark)
	if h.tmp != "" {
		err = errors.Join(err, os.RemoveAll(h.tmp))
	}
	return err
}

// Kill ends the runner at once.
func (h *Handle) Kill() {
	if proc.Alive(h.id.Pid, h.id.Start) {
		// ESRCH: it went by itself in between.
		_ = syscall.Kill(h.id.Pid, syscall.SIGKILL)
	}
}
