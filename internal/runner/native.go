package runner

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pergolafl/pergola/internal/flower"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/link"
	"github.com/pergolafl/pergola/internal/native"
	"github.com/pergolafl/pergola/internal/native/python"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/relay"
	"github.com/pergolafl/pergola/internal/sock"
)

// native tells whether the job runs on the native engine.
func (r *runner) native() bool { return r.spec.Spec.Engine == job.EngineNative }

// shim writes the Python side down.
func (r *runner) shim() (native.Shim, error) {
	s, err := native.Install(r.spec.Cache, python.Files)
	if err != nil {
		return s, fmt.Errorf("write the native engine's Python side: %w", err)
	}
	return s, nil
}

// tryOut has the Python side try itself out in the party's environment, once for each of both.
func (r *runner) tryOut(ctx context.Context, p *prepared, s native.Shim) error {
	name := strings.TrimSuffix(p.probe, ".json") + "-" + s.Digest + ".json"
	v, err := s.Check(ctx, p.inst.Python, p.env, filepath.Join(r.spec.Cache, "probes", name))
	if err != nil {
		return err
	}
	if !v.OK {
		return problem.New(problem.NativeUnavailable, "use --engine flower", "the native engine does not work with flwr %s at %s: %s", p.inst.Version, r.spec.Party, v.Why)
	}
	return nil
}

// hosting is what a party's processes of the native engine are started with.
type hosting struct {
	shim native.Shim
	host *flower.Host
	app  string // the app's folder
}

func (r *runner) hosting(p *prepared) (h hosting, err error) {
	if h.shim, err = r.shim(); err != nil {
		return h, err
	}
	h.host, err = flower.NewHost(flower.HostConfig{
		Install: p.inst, Server: r.spec.IsHub(), Dir: p.dir, LogDir: r.spec.Logs, FlwrHome: p.home, IP: p.ip, Env: p.env, Party: r.spec.Party,
		OnEvent: r.event, OnLogError: r.diskError, OpenLog: r.openLog,
	})
	if err != nil {
		return h, err
	}
	h.app, err = flower.InstallApp(p.inst, p.dir, p.home)
	return h, err
}

// start starts a process.
func (h hosting) start(role string, env ...string) (*flower.Hosted, native.Process, error) {
	conn, theirs, err := native.SocketPair()
	if err != nil {
		return nil, native.Process{}, err
	}
	p, err := h.host.Start([]string{h.shim.Boot, role}, env, theirs)
	_ = theirs.Close() // the process has its own
	if err != nil {
		return nil, native.Process{}, errors.Join(err, conn.Close())
	}
	return p, native.Process{
		Conn: conn, Pid: p.Pid(), Done: p.Done(), Exit: func() string { return p.Exit().String() },
		Stop: func(grace time.Duration) {
			p.Stop(grace)
			<-p.Done()
		},
	}, nil
}

// nativeHub runs the ServerApp in a process of its own, and passes its messages to the sites.
func (r *runner) nativeHub(ctx context.Context) error {
	told := &outages{note: r.note}
	acceptor := r.acceptor(told)
	ln, err := sock.Listen(LinkSocket(r.dir))
	if err != nil {
		return err
	}
	var batches aside
	hub := native.NewHub(native.HubOptions{
		Log: r.log, OnProgress: r.progressed, OnBatch: func(b native.Batch) { batches.do(func() { r.batch(b) }) },
		OnRefused: func(site, why string) {
			text := fmt.Sprintf("a reply of %s is refused, and its message answered with an error: %s", site, why)
			batches.do(func() { r.note(job.KindWarning, job.Text{Message: text}) })
		},
	})
	// The links go after the party's last word: a site that finds its link broken would be heard first, and taken for the cause.
	linked, unlink := context.WithCancel(context.WithoutCancel(ctx))
	links, lctx := errgroup.WithContext(linked)
	r.later = append(r.later, func() {
		unlink()
		_ = links.Wait() // what went wrong before was told below
	})
	links.Go(func() error { return ignoreDone(linked, acceptor.Serve(linked, ln)) })
	links.Go(func() error {
		return ignoreDone(linked, r.links(linked, acceptor, told, func(ctx context.Context, s *link.Session) error {
			m := hub.Join(ctx, s.Peer().Site, opener(func() *link.Session { return s }))
			defer m.Leave()
			return relay.Streams(ctx, s.Accept, func(_ context.Context, target string, st relay.Stream) {
				if err := m.Serve(target, st); err != nil && ctx.Err() == nil {
					r.log.Info("a stream of a site has ended", "site", s.Peer().Site, "target", target, "err", err)
				}
			})
		}))
	})
	g, gctx := errgroup.WithContext(ctx)
	over := make(chan struct{})
	g.Go(func() error {
		select {
		case <-lctx.Done(): // nothing but a failure ends it before unlink
			return links.Wait()
		case <-over:
			return nil
		}
	})
	g.Go(func() error {
		defer close(over)
		p, err := r.prepare(gctx)
		if err != nil {
			return err
		}
		defer r.close(p)
		return r.serverApp(ctx, gctx, p, hub, &batches)
	})
	if err := g.Wait(); err != nil && !errors.Is(err, errDone) {
		return err
	}
	return nil
}

