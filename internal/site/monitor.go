package site

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/pergolafl/pergola/internal/api"
	"github.com/pergolafl/pergola/internal/config"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/monitor"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/sock"
)

// MonitorSocket is the name of the socket in the agent's directory at which its owner can ask how it is, while it runs. An agent listens
// nowhere else.
const MonitorSocket = "monitor.sock"

// minFree is how much space a site's disk needs to take part in a job.
const minFree = 64 << 20

// connection is what an agent knows of its way to the hub. The zero value is not connected.
type connection struct {
	mu    sync.Mutex // guards the rest
	up    bool
	since time.Time // when that became so
	begun int       // connections so far
	last  *problem.Error
}

func (c *connection) set(up bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.up != up || c.since.IsZero() {
		c.up, c.since = up, time.Now()
		if up {
			c.begun++
		}
	}
	c.last = problem.From(err)
}

// Status is what an agent's owner is told.
type Status struct {
	Site        string       `json:"site"`
	Version     string       `json:"version"`
	Hubs        []string     `json:"hubs"`
	Connected   bool         `json:"connected"`
	Since       time.Time    `json:"since"`             // when it was connected, or the connection was lost or never had
	Problem     string       `json:"problem,omitempty"` // why it is not connected
	Next        string       `json:"next,omitempty"`    // what to do about it
	Certificate time.Time    `json:"certificate_end"`
	Parts       []PartStatus `json:"parts"`
}

// PartStatus is the site's part in one job.
type PartStatus struct {
	Job     job.ID `json:"job"`
	Attempt int    `json:"attempt"`
	Wanted  string `json:"wanted"` // "up", "stop", "kill"
}

// Tell tells how the agent is.
func (a *Agent) Tell() Status {
	out := Status{Site: a.conf.Name, Version: api.BuildVersion(), Hubs: a.hubs, Certificate: a.certificateEnd(), Parts: []PartStatus{}}
	a.conn.mu.Lock()
	out.Connected, out.Since = a.conn.up, a.conn.since.UTC()
	if p := a.conn.last; p != nil && !out.Connected {
		out.Problem, out.Next = p.What(), p.Next
	}
	a.conn.mu.Unlock()
	a.mu.Lock()
	defer a.mu.Unlock()
	for id, p := range a.parts {
		d, _ := p.want.Get()
		out.Parts = append(out.Parts, PartStatus{Job: id, Attempt: p.attempt(), Wanted: strings.ToLower(strings.TrimPrefix(d.String(), "DESIRED_"))})
	}
	slices.SortFunc(out.Parts, func(x, y PartStatus) int { return cmp.Compare(x.Job, y.Job) })
	return out
}

// certificateEnd reads when the certificate on disk ends; the zero time if it cannot be read.
func (a *Agent) certificateEnd() time.Time {
	k, err := pki.LoadKeypair(a.dir, "site")
	if err != nil {
		return time.Time{}
	}
	c, err := k.Certificate()
	if err != nil || c.Leaf == nil {
		return time.Time{}
	}
	return c.Leaf.NotAfter.UTC()
}

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(name, help, labels, nil)
}

var (
	descConnected   = desc("pergola_agent_connected", "1 while the agent is connected with the hub, else 0.")
	descSince       = desc("pergola_agent_since_seconds", "For how long the agent has been connected, or not.")
	descConnections = desc("pergola_agent_connections_total", "Connections with the hub since the agent began; more than a few a day mean a network that breaks.")
	descParts       = desc("pergola_agent_parts", "Jobs in which the site has a part now.")
	descExpiry      = desc("pergola_agent_certificate_expiry_timestamp_seconds", "When the site's certificate ends, in seconds since 1970.")
	descFree        = desc("pergola_agent_disk_free_bytes", "Free space of the file system of that folder.", "folder")
	descReady       = desc("pergola_agent_ready", "1 where the check passes, else 0.", "check")
)

// collector gives what is as it is now.
type collector struct{ a *Agent }

