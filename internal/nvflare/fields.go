package nvflare

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Place is where a field stands.
type Place string

// Places, in the order in which a job folder is read.
const (
	InMeta       Place = "meta"
	InServer     Place = "config_fed_server"
	InController Place = "args of FlowerController"
	InClient     Place = "config_fed_client"
	InExecutor   Place = "args of FlowerExecutor"
)

// Field is what Pergola makes of one field of a job folder.
type Field struct {
	In      Place
	Key     string
	Default string // of NVIDIA FLARE, as JSON; a value that is equal, or empty, asks for nothing
	Setting string // the key of [tool.pergola] that it becomes, "" if it becomes none
	Says    string // what Pergola does; part of the warning if the field has no effect
	take    func(l *loader, f *file, v *node) error
}

// Warned tells whether the field has no effect, so that a value which asks for something is named in a warning.
func (f Field) Warned() bool { return f.take == nil }

// own is what Pergola itself gives a job.
const own = "Pergola gives a job its id, states, times and parties itself"

// link is why the reference's timers of messages have no counterpart.
const link = "the link between a site and the hub has no timers per message: it resumes where it was cut"

// Fields has every field that Pergola knows, in the order of docs/nvflare-jobs.md. Names and defaults are those of NVIDIA
// FLARE 2.5 – 2.9.
func Fields() []Field {
	const (
		ms      = "the hub sees what happens when it happens; there is nothing to be asked at intervals"
		derived = "Pergola sees for itself what the folder has"
		task    = "there are no tasks: Pergola starts the programs of a job by itself"
		filters = "there are no tasks, so there is nothing to filter; in NVIDIA FLARE, too, these filters do not see Flower's messages"
		install = "Pergola builds the environment from the app's dependencies before it starts; Flower itself installs nothing"
	)
	fs := []Field{
		{InMeta, "name", "", "", "the job is called after the app, [project] name of its pyproject.toml", (*loader).name},
		{InMeta, "deploy_map", "", "sites", "the clients that are named, in small letters and with - for _ and .; none with @ALL", read},
		{InMeta, "min_clients", "1", "min-sites", "how many sites must be ready, and go on when others fail; 1 stays unsaid, as the default is all", (*loader).minClients},
		{InMeta, "mandatory_clients", "", "mandatory-sites", "by the sites' names here", (*loader).mandatory},
		{InMeta, "resource_spec", "", "", "it is not taken over: say what the job needs of a site in [tool.pergola.site.NAME.resources], or with --gpus", nil},
		{InMeta, "launcher_spec", "", "", "a site's runner starts the programs as processes", nil},
		{InMeta, "scope", "", "", "there are no privacy scopes: each site decides what it runs", nil},
		{InMeta, "custom_props", "", "", "nothing in Pergola reads them", nil},
		{InMeta, "flower_predeployed", "", "", derived, nil},
		{InMeta, "byoc", "", "", derived, nil},
		{InMeta, "study", "", "", "there are no studies", nil},
		{InMeta, "stats_pool_config", "", "", "there are no pools of statistics", nil},
		{InMeta, "edge_method", "", "", "there are no edge devices", nil},
		{InMeta, "data_storage_format", "", "", own, nil},
	}
	for _, k := range []string{
		"job_id", "job_folder_name", "submitter_name", "submitter_org", "submitter_role", "status", "submit_time", "submit_time_iso", "start_time", "duration",
		"schedule_count", "last_schedule_time", "schedule_history", "job_deploy_detail", "job_clients", "cloned_from", "approvals", "content_location", "result_location",
	} {
		fs = append(fs, Field{InMeta, k, "", "", own, nil})
	}
	both := func(in Place) {
		fs = append(fs,
			Field{in, "format_version", "2", "", "the format that is read", (*loader).format},
			Field{in, "components", "", "", "parts for metrics need nothing here; others are not built", (*loader).components},
			Field{in, "task_data_filters", "", "", filters, nil},
			Field{in, "task_result_filters", "", "", filters, nil},
			Field{in, "handlers", "", "", "only Flower's programs run", nil})
		for _, k := range []string{
			"rm_query_interval", "rm_max_request_workers", "runner_sync_timeout", "max_runner_sync_timeout", "job_heartbeat_interval", "max_reg_duration",
			"heart_beat_timeout", "cell_wait_timeout",
		} {
			fs = append(fs, Field{in, k, "", "", link, nil})
		}
	}
	both(InServer)
	fs = append(fs,
		Field{InServer, "workflows", "", "", "exactly one FlowerController", read},
		Field{InServer, "server", "", "", link, nil},
		Field{InController, "num_rounds", "1", "", "NVIDIA FLARE does not use it either; the rounds are the app's own run config", nil},
		Field{InController, "database", "", "server.database", "as it is", (*loader).database},
		Field{InController, "superlink_ready_timeout", "10.0", "server.ready-timeout", "as it is", (*loader).readyTimeout},
		Field{InController, "configure_task_name", `"config"`, "", task, nil},
		Field{InController, "configure_task_timeout", "10", "start-timeout", "if it is longer than Pergola's 10m; the longest one counts", (*loader).startTimeout},
		Field{InController, "start_task_name", `"start"`, "", task, nil},
		Field{InController, "start_task_timeout", "10", "start-timeout", "if it is longer than Pergola's 10m; the longest one counts", (*loader).startTimeout},
		Field{InController, "job_status_check_interval", "2.0", "", ms, nil},
		Field{InController, "max_client_op_interval", "90.0", "outage-tolerance", "the greater of this and tx_timeout", (*loader).silence},
		Field{InController, "progress_timeout", "3600.0", "no-progress", "as it is; a supernode that only polls is no progress here", (*loader).progress},
		Field{InController, "int_client_grpc_options", "", "", "Flower's programs make their own connections, on this machine", nil},
		Field{InController, "server_app_args", "", "server.args", "as they are", (*loader).serverArgs},
		Field{InController, "superlink_grace_period", "2.0", "server.stop-grace", "as it is, 10s at most", (*loader).stopGrace},
		Field{InController, "superlink_min_query_interval", "10.0", "", ms, nil},
		Field{InController, "monitor_interval", "0.5", "", ms, nil},
		Field{InController, "run_config", "", "run-config", "one key=value each", (*loader).runConfig},
		Field{InController, "allow_runtime_dependency_installation", "false", "", install, nil},
		Field{InController, "flower_app_path", "", "", "the job folder's own app is run, and without one the job is refused; server.app-path names an app at the hub", nil})
	both(InClient)
	fs = append(fs,
		Field{InClient, "executors", "", "", "exactly one FlowerExecutor", read},
		Field{InClient, "default_task_fetch_interval", "0.5", "", task, nil},
		Field{InExecutor, "start_task_name", `"start"`, "", task, nil},
		Field{InExecutor, "configure_task_name", `"config"`, "", task, nil},
		Field{InExecutor, "per_msg_timeout", "10.0", "", link, nil},
		Field{InExecutor, "tx_timeout", "100.0", "outage-tolerance", "the greater of this and max_client_op_interval", (*loader).silence},
		Field{InExecutor, "client_shutdown_timeout", "5.0", "", "it has no effect in NVIDIA FLARE either; a supernode has a fixed time to take its leave", nil},
		Field{InExecutor, "extra_env", "", "site.env", "as it is; {SITE_NAME} becomes site.NAME.env where sites are named", (*loader).extraEnv},
		Field{InExecutor, "allow_runtime_dependency_installation", "false", "", install, nil})
	return fs
}

