package flower

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/proc"
)

// ClientConfig says how to run a site's side of a job.
type ClientConfig struct {
	Install    *Installation
	AppDir     string // the staged app; the programs' working directory
	RunDir     string
	LogDir     string         // client_app_log.txt
	FlwrHome   string         // this party's own FLWR_HOME
	IP         string         // a loopback address of this party alone
	Superlink  string         // "host:port" of the Fleet API, or of a relay to it
	Installs   bool           // Flower may install the app's dependencies at run time
	NodeConfig map[string]any // text, int, float64, bool
	RunConfig  []string       // overrides; needed up to flwr 1.12 only, where each site reads its own copy
	Env        []string       // complete environment, "K=V", to which what keeps the job in its place is added
	Party      string
	Echo       io.Writer
	OnEvent    func(Event)
	OnLogError func(error)
	OpenLog    func(path string) (io.WriteCloser, error) // opens a log in LogDir to append to it; nil: a file
}

// Client is a running supernode.
type Client struct {
	party *party
	node  *proc.Process
	done  chan struct{}

	mu       sync.Mutex // guards the rest
	stopping bool
	lame     *problem.Error // why it was ended although it ran
}

// StartClient starts a supernode. It does not wait until the supernode has reached the superlink: a
// NodeReady event says so. Errors have the codes program-failed, usage and app-invalid. ctx is for
// starting only: end the client with Stop.
func StartClient(ctx context.Context, cfg ClientConfig) (*Client, error) {
	if ctx.Err() != nil {
		return nil, ctxError(ctx, "start the supernode")
	}
	caps := cfg.Install.Caps
	separator := " "
	if caps.Generation == GenModule {
		separator = "," // 1.10
	}
	node, err := nodeConfig(cfg.NodeConfig, separator)
	if err != nil {
		return nil, err
	}
	if caps.Generation == GenDriver {
		over, err := ParseRunConfig(cfg.RunConfig)
		if err != nil {
			return nil, err
		}
		if err := overrideStaged(cfg.AppDir, over); err != nil {
			return nil, err
		}
	}
	superlink, _, err := net.SplitHostPort(cfg.Superlink)
	if err != nil {
		return nil, problem.Wrap(err, problem.Usage, "write it as host:port", "the superlink's address %q cannot be used", cfg.Superlink)
	}
	c := &Client{done: make(chan struct{})}
	if c.party, err = newParty(cfg.Install, cfg.AppDir, cfg.LogDir, cfg.FlwrHome, cfg.OpenLog, cfg.Env, cfg.Party, cfg.Echo, cfg.OnEvent, cfg.OnLogError, cfg.IP, superlink); err != nil {
		return nil, err
	}
	if caps.Generation == GenDriver {
		if err := linkApp(cfg.AppDir, cfg.FlwrHome); err != nil {
			return nil, err
		}
	}
	ports, _, err := freePorts(ctx, cfg.IP, 1, 0)
	if err != nil {
		return nil, err
	}
	own, port := net.JoinHostPort(cfg.IP, strconv.Itoa(ports[0])), strconv.Itoa(ports[0])
	has := func(flag string) bool { _, ok := caps.Supernode[flag]; return ok }
	program, flag := cfg.Install.clientProgram(), "--superlink"
	if program == ProgramClientApp && !has(flag) { // 1.8
		flag = "--server"
	}
	args := []string{cfg.Install.program(program), "--insecure", flag, cfg.Superlink}
	switch {
	case has("--host") && has("--port"):
		args = append(args, "--host", cfg.IP, "--port", port)
	case has("--clientappio-api-address"):
		args = append(args, "--clientappio-api-address", own)
	case has("--supernode-address"):
		args = append(args, "--supernode-address", own)
	}
	args = append(args, runtimeInstalls(caps.Supernode, cfg.Installs)...)
	switch {
	case node == "":
	case has("--node-config"):
		args = append(args, "--node-config", node)
	case freeKeys(cfg.NodeConfig): // 1.8, 1.9
		c.party.events.emit(Event{Kind: Warning, Program: program, Message: "flwr " + cfg.Install.Version + " gives no node config to apps: " + node})
	}
	if caps.Generation <= GenDriver && caps.GRPCAdapter {
		args = append(args, "--grpc-adapter")
	}
	switch caps.Generation {
	case GenModule:
		app, err := LoadApp(cfg.AppDir)
		if err != nil {
			return nil, err
		}
		args = append(args, "--dir", cfg.AppDir, app.ClientApp)
	case GenDriver:
		args = append(args, cfg.AppDir)
	}
	log := newParser(ProgramSupernode)
	handle := func(events []Event) {
		for _, e := range events {
			c.party.events.emit(e)
		}
	}
	c.node, err = c.party.start(program, ClientAppLog, prefixClientApp, args, func(line string) { handle(log.line(line)) })
	if err != nil {
		return nil, err
	}
	watch, unwatch := context.WithCancel(context.WithoutCancel(ctx))
	var watching sync.WaitGroup
	watching.Go(func() { c.watchStarter(watch) })
	go func() { // ends with the process: Stop waits for it
		defer close(c.done)
		<-c.node.Done()
		unwatch()
		watching.Wait()
		handle(log.end())
		c.party.ended(program, c.node)
	}()
	return c, nil
}

