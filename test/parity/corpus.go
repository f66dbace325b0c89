package main

import (
	"github.com/pergolafl/pergola/test/internal/plain"
)

// versions has the oldest release of each way in which Flower's programs are called, the newest that installs, and some between.
var versions = []string{
	"1.8.0", "1.9.0", "1.10.0", "1.11.1", "1.12.0", "1.15.2", "1.18.0", "1.21.0", "1.25.0", "1.30.0", "1.34.0", "1.36.0", "1.37.0", "1.39.0", "1.40.0", "1.41.0",
}

// entry is an app of the corpus.
type entry struct {
	app       string            // folder of test/apps
	from      int               // minor version of the first flwr that runs it
	until     int               // and of the first that is not asked to; 0 = all
	overrides []string          // --run-config
	node      map[string]string // what the app's [tool.pergola.site.node-config] says, as TOML for plain Flower
}

var (
	overrides = []string{`deep.er.text='it is "overridden"'`, "rate=0.3", `name="with a space, and a comma"`, "fast=true", "deep.er.number=-7"}
	nodeKeys  = map[string]string{"place": `"it's here"`, "share": "0.75", "big": "true"}
)

// The corpus has both APIs and both layouts: a package (record), modules beside pyproject.toml (record-message), modules alone
// (record-classic, as apps were before they had a run config).
var corpus = []entry{
	{app: "record-classic", from: 8, until: 11},
	{app: "record", from: 10, overrides: overrides, node: nodeKeys},
	{app: "record-message", from: 21, overrides: overrides, node: nodeKeys},
}

func (e entry) fits(version string) bool {
	return plain.AtLeast(version, 1, e.from) && (e.until == 0 || !plain.AtLeast(version, 1, e.until))
}

// expect tells which kinds of records both sides must have, and which are not compared.
func (e entry) expect(version string) kinds {
	k := kinds{client: true, server: true}
	if e.app != "record-classic" {
		k[nodeSettings], k[serverSettings], k[clientSettings] = true, true, true
	}
	if plain.AtLeast(version, 1, 11) && !plain.AtLeast(version, 1, 13) {
		// A client app that is run from its directory gets no run config from plain Flower here, and the app's from Pergola.
		delete(k, clientSettings)
	}
	return k
}
