package flower

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"
)

// installations gives the environments of PERGOLA_TEST_ENVS, a folder of virtual environments.
func installations(t *testing.T) []*Installation {
	t.Helper()
	root := os.Getenv("PERGOLA_TEST_ENVS")
	if root == "" {
		t.Skip("PERGOLA_TEST_ENVS (a folder of environments with flwr and numpy) is not set")
	}
	bins, err := filepath.Glob(filepath.Join(root, "*", "bin", "flower-superlink"))
	if err != nil || len(bins) == 0 {
		t.Fatalf("no environments in %s (%v)", root, err)
	}
	var all []*Installation
	for _, b := range bins {
		inst, err := Probe(t.Context(), Env{Bin: filepath.Dir(b)}, filepath.Join(t.TempDir(), "probe.json"))
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, inst)
	}
	return all
}

// run is one run of an app: a server and clients connected directly to it.
type run struct {
	t      *testing.T
	inst   *Installation
	app    *App
	dir    string
	server *Server
	nodes  []*Client

	mu     sync.Mutex // guards events
	events []Event
}

var nextIP = struct {
	sync.Mutex
	n int
}{}

// testIP gives a loopback address that no other test of this process has.
func testIP() string {
	nextIP.Lock()
	defer nextIP.Unlock()
	nextIP.n++
	return fmt.Sprintf("127.%d.%d.%d", 64+os.Getpid()%64, os.Getpid()/64%250+1, nextIP.n)
}

func (r *run) on(e Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.events = append(r.events, e)
}

func (r *run) all(kind EventKind) []Event {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(r.events), func(e Event) bool { return e.Kind != kind })
}

// start stages the app for every party and starts them, with all nodes registered.
func start(t *testing.T, inst *Installation, appDir string, nodes int, cfg ServerConfig) *run {
	t.Helper()
	app, err := LoadApp(appDir)
	if err != nil {
		t.Fatal(err)
	}
	r := &run{t: t, inst: inst, app: app, dir: t.TempDir()}
	if keep := os.Getenv("PERGOLA_TEST_KEEP"); keep != "" {
		if r.dir, err = os.MkdirTemp(keep, inst.Version+"-"+app.Name+"-"); err != nil {
			t.Fatal(err)
		}
	}
	stage := func(name string) string {
		dst := filepath.Join(r.dir, name, "app")
		if err := Stage(app, appDir, dst, inst); err != nil {
			t.Fatal(err)
		}
		return dst
	}
	cfg.Install, cfg.AppDir, cfg.RunDir, cfg.LogDir = inst, stage("hub"), filepath.Join(r.dir, "hub"), filepath.Join(r.dir, "hub")
	cfg.FlwrHome, cfg.IP, cfg.Env, cfg.OnEvent = filepath.Join(r.dir, "hub", "flwr"), testIP(), os.Environ(), r.on
	begun := time.Now()
	r.server, err = StartServer(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s: superlink ready after %v", inst.Version, time.Since(begun).Round(time.Millisecond))
	t.Cleanup(r.stop)
	for i := range nodes {
		name := fmt.Sprintf("site-%d", i)
		dir := filepath.Join(r.dir, name)
		c, err := StartClient(t.Context(), ClientConfig{
			Install: inst, AppDir: stage(name), RunDir: dir, LogDir: dir, FlwrHome: filepath.Join(dir, "flwr"), IP: testIP(),
			Superlink: r.server.FleetAddr(), NodeConfig: map[string]any{"partition-id": i, "num-partitions": nodes, "name": "it's me"},
			RunConfig: cfg.RunConfig, Env: os.Environ(), OnEvent: r.on,
		})
		if err != nil {
			t.Fatal(err)
		}
		r.nodes = append(r.nodes, c)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	if os.Getenv("PERGOLA_TEST_KEEP") == "" {
		if err := r.server.WaitNodes(ctx, nodes); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%s: %d nodes after %v", inst.Version, nodes, time.Since(begun).Round(time.Millisecond))
	return r
}

func (r *run) stop() {
	begun := time.Now()
	var wg sync.WaitGroup
	for _, n := range r.nodes {
		wg.Go(func() {
			n.Stop(2 * time.Second)
			r.t.Logf("%s: supernode stopped after %v: %v", r.inst.Version, time.Since(begun).Round(time.Millisecond), n.Exit())
		})
	}
	wg.Go(func() {
		r.server.Stop(2 * time.Second)
		r.t.Logf("%s: server stopped after %v: %v", r.inst.Version, time.Since(begun).Round(time.Millisecond), r.server.link.Exit())
	})
	wg.Wait()
}

func TestRunLegacyApp(t *testing.T) {
	app := os.Getenv("PERGOLA_TEST_APP")
	if app == "" {
		app = "../../test/apps/tiny"
	}
	var over []string
	if v := os.Getenv("PERGOLA_TEST_OVER"); v != "" {
		over = []string{v}
	}
	for _, inst := range installations(t) {
		t.Run(inst.Version, func(t *testing.T) {
			r := start(t, inst, app, 2, ServerConfig{RunConfig: over})
			begun := time.Now()
			ctx, cancel := context.WithTimeout(t.Context(), 120*time.Second)
			defer cancel()
			err := r.server.RunApp(ctx)
			t.Logf("%s: run took %v: %v", inst.Version, time.Since(begun).Round(time.Millisecond), err)
			if err != nil {
				t.Error(err)
			}
		})
	}
}
