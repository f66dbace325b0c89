package site

import (
	"context"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pergolafl/pergola/internal/api"
	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/api/pergola/v1/pergolav1connect"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/logs"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/pki/pkitest"
	"github.com/pergolafl/pergola/internal/problem"
)

// hubStub takes reports and log offsets, over connections that break as the test wants it.
type hubStub struct {
	pergolav1connect.UnimplementedSiteServiceHandler

	mu      sync.Mutex // guards the rest
	reports []*pb.ReportRequest
	offsets map[string]int64
	fail    []string // what happens to the next reports: the connection breaks "before" or "after" they are stored; "full"
}

func (h *hubStub) Report(_ context.Context, req *pb.ReportRequest) (*pb.ReportResponse, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.fail) > 0 && h.fail[0] == "full" {
		h.fail = h.fail[1:]
		return nil, problem.New(problem.DiskFull, "make room", "the hub has no space left")
	}
	h.reports = append(h.reports, req)
	return &pb.ReportResponse{}, nil
}

func (h *hubStub) GetLogOffsets(context.Context, *pb.GetLogOffsetsRequest) (*pb.GetLogOffsetsResponse, error) {
	return &pb.GetLogOffsetsResponse{Offsets: h.offsets}, nil
}

// next takes the next failure if it is of that kind.
func (h *hubStub) next(kind string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.fail) == 0 || h.fail[0] != kind {
		return false
	}
	h.fail = h.fail[1:]
	return true
}

func (h *hubStub) ServeHTTP(w http.ResponseWriter, r *http.Request, inner http.Handler) {
	if !strings.HasSuffix(r.URL.Path, "/Report") {
		inner.ServeHTTP(w, r)
		return
	}
	if h.next("before") {
		panic(http.ErrAbortHandler)
	}
	if h.next("after") {
		inner.ServeHTTP(lost{w}, r) // it is stored, and the answer is lost
		panic(http.ErrAbortHandler)
	}
	inner.ServeHTTP(w, r)
}

// lost is a writer whose answers go nowhere.
type lost struct{ http.ResponseWriter }

func (lost) Write(b []byte) (int, error) { return len(b), nil }
func (lost) WriteHeader(int)             {}
func (lost) Flush()                      {}

// dialStub serves h and gives a part of an agent that calls it.
func dialStub(t *testing.T, h *hubStub, attempt int32) *part {
	t.Helper()
	auth := pkitest.Authority(t, "here")
	log := slog.New(slog.DiscardHandler)
	srv := api.NewServer(log)
	pergolav1connect.RegisterSiteServiceHandler(srv, h)
	mux := http.NewServeMux()
	api.Mount(mux, srv)
	ts := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { h.ServeHTTP(w, r, mux) }))
	ts.TLS = pki.ServerTLS(pkitest.Cert(t, auth, pki.Identity{Kind: pki.KindHub, Name: pki.HubName}), auth.Roots(), "http/1.1")
	ts.Config.ErrorLog = slog.NewLogLogger(log.Handler(), slog.LevelDebug)
	ts.StartTLS()
	t.Cleanup(ts.Close)
	a := &Agent{dir: t.TempDir(), log: log, parts: map[job.ID]*part{}, last: map[job.ID]*part{}, taken: map[job.ID][]string{}, freed: make(chan struct{})}
	a.conf.Name = "a"
	a.client = api.NewClient(ts.Listener.Addr().String(), pki.ClientTLS(pkitest.Cert(t, auth, pki.Identity{Kind: pki.KindSite, Name: "a"}), auth.Roots(), pki.HubName))
	t.Cleanup(a.client.Close)
	return newPart(a, job.NewID(time.Now()), &pb.DesiredParty{Attempt: attempt})
}

// A party's last word is said until the hub has stored it: a request that is lost, an answer that is lost, and a hub without
// space are no reason to keep silent.
func TestLastWordIsNotLost(t *testing.T) {
	h := &hubStub{fail: []string{"before", "full", "after", "before"}}
	p := dialStub(t, h, 2)
	p.report(t.Context(), p.entry(job.PartyStateChange{To: job.PartyDone}))
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.fail) != 0 || len(h.reports) != 2 {
		t.Fatalf("%d reports were stored and %q did not happen; want the one whose answer was lost, and its repetition", len(h.reports), h.fail)
	}
	for _, r := range h.reports {
		e, err := api.FromEvent(r.GetEntries()[0].GetEvent())
		if err != nil {
			t.Fatal(err)
		}
		var c job.PartyStateChange
		if err := e.Decode(&c); err != nil || c.To != job.PartyDone || r.GetAttempt() != 2 || r.GetJobId() != string(p.id) {
			t.Errorf("the hub heard %+v of attempt %d, %v", c, r.GetAttempt(), err)
		}
	}
}

// Once the hub wants nothing more of a part, nothing is said for ever.
func TestForgottenPartFallsSilent(t *testing.T) {
	h := &hubStub{fail: slices.Repeat([]string{"before"}, 1000)}
	p := dialStub(t, h, 0)
	done := make(chan struct{})
	go func() {
		defer close(done)
		p.report(t.Context(), p.entry(job.PartyStateChange{To: job.PartyDone}))
	}()
	p.forget()
	<-done
}

// The logs of a party that begins anew on a machine that has none of the old ones go on where the hub's copies end.
func TestLogsGoOn(t *testing.T) {
	h := &hubStub{offsets: map[string]int64{"client_app_log.txt": 1 << 20, "environment_log.txt": 3}}
	p := dialStub(t, h, 1)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "environment_log.txt"), []byte("kept here"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := p.goOn(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]int64{"client_app_log.txt": 1 << 20, "environment_log.txt": 9} {
		if n, err := logs.Size(filepath.Join(dir, name)); err != nil || n != want {
			t.Errorf("%s: %d, %v; want %d bytes", name, n, err, want)
		}
	}
	h.offsets = map[string]int64{"../x.txt": 1}
	if err := p.goOn(t.Context(), dir); err == nil {
		t.Error("a log outside of the folder was made")
	}
}

// A part that has not begun yet, because its bundle takes long, begins with the settings that the job has by then.
func TestSettingsBeforeTheBeginning(t *testing.T) {
	p := dialStub(t, &hubStub{}, 0)
	a := p.agent
	a.conf.Env = map[string]string{"DATA": "/data"}
	want := func(engine string) *pb.DesiredParty {
		return &pb.DesiredParty{JobId: string(p.id), Desired: pb.Desired_DESIRED_UP, SpecJson: `{"engine":"` + engine + `"}`}
	}
	p.set(want(job.EngineNative))
	a.parts[p.id], a.swept = p, true
	var wg sync.WaitGroup
	for _, engine := range []string{job.EngineNative, job.EngineFlower} {
		a.reconcile(t.Context(), &wg, []*pb.DesiredParty{want(engine)})
		spec, err := p.settings()
		if err != nil || spec.Engine != engine || spec.Site.Named["a"].Env["DATA"] != "/data" || a.parts[p.id] != p {
			t.Errorf("with engine %s: %+v, %v", engine, spec, err)
		}
	}
	wg.Wait()
}
