// Package localrun is `pergola run`: a hub and N sites as processes of their own on this machine, with certificates of an
// authority made for this one run, one job through the hub's API, and nothing left behind. The hub, the agents and the
// runners are those of a service; only their life is shorter.
//
// It prints nothing: what happens comes as [Event] values. Start with [Run].
package localrun

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"

	"github.com/pergolafl/pergola/internal/bundle"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/prepare"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/pyenv"
)

// Options say what to run and how.
type Options struct {
	App    string // the app's directory, never written to; with Input, what messages name in its place
	Input  *Input // what an app is made of that is no directory; nil if App is one
	Out    string // where logs and results go; "" = ./pergola-runs/<app>-<time>
	Sites  int    // how many; 0 = as many as the app's settings name or need, two at least
	Listen string // the hub's port; "" = any free one of 127.0.0.1

	// Dials has, for some sites, another address of the hub ("host:port") than the one it listens at: that of a forwarder,
	// a tunnel, or a faulty network in a test. Such sites may be away for as long as the job tolerates outages.
	Dials map[string]string
	// Apps is the folder with apps that lie ready on this machine, for app-path; absolute, "" = none.
	Apps string
	// SiteProxy is the proxy of the sites' configurations; "" = none, as the hub is on this machine.
	SiteProxy string

	Spec          job.Spec // what flags say; they win over the app's [tool.pergola]
	StrictClients *bool    // nil: as the file says
	Python        string   // an interpreter to use as it is; "" = build an environment
	Relock        bool     // resolve the dependencies again although a lock is at hand
	Level         slog.Level

	Event func(Event) // one at a time

	// Interrupted is closed when the user wants an orderly end, Killed when at once.
	Interrupted, Killed <-chan struct{}
}

// Event is something to show: an event of the job, a line of a program's log, or a step of the command itself.
type Event struct {
	job.Event
	Program string // with KindLog: which program
	Line    string // with KindLog
}

// Kinds of events beside those of package job.
const (
	KindLog     = "log"     // Program, Line
	KindSummary = "summary" // the last one: Summary
)

// Summary is the body of the last event, and the content of summary.json.
type Summary struct {
	Job      job.ID              `json:"job,omitempty"`
	App      string              `json:"app"`
	State    job.State           `json:"state"`
	Cause    *job.Cause          `json:"cause,omitempty"`
	Seconds  float64             `json:"duration_seconds"`
	Flwr     string              `json:"flwr,omitempty"`
	Engine   string              `json:"engine"`               // "auto" as long as none is chosen
	Why      string              `json:"engine_why,omitempty"` // why that one
	Sites    []string            `json:"sites"`
	Out      string              `json:"out,omitempty"`
	Rounds   []RoundMetrics      `json:"rounds,omitempty"`
	Clients  []job.ClientMetrics `json:"client_metrics,omitempty"` // by round, phase and site; native engine
	Failures []job.ClientFailure `json:"client_failures,omitempty"`
	FailedAt []string            `json:"client_failures_at,omitempty"` // the parties, in the order of Failures
	Warnings []string            `json:"warnings,omitempty"`
	Link     map[string]job.Link `json:"link,omitempty"` // by site, of those whose link was ever cut

	ended bool // the hub said so
}

// RoundMetrics is what was reported for one round, by phase and name.
type RoundMetrics struct {
	Round  int                   `json:"round"`
	Phases map[string]job.Values `json:"phases"`
}

// MaxSites is how many sites one machine is asked to imitate: each is an agent, a runner and Flower's processes.
const MaxSites = 64

// minSites is how many there are if nothing says anything.
const minSites = 2

// run is one `pergola run`.
type run struct {
	opt   Options
	dir   string // of the app
	app   *prepare.App
	out   string // absolute
	state string // out/.state: everything that goes at the end but the store
	cache string
	names []string // of the sites
	began time.Time

	mu       sync.Mutex // guards the rest; held during opt.Event
	summary  Summary
	events   *os.File
	logErr   error
	emptyOut bool // the run's directory was there before, empty
	settled  bool // the summary's end was taken from the store, after the hub's end
}

// Run does it all. The summary is complete whatever the error; the error is the job's cause, or what kept it from starting.
func Run(ctx context.Context, opt Options) (Summary, error) {
	r := &run{opt: opt, began: time.Now(), cache: pyenv.DefaultCache()}
	r.dir = opt.App
	r.summary = Summary{App: filepath.Base(opt.App), State: job.Failed, Engine: job.EngineAuto}
	err := r.run(ctx)
	switch {
	case r.settled && r.summary.Cause == nil:
		err = nil // the job was over before its hub was
	case r.settled:
		err = r.summary.Cause
	case err != nil:
		p := problem.From(err)
		if r.summary.Cause == nil {
			r.summary.Cause = p.Told() // everything is on the user's own machine
		}
		if p.Code == problem.AbortedByUser {
			r.summary.State = job.Aborted
		} else if !r.summary.State.Terminal() {
			r.summary.State = job.Failed // the store could not be told
		}
		err = r.summary.Cause
	}
	r.summary.Seconds = time.Since(r.began).Seconds()
	if c := r.summary.Cause; c != nil && r.out != "" {
		located := *c
		located.Log = locate(r.out, *c)
		r.summary.Cause = &located
		if err != nil {
			err = &located
		}
	}
	if r.out != "" {
		if e := r.writeSummary(); e != nil && err == nil {
			err = problem.Wrap(e, problem.Internal, "", "the summary could not be written to %s", r.out)
		}
	}
	if r.events != nil {
		if e := r.events.Close(); e != nil && err == nil && r.logErr == nil {
			err = e
		}
	}
	return r.summary, err
}

