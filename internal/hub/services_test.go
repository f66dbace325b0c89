package hub

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/pelletier/go-toml/v2"
	"go.uber.org/goleak"

	"github.com/pergolafl/pergola/internal/api"
	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/bundle"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/link"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/pki/pkitest"
	"github.com/pergolafl/pergola/internal/problem"
)

func TestMain(m *testing.M) {
	// A hub in a test starts this binary as its runner: it must not run the tests again, which start more.
	if len(os.Args) > 1 && os.Args[1] == "runner" {
		fmt.Fprintln(os.Stderr, "there are no runners in this test")
		os.Exit(1)
	}
	goleak.VerifyTestMain(m)
}

// served is a hub that listens, with an authority to make callers of.
type served struct {
	*testing.T
	hub  *Hub
	auth *pki.Authority
	addr string
	dir  string
}

func serve(t *testing.T) *served {
	t.Helper()
	return serveAs(t, Config{})
}

// serveAs is serve with more in hub.toml.
func serveAs(t *testing.T, more Config) *served {
	t.Helper()
	return serveWith(t, more, func(*Hub) {})
}

// serveWith is serveAs with something to be done before the hub runs.
func serveWith(t *testing.T, more Config, before func(*Hub)) *served {
	t.Helper()
	s := &served{T: t, dir: t.TempDir()}
	s.auth = pkitest.Authority(t, "test")
	if err := s.auth.Save(s.dir); err != nil {
		t.Fatal(err)
	}
	pair, err := s.auth.NewKeypair(pki.Identity{Kind: pki.KindHub, Name: pki.HubName}, nil, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if err := pki.SaveKeypair(s.dir, "hub", pair); err != nil {
		t.Fatal(err)
	}
	more.Listen, more.Cache = "127.0.0.1:0", t.TempDir()
	if len(more.Sites) == 0 {
		more.Sites = []string{"a", "b"}
	}
	conf, err := toml.Marshal(more)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(s.dir, ConfigFile), conf, 0o600); err != nil {
		t.Fatal(err)
	}
	if s.hub, err = Open(t.Context(), s.dir, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	before(s.hub)
	ctx, cancel := context.WithCancel(context.Background())
	ready := make(chan net.Addr, 1)
	done := make(chan error, 1)
	go func() { done <- s.hub.Run(ctx, func(a net.Addr) { ready <- a }) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("the hub ended with %v", err)
		}
	})
	select {
	case a := <-ready:
		s.addr = a.String()
	case err := <-done:
		done <- nil
		t.Fatal(err)
	}
	return s
}

func (s *served) cert(id pki.Identity) tls.Certificate {
	s.Helper()
	return pkitest.Cert(s, s.auth, id)
}

func (s *served) as(id pki.Identity) *api.Client {
	s.Helper()
	c := api.NewClient(s.addr, pki.ClientTLS(s.cert(id), s.auth.Roots(), pki.HubName))
	s.Cleanup(c.Close)
	return c
}

var (
	user     = pki.Identity{Kind: pki.KindUser, Name: "ann"}
	siteA    = pki.Identity{Kind: pki.KindSite, Name: "a"}
	siteB    = pki.Identity{Kind: pki.KindSite, Name: "b"}
	stranger = pki.Identity{Kind: pki.KindSite, Name: "c"} // has a certificate, and is not enrolled
)

// upload brings a bundle of one file to the hub, and gives its digest.
func (s *served) upload(c *api.Client) string {
	s.Helper()
	app := s.TempDir()
	if err := os.WriteFile(filepath.Join(app, "app.py"), []byte("app = 1\n"), 0o600); err != nil {
		s.Fatal(err)
	}
	b, err := bundle.Build(app, bundle.Input{App: bundle.Meta{Name: "app", Version: "1"}, Lock: []byte("x"), Job: []byte("{}")})
	if err != nil {
		s.Fatal(err)
	}
	var packed bytes.Buffer
	if err := b.Write(&packed); err != nil {
		s.Fatal(err)
	}
	if err := send(s.Context(), c, b.Digest, packed.Bytes()); err != nil {
		s.Fatal(err)
	}
	return b.Digest
}

