package main

import (
	"encoding/json"
	"reflect"

	"github.com/pergolafl/pergola/test/internal/plain"
)

// known is a difference from plain Flower that is as it should be, with its reason. It is data, so that the document can list it
// and a difference that is not in it is an error.
type known struct {
	app    string // folder; "" = all
	check  string
	engine string // "" = both
	from   int    // minor versions, as in [entry]
	until  int
	shows  string // JSON: the fields that the engine's record has instead of plain Flower's; "" = the record may be anything or missing
	reason string
}

var differences = []known{
	{check: clientSettings, until: 13, reason: oldRunConfig},
	{app: "probe", check: "run config", until: 13, reason: oldRunConfig},
	{app: "probe", check: "arguments", engine: nativeEngine, shows: `{"some": false}`, reason: "the arguments of Flower's programs are addresses and tokens of processes that there are none of here; an app sees the program's name alone"},
	{app: "probe", check: "environment: FLWR_*", shows: `{"names": ["FLWR_DISABLE_UPDATE_CHECK", "FLWR_HOME", "FLWR_TELEMETRY_ENABLED"]}`, reason: "Pergola keeps Flower's programs from asking for newer releases of themselves"},
	{app: "probe", check: "signals", engine: nativeEngine, shows: `{"INT": "default_int_handler"}`, reason: "Flower's programs take SIGINT to leave their SuperLink in order; here a process is ended by its runner, and an app finds Python's own handlers"},
	{app: "probe", check: "place of the app", engine: nativeEngine, shows: `{"file": "elsewhere/package/look.py"}`, reason: "the app is not packed into a FAB, so it lies in the folder of its party and not below FLWR_HOME; its files lie together as they do there"},
	{app: "exits", check: numbersCheck, engine: nativeEngine, until: 31, reason: oldExits},
	{app: "exits", check: aggregatesCheck, engine: nativeEngine, until: 31, reason: oldExits},
	{app: "stateful", check: numbersCheck, engine: nativeEngine, until: 13, shows: `{"fresh": true}`, reason: "the supernode of flwr 1.12 gives the same Context object to each message; the native engine makes a new one from its state, as every later release does"},
	{app: "probe", check: "an attribute of the context", engine: nativeEngine, until: 13, shows: `{"kept": false}`, reason: "the supernode of flwr 1.12 gives the same Context object to each message; the native engine makes a new one from its state, as every later release does"},
	{app: "probe", check: "environment set by an earlier message", engine: nativeEngine, until: 13, shows: `{"kept": false}`, reason: oldProcess},
	{app: "probe", check: "sys.path changed by an earlier message", engine: nativeEngine, until: 13, shows: `{"kept": false}`, reason: oldProcess},
	{app: "probe", check: "working directory changed by an earlier message", engine: nativeEngine, until: 13, shows: `{"kept": false}`, reason: oldProcess},
	{app: "probe", check: "sys.argv[0]", engine: nativeEngine, until: 13, shows: `{"name": "flwr-clientapp"}`, reason: "client apps of flwr 1.12 run in the supernode itself, of which there is none"},
	{app: "probe", check: "sys.argv[0]", engine: nativeEngine, until: 13, shows: `{"name": "flwr-serverapp"}`, reason: "the native engine's server app has one name with all releases"},
	{app: "probe", check: "grid", engine: nativeEngine, until: 13, shows: `{"methods": ["create_message", "get_node_ids", "pull_messages", "push_messages", "send_and_receive", "set_run"]}`, reason: "the native engine's Driver has one method more, which later releases have"},
	{app: "probe", check: "run", engine: nativeEngine, until: 13, shows: `{"overrides": {"deep.er.number": ["int", -7], "deep.er.text": ["str", "it is \"overridden\""], "fast": ["bool", true], "name": ["str", "with a space, and a comma"], "rate": ["float", 0.3]}}`, reason: "flower-server-app of flwr 1.12 takes no overrides, so plain Flower had them written into the app; with Pergola they are overrides"},
	{app: "probe", check: "context", engine: nativeEngine, from: 18, until: 22, shows: `{"node": 1}`, reason: "the server app's own node id, which its messages have as their sender, is 1 from 1.13 on; the Context of 1.18 and 1.21 still says 0"},
	{app: "probe", check: "sys.path", engine: nativeEngine, from: 18, until: 21, shows: `{"executable": 1}`, reason: "the folder of Flower's programs is on the path, as in later releases"},
	{app: "probe", check: "run", engine: nativeEngine, shows: `{"hash": 0}`, reason: "there is no FAB, so its hash is empty"},
}

const oldRunConfig = "flwr 1.11 and 1.12 give a client app that is run from its directory no run config; with Pergola it has the app's, with the overrides"

const oldProcess = "client apps of flwr 1.12 run in the supernode's one process, which loads their modules anew for each message; the native engine forks, so that modules begin anew as there, and with them the process"

const oldExits = "up to flwr 1.30 (there with sys.exit alone) a node whose client app ended its process answers no more, or with an error of Flower's own making; the native engine answers at once with an error, and the node's next message by a new process"

// mark notes the reason of each difference that is a known one, and gives how many are not.
func mark(app, engine, version string, diffs []difference) (open int) {
	for i := range diffs {
		d := &diffs[i]
		for _, k := range differences {
			if k.fits(app, engine, version, *d) {
				d.Known = k.reason
			}
		}
		if d.Known == "" {
			open++
		}
	}
	return open
}

func (k known) fits(app, engine, version string, d difference) bool {
	if k.check != d.Check || k.app != "" && k.app != app || k.engine != "" && k.engine != engine ||
		k.from > 0 && !plain.AtLeast(version, 1, k.from) || k.until > 0 && plain.AtLeast(version, 1, k.until) {
		return false
	}
	if k.shows == "" {
		return true
	}
	var want, plainly, other map[string]any
	if json.Unmarshal([]byte(k.shows), &want) != nil || json.Unmarshal([]byte(d.Plain), &plainly) != nil || json.Unmarshal([]byte(d.Other), &other) != nil {
		return false
	}
	for key, v := range other {
		if w, ok := want[key]; ok && !reflect.DeepEqual(v, w) || !ok && !reflect.DeepEqual(v, plainly[key]) {
			return false
		}
	}
	return len(other) == len(plainly)
}
