package runner

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/bundle"
	"github.com/pergolafl/pergola/internal/fleet"
	"github.com/pergolafl/pergola/internal/flower"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/link"
	"github.com/pergolafl/pergola/internal/logs"
	"github.com/pergolafl/pergola/internal/metrics"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/proc"
	"github.com/pergolafl/pergola/internal/pyenv"
	"github.com/pergolafl/pergola/internal/relay"
	"github.com/pergolafl/pergola/internal/sock"
)

// What a site's runner asks the hub's for, by name.
const (
	fleetAPI  = "fleet"      // a connection to the superlink's Fleet API
	fleetGone = "fleet-gone" // nothing: the supernode has died, and its node is to be taken for dead
)

// prepared is what both sides of a job need before their programs start.
type prepared struct {
	app     *flower.App
	inst    *flower.Installation
	probe   string // what answers about this environment are kept under
	dir     string // the staged app
	home    string // FLWR_HOME
	ip      string // this party's own loopback address
	claim   net.Listener
	metrics *metrics.Server
	env     []string
}

// prepare builds the environment and a copy of the app that Flower may write to.
func (r *runner) prepare(ctx context.Context) (*prepared, error) {
	contents, err := bundle.Read(r.spec.Bundle)
	if err != nil {
		return nil, err
	}
	app, err := flower.LoadApp(contents.AppDir)
	if err != nil {
		return nil, err
	}
	env, err := r.environment(ctx, app, contents)
	if err != nil {
		return nil, err
	}
	inst, err := r.probe(ctx, env)
	if err != nil {
		return nil, err
	}
	app, source, err := r.source(app, contents.AppDir, inst)
	if err != nil {
		return nil, err
	}
	if inst.Warning != "" {
		r.note(job.KindWarning, job.Text{Message: inst.Warning})
	}
	p := &prepared{app: app, inst: inst, probe: probeName(env), dir: filepath.Join(r.dir, "app"), home: filepath.Join(r.dir, "flwr")}
	if err := os.MkdirAll(p.home, 0o700); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(r.spec.Logs, 0o700); err != nil {
		return nil, err
	}
	if err := flower.Stage(app, source, p.dir, inst); err != nil {
		return nil, err
	}
	if r.spec.IsHub() {
		if r.staged, err = takeSnapshot(p.dir); err != nil {
			return nil, err
		}
	}
	p.ip, p.claim, err = claimAddress(ctx)
	if err != nil {
		return nil, err
	}
	// The job says whether Flower may report its use, not the environment that the agent happened to be started in.
	p.env = slices.DeleteFunc(os.Environ(), func(kv string) bool { return strings.HasPrefix(kv, "FLWR_TELEMETRY_ENABLED=") })
	p.env = append(p.env, proc.MarkVar+"="+r.spec.Mark)
	for k, v := range r.spec.Spec.EnvFor(r.spec.Party) {
		p.env = append(p.env, k+"="+v)
	}
	if kv, ok := r.spec.DeviceEnv(); ok {
		p.env = append(slices.DeleteFunc(p.env, func(kv string) bool { return strings.HasPrefix(kv, deviceEnv+"=") }), kv)
	}
	if err := r.takeMetrics(ctx, p); err != nil {
		return nil, errors.Join(err, p.claim.Close())
	}
	return p, nil
}

// probe finds out what the environment's Flower is and, where its programs run, what they understand.
func (r *runner) probe(ctx context.Context, env pyenv.Env) (*flower.Installation, error) {
	names := flower.Env{Bin: env.Bin, Python: env.Python}
	if r.native() {
		return flower.Installed(ctx, names)
	}
	probes := filepath.Join(r.spec.Cache, "probes")
	if err := os.MkdirAll(probes, 0o700); err != nil {
		return nil, err
	}
	inst, err := flower.Probe(ctx, names, filepath.Join(probes, probeName(env)))
	if err != nil {
		return nil, err
	}
	return inst, inst.Check(r.spec.IsHub(), len(r.spec.Spec.Server.Args) > 0)
}

func probeName(env pyenv.Env) string {
	if env.Key != "" {
		return env.Key + ".json"
	}
	return strings.ReplaceAll(strings.Trim(env.Bin, "/"), "/", "_") + ".json"
}