// read stands for what Load itself reads.
func read(*loader, *file, *node) error { return nil }

// fields takes what an object has by the table, and warns of every key that is not there.
func (l *loader) fields(in Place, f *file, o *node, used map[string]bool) error {
	known := map[string]Field{}
	for _, d := range l.table {
		if d.In == in {
			known[d.Key] = d
		}
	}
	for _, k := range o.keys {
		v := o.obj[k]
		d, ok := known[k]
		switch {
		case !ok && used[k]: // a variable that something else is made of
		case !ok:
			l.warn(f, v, k, "Pergola does not know this key; it has no effect")
		case v.empty() || d.Default != "" && equalText(v, d.Default):
		case d.Warned():
			l.warn(f, v, k, "%s has no effect: %s", v.text(), d.Says)
		default:
			l.key = k
			if err := d.take(l, f, v); err != nil {
				return err
			}
		}
	}
	return nil
}

// equalText tells whether a value is what a default says: numbers by their value.
func equalText(v *node, def string) bool {
	if n, ok := v.number(); ok {
		d, err := strconv.ParseFloat(def, 64)
		return err == nil && n == d
	}
	return v.text() == def
}

func (l *loader) name(f *file, v *node) error {
	if v.kind != kindString {
		return f.fault(v, "name", "put it in quotes", "this is %s, and has to be text", v.kind)
	}
	l.job.Name = v.s
	return nil
}

