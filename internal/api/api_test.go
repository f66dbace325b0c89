package api

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"math"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/encoding/protojson"

	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/api/pergola/v1/pergolav1connect"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/sock"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// refusing is a runner that answers every call with err, its stream after one entry whose kind is kind.
type refusing struct {
	err  error
	kind string
}

func (r refusing) SetDesired(context.Context, *pb.SetDesiredRequest) (*pb.SetDesiredResponse, error) {
	return nil, r.err
}

func (r refusing) WatchJournal(_ context.Context, _ *pb.WatchJournalRequest, out pergolav1connect.RunnerServiceWatchJournalServerStream) error {
	if err := out.Send(&pb.WatchJournalResponse{Entry: &pb.JournalEntry{Seq: 1, Event: &pb.Event{Kind: r.kind}}}); err != nil {
		return err
	}
	return r.err
}

// served gives a client of a server that answers with err.
func served(t *testing.T, err error) *Client {
	t.Helper()
	return serve(t, refusing{err: err})
}

func serve(t *testing.T, r refusing) *Client {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	ln, e := sock.Listen(path)
	if e != nil {
		t.Fatal(e)
	}
	srv := NewServer(slog.New(slog.DiscardHandler))
	pergolav1connect.RegisterRunnerServiceHandler(srv, r)
	mux := http.NewServeMux()
	Mount(mux, srv)
	hs := &http.Server{Handler: mux, ReadHeaderTimeout: time.Minute}
	done := make(chan error, 1)
	go func() { done <- hs.Serve(ln) }()
	c := NewRunnerClient(path)
	t.Cleanup(func() {
		c.Close()
		if err := hs.Close(); err != nil {
			t.Error(err)
		}
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	})
	return c
}

// Every problem arrives at the caller as it was, but for the error below it, whose text goes along and whose type stays.
func TestProblemsTravel(t *testing.T) {
	for code, meaning := range problem.Codes {
		in := &problem.Error{Code: code, Party: "st-anna", Msg: "what happened — “ä”", Next: "do this", Log: "hub/x.txt:3"}
		c := served(t, in)
		_, err := c.Runner.SetDesired(t.Context(), &pb.SetDesiredRequest{})
		if d := cmp.Diff(in, problem.From(err)); d != "" {
			t.Errorf("%s:\n%s", code, d)
		}
		s, err := c.Runner.WatchJournal(t.Context(), &pb.WatchJournalRequest{})
		if err == nil {
			if _, err = s.Receive(); err == nil {
				_, err = s.Receive()
			}
			_ = s.Close()
		}
		if d := cmp.Diff(in, problem.From(err)); d != "" {
			t.Errorf("%s at the end of a stream:\n%s", code, d)
		}
		if _, ok := wireCodes[meaning.HTTP]; !ok {
			t.Errorf("%s has HTTP status %d, which no Connect code stands for", code, meaning.HTTP)
		}
	}
	c := served(t, problem.Wrap(errors.New("secret type, plain text"), problem.DiskFull, "make room", "no space"))
	_, err := c.Runner.SetDesired(t.Context(), &pb.SetDesiredRequest{})
	if p := problem.From(err); p.Code != problem.DiskFull || p.Msg != "no space" || p.Err != nil {
		t.Errorf("a wrapped error arrived as %+v", p)
	}
	c = served(t, errors.New("boom"))
	_, err = c.Runner.SetDesired(t.Context(), &pb.SetDesiredRequest{})
	if p := problem.From(err); p.Code != problem.Internal || p.Next == "" {
		t.Errorf("a foreign error arrived as %+v", p)
	}
	if Problem(nil) != nil || FromProblem(nil) != nil {
		t.Error("no problem became one")
	}
}

func TestNobodyAnswers(t *testing.T) {
	c := NewRunnerClient(filepath.Join(t.TempDir(), "nobody"))
	defer c.Close()
	_, err := c.Runner.SetDesired(t.Context(), &pb.SetDesiredRequest{})
	if p := problem.From(err); p.Code != problem.HubUnreachable || p.Next == "" {
		t.Errorf("got %+v", p)
	}
	// The end of a call's context is not the hub's fault.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := served(t, nil).Runner.SetDesired(ctx, &pb.SetDesiredRequest{}); !errors.Is(err, context.Canceled) && connectCode(err) != connect.CodeCanceled {
		t.Errorf("a call whose context is over: %v", err)
	}
}

func connectCode(err error) connect.Code {
	if ce, ok := errors.AsType[*connect.Error](err); ok {
		return ce.Code()
	}
	return 0
}