// linkApp makes the app known as an installed one. A supernode of this generation runs the app from the
// directory that it was given, but takes its run config from the installed app alone
// (flwr/common/config.py, get_fused_config, 1.11 and 1.12), and gives the client app an empty one without.
func linkApp(appDir, home string) error {
	raw, err := readText(filepath.Join(appDir, "pyproject.toml"))
	if err != nil {
		return problem.Wrap(err, problem.AppInvalid, "stage the app first", "the staged app has no pyproject.toml")
	}
	var doc map[string]any
	if err := toml.Unmarshal(raw, &doc); err != nil {
		return tomlProblem(filepath.Join(appDir, "pyproject.toml"), err)
	}
	publisher, name, version := firstString(lookup(doc, "tool.flwr.app.publisher")), firstString(lookup(doc, "project.name")), firstString(lookup(doc, "project.version"))
	target, err := filepath.Abs(appDir)
	if err != nil {
		return fmt.Errorf("find the staged app: %w", err)
	}
	for _, link := range []string{
		filepath.Join(home, "apps", publisher+"."+name+"."+version+"."), // 1.12; a hash would follow
		filepath.Join(home, "apps", publisher, name, version),           // 1.11
	} {
		err := os.MkdirAll(filepath.Dir(link), 0o700)
		if err == nil {
			err = os.Symlink(target, link)
		}
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return problem.Wrap(err, codeOf(err), "make room", "the app cannot be linked into %s", home)
		}
	}
	return nil
}

// freeKeys tells whether a node config has more than a node's place among the others.
func freeKeys(config map[string]any) bool {
	for key := range config {
		if key != "partition-id" && key != "num-partitions" {
			return true
		}
	}
	return false
}

// nodeConfig writes a node config as --node-config wants it: TOML pairs with a space between, a comma for 1.10.
func nodeConfig(config map[string]any, separator string) (string, error) {
	var pairs []string
	for _, key := range slices.Sorted(maps.Keys(config)) {
		p := tomlPair(key, config[key])
		if p == "" {
			return "", problem.New(problem.Usage, "use text, a number, true or false", "the node config %s = %v cannot be given to a supernode", key, config[key])
		}
		pairs = append(pairs, p)
	}
	return strings.Join(pairs, separator), nil
}

// Done is closed when the supernode has ended and its log is complete.
func (c *Client) Done() <-chan struct{} { return c.done }

// Exit tells how the supernode ended; valid after Done.
func (c *Client) Exit() proc.Exit { return c.node.Exit() }

// Err is the problem of a supernode that ended with a failure and was not stopped; nil otherwise, and
// while it runs.
func (c *Client) Err() error {
	select {
	case <-c.done:
	default:
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.lame != nil {
		return c.lame
	}
	if c.stopping || c.node.Exit().OK() {
		return nil
	}
	return died(c.party.inst.clientProgram(), ClientAppLog, c.node)
}

// Stop ends the supernode and everything that it started within grace, then by force; idempotent.
func (c *Client) Stop(grace time.Duration) {
	c.mu.Lock()
	c.stopping = true
	c.mu.Unlock()
	c.node.Stop(grace)
	<-c.done
}
