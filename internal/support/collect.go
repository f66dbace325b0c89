package support

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/pelletier/go-toml/v2"
	"golang.org/x/sys/unix"

	"github.com/pergolafl/pergola/internal/api"
	"github.com/pergolafl/pergola/internal/doctor"
	"github.com/pergolafl/pergola/internal/hub"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/monitor"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/redact"
	"github.com/pergolafl/pergola/internal/runner"
	"github.com/pergolafl/pergola/internal/site"
	"github.com/pergolafl/pergola/internal/store"
	"github.com/pergolafl/pergola/internal/store/postgres"
	"github.com/pergolafl/pergola/internal/store/sqlite"
)

// collection is a bundle in the making.
type collection struct {
	*Bundle
	Options

	confFile string
	conf     map[string]any // as it is in the file; nil: it cannot be read
	db       store.Store    // of a hub; nil: it cannot be read
	dbErr    error
	jobs     []job.Job // the latest
	chosen   job.ID
}

// learn tells the redactor of all secrets that can be found, before anything is taken in.
func (c *collection) learn(ctx context.Context) error {
	c.confFile = map[string]string{doctor.KindHub: hub.ConfigFile, doctor.KindSite: site.ConfigFile}[c.Kind]
	if raw, err := os.ReadFile(filepath.Join(c.Dir, c.confFile)); err == nil {
		if toml.Unmarshal(raw, &c.conf) != nil {
			c.conf = nil
		}
	}
	for _, k := range []string{"store", "proxy"} {
		if s, ok := c.conf[k].(string); ok && s != "" {
			c.red.LearnURL(s)
		}
	}
	if n, ok := c.conf["name"].(string); ok && c.Kind == doctor.KindSite {
		c.Manifest.Name = n
		c.red.Keep(n)
	}
	c.learnEnv("", c.conf)
	for _, pattern := range []string{"*.key", "jobs/*/party/*.key"} {
		keys, err := filepath.Glob(filepath.Join(c.Dir, pattern))
		if err != nil {
			return err
		}
		for _, k := range keys {
			if text, err := os.ReadFile(k); err == nil {
				c.red.Learn(string(text))
			}
		}
	}
	for _, kv := range os.Environ() {
		name, value, _ := strings.Cut(kv, "=")
		if redact.Secret(name) {
			c.red.Learn(value)
		}
		if strings.HasSuffix(strings.ToLower(name), "_proxy") || strings.HasSuffix(strings.ToLower(name), "_url") {
			c.red.LearnURL(value)
		}
	}
	// What jobs set as variables may be in any log.
	specs, err := filepath.Glob(filepath.Join(c.Dir, "jobs", "*", "party", "spec.json"))
	if err != nil {
		return err
	}
	for _, s := range specs {
		var v any
		if text, err := os.ReadFile(s); err == nil && json.Unmarshal(text, &v) == nil {
			c.learnEnv("", v)
		}
	}
	if c.Kind != doctor.KindHub {
		if c.Job != "" {
			return c.chooseBySite()
		}
		return nil
	}
	where, _ := c.conf["store"].(string)
	if where == "" {
		c.db, c.dbErr = opened(sqlite.Look(ctx, filepath.Join(c.Dir, hub.DatabaseFile)))
	} else {
		c.db, c.dbErr = opened(postgres.Look(ctx, where))
	}
	if c.dbErr != nil {
		if c.Job != "" {
			return problem.Wrap(c.dbErr, problem.Unavailable, "leave out --job", "job %s cannot be looked up", c.Job)
		}
		return nil
	}
	if c.jobs, c.dbErr = c.db.Jobs(ctx, store.Filter{Limit: maxJobs, Newest: true}); c.dbErr != nil {
		return nil //nolint:nilerr // an older store, say: the manifest tells
	}
	if c.Job != "" {
		id, err := c.db.FindJob(ctx, c.Job)
		if err != nil {
			return err
		}
		c.chosen = id
		j, err := c.db.Job(ctx, id)
		if err != nil {
			return err
		}
		c.red.Keep(j.Spec.Sites...)
		c.learnSpec(j)
	}
	for _, j := range c.jobs {
		c.red.Keep(j.Spec.Sites...)
		c.learnSpec(j)
	}
	return nil
}

// opened is for functions that give a *DB or an error.
func opened[T store.Store](db T, err error) (store.Store, error) {
	if err != nil {
		return nil, err
	}
	return db, nil
}

