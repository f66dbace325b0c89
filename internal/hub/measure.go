package hub

import (
	"context"
	"crypto/tls"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/monitor"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/schedule"
	"github.com/pergolafl/pergola/internal/store"
)

// measures are a hub's measurements that grow as things happen. No label has a job's id or anything else without a bound:
// docs/monitoring.md lists them all.
type measures struct {
	submitted, started                       prometheus.Counter
	ended                                    *prometheus.CounterVec
	wait, duration                           prometheus.Histogram
	parties                                  *prometheus.CounterVec
	apiCalls                                 *prometheus.CounterVec
	apiSeconds                               *prometheus.HistogramVec
	apiStreams                               *prometheus.GaugeVec
	storeSeconds                             *prometheus.HistogramVec
	storeErrors                              *prometheus.CounterVec
	linksOpened                              prometheus.Counter
	linkBytes                                *prometheus.CounterVec
	outages, cuts, resumes, resent, downTime prometheus.Counter
	decisions                                prometheus.Histogram
	actions                                  *prometheus.CounterVec

	removals, removedBytes *prometheus.CounterVec

	mu    sync.Mutex // guards the rest
	links map[job.ID]map[string]job.Link
}

var (
	quick = []float64{.001, .005, .025, .1, .5, 2.5, 10}
	slow  = []float64{1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 24 * 3600}
	long  = []float64{10, 60, 300, 1800, 3600, 6 * 3600, 24 * 3600, 7 * 24 * 3600}
)

func newMeasures() *measures {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	}
	vec := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
	}
	hist := func(name, help string, buckets []float64) prometheus.Histogram {
		return prometheus.NewHistogram(prometheus.HistogramOpts{Name: name, Help: help, Buckets: buckets})
	}
	hists := func(name, help string, buckets []float64, labels ...string) *prometheus.HistogramVec {
		return prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: name, Help: help, Buckets: buckets}, labels)
	}
	return &measures{
		submitted:    counter("pergola_jobs_submitted_total", "Jobs that were submitted."),
		started:      counter("pergola_jobs_started_total", "Jobs whose preparation began."),
		ended:        vec("pergola_jobs_ended_total", "Jobs that ended, by state and by the code of their cause.", "state", "cause"),
		wait:         hist("pergola_job_wait_seconds", "How long jobs waited from submission until their preparation began.", slow),
		duration:     hist("pergola_job_duration_seconds", "How long jobs took from the beginning of their preparation to their end.", long),
		parties:      vec("pergola_parties_failed_total", "Parties of jobs that failed, by the code of their cause.", "cause"),
		apiCalls:     vec("pergola_api_calls_total", "Calls of the API that ended, by procedure and outcome.", "procedure", "code"),
		apiSeconds:   hists("pergola_api_seconds", "How long calls of the API took, streams not counted.", quick, "procedure"),
		apiStreams:   prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "pergola_api_streams", Help: "Streams of the API that are open."}, []string{"procedure"}),
		storeSeconds: hists("pergola_store_seconds", "How long calls of the store took.", quick, "operation"),
		storeErrors:  vec("pergola_store_errors_total", "Calls of the store that failed, by the code of the problem.", "operation", "code"),
		linksOpened:  counter("pergola_links_opened_total", "Connections of links, and their lanes, that were joined with the hub's runners."),
		linkBytes:    vec("pergola_link_bytes_total", "Bytes of links that the hub passed on.", "direction"),
		outages:      counter("pergola_link_outages_total", "Outages of links that were long enough to be noted as events."),
		cuts:         counter("pergola_link_cuts_total", "Connections of links that were lost, as the hub's runners told."),
		resumes:      counter("pergola_link_resumes_total", "Outages of links that ended with the same session."),
		resent:       counter("pergola_link_resent_bytes_total", "Bytes that were sent again after outages of links."),
		downTime:     counter("pergola_link_down_seconds_total", "Time in which links were interrupted."),
		removals:     vec("pergola_removals_total", "What retention has removed, by kind.", "kind"),
		removedBytes: vec("pergola_removed_bytes_total", "Bytes of what retention has removed, by kind.", "kind"),
		decisions:    hist("pergola_schedule_seconds", "How long it took to decide which jobs start, of each decision.", quick),
		actions:      vec("pergola_schedule_actions_total", "What followed for jobs from decisions: start, join, expire, give-up.", "action"),
		links:        map[job.ID]map[string]job.Link{},
	}
}

