package job

import (
	"encoding/json"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pergolafl/pergola/internal/problem"
)

func TestIDsSortInTheOrderOfSubmission(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 6e6, time.UTC)
	var ids []ID
	for i := range 2000 {
		ids = append(ids, NewID(now.Add(time.Duration(i/500)*time.Millisecond)))
	}
	if !slices.IsSorted(ids) || len(slices.Compact(slices.Clone(ids))) != len(ids) {
		t.Error("IDs are not sorted, or not unique")
	}
	for _, id := range ids[:3] {
		got, err := ParseID(strings.ToUpper(string(id)))
		if err != nil || got != id || len(id) != 26 || string(id) != strings.ToLower(string(id)) {
			t.Errorf("ParseID(%q) = %q, %v", id, got, err)
		}
	}
	if got := ids[0].Created(); !got.Equal(now) {
		t.Errorf("Created = %v, want %v", got, now)
	}
	if !ID("x").Created().IsZero() {
		t.Error("what is no ID has a time")
	}
	// Clocks that are wrong by far still give IDs.
	for _, at := range []time.Time{{}, time.Unix(-1, 0), time.Date(12000, 1, 1, 0, 0, 0, 0, time.UTC)} {
		if _, err := ParseID(string(NewID(at))); err != nil {
			t.Errorf("NewID(%v): %v", at, err)
		}
	}
}

func TestHolds(t *testing.T) {
	unavailable, failed := problem.New(problem.NativeUnavailable, "", "not here"), problem.New(problem.AppError, "", "it failed")
	auto := Job{State: Preparing, Spec: Spec{Engine: EngineNative, EngineAuto: true}}
	given := func(s PartyState, c *Cause) Party { return Party{State: s, Cause: c, Allocated: true} }
	for _, c := range []struct {
		what string
		job  Job
		p    Party
		want bool
	}{
		{"what it was not given", auto, Party{State: PartyAbsent}, false},
		{"a party that is to begin", auto, given(PartyAbsent, nil), true},
		{"one that runs", auto, given(PartyRunning, nil), true},
		{"one that has failed", auto, given(PartyFailed, failed), false},
		{"one that begins anew on the other engine", auto, given(PartyFailed, unavailable), true},
		{"one of a job that runs on without it", Job{State: Running, Spec: auto.Spec}, given(PartyFailed, unavailable), false},
		{"one of a job that ends", Job{State: Stopping, Spec: auto.Spec}, given(PartyFailed, unavailable), false},
		{"one of a job that is over", Job{State: Failed, Spec: auto.Spec}, given(PartyFailed, unavailable), false},
		{"one of a job that nobody lets take the other engine", Job{State: Preparing, Spec: Spec{Engine: EngineNative}}, given(PartyFailed, unavailable), false},
	} {
		if got := c.job.Holds(c.p); got != c.want {
			t.Errorf("%s: the job holds its site: %v, want %v", c.what, got, c.want)
		}
	}
}

func TestParseIDRefuses(t *testing.T) {
	for _, s := range []string{"", "01", "zzzzzzzzzzzzzzzzzzzzzzzzzz", "01j0000000000000000000000u", strings.Repeat("0", 27), "../../etc/passwd0000000000"} {
		if id, err := ParseID(s); problem.CodeOf(err) != problem.Usage {
			t.Errorf("ParseID(%q) = %q, %v; want a usage problem", s, id, err)
		}
	}
}

func TestCheckName(t *testing.T) {
	for _, c := range []struct {
		what, name string
		want       string // part of the message; "" = allowed
	}{
		{"site", "st-anna", ""},
		{"site", "a", ""},
		{"site", "0", ""},
		{"site", strings.Repeat("a", 63), ""},
		{"job", "hub", ""},
		{"job", "env", ""},
		{"site", "hub", "hub's own side"},
		{"site", "env", "has a key of that name"},
		{"site", "node-config", "has a key of that name"},
		{"site", "", `"" cannot be the name of a site`},
		{"app", "A", `cannot be the name of an app`},
		{"site", strings.Repeat("a", 64), "cannot be"},
		{"site", "-a", "cannot be"},
		{"site", "a-", "cannot be"},
		{"site", "a.b", "cannot be"},
		{"site", "a_b", "cannot be"},
		{"site", "charité", "cannot be"},
		{"site", "a/../b", "cannot be"},
		{"site", "a\n", "cannot be"},
	} {
		err := CheckName(c.what, c.name)
		if c.want == "" && err != nil || c.want != "" && (problem.CodeOf(err) != problem.Usage || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("CheckName(%q, %q) = %v, want %q", c.what, c.name, err, c.want)
		}
	}
}