func (c *collection) close() {
	if c.db != nil {
		if err := c.db.Close(); err != nil {
			c.leave("the store's end", err)
		}
	}
}

func (c *collection) chooseBySite() error {
	var found []string
	for _, pattern := range []string{"jobs/" + strings.ToLower(c.Job) + "*", site.RunnerLogs + "/" + strings.ToLower(c.Job) + "*.log"} {
		paths, err := filepath.Glob(filepath.Join(c.Dir, pattern))
		if err != nil {
			return problem.New(problem.Usage, "give an id, or how it begins", "--job %q is no job's id", c.Job)
		}
		for _, p := range paths {
			base := strings.TrimSuffix(filepath.Base(p), ".log")
			if id, err := job.ParseID(base[:min(26, len(base))]); err == nil && !slices.Contains(found, string(id)) {
				found = append(found, string(id))
			}
		}
	}
	switch len(found) {
	case 1:
		c.chosen = job.ID(found[0])
		return nil
	case 0:
		return problem.New(problem.NotFound, "see the jobs with: pergola site status", "nothing of job %s is at this site", c.Job)
	}
	return problem.New(problem.Usage, "give more of it", "%s is the beginning of several jobs: %s", c.Job, strings.Join(found, ", "))
}

// learnEnv tells of all values of environments within v, which is as JSON or TOML is read.
func (c *collection) learnEnv(name string, v any) {
	switch v := v.(type) {
	case map[string]any:
		for k, e := range v {
			if s, ok := e.(string); ok {
				if redact.Environment(name) || redact.Secret(k) {
					c.red.Learn(s)
				}
				if strings.Contains(s, "@") {
					c.red.LearnURL(s)
				}
			}
			c.learnEnv(k, e)
		}
	case []any:
		for _, e := range v {
			c.learnEnv(name, e)
		}
	}
}

func (c *collection) learnSpec(j job.Job) {
	var v any
	if text, err := json.Marshal(j.Spec); err == nil && json.Unmarshal(text, &v) == nil {
		c.learnEnv("", v)
	}
}

// configuration takes the file in as it is read, without comments: those may say anything.
func (c *collection) configuration(context.Context) {
	name := "config/" + c.confFile
	if c.conf == nil {
		c.leave(name, errors.New("it cannot be read as TOML, so no secret can be found in it; doctor tells what is wrong"))
		return
	}
	conf, ok := c.red.Value("", c.conf).(map[string]any)
	if !ok {
		return
	}
	text, err := toml.Marshal(conf)
	if err != nil {
		c.leave(name, err)
		return
	}
	c.add(name, "the configuration, without comments, values of env, and passwords", string(text), false)
}

func (c *collection) versions(context.Context) {
	v := map[string]any{"pergola": api.BuildVersion(), "go": runtime.Version(), "os": runtime.GOOS, "arch": runtime.GOARCH, "cpus": runtime.NumCPU(), "uid": os.Getuid()}
	if bi, ok := debug.ReadBuildInfo(); ok {
		build := map[string]string{}
		for _, s := range bi.Settings {
			build[s.Key] = s.Value
		}
		v["build"] = build
	}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		v["kernel"] = unix.ByteSliceToString(u.Release[:])
	}
	if b, err := os.ReadFile("/etc/os-release"); err == nil {
		for line := range strings.Lines(string(b)) {
			if name, ok := strings.CutPrefix(line, "PRETTY_NAME="); ok {
				v["distribution"] = strings.Trim(strings.TrimSpace(name), `"`)
			}
		}
	}
	env := map[string]string{}
	for _, kv := range os.Environ() {
		name, value, _ := strings.Cut(kv, "=")
		switch low := strings.ToLower(name); {
		case strings.HasSuffix(low, "_proxy"), strings.HasPrefix(low, "pergola_"), strings.HasPrefix(low, "pip_"), strings.HasPrefix(low, "uv_"), low == "path", low == "lang", low == "ssl_cert_file":
			if redact.Secret(name) {
				value = redact.Mark
			}
			env[name] = value
		}
	}
	v["variables"] = env
	c.addValue("versions.json", "versions of Pergola and of the machine; variables of the environment of this command that matter", v)
}

