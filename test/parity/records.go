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

// Kinds of records.
const (
	client         = "client"        // what a client computed
	server         = "server"        // what the strategy made of it
	nodeSettings   = "node-config"   // as a client app got it
	clientSettings = "client-config" // the run config as a client app got it
	serverSettings = "server-config" // and as the server app did
)

type kinds map[string]bool

// aggregateError is how far aggregates may differ: the order of a sum shows in the last bits.
const aggregateError = 1e-9

// record is a line; keys are in order, so that equal ones are equal as text.
type record struct {
	kind, text string
	fields     map[string]any
}

func readRecords(dir string) ([]record, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.jsonl"))
	if err != nil {
		return nil, err
	}
	var all []record
	for _, name := range files {
		raw, err := os.ReadFile(name)
		if err != nil {
			return nil, err
		}
		lines := bufio.NewScanner(bytes.NewReader(raw))
		for lines.Scan() {
			r := record{text: lines.Text()}
			if err := json.Unmarshal(lines.Bytes(), &r.fields); err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
			r.kind, _ = r.fields["kind"].(string)
			all = append(all, r)
		}
		if err := lines.Err(); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
	slices.SortFunc(all, func(a, b record) int { return strings.Compare(a.order(), b.order()) })
	return all, nil
}

// order brings the records of two runs side by side, even where their numbers differ.
func (r record) order() string {
	return fmt.Sprintf("%s %v %v %v %s", r.kind, r.fields["round"], r.fields["at"], r.fields["partition"], r.text)
}

// compare tells how the records of two runs differ, nil if they do not. Kinds that are not wanted are left out; those that are must
// be there.
func compare(plainDir, pergolaDir string, want kinds) error {
	a, err := readRecords(plainDir)
	if err != nil {
		return err
	}
	b, err := readRecords(pergolaDir)
	if err != nil {
		return err
	}
	other := func(r record) bool { return !want[r.kind] }
	a, b = slices.DeleteFunc(a, other), slices.DeleteFunc(b, other)
	for kind := range want {
		if !slices.ContainsFunc(a, func(r record) bool { return r.kind == kind }) {
			return fmt.Errorf("plain Flower left no records of kind %s", kind)
		}
	}
	if len(a) != len(b) {
		return fmt.Errorf("plain Flower left %d records, pergola %d", len(a), len(b))
	}
	for i := range a {
		if a[i].text == b[i].text || a[i].kind == server && b[i].kind == server && near(a[i].fields, b[i].fields) {
			continue
		}
		return fmt.Errorf("plain Flower has %s, pergola %s", a[i].text, b[i].text)
	}
	return nil
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
