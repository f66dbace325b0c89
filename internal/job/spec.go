package job

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"math"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pergolafl/pergola/internal/problem"
)

// Defaults of a specification.
const (
	DefaultOutageTolerance = Duration(time.Hour)
	DefaultNoProgress      = Duration(time.Hour) // the reference system's progress_timeout, 3600 s
	DefaultStartTimeout    = Duration(10 * time.Minute)
	DefaultReadyTimeout    = Duration(time.Minute) // Flower's superlink takes up to 18 s to listen on a busy machine
	DefaultJoinWait        = Duration(time.Minute)
	DefaultStopGrace       = Duration(2 * time.Second) // the reference system's superlink_grace_period
	DefaultLogQuota        = Size(1 << 30)
	MinLogQuota            = Size(1 << 20) // of which the first 128 KiB are kept in any case
)

// Spec says what a job wants. The part with TOML names comes from [tool.pergola] of the app's
// pyproject.toml and from flags; the rest is found out by whoever submits.
type Spec struct {
	Engine   string   `json:"engine,omitempty" toml:"engine"`
	Sites    []string `json:"sites,omitempty" toml:"sites"`         // none = all that may
	MinSites int      `json:"min-sites,omitempty" toml:"min-sites"` // 0 = all wanted ones

	MandatorySites []string `json:"mandatory-sites,omitempty" toml:"mandatory-sites"` // those without which it neither starts nor goes on
	StrictClients  bool     `json:"strict-clients,omitempty" toml:"strict-clients"`   // any site that fails ends the job, whatever min-sites says

	// How the native engine works; see IsolationFor and ClientsAt.
	Isolation     string  `json:"isolation,omitempty" toml:"isolation"`
	Workers       int     `json:"workers,omitempty" toml:"workers"`                 // processes at each site; 0 = as many as it has processors
	Clients       int     `json:"clients,omitempty" toml:"clients"`                 // of all sites together; 0 = one at each
	GPUsPerWorker float64 `json:"gpus-per-worker,omitempty" toml:"gpus-per-worker"` // 0 = 1

	// Set by ChooseEngine, which leaves no "auto" in Engine.
	EngineAuto bool   `json:"engine-auto,omitempty" toml:"-"` // nobody asked for this one: another may take its place
	EngineWhy  string `json:"engine-why,omitempty" toml:"-"`

	Priority int `json:"priority,omitempty" toml:"-"` // higher is taken first

	Deadline        Duration `json:"deadline,omitzero" toml:"deadline"`                 // from the start of preparing to the end
	OutageTolerance Duration `json:"outage-tolerance,omitzero" toml:"outage-tolerance"` // how long a site may be away
	NoProgress      Duration `json:"no-progress,omitzero" toml:"no-progress"`           // longest silence of all parties together
	StartTimeout    Duration `json:"start-timeout,omitzero" toml:"start-timeout"`       // until all wanted sites are ready
	WaitTimeout     Duration `json:"wait-timeout,omitzero" toml:"wait-timeout"`         // longest time in the queue
	JoinWait        Duration `json:"join-wait,omitzero" toml:"join-wait"`               // for the other sites, once min-sites are there

	LogQuota Size `json:"log-quota,omitzero" toml:"log-quota"` // of each party's logs

	Server  Server   `json:"server,omitzero" toml:"server"`
	Site    Site     `json:"site,omitzero" toml:"site"`
	Exclude []string `json:"exclude,omitempty" toml:"exclude"` // path.Match globs of what the bundle leaves out

	FlowerInstalls bool `json:"flower-installs,omitempty" toml:"flower-installs"` // Flower itself may install dependencies at run time

	RunConfig []string `json:"run-config,omitempty" toml:"run-config"` // "k=v" words over the app's own run config; those of flags come last

	Flwr          string `json:"flwr,omitempty" toml:"-"`           // the version asked for; "" = the app's requirement
	FlwrVersion   string `json:"flwr-version,omitempty" toml:"-"`   // the version in the lock
	PythonVersion string `json:"python-version,omitempty" toml:"-"` // of the interpreter the lock was made for, "3.12"
	App           App    `json:"app,omitzero" toml:"-"`
}

// App is the app as its own pyproject.toml names it.
type App struct {
	Name    string `json:"name,omitempty"`
	Version string `json:"version,omitempty"`
}

