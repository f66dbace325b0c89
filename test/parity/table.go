package main

import (
	"fmt"
	"os"
	"runtime"
	"strings"
	"time"
)

// row is a version's line in the table.
type row struct {
	version, generation, wire string
	results                   []result
}

// result is what came of one app.
type result struct {
	app            string
	plain, pergola time.Duration
	problem        string // "" = it ran both ways and the numbers are equal
}

func (r row) ok() bool {
	for _, res := range r.results {
		if res.problem != "" {
			return false
		}
	}
	return len(r.results) > 0
}

// The table stands between these lines; the rest of the document is written by hand.
const (
	tableBegin = "<!-- begin: written by make parity -->"
	tableEnd   = "<!-- end: written by make parity -->"
)

func writeDoc(path string, rows []row) error {
	raw, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	before, rest, ok := strings.Cut(string(raw), tableBegin)
	_, after, ok2 := strings.Cut(rest, tableEnd)
	if !ok || !ok2 {
		return fmt.Errorf("%s lacks the lines %q and %q", path, tableBegin, tableEnd)
	}
	return os.WriteFile(path, []byte(before+tableBegin+"\n"+table(rows, runtime.NumCPU())+tableEnd+after), 0o644)
}

func table(rows []row, cores int) string {
	var b strings.Builder
	fmt.Fprintf(&b, "Measured on %d cores, %d sites, 2 rounds; seconds from nothing to the end, environments already built.\n\n", cores, sites)
	b.WriteString("| flwr | generation | Fleet wire | app | runs | numbers equal to plain Flower | plain, s | Pergola, s |\n|---|---|---|---|---|---|---:|---:|\n")
	for _, r := range rows {
		for _, res := range r.results {
			runs, equal := "yes", "yes"
			switch {
			case res.problem == "":
			case res.pergola > 0 && !strings.HasPrefix(res.problem, "pergola:"):
				equal = "no: " + cell(res.problem)
			default:
				runs, equal = "no: "+cell(res.problem), "–"
			}
			fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %s | %.0f | %.0f |\n", r.version, r.generation, r.wire, res.app, runs, equal, res.plain.Seconds(), res.pergola.Seconds())
		}
	}
	return b.String()
}

// cell makes the first line of a text fit into a table.
func cell(s string) string {
	s, _, _ = strings.Cut(s, "\n")
	return strings.ReplaceAll(s, "|", "/")
}