// maxClients is MAX_CLIENTS of nvflare/private/fed/server/job_meta_validator.py.
const maxClients = 1_000_000

func (l *loader) minClients(f *file, v *node) error {
	n, ok := v.i, v.kind == kindInt
	if v.kind == kindString {
		i, err := strconv.ParseInt(strings.TrimSpace(v.s), 10, 64)
		n, ok = i, err == nil
	}
	if !ok {
		return f.fault(v, "min_clients", "write it like 2", "%s is no whole number", v.text())
	}
	if n < 1 || n > maxClients {
		return f.fault(v, "min_clients", "choose 1 to the number of clients", "%d clients cannot be asked for", n)
	}
	if named := len(l.sites); named > 0 && n > int64(named) {
		return f.fault(v, "min_clients", "lower it, or name more clients in deploy_map", "%d clients are needed, but deploy_map names %d", n, named)
	}
	l.job.Settings.MinSites = int(n)
	return nil
}

func (l *loader) mandatory(f *file, v *node) error {
	names, err := f.texts(v, "mandatory_clients")
	if err != nil {
		return err
	}
	for _, n := range names {
		site, ok := l.renamed[n]
		if !ok {
			if len(l.sites) > 0 {
				return f.fault(v, "mandatory_clients", "add it there, or take it out here", "%q is not among the clients of deploy_map", n)
			}
			if site, err = l.site(f, v, "mandatory_clients", n); err != nil {
				return err
			}
		}
		if !slices.Contains(l.job.Settings.MandatorySites, site) {
			l.job.Settings.MandatorySites = append(l.job.Settings.MandatorySites, site)
		}
	}
	return nil
}

func (l *loader) format(f *file, v *node) error {
	if v.kind != kindInt || v.i != 2 {
		l.warn(f, v, "format_version", "%s is not the format that Pergola knows, 2; it is read as that", v.text())
	}
	return nil
}

func (l *loader) database(f *file, v *node) error {
	s, err := f.string(v, "database")
	l.job.Settings.Database = s
	return err
}

func (l *loader) readyTimeout(f *file, v *node) error {
	d, err := f.seconds(v, l.key)
	l.job.Settings.ReadyTimeout = d
	return err
}

// longestGrace is the greatest stop-grace: a job ends within a minute of what ends it.
const longestGrace = 10 * time.Second

func (l *loader) stopGrace(f *file, v *node) error {
	d, err := f.seconds(v, l.key)
	if d > longestGrace {
		l.warn(f, v, l.key, "%s becomes stop-grace %s, which is the longest", short(d), short(longestGrace))
		d = longestGrace
	}
	l.job.Settings.StopGrace = d
	return err
}

// startPatience is the default of start-timeout.
const startPatience = 10 * time.Minute

func (l *loader) startTimeout(f *file, v *node) error {
	d, err := f.seconds(v, l.key)
	if err != nil {
		return err
	}
	if d <= startPatience {
		l.warn(f, v, l.key, "%s has no effect: Pergola waits for the sites as long as start-timeout says, and %s is its default", short(d), short(startPatience))
		return nil
	}
	l.job.Settings.StartTimeout = max(l.job.Settings.StartTimeout, d)
	return nil
}

