// Package runner is one party of one job: a process of its own that builds the environment, starts Flower's programs,
// watches them, carries their connections over the link, and ends them. It outlives the hub or agent that started it; a
// starter talks to it over a socket in the party's directory and reads its journal there.
//
//	party's directory
//	  spec.json      what to run                       written by the starter before the start
//	  runner.json    pid and start time                written by the runner, so that a later starter finds it
//	  journal.jsonl  what happened, one entry a line   written before anybody hears of it
//	  control.sock   RunnerService                     journal and desired state
//	  link.sock      hub's party: links from the sites, spliced by the hub
//	  app/ flwr/     the staged app, FLWR_HOME
//
// It schedules nothing, stores no job and knows no other party but by the link. Start with [Main] for the process and
// with [Start] for a starter's end.
package runner

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pergolafl/pergola/internal/api"
	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/api/pergola/v1/pergolav1connect"
	"github.com/pergolafl/pergola/internal/compat"
	"github.com/pergolafl/pergola/internal/flower"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/logline"
	"github.com/pergolafl/pergola/internal/logs"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/proc"
	"github.com/pergolafl/pergola/internal/sock"
)

// Grace is how long programs have between the request to end and the kill.
const Grace = 5 * time.Second

// Why a party's work is cut short without a fault of its own.
var (
	errStop = errors.New("asked to stop")
	errKill = errors.New("asked to end at once")
)

// runner is the process's state.
type runner struct {
	dir     string
	spec    Spec
	log     *slog.Logger
	journal *journal
	desired *cell
	end     context.CancelCauseFunc // ends the party's work
	held    func()                  // releases the environment; never called, and kept so that the lock is
	logs    *logs.Set               // of the party's programs
	staged  snapshot                // hub's party: the app's files before its programs start
	later   []func()                // what is done once the last word is written

	mu       sync.Mutex // guards the rest
	progress time.Time  // when the last sign of progress was written down
}

// Main runs the party in dir until its work is over or it is told to stop, and until its starter has read how it ended (or
// 10 s have passed). A signal ends it in order. The error is one of the runner itself, not of its party.
func Main(ctx context.Context, dir string, log *slog.Logger) error {
	spec, err := readSpec(dir)
	if err != nil {
		return problem.Wrap(err, problem.Usage, "hubs and agents start runners; see `pergola run --help`", "this is no party's directory")
	}
	log = log.With(logline.Job, spec.Job, logline.Party, spec.Party)
	if spec.Tmp != "" {
		defer func() { _ = os.RemoveAll(spec.Tmp) }() // the starter does it, too, if it is there
	}
	// The starter may be of another age: a binary that was replaced is what it starts.
	starter := spec.Starter
	if starter == (compat.Range{}) {
		starter = compat.First
	}
	if _, ok := api.Runner.Common(starter); !ok {
		return compat.Refusal("runner", compat.Side{Name: "this runner", Build: api.BuildVersion(), Speaks: api.Runner}, compat.Side{Name: "its starter", Speaks: starter})
	}
	leash, err := leash()
	if err != nil {
		return err
	}
	// Programs' orphans become ours, so that they can be found and ended.
	if err := proc.Subreaper(); err != nil {
		return err
	}
	start, err := proc.StartTime(os.Getpid())
	if err != nil {
		return err
	}
	if err := writeFile(filepath.Join(dir, runnerFile), identity{Pid: os.Getpid(), Start: start, Boot: proc.BootID(), Speaks: &api.Runner, Build: api.BuildVersion()}); err != nil {
		return err
	}
	j, err := openJournal(dir, spec.Job, spec.Party)
	if err != nil {
		return err
	}
	r := &runner{dir: dir, spec: spec, log: log, journal: j, desired: newCell()}
	r.logs = r.logsOf()
	ln, err := sock.Listen(filepath.Join(dir, controlSock))
	if err != nil {
		return err
	}
	srv := api.NewServer(log)
	pergolav1connect.RegisterRunnerServiceHandler(srv, service{r})
	mux := http.NewServeMux()
	api.Mount(mux, srv)
	hs := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}

	var g errgroup.Group
	g.Go(func() error {
		if err := hs.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	})
	work, end := context.WithCancelCause(ctx)
	r.end = end
	stopped := make(chan struct{})
	g.Go(func() error {
		r.obey(leash, stopped)
		return nil
	})
	g.Go(func() error {
		r.endSuspended(work)
		return nil
	})
	cause := r.party(work)
	end(nil)
	close(stopped)
	r.last(cause)
	for _, f := range r.later {
		f()
	}
	// Who watches gets the last entry before the socket goes; who does not reads the file.
	bye, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	if err := hs.Shutdown(bye); err != nil {
		log.Warn("a watcher did not take the last entry", "err", err)
	}
	return g.Wait()
}

