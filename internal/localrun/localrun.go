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
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"
	"golang.org/x/sync/errgroup"

	"github.com/pergolafl/pergola/internal/api"
	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/bundle"
	"github.com/pergolafl/pergola/internal/config"
	"github.com/pergolafl/pergola/internal/flower"
	"github.com/pergolafl/pergola/internal/hub"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/proc"
	"github.com/pergolafl/pergola/internal/pyenv"
	"github.com/pergolafl/pergola/internal/runner"
	"github.com/pergolafl/pergola/internal/site"
)

// Options say what to run and how.
type Options struct {
	App    string // the app's directory, never written to
	Out    string // where logs and results go; "" = ./pergola-runs/<app>-<time>
	Sites  int    // how many
	Listen string // the hub's port; "" = any free one of 127.0.0.1

	Spec   job.Spec // what flags say; they win over the app's [tool.pergola]
	Python string   // an interpreter to use as it is; "" = build an environment
	Relock bool     // resolve the dependencies again although a lock is at hand
	Level  slog.Level

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
	Engine   string              `json:"engine"`
	Sites    []string            `json:"sites"`
	Out      string              `json:"out,omitempty"`
	Rounds   []RoundMetrics      `json:"rounds,omitempty"`
	Failures []job.ClientFailure `json:"client_failures,omitempty"`
	FailedAt []string            `json:"client_failures_at,omitempty"` // the parties, in the order of Failures
	Warnings []string            `json:"warnings,omitempty"`

	ended bool // the hub said so
}

// RoundMetrics is what was reported for one round, by phase and name.
type RoundMetrics struct {
	Round  int                   `json:"round"`
	Phases map[string]job.Values `json:"phases"`
}

// Engine is the one that runs apps.
const Engine = "flower"

// run is one `pergola run`.
type run struct {
	opt   Options
	spec  job.Spec
	app   *flower.App
	lock  pyenv.Lock
	out   string // absolute
	state string // out/.state: everything that goes at the end but the store
	cache string
	names []string // of the sites
	began time.Time

	mu      sync.Mutex // guards the rest; held during opt.Event
	summary Summary
	events  *os.File
	logErr  error
}

// Run does it all. The summary is complete whatever the error; the error is the job's cause, or what kept it from starting.
func Run(ctx context.Context, opt Options) (Summary, error) {
	r := &run{opt: opt, began: time.Now(), cache: pyenv.DefaultCache()}
	r.summary = Summary{App: filepath.Base(opt.App), State: job.Failed, Engine: Engine}
	err := r.run(ctx)
	if err != nil {
		p := problem.From(err)
		if r.summary.Cause == nil {
			r.summary.Cause = p
		}
		if p.Code == problem.AbortedByUser {
			r.summary.State = job.Aborted
		}
		err = r.summary.Cause
	}
	r.summary.Seconds = time.Since(r.began).Seconds()
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
	if err := r.look(); err != nil {
		return err
	}
	if err := r.makeLock(early); err != nil {
		return err
	}
	packed, err := r.pack()
	if err != nil {
		return err
	}
	if err := r.makeOut(); err != nil {
		return diskProblem(err, r.out)
	}
	return r.service(ctx, early, packed, submitted)
}

func aborted() *problem.Error {
	return problem.New(problem.AbortedByUser, "run it again when you want it", "the run was interrupted")
}

// look reads the app and puts its settings together; what is wrong with either is said before anything starts.
func (r *run) look() error {
	app, err := flower.LoadApp(r.opt.App)
	if err != nil {
		return err
	}
	if err := app.Override(r.opt.Spec.RunConfig); err != nil {
		return err
	}
	r.app = app
	r.summary.App = app.Name
	spec, err := job.ParseSpec(app.Pyproject, filepath.Join(r.opt.App, "pyproject.toml"))
	if err != nil {
		return err
	}
	f := r.opt.Spec
	if f.Engine != "" {
		spec.Engine = f.Engine
	}
	for _, d := range []struct{ to, from *job.Duration }{{&spec.Deadline, &f.Deadline}, {&spec.NoProgress, &f.NoProgress}, {&spec.StartTimeout, &f.StartTimeout}, {&spec.OutageTolerance, &f.OutageTolerance}} {
		if *d.from != 0 {
			*d.to = *d.from
		}
	}
	if f.MinSites != 0 {
		spec.MinSites = f.MinSites
	}
	for k, v := range f.Site.Env {
		if spec.Site.Env == nil {
			spec.Site.Env = map[string]string{}
		}
		spec.Site.Env[k] = v
	}
	spec.RunConfig = append(spec.RunConfig, f.RunConfig...)
	spec.Flwr = f.Flwr
	spec.App = job.App{Name: app.Name, Version: app.Version}
	for i := range r.opt.Sites {
		r.names = append(r.names, fmt.Sprintf("site-%d", i+1))
	}
	// The app may name the sites of its federation; here they are named by their number unless there are as many.
	if len(spec.Sites) > 0 && len(spec.Sites) == r.opt.Sites {
		r.names = spec.Sites
	}
	spec.Sites = r.names
	r.summary.Sites = r.names
	if err := spec.Validate(); err != nil {
		return err
	}
	if spec.Engine == "native" {
		return problem.New(problem.Usage, "use --engine flower, or leave it out", "this version has no native engine")
	}
	r.spec = spec.WithDefaults()
	return nil
}

