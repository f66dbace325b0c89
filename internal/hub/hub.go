// Package hub is the one public process: it takes sites and users on one TLS port, keeps the jobs, and sees each job to
// its end. Control is level-triggered: what each party should be doing follows from the stored state, and agents and
// runners are told that until they do it, so nothing depends on a message that may get lost.
//
// It runs none of Flower's programs (its runner process per job does) and looks into no link (it splices bytes). Start
// with [Open] and [Hub.Run].
package hub

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/net/netutil"
	"golang.org/x/sync/errgroup"

	"github.com/pergolafl/pergola/internal/api"
	"github.com/pergolafl/pergola/internal/api/pergola/v1/pergolav1connect"
	"github.com/pergolafl/pergola/internal/clock"
	"github.com/pergolafl/pergola/internal/config"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/keyed"
	"github.com/pergolafl/pergola/internal/link"
	"github.com/pergolafl/pergola/internal/monitor"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/pyenv"
	"github.com/pergolafl/pergola/internal/store"
)

// ConfigFile is the configuration's name in the hub's directory.
const ConfigFile = "hub.toml"

// Config is a hub's hub.toml.
type Config struct {
	Listen    string       `toml:"listen"`     // host:port of the one port; port 0 = any free one
	Addresses []string     `toml:"addresses"`  // host:port at which sites and users reach it, for the tokens by which they enrol
	Sites     []string     `toml:"sites"`      // sites that are enrolled without a token
	Python    string       `toml:"python"`     // interpreter for the hub's side of jobs; "" = the best of PATH
	Existing  bool         `toml:"existing"`   // use Python as it is, build no environments
	Cache     string       `toml:"cache"`      // environments; "" = the user's cache folder
	Apps      string       `toml:"apps"`       // folder with apps that lie ready, for a job's server.app-path; "" = none
	SiteGrace job.Duration `toml:"site-grace"` // how long a site's agent may be away in a job; default the job's outage-tolerance
	LogQuota  job.Size     `toml:"log-quota"`  // the most that is kept of each party's logs in a job; default: as the job says
	MaxJobs   int          `toml:"max-jobs"`   // how many jobs may prepare, run or end at a time; 0 = any number
	Store     string       `toml:"store"`      // postgres://…; "" = a file in the hub's directory
	Mark      string       `toml:"mark"`       // begins the marks of this hub's programs; default "hub"

	Retention Retention `toml:"retention"` // for how long what is over is kept

	CertificateLifetime job.Duration `toml:"certificate-lifetime"` // of all certificates that the hub issues, its own as well; default 30d

	Monitor         string `toml:"monitor"`          // host:port of the pages for monitoring, without TLS; "" = none but in the directory and on the port
	MonitorAnywhere bool   `toml:"monitor-anywhere"` // that may be an address that other machines reach
}

// ballastBytes are set aside so that the ends of jobs can be stored on a disk that is full.
const ballastBytes = 1 << 20

// Hub is a running hub.
type Hub struct {
	dir  string
	conf Config
	log  *slog.Logger
	db   store.Store
	id   string // by which it holds the leases of jobs
	auth *pki.Authority
	cert *pki.Credential // its own
	tls  *tls.Config

	clock  *clock.Clock
	opened time.Time // sites that have not been seen since then are away since then

	locks keyed.Locks // of bundles, by digest, and of uploads, by path

	sched   *scheduler
	wants   *wants       // what each site should be running
	changed store.Fanout // sites that came and went, under the job id ""
	watched
	guests guests

	mu    sync.Mutex // guards the rest
	sites map[string]*siteState
	jobs  map[job.ID]*control
	links map[pki.Identity]int // that are spliced
}

// siteState is what the hub knows of a site's agent.
type siteState struct {
	conns int       // WatchDesired streams
	since time.Time // when that became zero, or more than zero
}