// obey ends the party's work when it is no longer wanted.
func (r *runner) obey(leash, done <-chan struct{}) {
	for {
		d, _, changed := r.desired.get()
		switch d {
		case pb.Desired_DESIRED_STOP:
			r.end(errStop)
		case pb.Desired_DESIRED_KILL:
			r.end(errKill)
			// Programs that are being stopped get no more of their time.
			if _, err := proc.KillMarked(r.spec.Mark); err != nil {
				r.log.Warn("programs could not be ended at once", "err", err)
			}
		}
		select {
		case <-changed:
		case <-leash:
			r.log.Warn("the command that this runner belongs to is gone")
			r.desired.set(pb.Desired_DESIRED_KILL, 0)
			leash = nil
		case <-done:
			return
		}
	}
}

// party does the work and cleans up after it, whatever happened.
func (r *runner) party(ctx context.Context) *problem.Error {
	r.move(job.PartyPreparing, nil)
	var err error
	switch {
	case r.spec.IsHub() && r.native():
		err = r.nativeHub(ctx)
	case r.spec.IsHub():
		err = r.hub(ctx)
	case r.native():
		err = r.nativeSite(ctx)
	default:
		err = r.site(ctx)
	}
	if n, e := proc.KillMarked(r.spec.Mark); e != nil {
		r.log.Warn("programs that were left could not be ended", "err", e)
	} else if n > 0 {
		r.log.Warn("ended programs that their parents had left", "count", n)
	}
	if r.staged != nil {
		if e := r.staged.collect(filepath.Join(r.dir, "app"), r.spec.Results); e != nil {
			r.log.Warn("not all results could be kept", "err", e)
			r.note(job.KindWarning, job.Text{Message: "not all results could be kept: " + e.Error()})
		}
	}
	for _, name := range []string{"app", "flwr"} {
		if e := os.RemoveAll(filepath.Join(r.dir, name)); e != nil {
			r.log.Warn("could not remove a working folder", "name", name, "err", e)
		}
	}
	if c := context.Cause(ctx); c != nil {
		// The reason for which the work was cut short comes before what that broke. A wish is none.
		err = nil
		switch p, ok := errors.AsType[*problem.Error](c); {
		case ok:
			err = p
		case !errors.Is(c, errStop) && !errors.Is(c, errKill):
			err = r.signalled(c)
		}
	}
	if err == nil {
		return nil
	}
	p := *problem.From(err)
	if p.Party == "" {
		p.Party = r.spec.Party
	}
	return &p
}

// signalled is the problem of a runner that was asked to end by a signal, and not by its starter.
func (r *runner) signalled(cause error) *problem.Error {
	code, who := problem.SiteRunnerDied, "the runner at "+r.spec.Party
	if r.spec.IsHub() {
		code, who = problem.HubRunnerDied, "the hub's runner of the job"
	}
	return problem.Wrap(cause, code, "submit the job again; find out who ended it, if the machine was not shut down", "%s was ended from outside before the job was over", who)
}

// last writes the final entry.
func (r *runner) last(cause *problem.Error) {
	if cause == nil {
		r.move(job.PartyDone, nil)
		return
	}
	r.log.Error("the party failed", "code", cause.Code, "err", cause)
	r.move(job.PartyFailed, cause)
}

func (r *runner) move(to job.PartyState, cause *problem.Error) {
	r.note(job.KindPartyState, job.PartyStateChange{To: to, Cause: cause})
}

// note writes an event down. A full disk ends the party; its watchers hear of it from memory.
func (r *runner) note(kind string, body any) {
	if err := r.journal.add(kind, body); err != nil {
		r.diskError(err)
	}
}

// diskError ends the party because its files cannot be written any more.
func (r *runner) diskError(err error) {
	p := problem.Wrap(err, problem.Internal, "see the runner's log", "%s cannot write its files", r.spec.Party)
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		p = problem.New(problem.DiskFull, "make room on that disk, or choose another with --out", "no space is left where %s writes (%s)", r.spec.Party, r.spec.Logs)
	}
	p.Party = r.spec.Party
	r.end(p)
}

