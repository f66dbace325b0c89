// Command parity runs the same apps on plain Flower and by `pergola run`, version by version, and compares what they write down:
// each client's numbers and settings exactly, aggregates to 1e-9 (plain Flower itself adds replies in the order of their arrival).
// The outcome is the table in docs/flower-versions.md. A version that fails does not keep the others from running; the exit status
// tells.
//
// It measures no more than wall time: phases and memory are for test/bench. `make parity` calls it; start reading at [main], then
// corpus.go (what runs), records.go (what is compared) and table.go.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/pergolafl/pergola/internal/flower"
	"github.com/pergolafl/pergola/internal/pyenv"
	"github.com/pergolafl/pergola/test/internal/plain"
)

const sites = 2 // with three, the order of replies would show in the last bits of every later number

// runLimit keeps one run that hangs from holding up the others.
const runLimit = 5 * time.Minute

type options struct {
	pergola, apps, doc, cache string
	versions                  []string
	keep                      bool
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stderr)
	stop()
	switch {
	case errors.Is(err, flag.ErrHelp):
	case err != nil:
		fmt.Fprintln(os.Stderr, "parity:", err)
		os.Exit(1)
	}
}

func parse(args []string, stderr io.Writer) (o options, err error) {
	var only string
	f := flag.NewFlagSet("parity", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.StringVar(&o.pergola, "pergola", "bin/pergola", "the `binary` to compare")
	f.StringVar(&o.apps, "apps", "test/apps", "the `folder` of the apps")
	f.StringVar(&o.doc, "doc", "docs/flower-versions.md", "the `file` whose table is written anew, if all versions ran; empty writes none")
	f.StringVar(&o.cache, "cache", pyenv.DefaultCache(), "`folder` for environments")
	f.StringVar(&only, "only", "", "`versions` instead of all, separated by commas; the document is left as it is")
	f.BoolVar(&o.keep, "keep", false, "keep the folders of all runs, not only of those that failed")
	if err := f.Parse(args); err != nil {
		return o, err
	}
	if f.NArg() > 0 {
		return o, fmt.Errorf("no further arguments, please: %q", f.Args())
	}
	o.versions = versions
	if only != "" {
		o.versions, o.doc = strings.Split(only, ","), ""
	}
	for _, path := range []*string{&o.pergola, &o.apps} {
		if *path, err = filepath.Abs(*path); err != nil {
			return o, err
		}
	}
	return o, nil
}

func run(ctx context.Context, args []string, stderr io.Writer) error {
	o, err := parse(args, stderr)
	if err != nil {
		return err
	}
	work, err := os.MkdirTemp("", "pergola-parity.")
	if err != nil {
		return err
	}
	var rows []row
	var failed []string
	for i, v := range o.versions {
		r := o.version(ctx, v, filepath.Join(work, v), stderr)
		if ctx.Err() != nil {
			return errors.Join(context.Cause(ctx), os.RemoveAll(work))
		}
		rows = append(rows, r)
		verdict := "equal"
		if !r.ok() {
			failed = append(failed, v)
			verdict = "FAILED"
		}
		fmt.Fprintf(stderr, "flwr %s (%d of %d): %s\n", v, i+1, len(o.versions), verdict)
	}
	if o.keep || len(failed) > 0 {
		fmt.Fprintln(stderr, "the runs are in", work)
	} else if err := os.RemoveAll(work); err != nil {
		return err
	}
	if o.doc != "" {
		if err := writeDoc(o.doc, rows); err != nil {
			return err
		}
	}
	if len(failed) > 0 {
		return fmt.Errorf("%d of %d versions failed: %s", len(failed), len(o.versions), strings.Join(failed, ", "))
	}
	return nil
}

// version runs what the corpus has for a version, both ways.
func (o options) version(ctx context.Context, v, dir string, stderr io.Writer) row {
	r := row{version: v}
	for _, c := range corpus {
		if !c.fits(v) {
			continue
		}
		res := result{app: c.app}
		began := time.Now()
		err := o.both(ctx, c, v, filepath.Join(dir, c.app), &r, &res, stderr)
		if err != nil {
			res.problem = err.Error()
			fmt.Fprintf(stderr, "flwr %s, %s: %v\n", v, c.app, err)
		} else {
			fmt.Fprintf(stderr, "flwr %s, %s: equal; plain %.0f s, pergola %.0f s, in all %.0f s\n", v, c.app, res.plain.Seconds(), res.pergola.Seconds(), time.Since(began).Seconds())
			if !o.keep {
				err = os.RemoveAll(filepath.Join(dir, c.app))
			}
			if err != nil {
				fmt.Fprintln(stderr, err)
			}
		}
		r.results = append(r.results, res)
	}
	return r
}

// both runs one app both ways and compares. What differs is an error.
func (o options) both(ctx context.Context, c entry, v, dir string, r *row, res *result, stderr io.Writer) error {
	app, err := flower.LoadApp(filepath.Join(o.apps, c.app))
	if err != nil {
		return err
	}
	python, err := plain.Environment(ctx, o.cache, app, v, stderr)
	if err != nil {
		return err
	}
	inst, err := flower.Probe(ctx, flower.Env{Bin: filepath.Dir(python), Python: python}, "")
	if err != nil {
		return err
	}
	r.generation, r.wire = inst.Caps.Generation.String(), inst.Caps.FleetWire()

	ctx, cancel := context.WithTimeoutCause(ctx, 2*runLimit, errors.New("it took too long"))
	defer cancel()
	records := map[string]string{"plain": filepath.Join(dir, "plain-records"), "pergola": filepath.Join(dir, "pergola-records")}
	for _, d := range records {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	var overrides []string
	if plain.AtLeast(v, 1, 11) {
		overrides = c.overrides
	}
	began := time.Now()
	err = plain.Run(ctx, plain.Options{
		Version: v, Python: python, App: app, Dir: filepath.Join(dir, "plain"), Sites: sites, RunConfig: overrides, NodeConfig: c.node,
		Env: []string{recordsVar + "=" + records["plain"]},
	})
	res.plain = time.Since(began)
	if err != nil {
		return fmt.Errorf("plain Flower: %w", err)
	}
	began = time.Now()
	err = o.runPergola(ctx, c, v, filepath.Join(dir, "pergola"), records["pergola"], overrides)
	res.pergola = time.Since(began)
	if err != nil {
		return err
	}
	return compare(records["plain"], records["pergola"], c.expect(v))
}

// runPergola runs an app as a user does. Half of the overrides go by a file.
func (o options) runPergola(ctx context.Context, c entry, v, dir, records string, overrides []string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	args := []string{"run", filepath.Join(o.apps, c.app), "--flwr", v, "--sites", fmt.Sprint(sites), "--engine", "flower", "--json", "--out", filepath.Join(dir, "out")}
	if n := len(overrides) / 2; n > 0 {
		file := filepath.Join(dir, "overrides.toml")
		if err := os.WriteFile(file, []byte(strings.Join(overrides[:n], "\n")+"\n"), 0o644); err != nil {
			return err
		}
		args = append(args, "--run-config", file, "--run-config", strings.Join(overrides[n:], " "))
	}
	cmd := exec.CommandContext(ctx, o.pergola, args...)
	cmd.Env = slices.Concat(os.Environ(), []string{recordsVar + "=" + records, "PERGOLA_CACHE=" + o.cache})
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGINT) } // it cleans up after itself
	cmd.WaitDelay = time.Minute
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C comes from here alone, once
	events, err := os.Create(filepath.Join(dir, "events.jsonl"))
	if err != nil {
		return err
	}
	defer events.Close()
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = io.MultiWriter(events, &out), &out
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("pergola: %w; it last said: %s", err, tail(out.String()))
	}
	return nil
}

func tail(s string) string { return s[max(0, len(s)-1000):] }
