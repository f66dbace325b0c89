package job

// Setting is one key of [tool.pergola], for docs/settings.md and whoever maps other systems' settings to it.
type Setting struct {
	Key       string // path below [tool.pergola], "server.restarts"
	Type      string
	Default   string // as a person writes it; "" = none
	Flag      string // of `pergola run`; "" = none
	Meaning   string
	Reference string // the reference system's name for it, with its default where that differs; "" = it has none
}

// Settings has every key of [tool.pergola] exactly once, in the order of the documentation.
var Settings = []Setting{
	{"engine", "string", `"auto"`, "--engine", "how the app runs: `native`, `flower` (its own programs), or `auto`: native where that is known to do the same ([more](native-engine.md))", ""},
	{"isolation", "string", `"auto"`, "--isolation", "native engine: what one message may see of the one before: `warm` (one process), `fork` (a child for each), `process` (a new one for each); `auto`: as plain Flower of that version", ""},
	{"workers", "whole number", "as many as processors, clients at most", "--workers", "native engine: processes with the client app at each site", ""},
	{"clients", "whole number", "one at each site", "--clients", "native engine: clients of all sites together, each with its own node config and state", ""},
	{"gpus-per-worker", "number", "1", "", "native engine: devices of each worker, of those that the site gives the job; `0.5`: two workers share one", ""},
	{"sites", "list of strings", "all that may", "", "the job's sites, by name; their order gives `partition-id`", "`deploy_map`"},
	{"min-sites", "whole number", "all wanted sites", "--min-sites", "with this many the job starts, and goes on when others are late or gone ([below](#which-sites-a-job-needs))", "`min_clients` (1)"},
	{"mandatory-sites", "list of strings", "none", "--mandatory-site", "sites without which the job neither starts nor goes on, whatever `min-sites` says", "`mandatory_clients`"},
	{"strict-clients", "boolean", "false", "--strict-clients", "a site's part that fails ends the job, also where `min-sites` could do without it", "none: as if false"},
	{"join-wait", "duration", `"1m"`, "--join-wait", "how long the others are waited for once `min-sites` are there; `\"0\"`: until `start-timeout`", ""},
	{
		"start-timeout", "duration", `"10m"`, "--start-timeout", "longest wait for the parties to be ready once the job has begun, counted from the last progress of a build; with `pergola run` also for sites to connect",
		"`configure_task_timeout` (10 s), `start_task_timeout` (10 s), `runner_sync_timeout`, `max_runner_sync_timeout` (60 s), `max_reg_duration` (60 s)",
	},
	{"wait-timeout", "duration", "no limit", "--wait-timeout", "longest time in the queue; then the job fails ([more](scheduling.md)). With `pergola run`: `start-timeout`", ""},
	{"deadline", "duration", "no limit", "--deadline", "from the start of the preparation to the end", ""},
	{
		"outage-tolerance", "duration", `"1h"`, "", "for how long a site's link may be cut before its part has failed",
		"`tx_timeout` (100 s), `max_client_op_interval` (90 s)",
	},
	{"no-progress", "duration", `"1h"`, "--no-progress", "longest time in which no party shows any progress: a round, a message's handling, a line of output", "`progress_timeout`"},
	{"log-quota", "size", `"1GiB"`, "", "how much of a party's logs is kept, at its machine and at the hub; of what is more the middle is left out ([more](logs.md)); hub and sites may allow less", "none"},
	{"exclude", "list of strings", "none", "", "patterns of files that stay out of the bundle", ""},
	{"run-config", "list of strings", "none", "--run-config", "overrides of `[tool.flwr.app.config]`, each `key=value` with a value as in TOML; those of flags are added", "`run_config`"},
	{"flower-installs", "boolean", "false", "", "Flower itself may install the app's dependencies when it runs, in the versions that can (1.29 and on); the environment is built before in any case", "`allow_runtime_dependency_installation`"},
	{"server.args", "list of strings", "none", "", "arguments of the server app, as a list or as one string that is split as a shell would (`flower-server-app` up to flwr 1.12, `flwr run` after it)", "`server_app_args`"},
	{
		"server.database", "string", "in memory", "", "file for the superlink's state; a relative one is in the job's results",
		"`database`",
	},
	{"server.ready-timeout", "duration", `"1m"`, "", "until the superlink serves, and until it knows the ready sites' supernodes", "`superlink_ready_timeout` (10 s), `flower_server_ready_timeout` (10 s)"},
	{"server.stop-grace", "duration", `"2s"`, "", "pause between asking Flower to stop the run and ending its superlink; at most `\"10s\"`; `\"0\"`: none", "`superlink_grace_period`"},
	{"server.restarts", "whole number", "0", "", "how often the job is started again when the hub's runner of it died; needs `database` ([below](#when-the-hubs-runner-dies))", ""},
	{"server.app-path", "string", "the bundle's app", "", "an app that lies ready on the hub's machine, as a path below its folder for apps ([more](predeployed-apps.md))", "`flower_app_path`"},
	{"server.env", "table of strings", "none", "", "variables for the superlink and the server app", ""},
	{"site.env", "table of strings", "none", "--site-env", "variables for the supernode and the client app", "`extra_env`"},
	{"site.node-config", "table", "`partition-id`, `num-partitions`", "", "what Flower hands to the client app as its node's configuration", "fixed: `client-name`, `partition-id`, `num-partitions`"},
	{
		"site.resources", "table", "none", "--cpus, --memory, --gpus, --resource", "what the job needs of a site for itself: `cpus`, `memory` (as `\"8GiB\"`), `gpus`, and names of the sites' own; it waits until that is free ([more](scheduling.md))",
		"`resource_spec`",
	},
	{"site.restarts", "whole number", "0", "", "how often a supernode that died is started again", "none: as if 0"},
	{"site.app-path", "string", "the bundle's app", "", "an app that lies ready at the site, as a path below its folder for apps; flwr 1.12 and older ([more](predeployed-apps.md))", "`flower_app_path`"},
}

