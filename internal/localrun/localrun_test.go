package localrun

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/problem"
)

func TestDialable(t *testing.T) {
	for in, want := range map[string]string{
		"127.0.0.1:5": "127.0.0.1:5", "0.0.0.0:5": "127.0.0.1:5", "[::]:5": "127.0.0.1:5", "[::1]:5": "[::1]:5",
	} {
		if got := dialable(in); got != want {
			t.Errorf("dialable(%q) = %q, want %q", in, got, want)
		}
	}
}

// Rounds are in order whatever the order of their reports, and a later report of the same name counts.
func TestSummaryAdd(t *testing.T) {
	var s Summary
	for _, m := range []job.Metrics{
		{Round: 2, Phase: "train", Values: job.Values{"loss": 4}},
		{Round: 1, Phase: "train", Values: job.Values{"loss": 9}},
		{Round: 2, Phase: "evaluate", Values: job.Values{"acc": .5}},
		{Round: 2, Phase: "train", Values: job.Values{"loss": 3}},
	} {
		s.add(m)
	}
	if len(s.Rounds) != 2 || s.Rounds[0].Round != 1 || s.Rounds[1].Phases["train"]["loss"] != 3 || s.Rounds[1].Phases["evaluate"]["acc"] != .5 {
		t.Errorf("%+v", s.Rounds)
	}
}

// What is shown is kept in events.jsonl as well, log lines excepted, and the summary follows from it.
func TestShow(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "events.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var seen []string
	r := &run{opt: Options{Event: func(e Event) { seen = append(seen, e.Kind) }}, events: f}
	r.summary.Job = "j"
	r.note("one")
	r.line("hub", "FLWR-SA", "text")
	cause := problem.New(problem.AppError, "mend it", "it broke")
	r.emit(job.KindClientFailure, job.ClientFailure{Round: 1, Exception: "ValueError: x"})
	r.emit(job.KindWarning, job.Text{Message: "w"})
	r.emit(job.KindWarning, job.Text{Message: "w"})
	r.emit(job.KindJobState, job.JobState{From: job.Running, To: job.Stopping, Cause: cause})
	if r.sawEnd() {
		t.Error("the job has not ended yet")
	}
	r.emit(job.KindJobState, job.JobState{From: job.Stopping, To: job.Failed, Cause: cause})
	if !r.sawEnd() || r.summary.State != job.Failed || r.summary.Cause.Code != problem.AppError {
		t.Errorf("summary %+v", r.summary)
	}
	if len(r.summary.Failures) != 1 || len(r.summary.FailedAt) != 1 || len(r.summary.Warnings) != 1 {
		t.Errorf("failures %v at %v, warnings %v", r.summary.Failures, r.summary.FailedAt, r.summary.Warnings)
	}
	if want := "note log client-failure warning warning job-state job-state"; strings.Join(seen, " ") != want {
		t.Errorf("shown %v", seen)
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		t.Fatal(err)
	}
	dec := json.NewDecoder(f)
	n := 0
	for {
		var e job.Event
		if err := dec.Decode(&e); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		n++
	}
	if n != 6 {
		t.Errorf("%d events kept, want 6", n)
	}
}

func TestProblems(t *testing.T) {
	if err := diskProblem(fmt.Errorf("x: %w", syscall.ENOSPC), "/o"); problem.CodeOf(err) != problem.DiskFull {
		t.Errorf("a full disk: %v", err)
	}
	if err := diskProblem(io.EOF, "/o"); !errors.Is(err, io.EOF) || problem.CodeOf(err) == problem.DiskFull {
		t.Errorf("no full disk: %v", err)
	}
	for err, want := range map[error]bool{
		io.EOF: false, problem.New(problem.HubUnreachable, "", "x"): false, problem.New(problem.Denied, "", "x"): true,
	} {
		if isProblem(err) != want {
			t.Errorf("isProblem(%v) = %v", err, !want)
		}
	}
}

// Folders that hold something move; empty ones and missing ones do not.
func TestMoveInto(t *testing.T) {
	from, to := t.TempDir(), filepath.Join(t.TempDir(), "logs")
	for _, d := range []string{"a", "b"} {
		if err := os.Mkdir(filepath.Join(from, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(from, "a", "f"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := moveInto(from, to); err != nil {
		t.Fatal(err)
	}
	if err := moveInto(filepath.Join(from, "nothing"), to); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(to, "a", "f")); err != nil || string(b) != "x" {
		t.Errorf("%q, %v", b, err)
	}
	if _, err := os.Stat(filepath.Join(to, "b")); !os.IsNotExist(err) {
		t.Errorf("the empty folder moved: %v", err)
	}
}

func TestLocate(t *testing.T) {
	out := t.TempDir()
	if err := os.MkdirAll(filepath.Join(out, "logs", "hub"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"hub/server_app_log.txt", "hub-runner.log"} {
		if err := os.WriteFile(filepath.Join(out, "logs", f), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct{ party, log, want string }{
		{"hub", "server_app_log.txt", filepath.Join(out, "logs/hub/server_app_log.txt")},
		{"hub", "runner.log", filepath.Join(out, "logs/hub-runner.log")},
		{"site-1", "client_app_log.txt", "client_app_log.txt"},
		{"", "x.txt", "x.txt"},
		{"hub", "", ""},
	} {
		if got := locate(out, job.Cause{Party: c.party, Log: c.log}); got != c.want {
			t.Errorf("locate(%q, %q) = %q, want %q", c.party, c.log, got, c.want)
		}
	}
}