func (m *measures) collectors() []prometheus.Collector {
	return []prometheus.Collector{
		m.submitted, m.started, m.ended, m.wait, m.duration, m.parties, m.apiCalls, m.apiSeconds, m.apiStreams, m.storeSeconds, m.storeErrors,
		m.linksOpened, m.linkBytes, m.outages, m.cuts, m.resumes, m.resent, m.downTime,
		m.removals, m.removedBytes,
		m.decisions, m.actions,
	}
}

// decided is what the scheduler tells of each decision. A hub of a test may have no measures.
func (m *measures) decided(d *schedule.Decision, took time.Duration) {
	if m == nil {
		return
	}
	m.decisions.Observe(took.Seconds())
	for action, n := range map[string]int{"start": len(d.Start), "join": len(d.Join), "expire": len(d.Expired), "give-up": len(d.Cannot)} {
		m.actions.WithLabelValues(action).Add(float64(n))
	}
}

// lackKinds are the values of the label why.
var lackKinds = []schedule.Kind{schedule.Removed, schedule.TooSmall, schedule.Undeclared, schedule.Drained, schedule.Away, schedule.Busy, schedule.MaxJobs, schedule.Held}

// waiting counts the queued jobs by why they wait, as the last decision had it. A job that lacks several things counts for each.
func (s *scheduler) waiting() map[string]int {
	s.mu.Lock()
	waits := s.seen.waits
	s.mu.Unlock()
	out := map[string]int{"hub-full": 0, "joining": 0}
	for _, k := range lackKinds {
		out[string(k)] = 0
	}
	for _, w := range waits {
		kinds := map[string]bool{"hub-full": w.HubFull, "joining": w.Joining}
		for _, l := range w.Lacks {
			kinds[string(l.Kind)] = true
		}
		for k, yes := range kinds {
			if _, known := out[k]; known && yes {
				out[k]++
			}
		}
	}
	return out
}

// call is what the API's servers tell.
func (m *measures) call(procedure string, stream bool) func(code string) {
	procedure = procedure[strings.LastIndex(procedure, ".")+1:] // JobService/GetJob
	began := time.Now()
	if stream {
		m.apiStreams.WithLabelValues(procedure).Inc()
	}
	return func(code string) {
		m.apiCalls.WithLabelValues(procedure, code).Inc()
		if stream {
			m.apiStreams.WithLabelValues(procedure).Dec()
		} else {
			m.apiSeconds.WithLabelValues(procedure).Observe(time.Since(began).Seconds())
		}
	}
}

// cause gives a cause's code as a label: sites tell codes too, and may tell anything.
func causeLabel(c *job.Cause) string {
	if c == nil {
		return "none"
	}
	if _, ok := problem.Codes[c.Code]; !ok {
		return "other"
	}
	return string(c.Code)
}

// observer hears of the store's calls and events.
func (m *measures) observer(h *Hub) store.Observer {
	return store.Observer{
		Call: func(doing string, _ bool, took time.Duration, err error) {
			op := strings.ReplaceAll(doing, " ", "_")
			m.storeSeconds.WithLabelValues(op).Observe(took.Seconds())
			if err == nil {
				return
			}
			code := problem.CodeOf(err)
			switch code {
			case problem.NotFound, problem.Exists, problem.Usage: // an answer
				return
			}
			m.storeErrors.WithLabelValues(op, string(code)).Inc()
		},
		Event: func(e job.Event) { m.event(h, e) },
	}
}

func (m *measures) event(h *Hub, e job.Event) {
	switch e.Kind {
	case job.KindJobState:
		var s job.JobState
		if e.Decode(&s) == nil { // the store made it
			m.moved(h, e, s)
		}
	case job.KindPartyState:
		var s job.PartyStateChange
		if e.Decode(&s) == nil && s.To == job.PartyFailed {
			m.parties.WithLabelValues(causeLabel(s.Cause)).Inc()
		}
	case job.KindLink:
		var l job.Link
		if e.Party == job.HubParty && e.Decode(&l) == nil { // a site may tell anything
			m.link(e.Job, l)
		}
	}
}

func (m *measures) moved(h *Hub, e job.Event, s job.JobState) {
	if s.From == "" {
		m.submitted.Inc()
	}
	if s.To != job.Preparing && !s.To.Terminal() {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second) // whoever moved it waits
	defer cancel()
	j, err := h.db.Job(ctx, e.Job)
	if s.To == job.Preparing {
		m.started.Inc()
		if err == nil {
			m.wait.Observe(max(0, e.At.Sub(j.Created).Seconds()))
		}
		return
	}
	m.ended.WithLabelValues(string(s.To), causeLabel(s.Cause)).Inc()
	if err == nil && !j.Started.IsZero() {
		m.duration.Observe(max(0, e.At.Sub(j.Started).Seconds()))
	}
}