// Server is what the job wants on the hub's side.
type Server struct {
	Args         []string          `json:"args,omitempty" toml:"args"`                  // to the server app; in the file a list, or one string that is split as a shell would
	Database     string            `json:"database,omitempty" toml:"database"`          // to the superlink
	ReadyTimeout Duration          `json:"ready-timeout,omitzero" toml:"ready-timeout"` // until the superlink serves
	StopGrace    Duration          `json:"stop-grace,omitzero" toml:"stop-grace"`       // between asking Flower to stop the run and ending the superlink
	Restarts     int               `json:"restarts,omitempty" toml:"restarts"`          // how often the hub's runner is started again after it died
	AppPath      string            `json:"app-path,omitempty" toml:"app-path"`          // an app that lies ready on the hub's machine, used in place of the bundle's
	Env          map[string]string `json:"env,omitempty" toml:"env"`
}

// Site is what the job wants at sites: at every one, and in Named what a single one has in addition.
type Site struct {
	Env        map[string]string `json:"env,omitempty" toml:"env"`
	NodeConfig NodeConfig        `json:"node-config,omitempty" toml:"node-config"`
	Restarts   int               `json:"restarts,omitempty" toml:"restarts"`   // how often a supernode that died is started again
	AppPath    string            `json:"app-path,omitempty" toml:"app-path"`   // an app that lies ready at the site, used in place of the bundle's
	Resources  Resources         `json:"resources,omitempty" toml:"resources"` // of the site, for this job alone while it runs
	Named      map[string]Site   `json:"named,omitempty" toml:"-"`             // by the site's name; one level deep
}

// NodeConfig is what Flower hands to every ClientApp of a node: scalars (string, int64, float64,
// bool). As JSON it keeps the difference between 1 and 1.0, which Flower's apps see.
type NodeConfig map[string]any

// MarshalJSON writes floats so that they can be told from integers.
func (c NodeConfig) MarshalJSON() ([]byte, error) {
	m := make(map[string]any, len(c))
	for k, v := range c {
		if f, ok := v.(float64); ok {
			if math.IsNaN(f) || math.IsInf(f, 0) {
				return nil, problem.New(problem.Usage, "write a finite number", "node-config %s is not a finite number", k)
			}
			s := strconv.FormatFloat(f, 'g', -1, 64)
			if !strings.ContainsAny(s, ".e") {
				s += ".0"
			}
			v = json.RawMessage(s)
		}
		m[k] = v
	}
	return json.Marshal(m)
}

// UnmarshalJSON reads what MarshalJSON writes.
func (c *NodeConfig) UnmarshalJSON(b []byte) error {
	var m map[string]any
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	if err := d.Decode(&m); err != nil {
		return err
	}
	for k, v := range m {
		n, ok := v.(json.Number)
		if !ok {
			continue
		}
		if i, err := strconv.ParseInt(n.String(), 10, 64); err == nil {
			m[k] = i
		} else if f, err := n.Float64(); err == nil {
			m[k] = f
		} else {
			return fmt.Errorf("node-config %s: %w", k, err)
		}
	}
	*c = m
	return nil
}

// NodeConfigFor gives the node config of one site: what the job says for every site, then what it
// says for this one, then partition-id and num-partitions where it says neither. Index is the
// site's place among the n sites of the job, from 0. The caller may change the result.
func (s Spec) NodeConfigFor(site string, index, n int) map[string]any {
	c := map[string]any{"partition-id": int64(index), "num-partitions": int64(n)}
	maps.Copy(c, s.Site.NodeConfig)
	maps.Copy(c, s.Site.Named[site].NodeConfig)
	return c
}

// EnvFor gives the variables that the job sets for a party's programs: for HubParty those of
// [tool.pergola.server], for a site those of every site and then its own. The caller may change
// the result.
func (s Spec) EnvFor(party string) map[string]string {
	env := map[string]string{}
	if party == HubParty {
		maps.Copy(env, s.Server.Env)
		return env
	}
	maps.Copy(env, s.Site.Env)
	maps.Copy(env, s.Site.Named[party].Env)
	return env
}

// RestartsFor gives how often a party is started again by itself after it died: for HubParty its runner, for a site its
// supernode. What a site's own table says comes before what is said for every site.
func (s Spec) RestartsFor(party string) int {
	if party == HubParty {
		return s.Server.Restarts
	}
	if n := s.Site.Named[party].Restarts; n > 0 {
		return n
	}
	return s.Site.Restarts
}

// AppPathFor gives the app that lies ready at a party, "" for the bundle's: a slash-separated path below the folder that the
// party's own configuration keeps for such apps.
func (s Spec) AppPathFor(party string) string {
	if party == HubParty {
		return s.Server.AppPath
	}
	if p := s.Site.Named[party].AppPath; p != "" {
		return p
	}
	return s.Site.AppPath
}

// Need gives how many of the wanted sites must be ready before the app starts.
func (s Spec) Need(wanted int) int {
	if s.MinSites == 0 {
		return wanted
	}
	return s.MinSites
}

