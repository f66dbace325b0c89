package flower

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "rewrite the expected events in testdata")

// show writes an event as one line of the expected output.
func show(e Event) string {
	var b strings.Builder
	b.WriteString(string(e.Kind))
	if e.Round > 0 || e.Total > 0 || e.Kind == Metrics {
		fmt.Fprintf(&b, " %d/%d", e.Round, e.Total)
	}
	if e.Phase != "" {
		b.WriteString(" " + e.Phase)
	}
	for _, k := range slices.Sorted(maps.Keys(e.Metrics)) {
		fmt.Fprintf(&b, " %s=%v", k, e.Metrics[k])
	}
	if e.FinalTable {
		b.WriteString(" (summary)")
	}
	if e.Kind == ClientFailures {
		fmt.Fprintf(&b, " %d results %d failures", e.Results, e.Failures)
	}
	if e.Exception != "" {
		fmt.Fprintf(&b, " %q, %d lines", e.Exception, len(e.Traceback))
	}
	return b.String()
}

// parse gives all events of a log but the signs of progress, of which it gives the number.
func parse(program, log string) (lines []string, progress int) {
	p := newParser(program)
	note := func(events []Event) {
		for _, e := range events {
			if e.Kind == Progress {
				progress++
				continue
			}
			lines = append(lines, show(e))
		}
	}
	for line := range strings.Lines(log) {
		note(p.line(plain(strings.TrimRight(line, "\n"))))
	}
	note(p.end())
	return lines, progress
}

// The logs are from real runs (paths and addresses changed); X.program.txt goes with X.program.events.
func TestParserOnRealLogs(t *testing.T) {
	files, err := filepath.Glob("testdata/logs/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatal("no logs", err)
	}
	for _, f := range files {
		t.Run(strings.TrimSuffix(filepath.Base(f), ".txt"), func(t *testing.T) {
			raw, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			program := "flower" + strings.Replace(filepath.Ext(strings.TrimSuffix(f, ".txt")), ".", "-", 1)
			lines, progress := parse(program, string(raw))
			got := strings.Join(append(lines, fmt.Sprintf("progress ×%d", progress)), "\n") + "\n"
			golden := strings.TrimSuffix(f, ".txt") + ".events"
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("got\n%swant\n%s", got, want)
			}
		})
	}
}

func TestParserForms(t *testing.T) {
	for _, c := range []struct {
		name, program, log, want string
	}{
		{"a history over several lines, numpy's numbers, a list that is no metric", ProgramServerApp, `INFO :      	History (loss, centralized):
INFO :      		round 0: 2.5
INFO :      		round 1: nan
INFO :      	History (metrics, distributed, fit):
INFO :      	{'acc': [(1, np.float64(0.5)),
INFO :      	         (2, 1e-3)],
INFO :      	 "it's": [(2, 3)], 'list': [(1, [1, 2])]}
INFO :      	History (metrics, centralized):
INFO :      	{'n': [(1, True)]}
INFO :      
FINAL`, `metrics 0/0 server loss=2.5 (summary)
metrics 1/0 train acc=0.5 (summary)
metrics 1/0 server loss=NaN n=1 (summary)
metrics 2/0 train acc=0.001 it's=3 (summary)`},
		{"central evaluation of the legacy API", ProgramServerApp, `INFO :      initial parameters (loss, other metrics): 2.3, {'accuracy': 0.1}
INFO :      fit progress: (1, 1.5, {'accuracy': 0.6}, 12.25)`, `metrics 0/0 server accuracy=0.1 loss=2.3
metrics 1/0 server accuracy=0.6 loss=1.5`},
		{"a MetricRecord that the app prints itself is none of a round", ProgramServerApp, "INFO :      MetricRecord: {'x': 1.0}", ""},
		{"an exception while another is handled: the last one counts", ProgramServerApp, `Traceback (most recent call last):
  File "a.py", line 1, in f
KeyError: 'x'

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "a.py", line 3, in f
ValueError: no x`, `app-exception "ValueError: no x", 3 lines`},
		{"log lines of a thread inside of a traceback", ProgramServerApp, `Traceback (most recent call last):
INFO :      [ROUND 2]
  File "a.py", line 1, in f
KeyError: 'x'
INFO :      next`, `round 2/0
app-exception 2/0 "KeyError: 'x'", 4 lines`},
		{"two exceptions one after the other", ProgramServerApp, "Traceback (most recent call last):\n  File\nA: 1\nTraceback (most recent call last):\n  File\nB", `app-exception "A: 1", 3 lines
app-exception "B", 3 lines`},
		{"a traceback that is cut off", ProgramServerApp, "Traceback (most recent call last):\n  File", ""},
		{"a supernode's own trouble is a warning", ProgramSupernode, "Traceback (most recent call last):\n  File\nOSError: x\nend", `warning "OSError: x", 3 lines`},
		{"a node that comes back is counted once", ProgramSuperlink, "INFO :      [Fleet.ActivateNode] Activated node_id=5\nINFO :      [Fleet.ActivateNode] Activated node_id=5\nINFO :      [Fleet.CreateNode] Created node_id=-6", "node-ready\nnode-ready"},
		{"a round that is no number", ProgramServerApp, "INFO :      [ROUND 99999999999999999999]", "round"},
	} {
		got, _ := parse(c.program, c.log)
		if s := strings.Join(got, "\n"); s != c.want {
			t.Errorf("%s: got\n%s\nwant\n%s", c.name, s, c.want)
		}
	}
}

func TestPlain(t *testing.T) {
	for in, want := range map[string]string{
		"\x1b[92mINFO \x1b[0m:  x": "INFO :  x", "\x1b]0;title\x07y": "y", "\x1b[2K\x1b[1Gz": "z", "no": "no", "\x1b": "\x1b", "\x1b[": "", "ü\x1b[0m": "ü",
	} {
		if got := plain(in); got != want {
			t.Errorf("plain(%q) = %q, want %q", in, got, want)
		}
	}
}

// Any lines give finite events, and the same lines the same events.
func FuzzParser(f *testing.F) {
	files, err := filepath.Glob("testdata/logs/*.txt")
	if err != nil {
		f.Fatal(err)
	}
	for _, name := range files {
		raw, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		for i := range 3 {
			f.Add(string(raw), i)
		}
	}
	f.Fuzz(func(t *testing.T, log string, program int) {
		name := []string{ProgramSuperlink, ProgramSupernode, ProgramServerApp}[(program%3+3)%3]
		a, n := parse(name, log)
		b, m := parse(name, log)
		if !slices.Equal(a, b) || n != m {
			t.Errorf("two readings differ: %q, %q", a, b)
		}
		if lines := strings.Count(log, "\n") + 1; n > lines {
			t.Errorf("%d signs of progress in %d lines", n, lines)
		}
	})
}

// A literal that parses ends within the text.
func FuzzLiteral(f *testing.F) {
	for _, s := range []string{"{'a': [(1, 0.5), (2, np.float64(1e3))]}", `{"x": nan, 'y': -inf, 'z': None}`, "[[[[", "tensor(1., dtype=torch.float64)", `'\`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		v, rest, err := parseLiteral(s)
		if err == nil && !strings.HasSuffix(s, rest) {
			t.Errorf("parseLiteral(%q) = %v, rest %q", s, v, rest)
		}
		numbers(v)
	})
}