// Absent has the reference system's settings to which none of Settings answers, and why.
var Absent = []struct{ Name, Default, Why string }{
	{"num_rounds", "1", "it has no effect there either: the app's own configuration says how many rounds"},
	{"configure_task_name, start_task_name", "config, start", "names of messages that do not exist here: what a site should do follows from the stored job, not from a message"},
	{"job_status_check_interval", "2 s", "nothing is asked again and again: a change is acted upon when it is stored, a deadline when it is over"},
	{"monitor_interval", "0.5 s", "a program's end is told by the kernel, not looked for"},
	{"superlink_min_query_interval", "10 s", "the state of a run is asked for when its output ends; every 10 s only meanwhile"},
	{"per_msg_timeout", "10 s", "there are no messages with acknowledgements of their own: a site's link is one ordered stream that survives its connections"},
	{"rm_query_interval, rm_max_request_workers", "2 s, 20", "as above: nothing is queried, and streams need no workers to wait in"},
	{"client_shutdown_timeout", "5 s", "it has no effect there; programs have 5 s from the request to end to the kill"},
	{"int_client_grpc_options", "none", "bytes are passed on as they are: no program of Pergola's is a gRPC client of Flower's"},
	{"task check period, task fetch interval", "0.2 s, 0.5 s", "there are no tasks to fetch: an agent is told at once what changes"},
	{
		"job_heartbeat_interval, dead_client_grace_period, dead_client_check_lead_time", "10 s, 60 s, 30 s",
		"a matter of the hub, not of a job: `site-grace` in hub.toml (the job's `outage-tolerance`) is how long an agent may be away, and its connection is tested every 10 s",
	},
	{"heart_beat_timeout", "600 s", "a site is never removed for being away"},
	{"client_outcome_wait_timeout", "900 s", "a job waits 30 s for its parties to end; a site that is away then cleans up when it is back"},
	{"cell_wait_timeout", "5 s", "handshakes have 10 s; dialling goes on until `start-timeout`"},
}
