// Package monitor answers those who watch a hub or an agent: does it live (/healthz), can it do its work (/readyz), and its
// measurements for Prometheus (/metrics). Whatever it asks for an answer has a time limit, and is asked once at a time however
// many come, so that neither a store that hangs nor an eager watcher holds anything up.
//
// What is measured and checked is its owner's affair; so is who may ask. Start with [New] and [Monitor.Handler].
package monitor

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"runtime"
	"runtime/pprof"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Check is one condition. Probe gives what is wrong, for whoever asks; it should end with its context.
type Check struct {
	Name  string
	Probe func(context.Context) error
}

// Limits of a monitor.
const (
	// CheckLimit is how long a check may take; then it has failed.
	CheckLimit = 3 * time.Second
	// checkFresh is how long a check's result is given again.
	checkFresh = time.Second
	// scrapeLimit and scrapes bound what scrapes cost.
	scrapeLimit = 10 * time.Second
	scrapes     = 4
)

// Options are what a monitor knows of its process. Live and Ready may be empty.
type Options struct {
	Name    string // "hub" or "site"
	Version string
	Live    []Check // fail: it is to be started again
	Ready   []Check // fail: it cannot do its work for now
	// Status gives what /status shows as JSON; nil: there is no such page.
	Status func(context.Context) any
	// Metrics are registered beside those of the process and the Go runtime.
	Metrics []prometheus.Collector
}

// Monitor answers for one process.
type Monitor struct {
	opt      Options
	group    *Group
	registry *prometheus.Registry
	live     []*Cached[struct{}]
	ready    []*Cached[struct{}]
}

// New makes a monitor whose work belongs to g.
func New(g *Group, o Options) *Monitor {
	m := &Monitor{opt: o, group: g, registry: prometheus.NewRegistry()}
	info := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "pergola_build_info", Help: "1; the labels tell which process this is, its version, and the version of Go.",
		ConstLabels: prometheus.Labels{"process": o.Name, "version": o.Version, "goversion": runtime.Version()},
	})
	info.Set(1)
	m.registry.MustRegister(info, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	m.registry.MustRegister(o.Metrics...)
	for _, c := range o.Live {
		m.live = append(m.live, cachedCheck(g, c))
	}
	for _, c := range o.Ready {
		m.ready = append(m.ready, cachedCheck(g, c))
	}
	return m
}

func cachedCheck(g *Group, c Check) *Cached[struct{}] {
	return NewCached(g, checkFresh, CheckLimit, func(ctx context.Context) (struct{}, error) { return struct{}{}, c.Probe(ctx) })
}

// Result is what was found of one check.
type Result struct {
	Name    string `json:"name"`
	OK      bool   `json:"ok"`
	Message string `json:"message,omitempty"` // what is wrong
}

// Report is the answer of /healthz and /readyz.
type Report struct {
	Status  string    `json:"status"` // "ok" or "failed"
	Process string    `json:"process"`
	Version string    `json:"version"`
	Time    time.Time `json:"time"` // by the clock of the process that answers
	Checks  []Result  `json:"checks"`
}

// Ready makes the report of /readyz.
func (m *Monitor) Ready(ctx context.Context) Report { return m.report(ctx, m.opt.Ready, m.ready) }

// Live makes the report of /healthz.
func (m *Monitor) Live(ctx context.Context) Report { return m.report(ctx, m.opt.Live, m.live) }

func (m *Monitor) report(ctx context.Context, checks []Check, of []*Cached[struct{}]) Report {
	out := Report{Status: "ok", Process: m.opt.Name, Version: m.opt.Version, Checks: make([]Result, len(checks))}
	var wg sync.WaitGroup
	for i, c := range checks {
		wg.Go(func() {
			_, err := of[i].Get(ctx)
			out.Checks[i] = Result{Name: c.Name, OK: err == nil}
			if err != nil {
				out.Checks[i].Message = err.Error()
			}
		})
	}
	wg.Wait()
	for _, c := range out.Checks {
		if !c.OK {
			out.Status = "failed"
		}
	}
	out.Time = time.Now().UTC()
	return out
}

// Access says which of a monitor's pages a caller gets.
type Access int

// From the fewest pages to all.
const (
	Health Access = iota // /healthz
	Scrape               // also /readyz and /metrics
	Own                  // also /status and /debug/goroutines: for whoever owns the process
)

// Handler serves the pages of an access below /.
func (m *Monitor) Handler(a Access) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) { write(w, r, m.Live(r.Context())) })
	if a >= Scrape {
		mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) { write(w, r, m.Ready(r.Context())) })
		mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{
			ErrorHandling: promhttp.ContinueOnError, MaxRequestsInFlight: scrapes, Timeout: scrapeLimit,
		}))
	}
	if a >= Own {
		if m.opt.Status != nil {
			mux.HandleFunc("GET /status", func(w http.ResponseWriter, r *http.Request) {
				answer(w, http.StatusOK, m.opt.Status(r.Context()))
			})
		}
		mux.HandleFunc("GET /debug/goroutines", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/plain; charset=utf-8")
			_ = pprof.Lookup("goroutine").WriteTo(w, 2) // who asked may be gone
		})
	}
	return mux
}

func write(w http.ResponseWriter, r *http.Request, rep Report) {
	status := http.StatusOK
	if rep.Status != "ok" {
		status = http.StatusServiceUnavailable
	}
	if strings.HasPrefix(r.Header.Get("Accept"), "text/plain") {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		w.Header().Set("Cache-Control", "no-store")
		w.WriteHeader(status)
		fmt.Fprintln(w, rep.Status)
		for _, c := range rep.Checks {
			if c.OK {
				fmt.Fprintf(w, "ok      %s\n", c.Name)
			} else {
				fmt.Fprintf(w, "failed  %s: %s\n", c.Name, c.Message)
			}
		}
		return
	}
	answer(w, status, rep)
}

func answer(w http.ResponseWriter, status int, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		http.Error(w, "the answer cannot be written", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_, _ = w.Write(append(b, '\n')) // who asked may be gone
}

// Collectors gives all that is registered.
func (m *Monitor) Collectors() prometheus.Gatherer { return m.registry }

// Server serves a handler on listeners of the machine itself, with limits that suit pages such as these.
func Server(ctx context.Context, h http.Handler) *http.Server {
	return &http.Server{
		Handler: h, ReadTimeout: 10 * time.Second, WriteTimeout: scrapeLimit + 10*time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
		BaseContext: func(net.Listener) context.Context { return ctx },
	}
}
