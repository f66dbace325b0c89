package main

import (
	"path/filepath"
	"slices"

	"github.com/pergolafl/pergola/test/internal/plain"
)

// versions has the oldest release of each way in which Flower's programs are called, the newest that installs, and some between.
var versions = []string{
	"1.8.0", "1.9.0", "1.10.0", "1.11.1", "1.12.0", "1.15.2", "1.18.0", "1.21.0", "1.25.0", "1.30.0", "1.34.0", "1.36.0", "1.37.0", "1.39.0", "1.40.0", "1.41.0",
}

// fidelity has the versions on which the whole corpus runs: one of each generation of Flower's Python API.
var fidelity = []string{"1.12.0", "1.18.0", "1.21.0", "1.30.0", "1.41.0"}

// Engines, in the order of the tables. Plain Flower is what the others are compared with.
const (
	plainFlower  = "plain"
	flowerEngine = "flower"
	nativeEngine = "native"
)

// entry is an app of the corpus, in one of its modes.
type entry struct {
	app       string            // folder
	mode      string            // what tells entries with the same folder apart; "" = the app as it is
	from      int               // minor version of the first flwr that runs it
	last      string            // the server's last step, without which a run has not come to its end
	until     int               // and of the first that is not asked to; 0 = all
	sites     int               // 0 = 2
	overrides []string          // --run-config
	pace      []string          // further ones for the native engine: seconds to wait, which no number depends on
	node      map[string]string // what the app's [tool.pergola.site.node-config] says, as TOML for plain Flower
	versions  bool              // it belongs to docs/flower-versions.md: runs on all versions, not on those of fidelity alone
	powers    bool              // its strategy computes powers, whose last bits depend on the processor's vector instructions
	slow      bool              // plain Flower waits in it for long: it is no reason to think that it hangs
}

var (
	overrides = []string{`deep.er.text='it is "overridden"'`, "rate=0.3", `name="with a space, and a comma"`, "fast=true", "deep.er.number=-7"}
	nodeKeys  = map[string]string{"place": `"it's here"`, "share": "0.75", "big": "true"}
)

// The corpus. The first three are for the versions' table; they have both APIs and all layouts: a package (record), modules beside
// pyproject.toml (record-message), modules alone (record-classic, as apps were before they had a run config). The others are in
// test/parity/apps, each as small as its purpose allows.
var corpus = []entry{
	{app: "record-classic", last: "evaluate 2", from: 8, until: 11, versions: true},
	{app: "record", last: "evaluate 2", from: 10, overrides: overrides, node: nodeKeys, versions: true},
	{app: "record-message", last: "end 2", from: 21, overrides: overrides, node: nodeKeys, versions: true},

	{app: "legacy-fedavg", last: "history", from: 12},
	{app: "message-fedavg", last: "result", from: 21},
	{app: "custom-strategy", last: "evaluate 2", from: 12},
	{app: "message-strategy", last: "warm-up", from: 21},
	{app: "stateful", last: "evaluate 3", from: 12},
	{app: "mods", last: "evaluate 2", from: 12},
	{app: "secagg", last: "fit 1", from: 12, sites: 3},
	{app: "privacy", last: "evaluate 2", mode: "local", from: 12, overrides: []string{`mode="local"`}},
	{app: "privacy", last: "evaluate 2", mode: "central", from: 12, overrides: []string{`mode="central"`}},
	{app: "privacy", last: "evaluate 2", mode: "clients", from: 12, overrides: []string{`mode="clients"`}},
	{app: "query", last: "evaluate 1", from: 12},
	{app: "evaluate-only", last: "evaluate 2", from: 12},
	{app: "own-loop", last: "alone", from: 12, pace: []string{"timeout=6.0"}, slow: true},
	{app: "optimisers", last: "evaluate 3", mode: "prox", from: 12, overrides: []string{`strategy="prox"`}},
	{app: "optimisers", last: "evaluate 3", mode: "adam", from: 12, overrides: []string{`strategy="adam"`}, powers: true},
	{app: "no-failures", last: "evaluate 2", from: 12},
	{app: "lifespan", last: "leave", from: 18},
	{app: "raises", last: "no handler", from: 12},
	{app: "exits", last: "fine", mode: "sys-exit", from: 13, overrides: []string{`how="sys-exit"`}, pace: []string{"timeout=20.0"}, slow: true},
	{app: "exits", last: "fine", mode: "os-exit", from: 13, overrides: []string{`how="os-exit"`}, pace: []string{"timeout=20.0"}, slow: true},
	{app: "exits", last: "fine", mode: "kill", from: 13, overrides: []string{`how="kill"`}, pace: []string{"timeout=20.0"}, slow: true},
	{app: "prints", last: "evaluate 1", from: 12},
	{app: "children", last: "evaluate 1", from: 12},
	{app: "probe", last: "last", from: 12, overrides: overrides, node: nodeKeys},
}

func (e entry) name() string {
	if e.mode == "" {
		return e.app
	}
	return e.app + "." + e.mode
}

// dir is where the app is, root being the folder test.
func (e entry) dir(root string) string {
	if e.versions {
		return filepath.Join(root, "apps", e.app)
	}
	return filepath.Join(root, "parity", "apps", e.app)
}

func (e entry) nodes() int {
	if e.sites == 0 {
		return 2 // with three, the order of replies would show in the last bits of every later number
	}
	return e.sites
}

func (e entry) fits(version string) bool {
	return plain.AtLeast(version, 1, e.from) && (e.until == 0 || !plain.AtLeast(version, 1, e.until)) &&
		(e.versions || slices.Contains(fidelity, version))
}

// engines tells which engines run an entry on a version: the flower engine all, the native one those of fidelity.
func (e entry) engines(version string) []string {
	if slices.Contains(fidelity, version) {
		return []string{plainFlower, flowerEngine, nativeEngine}
	}
	return []string{plainFlower, flowerEngine}
}
