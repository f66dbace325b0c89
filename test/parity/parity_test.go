package main

import (
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/pergolafl/pergola/internal/flower"
)

func TestCompare(t *testing.T) {
	write := func(lines ...string) []record {
		t.Helper()
		dir := t.TempDir()
		for i, l := range lines { // each process has a file of its own
			if err := os.WriteFile(filepath.Join(dir, string(rune('a'+i))+".jsonl"), []byte(l+"\n"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		all, err := readRecords(dir)
		if err != nil {
			t.Fatal(err)
		}
		return all
	}
	const (
		one  = `{"kind": "client", "round": 1, "partition": 0, "loss": 0.1}`
		two  = `{"kind": "client", "round": 1, "partition": 1, "loss": 0.2}`
		sum  = `{"kind": "server", "at": "fit", "round": 1, "loss": 0.30000000000000004, "w": [1.0]}`
		next = `{"kind": "server", "at": "fit", "round": 2, "loss": 0.2, "w": [1.0]}`
		node = `{"kind": "node-config", "values": {"a": 1}}`
		look = `{"kind": "seen", "check": "globals", "who": "client 0", "at": "first", "calls": 1}`
		main = `{"kind": "seen", "check": "main thread", "who": "client 0", "main": true}`
	)
	for _, c := range []struct {
		name    string
		plain   []string
		pergola []string
		want    []string // "check|part of what pergola has"
	}{
		{"the same, its clients in another order", []string{one, two, sum}, []string{two, one, sum}, nil},
		{"an aggregate's last bits", []string{one, sum}, []string{one, strings.Replace(sum, "0.30000000000000004", "0.3", 1)}, nil},
		{"a client's last bits", []string{one, sum}, []string{strings.Replace(one, "0.1", "0.10000000000000002", 1), sum}, []string{numbersCheck + "|0.10000000000000002"}},
		{"an aggregate that differs", []string{one, sum}, []string{one, strings.Replace(sum, "[1.0]", "[1.00001]", 1)}, []string{aggregatesCheck + "|1.00001"}},
		{"an aggregate without a value", []string{one, sum}, []string{one, `{"kind": "server", "at": "fit", "round": 1}`}, []string{aggregatesCheck + "|server"}},
		{"a client less", []string{one, two, sum}, []string{one, sum}, []string{numbersCheck + "|"}},
		{"a client more", []string{one, sum}, []string{one, two, sum}, []string{numbersCheck + "|0.2"}},
		{"rounds in another order", []string{sum, next}, []string{next, sum}, []string{orderCheck + "|fit 2, fit 1"}},
		{"a round less", []string{sum, next}, []string{sum}, []string{orderCheck + "|fit 1"}},
		{"1 is not 1.0", []string{node}, []string{strings.Replace(node, "1}", "1.0}", 1)}, []string{nodeSettings + `|"a": 1.0`}},
		{"an observation", []string{look, main}, []string{strings.Replace(look, "1}", "2}", 1), main}, []string{`globals|"calls": 2`}},
		{"an observation that was not made", []string{look, main}, []string{look}, []string{"main thread|"}},
		{"an observation of something new", []string{main}, []string{main, look}, []string{"globals|calls"}},
	} {
		diffs, names := compare(write(c.plain...), write(c.pergola...))
		if len(diffs) != len(c.want) {
			t.Errorf("%s: %+v", c.name, diffs)
			continue
		}
		for i, d := range diffs {
			check, part, _ := strings.Cut(c.want[i], "|")
			if d.Check != check || !strings.Contains(d.Other, part) || (part == "") != (d.Other == "") || !slices.Contains(names, check) {
				t.Errorf("%s: %+v among %q", c.name, d, names)
			}
		}
	}
	for _, c := range []struct {
		powers bool
		was    string // the loss of the first client
		left   int
	}{{true, "0.10000000000000002", 0}, {false, "0.10000000000000002", 1}, {true, "0.10001", 1}, {true, `"0.1"`, 1}} {
		diffs, _ := compare(write(one, two), write(strings.Replace(one, "0.1", c.was, 1), two))
		if left := (entry{powers: c.powers}).onOneMachine(diffs); len(left) != c.left {
			t.Errorf("a record of another machine with %s, of powers: %t: %+v", c.was, c.powers, left)
		}
	}
	if diffs, _ := compare(write(one, two), write(one)); len((entry{powers: true}).onOneMachine(diffs)) != 1 {
		t.Error("a client less was taken")
	}
	bad := t.TempDir()
	if err := os.WriteFile(filepath.Join(bad, "a.jsonl"), []byte("Traceback\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := readRecords(bad); err == nil {
		t.Error("what is not JSON was taken")
	}
	if _, err := (entry{last: "fit 2"}).whole(t.TempDir()); err == nil {
		t.Error("no records at all were taken")
	}
}

func TestKnown(t *testing.T) {
	old := differences
	defer func() { differences = old }()
	differences = []known{{app: "probe", check: "globals", engine: nativeEngine, from: 20, until: 41, shows: `{"calls": 2}`, reason: "why"}}
	d := difference{Check: "globals", Plain: `{"kind": "seen", "at": "first", "calls": 1}`, Other: `{"kind": "seen", "at": "first", "calls": 2}`}
	for _, c := range []struct {
		name                 string
		app, engine, version string
		other                string
		open                 int
	}{
		{"as it is known", "probe", nativeEngine, "1.30.0", "", 0},
		{"another app", "raises", nativeEngine, "1.30.0", "", 1},
		{"another engine", "probe", flowerEngine, "1.30.0", "", 1},
		{"before", "probe", nativeEngine, "1.18.0", "", 1},
		{"after", "probe", nativeEngine, "1.41.0", "", 1},
		{"another value", "probe", nativeEngine, "1.30.0", `{"kind": "seen", "at": "first", "calls": 3}`, 1},
		{"another field", "probe", nativeEngine, "1.30.0", `{"kind": "seen", "at": "second", "calls": 2}`, 1},
		{"a field more", "probe", nativeEngine, "1.30.0", `{"kind": "seen", "at": "first", "calls": 2, "x": null}`, 1},
		{"nothing", "probe", nativeEngine, "1.30.0", `null`, 1},
	} {
		e := d
		if c.other != "" {
			e.Other = c.other
		}
		all := []difference{e}
		if open := mark(c.app, c.engine, c.version, all); open != c.open || (all[0].Known == "why") != (open == 0) {
			t.Errorf("%s: %d open, %+v", c.name, open, all)
		}
	}
	for _, k := range old {
		if k.check == "" || k.reason == "" {
			t.Errorf("a known difference without check or reason: %+v", k)
		}
	}
}

func TestTables(t *testing.T) {
	outcomes := []outcome{
		{Version: "1.8.0", App: "record-classic", Generation: "module", Wire: "gRPC", Plain: 19.4, Engines: map[string]result{flowerEngine: {Seconds: 17, Checks: []string{"a"}}}},
		{Version: "1.41.0", App: "record", Generation: "http", Wire: "HTTP", Plain: 1, Engines: map[string]result{
			flowerEngine: {Seconds: 2, Checks: []string{"a", "b"}, Open: 1, Differences: []difference{{Check: "a", Plain: "{1|2}\n", Other: "3"}}},
			nativeEngine: {Seconds: 1, Checks: []string{"a", "b"}, Differences: []difference{{Check: "a", Plain: "1", Other: "2", Known: "it is quicker"}}},
		}},
		{Version: "1.41.0", App: "record-message", Engines: map[string]result{flowerEngine: {Problem: "pergola: exit status 1"}}},
		{Version: "1.41.0", App: "probe", Problem: "plain Flower: no"},
	}
	dir := t.TempDir()
	for _, name := range []string{"flower-versions.md", "parity.md"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("head\n"+tableBegin+"\nold\n"+tableEnd+"\ntail\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := writeDocs(dir, outcomes); err != nil {
		t.Fatal(err)
	}
	for name, wants := range map[string][]string{
		"flower-versions.md": {
			"head\n" + tableBegin + "\nMeasured on", "| 1.8.0 | module | gRPC | record-classic | yes | yes | 19 | 17 |\n", "| yes | no: a: plain Flower has {1/2} | 1 | 2 |",
			"| no: pergola: exit status 1 | – |", tableEnd + "\ntail\n",
		},
		"parity.md": {"| app | 1.41.0 flower | 1.41.0 native |", "| record | 1 equal, **1 differ** | 1 equal, 1 known |", "| **failed** |", "| probe | **plain Flower failed** |", "* **a**, native engine (record): it is quicker.", "did not run", "not compared"},
	} {
		raw, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range wants {
			if !strings.Contains(string(raw), want) {
				t.Errorf("%s lacks %q:\n%s", name, want, raw)
			}
		}
		if strings.Contains(string(raw), "old") {
			t.Errorf("%s: the old table is still there", name)
		}
	}
	if !outcomes[0].ok() || outcomes[1].ok() || outcomes[2].ok() || outcomes[3].ok() {
		t.Error("what failed is not told")
	}
	if err := os.WriteFile(filepath.Join(dir, "parity.md"), []byte("no marks\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if writeDocs(dir, outcomes) == nil {
		t.Error("a document without marks was written")
	}
}

// Every version has something to run; what the corpus names is there, with plain Flower's records of it.
func TestCorpus(t *testing.T) {
	o, err := parse([]string{"--root", ".."}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range o.versions {
		if !slices.ContainsFunc(corpus, func(e entry) bool { return e.fits(v) }) {
			t.Errorf("nothing runs on %s", v)
		}
	}
	recording := ""
	for _, c := range corpus {
		app, err := flower.LoadApp(c.dir(o.root))
		if err != nil {
			t.Fatal(err)
		}
		if err := app.Override(slices.Concat(c.overrides, c.pace)); err != nil {
			t.Errorf("%s: %v", c.name(), err)
		}
		text := string(app.Pyproject)
		for k, v := range c.node {
			if !strings.Contains(text, "\n"+k+" = "+v+"\n") {
				t.Errorf("%s: its node config lacks %s = %s", c.name(), k, v)
			}
		}
		for _, v := range fidelity {
			if !c.fits(v) {
				continue
			}
			all, err := readFile(o.golden(v, c))
			if err != nil {
				t.Errorf("no record of plain Flower (make it with --update): %v", err)
				continue
			}
			if s := steps(slices.DeleteFunc(all, func(r record) bool { return r.kind != server })); !strings.HasSuffix(s, c.last) {
				t.Errorf("the record of plain Flower %s on %s is not whole: %s", v, c.name(), s)
			}
		}
		if c.versions || c.app == "probe" {
			continue
		}
		raw, err := os.ReadFile(filepath.Join(app.Dir, "recording.py"))
		if err != nil {
			t.Fatal(err)
		}
		if recording == "" {
			recording = string(raw)
		}
		if string(raw) != recording {
			t.Errorf("%s writes its records in its own way", c.name())
		}
	}
}

func TestFlags(t *testing.T) {
	if o, err := parse([]string{"--only", "1.30.0,1.41.0"}, io.Discard); err != nil || len(o.versions) != 2 || o.all {
		t.Errorf("--only: %+v, %v", o, err)
	}
	for _, args := range [][]string{{"1.30.0"}, {"--only", "1.31.7"}, {"--engines", "steam"}, {"--apps", "["}, {"--jobs", "0"}} {
		if _, err := parse(args, io.Discard); err == nil {
			t.Errorf("%q was taken", args)
		}
	}
	// What is in the file of results is not run again, unless it failed.
	file := filepath.Join(t.TempDir(), "results")
	o := options{results: file}
	for _, c := range []outcome{{Version: "1.30.0", App: "probe"}, {Version: "1.41.0", App: "probe", Problem: "x"}} {
		if err := o.note(c); err != nil {
			t.Fatal(err)
		}
	}
	if good, err := o.earlier(); err != nil || len(good) != 1 || good["1.30.0 probe"].App != "probe" {
		t.Errorf("%+v, %v", good, err)
	}
}