// forget drops what a job's runner has told, once this hub sees to the job no more: until then it may tell again.
func (m *measures) forget(id job.ID) {
	if m == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.links, id)
}

// link adds what is new in what a job's runner told of a site's link: it tells sums.
func (m *measures) link(id job.ID, l job.Link) {
	m.mu.Lock()
	if m.links[id] == nil {
		m.links[id] = map[string]job.Link{}
	}
	last := m.links[id][l.Site]
	m.links[id][l.Site] = l
	m.mu.Unlock()
	if !l.Since.IsZero() {
		m.outages.Inc()
	}
	m.cuts.Add(float64(max(0, l.Cuts-last.Cuts)))
	m.resumes.Add(float64(max(0, l.Resumes-last.Resumes)))
	m.resent.Add(float64(max(0, l.ResentBytes-last.ResentBytes)))
	m.downTime.Add(max(0, l.DownSeconds-last.DownSeconds))
}

// counted counts what passes through a link's connection.
type counted struct {
	*tls.Conn
	in, out prometheus.Counter
}

func (m *measures) counted(c *tls.Conn) net.Conn {
	m.linksOpened.Inc()
	return &counted{c, m.linkBytes.WithLabelValues("to-hub"), m.linkBytes.WithLabelValues("to-site")}
}

// Read implements net.Conn.
func (c *counted) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.in.Add(float64(n))
	return n, err
}

// Write implements net.Conn.
func (c *counted) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.out.Add(float64(n))
	return n, err
}

// stored is what the store is asked for when somebody looks.
type stored struct {
	jobs        map[job.State]int
	oldest      time.Time // when the job was submitted that has been queued longest; zero: none is
	sites       []string
	bundles     int
	bundleBytes int64
}

func (h *Hub) askStore(ctx context.Context) (stored, error) {
	var out stored
	var err error
	if out.jobs, err = h.db.CountJobs(ctx); err != nil {
		return out, err
	}
	js, err := h.db.Jobs(ctx, store.Filter{States: []job.State{job.Queued}, Limit: 1})
	if err != nil {
		return out, err
	}
	if len(js) > 0 {
		out.oldest = js[0].Created
	}
	if out.sites, err = h.siteNames(ctx); err != nil {
		return out, err
	}
	bs, err := h.db.Bundles(ctx)
	for _, b := range bs {
		out.bundles++
		out.bundleBytes += b.Size
	}
	return out, err
}

// collector gives what is as it is now.
type collector struct {
	h      *Hub
	stored *monitor.Cached[stored]
	used   *monitor.Cached[map[string]uint64]
}

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(name, help, labels, nil)
}

var (
	descStoreUp     = desc("pergola_store_up", "1 where the store answered when it was asked for what is below; else 0, and those are missing.")
	descJobs        = desc("pergola_jobs", "Jobs in the store, by state.", "state")
	descQueue       = desc("pergola_queue_length", "Jobs that wait for their start.")
	descOldest      = desc("pergola_queue_oldest_seconds", "How long ago the job was submitted that has waited longest; 0 where none waits.")
	descWaiting     = desc("pergola_queue_waiting", "Jobs that wait for their start, by why, as it was decided last; one that lacks several things counts for each.", "why")
	descSites       = desc("pergola_sites", "Sites that are enrolled.")
	descSite        = desc("pergola_site_connected", "1 where the site's agent is connected, else 0; of every site that is enrolled.", "site")
	descSiteSince   = desc("pergola_site_since_seconds", "For how long the site's agent has been connected or away, as far as this hub knows.", "site")
	descBundles     = desc("pergola_bundles", "Bundles that the hub keeps.")
	descBundleBytes = desc("pergola_bundle_packed_bytes", "Size of the bundles as they were uploaded.")
	descControllers = desc("pergola_controllers", "Jobs that this hub sees to.")
	descLinks       = desc("pergola_links", "Connections of links, and their lanes, that are up.")
	descHandshakes  = desc("pergola_port_handshakes", "Connections to the hub's port that have not said yet who they are.")
	descFree        = desc("pergola_disk_free_bytes", "Free space of the file system of that folder.", "folder")
	descSize        = desc("pergola_disk_size_bytes", "Size of the file system of that folder.", "folder")
	descInodes      = desc("pergola_disk_free_inodes", "Free inodes of the file system of that folder; missing where it does not count them.", "folder")
	descUsed        = desc("pergola_disk_used_bytes", "Disk space of the hub's files, by kind: bundles, logs, results, work; counted every ten minutes while somebody looks.", "kind")
	descExpiry      = desc("pergola_certificate_expiry_timestamp_seconds", "When the certificate ends, in seconds since 1970.", "certificate")
	descReady       = desc("pergola_ready", "1 where the check of /readyz passes, else 0.", "check")
)

