package job

import (
	"encoding/json"
	"math"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/pergolafl/pergola/internal/problem"
)

func TestParseSpecReadsTheWholeTable(t *testing.T) {
	src, err := os.ReadFile("testdata/full.toml")
	if err != nil {
		t.Fatal(err)
	}
	got, err := ParseSpec(src, "pyproject.toml")
	if err != nil {
		t.Fatal(err)
	}
	want := Spec{
		Engine: "auto", Sites: []string{"st-anna", "charite"}, MinSites: 2,
		MandatorySites: []string{"charite"}, StrictClients: true, JoinWait: Duration(30 * time.Second),
		Deadline: Duration(6 * time.Hour), OutageTolerance: Duration(time.Hour), NoProgress: NoLimit, StartTimeout: Duration(15 * time.Minute),
		Server: Server{
			Args: []string{"--run-config", "num-server-rounds=5"}, Database: "state.db", ReadyTimeout: Duration(30 * time.Second),
			StopGrace: Duration(5 * time.Second), Restarts: 1, AppPath: "apps/server",
			Env: map[string]string{"NAME": "value"},
		},
		Site: Site{
			Env: map[string]string{"DATA": "/data/ct"}, NodeConfig: NodeConfig{"partition-id": int64(0), "rate": 1.0, "cohort": "a", "gpu": false},
			Restarts: 3, AppPath: "apps/ct",
			Named: map[string]Site{"st-anna": {Env: map[string]string{"DATA": "/mnt/ct"}, Restarts: 5, AppPath: "ct", NodeConfig: NodeConfig{"cohort": "b"}}, "charite": {}},
		},
		LogQuota: 200 << 20,
		Exclude:  []string{"*.csv", "notebooks/*"},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	// The same again after its way through a bundle.
	raw, err := json.Marshal(got)
	if err != nil {
		t.Fatal(err)
	}
	var back Spec
	if err := json.Unmarshal(raw, &back); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(got, back); d != "" {
		t.Errorf("through JSON %s (-want +got):\n%s", raw, d)
	}
}

const topKeys = "clients, deadline, engine, exclude, flower-installs, gpus-per-worker, isolation, join-wait, log-quota, mandatory-sites, min-sites, no-progress, outage-tolerance, run-config, server, site, sites, start-timeout, strict-clients, wait-timeout, workers"

// The server app's arguments may be one string, which is cut into words as a shell would, without one.
func TestArgsAsString(t *testing.T) {
	for in, want := range map[string][]string{
		`"--run-config 'a=1 b=\"two words\"' --x"`: {"--run-config", `a=1 b="two words"`, "--x"},
		`'''--run-config "a=$(id)" ; rm *'''`:      {"--run-config", "a=$(id)", ";", "rm", "*"},
		`["--run-config", "a=1 b=2"]`:              {"--run-config", "a=1 b=2"},
		`""`:                                       nil,
	} {
		got, err := ParseSpec([]byte("[tool.pergola.server]\nargs = "+in), "p.toml")
		if err != nil || !slices.Equal(got.Server.Args, want) {
			t.Errorf("%s: %q, %v; want %q", in, got.Server.Args, err, want)
		}
	}
}

func TestParseSpecFaults(t *testing.T) {
	for _, c := range []struct {
		name, toml string
		want       string // the whole message and what to do
	}{
		{"no table at all", "[project]\nname = 'x'\n", ""},
		{"an empty table", "[tool.pergola]\n", ""},
		{"strange keys elsewhere are not ours", "[tool.flwr]\npublisher = 3\n[tool.pergolax]\na = 1\n[tool.pergola]\n", ""},
		{"dotted keys", "[tool]\npergola.engine = 'flower'\npergola.site.env.A = 'b'\n", ""},
		{
			"an unknown key", "\n[tool.pergola]\ndedline = \"6h\"\n",
			`p.toml:3: tool.pergola.dedline: there is no such key; did you mean "deadline"?; next: the keys here are ` + topKeys,
		},
		{
			"an unknown key of the server", "[tool.pergola.server]\n\ndatabse = 'x'",
			`p.toml:3: tool.pergola.server.databse: there is no such key; did you mean "database"?; next: the keys here are app-path, args, database, env, ready-timeout, restarts, stop-grace`,
		},
		{
			"an unknown key in an inline table", "[tool.pergola]\nengine='auto'\nserver = { args = [], foo = 1 }",
			`p.toml:3: tool.pergola.server.foo: there is no such key; next: the keys here are app-path, args, database, env, ready-timeout, restarts, stop-grace`,
		},
		{
			"a key that only flags set", "[tool.pergola]\nflwr = '1'",
			`p.toml:2: tool.pergola.flwr: there is no such key; next: the keys here are ` + topKeys,
		},
		{
			"the first of several faults is told", "[tool.pergola]\nsites = 3\nengine = 'x'\nabc = 1",
			`p.toml:2: tool.pergola.sites: this is a whole number, and has to be a list of strings; next: write it like ["a", "b"]`,
		},
		{
			"an unknown engine", "[tool.pergola]\nengine = \"flowre\"",
			`p.toml:2: tool.pergola.engine: there is no engine "flowre"; did you mean "flower"?; next: choose one of auto, native, flower`,
		},
		{"a number for a string", "[tool.pergola]\nengine = 3", `p.toml:2: tool.pergola.engine: this is a whole number, and has to be a string; next: put it in quotes`},
		{"a string for a number", "[tool.pergola]\nmin-sites = '3'", `p.toml:2: tool.pergola.min-sites: this is a string, and has to be a whole number; next: write it without quotes`},
		{"a fraction for a number", "[tool.pergola]\nmin-sites = 1.5", `p.toml:2: tool.pergola.min-sites: this is a fraction, and has to be a whole number; next: write it without quotes`},
		{"a number out of range", "[tool.pergola]\nmin-sites = 99999999999", `p.toml:2: tool.pergola.min-sites: the number is out of range; next: write a smaller one`},
		{
			"a negative number", "[tool.pergola]\nmin-sites = -1",
			`p.toml:2: tool.pergola.min-sites: a number of sites cannot be negative; next: give 1 or more, or leave it out for all wanted sites`,
		},
		{
			"more needed than wanted", "[tool.pergola]\nsites = ['a']\nmin-sites = 2",
			`p.toml:3: tool.pergola.min-sites: 2 sites are needed, but only 1 are wanted; next: lower min-sites or name more sites`,
		},
		{"a word for a boolean", "[tool.pergola]\nstrict-clients = 'true'", `p.toml:2: tool.pergola.strict-clients: this is a string, and has to be true or false; next: write it without quotes`},
		{
			"a mandatory site that is not wanted", "[tool.pergola]\nsites = ['charite']\nmandatory-sites = ['charit']",
			`p.toml:3: tool.pergola.mandatory-sites: site "charit" is not among the job's sites; did you mean "charite"?; next: name it in sites too, or remove it here`,
		},
		{"a mandatory site named twice", "[tool.pergola]\nmandatory-sites = ['a', 'a']", `p.toml:2: tool.pergola.mandatory-sites: site "a" is named twice; next: name it once`},
		{"a bad mandatory site", "[tool.pergola]\nmandatory-sites = ['restarts']", `p.toml:2: tool.pergola.mandatory-sites: no site can be called "restarts": [tool.pergola.site] has a key of that name; next: choose another name`},
		{
			"restarts without a file to restart from", "[tool.pergola.server]\nrestarts = 1",
			`p.toml:2: tool.pergola.server.restarts: the superlink's state is in memory and ends with it; next: give it a file with database in [tool.pergola.server], or leave restarts out`,
		},
		{"too many restarts", "[tool.pergola.site.a]\nrestarts = 1001", `p.toml:2: tool.pergola.site.a.restarts: 1001 is no number of restarts; next: give 0 to 1000`},
		{
			"an app outside of the folder for apps", "[tool.pergola.site]\napp-path = '../x'",
			`p.toml:2: tool.pergola.site.app-path: "../x" is not a path below the folder for apps; next: write it like "apps/ct": relative, with slashes, without "." or ".."`,
		},
		{
			"an app with an absolute path", "[tool.pergola.server]\napp-path = '/opt/x'",
			`p.toml:2: tool.pergola.server.app-path: "/opt/x" is not a path below the folder for apps; next: write it like "apps/ct": relative, with slashes, without "." or ".."`,
		},
		{"a bare number for a duration", "[tool.pergola]\ndeadline = 3600", `p.toml:2: tool.pergola.deadline: this is a whole number, and has to be a duration in quotes; next: ` + durationRule},
		{"a bad duration", "[tool.pergola]\ndeadline = '6 hours'", `p.toml:2: tool.pergola.deadline: "6 hours" is not a duration; next: ` + durationRule},
		{"a negative duration", "[tool.pergola.server]\nready-timeout = '-1s'", `p.toml:2: tool.pergola.server.ready-timeout: "-1s" is not a duration; next: ` + durationRule},
		{"a time for a string", "[tool.pergola]\nengine = 2026-01-01", `p.toml:2: tool.pergola.engine: this is a date or time, and has to be a string; next: put it in quotes`},
		{"a command with an open quote", "[tool.pergola.server]\nargs = \"--run-config 'a=1\"", `p.toml:2: tool.pergola.server.args: the command "--run-config 'a=1" has a ' without its other half; next: close the quote, or put a backslash before it`},
		{"a string for another list", "[tool.pergola]\nsites = 'a b'", `p.toml:2: tool.pergola.sites: this is a string, and has to be a list of strings; next: write it like ["a", "b"]`},
		{"a long stop-grace", "[tool.pergola.server]\nstop-grace = '1m'", `p.toml:2: tool.pergola.server.stop-grace: 1m is too long: the end of a job would take as long; next: give 10s at most`},
		{"a mixed list", "[tool.pergola]\nsites = ['a', 1]", `p.toml:2: tool.pergola.sites: the list holds a whole number, and may hold strings only; next: write it like ["a", "b"]`},
		{"a bad site", "[tool.pergola]\nsites = ['St Anna']", `p.toml:2: tool.pergola.sites: "St Anna" cannot be the name of a site; next: ` + nameRule},
		{"the hub as a site", "[tool.pergola]\nsites = ['hub']", `p.toml:2: tool.pergola.sites: no site can be called "hub": that is the hub's own side of a job; next: choose another name`},
		{"a site named twice", "[tool.pergola]\nsites = ['a', 'a']", `p.toml:2: tool.pergola.sites: site "a" is named twice; next: name it once`},
		{"a bad table of a site", "[tool.pergola.site.\"A B\"]\nenv = {}", `p.toml:1: tool.pergola.site.A B: "A B" cannot be the name of a site; next: ` + nameRule},
		{
			"a table of a site that is not there", "[tool.pergola]\nsites = ['charite']\n[tool.pergola.site.chariet]\nenv = {A='b'}",
			`p.toml:3: tool.pergola.site.chariet: site "chariet" is not among the job's sites; did you mean "charite"?; next: name it in sites too, or remove its table`,
		},
		{"an unknown key of all sites", "[tool.pergola.site]\nevn = 'x'", `p.toml:2: tool.pergola.site.evn: there is no such key; did you mean "env"?; next: the keys here are app-path, env, node-config, resources, restarts`},
		{
			"a misspelt table of all sites", "[tool.pergola.site]\nndoe-config = { a = 1 }",
			`p.toml:2: tool.pergola.site.ndoe-config: there is no such key; did you mean "node-config"?; next: the keys here are app-path, env, node-config, resources, restarts and the names of sites`,
		},
		{
			"an unknown key of one site", "[tool.pergola.site.a]\nnodeconfig = {}",
			`p.toml:2: tool.pergola.site.a.nodeconfig: there is no such key; did you mean "node-config"?; next: the keys here are app-path, env, node-config, resources, restarts`,
		},
		{"a number as a variable", "[tool.pergola.site]\nenv = { A = 'x',\n  B = 3 }", `p.toml:3: tool.pergola.site.env.B: this is a whole number, and has to be a string; next: put it in quotes`},
		{"a string as the variables", "[tool.pergola.server]\nenv = 'A=b'", `p.toml:2: tool.pergola.server.env: this is a string, and has to be a table of strings; next: write it like { NAME = "value" }`},
		{"a variable of ours", "[tool.pergola.server.env]\nPERGOLA_MARK = 'x'", `p.toml:2: tool.pergola.server.env.PERGOLA_MARK: variables that begin with PERGOLA_ belong to Pergola; next: choose another name`},
		{"a variable that cannot be", "[tool.pergola.site.a.env]\n'A=B' = 'x'", `p.toml:2: tool.pergola.site.a.env.A=B: "A=B" cannot be the name of an environment variable; next: use letters, digits and underscores`},
		{"a zero byte", "[tool.pergola.site.env]\nA = \"\\u0000\"", `p.toml:2: tool.pergola.site.env.A: the value holds a zero byte, which no program can be given; next: remove it`},
		{"resources that are no table", "[tool.pergola.site]\nresources = 3", `p.toml:2: tool.pergola.site.resources: this is a whole number, and has to be a table; next: write it like { cpus = 2, memory = "4GiB" }`},
		{"memory without a unit", "[tool.pergola.site.resources]\ncpus = 2\nmemory = 64", `p.toml:3: tool.pergola.site.resources.memory: memory has to have a unit; next: ` + sizeRule},
		{"memory that is no size", "[tool.pergola.site]\nresources = { memory = '64 gigs' }", `p.toml:2: tool.pergola.site.resources.memory: "64 gigs" is not a size; next: ` + sizeRule},
		{"a number in quotes", "[tool.pergola.site.a.resources]\ncpus = '2'", `p.toml:2: tool.pergola.site.a.resources.cpus: this is a string, and has to be a whole number; next: write it without quotes`},
		{"half a device", "[tool.pergola.site.resources]\ngpus = 0.5", `p.toml:2: tool.pergola.site.resources.gpus: this is a fraction, and has to be a whole number; next: write it without quotes, like 2`},
		{"fewer than none", "[tool.pergola.site.resources]\nlicence-x = -1", `p.toml:2: tool.pergola.site.resources.licence-x: -1 is no amount of licence-x; next: give 0 or more`},
		{"a resource with a bad name", "[tool.pergola.site.resources]\nLicence_X = 1", `p.toml:2: tool.pergola.site.resources.Licence_X: "Licence_X" cannot be the name of a resource; next: ` + nameRule},
		{"a number of jobs", "[tool.pergola.site.resources]\nmax-jobs = 1", `p.toml:2: tool.pergola.site.resources.max-jobs: max-jobs is for a site's own configuration; next: leave it out: a job counts as one at each of its sites`},
		{"a list as node config", "[tool.pergola.site]\nnode-config = { a = [1] }", `p.toml:2: tool.pergola.site.node-config.a: Flower takes only strings, numbers and booleans here; next: write a string, or several keys`},
		{"a node config that is no table", "[tool.pergola.site]\nnode-config = 'a=1'", `p.toml:2: tool.pergola.site.node-config: this is a string, and has to be a table; next: write it like { partition-id = 0 }`},
		{"an infinite node config", "[tool.pergola.site.node-config]\na = nan", `p.toml:2: tool.pergola.site.node-config.a: the value is not a finite number; next: write a finite number`},
		{"a bad pattern", "[tool.pergola]\nexclude = ['[']", `p.toml:2: tool.pergola.exclude: "[" is not a pattern; next: write patterns like "*.csv" or "data/*"`},
		{"a list for the table", "[[tool.pergola]]\nengine = 'auto'", `p.toml:1: tool.pergola: [tool.pergola] has to be a table, not a list; next: begin it with [tool.pergola]`},
		{"a string for the server", "[tool.pergola]\nserver = 'x'", `p.toml:2: tool.pergola.server: this is a string, and has to be a table; next: begin it with [tool.pergola.server]`},
		{"not TOML", "[tool.pergola]\nengine = auto", `p.toml:2:10: *; next: correct the file`},
		{"a key twice", "[tool.pergola]\nengine = 'auto'\nengine = 'auto'", `p.toml*; next: correct the file`},
		{"tool is no table", "tool = 3", `p.toml:1:*; next: correct the file`},
		{"not text", "\xff\xfe", `p.toml*; next: correct the file`},
		{"too large", strings.Repeat("#\n", MaxPyproject), `p.toml is larger than 1048576 bytes; next: move data out of it`},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := ParseSpec([]byte(c.toml), "p.toml")
			if c.want == "" {
				if err != nil {
					t.Errorf("got %v, want no problem in\n%s", err, c.toml)
				}
				return
			}
			if problem.CodeOf(err) != problem.Usage {
				t.Fatalf("got %v, want a usage problem", err)
			}
			got := err.Error()
			if head, tail, ok := strings.Cut(c.want, "*"); ok && (!strings.HasPrefix(got, head) || !strings.HasSuffix(got, tail)) || !ok && got != c.want {
				t.Errorf("got  %s\nwant %s\nin\n%s", got, c.want, c.toml)
			}
		})
	}
}

