package main

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pergolafl/pergola/internal/flower"
)

func TestCompare(t *testing.T) {
	write := func(lines ...string) string {
		dir := t.TempDir()
		for i, l := range lines { // each process has a file of its own
			if err := os.WriteFile(filepath.Join(dir, string(rune('a'+i))+".jsonl"), []byte(l+"\n"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return dir
	}
	const (
		one    = `{"kind": "client", "round": 1, "partition": 0, "loss": 0.1}`
		two    = `{"kind": "client", "round": 1, "partition": 1, "loss": 0.2}`
		sum    = `{"kind": "server", "round": 1, "loss": 0.30000000000000004, "w": [1.0]}`
		config = `{"kind": "node-config", "values": {"a": 1}}`
	)
	for _, c := range []struct {
		name    string
		plain   []string
		pergola []string
		want    string // part of the error; "" = equal
	}{
		{"the same in another order", []string{one, two, sum}, []string{sum, two, one}, ""},
		{"an aggregate's last bits", []string{one, sum}, []string{one, strings.Replace(sum, "0.30000000000000004", "0.3", 1)}, ""},
		{"a client's last bits", []string{one, sum}, []string{strings.Replace(one, "0.1", "0.10000000000000002", 1), sum}, "0.10000000000000002"},
		{"an aggregate that differs", []string{one, sum}, []string{one, strings.Replace(sum, "[1.0]", "[1.00001]", 1)}, "1.00001"},
		{"an aggregate without a value", []string{one, sum}, []string{one, `{"kind": "server", "round": 1}`}, "pergola"},
		{"a client less", []string{one, two, sum}, []string{one, sum}, "3 records, pergola 2"},
		{"nothing at all", []string{`{"kind": "other"}`}, nil, "no records of kind"},
		{"1 is not 1.0", []string{one, sum, config}, []string{one, sum, strings.Replace(config, "1}", "1.0}", 1)}, `"a": 1.0`},
		{"not JSON", []string{"Traceback"}, nil, "invalid"},
	} {
		want := kinds{client: true, server: true}
		if strings.HasPrefix(c.name, "1 is") {
			want[nodeSettings] = true
		}
		err := compare(write(c.plain...), write(c.pergola...), want)
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

func TestTable(t *testing.T) {
	rows := []row{
		{"1.8.0", "module", "gRPC", []result{{"a", 19400 * time.Millisecond, 17 * time.Second, ""}}},
		{"1.41.0", "http", "HTTP", []result{{"a", time.Second, 2 * time.Second, "plain Flower has {1|2}\n, pergola 3"}, {"b", time.Second, time.Second, "pergola: exit status 1"}, {"c", time.Second, 0, "plain Flower: no"}}},
		{"1.99.0", "", "", nil},
	}
	path := filepath.Join(t.TempDir(), "doc.md")
	if err := os.WriteFile(path, []byte("head\n"+tableBegin+"\nold\n"+tableEnd+"\ntail\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := writeDoc(path, rows); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"head\n" + tableBegin + "\nMeasured on", "| 1.8.0 | module | gRPC | a | yes | yes | 19 | 17 |\n", "| yes | no: plain Flower has {1/2} | 1 | 2 |", "| no: pergola: exit status 1 | – |", "| c | no: plain Flower: no | – |",
		tableEnd + "\ntail\n",
	} {
		if !strings.Contains(string(raw), want) {
			t.Errorf("the document lacks %q:\n%s", want, raw)
		}
	}
	if strings.Contains(string(raw), "old") {
		t.Error("the old table is still there")
	}
	if !rows[0].ok() || rows[1].ok() || rows[2].ok() {
		t.Error("what failed is not told")
	}
	if err := os.WriteFile(path, []byte("no marks\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if writeDoc(path, rows) == nil {
		t.Error("a document without marks was written")
	}
}

// Every version has something to run, and what the corpus names is there: the node config of plain Flower is the app's own.
func TestCorpus(t *testing.T) {
	o, err := parse(nil, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range o.versions {
		n := 0
		for _, c := range corpus {
			if c.fits(v) {
				n++
			}
		}
		if n == 0 {
			t.Errorf("nothing runs on %s", v)
		}
	}
	for _, c := range corpus {
		app, err := flower.LoadApp(filepath.Join("../apps", c.app))
		if err != nil {
			t.Fatal(err)
		}
		if err := app.Override(c.overrides); err != nil {
			t.Errorf("%s: %v", c.app, err)
		}
		text := string(app.Pyproject)
		for k, v := range c.node {
			if !strings.Contains(text, "\n"+k+" = "+v+"\n") {
				t.Errorf("%s: its node config lacks %s = %s", c.app, k, v)
			}
		}
	}
	if o, err := parse([]string{"--only", "1.30.0,1.41.0"}, io.Discard); err != nil || len(o.versions) != 2 || o.doc != "" {
		t.Errorf("--only: %+v, %v", o, err)
	}
	if _, err := parse([]string{"1.30.0"}, io.Discard); err == nil {
		t.Error("an argument was taken")
	}
}
