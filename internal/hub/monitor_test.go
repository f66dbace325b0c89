package hub

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/monitor"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/sock"
	"github.com/pergolafl/pergola/internal/store/pgtest"
	"github.com/pergolafl/pergola/internal/store/sqlite"
)

func (s *served) page(c *http.Client, url string) (int, string) {
	s.Helper()
	res, err := c.Get(url)
	if err != nil {
		s.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		s.Fatal(err)
	}
	return res.StatusCode, string(b)
}

func (s *served) browser(id pki.Identity) *http.Client {
	conf := pki.ClientTLS(s.cert(id), s.auth.Roots(), pki.HubName)
	t := &http.Transport{TLSClientConfig: conf, ForceAttemptHTTP2: true}
	s.Cleanup(t.CloseIdleConnections)
	return &http.Client{Transport: t}
}

// Each caller gets the pages that are meant for it, and no others.
func TestWhoMayWatch(t *testing.T) {
	s := serveAs(t, Config{Monitor: "127.0.0.1:0"})
	party := pki.Identity{Kind: pki.KindParty, Name: "a", Job: string(job.NewID(time.Now()))}
	for _, c := range []struct {
		id                              pki.Identity
		healthz, readyz, metrics, other int
	}{
		{user, 200, 200, 200, 404},
		{siteA, 200, 404, 404, 404},
		{stranger, 403, 403, 403, 404},
		{party, 403, 403, 403, 404},
	} {
		b := s.browser(c.id)
		for path, want := range map[string]int{"/healthz": c.healthz, "/readyz": c.readyz, "/metrics": c.metrics, "/status": c.other, "/debug/goroutines": c.other} {
			if code, body := s.page(b, "https://"+s.addr+path); code != want {
				t.Errorf("%s gets %d from %s, want %d: %s", c.id, code, path, want, body)
			}
		}
	}
	// At the socket in the hub's directory is everything, for its owner.
	path := filepath.Join(s.dir, MonitorSocket)
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("the socket is %v, %v", info, err)
	}
	own := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return sock.Dial(ctx, path) }}
	defer own.CloseIdleConnections()
	for _, p := range []string{"/healthz", "/readyz", "/metrics", "/status", "/debug/goroutines"} {
		if code, body := s.page(&http.Client{Transport: own}, "http://hub"+p); code != 200 || p == "/status" && !strings.Contains(body, `{"name":"a","connected":false}`) {
			t.Errorf("the owner gets %d from %s: %s", code, p, body)
		}
	}
	for addr, ok := range map[string]bool{"127.0.0.1:9464": true, "[::1]:9464": true, "localhost:9464": true, ":9464": false, "0.0.0.0:9464": false, "10.0.0.1:9464": false, "9464": false} {
		conf := Config{Monitor: addr}
		if err := conf.check(); (err == nil) != ok || !ok && problem.CodeOf(err) != problem.Usage {
			t.Errorf("monitor = %q: %v", addr, err)
		}
	}
	if err := (&Config{Monitor: ":9464", MonitorAnywhere: true}).check(); err != nil {
		t.Error(err)
	}
}

// gathered gives the values of all series, by name and labels.
func (s *served) gathered() map[string]float64 {
	s.Helper()
	fs, err := s.hub.watcher.Load().Collectors().Gather()
	if err != nil {
		s.Fatal(err)
	}
	out := map[string]float64{}
	for _, f := range fs {
		for _, m := range f.GetMetric() {
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, l.GetValue())
			}
			name := f.GetName()
			if len(labels) > 0 {
				name += "{" + strings.Join(labels, ",") + "}"
			}
			out[name] = m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	return out
}

func (s *served) measured(want map[string]float64) {
	s.Helper()
	got := s.gathered()
	for name, v := range want {
		if g, ok := got[name]; !ok || g != v {
			s.Errorf("%s is %v (there: %v), want %v", name, g, ok, v)
		}
	}
}

