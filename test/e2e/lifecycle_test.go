package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/localrun"
)

// lateRound is a round of the app late with a loss.
func lateRound(n int, sum, loss float64) localrun.RoundMetrics {
	return localrun.RoundMetrics{Round: n, Phases: map[string]job.Values{"train": {"sum": sum}, "evaluate": {"loss": loss, "accuracy": 1 / (1 + loss)}}}
}

// one wants exactly one note or warning that has all of the texts.
func (r *run) one(res result, texts ...string) {
	r.t.Helper()
	n := 0
	for _, e := range res.Events {
		if e.Kind != job.KindNote && e.Kind != job.KindWarning {
			continue
		}
		has := true
		for _, t := range texts {
			has = has && strings.Contains(as[job.Text](r.t, e).Message, t)
		}
		if has {
			n++
		}
	}
	if n != 1 {
		r.t.Errorf("%d notes or warnings have %q, want one", n, texts)
	}
}

// A site whose agent reaches the hub only when the first round is over takes part from then on.
func TestLateSite(t *testing.T) {
	t.Parallel()
	for _, v := range []string{oldest, newest} {
		t.Run(v, func(t *testing.T) {
			t.Parallel()
			hub := freeAddress(t)
			n := forward(t, hub)
			n.set(cut)
			r := start(t, spec{app: "late", args: []string{"--flwr", v, "--min-sites", "1", "--join-wait", "1s", "--listen", hub, "--site-dials", "site-1=" + n.addr()}})
			r.round(2) // waits for the second client
			n.set(up)
			res := r.end()
			if res.Code != 0 {
				t.Fatalf("exit %d, %s\n%s", res.Code, causeText(res.Summary), res.Stderr)
			}
			// Round 1 has partition 1 alone, which adds 2 to four zeros; round 2 adds the mean of 1 and 2.
			sameRounds(t, res.Summary.Rounds, []localrun.RoundMetrics{lateRound(1, 0, 8), lateRound(2, 8, 14)})
			r.one(res, "the app starts without site-1")
			r.one(res, "site-1 has joined the running job")
		})
	}
}

// A site that is lost in a job which goes on without it begins anew, and takes part again.
func TestSiteComesBack(t *testing.T) {
	t.Parallel()
	for _, v := range []string{oldest, newest} {
		t.Run(v, func(t *testing.T) {
			t.Parallel()
			r := start(t, spec{app: "late", args: []string{"--flwr", v, "--min-sites", "1", "--run-config", "first=2", "--run-config", "num-server-rounds=3", "--run-config", "sleep=3.0"}})
			r.round(2)
			r.kill(r.service("runner", "site-1"))
			r.struck = time.Time{} // that is not the job's end
			res := r.end()
			if res.Code != 0 {
				t.Fatalf("exit %d, %s\n%s", res.Code, causeText(res.Summary), res.Stderr)
			}
			if n := len(res.Summary.Rounds); n != 3 {
				t.Fatalf("%d rounds: %+v", n, res.Summary.Rounds)
			}
			r.one(res, "the job goes on without site-1", "ended unexpectedly")
			r.one(res, "site-1 is there again and begins anew")
			r.one(res, "site-1 has joined the running job")
			for _, p := range res.Parties {
				if want := map[string]int{"site-1": 1}[p.Name]; p.Attempt != want || p.State != job.PartyDone {
					t.Errorf("%s ended as %s in attempt %d", p.Name, p.State, p.Attempt)
				}
			}
		})
	}
}

// The hub's runner is killed in a job that may be started again: all parties begin anew, and the app runs on the same database.
func TestHubRunnerRestarts(t *testing.T) {
	t.Parallel()
	hub := `[tool.pergola.server]
database = "state.db"
restarts = 1
`
	s := spec{app: "late", args: []string{"--flwr", "1.30.0", "--run-config", "first=2", "--run-config", "sleep=3.0"}}
	copied(func(dir string) error { return appendTo(filepath.Join(dir, "pyproject.toml"), hub) })(t, &s)
	r := start(t, s)
	r.round(1)
	r.kill(r.service("runner", "hub"))
	r.struck = time.Time{} // that is not the job's end
	res := r.end()
	if res.Code != 0 {
		t.Fatalf("exit %d, %s\n%s", res.Code, causeText(res.Summary), res.Stderr)
	}
	r.one(res, "the hub's runner of the job ended unexpectedly", "attempt 2 of 2 begins")
	for _, p := range res.Parties {
		if p.Attempt != 1 || p.State != job.PartyDone {
			t.Errorf("%s ended as %s in attempt %d", p.Name, p.State, p.Attempt)
		}
	}
	// The first round stands twice, with the same numbers; nobody of the attempt before took part.
	last := res.Summary.Rounds[len(res.Summary.Rounds)-2:]
	sameRounds(t, last, []localrun.RoundMetrics{lateRound(1, 0, 6), lateRound(2, 6, 12)})
	if len(res.Summary.Failures) > 0 {
		t.Errorf("clients failed: %+v", res.Summary.Failures)
	}
	if fi, err := os.Stat(filepath.Join(r.out, "results", "state.db")); err != nil || fi.Size() == 0 {
		t.Errorf("the database is not among the results: %v", err)
	}
}