func (r *runner) environment(ctx context.Context, app *flower.App, c *bundle.Contents) (pyenv.Env, error) {
	if r.spec.Existing {
		return pyenv.Existing(ctx, r.spec.Python, pyenv.Requirements{Names: app.Dependencies, Flwr: r.spec.Spec.Flwr, RequiresPython: app.RequiresPython})
	}
	in, err := pyenv.Find(ctx, r.spec.Python)
	if err != nil {
		return pyenv.Env{}, err
	}
	lock := pyenv.Lock{Text: string(c.Lock), Flwr: r.spec.Spec.FlwrVersion, Python: r.spec.Spec.PythonVersion}
	log, closeLog := r.environmentLog()
	defer closeLog()
	var last job.EnvProgress
	var at time.Time
	build := func(p pyenv.Progress) {
		e := job.EnvProgress{Phase: p.Phase, Done: p.Done, Total: p.Total, Message: p.Message}
		// A new phase at once, steps within one a few times a second.
		if e.Phase != last.Phase || time.Since(at) > 300*time.Millisecond {
			last, at = e, time.Now()
			r.note(job.KindEnvProgress, e)
		}
	}
	for {
		env, err := pyenv.Ensure(ctx, r.spec.Cache, in, lock, pyenv.Options{Log: log}, build)
		if err != nil {
			return env, err
		}
		// For as long as this process lives. One that was just removed as unused is built again.
		release, held, err := pyenv.Hold(ctx, env)
		if held || err != nil {
			r.held = release
			return env, err
		}
	}
}

// environmentLog gives a function that appends what installers say to environment_log.txt. The file is made with the first
// line: an environment that is there already has nothing to say.
func (r *runner) environmentLog() (write func(string), end func()) {
	var mu sync.Mutex // guards f; an installer's two streams have a goroutine each
	var f io.WriteCloser
	var failed bool
	write = func(line string) {
		mu.Lock()
		defer mu.Unlock()
		if failed {
			return
		}
		var err error
		if f == nil {
			if err = os.MkdirAll(r.spec.Logs, 0o700); err == nil {
				f, err = r.openLog(filepath.Join(r.spec.Logs, "environment_log.txt"))
			}
		}
		if err == nil {
			_, err = io.WriteString(f, line+"\n")
		}
		if err != nil {
			failed = true
			r.diskError(err)
		}
	}
	end = func() {
		mu.Lock()
		defer mu.Unlock()
		if f != nil {
			if err := f.Close(); err != nil && !failed {
				r.diskError(err)
			}
		}
	}
	return write, end
}

// openLog opens a log of the party's for a program's lines, within the quota of them all.
func (r *runner) openLog(path string) (io.WriteCloser, error) {
	if filepath.Dir(path) != r.logs.Dir.Path {
		return nil, fmt.Errorf("%s is no log of this party", path)
	}
	return r.logs.Open(filepath.Base(path))
}

// logsOf gives the party's logs. What of them is left out first is told.
func (r *runner) logsOf() *logs.Set {
	return &logs.Set{Dir: logs.Dir{Path: r.spec.Logs, Quota: r.spec.LogQuota, OnGap: func(name string, _ logs.Gap, first bool) {
		if !first {
			return
		}
		text := logs.QuotaReached(r.spec.Party, name, r.spec.LogQuota)
		r.log.Warn(text)
		if r.spec.IsHub() { // what of a site's logs is left out is the hub's to say: it has a copy of its own
			r.note(job.KindWarning, job.Text{Message: text})
		}
	}}}
}

// claimAddress takes a loopback address for this party alone: whoever holds the abstract unix socket of its name owns all
// ports there, so no two parties or jobs can be given the same one, and nothing is chosen first and bound later. Abstract
// names live as long as their process, and belong to a network namespace as loopback addresses do (unix(7)).
func claimAddress(ctx context.Context) (string, net.Listener, error) {
	var lc net.ListenConfig
	var last error
	for range 100 {
		var b [3]byte
		if _, err := rand.Read(b[:]); err != nil {
			return "", nil, err
		}
		// 127.64.0.0/10: away from 127.0.0.x, which other programs use. Not .0 or .255.
		ip := fmt.Sprintf("127.%d.%d.%d", 64+b[0]%64, b[1], 1+b[2]%254)
		ln, err := lc.Listen(ctx, "unix", "@pergola/"+ip)
		if err == nil {
			return ip, ln, nil
		}
		last = err
	}
	return "", nil, problem.Wrap(last, problem.StartTimeout, "free some loopback addresses below 127.64.0.0/10", "no loopback address could be taken for the job's programs")
}

// acceptor takes the sites' links.
func (r *runner) acceptor(told *outages) *link.Acceptor {
	return link.NewAcceptor(link.Options{Log: r.log, Tolerance: r.tolerance(), OnCut: told.began, OnOutage: told.over, Allow: func(p link.Peer) error {
		if p.Job != string(r.spec.Job) {
			return problem.New(problem.Denied, "", "a link of job %s was sent to job %s", p.Job, r.spec.Job)
		}
		return nil
	}})
}

