package pyenv

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/pergolafl/pergola/internal/problem"
)

// inventory is what an interpreter says of itself and of what is installed.
type inventory struct {
	Prefix  string                  `json:"prefix"`
	Bins    []string                `json:"bins"` // where flwr's own programs are, likeliest first
	Markers map[string]string       `json:"markers"`
	Dists   map[string]distribution `json:"dists"` // by name as installed
}

// distribution is an installed distribution.
type distribution struct {
	Version  string   `json:"version"`
	Requires []string `json:"requires"`
}

// inventoryScript prints an inventory. It runs with the user's own environment (PYTHONPATH, user site), as the app will.
const inventoryScript = `import sys
sys.dont_write_bytecode = True
if sys.path and sys.path[0] == "": del sys.path[0]
import json, os, platform, sysconfig
from importlib import metadata
dists, bins = {}, []
def canonical(n): return n.lower().replace("_", "-").replace(".", "-")
for d in metadata.distributions():
    try: name, version = d.metadata["Name"], d.version
    except Exception: continue
    if not name or not version or canonical(name) in dists: continue
    try: requires = d.requires or []
    except Exception: requires = []
    dists[canonical(name)] = {"version": version, "requires": requires}
    if canonical(name) in ("flwr", "flwr-nightly"):
        for f in d.files or []:
            if f.name in ("flower-superlink", "flwr"):
                bins.append(os.path.dirname(os.path.normpath(os.path.abspath(str(d.locate_file(f))))))
bins += [sysconfig.get_path("scripts"), os.path.dirname(sys.executable)]
i = sys.implementation
print("PERGOLA:" + json.dumps({"prefix": sys.prefix, "bins": bins, "dists": dists, "markers": {
    "os_name": os.name, "sys_platform": sys.platform, "platform_machine": platform.machine(), "platform_release": platform.release(),
    "platform_system": platform.system(), "platform_version": platform.version(), "platform_python_implementation": platform.python_implementation(),
    "python_version": ".".join(platform.python_version_tuple()[:2]), "python_full_version": platform.python_version(),
    "implementation_name": i.name, "implementation_version": "%d.%d.%d" % i.version[:3]}}))
`

// inventoryTimeout bounds the listing: on a network file system a thousand packages take a while.
const inventoryTimeout = 2 * time.Minute

// Existing gives the environment that an interpreter already is. It is used as it is: nothing is written or installed.
// What the app requires directly, and what the extras that it names require, must be there in versions that fit;
// otherwise the problem is dependency-missing and lists every lack. Other problems: those of [Find], app-invalid.
func Existing(ctx context.Context, python string, req Requirements) (Env, error) {
	wanted, err := req.parse()
	if err != nil {
		return Env{}, err
	}
	in, err := Find(ctx, python)
	if err != nil {
		return Env{}, err
	}
	if err := in.suits(req.RequiresPython); err != nil {
		return Env{}, err
	}
	inv, err := takeInventory(ctx, in)
	if err != nil {
		return Env{}, err
	}
	var lacks []string
	flwr := ""
	for _, name := range []string{"flwr-nightly", "flwr"} {
		if d, ok := inv.Dists[name]; ok {
			flwr = d.Version
		}
	}
	// Only what the app names itself is checked: what packages say of one another is often out of date in environments
	// that work, above all in those of conda.
	for _, r := range wanted {
		if r.wanted(inv.Markers) {
			lacks = append(lacks, inv.lacks(r, "")...)
			for _, extra := range r.extras {
				lacks = append(lacks, inv.lacksExtra(r.name, extra)...)
			}
		}
	}
	slices.Sort(lacks)
	if lacks = slices.Compact(lacks); len(lacks) > 0 {
		return Env{}, problem.New(problem.DependencyMissing, "install what is missing into it, or leave out --python to have an environment built",
			"%s lacks what the app needs: %s", in.Path, strings.Join(lacks, ", "))
	}
	bin := ""
	for _, dir := range inv.Bins {
		if executable(dir+"/flower-superlink") || executable(dir+"/flwr") {
			bin = dir
			break
		}
	}
	if flwr == "" || bin == "" {
		return Env{}, problem.New(problem.DependencyMissing, "install flwr into it, or leave out --python to have an environment built",
			"%s lacks flwr's programs (flower-superlink)", in.Path)
	}
	h := sha256.New()
	fmt.Fprintf(h, "pergola-existing-1\n%s\n%s\n%s\n%s\n", in.Path, in.Real, in.Version, in.Platform)
	for _, name := range slices.Sorted(maps.Keys(inv.Dists)) {
		fmt.Fprintf(h, "%s==%s\n", name, inv.Dists[name].Version)
	}
	return Env{Dir: inv.Prefix, Python: in.Path, Bin: bin, Flwr: flwr, Key: hex.EncodeToString(h.Sum(nil)), Existing: true}, nil
}

func takeInventory(ctx context.Context, in Interpreter) (inventory, error) {
	limited, cancel := context.WithTimeoutCause(ctx, inventoryTimeout, fmt.Errorf("it did not answer within %v", inventoryTimeout))
	defer cancel()
	var inv inventory
	r, err := run(limited, command{name: in.Path, args: []string{in.Path, "-c", inventoryScript}})
	if ctx.Err() != nil {
		return inv, context.Cause(ctx)
	}
	if err == nil {
		for line := range strings.Lines(r.stdout) {
			if after, ok := strings.CutPrefix(line, probePrefix); ok {
				if err = json.Unmarshal([]byte(after), &inv); err == nil {
					return inv.canonical(), nil
				}
			}
		}
		err = fmt.Errorf("it ended with %v and said: %s", r.exit, lastLines(r.output(), 3))
	}
	return inv, problem.Wrap(err, problem.PythonUnsuitable, pythonNext, "%s cannot list its packages", in.Path)
}

// canonical has names be compared as everywhere.
func (inv inventory) canonical() inventory {
	dists := make(map[string]distribution, len(inv.Dists))
	for name, d := range inv.Dists {
		dists[canonical(name)] = d
	}
	inv.Dists = dists
	return inv
}

// lacks tells what r asks for and the inventory does not have; why is added to the words.
func (inv inventory) lacks(r requirement, why string) []string {
	name := r.name
	d, ok := inv.Dists[name]
	if !ok && name == "flwr" && len(r.specs) == 0 {
		d, ok = inv.Dists["flwr-nightly"]
	}
	switch {
	case !ok:
		return []string{r.bare() + " (not installed" + why + ")"}
	case !meets(r.specs, d.Version):
		return []string{r.bare() + " (" + d.Version + " is installed" + why + ")"}
	}
	return nil
}

// lacksExtra tells which packages of an extra are not there.
func (inv inventory) lacksExtra(name, extra string) []string {
	env := maps.Clone(inv.Markers)
	env["extra"] = extra
	without := maps.Clone(inv.Markers)
	var out []string
	for _, line := range inv.Dists[name].Requires {
		r, err := parseRequirement(line)
		if err != nil {
			continue // not the app's doing, and no reason to refuse an interpreter
		}
		if r.wanted(env) && !r.wanted(without) {
			out = append(out, inv.lacks(r, fmt.Sprintf(", for %s[%s]", name, extra))...)
		}
	}
	return out
}
