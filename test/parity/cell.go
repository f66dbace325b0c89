package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/pergolafl/pergola/internal/flower"
	"github.com/pergolafl/pergola/test/internal/plain"
)

// runLimit keeps one run that hangs from holding up the others.
const runLimit = 15 * time.Minute

// outcome is what came of one entry on one version.
type outcome struct {
	Version, App     string
	Generation, Wire string
	Problem          string            // what kept all engines from being compared: plain Flower did not run
	Plain            float64           // seconds; 0 = the recorded run was taken
	Engines          map[string]result `json:",omitempty"`
}

// result is what came of it on one engine.
type result struct {
	Seconds     float64
	Problem     string       // it did not run
	Checks      []string     // what was compared
	Differences []difference // from plain Flower, known ones too
	Open        int          // how many of them are not known
}

func (r result) ok() bool { return r.Problem == "" && r.Open == 0 }

func (c outcome) ok() bool {
	for _, r := range c.Engines {
		if !r.ok() {
			return false
		}
	}
	return c.Problem == ""
}

// rank is the entry's place in the corpus.
func (c outcome) rank() int {
	return slices.IndexFunc(corpus, func(e entry) bool { return e.name() == c.App })
}

func (c outcome) String() string {
	s := fmt.Sprintf("flwr %s, %s: plain %.0f s", c.Version, c.App, c.Plain)
	if c.Problem != "" {
		s += ", " + c.Problem
	}
	for _, name := range []string{flowerEngine, nativeEngine} {
		r, ok := c.Engines[name]
		switch {
		case !ok:
		case r.Problem != "":
			s += fmt.Sprintf("; %s: %s", name, r.Problem)
		default:
			s += fmt.Sprintf("; %s %.1f s, %d checks, %d known differences, %d others", name, r.Seconds, len(r.Checks), len(r.Differences)-r.Open, r.Open)
			for _, d := range r.Differences {
				if d.Known == "" {
					s += fmt.Sprintf("\n  %s\n    plain:  %s\n    %s: %s", d.Check, d.Plain, name, d.Other)
				}
			}
		}
	}
	return s
}

// golden is where plain Flower's records of an entry are kept.
func (o options) golden(version string, e entry) string {
	return filepath.Join(o.root, "parity", "testdata", "plain", version, e.name()+".jsonl")
}

// cell runs an entry on plain Flower and on each engine, and compares.
func (o options) cell(ctx context.Context, v string, e entry, dir string) outcome {
	c := outcome{Version: v, App: e.name(), Engines: map[string]result{}}
	fail := func(err error) outcome {
		c.Problem = err.Error()
		return c
	}
	app, err := flower.LoadApp(e.dir(o.root))
	if err != nil {
		return fail(err)
	}
	var want []record
	if o.recorded {
		if want, err = readFile(o.golden(v, e)); err != nil {
			return fail(err)
		}
	} else {
		python, err := plain.Environment(ctx, o.cache, app, v, o.stderr)
		if err != nil {
			return fail(err)
		}
		inst, err := flower.Probe(ctx, flower.Env{Bin: filepath.Dir(python), Python: python}, "")
		if err != nil {
			return fail(err)
		}
		c.Generation, c.Wire = inst.Caps.Generation.String(), inst.Caps.FleetWire()
		began := time.Now()
		want, err = o.runPlain(ctx, app, python, e, v, filepath.Join(dir, plainFlower))
		c.Plain = time.Since(began).Seconds()
		if err != nil {
			return fail(fmt.Errorf("plain Flower: %w", err))
		}
		if o.update {
			if err := writeFile(o.golden(v, e), want); err != nil {
				return fail(err)
			}
			return c
		}
		if !e.versions {
			if err := o.asRecorded(v, e, want); err != nil {
				return fail(err)
			}
		}
	}
	for _, engine := range e.engines(v) {
		if !slices.Contains(o.engines, engine) {
			continue
		}
		c.Engines[engine] = o.against(ctx, want, engine, e, v, filepath.Join(dir, engine))
	}
	if c.ok() && !o.keep {
		if err := os.RemoveAll(dir); err != nil {
			return fail(err)
		}
	}
	return c
}

// asRecorded tells when plain Flower gives something else than what was recorded of it: an app that is not deterministic, or new packages.
func (o options) asRecorded(v string, e entry, found []record) error {
	old, err := readFile(o.golden(v, e))
	if err != nil {
		return fmt.Errorf("no record of plain Flower (make it with --update): %w", err)
	}
	diffs, _ := compare(old, found)
	if diffs = e.onOneMachine(diffs); len(diffs) > 0 {
		return fmt.Errorf("plain Flower differs from what was recorded of it: %s; recorded %s, now %s", diffs[0].Check, diffs[0].Plain, diffs[0].Other)
	}
	return nil
}