// opener opens streams of the session that there is when one is wanted.
func opener(session func() *link.Session) native.Opener {
	return native.Opener{
		Open: func(ctx context.Context, target string) (native.Stream, error) {
			return relay.Open(ctx, target, session().Open)
		},
		Lane: func(ctx context.Context, target string) (native.Stream, error) {
			return relay.Open(ctx, target, session().OpenLane)
		},
	}
}

// serverApp starts the ServerApp's process, which has imported what it needs by the time the sites are ready, and runs the app once it
// is wanted. ctx is the party's, of which the grace depends.
func (r *runner) serverApp(ctx, gctx context.Context, p *prepared, hub *native.Hub, batches *aside) error {
	if err := os.MkdirAll(r.spec.Results, 0o700); err != nil {
		return err
	}
	h, err := r.hosting(p)
	if err != nil {
		return err
	}
	hosted, process, err := h.start("server")
	if err != nil {
		return err
	}
	defer func() { process.Stop(r.grace(ctx)) }()
	defer process.Conn.Close()
	// Beside the start of Python.
	if err := r.tryOut(gctx, p, h.shim); err != nil {
		return err
	}
	peer, err := native.Greet(gctx, process)
	if err != nil {
		return r.serverGone(gctx, hosted, err)
	}
	// Its end is the party's also while it waits.
	wctx, cancel := context.WithCancelCause(gctx)
	defer cancel(nil)
	go func() { // ends with the process, which is stopped above
		<-process.Done
		cancel(errServerEnded)
	}()
	r.move(job.PartyReady, nil)
	if err := r.awaitNodes(wctx, hub); err != nil {
		return r.serverGone(gctx, hosted, err)
	}
	r.move(job.PartyRunning, nil)
	res, err := hub.Run(gctx, peer, native.StartApp{Dir: h.app, Cwd: p.dir, Config: r.spec.Spec.RunConfig})
	batches.wait()
	if err != nil {
		return r.serverGone(gctx, hosted, err)
	}
	// It ends by itself, and has things to do at its exit: what it writes then is a result too.
	ended := time.NewTimer(Grace)
	defer ended.Stop()
	select {
	case <-process.Done:
	case <-ended.C:
		r.note(job.KindNote, job.Text{Message: "the ServerApp has finished but its process goes on (a thread of the app's, perhaps), and is ended"})
		process.Stop(r.grace(ctx))
	case <-gctx.Done():
		return context.Cause(gctx)
	}
	if !res.OK {
		return hosted.AppProblem(res.Error)
	}
	return r.untilStopped(gctx)
}

var errServerEnded = errors.New("the ServerApp's process has ended")

// serverGone is the problem of a ServerApp's process that ended, or broke the protocol, before its app was done.
func (r *runner) serverGone(ctx context.Context, p *flower.Hosted, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if _, ok := errors.AsType[*problem.Error](err); ok {
		return err
	}
	t := time.NewTimer(2 * time.Second) // between the end of its socket and its own
	defer t.Stop()
	select {
	case <-p.Done():
	case <-t.C:
		p.Stop(0)
	}
	if p.Exit().OK() {
		e := problem.New(problem.AppError, "let the ServerApp return; the last lines are in "+flower.ServerAppLog, "the ServerApp's process ended by itself (exit code 0) before the app was done")
		e.Log = flower.ServerAppLog
		return e
	}
	return p.AppProblem("")
}

