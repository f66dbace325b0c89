package flower

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/proc"
)

// Generation is a way of calling Flower's programs; the order is that of time.
type Generation int

// Generations; doc.go has the table.
const (
	GenModule  Generation = iota + 1 // --driver-api-address; apps are named as module:attribute
	GenDriver                        // --driver-api-address, flower-server-app; apps are named by their directory
	GenExec                          // --serverappio-api-address, --exec-api-address
	GenControl                       // --control-api-address
	GenRuntime                       // --host --port for the Runtime API over HTTP, gRPC for Fleet and Control
	GenMixed                         // --host --port for Runtime and Control over HTTP, gRPC for Fleet
	GenHTTP                          // one HTTP port for Fleet, Control and Runtime
)

var generationNames = []string{"unknown", "module", "driver", "exec", "control", "runtime", "mixed", "http"}

// String gives the name used in doc.go.
func (g Generation) String() string {
	if g < 0 || int(g) >= len(generationNames) {
		g = 0
	}
	return generationNames[g]
}

// Oldest is the oldest release that has what a job needs: a superlink, and apps (ServerApp, ClientApp) that programs of their own run.
// 1.7 has neither flower-superlink nor flower-client-app (its wheel's entry_points.txt).
const Oldest = "1.8"

// newestKnown is the newest version whose flags this package was tried with. flower-generations.md
// ends at 1.42, which has the same flags as 1.41.
var newestKnown = [2]int{1, 42}

// Caps is what an installation's programs understand, as their --help says.
type Caps struct {
	Generation  Generation `json:"generation"`
	GRPCAdapter bool       `json:"grpc_adapter"` // superlink and supernode both offer it
	// Flags of each program, with the metavar of the default order of --help ("--host": "HOST").
	Superlink map[string]string `json:"superlink"`
	Supernode map[string]string `json:"supernode"`            // of flower-client-app up to 1.9
	ServerApp map[string]string `json:"server_app,omitempty"` // flower-server-app, up to 1.12
}

// Installation is a Python environment's Flower. The zero value is of no use: see [Probe].
type Installation struct {
	Version string `json:"version"`
	Bin     string `json:"bin"`    // folder of the executables
	Python  string `json:"python"` // interpreter; may be ""
	Caps    Caps   `json:"caps"`
	Known   bool   `json:"known"`             // this package was tried with the version
	Warning string `json:"warning,omitempty"` // what a user should hear about the version
}

// Env names the installation to probe.
type Env struct {
	Bin    string // folder of the executables
	Python string // interpreter, used only where the version cannot be read from the files; may be ""
}

// clientProgram is what runs a site's side: the supernode, or up to 1.9 flower-client-app.
func (i *Installation) clientProgram() string { return clientProgram(i.Version) }

// clientProgram tells what runs a site's side: there is no supernode in 1.8, and the one of 1.9 ends at once.
func clientProgram(version string) string {
	if before(version, 10) {
		return ProgramClientApp
	}
	return ProgramSupernode
}

// program gives the path of one of the installation's executables.
func (i *Installation) program(name string) string { return filepath.Join(i.Bin, name) }

const (
	probeTimeout = 120 * time.Second // a cold import on a slow disk; normally 1 – 2 s
	installHint  = "install Flower there: pip install flwr, or let Pergola build the environment"
)