// Describe implements prometheus.Collector.
func (c collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descConnected, descSince, descConnections, descParts, descExpiry, descFree, descReady} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c collector) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	flag := func(b bool) float64 {
		if b {
			return 1
		}
		return 0
	}
	s := c.a.Tell()
	gauge(descConnected, flag(s.Connected))
	gauge(descSince, time.Since(s.Since).Seconds())
	c.a.conn.mu.Lock()
	begun := c.a.conn.begun
	c.a.conn.mu.Unlock()
	ch <- prometheus.MustNewConstMetric(descConnections, prometheus.CounterValue, float64(begun))
	gauge(descParts, float64(len(s.Parts)))
	if !s.Certificate.IsZero() {
		gauge(descExpiry, float64(s.Certificate.Unix()))
	}
	for folder, path := range map[string]string{"site": c.a.dir, "cache": c.a.conf.Cache} {
		if d, err := monitor.DiskOf(path); err == nil {
			gauge(descFree, float64(d.Free), folder)
		}
	}
	for _, k := range c.a.checks() {
		gauge(descReady, flag(k.Probe(context.Background()) == nil), k.Name)
	}
}

// checks are those of /readyz.
func (a *Agent) checks() []monitor.Check {
	return []monitor.Check{
		{Name: "hub", Probe: func(context.Context) error {
			s := a.Tell()
			switch {
			case s.Connected:
				return nil
			case s.Problem == "":
				return errors.New("the agent is not connected with the hub yet")
			}
			return errors.New(s.Problem)
		}},
		{Name: "certificate", Probe: func(context.Context) error {
			switch end := a.certificateEnd(); {
			case end.IsZero():
				return errors.New("the site's certificate cannot be read")
			case time.Now().After(end):
				return fmt.Errorf("the site's certificate ended on %s", end.Format(time.DateTime))
			}
			return nil
		}},
		{Name: "disk", Probe: func(context.Context) error {
			d, err := monitor.DiskOf(a.dir)
			if err == nil && d.Free < minFree {
				err = fmt.Errorf("%d MiB are free on the site's disk, fewer than %d", d.Free>>20, minFree>>20)
			}
			return err
		}},
	}
}

// serveMonitor answers at the socket until ctx is done.
func (a *Agent) serveMonitor(ctx context.Context) {
	ln, err := sock.Listen(filepath.Join(a.dir, MonitorSocket))
	if err != nil {
		a.log.Warn("nobody can ask the agent how it is by its socket", "err", err) // it works all the same
		return
	}
	g := monitor.NewGroup(ctx)
	defer g.Wait()
	m := monitor.New(g, monitor.Options{
		Name: "site", Version: api.BuildVersion(), Ready: a.checks(), Metrics: []prometheus.Collector{collector{a}},
		Live: []monitor.Check{{Name: "agent", Probe: func(ctx context.Context) error {
			for !a.mu.TryLock() {
				select {
				case <-time.After(5 * time.Millisecond):
				case <-ctx.Done():
					return errors.New("the agent's state is locked")
				}
			}
			a.mu.Unlock()
			return nil
		}}},
		Status: func(context.Context) any { return a.Tell() },
	})
	s := monitor.Server(ctx, m.Handler(monitor.Own))
	stop := context.AfterFunc(ctx, func() { _ = s.Close() }) // who asks asks again
	defer stop()
	if err := s.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
		a.log.Warn("nobody can ask the agent any more how it is", "err", err)
	}
}

// ReadConfig reads and checks the site.toml of the agent in dir, and gives the hub's addresses.
func ReadConfig(dir string) (Config, []string, error) {
	var c Config
	path := filepath.Join(dir, ConfigFile)
	if err := config.Read(path, &c); err != nil {
		return c, nil, err
	}
	if err := job.CheckName("site", c.Name); err != nil {
		return c, nil, inFile(err, path)
	}
	hubs, err := c.hubs(path)
	return c, hubs, err
}
