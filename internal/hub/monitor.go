package hub

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pergolafl/pergola/internal/api"
	"github.com/pergolafl/pergola/internal/config"
	"github.com/pergolafl/pergola/internal/monitor"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/sock"
)

// MonitorSocket is the name of the socket in the hub's directory at which its owner can ask how it is, while it runs.
const MonitorSocket = "monitor.sock"

const (
	// minFree is how much space the hub's disk needs to take work: a bundle and the logs of some jobs.
	minFree = 64 << 20
	// beatLimit is how long the loop that gives jobs their controllers may be busy with one round: the store is waited for in it.
	beatLimit = 2 * time.Minute

	storeFresh, storeLimit = 5 * time.Second, 2 * time.Second
	usedFresh, usedLimit   = 10 * time.Minute, 5 * time.Minute
)

// watched is what a hub has for its watchers.
type watched struct {
	measures *measures
	beat     atomic.Int64 // when the control loop began its last round, after h.opened
	watcher  atomic.Pointer[monitor.Monitor]
	port     atomic.Pointer[port]
}

// ReadConfig reads and checks the hub.toml of the hub in dir.
func ReadConfig(dir string) (Config, error) {
	var c Config
	if err := config.Read(filepath.Join(dir, ConfigFile), &c); err != nil {
		return c, err
	}
	return c, c.check()
}

// checkMonitor refuses an address at which others than this machine's users could ask, unless that is meant.
func (c *Config) checkMonitor() error {
	if c.Monitor == "" {
		return nil
	}
	host, _, err := net.SplitHostPort(c.Monitor)
	if err != nil {
		return problem.New(problem.Usage, `write it like monitor = "127.0.0.1:9464"`, "monitor %q is not HOST:PORT", c.Monitor)
	}
	if ip := net.ParseIP(host); host != "localhost" && (ip == nil || !ip.IsLoopback()) && !c.MonitorAnywhere {
		return problem.New(problem.Usage, `use monitor = "127.0.0.1:9464", or add monitor-anywhere = true if others may read the hub's measurements without a certificate`,
			"monitor %q is not an address of this machine alone", c.Monitor)
	}
	return nil
}

// beats notes that the control loop goes round.
func (h *Hub) beats() { h.beat.Store(int64(time.Since(h.opened))) }

// watch makes the monitor; its work belongs to g.
func (h *Hub) watch(g *monitor.Group, p *port) *monitor.Monitor {
	h.beats()
	h.port.Store(p)
	c := &collector{
		h: h, stored: monitor.NewCached(g, storeFresh, storeLimit, h.askStore), used: monitor.NewCached(g, usedFresh, usedLimit, h.used),
	}
	m := monitor.New(g, monitor.Options{
		Name: "hub", Version: api.BuildVersion(),
		Live: []monitor.Check{{Name: "loop", Probe: h.lives}},
		Ready: []monitor.Check{
			{Name: "store", Probe: h.db.Ready},
			{Name: "port", Probe: func(ctx context.Context) error { return h.accepts(ctx, p.ln.Addr()) }},
			{Name: "disk", Probe: func(context.Context) error { return hasRoom(h.dir) }},
			{Name: "certificate", Probe: func(context.Context) error { return h.valid() }},
		},
		Status:  func(ctx context.Context) any { return h.status(ctx) },
		Metrics: append(h.measures.collectors(), c),
	})
	h.watcher.Store(m)
	return m
}

// lives tells whether the control loop goes round, and the hub's lock can be had.
func (h *Hub) lives(ctx context.Context) error {
	if d := time.Since(h.opened) - time.Duration(h.beat.Load()); d > beatLimit {
		return fmt.Errorf("the loop that sees to the jobs has done nothing for %s", d.Round(time.Second))
	}
	for !h.mu.TryLock() {
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			return errors.New("the hub's state is locked")
		}
	}
	h.mu.Unlock()
	return nil
}

// accepts tells whether the port takes a connection and finishes its handshake.
func (h *Hub) accepts(ctx context.Context, at net.Addr) error {
	addr := at.String()
	if host, portNo, err := net.SplitHostPort(addr); err == nil {
		if ip := net.ParseIP(host); ip == nil || ip.IsUnspecified() {
			addr = net.JoinHostPort("localhost", portNo)
		}
	}
	d := tls.Dialer{Config: pki.JoinClientTLS(h.auth.Fingerprint())}
	c, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return fmt.Errorf("the hub's own port does not take a connection: %w", err)
	}
	return c.Close()
}

