package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/pergolafl/pergola/internal/proc"
)

const grace = 10 * time.Second

var requirement = regexp.MustCompile(`^[A-Za-z0-9._-]+`)

// readApp fills in what the app says of itself. Of the run config it overrides what the app has.
func (o *options) readApp() error {
	var app struct {
		Project struct{ Dependencies []string }
		Tool    struct {
			Flwr struct {
				App struct{ Config map[string]any }
			}
		}
	}
	text, err := os.ReadFile(filepath.Join(o.app, "pyproject.toml"))
	if err != nil {
		return err
	}
	if err := toml.Unmarshal(text, &app); err != nil {
		return fmt.Errorf("%s: %w", o.app, err)
	}
	o.dependencies = app.Project.Dependencies
	for _, want := range []struct {
		key   string
		value int
	}{{"num-server-rounds", o.rounds}, {"clients", o.sites}, {"min-sites", o.sites}} {
		if _, has := app.Tool.Flwr.App.Config[want.key]; has {
			o.runConfig = append(o.runConfig, fmt.Sprintf("%s=%d", want.key, want.value))
		}
	}
	return nil
}

// environment gives the interpreter of plain Flower's environment for a version, built if need be with
// the app's own dependencies and compiled bytecode (without it each of Flower's processes imports for
// seconds, which would flatter Pergola).
func environment(ctx context.Context, o options, version string, stderr io.Writer) (string, error) {
	want := []string{"flwr==" + version}
	for _, d := range o.dependencies {
		if requirement.FindString(d) != "flwr" {
			want = append(want, d)
		}
	}
	dir := filepath.Join(o.cache, "flwr-"+version+"-"+filepath.Base(o.app))
	python, stamp := filepath.Join(dir, "bin", "python"), filepath.Join(dir, "requirements.txt")
	list := strings.Join(want, "\n") + "\n"
	if have, err := os.ReadFile(stamp); err == nil && string(have) == list {
		return python, nil
	}
	fmt.Fprintln(stderr, "building the environment of plain flwr", version)
	steps := [][]string{
		{"python3", "-m", "venv", "--clear", dir},
		append([]string{python, "-m", "pip", "install", "-q", "--disable-pip-version-check"}, want...),
	}
	if uv, err := exec.LookPath("uv"); err == nil {
		steps = [][]string{
			{uv, "venv", "-q", "--clear", "--python", "python3", dir},
			append([]string{uv, "pip", "install", "-q", "--compile-bytecode", "--python", python}, want...),
		}
	}
	for _, args := range steps {
		cmd := exec.CommandContext(ctx, args[0], args[1:]...)
		cmd.Stdout, cmd.Stderr = stderr, stderr
		if err := cmd.Run(); err != nil {
			return "", fmt.Errorf("%s: %w", strings.Join(args, " "), err)
		}
	}
	return python, os.WriteFile(stamp, []byte(list), 0o644)
}

func freePorts(n int) ([]int, error) {
	var ports []int
	for range n {
		ln, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // loopback, at once
		if err != nil {
			return nil, err
		}
		defer ln.Close() //nolint:revive // all are held until the last is found, so that none is given twice
		addr, ok := ln.Addr().(*net.TCPAddr)
		if !ok {
			return nil, fmt.Errorf("%v is not a TCP address", ln.Addr())
		}
		ports = append(ports, addr.Port)
	}
	return ports, nil
}

func local(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }

