// Package plain runs an app on plain Flower, as a reader of Flower's own documentation does it by hand: a superlink, supernodes, and
// what starts the run, for each generation from 1.8 on. Benchmarks and the parity runs compare Pergola with it. It shares no code with
// the product's own way to start Flower (internal/flower, server.go and client.go), so that a mistake there is not made here too.
//
// Start with [Environment] and [Run].
package plain

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/pergolafl/pergola/internal/flower"
	"github.com/pergolafl/pergola/internal/proc"
	"github.com/pergolafl/pergola/internal/pyenv"
)

const grace = 10 * time.Second // for each program that is told to end

// Environment gives the interpreter of an environment with the app's dependencies and that version of Flower: the one that
// `pergola run --flwr` uses too, so that both sides run the same packages, with compiled bytecode (without it each of Flower's
// processes imports for seconds, which would flatter Pergola).
func Environment(ctx context.Context, cache string, app *flower.App, version string, progress io.Writer) (string, error) {
	in, err := pyenv.Find(ctx, "")
	if err != nil {
		return "", err
	}
	req := pyenv.Requirements{Names: app.Dependencies, Flwr: version, RequiresPython: app.RequiresPython}
	lock, err := pyenv.MakeLock(ctx, cache, in, req, pyenv.Options{})
	if err != nil {
		return "", err
	}
	phase := ""
	env, err := pyenv.Ensure(ctx, cache, in, lock, pyenv.Options{}, func(p pyenv.Progress) {
		if p.Phase != phase {
			phase = p.Phase
			fmt.Fprintf(progress, "environment of flwr %s: %s\n", version, phase)
		}
	})
	return env.Python, err
}

// Options say what to run.
type Options struct {
	Version    string
	Python     string // of the environment
	App        *flower.App
	Dir        string // for copies of the app, logs and Flower's home; it is made
	Sites      int
	RunConfig  []string          // pairs for --run-config; up to 1.12 they are written into the copy of the app, before 1.11 there is nothing for them
	NodeConfig map[string]string // further keys for each node, values as TOML
	Env        []string          // added to this process's own
	OnBegin    func()            // the superlink serves and the run is asked for
	OnLine     func(line string) // of the program that starts the run, which shows what the server app writes
}

// ports of the programs, each free when it was looked for.
type ports struct{ driver, fleet, control, spare int }