// files lists the directory, down to a depth that shows its structure.
func (c *collection) files(ctx context.Context) {
	var out bytes.Buffer
	n := 0
	err := filepath.WalkDir(c.Dir, func(path string, d fs.DirEntry, err error) error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		rel, rerr := filepath.Rel(c.Dir, path)
		if rerr != nil {
			return rerr
		}
		depth := strings.Count(rel, string(filepath.Separator))
		if err != nil {
			fmt.Fprintf(&out, "%s: %v\n", rel, err)
			return nil
		}
		if n++; n > 20_000 {
			return fs.SkipAll
		}
		if info, err := d.Info(); err == nil {
			fmt.Fprintf(&out, "%s %12d %s %s\n", info.Mode(), info.Size(), info.ModTime().UTC().Format(time.RFC3339), rel)
		}
		if d.IsDir() && (depth >= 3 || strings.HasPrefix(rel, "bundles"+string(filepath.Separator))) {
			return fs.SkipDir
		}
		return nil
	})
	if err != nil {
		c.leave("directory.txt", err)
		return
	}
	c.add("directory.txt", "names, modes and sizes of what is in the directory", out.String(), n > 20_000)
}

func (c *collection) doctor(ctx context.Context) {
	var r doctor.Report
	if c.Kind == doctor.KindHub {
		r = doctor.Hub(ctx, c.Dir, doctor.Options{})
	} else {
		r = doctor.Site(ctx, c.Dir, doctor.Options{})
	}
	c.addValue("doctor.json", "what pergola doctor finds", r)
}

// process asks the hub or agent itself, if it runs.
func (c *collection) process(ctx context.Context) {
	socket := filepath.Join(c.Dir, map[string]string{doctor.KindHub: hub.MonitorSocket, doctor.KindSite: site.MonitorSocket}[c.Kind])
	var hangs error
	for _, p := range []struct{ page, name, about string }{
		{"/readyz", "process/readyz.json", "what the process says of itself"},
		{"/status", "process/status.json", "how it is"},
		{"/metrics", "process/metrics.txt", "its measurements, as Prometheus would have them"},
		{"/debug/goroutines", "process/goroutines.txt", "what it is doing at this moment"},
	} {
		if hangs != nil {
			c.leave(p.name, hangs)
			continue
		}
		_, body, err := monitor.Ask(ctx, socket, p.page)
		if err != nil {
			switch {
			case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
				err = errors.New("the process does not run")
			case errors.Is(err, context.DeadlineExceeded):
				hangs = errors.New("the process does not answer")
				err = hangs
			}
			c.leave(p.name, err)
			continue
		}
		if strings.HasSuffix(p.name, ".json") {
			c.addJSON(p.name, p.about, body, false)
		} else {
			c.add(p.name, p.about, string(body[:min(len(body), 4<<20)]), len(body) > 4<<20)
		}
	}
}

// listed is a job as the list has it.
type listed struct {
	ID        job.ID     `json:"id"`
	Name      string     `json:"name"`
	State     job.State  `json:"state"`
	Reason    string     `json:"reason,omitempty"`
	Cause     *job.Cause `json:"cause,omitempty"`
	Submitter string     `json:"submitter"`
	Created   time.Time  `json:"created"`
	Started   time.Time  `json:"started,omitzero"`
	Ended     time.Time  `json:"ended,omitzero"`
	Sites     []string   `json:"sites"`
}

func (c *collection) store(ctx context.Context) {
	if c.Kind != doctor.KindHub {
		return
	}
	if c.dbErr != nil {
		c.leave("store.json and jobs.json", c.dbErr)
		return
	}
	where, _ := c.conf["store"].(string)
	var facts any
	var err error
	if where == "" {
		facts, err = sqlite.Check(ctx, filepath.Join(c.Dir, hub.DatabaseFile))
	} else {
		facts, err = postgres.Check(ctx, where)
	}
	if err != nil {
		c.leave("store.json", err)
	} else {
		c.addValue("store.json", "how much is in the store, and of which version it is", facts)
	}
	list := make([]listed, 0, len(c.jobs))
	for _, j := range c.jobs {
		list = append(list, listed{j.ID, j.Name, j.State, j.Reason, j.Cause, j.Submitter, j.Created, j.Started, j.Ended, j.Spec.Sites})
	}
	c.addValue("jobs.json", fmt.Sprintf("the latest jobs, %d at most", maxJobs), list)
}