// makeLock decides on the versions of everything that the app imports.
func (r *run) makeLock(ctx context.Context) error {
	req := pyenv.Requirements{Names: r.app.Dependencies, Flwr: r.spec.Flwr, RequiresPython: r.app.RequiresPython}
	if r.opt.Python != "" {
		env, err := pyenv.Existing(ctx, r.opt.Python, req)
		if err != nil {
			return err
		}
		r.summary.Flwr = env.Flwr
		r.note("using %s as it is, with flwr %s", r.opt.Python, env.Flwr)
		return nil
	}
	in, err := pyenv.Find(ctx, "")
	if err != nil {
		return err
	}
	r.emit(job.KindEnvProgress, job.EnvProgress{Phase: "resolving", Message: "dependencies of " + r.app.Name + " for Python " + in.Version})
	r.lock, err = pyenv.MakeLock(ctx, r.cache, in, req, pyenv.Options{Fresh: r.opt.Relock})
	if err != nil {
		return err
	}
	r.spec.FlwrVersion, r.spec.PythonVersion = r.lock.Flwr, r.lock.Python
	r.summary.Flwr = r.lock.Flwr
	r.note("engine %s: Flower's own programs, flwr %s on Python %s", Engine, r.lock.Flwr, in.Version)
	return nil
}

func (r *run) pack() (*bundle.Bundle, error) {
	spec, err := json.Marshal(r.spec)
	if err != nil {
		return nil, err
	}
	return bundle.Build(r.opt.App, bundle.Input{
		App: bundle.Meta{Name: r.app.Name, Version: r.app.Version}, Lock: []byte(r.lock.Text), Job: spec, Exclude: r.spec.Exclude,
	})
}