func (r *run) writeSummary() error {
	b, err := json.MarshalIndent(r.summary, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(r.out, "summary.json"), append(b, '\n'), 0o600)
}

func (r *run) run(ctx context.Context) (err error) {
	// Until there is a job, an interruption simply ends everything.
	early, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	defer wg.Wait()
	submitted := make(chan struct{})
	wg.Go(func() {
		select {
		case <-r.opt.Interrupted:
			cancel(aborted())
		case <-submitted:
		case <-early.Done():
		}
	})
	defer cancel(nil)
	defer func() {
		if c := context.Cause(early); err != nil && problem.CodeOf(c) == problem.AbortedByUser {
			err = c
		}
	}()
	if in := r.opt.Input; in != nil {
		defer func() { err = r.rename(err) }()
		for _, w := range in.Warnings {
			r.emit(job.KindWarning, job.Text{Message: w})
		}
		if err := r.unpack(); err != nil {
			return errors.Join(err, r.forget())
		}
	}
	packed, err := r.prepare(early)
	if err == nil && r.out == "" {
		err = diskProblem(r.makeOut(), r.out)
	}
	if err != nil {
		return errors.Join(err, r.forget())
	}
	return r.service(ctx, early, packed, submitted)
}

// prepare does what can be done before anything starts.
func (r *run) prepare(ctx context.Context) (*bundle.Bundle, error) {
	if err := r.look(); err != nil {
		return nil, err
	}
	if err := r.makeLock(ctx); err != nil {
		return nil, err
	}
	return r.app.Pack()
}

func aborted() *problem.Error {
	return problem.New(problem.AbortedByUser, "run it again when you want it", "the run was interrupted")
}

// look reads the app and puts its settings together; what is wrong with either is said before anything starts.
func (r *run) look() error {
	app, err := prepare.Look(r.dir, prepare.Flags{Spec: r.opt.Spec, StrictClients: r.opt.StrictClients})
	if err != nil {
		return err
	}
	r.app = app
	r.summary.App = app.Name
	spec := &app.Spec
	n := r.opt.Sites
	if n == 0 {
		if n = max(minSites, spec.MinSites, len(spec.MandatorySites)); len(spec.Sites) > 0 {
			n = len(spec.Sites)
		}
		if n > MaxSites {
			return problem.New(problem.Usage, "choose fewer with --sites", "the app's settings ask for %d sites; one machine imitates at most %d", n, MaxSites)
		}
	}
	for i := range n {
		r.names = append(r.names, fmt.Sprintf("site-%d", i+1))
	}
	// The app may name the sites of its federation; here they are named by their number unless there are as many.
	if len(spec.Sites) > 0 && len(spec.Sites) == n {
		r.names = spec.Sites
	}
	spec.Sites = r.names
	r.summary.Sites = r.names
	// Nobody comes to start an agent that does not: the wait for sites has an end here.
	if spec.WaitTimeout == 0 {
		spec.WaitTimeout = spec.StartTimeout.Or(job.DefaultStartTimeout)
	}
	return app.Settle()
}

// makeLock decides on the versions of everything that the app imports.
func (r *run) makeLock(ctx context.Context) error {
	_, err := r.app.Resolve(ctx, prepare.Resolving{Cache: r.cache, Python: r.opt.Python, Fresh: r.opt.Relock, Tell: r.emit})
	r.summary.Flwr = r.app.Flwr
	if err != nil {
		return err
	}
	if r.opt.Python != "" {
		r.note("using %s as it is, with flwr %s", r.opt.Python, r.app.Flwr)
	}
	if r.app.Spec.Workers == 0 { // the sites share one machine here
		r.app.Spec.Workers = max(1, runtime.NumCPU()/len(r.names))
	}
	return nil
}

// makeOut makes the run's directory, which must be new or empty.
func (r *run) makeOut() error {
	out := r.opt.Out
	if out == "" {
		name := filepath.Base(r.opt.App)
		if r.app != nil {
			name = r.app.Name
		}
		out = filepath.Join("pergola-runs", prepare.JobName(name)+"-"+r.began.Format("20060102-150405"))
		for n := 2; ; n++ { // two runs in one second
			if err := os.MkdirAll(filepath.Dir(out), 0o755); err != nil {
				return err
			}
			err := os.Mkdir(out, 0o755)
			if err == nil {
				break
			}
			if !os.IsExist(err) {
				return err
			}
			out = fmt.Sprintf("%s-%d", strings.TrimSuffix(out, fmt.Sprintf("-%d", n-1)), n)
		}
	} else {
		if err := os.MkdirAll(out, 0o755); err != nil {
			return problem.Wrap(err, problem.Usage, "choose another with --out", "cannot make the run's directory")
		}
		es, err := os.ReadDir(out)
		if err != nil {
			return err
		}
		if len(es) > 0 {
			return problem.New(problem.Usage, "choose a new or an empty one with --out", "%s is not empty", out)
		}
	}
	var err error
	if r.out, err = filepath.Abs(out); err != nil {
		return err
	}
	r.summary.Out = r.out
	r.state = filepath.Join(r.out, ".state")
	if err := os.Mkdir(r.state, 0o700); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.events, err = os.OpenFile(filepath.Join(r.out, "events.jsonl"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	return err
}