// silence collects how long a site may be silent; [loader.finish] takes the greatest.
func (l *loader) silence(f *file, v *node) error {
	d, err := f.seconds(v, l.key)
	l.silent[l.key] = max(l.silent[l.key], d)
	l.silentAt = f.path
	return err
}

// progressPatience is the default of no-progress, as of progress_timeout.
const progressPatience = time.Hour

func (l *loader) progress(f *file, v *node) error {
	d, err := f.seconds(v, l.key)
	if err == nil && d < progressPatience {
		l.warn(f, v, l.key, "becomes no-progress %s; here a supernode that only polls is no progress, so that a long round without a line of output must fit in", short(d))
	}
	l.job.Settings.NoProgress = d
	return err
}

func (l *loader) serverArgs(f *file, v *node) error {
	var err error
	l.job.Settings.ServerArgs, err = f.texts(v, l.key)
	return err
}

func (l *loader) runConfig(f *file, v *node) error {
	if v.kind != kindObject {
		return f.fault(v, l.key, `write it like {"num-server-rounds": 3}`, "this is %s, and has to be an object", v.kind)
	}
	for _, k := range v.keys {
		at := "run_config." + k
		if k == "" || strings.Trim(k, bareKey) != "" || strings.Contains("."+k+".", "..") {
			return f.fault(v.obj[k], at, "use letters, digits, hyphens, underscores and dots", "%q cannot be a key of a run config", k)
		}
		e := v.obj[k]
		if e.kind == kindString {
			if _, err := f.string(e, at); err != nil {
				return err
			}
		}
		s, ok := tomlScalar(e)
		if !ok {
			return f.fault(e, at, "use text, a number, true or false", "this is %s, which Flower does not pass on", e.kind)
		}
		l.job.Settings.RunConfig = append(l.job.Settings.RunConfig, k+"="+s)
	}
	slices.Sort(l.job.Settings.RunConfig)
	return nil
}

// bareKey has what a key of TOML may be made of without quotes, and the dot.
const bareKey = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-."

// reservedEnv is what NVIDIA FLARE 2.9 sets itself (nvflare/app_common/metrics_exchange/metrics_sender.py).
const reservedEnv = "NVFLARE_ANALYTICS_BOOTSTRAP"

func (l *loader) extraEnv(f *file, v *node) error {
	if v.kind != kindObject {
		return f.fault(v, l.key, `write it like {"NAME": "value"}`, "this is %s, and has to be an object", v.kind)
	}
	for _, k := range v.keys {
		e, at := v.obj[k], "extra_env."+k
		switch {
		case k == "" || strings.ContainsAny(k, "=\x00"):
			return f.fault(e, at, "use letters, digits and underscores", "%q cannot be the name of an environment variable", k)
		case strings.HasPrefix(k, "PERGOLA_"):
			return f.fault(e, at, "choose another name", "variables that begin with PERGOLA_ belong to Pergola")
		case e.kind != kindString:
			return f.fault(e, at, "put it in quotes", "this is %s, and has to be text", e.kind)
		case strings.ContainsRune(e.s, 0):
			return f.fault(e, at, "remove it", "the value holds a zero byte, which no program can be given")
		case k == reservedEnv:
			l.warn(f, e, at, "is not set: it belongs to NVIDIA FLARE's way of streaming metrics")
			continue
		}
		vars := systemVars(e.s)
		switch bySite := len(vars) > 0 && !slices.ContainsFunc(vars, func(s string) bool { return s != "SITE_NAME" }) && len(l.here) > 0; {
		case bySite:
			for _, client := range l.here {
				l.siteEnv(l.renamed[client], k, strings.ReplaceAll(e.s, "{SITE_NAME}", client))
			}
		case len(vars) > 0:
			l.warn(f, e, at, "is not set: {%s} has a value only while NVIDIA FLARE runs; set what it should be for each site in [tool.pergola.site.NAME] env", vars[0])
		case l.split:
			for _, client := range l.here {
				l.siteEnv(l.renamed[client], k, e.s)
			}
		default:
			if l.job.Settings.SiteEnv == nil {
				l.job.Settings.SiteEnv = map[string]string{}
			}
			l.job.Settings.SiteEnv[k] = e.s
		}
	}
	return nil
}

