// Command parity runs the apps of a corpus on plain Flower and by `pergola run` with each engine, version by version, and compares
// what they write down: each client's numbers and what each party could observe exactly, aggregates to 1e-9 (plain Flower itself
// adds replies in the order of their arrival). The outcome is the tables in docs/flower-versions.md (every generation of Flower's
// programs) and docs/parity.md (every generation of its Python API, the whole corpus, both engines). A run that fails does not keep
// the others from running; the exit status tells.
//
// What plain Flower gave is kept in testdata/plain (--update records it anew), so that `make test` can compare with it in seconds.
//
// It measures no more than wall time: phases and memory are for test/bench. `make parity` calls it; start reading at [main], then
// corpus.go (what runs), cell.go (how), records.go (what is compared), known.go (what may differ, and why), table.go.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/pergolafl/pergola/internal/pyenv"
)

type options struct {
	pergola, root, docs, cache, results string
	versions, engines                   []string
	apps                                string // pattern
	jobs                                int
	keep, update, recorded, all         bool
	stderr                              io.Writer
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	switch {
	case errors.Is(err, flag.ErrHelp):
	case err != nil:
		fmt.Fprintln(os.Stderr, "parity:", err)
		os.Exit(1)
	}
}

func parse(args []string, stderr io.Writer) (o options, err error) {
	var only, engines string
	f := flag.NewFlagSet("parity", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.StringVar(&o.pergola, "pergola", "bin/pergola", "the `binary` to compare")
	f.StringVar(&o.root, "root", "test", "the `folder` with apps and parity/apps")
	f.StringVar(&o.docs, "docs", "docs", "the `folder` whose tables are written anew, if everything ran; empty writes none")
	f.StringVar(&o.cache, "cache", pyenv.DefaultCache(), "`folder` for environments")
	f.StringVar(&only, "only", "", "`versions` instead of all, separated by commas")
	f.StringVar(&o.apps, "apps", "*", "`pattern` of the entries to run, such as privacy.* or probe")
	f.StringVar(&engines, "engines", "flower,native", "Pergola's `engines`")
	f.IntVar(&o.jobs, "jobs", 3, "`runs` side by side; the versions' table, which has times, is made one by one")
	f.StringVar(&o.results, "results", "", "a `file` that gets each outcome as it comes, and whose good ones are not run again")
	f.BoolVar(&o.recorded, "recorded", false, "compare with what was recorded of plain Flower, do not run it")
	f.BoolVar(&o.update, "update", false, "record plain Flower anew, and run nothing else")
	f.BoolVar(&o.keep, "keep", false, "keep the folders of all runs, not only of those that failed")
	if err := f.Parse(args); err != nil {
		return o, err
	}
	if f.NArg() > 0 || o.jobs < 1 {
		return o, fmt.Errorf("no further arguments, please, and at least one run at once: %q", f.Args())
	}
	if _, err := path.Match(o.apps, ""); err != nil {
		return o, fmt.Errorf("--apps %s: %w", o.apps, err)
	}
	o.versions, o.engines, o.stderr = versions, strings.Split(engines, ","), stderr
	for _, e := range o.engines {
		if e != flowerEngine && e != nativeEngine {
			return o, fmt.Errorf("--engines: %q is neither %s nor %s", e, flowerEngine, nativeEngine)
		}
	}
	if only != "" {
		o.versions = strings.Split(only, ",")
	}
	for _, v := range o.versions {
		if !slices.Contains(versions, v) {
			return o, fmt.Errorf("--only: %s is none of %s", v, strings.Join(versions, ", "))
		}
	}
	o.all = only == "" && o.apps == "*" && len(o.engines) == 2
	for _, path := range []*string{&o.pergola, &o.root} {
		if *path, err = filepath.Abs(*path); err != nil {
			return o, err
		}
	}
	return o, nil
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	o, err := parse(args, stderr)
	if err != nil {
		return err
	}
	work, err := os.MkdirTemp("", "pergola-parity.")
	if err != nil {
		return err
	}
	good, err := o.earlier()
	if err != nil {
		return err
	}
	outcomes, err := o.cells(ctx, work, good)
	if err != nil {
		return errors.Join(err, os.RemoveAll(work))
	}
	failed := slices.ContainsFunc(outcomes, func(c outcome) bool { return !c.ok() })
	if o.keep || failed {
		fmt.Fprintln(stderr, "the runs are in", work)
	} else if err := os.RemoveAll(work); err != nil {
		return err
	}
	if o.update {
		if failed {
			return errors.New("plain Flower failed")
		}
		return nil
	}
	fmt.Fprint(stdout, fidelityTable(outcomes))
	if o.docs != "" && o.all {
		if err := writeDocs(o.docs, outcomes); err != nil {
			return err
		}
	}
	var bad []string
	for _, c := range outcomes {
		if !c.ok() {
			bad = append(bad, c.Version+" "+c.App)
		}
	}
	if len(bad) > 0 {
		return fmt.Errorf("%d of %d failed: %s", len(bad), len(outcomes), strings.Join(bad, ", "))
	}
	return nil
}

// cells runs all that was asked for, version by version: first what is timed, one by one, then the others side by side.
func (o options) cells(ctx context.Context, work string, good map[string]outcome) (outcomes []outcome, err error) {
	var mu sync.Mutex // guards outcomes and the file of results
	for _, v := range o.versions {
		one := func(e entry) {
			c, done := good[v+" "+e.name()]
			if !done {
				c = o.cell(ctx, v, e, filepath.Join(work, v, e.name()))
			}
			mu.Lock()
			defer mu.Unlock()
			if ctx.Err() != nil {
				return
			}
			outcomes = append(outcomes, c)
			if !done {
				fmt.Fprintln(o.stderr, c)
				err = errors.Join(err, o.note(c))
			}
		}
		var side []entry
		for _, e := range corpus {
			if ok, _ := path.Match(o.apps, e.name()); !ok || !e.fits(v) { // parse has looked at the pattern
				continue
			}
			if (o.update || o.recorded) && !slices.Contains(fidelity, v) {
				continue // what is recorded is for the comparison with the native engine
			}
			if e.versions && !o.update {
				one(e)
			} else {
				side = append(side, e)
			}
		}
		var all sync.WaitGroup
		slots := make(chan struct{}, o.jobs)
		for _, e := range side {
			slots <- struct{}{}
			all.Go(func() {
				defer func() { <-slots }()
				one(e)
			})
		}
		all.Wait()
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
	}
	slices.SortStableFunc(outcomes, func(a, b outcome) int {
		if d := slices.Index(versions, a.Version) - slices.Index(versions, b.Version); d != 0 {
			return d
		}
		return a.rank() - b.rank()
	})
	return outcomes, err
}

// earlier reads the good outcomes of earlier calls with the same file of results.
func (o options) earlier() (map[string]outcome, error) {
	good := map[string]outcome{}
	if o.results == "" {
		return good, nil
	}
	raw, err := os.ReadFile(o.results)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	for line := range strings.Lines(string(raw)) {
		var c outcome
		if err := json.Unmarshal([]byte(line), &c); err != nil {
			return nil, fmt.Errorf("%s: %w", o.results, err)
		}
		if c.ok() {
			good[c.Version+" "+c.App] = c
		}
	}
	return good, nil
}

func (o options) note(c outcome) error {
	if o.results == "" {
		return nil
	}
	f, err := os.OpenFile(o.results, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	raw, err := json.Marshal(c)
	if err == nil {
		_, err = f.Write(append(raw, '\n'))
	}
	return errors.Join(err, f.Close())
}