// walk gives every state that can be reached from s.
func walk[S comparable](s S, next func(S) []S, seen map[S]bool) map[S]bool {
	if !seen[s] {
		seen[s] = true
		for _, n := range next(s) {
			walk(n, next, seen)
		}
	}
	return seen
}

func checkTable[S ~string](t *testing.T, first S, all []S, table map[S][]S, meaning map[S]string, next func(S) []S, terminal, known func(S) bool) {
	t.Helper()
	if got := walk(first, next, map[S]bool{}); len(got) != len(all) {
		t.Errorf("from %s, %d of %d states can be reached", first, len(got), len(all))
	}
	for i, s := range all {
		if meaning[s] == "" || !known(s) || terminal(s) != (len(table[s]) == 0) || string(s) != strings.ToLower(string(s)) {
			t.Errorf("state %s is not whole", s)
		}
		if terminal(s) {
			continue
		}
		ends := 0
		for r := range walk(s, next, map[S]bool{}) {
			if terminal(r) {
				ends++
			}
		}
		if ends == 0 {
			t.Errorf("%s never reaches an end", s)
		}
		for _, n := range table[s] {
			if slices.Index(all, n) <= i {
				t.Errorf("%s → %s goes back: a job could go round for ever", s, n)
			}
		}
	}
	if terminal("flying") || known("flying") {
		t.Error("what is no state is known")
	}
}

func TestTables(t *testing.T) {
	checkTable(t, Submitted, States(), moves, meaning, State.Next, State.Terminal, State.Known)
	checkTable(t, PartyAbsent, PartyStates(), partyMoves, partyMeaning, PartyState.Next, PartyState.Terminal, PartyState.Known)
	for _, s := range []State{Preparing, Running} {
		for _, n := range s.Next() {
			if n.Terminal() {
				t.Errorf("%s → %s ends a job without stopping its programs", s, n)
			}
		}
	}
	for _, s := range []State{Submitted, Waiting, Queued} {
		for _, n := range []State{Failed, Aborted, Rejected} {
			if !s.Can(n) {
				t.Errorf("%s cannot end as %s", s, n)
			}
		}
	}
	for _, s := range PartyStates() {
		if !s.Terminal() && (!s.Can(PartyFailed) || !s.Can(PartyDone)) {
			t.Errorf("a party that is %s cannot fail or be stopped", s)
		}
	}
}

// Whatever the cause, the outcome is a state that may follow once the job is stopped.
func TestOutcomeCanBeReached(t *testing.T) {
	causes := []*Cause{nil}
	for c := range problem.Codes {
		causes = append(causes, problem.New(c, "", "x"))
	}
	for _, s := range States() {
		if s.Terminal() || s == Preparing || s == Running {
			continue
		}
		for _, c := range causes {
			if to := s.Outcome(c); !s.Can(to) {
				t.Errorf("%s with %v ends as %s, which is no move", s, c, to)
			}
		}
	}
	if got := Stopping.Outcome(nil); got != Succeeded {
		t.Errorf("no cause ends as %s", got)
	}
}

func TestEventBodies(t *testing.T) {
	now := time.Unix(1, 2).UTC()
	e, err := NewEvent("j", "s1", KindMetrics, Metrics{Round: 2, Phase: "train", Values: Values{"loss": 0.5, "bad": math.NaN(), "worse": math.Inf(-1)}}, now)
	if err != nil {
		t.Fatal(err)
	}
	if want := `{"round":2,"phase":"train","values":{"bad":"NaN","loss":0.5,"worse":"-Inf"}}`; string(e.Body) != want {
		t.Errorf("body %s, want %s", e.Body, want)
	}
	var m Metrics
	if err := e.Decode(&m); err != nil || m.Values["loss"] != 0.5 || !math.IsNaN(m.Values["bad"]) || !math.IsInf(m.Values["worse"], -1) {
		t.Errorf("Decode = %v, %v", m, err)
	}
	for _, bad := range []string{`{"values":{"x":"fast"}}`, `{"values":{"x":[]}}`, `{"values":3}`, `{`} {
		if err := (Event{Kind: KindMetrics, Body: json.RawMessage(bad)}).Decode(&m); err == nil {
			t.Errorf("%s was taken", bad)
		}
	}
	if err := (Event{}).Decode(&m); err != nil {
		t.Errorf("an empty body: %v", err)
	}
	// A cause travels without what is for logs only.
	c := problem.Wrap(json.Unmarshal([]byte("secret"), &m), problem.AppError, "n", "m")
	e, err = NewEvent("j", "", KindJobState, JobState{From: Running, To: Stopping, Cause: c}, now)
	if err != nil {
		t.Fatal(err)
	}
	var s JobState
	if err := e.Decode(&s); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(JobState{From: Running, To: Stopping, Cause: problem.New(problem.AppError, "n", "m")}, s); d != "" {
		t.Error(d)
	}
}