func TestSpecOfFlagsIsValidated(t *testing.T) {
	for _, c := range []struct {
		spec Spec
		want string
	}{
		{Spec{}, ""},
		{Spec{}.WithDefaults(), ""},
		{Spec{RunConfig: []string{"a=1", "b.c='x y'"}}, ""},
		{Spec{RunConfig: []string{"a"}}, `run-config: "a" is not KEY=VALUE`},
		{Spec{RunConfig: []string{"=a"}}, `run-config: "=a" is not KEY=VALUE`},
		{Spec{Deadline: -5}, "deadline: a duration cannot be negative"},
		{Spec{Engine: "x"}, `engine: there is no engine "x"`},
		{Spec{Server: Server{Args: []string{"a\x00"}}}, "server.args: "},
		{Spec{Priority: 1001}, "priority: 1001 is no priority"},
		{Spec{Site: Site{Resources: Resources{CPUs: -1}}}, "site.resources.cpus: "},
		{Spec{WaitTimeout: -2}, "wait-timeout: "},
		{Spec{Server: Server{Database: "a\x00"}}, "server.database: "},
		{Spec{Site: Site{NodeConfig: NodeConfig{"a b": "x"}}}, "site.node-config.a b: "},
		{Spec{Site: Site{NodeConfig: NodeConfig{"a": math.NaN()}}}, "site.node-config.a: "},
		{Spec{Site: Site{Named: map[string]Site{"a": {Named: map[string]Site{"b": {}}}}}}, "site.a: a site has no sites of its own"},
		{Spec{Sites: []string{"b"}, Site: Site{Named: map[string]Site{"a": {}}}}, ""}, // flags named other sites than the file
	} {
		err := c.spec.Validate()
		if c.want == "" && err != nil || c.want != "" && (problem.CodeOf(err) != problem.Usage || !strings.HasPrefix(err.Error(), c.want)) {
			t.Errorf("Validate(%+v) = %v, want %q", c.spec, err, c.want)
		}
	}
	if _, err := json.Marshal(Spec{Site: Site{NodeConfig: NodeConfig{"a": math.Inf(1)}}}); err == nil {
		t.Error("an infinite node config became JSON")
	}
}