// makeOut makes the run's directory, which must be new or empty.
func (r *run) makeOut() error {
	out := r.opt.Out
	if out == "" {
		out = filepath.Join("pergola-runs", jobName(r.app.Name)+"-"+r.began.Format("20060102-150405"))
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

// jobName makes a DNS label of an app's name.
func jobName(app string) string {
	var b strings.Builder
	for _, c := range strings.ToLower(app) {
		if c >= 'a' && c <= 'z' || c >= '0' && c <= '9' {
			b.WriteRune(c)
		} else {
			b.WriteByte('-')
		}
	}
	s := strings.Trim(b.String(), "-")
	if len(s) > 40 {
		s = strings.TrimRight(s[:40], "-")
	}
	if s == "" {
		return "app"
	}
	return s
}

// certTTL is far longer than a run should take; the keys are gone with it.
const certTTL = 30 * 24 * time.Hour

// service starts hub and sites, has the job run, and ends them, whatever happens.
func (r *run) service(ctx, early context.Context, packed *bundle.Bundle, submitted chan<- struct{}) (err error) {
	// What loses its parent becomes ours, so that nothing can be left.
	if err := proc.Subreaper(); err != nil {
		return err
	}
	lease, err := runner.NewLeash()
	if err != nil {
		return err
	}
	env := append(os.Environ(), runner.LeashVar+"="+lease)
	auth, err := pki.NewAuthority("pergola run " + jobName(r.app.Name))
	if err != nil {
		return err
	}
	defer func() {
		if e := r.tidy(err); e != nil && err == nil {
			err = e
		}
	}()
	hp, addr, err := r.startHub(early, auth, env)
	if err != nil {
		return err
	}
	defer hp.Stop(5 * time.Second)
	sites, err := r.startSites(auth, addr, env)
	defer func() {
		var wg sync.WaitGroup
		for _, s := range sites {
			wg.Go(func() { s.Stop(5 * time.Second) })
		}
		wg.Wait()
	}()
	if err != nil {
		return err
	}
	client, err := r.connect(auth, addr)
	if err != nil {
		return err
	}
	defer client.Close()
	id, err := r.submit(early, client, packed)
	if err != nil {
		return err
	}
	close(submitted)
	r.mu.Lock()
	r.summary.Job = id
	r.mu.Unlock()
	return r.follow(ctx, client, id, hp)
}

func (r *run) keypair(auth *pki.Authority, dir, name string, id pki.Identity, hosts ...string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	pair, err := auth.NewKeypair(id, hosts, certTTL)
	if err != nil {
		return err
	}
	return pki.SaveKeypair(dir, name, pair)
}

// siteGrace is short: nobody restarts an agent of a local run.
const siteGrace = job.Duration(5 * time.Second)

func (r *run) startHub(ctx context.Context, auth *pki.Authority, env []string) (*proc.Process, string, error) {
	dir := filepath.Join(r.state, "hub")
	if err := r.keypair(auth, dir, "hub", pki.Identity{Kind: pki.KindHub, Name: pki.HubName}); err != nil {
		return nil, "", diskProblem(err, r.out)
	}
	if err := auth.Save(dir); err != nil {
		return nil, "", err
	}
	listen := r.opt.Listen
	if listen == "" {
		listen = "127.0.0.1:0"
	}
	mark := fmt.Sprintf("run-%d-%d", os.Getpid(), r.began.UnixNano())
	if err := config.Write(filepath.Join(dir, hub.ConfigFile), hub.Config{
		Listen: listen, Sites: r.names, Python: r.opt.Python, Existing: r.opt.Python != "", Cache: r.cache, SiteGrace: siteGrace, Mark: mark,
	}); err != nil {
		return nil, "", diskProblem(err, r.out)
	}
	ready := make(chan string, 1)
	p, err := r.start("hub", dir, env, func(line string) {
		if a, ok := strings.CutPrefix(line, hub.ListeningPrefix); ok {
			ready <- a
		}
	})
	if err != nil {
		return nil, "", err
	}
	select {
	case addr := <-ready:
		return p, dialable(addr), nil
	case <-p.Done():
		return nil, "", r.lost(p)
	case <-ctx.Done():
		p.Stop(0)
		return nil, "", context.Cause(ctx)
	}
}

func (r *run) lost(p *proc.Process) *problem.Error {
	tail := strings.Join(p.Tail(3), " / ")
	e := problem.New(problem.HubLost, "look into logs/hub.log below "+r.out+", and run it again", "the hub ended by itself (%s): %s", p.Exit(), tail)
	e.Party = job.HubParty
	if strings.Contains(tail, "no space left") || strings.Contains(tail, "disk is full") {
		e.Code, e.Next = problem.DiskFull, "make room on that disk, or choose another with --out"
	}
	return e
}

func (r *run) startSites(auth *pki.Authority, addr string, env []string) ([]*proc.Process, error) {
	var out []*proc.Process
	for _, n := range r.names {
		dir := filepath.Join(r.state, n)
		if err := r.keypair(auth, dir, "site", pki.Identity{Kind: pki.KindSite, Name: n}); err != nil {
			return out, diskProblem(err, r.out)
		}
		mark := fmt.Sprintf("run-%d-%d", os.Getpid(), r.began.UnixNano())
		if err := config.Write(filepath.Join(dir, site.ConfigFile), site.Config{
			Name: n, Hub: addr, Python: r.opt.Python, Existing: r.opt.Python != "", Cache: r.cache, Mark: mark,
		}); err != nil {
			return out, diskProblem(err, r.out)
		}
		p, err := r.start("site", dir, env, nil)
		if err != nil {
			return out, err
		}
		out = append(out, p)
	}
	return out, nil
}

// start starts this executable as a hub or an agent.
func (r *run) start(role, dir string, env []string, line func(string)) (*proc.Process, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	logs := filepath.Join(r.out, "logs")
	if err := os.MkdirAll(logs, 0o755); err != nil {
		return nil, diskProblem(err, r.out)
	}
	return proc.Start(proc.Spec{
		Name: "pergola " + filepath.Base(dir), Args: []string{self, role, "--dir", dir, "--log-level", r.opt.Level.String()},
		Dir: dir, Env: env, Log: filepath.Join(logs, filepath.Base(dir)+".log"),
		OnLine: func(l string) {
			if line != nil {
				line(l)
			}
			if r.opt.Level <= slog.LevelDebug {
				r.line(filepath.Base(dir), "pergola", l)
			}
		},
		OnLogError: func(err error) {
			r.mu.Lock()
			defer r.mu.Unlock()
			if r.logErr == nil {
				r.logErr = err
			}
		},
	})
}

func (r *run) connect(auth *pki.Authority, addr string) (*api.Client, error) {
	pair, err := auth.NewKeypair(pki.Identity{Kind: pki.KindUser, Name: userName()}, nil, certTTL)
	if err != nil {
		return nil, err
	}
	cert, err := pair.Certificate()
	if err != nil {
		return nil, err
	}
	return api.NewClient(addr, pki.ClientTLS(cert, auth.Roots(), pki.HubName)), nil
}

// userName is the submitter's name: that of the account, as far as it is one.
func userName() string {
	if n := jobName(os.Getenv("USER")); os.Getenv("USER") != "" {
		return n
	}
	return "user"
}

func (r *run) submit(ctx context.Context, c *api.Client, packed *bundle.Bundle) (job.ID, error) {
	up, err := c.Bundles.UploadBundle(ctx)
	if err != nil {
		return "", err
	}
	pr, pw := io.Pipe()
	var g errgroup.Group
	g.Go(func() error {
		err := packed.Write(pw)
		pw.CloseWithError(err) // nil: end of file
		return err
	})
	buf := make([]byte, api.MaxChunk)
	for {
		n, err := io.ReadFull(pr, buf)
		if n > 0 {
			if e := up.Send(&pb.UploadBundleRequest{Digest: packed.Digest, Data: buf[:n]}); e != nil {
				break // CloseAndReceive says why
			}
		}
		if err != nil {
			break
		}
	}
	_ = pr.Close() // never fails
	if err := g.Wait(); err != nil && !errors.Is(err, io.ErrClosedPipe) {
		return "", err
	}
	if _, err := up.CloseAndReceive(); err != nil {
		return "", err
	}
	spec, err := json.Marshal(r.spec)
	if err != nil {
		return "", err
	}
	res, err := c.Jobs.SubmitJob(ctx, &pb.SubmitJobRequest{Name: jobName(r.app.Name), BundleDigest: packed.Digest, SpecJson: string(spec)})
	if err != nil {
		return "", err
	}
	return job.ID(res.GetJob().GetId()), nil
}

// killPatience is how long a job has to end at once before this command ends it.
const killPatience = 5 * time.Second

// follow shows the job until it is over, and gives its cause.
func (r *run) follow(ctx context.Context, c *api.Client, id job.ID, hp *proc.Process) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	g, gctx := errgroup.WithContext(ctx)
	over := make(chan struct{})
	var lost error
	g.Go(func() error { // the user's wishes, and the hub's life
		var late <-chan time.Time
		interrupted, killed := r.opt.Interrupted, r.opt.Killed
		for {
			select {
			case <-interrupted:
				interrupted = nil
				r.note("ending the job in order; interrupt again to end it at once")
				if _, err := c.Jobs.AbortJob(gctx, &pb.AbortJobRequest{Id: string(id)}); err != nil && gctx.Err() == nil {
					return err
				}
			case <-killed:
				killed = nil
				late = time.After(killPatience)
				if _, err := c.Jobs.AbortJob(gctx, &pb.AbortJobRequest{Id: string(id), Now: true}); err != nil && gctx.Err() == nil {
					return err
				}
			case <-late:
				return aborted() // what is left is ended by whoever called
			case <-hp.Done():
				lost = r.lost(hp)
				return lost
			case <-over:
				return nil
			case <-gctx.Done():
				return nil
			}
		}
	})
	g.Go(func() error {
		defer close(over)
		return r.watch(gctx, c, id)
	})
	g.Go(func() error {
		err := r.tail(gctx, c, id)
		if problem.CodeOf(err) == problem.HubUnreachable || gctx.Err() != nil {
			err = nil // the watcher decides what that means
		}
		return err
	})
	err := g.Wait()
	if err == nil || problem.CodeOf(err) == problem.AbortedByUser {
		if err == nil && r.summary.Cause != nil {
			return r.summary.Cause
		}
		return err
	}
	// The hub's end shows first as broken calls: give it a moment to be known as what it is.
	if lost == nil {
		select {
		case <-hp.Done():
			lost = r.lost(hp)
		case <-time.After(2 * time.Second):
		}
	}
	if lost != nil {
		return lost
	}
	return err
}

// watch shows events, and takes the summary from them.
func (r *run) watch(ctx context.Context, c *api.Client, id job.ID) error {
	var after int64
	bo := backoff.NewExponentialBackOff()
	bo.InitialInterval, bo.MaxInterval = 50*time.Millisecond, time.Second
	for {
		s, err := c.Jobs.WatchJob(ctx, &pb.WatchJobRequest{Id: string(id), After: after})
		for err == nil {
			var m *pb.WatchJobResponse
			if m, err = s.Receive(); err != nil {
				break
			}
			e, e2 := api.FromEvent(m.GetEvent())
			if e2 != nil {
				return e2
			}
			after = e.Seq
			bo.Reset()
			r.show(Event{Event: e})
		}
		_ = s.Close() // what ended it is known already
		switch {
		case r.sawEnd():
			return nil
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case problem.CodeOf(err) != problem.HubUnreachable && !errors.Is(err, io.EOF) && isProblem(err):
			return err
		}
		select { // the connection broke: go on behind the last event
		case <-time.After(bo.NextBackOff()):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