// awaitNodes waits until the app is wanted and the nodes of its sites are there: who asks for them first thing gets all.
func (r *runner) awaitNodes(ctx context.Context, hub *native.Hub) error {
	n, err := r.desired.running(ctx)
	if err != nil {
		return err
	}
	timed, stop := context.WithTimeoutCause(ctx, r.spec.Spec.Server.ReadyTimeout.Or(job.DefaultReadyTimeout).Std(),
		problem.New(problem.StartTimeout, "look into the sites' client_app_log.txt", "not all of %d sites had joined in time", n))
	defer stop()
	err = hub.Wait(timed, n)
	if have := hub.Sites(); err != nil && ctx.Err() == nil && timed.Err() != nil && have >= r.spec.Spec.Need(r.spec.Count) {
		r.note(job.KindWarning, job.Text{Message: fmt.Sprintf("the app starts with %d of %d sites: the others have not joined in time", have, n)})
		n, err = have, nil
	}
	if err != nil {
		return err
	}
	r.note(job.KindSitesReady, job.SitesReady{Ready: n, Wanted: r.spec.Count})
	return nil
}

// nativeSite runs workers with the ClientApp. The link is dialled while the environment is prepared and Python starts.
func (r *runner) nativeSite(ctx context.Context) error {
	g, gctx := errgroup.WithContext(ctx)
	linked := make(chan struct{})
	var sess *link.Session // set before linked is closed
	g.Go(func() error {
		s, err := r.dial(gctx)
		if err != nil {
			return err
		}
		sess = s
		close(linked)
		return nil
	})
	g.Go(func() error {
		p, err := r.prepare(gctx)
		if err != nil {
			return err
		}
		defer r.close(p)
		return r.workers(ctx, gctx, p, linked, func() *link.Session { return sess })
	})
	err := g.Wait()
	if sess != nil {
		_ = sess.Close() // always nil
	}
	return err
}

// workers runs the site's workers until the party ends or the link breaks.
func (r *runner) workers(ctx, gctx context.Context, p *prepared, linked <-chan struct{}, session func() *link.Session) error {
	h, err := r.hosting(p)
	if err != nil {
		return err
	}
	spec := r.spec.Spec
	first, clients := spec.ClientsAt(r.spec.Index, r.spec.Count)
	isolation := spec.IsolationFor(p.inst.Version)
	workers := spec.Workers
	if workers == 0 {
		workers = runtime.NumCPU()
		if cpus := spec.ResourcesFor(r.spec.Party)[job.CPUs]; cpus > 0 { // the job's own share of the site
			workers = max(1, min(workers, int(cpus)))
		}
	}
	workers = min(workers, clients)
	loaded := make(chan struct{}) // closed when a worker has the app
	devices := newDevices(r.spec.GPUs, spec.GPUsPerWorker)
	if n := devices.workers(); n > 0 {
		workers = min(workers, n)
	}
	site := native.NewSite(native.SiteOptions{
		Name: r.spec.Party, Clients: clients, Workers: workers, Isolation: isolation, Log: r.log, NoSpare: workers > 1 && devices.workers() > 0,
		App: native.StartApp{Dir: h.app, Cwd: p.dir, Config: spec.RunConfig},
		NodeConfig: func(i int) any {
			return job.NodeConfig(spec.NodeConfigFor(r.spec.Party, first+i, spec.Partitions(r.spec.Count)))
		},
		Start: func(slot int) (native.Process, error) {
			_, process, err := h.start("client", devices.env(slot)...)
			return process, err
		},
		Link: opener(session),
		OnReady: func(ready native.Readiness) {
			if ready.Error != "" {
				r.note(job.KindWarning, job.Text{Message: fmt.Sprintf("the ClientApp could not be loaded at %s, and each message is answered with an error: %s", r.spec.Party, ready.Error)})
			}
			if ready.UnsafeFork != "" {
				r.note(job.KindNote, job.Text{Message: fmt.Sprintf("each message gets a new process at %s, for the app cannot be forked: %s", r.spec.Party, ready.UnsafeFork)})
			}
			close(loaded)
		},
		OnDeath: func(how string, busy bool) {
			text := fmt.Sprintf("a worker of %s is gone (%s); another takes its place", r.spec.Party, how)
			if busy {
				text = fmt.Sprintf("a worker of %s is gone (%s) while it had a message, which is answered with an error; another takes its place", r.spec.Party, how)
			}
			r.note(job.KindWarning, job.Text{Message: text})
		},
		OnProgress: r.progressed,
	})
	g, wctx := errgroup.WithContext(gctx)
	g.Go(func() error {
		err := site.Run(wctx, linked)
		if err == nil || wctx.Err() != nil {
			return err
		}
		select {
		case <-loaded:
			return err
		default: // what keeps workers from starting may be what the Python side says of the environment
			if e := r.tryOut(gctx, p, h.shim); e != nil {
				return e
			}
			return err
		}
	})
	g.Go(func() error {
		if err := r.tryOut(wctx, p, h.shim); err != nil {
			return err
		}
		select {
		case <-loaded:
			r.move(job.PartyReady, nil)
		case <-wctx.Done():
		}
		return nil
	})
	g.Go(func() error {
		select {
		case <-linked:
		case <-wctx.Done():
			return context.Cause(wctx)
		}
		s := session()
		err := relay.Streams(wctx, s.Accept, func(ctx context.Context, target string, st relay.Stream) {
			if err := site.Accept(ctx, target, st); err != nil && ctx.Err() == nil {
				r.log.Info("a stream of the hub has ended", "target", target, "err", err)
			}
		})
		if wctx.Err() != nil {
			return context.Cause(wctx)
		}
		if s.Err() != nil {
			err = r.linkLost(s)
		}
		return err
	})
	err = g.Wait()
	if ctx.Err() == nil && gctx.Err() == nil {
		select {
		case <-linked:
			if s := session(); s.Err() != nil { // whatever broke first, this is why
				return r.linkLost(s)
			}
		default: // it is still being dialled
		}
	}
	return err
}

