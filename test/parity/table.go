package main

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
)

// Each table stands between these lines; the rest of a document is written by hand.
const (
	tableBegin = "<!-- begin: written by make parity -->"
	tableEnd   = "<!-- end: written by make parity -->"
)

func writeDocs(dir string, outcomes []outcome) error {
	if err := writeDoc(filepath.Join(dir, "flower-versions.md"), versionsTable(outcomes, runtime.NumCPU())); err != nil {
		return err
	}
	return writeDoc(filepath.Join(dir, "parity.md"), fidelityTable(outcomes))
}

func writeDoc(path, text string) error {
	raw, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	before, rest, ok := strings.Cut(string(raw), tableBegin)
	_, after, ok2 := strings.Cut(rest, tableEnd)
	if !ok || !ok2 {
		return fmt.Errorf("%s lacks the lines %q and %q", path, tableBegin, tableEnd)
	}
	return os.WriteFile(path, []byte(before+tableBegin+"\n"+text+tableEnd+after), 0o644)
}

func isForVersions(c outcome) bool { return c.rank() >= 0 && corpus[c.rank()].versions }

// versionsTable is the table of docs/flower-versions.md: every version, run by Flower's own programs.
func versionsTable(outcomes []outcome, cores int) string {
	var b strings.Builder
	fmt.Fprintf(&b, "Measured on %d cores, 2 sites, 2 rounds; seconds from nothing to the end, environments already built.\n\n", cores)
	b.WriteString("| flwr | generation | Fleet wire | app | runs | numbers equal to plain Flower | plain, s | Pergola, s |\n|---|---|---|---|---|---|---:|---:|\n")
	for _, c := range outcomes {
		if !isForVersions(c) {
			continue
		}
		r := c.Engines[flowerEngine]
		runs, equal := "yes", "yes"
		switch {
		case c.Problem != "":
			runs, equal = "no: "+cell(c.Problem), "–"
		case r.Problem != "":
			runs, equal = "no: "+cell(r.Problem), "–"
		case r.Open > 0:
			equal = "no: " + first(r)
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %s | %.0f | %.0f |\n", c.Version, c.Generation, c.Wire, c.App, runs, equal, c.Plain, r.Seconds)
	}
	return b.String()
}

// first tells the first difference that is not a known one.
func first(r result) string {
	i := slices.IndexFunc(r.Differences, func(d difference) bool { return d.Known == "" })
	d := r.Differences[i]
	return cell(fmt.Sprintf("%s: plain Flower has %s, Pergola %s", d.Check, d.Plain, d.Other))
}

// fidelityTable is the table of docs/parity.md: what was compared on which version and engine, and what differs.
func fidelityTable(outcomes []outcome) string {
	var columns []string
	for _, c := range outcomes {
		for _, e := range []string{flowerEngine, nativeEngine} {
			if _, ok := c.Engines[e]; ok && slices.Contains(fidelity, c.Version) && !slices.Contains(columns, c.Version+" "+e) {
				columns = append(columns, c.Version+" "+e)
			}
		}
	}
	var b strings.Builder
	b.WriteString("Each cell is the number of checks; *known* are those that differ for a reason below.\n\n")
	row := func(cells ...string) { fmt.Fprintf(&b, "| %s |\n", strings.Join(cells, " | ")) }
	row(append([]string{"app"}, columns...)...)
	fmt.Fprintf(&b, "|---|%s\n", strings.Repeat("---|", len(columns)))
	for _, e := range corpus {
		cells := []string{e.name()}
		some := false
		for _, column := range columns {
			version, engine, _ := strings.Cut(column, " ")
			i := slices.IndexFunc(outcomes, func(c outcome) bool { return c.Version == version && c.App == e.name() })
			text := ""
			if i >= 0 {
				if r, ok := outcomes[i].Engines[engine]; ok {
					text, some = r.summary(), true
				} else if outcomes[i].Problem != "" {
					text, some = "**plain Flower failed**", true
				}
			}
			cells = append(cells, text)
		}
		if some {
			row(cells...)
		}
	}

	b.WriteString("\nWhat differs, and why:\n\n")
	seenAlready := map[string]bool{}
	for _, c := range outcomes {
		for _, engine := range []string{flowerEngine, nativeEngine} {
			for _, d := range c.Engines[engine].Differences {
				line := fmt.Sprintf("* **%s**, %s engine (%s): %s.\n", d.Check, engine, c.App, d.Known)
				if d.Known == "" {
					line = fmt.Sprintf("* **not as it should be**, flwr %s, %s engine, %s, %s: plain Flower has `%s`, Pergola `%s`.\n", c.Version, engine, c.App, d.Check, d.Plain, d.Other)
				}
				if !seenAlready[line] {
					seenAlready[line] = true
					b.WriteString(line)
				}
			}
			if p := c.Engines[engine].Problem; p != "" {
				fmt.Fprintf(&b, "* **did not run**, flwr %s, %s engine, %s: %s.\n", c.Version, engine, c.App, cell(p))
			}
		}
		if c.Problem != "" {
			fmt.Fprintf(&b, "* **not compared**, flwr %s, %s: %s.\n", c.Version, c.App, cell(c.Problem))
		}
	}
	return b.String()
}

func (r result) summary() string {
	if r.Problem != "" {
		return "**failed**"
	}
	known := map[string]bool{}
	open := map[string]bool{}
	for _, d := range r.Differences {
		if d.Known == "" {
			open[d.Check] = true
		} else {
			known[d.Check] = true
		}
	}
	s := fmt.Sprintf("%d equal", len(r.Checks)-len(known)-len(open))
	if len(known) > 0 {
		s += fmt.Sprintf(", %d known", len(known))
	}
	if len(open) > 0 {
		s += fmt.Sprintf(", **%d differ**", len(open))
	}
	return s
}

// cell makes the first line of a text fit into a table.
func cell(s string) string {
	s, _, _ = strings.Cut(s, "\n")
	return strings.ReplaceAll(s, "|", "/")
}