// A message that is too large is refused, not taken in; a full chunk is none.
func TestMessagesAreBounded(t *testing.T) {
	for size, ok := range map[int]bool{MaxChunk + 4096: true, MaxMessage + 1: false} {
		s, err := serve(t, refusing{kind: strings.Repeat("x", size)}).Runner.WatchJournal(t.Context(), &pb.WatchJournalRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Receive(); (err == nil) != ok {
			t.Errorf("a message of %d bytes: %v", size, err)
		}
		_ = s.Close()
	}
}

// An event is the same after the way over the wire and through the store's JSON.
func TestEventsTravel(t *testing.T) {
	now := time.Date(2026, 3, 4, 5, 6, 7, 891011, time.UTC)
	id := job.NewID(now)
	for _, c := range []struct {
		kind string
		body any
	}{
		{job.KindNote, nil},
		{job.KindNote, job.Text{Message: "a \"quoted\" line\nand ä 💥 \u0000"}},
		{job.KindJobState, job.JobState{From: job.Running, To: job.Stopping, Cause: &job.Cause{Code: problem.AppError, Party: "a", Msg: "m", Next: "n", Log: "l"}, Reason: "r"}},
		{job.KindPartyState, job.PartyStateChange{From: job.PartyReady, To: job.PartyFailed, Cause: &job.Cause{Code: problem.OutOfMemory}}},
		{job.KindEnvProgress, job.EnvProgress{Phase: "download", Done: 3, Total: 7, Message: "numpy"}},
		{job.KindProgramStarted, job.Program{Name: "flower-superlink", Pid: 4194304}},
		{job.KindProgramEnded, job.Program{Name: "flower-superlink", Pid: 1, Code: -9, Signal: "killed", OOM: true, Tail: []string{"a", ""}}},
		{job.KindSitesReady, job.SitesReady{Ready: 1, Wanted: 2, Missing: []string{"b"}}},
		{job.KindRound, job.Round{Round: 1, Total: 1 << 30}},
		{job.KindMetrics, job.Metrics{Round: 2, Phase: "train", Values: job.Values{"loss": 1. / 3, "tiny": 5e-324, "big": math.MaxFloat64, "nan": math.NaN(), "inf": math.Inf(1), "minus": math.Inf(-1), "zero": 0}}},
		{job.KindClientFailure, job.ClientFailure{Round: 1, Exception: "ValueError: x", Traceback: []string{"File …"}}},
	} {
		in, err := job.NewEvent(id, "st-anna", c.kind, c.body, now)
		if err != nil {
			t.Fatal(err)
		}
		in.Seq = 1 << 40
		p, err := Event(in)
		if err != nil {
			t.Fatal(err)
		}
		// As curl gets it, too.
		b, err := protojson.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		var again pb.Event
		if err := protojson.Unmarshal(b, &again); err != nil {
			t.Fatal(err)
		}
		out, err := FromEvent(&again)
		if err != nil {
			t.Fatal(err)
		}
		if !sameJSON(t, in.Body, out.Body) {
			t.Errorf("%s: the body %s became %s", c.kind, in.Body, out.Body)
		}
		in.Body, out.Body = nil, nil
		if d := cmp.Diff(in, out); d != "" {
			t.Errorf("%s:\n%s", c.kind, d)
		}
	}
	if _, err := Event(job.Event{Kind: "note", Body: []byte(`[1]`)}); err == nil || !strings.Contains(err.Error(), "note") {
		t.Errorf("a body that is no object: %v", err)
	}
}

func sameJSON(t *testing.T, a, b []byte) bool {
	t.Helper()
	if len(a) == 0 || len(b) == 0 {
		return len(a) == len(b)
	}
	var x, y any
	if json.Unmarshal(a, &x) != nil || json.Unmarshal(b, &y) != nil {
		t.Fatalf("%q or %q is no JSON", a, b)
	}
	return cmp.Equal(x, y)
}

// A job's form has all that is known, and no times that are not.
func TestJob(t *testing.T) {
	now := time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)
	j := job.Job{
		ID: "x", Name: "app", Submitter: "ann", Bundle: "sha256:0", State: job.Failed, Reason: "r",
		Cause: &job.Cause{Code: problem.AppError, Msg: "m"}, Created: now, Started: now.Add(time.Second),
	}
	p := Job(j, []job.Party{{Job: "x", Name: "hub", State: job.PartyFailed, Cause: j.Cause, Updated: now}, {Job: "x", Name: "a", State: job.PartyAbsent}})
	if p.GetState() != "failed" || p.GetSubmitter() != "ann" || p.GetCause().GetCode() != "app-error" || !p.GetCreateTime().AsTime().Equal(now) || p.GetEndTime() != nil {
		t.Errorf("the job is %v", p)
	}
	if len(p.GetParties()) != 2 || p.GetParties()[0].GetCause().GetMessage() != "m" || p.GetParties()[1].GetCause() != nil || p.GetParties()[1].GetUpdateTime() != nil {
		t.Errorf("the parties are %v", p.GetParties())
	}
}