func (l *loader) siteEnv(site, k, v string) {
	s := &l.job.Settings
	if s.NamedEnv == nil {
		s.NamedEnv = map[string]map[string]string{}
	}
	if s.NamedEnv[site] == nil {
		s.NamedEnv[site] = map[string]string{}
	}
	s.NamedEnv[site][k] = v
}

// metricParts are the classes by which NVIDIA FLARE streams metrics of a Flower app (flower_job.py of 2.5 – 2.9, and the
// receivers of nvflare/app_opt/tracking).
var metricParts = []string{"MetricRelay", "CellPipe", "FilePipe", "ExternalConfigurator", "TBAnalyticsReceiver", "MLflowReceiver", "WandBReceiver", "ConvertToFedEvent"}

func (l *loader) components(f *file, v *node) error {
	if v.kind != kindList {
		return f.fault(v, "components", "write it like []", "this is %s, and has to be a list", v.kind)
	}
	for i, c := range v.list {
		key := fmt.Sprintf("components[%d]", i)
		if c.kind != kindObject {
			return f.fault(c, key, `write it like {"id": …, "path": …, "args": {}}`, "this is %s, and has to be an object", c.kind)
		}
		if off := c.get("disabled"); off != nil && off.kind == kindBool && off.b {
			continue
		}
		class := classOf(c)
		id := "a component without id"
		if n := c.get("id"); n != nil && n.kind == kindString {
			id = n.s
		}
		if slices.Contains(metricParts, lastName(class)) {
			l.warn(f, c, key, "%s (%s) is not needed: the streaming of metrics is built in", id, class)
		} else {
			l.warn(f, c, key, "%s (%s) has no effect: only Flower's programs run", id, class)
		}
	}
	return nil
}

// string gives a text of which no part is left to NVIDIA FLARE's run time.
func (f *file) string(v *node, key string) (string, error) {
	if v.kind != kindString {
		return "", f.fault(v, key, "put it in quotes", "this is %s, and has to be text", v.kind)
	}
	if vars := systemVars(v.s); len(vars) > 0 {
		return "", f.fault(v, key, "write the value itself", "{%s} has a value only while NVIDIA FLARE runs", vars[0])
	}
	return v.s, nil
}

func (f *file) texts(v *node, key string) ([]string, error) {
	if v.kind != kindList {
		return nil, f.fault(v, key, `write it like ["a", "b"]`, "this is %s, and has to be a list", v.kind)
	}
	var out []string
	for _, e := range v.list {
		s, err := f.string(e, key)
		if err != nil {
			return nil, err
		}
		out = append(out, s)
	}
	return out, nil
}

// maxSeconds bounds what is taken for a time span: a hundred years.
const maxSeconds = 100 * 365 * 24 * 3600

func (f *file) seconds(v *node, key string) (time.Duration, error) {
	s, ok := v.number()
	if !ok {
		return 0, f.fault(v, key, "write it in seconds, like 600", "this is %s, and has to be a number of seconds", v.kind)
	}
	if s < 0.001 || s > maxSeconds {
		return 0, f.fault(v, key, "write it in seconds, like 600", "%s is no time to wait", v.text())
	}
	return time.Duration(s*1000) * time.Millisecond, nil
}

// finish makes settings of what was collected from several places.
func (l *loader) finish() {
	s := &l.job.Settings
	if s.MinSites <= 1 {
		s.MinSites = 0
	}
	if len(l.silent) == 0 {
		return
	}
	// What is not said has NVIDIA FLARE's default.
	both := map[string]time.Duration{"max_client_op_interval": 90 * time.Second, "tx_timeout": 100 * time.Second}
	maps.Copy(both, l.silent)
	s.OutageTolerance = max(both["max_client_op_interval"], both["tx_timeout"])
	l.job.Warnings = append(l.job.Warnings, fmt.Sprintf("%s: max_client_op_interval %s and tx_timeout %s become outage-tolerance %s, the greater of the two: how long a site may be away",
		l.silentAt, short(both["max_client_op_interval"]), short(both["tx_timeout"]), short(s.OutageTolerance)))
}