// Open reads dir/hub.toml, the authority (ca.crt, ca.key) and the hub's key pair (hub.crt, hub.key) and opens the store.
func Open(ctx context.Context, dir string, log *slog.Logger) (*Hub, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	h := &Hub{dir: dir, log: log, opened: time.Now(), sites: map[string]*siteState{}, jobs: map[job.ID]*control{}, links: map[pki.Identity]int{}}
	if err := config.Read(filepath.Join(dir, ConfigFile), &h.conf); err != nil {
		return nil, err
	}
	if err := h.conf.check(); err != nil {
		return nil, err
	}
	if h.clock, err = clock.Open(filepath.Join(dir, clockFile)); err != nil {
		log.Warn("what is known of changes of the clock cannot be read; deadlines of running jobs are by the clock as it is now", "err", err)
	}
	if h.auth, err = pki.LoadAuthority(dir); err != nil {
		return nil, err
	}
	if err := h.openCertificate(); err != nil {
		return nil, err
	}
	conf := pki.ServerTLS(tls.Certificate{}, h.auth.Roots(), "h2", "http/1.1", link.ALPN)
	conf.Certificates = nil
	conf.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return h.cert.Certificate(), nil }
	h.tls = h.auth.WithJoin(conf)
	for _, d := range []string{"jobs", "bundles"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o700); err != nil {
			return nil, diskProblem(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "reserve"), make([]byte, ballastBytes), 0o600); err != nil {
		return nil, diskProblem(err)
	}
	if h.id, err = loadID(dir); err != nil {
		return nil, err
	}
	if h.db, err = openStore(ctx, dir, h.conf.Store); err != nil {
		return nil, err
	}
	h.measures = newMeasures()
	h.db.Observe(h.measures.observer(h))
	h.sched = newScheduler(h)
	h.wants = newWants(h.db, h.killing, log)
	return h, nil
}

// ListeningPrefix begins the line that `pergola hub` prints once it listens; the address follows.
const ListeningPrefix = "listening on "

// CannotListen begins what `pergola hub` says when it cannot have its port; the address and the reason follow.
const CannotListen = "cannot listen on "

// clockFile remembers, in the hub's directory, how the machine's clock was set.
const clockFile = "clock.json"

// DatabaseFile is the store's name in the hub's directory.
const DatabaseFile = "pergola.db"

func (c *Config) check() error {
	if c.Listen == "" {
		c.Listen = ":443"
	}
	if err := checkStore(c.Store); err != nil {
		return err
	}
	if err := c.checkMonitor(); err != nil {
		return err
	}
	if err := c.checkCertTTL(); err != nil {
		return err
	}
	if c.Cache == "" {
		c.Cache = pyenv.DefaultCache()
	}
	if c.Mark == "" {
		c.Mark = "hub"
	}
	if c.LogQuota > 0 && c.LogQuota < job.MinLogQuota {
		return problem.New(problem.Usage, "give "+job.MinLogQuota.String()+" or more", "log-quota of hub.toml is %s, which is too little", c.LogQuota)
	}
	if c.MaxJobs < 0 {
		return problem.New(problem.Usage, "give 1 or more, or leave it out for any number", "max-jobs: %d is no number of jobs", c.MaxJobs)
	}
	for i, s := range c.Sites {
		if err := job.CheckName("site", s); err != nil {
			return err
		}
		if slices.Contains(c.Sites[:i], s) {
			return problem.New(problem.Usage, "name it once", "site %s is listed twice", s)
		}
	}
	return nil
}

