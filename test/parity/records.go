package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// recordsVar names the variable with the folder that the apps of the corpus write their records to, a line each.
const recordsVar = "PARITY_OUT"

// Kinds of records. Those of the apps for docs/flower-versions.md have the settings as kinds of their own, the others as observations.
const (
	client         = "client"        // what a client computed
	server         = "server"        // what the server app saw and made of it, in its order
	seen           = "seen"          // an observation: it has a name ("check"), and who made it
	nodeSettings   = "node-config"   // as a client app got it
	clientSettings = "client-config" // the run config as a client app got it
	serverSettings = "server-config" // and as the server app did
)

// Checks that every app has; an observation is a check by its own name.
const (
	numbersCheck    = "what clients compute"
	aggregatesCheck = "what the server sees and computes"
	orderCheck      = "order of the server's steps"
)

// checks in the order of the tables, as far as it matters; observations follow by name.
var checks = []string{numbersCheck, orderCheck, aggregatesCheck}

// aggregateError is how far aggregates may differ: the order of a sum shows in the last bits.
const aggregateError = 1e-9

// record is a line; keys are in order, so that equal ones are equal as text.
type record struct {
	kind, text string
	fields     map[string]any
}

func (r record) str(key string) string {
	s, _ := r.fields[key].(string)
	return s
}

// readRecords reads what the processes of a run wrote: first the server's in its order, then the others', sorted.
func readRecords(dir string) ([]record, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.jsonl"))
	if err != nil {
		return nil, err
	}
	var ordered, sorted []record
	for _, name := range files {
		all, err := readFile(name)
		if err != nil {
			return nil, err
		}
		for _, r := range all {
			if r.kind == server {
				ordered = append(ordered, r)
			} else {
				sorted = append(sorted, r)
			}
		}
	}
	slices.SortFunc(sorted, func(a, b record) int { return strings.Compare(a.order(), b.order()) })
	return append(ordered, sorted...), nil
}

func readFile(name string) (all []record, err error) {
	raw, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	lines := bufio.NewScanner(bytes.NewReader(raw))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		r := record{text: lines.Text()}
		if err := json.Unmarshal(lines.Bytes(), &r.fields); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		r.kind = r.str("kind")
		all = append(all, r)
	}
	return all, lines.Err()
}

func writeFile(name string, all []record) error {
	var b strings.Builder
	for _, r := range all {
		b.WriteString(r.text + "\n")
	}
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	return os.WriteFile(name, []byte(b.String()), 0o644)
}

// place tells which records of two runs belong together.
func (r record) place() string {
	return fmt.Sprintf("%s %v %v %v %v %v %v", r.kind, r.fields["check"], r.fields["who"], r.fields["round"], r.fields["at"], r.fields["type"], r.fields["partition"])
}

// order brings the records of two runs side by side, even where their numbers differ.
func (r record) order() string { return r.place() + " " + r.text }

// check is the name under which a record is compared.
func (r record) check() string {
	switch r.kind {
	case client:
		return numbersCheck
	case server:
		return aggregatesCheck
	case seen:
		return r.str("check")
	}
	return r.kind
}

// difference is one record that two runs do not have in common; one side is empty where the record is missing.
type difference struct {
	Check string
	Plain string `json:",omitempty"`
	Other string `json:",omitempty"`
	Known string `json:",omitempty"` // the reason, where it is a known one
}

// compare tells how the records of a run differ from those of plain Flower, check by check, and which checks there were.
func compare(plain, other []record) (diffs []difference, names []string) {
	add := func(check, a, b string) { diffs = append(diffs, difference{Check: check, Plain: a, Other: b}) }
	group := func(all []record) map[string][]record {
		m := map[string][]record{}
		for _, r := range all {
			m[r.check()] = append(m[r.check()], r)
		}
		return m
	}
	a, b := group(plain), group(other)
	for name := range a {
		names = append(names, name)
	}
	for name := range b {
		if a[name] == nil {
			names = append(names, name)
		}
	}
	slices.SortFunc(names, byCheck)
	for _, name := range names {
		if name == aggregatesCheck {
			if x, y := steps(a[name]), steps(b[name]); x != y {
				add(orderCheck, x, y)
				continue // line by line nothing belongs together
			}
			for i := range a[name] {
				if !near(a[name][i].fields, b[name][i].fields) {
					add(name, a[name][i].text, b[name][i].text)
				}
			}
			continue
		}
		for x, y := a[name], b[name]; len(x) > 0 || len(y) > 0; {
			switch {
			case len(x) == 0 || len(y) > 0 && y[0].place() < x[0].place():
				add(name, "", y[0].text)
				y = y[1:]
			case len(y) == 0 || x[0].place() < y[0].place():
				add(name, x[0].text, "")
				x = x[1:]
			default:
				if x[0].text != y[0].text {
					add(name, x[0].text, y[0].text)
				}
				x, y = x[1:], y[1:]
			}
		}
	}
	if i := slices.Index(names, aggregatesCheck); i >= 0 {
		names = slices.Insert(names, i, orderCheck)
	}
	return diffs, names
}

func byCheck(a, b string) int {
	rank := func(s string) int {
		if i := slices.Index(checks, s); i >= 0 {
			return i
		}
		return len(checks)
	}
	if d := rank(a) - rank(b); d != 0 {
		return d
	}
	return strings.Compare(a, b)
}

// steps is the sequence of what the server app did.
func steps(all []record) string {
	var b []string
	for _, r := range all {
		step := r.str("at")
		if rnd, ok := r.fields["round"]; ok {
			step += fmt.Sprintf(" %v", rnd)
		}
		b = append(b, step)
	}
	return strings.Join(b, ", ")
}

// near compares values from JSON, numbers to [aggregateError].
func near(a, b any) bool {
	switch a := a.(type) {
	case float64:
		b, ok := b.(float64)
		return ok && math.Abs(a-b) <= aggregateError
	case []any:
		b, ok := b.([]any)
		return ok && slices.EqualFunc(a, b, near)
	case map[string]any:
		b, ok := b.(map[string]any)
		if !ok || len(a) != len(b) {
			return false
		}
		for k, v := range a {
			if w, has := b[k]; !has || !near(v, w) {
				return false
			}
		}
		return true
	}
	return a == b
}
