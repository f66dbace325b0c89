package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// An event is one line of `pergola run --json`; the body's form depends on the kind.
type event struct {
	Time  time.Time       `json:"time"`
	Kind  string          `json:"kind"`
	Party string          `json:"party"`
	Job   string          `json:"job"`
	Body  json.RawMessage `json:"body"`
}

// body has the fields of all kinds that are read here.
type body struct {
	Name  string `json:"name"`  // program-started
	Round int    `json:"round"` // round
	Line  string `json:"line"`  // log
	To    string `json:"to"`    // job-state
	State string `json:"state"` // summary
	Cause *struct {
		Code    string `json:"code"`
		Party   string `json:"party"`
		Message string `json:"message"`
	} `json:"cause"` // summary
}

// take advances the clock by an event and gives how the job ended when the event is the summary.
func (c *clock) take(e event) (state string, err error) {
	var b body
	if len(e.Body) > 0 {
		if err := json.Unmarshal(e.Body, &b); err != nil {
			return "", fmt.Errorf("event %s: %w", e.Kind, err)
		}
	}
	switch e.Kind {
	case "program-started": // the server app has its name from what Flower calls it in that version
		if b.Name == "flwr" || strings.HasPrefix(b.Name, "flwr-run") || strings.Contains(strings.ReplaceAll(b.Name, "-", ""), "serverapp") {
			c.begin(e.Time)
		}
	case "sites-ready": // where no program of ours starts the run, it is asked for now
		c.begin(e.Time)
	case "round":
		c.round(e.Time, b.Round)
	case "log":
		if e.Party == "hub" || e.Party == "" {
			c.line(e.Time, b.Line)
		}
	case "job-state":
		switch {
		case b.To == "running":
			c.begin(e.Time)
		case b.To == "stopping" && c.end.IsZero():
			c.end = e.Time
		}
	case "summary":
		if b.Cause != nil {
			return fmt.Sprintf("%s: %s (%s at %q)", b.State, b.Cause.Message, b.Cause.Code, b.Cause.Party), nil
		}
		return b.State, nil
	}
	return "", nil
}

// follow reads the events of one run to their end.
func follow(r io.Reader, c *clock) (state string, err error) {
	err = events(r, func(e event) error {
		s, err := c.take(e)
		if s != "" {
			state = s
		}
		return err
	})
	if err != nil {
		return "", err
	}
	return state, nil
}

// events gives each event of a run to take, until the run ends.
func events(r io.Reader, take func(event) error) error {
	var bad error
	err := eachLine(r, func(line string) {
		var e event
		if strings.TrimSpace(line) == "" || bad != nil {
			return
		}
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			bad = fmt.Errorf("not an event: %q: %w", line, err)
			return
		}
		bad = take(e)
	})
	return errors.Join(bad, err)
}

// eachLine reads to the end.
func eachLine(r io.Reader, take func(string)) error {
	for lines := bufio.NewReader(r); ; {
		line, err := lines.ReadString('\n')
		if line != "" {
			take(line)
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// runPergola measures one `pergola run`.
func runPergola(ctx context.Context, o options, version, python, dir string) (m measure, err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return m, err
	}
	args := []string{"run", o.app, "--json", "--engine", o.engine, "--sites", strconv.Itoa(o.sites), "--out", filepath.Join(dir, "out")}
	for _, word := range o.runConfig {
		args = append(args, "--run-config", word)
	}
	if o.samePython {
		args = append(args, "--python", python)
	} else {
		args = append(args, "--flwr", version)
	}
	cmd := exec.CommandContext(ctx, o.pergola, args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGINT) } // it cleans up after itself
	cmd.WaitDelay = time.Minute
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C comes from here alone, once
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return m, err
	}
	c := clock{start: time.Now()}
	if err := cmd.Start(); err != nil {
		return m, err
	}
	watching, stop := context.WithCancel(ctx)
	defer stop()
	peak := &peaks{exe: o.pergola, of: map[int]process{}}
	var all sync.WaitGroup
	all.Go(func() { peak.watch(watching) })
	state, followErr := follow(stdout, &c)
	if followErr != nil { // it must not block on a full pipe
		_, _ = io.Copy(io.Discard, stdout)
	}
	waitErr := cmd.Wait()
	gone := time.Now()
	stop()
	all.Wait()
	if err := errors.Join(waitErr, followErr); err != nil || state != "succeeded" {
		return m, fmt.Errorf("the run ended %q: %w\n%s", state, err, stderr.Bytes())
	}
	m, err = c.measure(o.rounds, gone)
	m.memory = peak.byRole()
	return m, err
}

type process struct {
	role  string
	bytes int64
}

// peaks collects the high-water mark of every process that runs exe. A runner may not be a descendant
// of the command any more, so it is the program that counts.
type peaks struct {
	exe string
	of  map[int]process // only the watcher touches it until it is done
}

// watch looks every 100 ms: the mark is kept by the kernel, so only what is allocated in a process's
// last 100 ms is missed.
func (p *peaks) watch(ctx context.Context) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		p.look()
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (p *peaks) look() {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return // no /proc, no figures
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		dir := filepath.Join("/proc", e.Name())
		if exe, err := os.Readlink(filepath.Join(dir, "exe")); err != nil || exe != p.exe {
			continue // another program, or gone meanwhile
		}
		status, err := os.ReadFile(filepath.Join(dir, "status"))
		if err != nil {
			continue
		}
		cmdline, err := os.ReadFile(filepath.Join(dir, "cmdline"))
		if err != nil {
			continue
		}
		if n, ok := highWater(status); ok {
			p.of[pid] = process{role: role(cmdline), bytes: max(n, p.of[pid].bytes)}
		}
	}
}

// highWater gives VmHWM of a /proc/PID/status in bytes; a zombie has none.
func highWater(status []byte) (int64, bool) {
	for line := range strings.Lines(string(status)) {
		if value, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kib, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
			return kib << 10, err == nil
		}
	}
	return 0, false
}

// role is the subcommand: the first argument that is no flag.
func role(cmdline []byte) string {
	words := strings.Split(string(cmdline), "\x00")
	for _, w := range words[1:] {
		if w != "" && !strings.HasPrefix(w, "-") {
			return w
		}
	}
	return "pergola"
}

// byRole gives the largest process of each role.
func (p *peaks) byRole() map[string]int64 {
	m := map[string]int64{}
	for _, v := range p.of {
		m[v.role] = max(m[v.role], v.bytes)
	}
	return m
}
