// Command bench runs one app through plain Flower (its own superlink and supernodes, started here) and
// through `pergola run`, in turn, and prints where the time goes: until the run begins, until the first
// round, per round, from the last round to the end, in total. It prints the ratio, what Pergola adds
// in seconds, and the peak memory of each Pergola process.
//
// It builds each side's environment before it measures and does not count a first run of either. It
// compares time, not numbers: that both give the same results is for the parity tests. `make bench` calls
// it; start reading at [main], then plain.go and pergola.go. With "link" as its first argument it measures the
// link alone, beside what limits it (link.go; `make bench-link`), with "hub" a hub with up to 1,000 sites (hub.go; `make bench-hub`). With
// "small", "large", "clients", "idle" or "messages" it measures the native engine beside plain Flower, or beside Flower's simulation
// engine (native.go); "native" is all five, "all" the above and them.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/pergolafl/pergola/internal/flower"
	"github.com/pergolafl/pergola/internal/pyenv"
	"github.com/pergolafl/pergola/test/internal/plain"
)

// The goals of the flower engine, from its first release on.
const (
	goalOverhead = 1.0 // seconds that Pergola adds to what Flower itself takes, in total
	goalMemory   = 60  // MiB that a Pergola process takes at most
)

type options struct {
	pergola, app, cache, engine string
	versions                    []string
	runs, rounds, sites         int
	samePython, check           bool
	runConfig                   []string    // of the app
	loaded                      *flower.App // app, read
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	var err error
	switch args := os.Args[1:]; {
	case len(args) > 0 && args[0] == "link":
		err = runLink(ctx, args[1:], os.Stdout, os.Stderr)
	case len(args) > 0 && args[0] == "hub":
		err = runHub(ctx, args[1:], os.Stdout, os.Stderr)
	case len(args) > 0 && args[0] == hubChildName: // started by the one above
		err = hubMain(ctx, args[1:], os.Stdout)
	case len(args) > 0 && (args[0] == "native" || slices.ContainsFunc(benchmarks, func(b benchmark) bool { return b.name == args[0] })):
		err = runNative(ctx, args[0], args[1:], os.Stdout, os.Stderr)
	case len(args) > 0 && args[0] == "all":
		if err = run(ctx, nil, os.Stdout, os.Stderr); err == nil {
			err = runNative(ctx, "native", args[1:], os.Stdout, os.Stderr)
		}
	default:
		err = run(ctx, args, os.Stdout, os.Stderr)
	}
	stop()
	switch {
	case errors.Is(err, flag.ErrHelp):
	case err != nil:
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	o, err := parse(args, stderr)
	if err != nil {
		return err
	}
	work, err := os.MkdirTemp("", "pergola-bench.")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work) //nolint:errcheck // scratch space: what cannot be removed hinders nobody
	missed := false
	for _, version := range o.versions {
		python, err := plain.Environment(ctx, o.cache, o.loaded, version, stderr)
		if err != nil {
			return fmt.Errorf("environment for flwr %s: %w", version, err)
		}
		var byHand, pergola []measure
		for i := range o.runs + 1 { // the first of each fills caches and is not counted
			a, err := runPlain(ctx, o, version, python, filepath.Join(work, fmt.Sprintf("plain-%s-%d", version, i)))
			if err != nil {
				return fmt.Errorf("plain flwr %s: %w", version, err)
			}
			b, err := runPergola(ctx, o, version, python, filepath.Join(work, fmt.Sprintf("pergola-%s-%d", version, i)))
			if err != nil {
				return fmt.Errorf("pergola with flwr %s: %w", version, err)
			}
			fmt.Fprintf(stderr, "flwr %s, run %d of %d: plain %.2f s, pergola %.2f s%s\n", version, i, o.runs,
				a.total.Seconds(), b.total.Seconds(), map[bool]string{true: " (not counted)"}[i == 0])
			if i > 0 {
				byHand, pergola = append(byHand, a), append(pergola, b)
			}
		}
		if !report(stdout, o, version, byHand, pergola) {
			missed = true
		}
	}
	if missed && o.check {
		return errors.New("a goal was missed")
	}
	return nil
}

func parse(args []string, stderr io.Writer) (options, error) {
	var o options
	var versions string
	f := flag.NewFlagSet("bench", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.StringVar(&o.pergola, "pergola", "bin/pergola", "the `binary` to measure")
	f.StringVar(&o.app, "app", "test/apps/tiny", "the app's `folder`; it has the run config num-server-rounds")
	f.StringVar(&o.cache, "cache", pyenv.DefaultCache(), "`folder` for environments, the same for both sides")
	f.StringVar(&o.engine, "engine", "flower", "Pergola's `engine`")
	f.StringVar(&versions, "flwr", "1.30.0,1.41.0", "flwr `versions`, separated by commas")
	f.IntVar(&o.runs, "runs", 3, "counted runs of each side")
	f.IntVar(&o.rounds, "rounds", 3, "rounds per run")
	f.IntVar(&o.sites, "sites", 2, "sites, or supernodes")
	f.BoolVar(&o.samePython, "same-python", false, "let Pergola use plain Flower's environment (--python) instead of its own")
	f.BoolVar(&o.check, "check", false, "end with status 1 when a goal is missed")
	if err := f.Parse(args); err != nil {
		return o, err
	}
	o.versions = strings.Split(versions, ",")
	if f.NArg() > 0 || o.runs < 1 || o.rounds < 1 || o.sites < 1 {
		return o, errors.New("no further arguments, please, and at least one run, round and site")
	}
	for _, path := range []*string{&o.pergola, &o.app, &o.cache} {
		abs, err := filepath.Abs(*path)
		if err != nil {
			return o, err
		}
		*path = abs
	}
	return o, o.readApp()
}