// Probe asks the programs in env.Bin what they understand. The answer is kept in cacheFile (JSON; ""
// keeps nothing) until the version or one of the executables changes; it costs about 2 s without.
// Errors have the code program-failed, flwr-unavailable where Flower is older than [Oldest].
func Probe(ctx context.Context, env Env, cacheFile string) (*Installation, error) {
	bin, err := filepath.Abs(env.Bin)
	if err != nil {
		return nil, problem.Wrap(err, problem.ProgramFailed, installHint, "the folder %s cannot be used", env.Bin)
	}
	inst := &Installation{Bin: bin, Python: env.Python}
	var stamps strings.Builder
	if _, err := executable(filepath.Join(bin, ProgramSuperlink)); err != nil {
		return nil, err
	}
	if inst.Version, err = version(ctx, env, bin); err != nil {
		return nil, err
	}
	if err := Supported(inst.Version); err != nil {
		return nil, err
	}
	client := inst.clientProgram()
	names := []string{ProgramSuperlink, client}
	for _, name := range names {
		info, err := executable(filepath.Join(bin, name))
		if err != nil {
			return nil, err
		}
		fmt.Fprintf(&stamps, "%s %d %d\n", name, info.ModTime().UnixNano(), info.Size())
	}
	// Up to 1.12 it starts the server app, later it is gone or says so.
	if _, err := executable(filepath.Join(bin, "flower-server-app")); err == nil {
		names = append(names, "flower-server-app")
	}
	sum := sha256.Sum256([]byte(cacheFormat + inst.Version + "\n" + bin + "\n" + stamps.String()))
	key := hex.EncodeToString(sum[:])
	if cached := readCache(cacheFile, key); cached != nil {
		cached.Python = env.Python
		return cached, nil
	}

	helps := make(map[string]map[string]option, len(names))
	var mu sync.Mutex // guards helps
	g, gctx := errgroup.WithContext(ctx)
	for _, name := range names {
		g.Go(func() error {
			opts, err := help(gctx, bin, name)
			if err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			helps[name] = opts
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	inst.Caps, err = capsOf(helps[ProgramSuperlink], helps[client], helps[ProgramServerApp])
	if err != nil {
		return nil, err
	}
	inst.judge()
	if err := writeCache(cacheFile, key, inst); err != nil {
		// The next probe asks again; that is slower, not wrong.
		inst.Warning = strings.TrimSpace(inst.Warning + " The probe's cache could not be written: " + err.Error())
	}
	return inst, nil
}

// Supported refuses a version that is older than [Oldest]; the error has the code flwr-unavailable. A version that is not a number is
// left to [Probe].
func Supported(version string) error {
	if !before(version, 8) {
		return nil
	}
	return problem.New(problem.FlwrUnavailable, "use flwr "+Oldest+" or newer: --flwr, or the app's dependencies",
		"flwr %s is too old: the oldest that Pergola runs is %s, the first with a superlink and with apps that it can start", version, Oldest)
}

// before tells whether a version is older than 1.minor; one that is not a number is not.
func before(version string, minor int) bool {
	have, own, ok := releaseOf(version)
	return ok && (have < 1 || have == 1 && own < minor)
}

// TakesConfig refuses run config overrides for versions that give none to the app that they are told to run: up to 1.10 they know
// only the run config of an app that was installed and started by its superexec.
func TakesConfig(version string, overrides []string) error {
	if len(overrides) == 0 || !before(version, 11) {
		return nil
	}
	return problem.New(problem.Usage, "leave --run-config out, or use flwr 1.11 or newer (--flwr)", "flwr %s does not give a run config to apps", version)
}

// FleetWire is how supernodes of this installation speak to the superlink.
func (c Caps) FleetWire() string {
	switch {
	case c.Generation == GenHTTP:
		return "HTTP"
	case c.GRPCAdapter && c.Generation <= GenDriver:
		return "gRPC (adapter)"
	}
	return "gRPC"
}

// runtimeInstalls gives the options that make a program install an app's dependencies when it runs, or keep it from that. Programs
// that can be forbidden it do it by default (superlinks from 1.33 or so on), others only where it is allowed (1.29 and on).
func runtimeInstalls(flags map[string]string, wanted bool) []string {
	const allow, forbid = "--allow-runtime-dependency-installation", "--disable-runtime-dependency-installation"
	_, canAllow := flags[allow]
	_, canForbid := flags[forbid]
	switch {
	case canForbid && !wanted:
		return []string{forbid}
	case canAllow && !canForbid && wanted:
		return []string{allow}
	}
	return nil
}

// judge sets Known and Warning.
func (i *Installation) judge() {
	major, minor, ok := releaseOf(i.Version)
	switch {
	case !ok:
		i.Warning = fmt.Sprintf("The Flower version %q is not a number; it is used as its flags suggest (%s generation).", i.Version, i.Caps.Generation)
	case major > newestKnown[0] || major == newestKnown[0] && minor > newestKnown[1]:
		i.Warning = fmt.Sprintf("Flower %s is newer than %d.%d, the newest that Pergola was tried with; it is used as its flags suggest (%s generation).",
			i.Version, newestKnown[0], newestKnown[1], i.Caps.Generation)
	default:
		i.Known = true
	}
}

var releaseForm = regexp.MustCompile(`^(\d+)\.(\d+)`)

func releaseOf(version string) (major, minor int, ok bool) {
	m := releaseForm.FindStringSubmatch(version)
	if m == nil {
		return 0, 0, false
	}
	major, err1 := strconv.Atoi(m[1])
	minor, err2 := strconv.Atoi(m[2])
	return major, minor, err1 == nil && err2 == nil
}

func executable(path string) (os.FileInfo, error) {
	info, err := os.Stat(path)
	name := filepath.Base(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil, problem.New(problem.ProgramFailed, pipHint(filepath.Dir(path), ""), "%s is not installed: there is no %s", name, path)
	case err != nil:
		return nil, problem.Wrap(err, problem.ProgramFailed, installHint, "%s cannot be used", path)
	case !info.Mode().IsRegular() || info.Mode()&0o111 == 0:
		return nil, problem.New(problem.ProgramFailed, "make it executable (chmod +x); or "+pipHint(filepath.Dir(path), ""), "%s cannot be started: %s is not an executable file", name, path)
	}
	return info, nil
}

var distForm = regexp.MustCompile(`^flwr(?:_nightly)?-(.+)\.dist-info$`)

// version reads Flower's version from the package's metadata: from the files of a virtual environment
// (under a millisecond), else by asking the interpreter.
func version(ctx context.Context, env Env, bin string) (string, error) {
	for _, lib := range []string{"lib", "lib64"} {
		dists, err := filepath.Glob(filepath.Join(filepath.Dir(bin), lib, "python3*", "site-packages", "flwr*.dist-info"))
		if err != nil {
			return "", fmt.Errorf("look for Flower's metadata: %w", err)
		}
		for _, d := range dists {
			if m := distForm.FindStringSubmatch(filepath.Base(d)); m != nil {
				return m[1], nil
			}
		}
	}
	python := env.Python
	if python == "" {
		python = filepath.Join(bin, "python3")
	}
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	out, err := proc.Run(ctx, proc.Spec{
		Name: "python", Args: []string{python, "-c", "import importlib.metadata as m; print(m.version('flwr'))"}, Env: os.Environ(),
	})
	if err != nil {
		return "", problem.Wrap(err, problem.ProgramFailed, installHint, "%s could not be asked for Flower's version", python)
	}
	v := strings.TrimSpace(out.Stdout)
	if !out.Exit.OK() || v == "" {
		return "", problem.New(problem.ProgramFailed, installHint, "Flower is not installed for %s (%s): %s", python, out.Exit, lastLine(out.Stderr))
	}
	return v, nil
}

func help(ctx context.Context, bin, name string) (opts map[string]option, err error) {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	home, err := os.MkdirTemp("", "pergola-probe-")
	if err != nil {
		return nil, problem.Wrap(err, problem.ProgramFailed, "make room in the temporary directory", "%s could not be probed", name)
	}
	defer func() {
		if rerr := os.RemoveAll(home); err == nil && rerr != nil {
			err = problem.Wrap(rerr, problem.ProgramFailed, "remove it by hand", "the probe's directory %s could not be removed", home)
		}
	}()
	env := programEnv(append(os.Environ(), telemetry+"=0"), bin, home) // 1.8 reports that it was started before it looks at its arguments
	out, err := proc.Run(ctx, proc.Spec{Name: name, Args: []string{filepath.Join(bin, name), "--help"}, Dir: home, Env: append(env, "COLUMNS=200")})
	if err != nil {
		return nil, err
	}
	opts = parseHelp(out.Stdout)
	if len(opts) == 0 && name == "flower-server-app" && out.Exit.Signal == 0 {
		return nil, nil // "has been replaced by `flwr run`"
	}
	if !out.Exit.OK() || len(opts) == 0 {
		return nil, problem.New(problem.ProgramFailed, "try it by hand: "+filepath.Join(bin, name)+" --help; then "+installHint,
			"%s --help failed with %s: %s", name, out.Exit, lastLine(out.Stderr+"\n"+out.Stdout))
	}
	return opts, nil
}

// option is one entry of a program's --help.
type option struct {
	Arg  string // metavar or choices, "" for a switch
	Text string
}

var (
	optionForm = regexp.MustCompile(`^ {1,8}(-[^ ].*)$`)
	flagForm   = regexp.MustCompile(`(--?[A-Za-z][A-Za-z0-9-]*)(?:[ =]([A-Z][A-Z0-9_:.]*|\{[^}]*\}|<[^>]*>))?`)
)

// parseHelp reads the options section of argparse's help text.
func parseHelp(text string) map[string]option {
	opts := map[string]option{}
	var last []string
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\r\n ")
		if m := optionForm.FindStringSubmatch(line); m != nil {
			// Two spaces or more part the flags from the text.
			flags, desc, _ := strings.Cut(m[1], "  ")
			last = nil
			for _, f := range flagForm.FindAllStringSubmatch(flags, -1) {
				opts[f[1]] = option{Arg: f[2], Text: strings.TrimSpace(desc)}
				last = append(last, f[1])
			}
			continue
		}
		if !strings.HasPrefix(line, "         ") {
			last = nil // a heading, or an empty line
			continue
		}
		for _, f := range last {
			o := opts[f]
			o.Text = strings.TrimSpace(o.Text + " " + strings.TrimSpace(line))
			opts[f] = o
		}
	}
	return opts
}

// capsOf decides what to type from what the programs offer.
func capsOf(superlink, supernode, serverApp map[string]option) (Caps, error) {
	has := func(m map[string]option, flag string) bool { _, ok := m[flag]; return ok }
	deprecated := func(m map[string]option, flag string) bool {
		return strings.Contains(strings.ToLower(m[flag].Text), "deprecated")
	}
	c := Caps{Superlink: args(superlink), Supernode: args(supernode), ServerApp: args(serverApp)}
	switch {
	case has(superlink, "--driver-api-address"):
		c.Generation = GenDriver
		if has(supernode, "--dir") { // gone with 1.11, which takes an app's directory
			c.Generation = GenModule
		}
		if serverApp == nil {
			return c, problem.New(problem.ProgramFailed, installHint, "flower-server-app is not installed, but this Flower needs it")
		}
	case has(superlink, "--host") && has(superlink, "--port") && !experimental(superlink["--host"]):
		own := func(flag string) bool { return has(superlink, flag) && !deprecated(superlink, flag) }
		switch {
		case own("--control-api-address"):
			c.Generation = GenRuntime
		case own("--fleet-api-address"):
			c.Generation = GenMixed
		default:
			c.Generation = GenHTTP
		}
	case has(superlink, "--control-api-address"):
		c.Generation = GenControl
	case has(superlink, "--exec-api-address"):
		c.Generation = GenExec
	default:
		return c, problem.New(problem.FlwrUnavailable, "use flwr "+Oldest+" or newer", "flower-superlink has none of the address options that Pergola knows")
	}
	c.GRPCAdapter = c.Generation < GenHTTP && strings.Contains(superlink["--fleet-api-type"].Arg, "grpc-adapter") && has(supernode, "--grpc-adapter")
	return c, nil
}

// experimental tells of an option that does not do yet what the newer versions' does: the --host of 1.33 and 1.34 is for a server
// that is started only on request.
func experimental(o option) bool { return strings.Contains(strings.ToLower(o.Text), "experimental") }

func args(m map[string]option) map[string]string {
	if m == nil {
		return nil
	}
	out := make(map[string]string, len(m))
	for flag, o := range m {
		out[flag] = o.Arg
	}
	return out
}

// cacheFormat changes when what is cached does.
const cacheFormat = "pergola-probe-3\n"

type cacheEntry struct {
	Key          string        `json:"key"`
	Installation *Installation `json:"installation"`
}

func readCache(path, key string) *Installation {
	if path == "" {
		return nil
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil // not there, or not readable: ask the programs
	}
	var e cacheEntry
	if json.Unmarshal(raw, &e) != nil || e.Key != key || e.Installation == nil || e.Installation.Caps.Generation == 0 {
		return nil
	}
	return e.Installation
}

// writeCache replaces the file in one step: other runners may read it at the same time.
func writeCache(path, key string, inst *Installation) error {
	if path == "" {
		return nil
	}
	raw, err := json.MarshalIndent(cacheEntry{Key: key, Installation: inst}, "", " ")
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".probe-*")
	if err != nil {
		return err
	}
	_, err = f.Write(raw)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}

func lastLine(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.TrimSpace(plain(lines[len(lines)-1]))
}