func hasRoom(dir string) error {
	d, err := monitor.DiskOf(dir)
	if err != nil {
		return err
	}
	if d.Free < minFree {
		return fmt.Errorf("%d MiB are free on the hub's disk, fewer than %d", d.Free>>20, minFree>>20)
	}
	if d.Inodes > 0 && d.FreeInodes < 100 {
		return fmt.Errorf("%d inodes are free on the hub's disk", d.FreeInodes)
	}
	return nil
}

// valid tells whether the hub's certificates are good now.
func (h *Hub) valid() error {
	for name, end := range h.expiries() {
		if now := time.Now(); now.After(end) {
			return fmt.Errorf("the certificate of the %s ended on %s", name, end.UTC().Format(time.DateTime))
		}
	}
	return nil
}

// Status is what the hub's owner is told at its socket.
type Status struct {
	Version string         `json:"version"`
	Listen  string         `json:"listen"`
	Since   time.Time      `json:"since"`
	Jobs    map[string]int `json:"jobs"` // by state
	Sites   []SiteStatus   `json:"sites"`
	Links   int            `json:"links"`
	Error   string         `json:"error,omitempty"` // why jobs and sites are not known
}

// SiteStatus is one site of a [Status].
type SiteStatus struct {
	Name      string `json:"name"`
	Connected bool   `json:"connected"`
}

func (h *Hub) status(ctx context.Context) Status {
	out := Status{Version: api.BuildVersion(), Since: h.opened.UTC(), Jobs: map[string]int{}, Sites: []SiteStatus{}}
	if p := h.port.Load(); p != nil {
		out.Listen = p.ln.Addr().String()
	}
	s, err := h.askStore(ctx)
	if err != nil {
		out.Error = err.Error()
	}
	for st, n := range s.jobs {
		out.Jobs[string(st)] = n
	}
	for _, n := range s.sites {
		_, up := h.away(n)
		out.Sites = append(out.Sites, SiteStatus{n, up})
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, n := range h.links {
		out.Links += n
	}
	return out
}

// pages serves the monitor's pages on the hub's port: all of them to users, to sites whether the hub lives.
func (h *Hub) pages(m *monitor.Monitor) http.Handler {
	health, scrape := m.Handler(monitor.Health), m.Handler(monitor.Scrape)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.TLS == nil {
			http.Error(w, "no TLS", http.StatusForbidden)
			return
		}
		id, err := pki.Expect(*r.TLS, pki.KindUser, pki.KindSite)
		if err != nil {
			http.Error(w, problem.From(err).Msg, http.StatusForbidden)
			return
		}
		if id.Kind == pki.KindUser {
			scrape.ServeHTTP(w, r)
			return
		}
		names, err := h.siteNames(r.Context())
		switch {
		case err != nil:
			http.Error(w, "the hub's store does not answer", http.StatusServiceUnavailable)
		case !slices.Contains(names, id.Name):
			http.Error(w, "site "+id.Name+" is not enrolled", http.StatusForbidden)
		default:
			health.ServeHTTP(w, r)
		}
	})
}

// doors are where a hub's watchers come to: the socket in its directory, and the address of hub.toml. Either may be nil.
type doors struct{ own, tcp net.Listener }

// listenMonitor opens them. That the socket cannot be had is no reason not to start.
func (h *Hub) listenMonitor(ctx context.Context) (d doors, err error) {
	if h.conf.Monitor != "" {
		var lc net.ListenConfig
		if d.tcp, err = lc.Listen(ctx, "tcp", h.conf.Monitor); err != nil {
			return d, problem.Wrap(err, problem.Usage, "choose another with monitor in hub.toml", CannotListen+"%s", h.conf.Monitor)
		}
		h.log.Info("the monitor listens", "address", d.tcp.Addr().String())
	}
	own, err := sock.Listen(filepath.Join(h.dir, MonitorSocket))
	if err != nil {
		h.log.Warn("nobody can ask the hub how it is by its socket", "err", err)
		return d, nil
	}
	d.own = own
	return d, nil
}

// serveMonitor serves the pages until ctx is done.
func (h *Hub) serveMonitor(ctx context.Context, m *monitor.Monitor, d doors) error {
	g, ctx := errgroup.WithContext(ctx)
	if d.own != nil {
		g.Go(func() error { return serveHTTP(ctx, monitor.Server(ctx, m.Handler(monitor.Own)), d.own) })
	}
	if d.tcp != nil {
		g.Go(func() error { return serveHTTP(ctx, monitor.Server(ctx, m.Handler(monitor.Scrape)), d.tcp) })
	}
	<-ctx.Done()
	return g.Wait()
}