// WithDefaults fills in what nobody said. The deadline has no default: there is none.
func (s Spec) WithDefaults() Spec {
	if s.Engine == "" {
		s.Engine = Engines[0]
	}
	s.Deadline = s.Deadline.Or(NoLimit)
	s.OutageTolerance = s.OutageTolerance.Or(DefaultOutageTolerance)
	s.NoProgress = s.NoProgress.Or(DefaultNoProgress)
	s.StartTimeout = s.StartTimeout.Or(DefaultStartTimeout)
	s.WaitTimeout = s.WaitTimeout.Or(NoLimit)
	s.JoinWait = s.JoinWait.Or(DefaultJoinWait)
	s.LogQuota = s.LogQuota.Or(DefaultLogQuota)
	s.Server.ReadyTimeout = s.Server.ReadyTimeout.Or(DefaultReadyTimeout)
	s.Server.StopGrace = s.Server.StopGrace.Or(DefaultStopGrace)
	return s
}

// Validate finds the first fault of a specification, whoever wrote it: a *problem.Error with the
// code usage, or nil.
func (s Spec) Validate() error {
	if f := s.faults(); len(f) > 0 {
		return problem.New(problem.Usage, f[0].next, "%s: %s", strings.Join(f[0].key, "."), f[0].msg)
	}
	return nil
}

// A fault is what is wrong with the value of a key; the key is a path below [tool.pergola].
type fault struct {
	key       []string
	msg, next string
}

func (s Spec) faults() []fault {
	var out []fault
	add := func(msg, next string, key ...string) {
		if msg != "" {
			out = append(out, fault{key, msg, next})
		}
	}
	if s.Engine != "" && !slices.Contains(Engines, s.Engine) {
		add(fmt.Sprintf("there is no engine %q", s.Engine)+problem.DidYouMean(s.Engine, Engines),
			"choose one of "+strings.Join(Engines, ", "), "engine")
	}
	s.nativeFaults(add)
	seen := map[string]bool{}
	for _, name := range s.Sites {
		msg, next := nameFault("site", name)
		add(msg, next, "sites")
		if seen[name] {
			add(fmt.Sprintf("site %q is named twice", name), "name it once", "sites")
		}
		seen[name] = true
	}
	if s.MinSites < 0 {
		add("a number of sites cannot be negative", "give 1 or more, or leave it out for all wanted sites", "min-sites")
	}
	if len(s.Sites) > 0 && s.MinSites > len(s.Sites) {
		add(fmt.Sprintf("%d sites are needed, but only %d are wanted", s.MinSites, len(s.Sites)), "lower min-sites or name more sites", "min-sites")
	}
	seen = map[string]bool{}
	for _, name := range s.MandatorySites {
		msg, next := nameFault("site", name)
		add(msg, next, "mandatory-sites")
		if seen[name] {
			add(fmt.Sprintf("site %q is named twice", name), "name it once", "mandatory-sites")
		}
		seen[name] = true
		if len(s.Sites) > 0 && msg == "" && !slices.Contains(s.Sites, name) {
			add(fmt.Sprintf("site %q is not among the job's sites", name)+problem.DidYouMean(name, s.Sites),
				"name it in sites too, or remove it here", "mandatory-sites")
		}
	}
	for _, d := range []struct {
		key []string
		val Duration
	}{
		{[]string{"deadline"}, s.Deadline},
		{[]string{"outage-tolerance"}, s.OutageTolerance},
		{[]string{"no-progress"}, s.NoProgress},
		{[]string{"start-timeout"}, s.StartTimeout},
		{[]string{"wait-timeout"}, s.WaitTimeout},
		{[]string{"join-wait"}, s.JoinWait},
		{[]string{"server", "ready-timeout"}, s.Server.ReadyTimeout},
		{[]string{"server", "stop-grace"}, s.Server.StopGrace},
	} {
		if d.val < NoLimit {
			add("a duration cannot be negative", durationRule, d.key...)
		}
	}
	if s.LogQuota < NoSize || s.LogQuota > 0 && s.LogQuota < MinLogQuota {
		add(fmt.Sprintf("%s is too little for a party's logs", s.LogQuota), "give "+MinLogQuota.String()+" or more", "log-quota")
	}
	if s.Server.StopGrace > maxStopGrace {
		add(fmt.Sprintf("%s is too long: the end of a job would take as long", s.Server.StopGrace), "give "+maxStopGrace.String()+" at most", "server", "stop-grace")
	}
	if s.Priority < -MaxPriority || s.Priority > MaxPriority {
		add(fmt.Sprintf("%d is no priority", s.Priority), fmt.Sprintf("give %d to %d; 0 is what jobs have that say nothing", -MaxPriority, MaxPriority), "priority")
	}
	for _, p := range s.Exclude {
		if _, err := path.Match(p, ""); err != nil || p == "" {
			add(fmt.Sprintf("%q is not a pattern", p), `write patterns like "*.csv" or "data/*"`, "exclude")
		}
	}
	for _, kv := range s.RunConfig {
		if k, _, ok := strings.Cut(kv, "="); !ok || strings.TrimSpace(k) == "" {
			add(fmt.Sprintf("%q is not KEY=VALUE", kv), "write it like num-server-rounds=5", "run-config")
		}
	}
	for _, a := range s.Server.Args {
		if strings.ContainsRune(a, 0) {
			add("an argument holds a zero byte, which no program can be given", "remove it", "server", "args")
		}
	}
	if strings.ContainsRune(s.Server.Database, 0) {
		add("the name holds a zero byte", "remove it", "server", "database")
	}
	restartsFault(s.Server.Restarts, add, "server", "restarts")
	if s.Server.Restarts > 0 && (s.Server.Database == "" || s.Server.Database == ":memory:") {
		add("the superlink's state is in memory and ends with it", "give it a file with database in [tool.pergola.server], or leave restarts out", "server", "restarts")
	}
	appPathFault(s.Server.AppPath, add, "server", "app-path")
	envFaults(s.Server.Env, add, "server", "env")
	s.Site.faults(add, "site")
	for _, name := range slices.Sorted(maps.Keys(s.Site.Named)) {
		msg, next := nameFault("site", name)
		add(msg, next, "site", name)
		s.Site.Named[name].faults(add, "site", name)
		if s.Site.Named[name].Named != nil {
			add("a site has no sites of its own", "move the table one level up", "site", name)
		}
	}
	return out
}