// Run serves until ctx is done. Listening is called once with the address of the port.
func (h *Hub) Run(ctx context.Context, listening func(net.Addr)) (err error) {
	defer func() {
		if e := h.db.Close(); err == nil {
			err = e
		}
	}()
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, "tcp", h.conf.Listen)
	if err != nil {
		return problem.Wrap(err, problem.Usage, "choose another with listen in hub.toml", CannotListen+"%s", h.conf.Listen)
	}
	mon, err := h.listenMonitor(ctx)
	if err != nil {
		ln.Close()
		return err
	}
	watching := monitor.NewGroup(ctx)
	defer watching.Wait() // before the store is closed
	srv := api.NewGatedServer(h.log, h.gate, h.measures.call)
	pergolav1connect.RegisterJobServiceHandler(srv, jobService{h})
	pergolav1connect.RegisterBundleServiceHandler(srv, bundleService{h})
	pergolav1connect.RegisterSiteServiceHandler(srv, siteService{h})
	pergolav1connect.RegisterIdentityServiceHandler(srv, identityService{h})
	mux := http.NewServeMux()
	api.Mount(mux, srv)
	g, ctx := errgroup.WithContext(ctx)
	p := newPort(ln, h.tls, h.log)
	m := h.watch(watching, p)
	for _, page := range []string{"/healthz", "/readyz", "/metrics"} {
		mux.Handle(page, h.gatePage(h.pages(m)))
	}
	p.greet = h.greet
	hs := &http.Server{
		Handler: mux, TLSConfig: h.tls, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute,
		ErrorLog: slog.NewLogLogger(h.log.Handler(), slog.LevelDebug), BaseContext: func(net.Listener) context.Context { return ctx },
		HTTP2: &http.HTTP2Config{SendPingTimeout: 10 * time.Second, PingTimeout: 5 * time.Second},
		ConnState: func(c net.Conn, s http.ConnState) {
			if s == http.StateClosed || s == http.StateHijacked {
				h.guests.closed(c)
			}
		},
	}
	joining := api.NewServer(h.log, h.measures.call)
	pergolav1connect.RegisterEnrolServiceHandler(joining, enrolService{h})
	joinMux := http.NewServeMux()
	api.Mount(joinMux, joining)
	js := &http.Server{
		Handler: http.MaxBytesHandler(joinMux, maxJoinBytes), ReadTimeout: 10 * time.Second, WriteTimeout: 20 * time.Second,
		ErrorLog: hs.ErrorLog, BaseContext: hs.BaseContext,
	}
	js.SetKeepAlivesEnabled(false)
	g.Go(func() error { return serveHTTP(ctx, js, netutil.LimitListener(p.join, maxJoining)) })
	g.Go(func() error { return p.run(ctx, func(c *tls.Conn) { h.splice(ctx, c) }) })
	g.Go(func() error { return serveHTTP(ctx, hs, p.http) })
	g.Go(func() error { return h.control(ctx) })
	g.Go(func() error { return h.collects(ctx) })
	g.Go(func() error { return h.serveMonitor(ctx, m, mon) })
	g.Go(func() error { return h.seeOut(ctx) })
	g.Go(func() error { return h.keepCertificate(ctx) })
	g.Go(func() error { h.wants.run(ctx, &h.changed); return nil })
	listening(ln.Addr())
	h.log.Info("the hub listens", "address", ln.Addr().String())
	return g.Wait()
}

// Newcomers have no certificate yet: few at a time, and a request for one is small.
const (
	maxJoining   = 64
	maxJoinBytes = 64 << 10
)

// serveHTTP serves until ctx is done.
func serveHTTP(ctx context.Context, s *http.Server, ln net.Listener) error {
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		if err := s.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	})
	g.Go(func() error {
		<-gctx.Done()
		// Streams end with BaseContext; whoever does not take that in 2 s is cut off.
		bye, cancel := context.WithTimeout(context.WithoutCancel(gctx), 2*time.Second)
		defer cancel()
		if err := s.Shutdown(bye); err != nil {
			return s.Close()
		}
		return nil
	})
	return g.Wait()
}