// hub runs the superlink and the server app.
func (r *runner) hub(ctx context.Context) error {
	g, gctx := errgroup.WithContext(ctx)
	told := &outages{note: r.note}
	acceptor := r.acceptor(told)
	ln, err := sock.Listen(LinkSocket(r.dir))
	if err != nil {
		return err
	}
	// The sites' links are taken from the first moment on; their calls wait until the superlink is ready.
	gate := fleet.New(fleet.Options{Tolerance: r.tolerance(), Log: r.log, Warn: func(_, text string) {
		r.note(job.KindWarning, job.Text{Message: text})
	}})
	var srv *flower.Server
	// They last as long as the superlink does, also when the work is cut short, so that the supernodes can take their leave.
	linked, unlink := context.WithCancel(context.WithoutCancel(ctx))
	g.Go(func() error { return ignoreDone(linked, acceptor.Serve(linked, ln)) })
	g.Go(gate.Serve)
	g.Go(func() error {
		defer gate.Close()
		return ignoreDone(linked, r.links(linked, acceptor, told, func(ctx context.Context, s *link.Session) error { return r.fleet(ctx, s, gate) }))
	})
	g.Go(func() (err error) {
		defer unlink()
		p, err := r.prepare(gctx)
		if err != nil {
			return err
		}
		defer r.close(p)
		if err := os.MkdirAll(r.spec.Results, 0o700); err != nil {
			return err
		}
		if err := r.renewDatabase(gctx); err != nil {
			return err
		}
		srv, err = flower.StartServer(gctx, flower.ServerConfig{
			Install: p.inst, AppDir: p.dir, RunDir: r.spec.Results, LogDir: r.spec.Logs, FlwrHome: p.home, IP: p.ip, Env: p.env,
			Args: r.spec.Spec.Server.Args, RunConfig: r.spec.Spec.RunConfig, Installs: r.spec.Spec.FlowerInstalls, Database: r.spec.Spec.Server.Database,
			ReadyTimeout: r.spec.Spec.Server.ReadyTimeout.Std(), StopGrace: time.Duration(r.spec.Spec.Server.StopGrace), Party: r.spec.Party, OnEvent: r.event, OnLogError: r.diskError, OpenLog: r.openLog,
		})
		if err != nil {
			return err
		}
		defer func() { srv.Stop(r.grace(ctx)) }()
		gate.Open(srv.FleetAddr())
		r.move(job.PartyReady, nil)
		return r.serve(gctx, srv)
	})
	if err := g.Wait(); err != nil && !errors.Is(err, errDone) {
		return err
	}
	return nil
}

// errDone ends a group whose work is over without a fault.
var errDone = errors.New("done")

// serve runs the app once it is wanted, and says how that ended.
func (r *runner) serve(ctx context.Context, srv *flower.Server) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watch := make(chan struct{})
	go func() { // ends with ctx, and is waited for below
		defer close(watch)
		select {
		case <-srv.Done():
			cancel(srv.Failure())
		case <-ctx.Done():
		}
	}()
	defer func() { <-watch }()
	defer cancel(nil)
	n, err := r.desired.running(ctx)
	if err != nil {
		return err
	}
	nodes, stop := context.WithTimeoutCause(ctx, r.spec.Spec.Server.ReadyTimeout.Or(job.DefaultReadyTimeout).Std(),
		problem.New(problem.StartTimeout, "look into the sites' client_app_log.txt", "not all %d supernodes were known to the superlink in time", n))
	defer stop()
	err = srv.WaitNodes(nodes, n)
	if need := r.spec.Spec.Need(r.spec.Count); err != nil && ctx.Err() == nil && nodes.Err() != nil && srv.Nodes() >= need {
		r.note(job.KindWarning, job.Text{Message: fmt.Sprintf("the app starts with %d of %d supernodes: the others have not reached the superlink in time", srv.Nodes(), n)})
		n, err = srv.Nodes(), nil
	}
	if err != nil {
		if c := context.Cause(nodes); c != nil {
			return c
		}
		return err
	}
	r.note(job.KindSitesReady, job.SitesReady{Ready: n, Wanted: r.spec.Count})
	r.move(job.PartyRunning, nil)
	if err := srv.RunApp(ctx); err != nil {
		if c := context.Cause(ctx); c != nil {
			return c
		}
		return err
	}
	return r.untilStopped(ctx)
}

// untilStopped keeps the superlink up after the run, so that the supernodes can take their leave: they are stopped first.
func (r *runner) untilStopped(ctx context.Context) error {
	r.note(job.KindNote, job.Text{Message: runOver})
	<-ctx.Done()
	if errors.Is(context.Cause(ctx), errStop) {
		return errDone
	}
	return context.Cause(ctx)
}

// runOver is the text of the note with which the hub's runner says that the app has finished and its programs wait to be
// stopped.
const runOver = "the run is finished"