func (s Site) faults(add func(msg, next string, key ...string), at ...string) {
	restartsFault(s.Restarts, add, append(slices.Clone(at), "restarts")...)
	appPathFault(s.AppPath, add, append(slices.Clone(at), "app-path")...)
	envFaults(s.Env, add, append(slices.Clone(at), "env")...)
	for _, k := range slices.Sorted(maps.Keys(s.Resources)) {
		msg, next := ResourceFault(k, s.Resources[k])
		add(msg, next, append(slices.Clone(at), "resources", k)...)
	}
	for _, k := range slices.Sorted(maps.Keys(s.NodeConfig)) {
		key := append(slices.Clone(at), "node-config", k)
		switch v := s.NodeConfig[k].(type) {
		case string, bool, int64, int:
		case float64:
			if math.IsNaN(v) || math.IsInf(v, 0) {
				add("the value is not a finite number", "write a finite number", key...)
			}
		default:
			add("Flower takes only strings, numbers and booleans here", "write a string, or several keys", key...)
		}
		if k == "" || strings.ContainsAny(k, " \t\r\n=\"'\x00") {
			add(fmt.Sprintf("%q cannot be a key of Flower's node config", k), "use letters, digits, hyphens, underscores and dots", key...)
		}
	}
}

// maxStopGrace keeps the end of the hub's party within what its starter waits for (runner.Handle.Keep).
const maxStopGrace = Duration(10 * time.Second)

// maxRestarts is more than any job can make use of.
const maxRestarts = 1000

func restartsFault(n int, add func(msg, next string, key ...string), key ...string) {
	if n < 0 || n > maxRestarts {
		add(fmt.Sprintf("%d is no number of restarts", n), fmt.Sprintf("give 0 to %d", maxRestarts), key...)
	}
}

// appPathFault refuses a path that leads out of the folder for such apps. Links on the way are for whoever opens it.
func appPathFault(p string, add func(msg, next string, key ...string), key ...string) {
	if p == "" {
		return
	}
	if !fs.ValidPath(p) || strings.ContainsAny(p, "\\\x00") {
		add(fmt.Sprintf("%q is not a path below the folder for apps", p), `write it like "apps/ct": relative, with slashes, without "." or ".."`, key...)
	}
}

// MarkPrefix begins the names of Pergola's own variables, by which it finds its programs again.
const MarkPrefix = "PERGOLA_"

func envFaults(env map[string]string, add func(msg, next string, key ...string), at ...string) {
	for _, k := range slices.Sorted(maps.Keys(env)) {
		key := append(slices.Clone(at), k)
		switch {
		case k == "" || strings.ContainsAny(k, "=\x00"):
			add(fmt.Sprintf("%q cannot be the name of an environment variable", k), "use letters, digits and underscores", key...)
		case strings.HasPrefix(k, MarkPrefix):
			add("variables that begin with "+MarkPrefix+" belong to Pergola", "choose another name", key...)
		case strings.ContainsRune(env[k], 0):
			add("the value holds a zero byte, which no program can be given", "remove it", key...)
		}
	}
}