// devices spreads a party's devices over its workers.
type devices struct {
	ids []string // nil: the site declares none
	per float64  // devices of one worker; less than 1: several share one
}

func newDevices(ids []string, per float64) devices {
	if per == 0 {
		per = 1
	}
	return devices{ids, per}
}

// workers gives how many workers the devices are for; 0 if there are none, or the site declares none.
func (d devices) workers() int {
	return min(int(float64(len(d.ids))/d.per+1e-9), 1<<16)
}

// env gives what tells a worker its devices: in turn, so that no device has more workers than another by more than one.
func (d devices) env(slot int) []string {
	if d.ids == nil {
		return nil
	}
	var mine []string
	if n := len(d.ids); n > 0 {
		each := max(1, int(d.per))
		for i := range min(each, n) {
			mine = append(mine, d.ids[(slot*each+i)%n])
		}
	}
	return []string{deviceEnv + "=" + strings.Join(mine, ",")}
}

// aside does one thing after the other on a goroutine of its own. An event is on the disk when its making returns, and messages must not
// wait for a disk. The zero value is ready.
type aside struct {
	mu    sync.Mutex // guards the rest
	queue []func()
	idle  chan struct{} // closed when the goroutine has ended; nil when there is none
}

func (a *aside) do(f func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.queue = append(a.queue, f)
	if a.idle == nil {
		a.idle = make(chan struct{})
		go a.work() // ends when nothing is left to do
	}
}

func (a *aside) work() {
	for {
		a.mu.Lock()
		if len(a.queue) == 0 {
			close(a.idle)
			a.idle = nil
			a.mu.Unlock()
			return
		}
		f := a.queue[0]
		a.queue = a.queue[1:]
		a.mu.Unlock()
		f()
	}
}

// wait waits until all that was to be done is.
func (a *aside) wait() {
	a.mu.Lock()
	idle := a.idle
	a.mu.Unlock()
	if idle != nil {
		<-idle
	}
}

// batch makes an event of what a site's replies had in them.
func (r *runner) batch(b native.Batch) {
	e := job.ClientMetrics{
		Site: b.Site, Round: b.Round, Phase: phaseOf(b.Type), Replies: b.Replies, Errors: b.Errors, SentBytes: b.Sent, ReceivedBytes: b.Got,
		Seconds: statOf(b.Seconds), WorkSeconds: b.Worked.Seconds(), Values: map[string]job.Stat{},
	}
	for name, s := range b.Values {
		e.Values[name] = statOf(s)
	}
	r.note(job.KindClientMetrics, e)
}

// phaseOf gives what a round's phase is called where the app's own metrics are shown; other types of messages keep their names.
func phaseOf(typ string) string {
	kind, _, _ := strings.Cut(typ, ".")
	return kind
}

func statOf(s native.Stat) job.Stat {
	return job.Stat{Count: s.Count, Mean: s.Mean, Min: s.Min, Max: s.Max}
}