// onOneMachine leaves out of what differs from a record what may come of its having been made on another machine: clients' numbers to
// [aggregateError], where they begin with powers that the server has computed.
func (e entry) onOneMachine(diffs []difference) []difference {
	if !e.powers {
		return diffs
	}
	return slices.DeleteFunc(diffs, func(d difference) bool {
		var a, b any
		return d.Check == numbersCheck && json.Unmarshal([]byte(d.Plain), &a) == nil && json.Unmarshal([]byte(d.Other), &b) == nil && near(a, b)
	})
}

// against runs an entry by `pergola run` and compares with plain Flower's records.
func (o options) against(ctx context.Context, want []record, engine string, e entry, v, dir string) (r result) {
	began := time.Now()
	found, err := o.runPergola(ctx, engine, e, v, dir)
	r.Seconds = time.Since(began).Seconds()
	if err != nil {
		r.Problem = err.Error()
		return r
	}
	r.Differences, r.Checks = compare(want, found)
	if o.recorded {
		r.Differences = e.onOneMachine(r.Differences)
	}
	r.Open = mark(e.app, engine, v, r.Differences)
	return r
}

func (e entry) settings(v string) []string {
	if !plain.AtLeast(v, 1, 11) { // nothing to give them to
		return nil
	}
	return e.overrides
}

func recordsIn(dir string) (records string, err error) {
	records = filepath.Join(dir, "records")
	return records, os.MkdirAll(records, 0o755)
}

func (o options) runPlain(ctx context.Context, app *flower.App, python string, e entry, v, dir string) ([]record, error) {
	records, err := recordsIn(dir)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, runLimit, errors.New("it took too long"))
	defer cancel()
	if err := plain.Run(ctx, plain.Options{
		Version: v, Python: python, App: app, Dir: filepath.Join(dir, "run"), Sites: e.nodes(), RunConfig: e.settings(v), NodeConfig: e.node,
		Env: []string{recordsVar + "=" + records},
	}); err != nil {
		return nil, err
	}
	return e.whole(records)
}

// whole reads the records of a run that has come to its end: `flwr run` ends well even where the run did not.
func (e entry) whole(dir string) ([]record, error) {
	all, err := readRecords(dir)
	if err != nil {
		return nil, err
	}
	if steps := steps(slices.DeleteFunc(slices.Clone(all), func(r record) bool { return r.kind != server })); !strings.HasSuffix(steps, e.last) {
		return nil, fmt.Errorf("the server app did not come to its end, %q, but: %s", e.last, steps)
	}
	return all, nil
}

// runPergola runs an app as a user does. Half of the overrides go by a file.
func (o options) runPergola(ctx context.Context, engine string, e entry, v, dir string) ([]record, error) {
	records, err := recordsIn(dir)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, runLimit, errors.New("it took too long"))
	defer cancel()
	args := []string{"run", e.dir(o.root), "--flwr", v, "--engine", engine, "--sites", fmt.Sprint(e.nodes()), "--json", "--out", filepath.Join(dir, "out")}
	settings := e.settings(v)
	if n := len(settings) / 2; n > 0 {
		file := filepath.Join(dir, "overrides.toml")
		if err := os.WriteFile(file, []byte(strings.Join(settings[:n], "\n")+"\n"), 0o644); err != nil {
			return nil, err
		}
		args = append(args, "--run-config", file)
		settings = settings[n:]
	}
	if engine == nativeEngine { // Flower's own programs take their time, with Pergola as without
		settings = slices.Concat(settings, e.pace)
	}
	if len(settings) > 0 {
		args = append(args, "--run-config", strings.Join(settings, " "))
	}
	cmd := exec.CommandContext(ctx, o.pergola, args...)
	cmd.Dir = dir
	cmd.Env = slices.Concat(os.Environ(), []string{recordsVar + "=" + records, "PERGOLA_CACHE=" + o.cache})
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGINT) } // it cleans up after itself
	cmd.WaitDelay = time.Minute
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C comes from here alone, once
	events, err := os.Create(filepath.Join(dir, "events.jsonl"))
	if err != nil {
		return nil, err
	}
	defer events.Close()
	var out, errs bytes.Buffer // two: each is written by a goroutine of its own
	cmd.Stdout, cmd.Stderr = io.MultiWriter(events, &out), &errs
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("pergola: %w; it last said: %s%s", err, tail(out.String()), tail(errs.String()))
	}
	return e.whole(records)
}

func tail(s string) string { return s[max(0, len(s)-1000):] }