// control decides which jobs start, and keeps a controller for each that has started and is not over.
func (h *Hub) control(ctx context.Context) error {
	wake, cancel := h.db.Subscribe("")
	defer cancel()
	changed, cancel2 := h.changed.Subscribe("")
	defer cancel2()
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { h.sweepAll(ctx) })
	h.sched.begin = func(id job.ID) { h.attend(ctx, &wg, id) }
	for failures := 0; ctx.Err() == nil; {
		h.beats()
		began := time.Now()
		next, err := h.sched.turn(ctx)
		switch {
		case err == nil:
			failures = 0
		case ctx.Err() == nil:
			h.log.Error("the queue cannot be looked at", "err", err)
			failures++
			next = min(time.Duration(failures)*100*time.Millisecond, 2*time.Second)
		}
		// Of many things that happen at once the next look sees all: it takes a small part of the time, however long the queue.
		sleep(ctx, min(5*time.Since(began), time.Second))
		if next == 0 || next > beatLimit/4 {
			next = beatLimit / 4 // so that it is seen to live
		}
		t := time.NewTimer(next)
		select {
		case <-wake:
		case <-changed:
			h.sched.stale.Store(true)
		case <-t.C:
		case <-ctx.Done():
		}
		t.Stop()
	}
	return nil
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// attend has a controller see to a job until that is over, whenever it is this hub's.
func (h *Hub) attend(ctx context.Context, wg *sync.WaitGroup, id job.ID) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.jobs[id] != nil {
		return
	}
	c := newControl(h, id)
	h.jobs[id] = c
	wg.Go(func() {
		for !c.run(ctx) && ctx.Err() == nil {
			sleep(ctx, renewal) // another hub's lease may be over then
			c = newControl(h, id)
			h.mu.Lock()
			h.jobs[id] = c
			h.mu.Unlock()
		}
		h.measures.forget(id)
		h.mu.Lock()
		delete(h.jobs, id)
		h.mu.Unlock()
	})
}

// unfinished gives the jobs that are not over.
func (h *Hub) unfinished(ctx context.Context) ([]job.Job, error) {
	return h.openJobs(ctx, store.Filter{})
}

// openJobs gives all jobs that are not over and that f chooses.
func (h *Hub) openJobs(ctx context.Context, f store.Filter) ([]job.Job, error) {
	for _, s := range job.States() {
		if !s.Terminal() {
			f.States = append(f.States, s)
		}
	}
	f.Limit = 500
	var out []job.Job
	for {
		js, err := h.db.Jobs(ctx, f)
		if err != nil {
			return out, err
		}
		out = append(out, js...)
		if len(js) < f.Limit {
			return out, nil
		}
		f.After = js[len(js)-1].ID
	}
}

// Alive returns when the hub's state can be looked at, which takes no time unless something is stuck.
func (h *Hub) Alive() {
	h.mu.Lock()
	defer h.mu.Unlock()
}

// siteUp and siteDown count a site's agents.
func (h *Hub) siteUp(name string) {
	h.mu.Lock()
	s := h.sites[name]
	if s == nil {
		s = &siteState{}
		h.sites[name] = s
	}
	s.conns++
	if s.conns == 1 {
		s.since = time.Now()
	}
	h.mu.Unlock()
	h.log.Info("a site is connected", "site", name)
	h.sched.stale.Store(true)
	h.changed.Wake("")
}

func (h *Hub) siteDown(name string) {
	h.mu.Lock()
	s := h.sites[name]
	s.conns--
	if s.conns == 0 {
		s.since = time.Now()
	}
	h.mu.Unlock()
	h.log.Info("a site's connection ended", "site", name)
	h.sched.stale.Store(true)
	h.changed.Wake("")
}

// away tells since when a site's agent is away; ok means that it is connected.
func (h *Hub) away(name string) (since time.Time, ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := h.sites[name]
	if s == nil {
		return time.Time{}, false
	}
	return s.since, s.conns > 0
}

func (h *Hub) jobDir(id job.ID) string           { return filepath.Join(h.dir, "jobs", string(id)) }
func (h *Hub) partyDir(id job.ID) string         { return filepath.Join(h.jobDir(id), "party") }
func (h *Hub) logDir(id job.ID, p string) string { return filepath.Join(h.jobDir(id), "logs", p) }
func (h *Hub) bundlePath(digest string) string {
	return filepath.Join(h.dir, "bundles", hexOf(digest)+".tar.zst")
}

func (h *Hub) bundleDir(digest string) string { return filepath.Join(h.dir, "bundles", hexOf(digest)) }

// makeRoom gives up the reserve on a full disk; it tells whether there was one.
func (h *Hub) makeRoom() bool { return os.Remove(filepath.Join(h.dir, "reserve")) == nil }