func TestDefaults(t *testing.T) {
	got := Spec{NoProgress: NoLimit, StartTimeout: Duration(time.Second)}.WithDefaults()
	want := Spec{
		Engine: "auto", Deadline: NoLimit, OutageTolerance: Duration(time.Hour), NoProgress: NoLimit, StartTimeout: Duration(time.Second),
		WaitTimeout: NoLimit, JoinWait: Duration(time.Minute), LogQuota: 1 << 30, Server: Server{ReadyTimeout: Duration(time.Minute), StopGrace: Duration(2 * time.Second)},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	if (Spec{}).Need(3) != 3 || (Spec{MinSites: 2}).Need(3) != 2 {
		t.Error("Need does not follow min-sites")
	}
	s := Spec{
		Server: Server{Restarts: 1, AppPath: "h"},
		Site:   Site{Restarts: 2, AppPath: "all", Named: map[string]Site{"a": {Restarts: 3, AppPath: "a"}}},
	}
	for _, c := range []struct {
		party, app string
		restarts   int
	}{{HubParty, "h", 1}, {"a", "a", 3}, {"b", "all", 2}} {
		if s.RestartsFor(c.party) != c.restarts || s.AppPathFor(c.party) != c.app {
			t.Errorf("%s gets %d restarts and the app %q", c.party, s.RestartsFor(c.party), s.AppPathFor(c.party))
		}
	}
}

func TestWhatASiteGets(t *testing.T) {
	s := Spec{
		Server: Server{Env: map[string]string{"S": "1"}},
		Site: Site{
			Env: map[string]string{"A": "all", "B": "all"}, NodeConfig: NodeConfig{"x": int64(1), "y": int64(1)},
			Named: map[string]Site{"a": {Env: map[string]string{"B": "a"}, NodeConfig: NodeConfig{"y": int64(2), "partition-id": int64(7)}}},
		},
	}
	for _, c := range []struct {
		party  string
		config map[string]any
		env    map[string]string
	}{
		{"a", map[string]any{"x": int64(1), "y": int64(2), "partition-id": int64(7), "num-partitions": int64(3)}, map[string]string{"A": "all", "B": "a"}},
		{"b", map[string]any{"x": int64(1), "y": int64(1), "partition-id": int64(1), "num-partitions": int64(3)}, map[string]string{"A": "all", "B": "all"}},
		{HubParty, nil, map[string]string{"S": "1"}},
	} {
		env := s.EnvFor(c.party)
		if d := cmp.Diff(c.env, env); d != "" {
			t.Errorf("EnvFor(%s):\n%s", c.party, d)
		}
		env["A"] = "changed" // the result is the caller's
		if c.config == nil {
			continue
		}
		config := s.NodeConfigFor(c.party, 1, 3)
		if d := cmp.Diff(c.config, config); d != "" {
			t.Errorf("NodeConfigFor(%s):\n%s", c.party, d)
		}
		config["x"] = "changed"
	}
	if s.Site.Env["A"] != "all" || s.Site.NodeConfig["x"] != int64(1) {
		t.Error("a caller changed the specification")
	}
}

func TestDuration(t *testing.T) {
	for _, c := range []struct {
		in   string
		want time.Duration
		out  string
	}{
		{"6h", 6 * time.Hour, "6h"},
		{"30s", 30 * time.Second, "30s"},
		{"90s", 90 * time.Second, "1m30s"},
		{"1h30m", 90 * time.Minute, "1h30m"},
		{"2d", 48 * time.Hour, "48h"},
		{"1d12h", 36 * time.Hour, "36h"},
		{"1.5s", 1500 * time.Millisecond, "1.5s"},
		{"10m", 10 * time.Minute, "10m"},
		{"10s", 10 * time.Second, "10s"},
		{"100h0m10s", 100*time.Hour + 10*time.Second, "100h0m10s"},
		{"0", -1, "0"},
		{"0s", -1, "0"},
		{"0d", -1, "0"},
		{"", 0, "!"},
		{"6", 0, "!"},
		{"-1s", 0, "!"},
		{"+1s", 0, "!"},
		{"1 h", 0, "!"},
		{"d", 0, "!"},
		{"-1d", 0, "!"},
		{"1d-1h", 0, "!"},
		{"1.5d", 0, "!"},
		{"0.1ns", 0, "!"},
		{"99999d", 0, "!"},
		{"9999999999h", 0, "!"},
		{"36500d2562047h", 0, "!"},
		{strings.Repeat("9", 1000), 0, "!"},
	} {
		got, err := ParseDuration(c.in)
		if c.out == "!" {
			if problem.CodeOf(err) != problem.Usage || len(err.Error()) > 200 {
				t.Errorf("ParseDuration(%.50q) = %v, %v; want a usage problem", c.in, got, err)
			}
			continue
		}
		if err != nil || got != Duration(c.want) || got.String() != c.out {
			t.Errorf("ParseDuration(%q) = %v (%d), %v; want %s", c.in, got, got, err, c.out)
		}
	}
	if NoLimit.Std() != 0 || Duration(0).Std() != 0 || Duration(5).Std() != 5 {
		t.Error("Std gives timers a wrong span")
	}
	if Duration(0).Or(7) != 7 || NoLimit.Or(7) != NoLimit {
		t.Error("Or replaces what was said")
	}
}

// What parses prints as something that parses to the same, and is never negative.
func FuzzDuration(f *testing.F) {
	for _, s := range []string{"6h", "1d12h", "0", "0.1ns", "-1s", "1h0m0s", "2562047h47m16.854775807s", "µs"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		d, err := ParseDuration(s)
		if err != nil {
			if problem.CodeOf(err) != problem.Usage {
				t.Errorf("%q: %v is no usage problem", s, err)
			}
			return
		}
		var back Duration
		if err := back.UnmarshalText([]byte(d.String())); err != nil || back != d || d == 0 || d < NoLimit {
			t.Errorf("%q is %d, prints %q and reads back as %d, %v", s, d, d, back, err)
		}
	})
}

