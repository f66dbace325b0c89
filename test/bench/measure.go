package main

import (
	"fmt"
	"io"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"text/tabwriter"
	"time"
)

// A clock notes when a run reached what both sides have in common. The lines are those that Flower's
// strategies write on every version from 1.12 to 1.41.
type clock struct {
	start, app time.Time
	rounds     []time.Time // when round i+1 began
	end        time.Time   // the strategy is done
}

var (
	ansi      = regexp.MustCompile("\x1b\\[[0-9;]*m")
	roundLine = regexp.MustCompile(`\[ROUND (\d+)(?:/\d+)?\]`)
	endLine   = regexp.MustCompile(`\[SUMMARY\]|Strategy execution finished`)
)

// line takes what the server app wrote at a moment.
func (c *clock) line(at time.Time, line string) {
	line = ansi.ReplaceAllString(line, "")
	if m := roundLine.FindStringSubmatch(line); m != nil {
		if n, err := strconv.Atoi(m[1]); err == nil {
			c.round(at, n)
		}
	}
	if c.end.IsZero() && endLine.MatchString(line) {
		c.end = at
	}
}

// begin takes the moment at which the superlink serves and the run is asked for; the first counts.
func (c *clock) begin(at time.Time) {
	if c.app.IsZero() {
		c.app = at
	}
}

// round takes the begin of round n; a round that is told twice counts from the first time.
func (c *clock) round(at time.Time, n int) {
	if n == len(c.rounds)+1 {
		c.rounds = append(c.rounds, at)
	}
}

// A measure is one run, in phases that add up to the total.
type measure struct {
	app      time.Duration // from nothing until the superlink serves and the run is asked for
	first    time.Duration // from there to the first round
	perRound time.Duration // all rounds, divided by their number
	stop     time.Duration // from the strategy's end until every process was gone
	total    time.Duration
	memory   map[string]int64 // peak resident bytes by role, the largest process of each
}

// measure gives the phases of a run whose last process was gone at gone.
func (c *clock) measure(rounds int, gone time.Time) (measure, error) {
	switch {
	case len(c.rounds) != rounds:
		return measure{}, fmt.Errorf("saw %d rounds, want %d", len(c.rounds), rounds)
	case c.end.IsZero():
		return measure{}, fmt.Errorf("the strategy never said that it was done")
	case c.app.IsZero():
		return measure{}, fmt.Errorf("never saw the run begin")
	}
	return measure{
		app:      c.app.Sub(c.start),
		first:    c.rounds[0].Sub(c.app),
		perRound: c.end.Sub(c.rounds[0]) / time.Duration(rounds),
		stop:     gone.Sub(c.end),
		total:    gone.Sub(c.start),
	}, nil
}

// median gives the middle, or the mean of the two in the middle; values has at least one.
func median[T time.Duration | int64](values []T) T {
	s := slices.Sorted(slices.Values(values))
	if n := len(s); n%2 == 0 {
		return (s[n/2-1] + s[n/2]) / 2
	}
	return s[len(s)/2]
}

// report prints the table and tells whether the goals were met.
func report(w io.Writer, o options, version string, plain, pergola []measure) bool {
	fmt.Fprintf(w, "\nflwr %s, %d rounds, %d sites, engine %s: medians of %d runs each, in seconds\n", version, o.rounds, o.sites, o.engine, len(plain))
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "phase\tplain\tpergola\tadded\tratio\t")
	row := func(name string, of func(measure) time.Duration) float64 {
		pick := func(all []measure) float64 {
			var v []time.Duration
			for _, m := range all {
				v = append(v, of(m))
			}
			return median(v).Seconds()
		}
		a, b := pick(plain), pick(pergola)
		ratio := "-"
		if a > 0 {
			ratio = strconv.FormatFloat(b/a, 'f', 2, 64)
		}
		fmt.Fprintf(t, "%s\t%.2f\t%.2f\t%+.2f\t%s\t\n", name, a, b, b-a, ratio)
		return b - a
	}
	row("until the run begins", func(m measure) time.Duration { return m.app })
	row("to the first round", func(m measure) time.Duration { return m.first })
	row("per round", func(m measure) time.Duration { return m.perRound })
	row("stop", func(m measure) time.Duration { return m.stop })
	added := row("total", func(m measure) time.Duration { return m.total })
	t.Flush()

	memory := map[string][]int64{}
	for _, m := range pergola {
		for role, bytes := range m.memory {
			memory[role] = append(memory[role], bytes)
		}
	}
	largest := int64(0)
	fmt.Fprint(w, "peak memory, MiB:")
	for _, role := range slices.Sorted(maps.Keys(memory)) {
		m := median(memory[role])
		largest = max(largest, m)
		fmt.Fprintf(w, "  %s %.1f", role, float64(m)/(1<<20))
	}
	verdict := map[bool]string{true: "met", false: "missed"}
	quick, small := added <= goalOverhead, largest <= goalMemory<<20
	fmt.Fprintf(w, "\ngoals: at most %.1f s added: %s; at most %d MiB per process: %s\n", goalOverhead, verdict[quick], goalMemory, verdict[small])
	return quick && small
}