// progressed notes that the work moves, at most every few seconds: the hub ends jobs that stand still.
func (r *runner) progressed(what string) {
	every := 20 * time.Second
	if np := r.spec.Spec.NoProgress.Std(); np > 0 {
		every = min(every, np/4)
	}
	r.mu.Lock()
	due := time.Since(r.progress) >= every
	if due {
		r.progress = time.Now()
	}
	r.mu.Unlock()
	if due {
		r.note(job.KindProgress, job.Text{Message: what})
	}
}

// event turns what the engine saw into an entry.
func (r *runner) event(e flower.Event) {
	switch e.Kind {
	case flower.ProgramStarted:
		r.note(job.KindProgramStarted, job.Program{Name: e.Program, Pid: e.Pid})
	case flower.ProgramEnded:
		p := job.Program{Name: e.Program, Pid: e.Pid, Code: e.Exit.Code, OOM: e.Exit.OOM}
		if e.Exit.Signal != 0 {
			p.Signal = e.Exit.Signal.String()
		}
		if !e.Exit.OK() {
			p.Tail = e.Tail
		}
		r.note(job.KindProgramEnded, p)
	case flower.Round:
		r.note(job.KindRound, job.Round{Round: e.Round, Total: e.Total})
	case flower.Metrics:
		r.note(job.KindMetrics, job.Metrics{Round: e.Round, Phase: e.Phase, Values: e.Metrics})
	case flower.ClientFailures, flower.ClientException:
		r.note(job.KindClientFailure, job.ClientFailure{Round: e.Round, Count: e.Failures, Message: e.Message, Exception: e.Exception, Traceback: e.Traceback})
	case flower.Warning:
		r.note(job.KindWarning, job.Text{Message: e.Message})
	case flower.Note:
		r.log.Info(e.Message)
		r.note(job.KindNote, job.Text{Message: e.Message})
	case flower.AppException:
		r.progressed(e.Exception) // the app may catch it and go on; if not, it is in the run's cause
	case flower.NodeReady, flower.Progress:
		r.progressed(e.Message)
	default:
		r.log.Warn("an event of unknown kind", "event", fmt.Sprintf("%+v", e))
	}
}

// service is the runner's socket.
type service struct{ *runner }

// WatchJournal implements the API.
func (s service) WatchJournal(ctx context.Context, req *pb.WatchJournalRequest, out pergolav1connect.RunnerServiceWatchJournalServerStream) error {
	return s.journal.watch(ctx, req.GetAfter(), func(e Entry) error {
		ev, err := api.Event(e.Event)
		if err != nil {
			return err
		}
		return out.Send(&pb.WatchJournalResponse{Entry: &pb.JournalEntry{Seq: e.Seq, Event: ev}})
	})
}

// SetDesired implements the API.
func (s service) SetDesired(_ context.Context, req *pb.SetDesiredRequest) (*pb.SetDesiredResponse, error) {
	for _, key := range req.GetGone() {
		s.desired.drop(key)
	}
	s.desired.set(req.GetDesired(), int(req.GetSites()))
	return &pb.SetDesiredResponse{}, nil
}

// cell holds what the party should be doing, and wakes who waits for a change.
type cell struct {
	mu      sync.Mutex // guards the rest
	desired pb.Desired
	sites   int
	gone    []string // see Want.Gone; grows only
	changed chan struct{}
}

func newCell() *cell { return &cell{changed: make(chan struct{})} }

func (c *cell) set(d pb.Desired, sites int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	// Stopping is not undone, and a kill is not softened: a late repetition of an older wish changes nothing.
	if d <= c.desired {
		return
	}
	c.desired, c.sites = d, sites
	close(c.changed)
	c.changed = make(chan struct{})
}

func (c *cell) drop(key string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if slices.Contains(c.gone, key) {
		return
	}
	c.gone = append(c.gone, key)
	close(c.changed)
	c.changed = make(chan struct{})
}

func (c *cell) dropped() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.gone)
}

func (c *cell) get() (pb.Desired, int, <-chan struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.desired, c.sites, c.changed
}

// running waits until the app is to start, and gives the number of sites.
func (c *cell) running(ctx context.Context) (int, error) {
	for {
		d, n, changed := c.get()
		if d == pb.Desired_DESIRED_RUN {
			return n, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		}
	}
}