// What parses is valid and survives JSON; what does not is a usage problem that names the file.
func FuzzParseSpec(f *testing.F) {
	full, err := os.ReadFile("testdata/full.toml")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(full)
	for _, s := range []string{
		"", "[tool.pergola]\nengine = 3", "[tool]\npergola.site.a.env.B = ''", "[[tool.pergola]]", "tool = {pergola = {site = {a = {}}}}",
		"[tool.pergola.site.resources]\ncpus = 2\nmemory = '1.5 GB'\nlicence-x = 0", "[tool.pergola.site.node-config]\na = 1e99\nb = -0.0\nc = 0x10", "[tool.pergola.site]\n\"\" = {}", "tool.pergola.server = {args = [[]]}",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, doc []byte) {
		s, err := ParseSpec(doc, "p.toml")
		if err != nil {
			if problem.CodeOf(err) != problem.Usage || !strings.HasPrefix(err.Error(), "p.toml") {
				t.Errorf("%q: %v", doc, err)
			}
			return
		}
		if err := s.Validate(); err != nil {
			t.Errorf("%q parses and is not valid: %v", doc, err)
		}
		if err := s.WithDefaults().Validate(); err != nil {
			t.Errorf("%q is not valid with defaults: %v", doc, err)
		}
		raw, err := json.Marshal(s)
		if err != nil {
			t.Fatalf("%q: %v", doc, err)
		}
		var back Spec
		if err := json.Unmarshal(raw, &back); err != nil {
			t.Fatalf("%s: %v", raw, err)
		}
		if d := cmp.Diff(s, back, cmpopts.EquateEmpty()); d != "" {
			t.Errorf("%q through JSON %s (-want +got):\n%s", doc, raw, d)
		}
	})
}