func send(ctx context.Context, c *api.Client, digest string, data []byte) error {
	half := len(data) / 2
	at := int64(0)
	for _, part := range [][]byte{data[:half], data[half:]} {
		res, err := c.Bundles.UploadBundle(ctx, &pb.UploadBundleRequest{Digest: digest, Offset: at, Data: part})
		if err != nil {
			return err
		}
		at = res.GetOffset()
	}
	_, err := c.Bundles.FinishUpload(ctx, &pb.FinishUploadRequest{Digest: digest})
	return err
}

// submit makes a job of site a alone.
func (s *served) submit() (job.ID, string) {
	s.Helper()
	c := s.as(user)
	digest := s.upload(c)
	res, err := c.Jobs.SubmitJob(s.Context(), &pb.SubmitJobRequest{Name: "app", BundleDigest: digest, SpecJson: `{"sites":["a"]}`})
	if err != nil {
		s.Fatal(err)
	}
	return job.ID(res.GetJob().GetId()), digest
}

// first gives what a stream's first message brings.
func first[S interface {
	Receive() (M, error)
	Close() error
}, M any](s S, err error) error {
	if err != nil {
		return err
	}
	_, err = s.Receive()
	if e := s.Close(); err == nil && e != nil && !errors.Is(e, context.Canceled) {
		err = e
	}
	return err
}

// Each method, and who may call it.
func TestWhoMayCall(t *testing.T) {
	s := serve(t)
	id, digest := s.submit()
	key, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	csr, err := pki.NewRequest(key, pki.Identity{Kind: pki.KindParty, Name: "a", Job: string(id)})
	if err != nil {
		t.Fatal(err)
	}
	callers := map[string]*api.Client{
		"user": s.as(user), "a": s.as(siteA), "b": s.as(siteB), "stranger": s.as(stranger),
		"party": s.as(pki.Identity{Kind: pki.KindParty, Name: "a", Job: string(id)}),
		"hub":   s.as(pki.Identity{Kind: pki.KindHub, Name: pki.HubName}),
	}
	jid := string(id)
	for _, m := range []struct {
		name string
		may  []string
		call func(ctx context.Context, c *api.Client) error
	}{
		{"SubmitJob", []string{"user"}, func(ctx context.Context, c *api.Client) error {
			_, err := c.Jobs.SubmitJob(ctx, &pb.SubmitJobRequest{Name: "app", BundleDigest: digest, SpecJson: `{"sites":["a"]}`})
			return err
		}},
		{"GetJob", []string{"user"}, func(ctx context.Context, c *api.Client) error {
			_, err := c.Jobs.GetJob(ctx, &pb.GetJobRequest{Id: jid})
			return err
		}},
		{"ListJobs", []string{"user"}, func(ctx context.Context, c *api.Client) error {
			_, err := c.Jobs.ListJobs(ctx, &pb.ListJobsRequest{})
			return err
		}},
		{"WatchJob", []string{"user"}, func(ctx context.Context, c *api.Client) error {
			return first(c.Jobs.WatchJob(ctx, &pb.WatchJobRequest{Id: jid}))
		}},
		{"ListSites", []string{"user"}, func(ctx context.Context, c *api.Client) error {
			_, err := c.Jobs.ListSites(ctx, &pb.ListSitesRequest{})
			return err
		}},
		// From here on site a gets no job, so that nobody's part comes alive when it is connected.
		{"DrainSite", []string{"user"}, func(ctx context.Context, c *api.Client) error {
			_, err := c.Jobs.DrainSite(ctx, &pb.DrainSiteRequest{Name: "a", Drained: true})
			return err
		}},
		{"HasBundle", []string{"user", "a"}, func(ctx context.Context, c *api.Client) error {
			_, err := c.Bundles.HasBundle(ctx, &pb.HasBundleRequest{Digest: digest})
			return err
		}},
		{"UploadBundle", []string{"user"}, func(ctx context.Context, c *api.Client) error {
			err := send(ctx, c, "sha256:"+strings.Repeat("0", 64), []byte("no bundle"))
			if problem.CodeOf(err) == problem.BundleInvalid {
				return nil // it was let in, and looked at
			}
			return err
		}},
		{"FindUpload", []string{"user"}, func(ctx context.Context, c *api.Client) error {
			_, err := c.Bundles.FindUpload(ctx, &pb.FindUploadRequest{Digest: digest})
			return err
		}},
		{"FinishUpload", []string{"user"}, func(ctx context.Context, c *api.Client) error {
			_, err := c.Bundles.FinishUpload(ctx, &pb.FinishUploadRequest{Digest: digest})
			return err
		}},
		{"DownloadBundle", []string{"user", "a"}, func(ctx context.Context, c *api.Client) error {
			return first(c.Bundles.DownloadBundle(ctx, &pb.DownloadBundleRequest{Digest: digest}))
		}},
		{"WatchDesired", []string{"a", "b"}, func(ctx context.Context, c *api.Client) error {
			// A version that nobody speaks: who may call gets that far.
			err := first(c.Sites.WatchDesired(ctx, &pb.WatchDesiredRequest{Protocol: 99}))
			if problem.CodeOf(err) == problem.Version {
				return nil
			}
			return err
		}},
		{"Report", []string{"a"}, func(ctx context.Context, c *api.Client) error {
			_, err := c.Sites.Report(ctx, &pb.ReportRequest{JobId: jid})
			return err
		}},
		{"GetLogOffsets", []string{"a"}, func(ctx context.Context, c *api.Client) error {
			_, err := c.Sites.GetLogOffsets(ctx, &pb.GetLogOffsetsRequest{JobId: jid})
			return err
		}},
		{"PushLogs", []string{"a"}, func(ctx context.Context, c *api.Client) error {
			_, err := c.Sites.PushLogs(ctx, &pb.PushLogsRequest{Chunks: []*pb.LogChunk{{JobId: jid, File: "client_app_log.txt"}}})
			return err
		}},
		{"IssueCertificate", nil, func(ctx context.Context, c *api.Client) error { // nobody's part is alive yet
			_, err := c.Sites.IssueCertificate(ctx, &pb.IssueCertificateRequest{JobId: jid, CsrPem: string(csr)})
			return err
		}},
		{"AbortJob", []string{"user"}, func(ctx context.Context, c *api.Client) error {
			_, err := c.Jobs.AbortJob(ctx, &pb.AbortJobRequest{Id: jid})
			return err
		}},
	} {
		// The one who may goes last: AbortJob changes what the others see.
		names := []string{"hub", "party", "stranger", "b", "a", "user"}
		for _, who := range names {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			err := m.call(ctx, callers[who])
			cancel()
			if slices.Contains(m.may, who) {
				if err != nil {
					t.Errorf("%s by %s: %v", m.name, who, err)
				}
			} else if problem.CodeOf(err) != problem.Denied {
				t.Errorf("%s by %s: %v, want it denied", m.name, who, err)
			}
		}
	}
}