// Run runs the app to its end and ends all that it started. The error tells of a server app that failed, with its last words.
func Run(ctx context.Context, o Options) error {
	app := filepath.Join(o.Dir, "app") // `flwr run` of some versions writes into the app
	if err := os.CopyFS(app, os.DirFS(o.App.Dir)); err != nil {
		return err
	}
	free, err := freePorts(4 + o.Sites)
	if err != nil {
		return err
	}
	p := ports{free[0], free[1], free[2], free[3]}
	bin := filepath.Dir(o.Python)
	env := append(os.Environ(), "FLWR_HOME="+o.Dir, "FLWR_TELEMETRY_ENABLED=0", "PATH="+bin+":"+os.Getenv("PATH"))
	env = append(env, o.Env...)
	control, err := o.configure(app, &p)
	if err != nil {
		return err
	}

	var running []*proc.Process
	start := func(onLine func(string), args []string) (*proc.Process, error) {
		started, err := proc.Start(proc.Spec{
			Name: args[0], Args: append([]string{filepath.Join(bin, args[0])}, args[1:]...), Dir: o.Dir, Env: env,
			Log: filepath.Join(o.Dir, fmt.Sprintf("%s-%d.log", args[0], len(running))), OnLine: onLine,
		})
		if err == nil {
			running = append(running, started)
		}
		return started, err
	}
	stopAll := func() {
		var all sync.WaitGroup
		for _, r := range running {
			all.Go(func() { r.Stop(grace) })
		}
		all.Wait()
	}
	defer stopAll()

	superlink, err := start(nil, o.superlink(p))
	if err != nil {
		return err
	}
	for i := range o.Sites {
		if _, err := start(nil, o.supernode(app, i, p, free[4+i])); err != nil {
			return err
		}
	}
	if err := serving(ctx, superlink, local(control)); err != nil {
		return err
	}
	if o.OnBegin != nil {
		o.OnBegin()
	}
	starter, err := start(o.OnLine, o.starter(app, p))
	if err != nil {
		return err
	}
	select {
	case <-starter.Done(): // every line was handed over before
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if exit := starter.Exit(); !exit.OK() {
		return fmt.Errorf("%s ended with %v and said:\n%s", "what starts the run", exit, strings.Join(starter.Tail(20), "\n"))
	}
	return nil
}

// configure writes what the copy of the app and Flower's home need, and gives the port that tells that the superlink serves.
func (o Options) configure(app string, p *ports) (control int, err error) {
	switch {
	case !AtLeast(o.Version, 1, 11):
		return p.driver, nil
	case !AtLeast(o.Version, 1, 13):
		return p.driver, o.edit(app, func(flwr map[string]any) error { return o.override(flwr) })
	case !AtLeast(o.Version, 1, 26):
		return p.control, o.edit(app, func(flwr map[string]any) error {
			flwr["federations"] = map[string]any{"default": "local", "local": map[string]any{"address": local(p.control), "insecure": true}}
			return nil
		})
	case AtLeast(o.Version, 1, 40): // everything on one HTTP port
		p.fleet, p.control = p.driver, p.driver
	case AtLeast(o.Version, 1, 37): // Control and Runtime on one
		p.control = p.driver
	}
	config := fmt.Sprintf("[superlink]\ndefault = \"local\"\n[superlink.local]\naddress = %q\ninsecure = true\n", local(p.control))
	return p.control, os.WriteFile(filepath.Join(o.Dir, "config.toml"), []byte(config), 0o644)
}

// edit changes [tool.flwr] of the copy.
func (o Options) edit(app string, change func(flwr map[string]any) error) error {
	path := filepath.Join(app, "pyproject.toml")
	raw, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var doc map[string]any
	if err := toml.Unmarshal(raw, &doc); err != nil {
		return err
	}
	tool, _ := doc["tool"].(map[string]any)
	flwr, ok := tool["flwr"].(map[string]any)
	if !ok {
		return fmt.Errorf("%s has no [tool.flwr]", path)
	}
	if err := change(flwr); err != nil {
		return err
	}
	if raw, err = toml.Marshal(doc); err != nil {
		return err
	}
	return os.WriteFile(path, raw, 0o644)
}

// override writes the run config into the app's own, as its author would.
func (o Options) override(flwr map[string]any) error {
	values, err := flower.ParseRunConfig(o.RunConfig)
	if err != nil {
		return err
	}
	config := maps.Clone(o.App.Config)
	maps.Copy(config, values)
	app, ok := flwr["app"].(map[string]any)
	if !ok {
		return errors.New("the app has no [tool.flwr.app]")
	}
	app["config"] = config
	return nil
}

func (o Options) superlink(p ports) []string {
	args := []string{"flower-superlink", "--insecure"}
	switch v := o.Version; {
	case !AtLeast(v, 1, 9):
		return append(args, "--driver-api-address", local(p.driver), "--grpc-rere", "--grpc-rere-fleet-api-address", local(p.fleet))
	case !AtLeast(v, 1, 13):
		return append(args, "--driver-api-address", local(p.driver), "--fleet-api-address", local(p.fleet))
	case !AtLeast(v, 1, 21):
		return append(args, "--serverappio-api-address", local(p.driver), "--fleet-api-address", local(p.fleet), "--exec-api-address", local(p.control), "--simulationio-api-address", local(p.spare))
	case !AtLeast(v, 1, 36):
		args = append(args, "--serverappio-api-address", local(p.driver), "--fleet-api-address", local(p.fleet), "--control-api-address", local(p.control))
	case !AtLeast(v, 1, 37):
		args = append(args, "--host", "127.0.0.1", "--port", strconv.Itoa(p.driver), "--fleet-api-address", local(p.fleet), "--control-api-address", local(p.control))
	case !AtLeast(v, 1, 40):
		args = append(args, "--host", "127.0.0.1", "--port", strconv.Itoa(p.driver), "--fleet-api-address", local(p.fleet))
	default:
		args = append(args, "--host", "127.0.0.1", "--port", strconv.Itoa(p.driver))
	}
	if AtLeast(o.Version, 1, 34) {
		args = append(args, "--disable-runtime-dependency-installation")
	}
	return args
}

func (o Options) supernode(app string, i int, p ports, own int) []string {
	separator := " "
	if !AtLeast(o.Version, 1, 11) {
		separator = ","
	}
	node := []string{fmt.Sprintf("partition-id=%d", i), fmt.Sprintf("num-partitions=%d", o.Sites)}
	for _, k := range slices.Sorted(maps.Keys(o.NodeConfig)) {
		node = append(node, k+"="+o.NodeConfig[k])
	}
	config := strings.Join(node, separator)
	args := []string{"flower-supernode", "--insecure", "--superlink", local(p.fleet)}
	switch v := o.Version; {
	case !AtLeast(v, 1, 9):
		return []string{"flower-client-app", "--insecure", "--server", local(p.fleet), "--dir", app, o.App.ClientApp}
	case !AtLeast(v, 1, 10): // its supernode ends at once
		return []string{"flower-client-app", "--insecure", "--superlink", local(p.fleet), "--dir", app, o.App.ClientApp}
	case !AtLeast(v, 1, 11):
		return append(args, "--node-config", config, "--dir", app, o.App.ClientApp)
	case !AtLeast(v, 1, 13):
		return append(args, "--node-config", config, "--supernode-address", local(own), app)
	case !AtLeast(v, 1, 36):
		return append(args, "--node-config", config, "--clientappio-api-address", local(own))
	}
	return append(args, "--node-config", config, "--host", "127.0.0.1", "--port", strconv.Itoa(own))
}

// starter is what starts the run and ends with it.
func (o Options) starter(app string, p ports) []string {
	switch v := o.Version; {
	case !AtLeast(v, 1, 9):
		return []string{"flower-server-app", "--insecure", "--server", local(p.driver), "--dir", app, o.App.ServerApp}
	case !AtLeast(v, 1, 11):
		return []string{"flower-server-app", "--insecure", "--superlink", local(p.driver), "--dir", app, o.App.ServerApp}
	case !AtLeast(v, 1, 13):
		return []string{"flower-server-app", "--insecure", "--superlink", local(p.driver), app}
	}
	args := []string{"flwr", "run", app, "local", "--stream"}
	if len(o.RunConfig) > 0 { // in one: of a later argument with a key below the same table, flwr takes the whole table
		args = append(args, "--run-config", strings.Join(o.RunConfig, " "))
	}
	return args
}

// freePorts finds free ports below Linux's ephemeral range (32768 and up), where no outgoing connection can take one before Flower does.
func freePorts(n int) ([]int, error) {
	var ports []int
	for port := 10000 + rand.IntN(20000); len(ports) < n && port < 32768; port++ { //nolint:gosec // no secret: runs side by side begin elsewhere
		ln, err := net.Listen("tcp", local(port)) //nolint:noctx // loopback, at once
		if errors.Is(err, syscall.EADDRINUSE) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if err := ln.Close(); err != nil {
			return nil, err
		}
		ports = append(ports, port)
	}
	if len(ports) < n {
		return nil, errors.New("no free ports on 127.0.0.1")
	}
	return ports, nil
}

func local(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }

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

// AtLeast tells whether a version such as "1.41.0" is major.minor or later.
func AtLeast(version string, major, minor int) bool {
	var a, b int
	if _, err := fmt.Sscanf(version, "%d.%d", &a, &b); err != nil {
		return false
	}
	return a > major || a == major && b >= minor
}
