package cli

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/localrun"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/store/sqlite"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"pergola": func() { os.Exit(Main()) }})
}

// The scripts end before anything is started: runs that go on are in test/e2e.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(e *testscript.Env) error {
			e.Setenv("PERGOLA_CACHE", filepath.Join(e.WorkDir, "cache"))
			e.Setenv("PERGOLA_PYTHON", "")
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"exits": exits, "untouched": untouched, "summary": summary, "store": newStore},
	})
}

// newStore makes the store of a hub that has run: store PATH.
func newStore(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: store PATH")
	}
	db, err := sqlite.Open(context.Background(), ts.MkAbs(args[0]))
	ts.Check(err)
	ts.Check(db.Close())
}

// exits runs `pergola` and wants an exit status: exits 2 run app --sites 0.
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) == 0 {
		ts.Fatalf("usage: exits STATUS [ARG...]")
	}
	// What went wrong is looked at by its status, below.
	err := ts.Exec("pergola", args[1:]...)
	got := "0"
	if err != nil {
		_, status, ok := strings.Cut(err.Error(), "exit status ")
		if !ok {
			ts.Fatalf("pergola: %v", err)
		}
		got = status
	}
	if got != args[0] {
		ts.Fatalf("exit status %s, want %s\nstdout: %s\nstderr: %s", got, args[0], ts.ReadFile("stdout"), ts.ReadFile("stderr"))
	}
}

// untouched wants that only what the script brought along is there: no run's directory, no cache, nothing in the app.
func untouched(ts *testscript.TestScript, _ bool, args []string) {
	born := func(path string) time.Time {
		info, err := os.Stat(path)
		ts.Check(err)
		return info.ModTime()
	}
	root := ts.MkAbs(".")
	since := born(ts.MkAbs("begin"))
	ts.Check(filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.Name() == ".tmp" { // testscript's own
			return fs.SkipDir
		}
		if path != root && born(path).After(since) && d.Name() != "begin" {
			ts.Fatalf("%s was written", path)
		}
		return nil
	}))
	if len(args) != 0 {
		ts.Fatalf("usage: untouched")
	}
}

// summary wants that stdout is one JSON line, a summary with that code and exactly these fields.
func summary(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: summary CODE")
	}
	out := ts.ReadFile("stdout")
	if strings.Count(out, "\n") != 1 {
		ts.Fatalf("stdout is not one line: %q", out)
	}
	dec := json.NewDecoder(strings.NewReader(out))
	dec.DisallowUnknownFields()
	var l struct {
		Time time.Time        `json:"time"`
		Kind string           `json:"kind"`
		Body localrun.Summary `json:"body"`
	}
	ts.Check(dec.Decode(&l))
	c := l.Body.Cause
	if l.Kind != localrun.KindSummary || l.Time.IsZero() || l.Body.State != job.Failed || l.Body.Sites == nil || l.Body.Job != "" || l.Body.Out != "" {
		ts.Fatalf("the summary is %+v", l)
	}
	if c == nil || c.Code != problem.Code(args[0]) || c.Msg == "" || c.Next == "" {
		ts.Fatalf("the cause is %+v, want %s with what to do", c, args[0])
	}
	if got := ts.ReadFile("stderr"); got != "" {
		ts.Fatalf("with --json stderr has %q", got)
	}
}

// A round's row has a value, or nothing, below the head of each metric; the order of phases is that of the work.
func TestRoundsTable(t *testing.T) {
	var b bytes.Buffer
	if err := printRounds(&b, []localrun.RoundMetrics{
		{Round: 1, Phases: map[string]job.Values{"evaluate": {"loss": 0.5}, "train": {"b": 1, "a": 2}}},
		{Round: 2, Phases: map[string]job.Values{"server": {"acc": 1. / 3}, "train": {"a": 1e9}}},
	}); err != nil {
		t.Fatal(err)
	}
	want := []string{"", "round train a train b evaluate loss server acc", "1 2 1 0.5", "2 1e+09 0.333333"}
	sc := bufio.NewScanner(&b)
	for i := 0; sc.Scan(); i++ {
		if got := strings.Join(strings.Fields(sc.Text()), " "); i >= len(want) || got != want[i] {
			t.Errorf("line %d is %q", i, got)
		}
	}
	b.Reset()
	if err := printRounds(&b, nil); err != nil || b.Len() > 0 {
		t.Errorf("no rounds give %q, %v", b.String(), err)
	}
}

// The flags that docs/settings.md names are there.
func TestFlagsOfSettings(t *testing.T) {
	c := newRun(env{})
	for _, s := range job.Settings {
		for f := range strings.SplitSeq(s.Flag, ", ") {
			if f != "" && c.Flags().Lookup(strings.TrimPrefix(f, "--")) == nil {
				t.Errorf("%s should have the flag %s, which does not exist", s.Key, f)
			}
		}
	}
}