// What a site's log has lost there before it could be copied is told each time, and once that it is because of the quota.
func TestLostLinesAreTold(t *testing.T) {
	s := serve(t)
	id, _ := s.submit()
	for _, at := range []int64{1000, 2000} {
		if _, err := s.as(siteA).Sites.PushLogs(t.Context(), &pb.PushLogsRequest{Chunks: []*pb.LogChunk{
			{JobId: string(id), File: "client_app_log.txt", Offset: at, Skipped: at, Data: []byte("line\n")},
		}}); err != nil {
			t.Fatal(err)
		}
	}
	es, err := s.hub.db.Events(t.Context(), id, 0, 100)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range es {
		var text job.Text
		if e.Kind == job.KindWarning && e.Decode(&text) == nil {
			got = append(got, e.Party+": "+text.Message)
		}
	}
	want := []string{
		"a: the logs of a have reached their quota of 1.0 GiB: from here on the middle of client_app_log.txt is left out; its beginning and its newest lines are kept",
		"a: 1000 bytes (1000 B) of client_app_log.txt of a were dropped there before they could be copied",
		"a: 995 bytes (995 B) of client_app_log.txt of a were dropped there before they could be copied",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// A site's word counts for itself alone, and never for the job.
func TestReports(t *testing.T) {
	s := serve(t)
	id, _ := s.submit()
	c := s.as(siteA)
	report := func(seq int64, e job.Event) error {
		ev, err := api.Event(e)
		if err != nil {
			t.Fatal(err)
		}
		_, err = c.Sites.Report(t.Context(), &pb.ReportRequest{JobId: string(id), Entries: []*pb.JournalEntry{{Seq: seq, Event: ev}}})
		return err
	}
	event := func(party, kind string, body any) job.Event {
		e, err := job.NewEvent("01arz3ndektsv4rrffq69g5fav", party, kind, body, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		return e
	}
	if err := report(1, event(job.HubParty, job.KindNote, job.Text{Message: "the run is finished"})); err != nil {
		t.Fatal(err)
	}
	if err := report(1, event(job.HubParty, job.KindNote, job.Text{Message: "again"})); err != nil {
		t.Fatal(err)
	}
	if err := report(2, event("", job.KindJobState, job.JobState{To: job.Succeeded})); problem.CodeOf(err) != problem.Denied {
		t.Errorf("a site moved the job: %v", err)
	}
	if err := report(3, event(job.HubParty, job.KindPartyState, job.PartyStateChange{To: job.PartyFailed, Cause: appError()})); err != nil {
		t.Fatal(err)
	}
	ps, err := s.hub.db.Parties(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range ps {
		if want := map[string]job.PartyState{"hub": job.PartyAbsent, "a": job.PartyFailed}[p.Name]; p.State != want {
			t.Errorf("party %s is %s, want %s", p.Name, p.State, want)
		}
	}
	es, err := s.hub.db.Events(t.Context(), id, 0, 100)
	if err != nil {
		t.Fatal(err)
	}
	notes := 0
	for _, e := range es {
		if e.Kind == job.KindNote {
			notes++
			if e.Party != "a" || e.Job != id {
				t.Errorf("a's note is kept as one of %q in job %s", e.Party, e.Job)
			}
		}
	}
	if notes != 1 {
		t.Errorf("a note delivered twice is kept %d times", notes)
	}
	for file, ok := range map[string]bool{"client_app_log.txt": true, "../x.txt": false, "/etc/x.txt": false, "": false, ".hidden": false} {
		_, err := c.Sites.PushLogs(t.Context(), &pb.PushLogsRequest{Chunks: []*pb.LogChunk{{JobId: string(id), Party: "hub", File: file, Data: []byte("x\n")}}})
		if (err == nil) != ok || !ok && problem.CodeOf(err) != problem.Usage {
			t.Errorf("a log called %q: %v", file, err)
		}
	}
	if _, err := os.Stat(filepath.Join(s.hub.logDir(id, "a"), "client_app_log.txt")); err != nil {
		t.Errorf("the site's log is not in its own folder: %v", err)
	}
}

// A site counts as connected while it watches, and a submission is checked.
func TestSitesAndSubmissions(t *testing.T) {
	s := serve(t)
	u, c := s.as(user), s.as(siteB)
	digest := s.upload(u)
	connected := func() string {
		res, err := u.Jobs.ListSites(t.Context(), &pb.ListSitesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, x := range res.GetSites() {
			if x.GetConnected() {
				out = append(out, x.GetName())
			}
		}
		return strings.Join(out, ",")
	}
	if got := connected(); got != "" {
		t.Errorf("%q are connected", got)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	changed, stop := s.hub.changed.Subscribe("")
	defer stop()
	w, err := c.Sites.WatchDesired(ctx, &pb.WatchDesiredRequest{Protocol: api.Protocol})
	if err != nil {
		t.Fatal(err)
	}
	if m, err := w.Receive(); err != nil || len(m.GetParties()) != 0 {
		t.Fatalf("%v %v", m, err)
	}
	if got := connected(); got != "b" {
		t.Errorf("%q are connected, want b", got)
	}
	for _, c := range []struct {
		name string
		req  *pb.SubmitJobRequest
		code problem.Code
		say  string
	}{
		{"a name that is no label", &pb.SubmitJobRequest{Name: "My App", BundleDigest: digest, SpecJson: "{}"}, problem.Usage, "lower-case"},
		{"a bundle that is not here", &pb.SubmitJobRequest{Name: "app", BundleDigest: "sha256:" + strings.Repeat("1", 64), SpecJson: "{}"}, problem.NotFound, ""},
		{"a digest that is none", &pb.SubmitJobRequest{Name: "app", BundleDigest: "../x", SpecJson: "{}"}, problem.Usage, "digest"},
		{"an unknown key", &pb.SubmitJobRequest{Name: "app", BundleDigest: digest, SpecJson: `{"dedline":"1h"}`}, problem.Usage, "dedline"},
		{"an unknown site", &pb.SubmitJobRequest{Name: "app", BundleDigest: digest, SpecJson: `{"sites":["c"]}`}, problem.NotFound, `no site is named "c"`},
		{"more sites needed than there are", &pb.SubmitJobRequest{Name: "app", BundleDigest: digest, SpecJson: `{"sites":["a"],"min-sites":2}`}, problem.Usage, ""},
	} {
		_, err := u.Jobs.SubmitJob(t.Context(), c.req)
		if problem.CodeOf(err) != c.code || !strings.Contains(err.Error(), c.say) {
			t.Errorf("%s: %v, want %s with %q", c.name, err, c.code, c.say)
		}
	}
	one, err := u.Jobs.SubmitJob(t.Context(), &pb.SubmitJobRequest{Name: "app", Key: "k", BundleDigest: digest, SpecJson: "{}"})
	if err != nil {
		t.Fatal(err)
	}
	two, err := u.Jobs.SubmitJob(t.Context(), &pb.SubmitJobRequest{Name: "app", Key: "k", BundleDigest: digest, SpecJson: "{}"})
	if err != nil || one.GetJob().GetId() != two.GetJob().GetId() {
		t.Errorf("the same submission twice: %v, %v, %v", one, two, err)
	}
	// Both sites are wanted where none is named, and the reason says who is missing.
	id := one.GetJob().GetId()
	watch, err := u.Jobs.WatchJob(t.Context(), &pb.WatchJobRequest{Id: id})
	if err != nil {
		t.Fatal(err)
	}
	wake, unwatch := s.hub.db.Subscribe(job.ID(id))
	defer unwatch()
	for {
		g, err := u.Jobs.GetJob(t.Context(), &pb.GetJobRequest{Id: id})
		if err != nil {
			t.Fatal(err)
		}
		if g.GetJob().GetReason() == "place 1 of 1: waiting for a to connect" {
			break
		}
		select {
		case <-wake:
		case <-time.After(20 * time.Second):
			t.Fatalf("the job is %v", g)
		}
	}
	if _, err := u.Jobs.AbortJob(t.Context(), &pb.AbortJobRequest{Id: id}); err != nil {
		t.Fatal(err)
	}
	var last *pb.Event
	for {
		m, err := watch.Receive()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		last = m.GetEvent()
	}
	var end job.JobState
	if e, err := api.FromEvent(last); err != nil || e.Decode(&end) != nil || end.To != job.Aborted || end.Cause == nil {
		t.Errorf("the last event is %v, want the end", last)
	}
	cancel()
	for connected() != "" {
		select {
		case <-changed:
		case <-time.After(20 * time.Second):
			t.Fatal("b still counts as connected")
		}
	}
	_ = w.Close()
}

// What is submitted again has the engine that was asked for, not the one that a job before had to make do with.
func TestResubmittedEngine(t *testing.T) {
	s := serve(t)
	c := s.as(user)
	digest := s.upload(c)
	for _, asked := range []string{job.EngineAuto, job.EngineFlower} {
		spec := job.Spec{Sites: []string{"a"}, Engine: asked, FlwrVersion: "1.30.0"}
		if err := spec.ChooseEngine(spec.FlwrVersion); err != nil {
			t.Fatal(err)
		}
		b, err := json.Marshal(spec)
		if err != nil {
			t.Fatal(err)
		}
		res, err := c.Jobs.SubmitJob(t.Context(), &pb.SubmitJobRequest{Name: "app", BundleDigest: digest, SpecJson: string(b)})
		if err != nil {
			t.Fatal(err)
		}
		id := job.ID(res.GetJob().GetId())
		if err := s.hub.db.SetEngine(t.Context(), id, job.EngineChoice{Engine: job.EngineFlower, Why: "not here"}, time.Now()); err != nil {
			t.Fatal(err)
		}
		again, err := c.Jobs.ResubmitJob(t.Context(), &pb.ResubmitJobRequest{Id: string(id)})
		if err != nil {
			t.Fatal(err)
		}
		j, err := s.hub.db.Job(t.Context(), job.ID(again.GetJob().GetId()))
		if err != nil {
			t.Fatal(err)
		}
		if j.Spec.Engine != spec.Engine || j.Spec.EngineAuto != spec.EngineAuto || j.Spec.EngineWhy != spec.EngineWhy {
			t.Errorf("asked for %s: it has %s (%v, %q), want %s (%v, %q)", asked, j.Spec.Engine, j.Spec.EngineAuto, j.Spec.EngineWhy, spec.Engine, spec.EngineAuto, spec.EngineWhy)
		}
	}
}

// A site that was taken out of hub.toml reads no bundle any more, though it has a part in a job of it.
func TestBundlesAndAFormerSite(t *testing.T) {
	digest := "sha256:" + strings.Repeat("0", 64)
	s := serveWith(t, Config{Sites: []string{"b"}}, func(h *Hub) {
		now := time.Now()
		if _, err := h.db.CreateJob(t.Context(), job.Job{ID: job.NewID(now), Name: "app", Bundle: digest, Spec: job.Spec{Sites: []string{"a", "b"}, MinSites: 1}.WithDefaults(), Created: now}, []string{"a", "b"}); err != nil {
			t.Fatal(err)
		}
	})
	for id, want := range map[pki.Identity]problem.Code{siteA: problem.Denied, siteB: ""} {
		if _, err := s.as(id).Bundles.HasBundle(t.Context(), &pb.HasBundleRequest{Digest: digest}); problem.CodeOf(err) != want {
			t.Errorf("%s: %v, want %q", id, err, want)
		}
	}
	if err := first(s.as(siteA).Bundles.DownloadBundle(t.Context(), &pb.DownloadBundleRequest{Digest: digest})); problem.CodeOf(err) != problem.Denied {
		t.Errorf("it reads the bundle: %v", err)
	}
}

// Links are for sites with a living part, and others are hung up on without a word.
func TestLinksAreRefused(t *testing.T) {
	s := serve(t)
	id, _ := s.submit()
	for name, who := range map[string]pki.Identity{
		"a user": user, "a site": siteA, "the hub": {Kind: pki.KindHub, Name: pki.HubName},
		"a part that is not alive": {Kind: pki.KindParty, Name: "a", Job: string(id)},
		"a site without a part":    {Kind: pki.KindParty, Name: "b", Job: string(id)},
		"the hub's own part":       {Kind: pki.KindParty, Name: "hub", Job: string(id)},
		"a job that is not there":  {Kind: pki.KindParty, Name: "a", Job: "01arz3ndektsv4rrffq69g5fav"},
	} {
		d := tls.Dialer{Config: pki.ClientTLS(s.cert(who), s.auth.Roots(), pki.HubName, link.ALPN)}
		c, err := d.DialContext(t.Context(), "tcp", s.addr)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if n, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) || n != 0 {
			t.Errorf("%s: read %d, %v; want the end", name, n, err)
		}
		c.Close()
	}
}

func TestConfig(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{"listen = \"x\"\nsits = [\"a\"]\n", "sits"},
		{"listen = \n", "hub.toml:1"},
		{"sites = [\"A\"]\n", "lower-case"},
		{"sites = [\"hub\"]\n", "hub"},
		{"sites = [\"a\", \"a\"]\n", "twice"},
		{"store = \"hub.db\"\n", "no address of a Postgres database"},
		{"certificate-lifetime = \"59m\"\n", "between 1h and 730d"},
		{"certificate-lifetime = \"0\"\n", "between 1h and 730d"},
		{"certificate-lifetime = \"731d\"\n", "between 1h and 730d"},
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, ConfigFile), []byte(c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := Open(t.Context(), dir, slog.New(slog.DiscardHandler))
		if problem.CodeOf(err) != problem.Usage || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q: %v, want %q", c.text, err, c.want)
		}
	}
	if _, err := Open(t.Context(), t.TempDir(), slog.New(slog.DiscardHandler)); problem.CodeOf(err) != problem.Usage {
		t.Errorf("no configuration: %v", err)
	}
}

// A spec survives the way through the store's and the wire's JSON.
func TestSpecSurvives(t *testing.T) {
	in := job.Spec{Sites: []string{"a"}, Deadline: job.Duration(time.Hour), RunConfig: []string{`x="1"`}}.WithDefaults()
	b, err := json.Marshal(in)
	if err != nil {
		t.Fatal(err)
	}
	var out job.Spec
	if err := json.Unmarshal(b, &out); err != nil {
		t.Fatal(err)
	}
	if b2, err := json.Marshal(out); err != nil || !bytes.Equal(b, b2) {
		t.Errorf("%s became %s (%v)", b, b2, err)
	}
}