// Describe implements prometheus.Collector.
func (c *collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		descStoreUp, descJobs, descQueue, descOldest, descWaiting, descSites, descSite, descSiteSince, descBundles, descBundleBytes, descControllers, descLinks, descHandshakes,
		descFree, descSize, descInodes, descUsed, descExpiry, descReady,
	} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c *collector) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	h := c.h
	ready := make(chan monitor.Report, 1) // while the store is asked: each has a limit of its own
	go func() { ready <- h.watcher.Load().Ready(context.Background()) }()
	if s, err := c.stored.Get(context.Background()); err != nil { // it has a limit of its own
		gauge(descStoreUp, 0)
	} else {
		gauge(descStoreUp, 1)
		for _, st := range job.States() {
			gauge(descJobs, float64(s.jobs[st]), string(st))
		}
		gauge(descQueue, float64(s.jobs[job.Queued]))
		oldest := 0.
		if !s.oldest.IsZero() {
			oldest = max(0, time.Since(s.oldest).Seconds())
		}
		gauge(descOldest, oldest)
		gauge(descSites, float64(len(s.sites)))
		for _, n := range s.sites {
			since, up := h.away(n)
			gauge(descSite, flag(up), n)
			if since.IsZero() {
				since = h.opened
			}
			gauge(descSiteSince, time.Since(since).Seconds(), n)
		}
		gauge(descBundles, float64(s.bundles))
		gauge(descBundleBytes, float64(s.bundleBytes))
	}
	for why, n := range h.sched.waiting() {
		gauge(descWaiting, float64(n), why)
	}
	h.mu.Lock()
	controllers, links := len(h.jobs), 0
	for _, n := range h.links {
		links += n
	}
	h.mu.Unlock()
	gauge(descControllers, float64(controllers))
	gauge(descLinks, float64(links))
	if p := h.port.Load(); p != nil {
		gauge(descHandshakes, float64(len(p.busy)))
	}
	for folder, path := range map[string]string{"hub": h.dir, "cache": h.conf.Cache} {
		d, err := monitor.DiskOf(path)
		if err != nil {
			continue // as the checks tell
		}
		gauge(descFree, float64(d.Free), folder)
		gauge(descSize, float64(d.Size), folder)
		if d.Inodes > 0 {
			gauge(descInodes, float64(d.FreeInodes), folder)
		}
	}
	if used, ok := c.used.Peek(); ok {
		for kind, n := range used {
			gauge(descUsed, float64(n), kind)
		}
	}
	for name, t := range h.expiries() {
		gauge(descExpiry, float64(t.Unix()), name)
	}
	for _, r := range (<-ready).Checks {
		gauge(descReady, flag(r.OK), r.Name)
	}
}

func flag(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// expiries gives the ends of the hub's own certificates.
func (h *Hub) expiries() map[string]time.Time {
	out := map[string]time.Time{"authority": h.auth.NotAfter()}
	if c, err := h.ownCertificate(); err == nil && c.Leaf != nil {
		out["hub"] = c.Leaf.NotAfter
	}
	return out
}

// ownCertificate gives the certificate that the hub shows.
func (h *Hub) ownCertificate() (*tls.Certificate, error) {
	if h.tls.GetCertificate != nil {
		return h.tls.GetCertificate(&tls.ClientHelloInfo{ServerName: pki.HubName})
	}
	return &h.tls.Certificates[0], nil
}

// used sums up the hub's files.
func (h *Hub) used(ctx context.Context) (map[string]uint64, error) {
	out := map[string]uint64{"bundles": 0, "logs": 0, "results": 0, "work": 0}
	if err := monitor.Usage(ctx, h.dir+"/bundles", func(string) string { return "bundles" }, out); err != nil {
		return nil, err
	}
	err := monitor.Usage(ctx, h.dir+"/jobs", func(path string) string {
		parts := strings.SplitN(path, "/", 3)
		if len(parts) > 1 && (parts[1] == "logs" || parts[1] == "results") {
			return parts[1]
		}
		return "work"
	}, out)
	return out, err
}