// What happens is measured; how many series there are does not depend on how much happens.
func TestMeasures(t *testing.T) {
	s := serve(t)
	s.measured(map[string]float64{
		"pergola_store_up": 1, "pergola_jobs{queued}": 0, "pergola_queue_length": 0, "pergola_queue_oldest_seconds": 0, "pergola_sites": 2, "pergola_site_connected{a}": 0, "pergola_site_connected{b}": 0,
		"pergola_ready{store}": 1, "pergola_ready{port}": 1, "pergola_ready{disk}": 1, "pergola_ready{certificate}": 1, "pergola_jobs_submitted_total": 0, "pergola_links": 0, "pergola_bundles": 0,
	})
	c := s.as(user)
	id, digest := s.submit()
	if _, err := c.Jobs.GetJob(t.Context(), &pb.GetJobRequest{Id: string(job.NewID(time.Now()))}); err == nil {
		t.Error("a job was found that is not there")
	}
	if _, err := c.Jobs.AbortJob(t.Context(), &pb.AbortJobRequest{Id: string(id)}); err != nil {
		t.Fatal(err)
	}
	s.ended(id)
	s.hub.watch(s.group(), s.hub.port.Load()) // what is asked of the store is fresh for a while; a new monitor has asked nothing yet
	s.measured(map[string]float64{
		"pergola_jobs_submitted_total": 1, "pergola_jobs_ended_total{aborted-by-user,aborted}": 1, "pergola_jobs{aborted}": 1, "pergola_bundles": 1,
		"pergola_api_calls_total{ok,JobService/SubmitJob}": 1, "pergola_api_seconds{JobService/SubmitJob}": 1, "pergola_api_calls_total{not-found,JobService/GetJob}": 1,
		"pergola_store_seconds{store_the_job}": 1,
	})
	if got := s.gathered()["pergola_schedule_seconds"]; got < 1 {
		t.Errorf("%v decisions were measured", got)
	}
	w, err := s.as(siteA).Sites.WatchDesired(t.Context(), &pb.WatchDesiredRequest{Protocol: 1})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Receive(); err != nil {
		t.Fatal(err)
	}
	s.measured(map[string]float64{"pergola_site_connected{a}": 1, "pergola_api_streams{SiteService/WatchDesired}": 1})
	_ = w.Close()

	// Links: a runner tells sums, and a site may tell nothing.
	more := func(party string, l job.Link) {
		e, err := job.NewEvent(id, party, job.KindLink, l, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := s.hub.db.Append(t.Context(), e, 0); err != nil {
			t.Fatal(err)
		}
	}
	more(job.HubParty, job.Link{Site: "a", Since: time.Now(), Cuts: 1})
	more(job.HubParty, job.Link{Site: "a", Cuts: 3, Resumes: 2, ResentBytes: 100, DownSeconds: 7})
	more(job.HubParty, job.Link{Site: "a", Cuts: 3, Resumes: 2, ResentBytes: 100, DownSeconds: 7})
	more("a", job.Link{Site: "a", Cuts: 1000})
	s.measured(map[string]float64{"pergola_link_outages_total": 1, "pergola_link_cuts_total": 3, "pergola_link_resumes_total": 2, "pergola_link_resent_bytes_total": 100, "pergola_link_down_seconds_total": 7})

	before := s.gathered()
	for i := range 5 {
		j, err := s.hub.db.CreateJob(t.Context(), job.Job{ID: job.NewID(time.Now()), Name: fmt.Sprint("n", i), Bundle: digest, Submitter: fmt.Sprint("u", i), Spec: job.Spec{Sites: []string{"b"}}.WithDefaults(), Created: time.Now()}, []string{"b"})
		if err != nil {
			t.Fatal(err)
		}
		// A site may name any code.
		if err := s.hub.db.MoveParty(t.Context(), j.ID, "b", job.PartyFailed, problem.New(problem.Code(fmt.Sprint("made-up-", i)), "", "x"), "", time.Now()); err != nil {
			t.Fatal(err)
		}
	}
	after := s.gathered()
	if after["pergola_jobs_submitted_total"] != 6 || after["pergola_parties_failed_total{other}"] != 5 {
		t.Errorf("of 5 jobs were counted %v, and %v failed parties", after["pergola_jobs_submitted_total"]-1, after["pergola_parties_failed_total{other}"])
	}
	for name := range after {
		if _, ok := before[name]; !ok && !strings.HasPrefix(name, "pergola_store_") && name != "pergola_parties_failed_total{other}" && !strings.HasPrefix(name, "pergola_jobs_ended_total{") {
			t.Errorf("5 jobs made the series %s", name)
		}
		if strings.Contains(name, "made-up") || strings.Contains(name, string(id)) {
			t.Errorf("a label without bound: %s", name)
		}
	}
}

// A store that hangs holds up neither scrapes nor /healthz, and is told.
func TestWatchingWhileTheStoreHangs(t *testing.T) {
	pg := pgtest.Start(t)
	s := serveAs(t, Config{Store: pg.Fresh(t)})
	b := s.browser(siteA) // a certificate of a user would have to be looked up
	own := func(page string) (int, string) {
		code, body, err := monitor.Ask(t.Context(), filepath.Join(s.dir, MonitorSocket), page)
		if err != nil {
			t.Fatal(err)
		}
		return code, string(body)
	}
	if code, body := own("/readyz"); code != 200 {
		t.Fatalf("%d %s", code, body)
	}
	s.page(b, "https://"+s.addr+"/healthz")
	s.hub.watch(s.group(), s.hub.port.Load()) // what the first one knows is fresh for a while
	pg.Freeze(t)
	defer pg.Thaw(t)
	if got := s.gathered(); got["pergola_store_up"] != 0 || got["pergola_ready{store}"] != 0 || got["pergola_ready{disk}"] != 1 {
		t.Errorf("store up %v, ready %v, disk %v", got["pergola_store_up"], got["pergola_ready{store}"], got["pergola_ready{disk}"])
	}
	if code, body := own("/healthz"); code != 200 {
		t.Errorf("a hub that waits for its store lives: %d %s", code, body)
	}
}

// ended waits for a job's end.
func (s *served) ended(id job.ID) {
	s.Helper()
	if err := s.hub.untilOver(s.Context(), id); err != nil {
		s.Fatal(err)
	}
}

func (s *served) group() *monitor.Group {
	g := monitor.NewGroup(s.Context())
	s.Cleanup(g.Wait)
	return g
}

// failing gives the checks that fail, with why.
func (s *served) failing() map[string]string {
	s.Helper()
	out := map[string]string{}
	for _, c := range s.hub.watch(s.group(), s.hub.port.Load()).Ready(s.Context()).Checks {
		if !c.OK {
			out[c.Name] = c.Message
		}
	}
	return out
}

// Each check of /readyz fails over its own fault, and only then.
func TestReady(t *testing.T) {
	s := serve(t)
	if f := s.failing(); len(f) > 0 {
		t.Fatalf("at first: %v", f)
	}

	p := s.hub.port.Load()
	for range maxHandshakes - 1 { // its accepting is under way and holds the last one
		p.busy <- struct{}{}
	}
	hold, err := net.Dial("tcp", s.addr) // takes that one
	if err != nil {
		t.Fatal(err)
	}
	f := s.failing()
	hold.Close()
	for range maxHandshakes - 1 {
		<-p.busy
	}
	if len(f) != 1 || f["port"] == "" {
		t.Errorf("with a port that takes nothing: %v", f)
	}

	if err := s.hub.db.Close(); err != nil {
		t.Fatal(err)
	}
	if f := s.failing(); len(f) != 1 || f["store"] == "" {
		t.Errorf("with a store that is away: %v", f)
	}
	if s.hub.db, err = openStore(t.Context(), s.dir, ""); err != nil {
		t.Fatal(err)
	}

	pair, err := s.auth.NewKeypair(pki.Identity{Kind: pki.KindHub, Name: pki.HubName}, nil, time.Nanosecond)
	if err != nil {
		t.Fatal(err)
	}
	old, err := pair.Certificate()
	if err != nil {
		t.Fatal(err)
	}
	good := s.hub.tls
	s.hub.tls = &tls.Config{Certificates: []tls.Certificate{old}, MinVersion: tls.VersionTLS13}
	f = s.failing()
	s.hub.tls = good
	if len(f) != 1 || !strings.Contains(f["certificate"], "certificate of the hub ended on") {
		t.Errorf("with a certificate that is over: %v", f)
	}

	s.hub.beat.Store(int64(time.Since(s.hub.opened) - beatLimit - time.Second))
	if err := s.hub.lives(t.Context()); err == nil || !strings.Contains(err.Error(), "has done nothing for 2m") {
		t.Errorf("with a loop that stands still: %v", err)
	}
	s.hub.beats()
	if err := s.hub.lives(t.Context()); err != nil {
		t.Error(err)
	}
	s.hub.mu.Lock()
	short, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	err = s.hub.lives(short)
	cancel()
	s.hub.mu.Unlock()
	if err == nil || !strings.Contains(err.Error(), "locked") {
		t.Errorf("with a lock that is not given back: %v", err)
	}
}

var documented = regexp.MustCompile("(?m)^\\| `(pergola_[a-z_]+)(?:\\{([a-z,]+)\\})?` \\|")

// docs/monitoring.md lists each metric with its labels, and none that there is not.
func TestMetricsOfTheManual(t *testing.T) {
	text, err := os.ReadFile("../../docs/monitoring.md")
	if err != nil {
		t.Fatal(err)
	}
	page := map[string]string{}
	for _, m := range documented.FindAllStringSubmatch(string(text), -1) {
		if _, twice := page[m[1]]; twice {
			t.Errorf("%s is on the page twice", m[1])
		}
		page[m[1]] = m[2]
	}
	have := map[string]string{"pergola_build_info": "process,version,goversion"}
	ch := make(chan *prometheus.Desc)
	go func() {
		defer close(ch)
		for _, c := range append(newMeasures().collectors(), &collector{}) {
			c.Describe(ch)
		}
	}()
	form := regexp.MustCompile(`fqName: "([^"]+)", help: "([^"]+)".*variableLabels: \{([^}]*)\}`)
	for d := range ch {
		m := form.FindStringSubmatch(d.String())
		if m == nil {
			t.Fatalf("%s", d)
		}
		have[m[1]] = m[3]
		if !strings.HasSuffix(m[2], ".") {
			t.Errorf("%s: its help is no sentence: %s", m[1], m[2])
		}
	}
	for _, name := range slices.Sorted(maps.Keys(have)) {
		if labels, ok := page[name]; !ok || labels != have[name] {
			t.Errorf("the page has %s{%s} (there: %v), want {%s}", name, labels, ok, have[name])
		}
		delete(page, name)
	}
	for name := range page {
		if !strings.HasPrefix(name, "pergola_agent_") {
			t.Errorf("the page has %s, which is not there", name)
		}
	}
}

// What a runner tells of its links counts once, also when it comes after its job's end, and nothing stays of jobs that are over.
func TestLinksOfJobsThatAreOver(t *testing.T) {
	db, err := sqlite.Open(t.Context(), filepath.Join(t.TempDir(), DatabaseFile))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	b := newBench(t, db)
	m := newMeasures()
	b.h.measures = m
	id := b.submit("ann", 1, "a")
	event := func(kind string, party string, body any) {
		e, err := job.NewEvent(id, party, kind, body, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		m.event(b.h, e)
	}
	event(job.KindLink, job.HubParty, job.Link{Site: "a", Cuts: 2})
	if err := b.h.stop(t.Context(), b.job(id), problem.New(problem.AbortedByUser, "", "enough")); err != nil {
		t.Fatal(err)
	}
	event(job.KindJobState, "", job.JobState{From: job.Queued, To: job.Aborted})
	event(job.KindLink, job.HubParty, job.Link{Site: "a", Cuts: 3})
	r := prometheus.NewRegistry()
	r.MustRegister(m.cuts)
	all, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	if got := all[0].GetMetric()[0].GetCounter().GetValue(); got != 3 {
		t.Errorf("%v cuts are counted, and there were 3", got)
	}
	var wg sync.WaitGroup
	b.h.attend(t.Context(), &wg, id)
	wg.Wait()
	if len(m.links) != 0 {
		t.Errorf("there is left %v", m.links)
	}
}
