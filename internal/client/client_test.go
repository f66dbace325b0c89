package client

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pergolafl/pergola/internal/api"
	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/api/pergola/v1/pergolav1connect"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/pki/pkitest"
	"github.com/pergolafl/pergola/internal/problem"
)

// Contexts are kept, chosen and refused.
func TestContexts(t *testing.T) {
	home := t.TempDir()
	t.Setenv("XDG_CONFIG_HOME", home)
	t.Setenv(Environment, "")
	if _, err := Load(""); problem.CodeOf(err) != problem.Usage || !strings.Contains(err.Error(), "no hub is known") {
		t.Errorf("without any: %v", err)
	}
	auth := pkitest.Authority(t, "test")
	k := pkitest.Keypair(t, auth, pki.Identity{Kind: pki.KindUser, Name: "anna"})
	for _, n := range []string{"clinic", "lab"} {
		if err := Save(Context{Name: n, Hubs: []string{n + ".example.org:8443"}, User: "anna"}, k); err != nil {
			t.Fatal(err)
		}
	}
	if err := Save(Context{Name: "../x", Hubs: []string{"x:1"}}, k); problem.CodeOf(err) != problem.Usage {
		t.Errorf("a name that leaves the folder: %v", err)
	}
	if n, err := Current(); n != "clinic" || err != nil {
		t.Errorf("the first one is in use: %q, %v", n, err)
	}
	if err := Use("lab"); err != nil {
		t.Error(err)
	}
	if c, err := Load(""); c.Name != "lab" || c.User != "anna" || !slices.Equal(c.Hubs, []string{"lab.example.org:8443"}) || err != nil {
		t.Errorf("the chosen one: %+v, %v", c, err)
	}
	t.Setenv(Environment, "clinic")
	if c, err := Load(""); c.Name != "clinic" || err != nil {
		t.Errorf("the environment's: %+v, %v", c, err)
	}
	if _, err := Load("labb"); problem.CodeOf(err) != problem.Usage || !strings.Contains(err.Error(), `did you mean "lab"?`) {
		t.Errorf("one that does not exist: %v", err)
	}
	if _, _, err := Open("lab"); err != nil {
		t.Error(err)
	}
	info, err := os.Stat(filepath.Join(home, "pergola", "contexts", "lab", "user.key"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the key: %v, %v", info, err)
	}
}

// A hub whose streams break after a few messages, and which repeats some bytes when it is asked again.
type brittle struct {
	pergolav1connect.JobServiceHandler
	calls atomic.Int64
}

const text = "one\ntwo\nthree\nfour\nfive\n"

func (b *brittle) WatchJob(_ context.Context, req *pb.WatchJobRequest, out pergolav1connect.JobServiceWatchJobServerStream) error {
	b.calls.Add(1)
	for n := req.GetAfter() + 1; n <= 7; n++ {
		if n > req.GetAfter()+2 {
			return problem.New(problem.Unavailable, "", "the hub ends")
		}
		var e job.Event
		var err error
		if n < 7 {
			e, err = job.NewEvent("01", "", job.KindNote, job.Text{Message: fmt.Sprint(n)}, time.Now())
		} else {
			e, err = job.NewEvent("01", "", job.KindJobState, job.JobState{From: job.Stopping, To: job.Succeeded}, time.Now())
		}
		if err != nil {
			return err
		}
		e.Seq = n
		p, err := api.Event(e)
		if err != nil {
			return err
		}
		if err := out.Send(&pb.WatchJobResponse{Event: p}); err != nil {
			return err
		}
	}
	return nil
}

func (b *brittle) TailLogs(_ context.Context, req *pb.TailLogsRequest, out pergolav1connect.JobServiceTailLogsServerStream) error {
	b.calls.Add(1)
	at := max(0, req.GetOffsets()["hub/a.txt"]-3) // a hub that sends some bytes again
	end := min(at+8, int64(len(text)))
	if err := out.Send(&pb.TailLogsResponse{Chunk: &pb.LogChunk{Party: "hub", File: "a.txt", Offset: at, Data: []byte(text[at:end])}}); err != nil {
		return err
	}
	if end < int64(len(text)) {
		return problem.New(problem.Unavailable, "", "the hub ends")
	}
	return nil
}

func serve(t *testing.T, h pergolav1connect.JobServiceHandler) *api.Client {
	t.Helper()
	auth := pkitest.Authority(t, "test")
	pair := func(id pki.Identity) pki.Keypair {
		k, err := auth.NewKeypair(id, []string{"127.0.0.1"}, time.Hour)
		if id.Kind == pki.KindUser {
			k, err = auth.NewKeypair(id, nil, time.Hour)
		}
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	hub, err := pair(pki.Identity{Kind: pki.KindHub, Name: pki.HubName}).Certificate()
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	srv := api.NewServer(slog.New(slog.DiscardHandler))
	pergolav1connect.RegisterJobServiceHandler(srv, h)
	api.Mount(mux, srv)
	s := httptest.NewUnstartedServer(mux)
	s.EnableHTTP2 = true
	s.TLS = pki.ServerTLS(hub, auth.Roots(), "h2", "http/1.1")
	s.StartTLS()
	t.Cleanup(s.Close)
	t.Setenv("XDG_CONFIG_HOME", t.TempDir())
	addr, ok := s.Listener.Addr().(*net.TCPAddr)
	if !ok {
		t.Fatal("no TCP address")
	}
	if err := Save(Context{Name: "test", Hubs: []string{addr.String()}}, pair(pki.Identity{Kind: pki.KindUser, Name: "anna"})); err != nil {
		t.Fatal(err)
	}
	c, _, err := Open("test")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// Streams that break go on where they were: each event and each byte comes once, in order.
func TestFollowing(t *testing.T) {
	b := &brittle{}
	c := serve(t, b)
	away, back := 0, 0
	f := Following{Away: func(error) { away++ }, Back: func() { back++ }}
	var seqs []int64
	if err := f.Watch(t.Context(), c, "01", 0, false, func(e job.Event) error { seqs = append(seqs, e.Seq); return nil }); err != nil {
		t.Error(err)
	}
	if !slices.Equal(seqs, []int64{1, 2, 3, 4, 5, 6, 7}) || b.calls.Load() != 4 {
		t.Errorf("events %v in %d calls", seqs, b.calls.Load())
	}
	if away != 3 || back != 3 {
		t.Errorf("away %d times, back %d times", away, back)
	}
	var got strings.Builder
	if err := f.Tail(t.Context(), c, &pb.TailLogsRequest{Id: "01"}, func(ch *pb.LogChunk) error {
		if ch.GetParty() != "hub" || ch.GetFile() != "a.txt" || ch.GetSkipped() != 0 {
			t.Errorf("a piece of %s/%s, %d skipped", ch.GetParty(), ch.GetFile(), ch.GetSkipped())
		}
		got.Write(ch.GetData())
		return nil
	}); err != nil {
		t.Error(err)
	}
	if got.String() != text {
		t.Errorf("followed %q", got.String())
	}
	stop := errors.New("enough")
	if err := f.Watch(t.Context(), c, "01", 0, false, func(job.Event) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("the caller's own end: %v", err)
	}
}

type refusing struct {
	pergolav1connect.JobServiceHandler
	calls atomic.Int64
}

func (r *refusing) WatchJob(context.Context, *pb.WatchJobRequest, pergolav1connect.JobServiceWatchJobServerStream) error {
	r.calls.Add(1)
	return problem.New(problem.NotFound, "", "there is no job 01")
}

// A hub that answers is not asked again.
func TestFollowingARefusal(t *testing.T) {
	r := &refusing{}
	c := serve(t, r)
	if err := (Following{}).Watch(t.Context(), c, "01", 0, false, func(job.Event) error { return nil }); problem.CodeOf(err) != problem.NotFound || r.calls.Load() != 1 {
		t.Errorf("%v after %d calls", err, r.calls.Load())
	}
}