// IsRunOver tells whether e says that the app has finished well and the party waits to be stopped.
func IsRunOver(e job.Event) bool {
	var t job.Text
	return e.Kind == job.KindNote && e.Party == job.HubParty && e.Decode(&t) == nil && t.Message == runOver
}

// tolerance is for how long a link may be cut; a job without a limit has a negative one, as has the link.
func (r *runner) tolerance() time.Duration {
	return time.Duration(r.spec.Spec.OutageTolerance.Or(job.DefaultOutageTolerance))
}

// links has each site's session served until ctx is done.
func (r *runner) links(ctx context.Context, a *link.Acceptor, told *outages, serve func(context.Context, *link.Session) error) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	var open sessions
	wg.Go(func() { open.endGone(ctx, r.desired) })
	for {
		s, err := a.Accept(ctx)
		if err != nil {
			return err
		}
		r.log.Info("a site's link is up", "site", s.Peer().Site)
		open.add(s)
		wg.Go(func() {
			defer open.remove(s)
			defer s.Close()
			err := serve(ctx, s)
			told.ended(s.Peer(), s.Stats(), time.Now())
			if err != nil && ctx.Err() == nil {
				r.log.Info("a site's link has ended", "site", s.Peer().Site, "err", err)
			}
		})
	}
}

// fleet passes a site's calls of the Fleet API on, until its link ends; its node is dead then.
func (r *runner) fleet(ctx context.Context, s *link.Session, gate *fleet.Gate) error {
	site := s.Peer().Site
	err := relay.Serve(ctx, s.Accept, func(ctx context.Context, target string) (net.Conn, error) {
		switch target {
		case fleetAPI:
			return gate.Dial(site)
		case fleetGone:
			r.expire(ctx, gate, site)
			return nil, errGone
		}
		return nil, fmt.Errorf("no target is called %q", target)
	})
	if err != nil && ctx.Err() == nil {
		r.expire(ctx, gate, site)
	}
	return err
}

// errGone ends the stream on which a site says that its supernode is dead.
var errGone = errors.New("noted")

// expire has a site's node taken for dead. Where that fails, the superlink finds out by itself, later.
func (r *runner) expire(ctx context.Context, gate *fleet.Gate, site string) {
	if err := gate.Expire(ctx, site); err != nil && ctx.Err() == nil {
		r.log.Warn("a dead supernode's node stays known for a while", "site", site, "err", err)
	}
}

// buried tells the hub's runner that the supernode of this site is dead, so that nobody waits for its node.
func (r *runner) buried(ctx context.Context, sess *link.Session) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if err := relay.Signal(ctx, fleetGone, sess.Open); err != nil {
		r.log.Warn("the hub could not be told of the supernode's death", "err", err)
	}
}

// site runs the supernode.
func (r *runner) site(ctx context.Context) error {
	p, err := r.prepare(ctx)
	if err != nil {
		return err
	}
	defer r.close(p)
	sess, err := r.dial(ctx)
	if err != nil {
		return err
	}
	defer sess.Close()
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, "tcp4", p.ip+":0")
	if err != nil {
		return err
	}
	g, gctx := errgroup.WithContext(ctx)
	// The relay goes last, so that the supernode can take its leave of the superlink.
	relaying, stopRelay := context.WithCancel(context.WithoutCancel(ctx))
	g.Go(func() error {
		return ignoreDone(relaying, relay.Listen(relaying, sock.OwnUser(ln, r.log), fleetAPI, sess.Open))
	})
	g.Go(func() error {
		defer stopRelay()
		return r.supernode(ctx, gctx, sess, flower.ClientConfig{
			Install: p.inst, AppDir: p.dir, RunDir: p.dir, LogDir: r.spec.Logs, FlwrHome: p.home, IP: p.ip, Superlink: ln.Addr().String(),
			NodeConfig: r.spec.Spec.NodeConfigFor(r.spec.Party, r.spec.Index, r.spec.Count), RunConfig: r.spec.Spec.RunConfig, Installs: r.spec.Spec.FlowerInstalls, Env: p.env, Party: r.spec.Party,
			OnEvent: r.event, OnLogError: r.diskError, OpenLog: r.openLog,
		})
	})
	return g.Wait()
}

// grace is how long programs may take to end: none when the end is to be at once.
func (r *runner) grace(ctx context.Context) time.Duration {
	if d, _, _ := r.desired.get(); d == pb.Desired_DESIRED_KILL || errors.Is(context.Cause(ctx), errKill) {
		return 0
	}
	return Grace
}

// ignoreDone makes nil of the error with which something ends because its context did.
func ignoreDone(ctx context.Context, err error) error {
	if ctx.Err() == nil {
		return err
	}
	return nil
}