// logs takes in what the service and the runners have logged last.
func (c *collection) logs(ctx context.Context) {
	for i, path := range c.Logs {
		c.tail(fmt.Sprintf("logs/given-%d-%s", i+1, filepath.Base(path)), path, "a log that was named")
	}
	c.journal(ctx)
	patterns := map[string]string{filepath.Join("jobs", "*", "party", "runner.log"): "the log of a job's runner"}
	if c.Kind == doctor.KindSite {
		patterns[filepath.Join(site.RunnerLogs, "*.log")] = "the log of the runner of a job that is over"
	}
	for pattern, about := range patterns {
		paths, err := filepath.Glob(filepath.Join(c.Dir, pattern))
		if err != nil {
			c.leave(pattern, err)
			continue
		}
		slices.SortFunc(paths, func(a, b string) int { return cmp.Compare(b, a) }) // the latest first: ids are in the order of time
		if len(paths) > maxFiles {
			c.leave(fmt.Sprintf("%d more of %s", len(paths)-maxFiles, pattern), fmt.Errorf("there are the latest %d", maxFiles))
			paths = paths[:maxFiles]
		}
		for _, p := range paths {
			rel, err := filepath.Rel(c.Dir, p)
			if err != nil {
				continue
			}
			c.tail("logs/"+strings.ReplaceAll(filepath.ToSlash(rel), "/", "-"), p, about)
		}
	}
}

// journal asks systemd for the service's log, where there is such a service.
func (c *collection) journal(ctx context.Context) {
	path, err := exec.LookPath("journalctl")
	if err != nil {
		c.leave("logs/service.log", errors.New("there is no journalctl; name the service's log with --log FILE"))
		return
	}
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	text, err := exec.CommandContext(ctx, path, "--no-pager", "--quiet", "--output=cat", "--lines=5000", "--unit=pergola-"+c.Kind).Output()
	if err != nil || len(bytes.TrimSpace(text)) == 0 {
		c.leave("logs/service.log", fmt.Errorf("the journal has nothing of pergola-%s, or may not be read; name the service's log with --log FILE", c.Kind))
		return
	}
	cut := len(text) > maxTail
	if cut {
		text = text[len(text)-maxTail:]
		text = text[bytes.IndexByte(text, '\n')+1:]
	}
	c.addJSON("logs/service.log", "what systemd's journal has of the service", text, cut)
}

// job takes in what is known of the one job that was asked for.
func (c *collection) job(ctx context.Context) error {
	if c.chosen == "" {
		return nil
	}
	at := "job-" + string(c.chosen) + "/"
	dir := filepath.Join(c.Dir, "jobs", string(c.chosen))
	if c.db != nil {
		j, err := c.db.Job(ctx, c.chosen)
		if err != nil {
			return err
		}
		ps, err := c.db.Parties(ctx, c.chosen)
		if err != nil {
			return err
		}
		c.addValue(at+"job.json", "the job, with its settings and parties", map[string]any{"job": j, "parties": ps})
		var lines bytes.Buffer
		after, n := int64(0), 0
		for {
			es, err := c.db.Events(ctx, c.chosen, after, 1000)
			if err != nil {
				return err
			}
			for _, e := range es {
				after = e.Seq
				if n++; n > maxEvents {
					break
				}
				line, err := json.Marshal(e)
				if err != nil {
					return err
				}
				lines.Write(append(line, '\n'))
			}
			if len(es) < 1000 || n > maxEvents {
				break
			}
		}
		c.addJSON(at+"events.jsonl", "its events", lines.Bytes(), n > maxEvents)
	}
	c.tail(at+"spec.json", filepath.Join(dir, "party", "spec.json"), "what the party here was told to run")
	c.tail(at+"journal.jsonl", filepath.Join(dir, "party", "journal.jsonl"), "what its runner has written down")
	c.tail(at+"runner.log", runner.OutputFile(filepath.Join(dir, "party")), "its runner's log")
	n := 0
	err := filepath.WalkDir(filepath.Join(dir, "logs"), func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		if n++; n > maxFiles {
			c.leave(rel, fmt.Errorf("there are %d logs already", maxFiles))
			return nil
		}
		c.tail(at+filepath.ToSlash(rel), path, "the last lines of one of its programs")
		return nil
	})
	if err != nil {
		c.leave(at+"logs", err)
	}
	return nil
}