// runPlain does by hand what a reader of Flower's documentation does, for versions from 1.26 on.
func runPlain(ctx context.Context, o options, version, python, dir string) (m measure, err error) {
	app := filepath.Join(dir, "app") // `flwr run` of some versions writes into the app
	if err := os.CopyFS(app, os.DirFS(o.app)); err != nil {
		return m, err
	}
	ports, err := freePorts(3 + o.sites)
	if err != nil {
		return m, err
	}
	bin := filepath.Dir(python)
	env := append(os.Environ(), "FLWR_HOME="+dir, "FLWR_TELEMETRY_ENABLED=0", "PATH="+bin+":"+os.Getenv("PATH"))
	link := []string{"--serverappio-api-address", local(ports[0]), "--fleet-api-address", local(ports[1]), "--control-api-address", local(ports[2])}
	fleet, control := ports[1], ports[2]
	node := func(i int) []string { return []string{"--clientappio-api-address", local(ports[3+i])} }
	if atLeast(version, 1, 40) { // everything on one HTTP port
		link = []string{"--disable-runtime-dependency-installation", "--host", "127.0.0.1", "--port", strconv.Itoa(ports[0])}
		fleet, control = ports[0], ports[0]
		node = func(i int) []string { return []string{"--host", "127.0.0.1", "--port", strconv.Itoa(ports[3+i])} }
	}
	config := fmt.Sprintf("[superlink]\ndefault = \"local\"\n[superlink.local]\naddress = %q\ninsecure = true\n", local(control))
	if err := os.WriteFile(filepath.Join(dir, "config.toml"), []byte(config), 0o644); err != nil {
		return m, err
	}

	var running []*proc.Process
	start := func(name string, onLine func(string), args ...string) (*proc.Process, error) {
		p, err := proc.Start(proc.Spec{
			Name: name, Args: append([]string{filepath.Join(bin, name)}, args...), Dir: dir, Env: env,
			Log: filepath.Join(dir, fmt.Sprintf("%s-%d.log", name, len(running))), OnLine: onLine,
		})
		if err == nil {
			running = append(running, p)
		}
		return p, err
	}
	stopAll := func() {
		var all sync.WaitGroup
		for _, p := range running {
			all.Go(func() { p.Stop(grace) })
		}
		all.Wait()
	}
	defer stopAll()

	c := clock{start: time.Now()}
	superlink, err := start("flower-superlink", nil, append([]string{"--insecure"}, link...)...)
	if err != nil {
		return m, err
	}
	for i := range o.sites {
		args := append([]string{"--insecure", "--superlink", local(fleet), "--node-config", fmt.Sprintf("partition-id=%d num-partitions=%d", i, o.sites)}, node(i)...)
		if _, err := start("flower-supernode", nil, args...); err != nil {
			return m, err
		}
	}
	if err := serving(ctx, superlink, local(control)); err != nil {
		return m, err
	}
	c.begin(time.Now())
	flwr, err := start("flwr", func(line string) { c.line(time.Now(), line) }, "run", app, "local", "--stream", "--run-config", strings.Join(o.runConfig, " "))
	if err != nil {
		return m, err
	}
	select {
	case <-flwr.Done(): // the clock is complete: every line was handed over before
	case <-ctx.Done():
		return m, context.Cause(ctx)
	}
	stopAll()
	m, err = c.measure(o.rounds, time.Now())
	if err != nil {
		return m, fmt.Errorf("%w; flwr run (%v) said:\n%s", err, flwr.Exit(), strings.Join(flwr.Tail(20), "\n"))
	}
	return m, nil
}

// serving waits until addr takes connections. The kernel has no way to tell when a port opens, so it
// tries every 20 ms, which is the error of what is measured.
func serving(ctx context.Context, p *proc.Process, addr string) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "tcp", addr)
		if err == nil {
			return conn.Close()
		}
		select {
		case <-tick.C:
		case <-p.Done():
			return fmt.Errorf("the superlink ended: %v\n%s", p.Exit(), strings.Join(p.Tail(20), "\n"))
		case <-ctx.Done():
			return errors.Join(context.Cause(ctx), err)
		}
	}
}

// atLeast tells whether a version such as "1.41.0" is major.minor or later.
func atLeast(version string, major, minor int) bool {
	var a, b int
	if _, err := fmt.Sscanf(version, "%d.%d", &a, &b); err != nil {
		return false
	}
	return a > major || a == major && b >= minor
}
