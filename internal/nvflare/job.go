package nvflare

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/pergolafl/pergola/internal/problem"
)

// Job is a Flower job of NVIDIA FLARE, read and mapped.
type Job struct {
	Dir      string   // as given
	Name     string   // of meta, or the folder's
	AppDir   string   // the custom folder with the Flower app
	Settings Settings // what [tool.pergola] has to say; empty if the app says it itself
	Warnings []string // a sentence each: file, line, key, and what Pergola does
}

// Is tells whether dir looks like a job folder and not like an app: it has a meta file and nothing that makes it an app.
func Is(dir string) bool {
	if find(dir, "meta") == "" {
		return false
	}
	for _, name := range []string{"pyproject.toml", "server.py"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err == nil {
			return false
		}
	}
	return true
}

// The classes of the Flower integration.
const (
	controllerClass = "nvflare.app_opt.flower.controller.FlowerController"
	executorClass   = "nvflare.app_opt.flower.executor.FlowerExecutor"
)

type loader struct {
	job   *Job
	table []Field
	key   string // of the field that is being taken

	clients []string          // that deploy_map names, in order
	sites   []string          // what they are called here; none for all
	renamed map[string]string // client → site
	apps    []deployed

	here  []string // the clients of the configuration that is being read; none for all
	split bool     // several configurations of clients: what one says holds for its own only

	silent   map[string]time.Duration
	silentAt string
}

// deployed is an app of the deploy map.
type deployed struct {
	name    string
	server  bool
	all     bool // every client
	clients []string
}

func (d deployed) forClients() bool { return d.all || len(d.clients) > 0 }

// Load reads the job folder dir. Errors have the code app-invalid and name file, line and key.
func Load(dir string) (*Job, error) {
	l := &loader{job: &Job{Dir: dir, Name: filepath.Base(absolute(dir))}, table: Fields(), renamed: map[string]string{}, silent: map[string]time.Duration{}}
	path := find(dir, "meta")
	if path == "" {
		return nil, problem.New(problem.AppInvalid, "give the folder that has meta.json in it", "%s is no job folder: it has no meta.json", dir)
	}
	meta, err := readConfig(path)
	if err != nil {
		return nil, err
	}
	if err := l.deployMap(meta); err != nil {
		return nil, err
	}
	if err := l.fields(InMeta, meta, meta.root, nil); err != nil {
		return nil, err
	}
	if err := l.configs(meta); err != nil {
		return nil, err
	}
	if err := l.findApp(meta); err != nil {
		return nil, err
	}
	l.finish()
	l.others()
	return l.job, l.ownSettings()
}

func absolute(dir string) string {
	if abs, err := filepath.Abs(dir); err == nil {
		return abs
	}
	return dir
}

func (l *loader) warn(f *file, at *node, key, format string, args ...any) {
	line := 1
	if at != nil && at.line > 0 {
		line = at.line
	}
	w := fmt.Sprintf("%s:%d: %s: %s", f.path, line, key, fmt.Sprintf(format, args...))
	if !slices.Contains(l.job.Warnings, w) {
		l.job.Warnings = append(l.job.Warnings, w)
	}
}

const (
	everybody  = "@ALL"   // any case
	serverSite = "server" // this case
)

var (
	folderName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]*$`)
	siteName   = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
)

// deployMap reads which app goes where.
func (l *loader) deployMap(f *file) error {
	const next = `write it like {"app": ["@ALL"]}`
	m := f.root.get("deploy_map")
	if m == nil || m.empty() {
		return f.fault(m, "deploy_map", next, "it does not say which app goes where")
	}
	if m.kind != kindObject {
		return f.fault(m, "deploy_map", next, "this is %s, and has to be an object", m.kind)
	}
	seen := map[string]string{}
	var all *node
	server, count := false, 0
	for _, app := range m.keys {
		v, key := m.obj[app], "deploy_map."+app
		if !folderName.MatchString(app) {
			return f.fault(v, key, "begin it with a letter or digit, and use letters, digits, dots, hyphens and underscores", "%q cannot be the name of an app", app)
		}
		targets, err := f.targets(v, key, 0)
		if err != nil {
			return err
		}
		d := deployed{name: app}
		for _, t := range targets {
			count++
			switch {
			case strings.EqualFold(t, everybody):
				all, d.all, d.server, server = v, true, true, true
			case seen[t] != "":
				return f.fault(v, key, "name each once", "%q is the target of %s already", t, seen[t])
			case t == serverSite:
				d.server, server = true, true
			default:
				if err := l.client(f, v, key, t); err != nil {
					return err
				}
				d.clients = append(d.clients, t)
			}
			seen[t] = app
		}
		l.apps = append(l.apps, d)
	}
	switch {
	case count == 0:
		return f.fault(m, "deploy_map", next, "it names no site")
	case all != nil && count > 1:
		return f.fault(all, "deploy_map", "leave "+everybody+" alone, or name all", "nothing can stand beside "+everybody)
	case !server:
		return f.fault(m, "deploy_map", `add "server"`, "no app goes to the server")
	case all == nil && len(l.clients) == 0:
		return f.fault(m, "deploy_map", "add the clients", "no app goes to a client")
	}
	l.job.Settings.Sites = l.sites
	return nil
}

// client notes a client of the deploy map under the name that its site can have here.
func (l *loader) client(f *file, v *node, key, name string) error {
	site, err := l.site(f, v, key, name)
	if err != nil {
		return err
	}
	if slices.Contains(l.sites, site) {
		return f.fault(v, key, "rename one of them", "two clients would be the site %q", site)
	}
	l.clients, l.sites = append(l.clients, name), append(l.sites, site)
	l.renamed[name] = site
	return nil
}

// site gives the name that a client's site can have here, and warns if it is another.
func (l *loader) site(f *file, v *node, key, name string) (string, error) {
	site := strings.ToLower(strings.NewReplacer("_", "-", ".", "-").Replace(name))
	if !siteName.MatchString(site) || site == "hub" || site == "env" || site == "node-config" {
		return "", f.fault(v, key, "use 1 to 63 lower-case letters, digits and hyphens, and not hub, env or node-config", "no site can be called %q", name)
	}
	if site != name {
		l.warn(f, v, key, "the client %q is the site %q here, where names have lower-case letters, digits and hyphens only", name, site)
	}
	return site, nil
}

// targets gives the sites of one app: a name, a list, {"targets": …} or {"sites": …}, and mixtures.
func (f *file) targets(v *node, key string, depth int) ([]string, error) {
	const next = `write it like ["server", "site-1"]`
	switch {
	case depth > 4:
		return nil, f.fault(v, key, next, "lists are too deep")
	case v.kind == kindString && v.s != "":
		return []string{v.s}, nil
	case v.kind == kindList:
		var out []string
		for _, e := range v.list {
			t, err := f.targets(e, key, depth+1)
			if err != nil {
				return nil, err
			}
			out = append(out, t...)
		}
		return out, nil
	case v.kind == kindObject:
		var out []string
		for _, k := range v.keys {
			if k != "targets" && k != "sites" {
				return nil, f.fault(v.obj[k], key+"."+k, `use "sites" or "targets"`, "there is no such key%s", problem.DidYouMean(k, []string{"sites", "targets"}))
			}
			t, err := f.targets(v.obj[k], key+"."+k, depth+1)
			if err != nil {
				return nil, err
			}
			out = append(out, t...)
		}
		return out, nil
	}
	return nil, f.fault(v, key, next, "%s names no site", v.text())
}

// configs reads the configurations of the server and of each app that goes to clients.
func (l *loader) configs(meta *file) error {
	clientApps := 0
	for _, d := range l.apps {
		if d.forClients() {
			clientApps++
		}
	}
	l.split = clientApps > 1
	for _, d := range l.apps {
		dir := filepath.Join(l.job.Dir, d.name)
		if info, err := os.Stat(filepath.Join(dir, "config")); err != nil || !info.IsDir() {
			return meta.fault(meta.root.get("deploy_map").get(d.name), "deploy_map."+d.name, "add the folder, or correct the name", "there is no folder %s", filepath.Join(dir, "config"))
		}
		for _, c := range []struct {
			want        bool
			file        Place
			key, inner  string
			class, what string
			args        Place
		}{
			{d.server, InServer, "workflows", "", controllerClass, "controller", InController},
			{d.forClients(), InClient, "executors", "executor", executorClass, "executor", InExecutor},
		} {
			if !c.want {
				continue
			}
			path := find(filepath.Join(dir, "config"), string(c.file))
			if path == "" {
				who := "the server"
				if c.file == InClient {
					who = "clients"
				}
				return meta.fault(meta.root.get("deploy_map").get(d.name), "deploy_map."+d.name, "add the file, or correct the deploy map",
					"the app goes to %s, but there is no %s", who, filepath.Join(dir, "config", string(c.file)+".json"))
			}
			f, err := readConfig(path)
			if err != nil {
				return err
			}
			l.here = d.clients
			if err := l.config(f, c.file, c.key, c.inner, c.class, c.what, c.args); err != nil {
				return err
			}
		}
	}
	return nil
}

// config reads one configuration: the only part of the list at key has to be of that class.
func (l *loader) config(f *file, in Place, key, inner, class, what string, args Place) error {
	r := &resolver{f: f, used: map[string]bool{}}
	root := newObject(1)
	for _, k := range f.root.keys {
		v := f.root.obj[k]
		if k == key || k == "components" {
			var err error
			if v, err = r.value(v, 0); err != nil {
				return err
			}
		}
		root.set(k, v)
	}
	next := "run it with NVIDIA FLARE; Pergola runs Flower apps, by " + controllerClass + " and " + executorClass + " there"
	list := root.get(key)
	if list == nil || list.kind != kindList || len(list.list) == 0 {
		return f.fault(list, key, next, "this is no Flower job: no %s is named here", what)
	}
	var found, holder *node
	for i, e := range list.list {
		at := fmt.Sprintf("%s[%d]", key, i)
		if e.kind != kindObject {
			return f.fault(e, at, `write it like {"path": "`+class+`", "args": {}}`, "this is %s, and has to be an object", e.kind)
		}
		c := e
		if inner != "" {
			if c = e.get(inner); c == nil || c.kind != kindObject {
				return f.fault(e, at, `write it like {"tasks": ["*"], "executor": {"path": "`+class+`", "args": {}}}`, "it has no %s", inner)
			}
		}
		if off := c.get("disabled"); off != nil && off.kind == kindBool && off.b {
			continue
		}
		if name := classOf(c); name != class && name != lastName(class) {
			where := c
			for _, k := range []string{"name", "class_path", "path"} {
				if v := c.get(k); v != nil {
					where = v
				}
			}
			return f.fault(where, at, next, "this is no Flower job: its %s is %s", what, name)
		}
		if found != nil {
			return f.fault(c, at, "leave one", "there is a second %s", class)
		}
		found, holder = c, e
		l.strange(f, e, at, map[string]bool{"id": true, "path": true, "class_path": true, "name": true, "args": true, "disabled": true, "tasks": true, inner: true, "config_type": true})
		if c != e {
			l.strange(f, c, at+"."+inner, map[string]bool{"path": true, "class_path": true, "name": true, "args": true, "disabled": true, "config_type": true})
		}
	}
	if found == nil {
		return f.fault(list, key, next, "this is no Flower job: no %s is switched on", what)
	}
	if err := l.tasks(f, holder, key, inner); err != nil {
		return err
	}
	if a := found.get("args"); a != nil && a.kind != kindNull {
		if a.kind != kindObject {
			return f.fault(a, key+".args", "write it like {}", "this is %s, and has to be an object", a.kind)
		}
		if err := l.fields(args, f, a, nil); err != nil {
			return err
		}
	}
	return l.fields(in, f, root, r.used)
}

// strange warns of the keys of a part that nobody reads.
func (l *loader) strange(f *file, o *node, at string, known map[string]bool) {
	for _, k := range o.keys {
		if !known[k] {
			l.warn(f, o.obj[k], at+"."+k, "Pergola does not know this key; it has no effect")
		}
	}
}

// tasks warns if an executor would not have been given the tasks of a Flower job.
func (l *loader) tasks(f *file, e *node, key, inner string) error {
	if inner == "" {
		return nil
	}
	t := e.get("tasks")
	if t == nil {
		return f.fault(e, key, `add "tasks": ["*"]`, "the executor has no tasks")
	}
	names, err := f.texts(t, key+".tasks")
	if err != nil {
		return err
	}
	if !slices.Contains(names, "*") && len(names) < 2 {
		l.warn(f, t, key+".tasks", "%s has no effect: there are no tasks; Pergola starts the programs of a job by itself", t.text())
	}
	return nil
}

// classOf gives the class of a part as its configuration names it.
func classOf(c *node) string {
	for _, k := range []string{"path", "class_path", "name"} {
		if v := c.get(k); v != nil && v.kind == kindString && v.s != "" {
			return v.s
		}
	}
	return "a part that names no class"
}

func lastName(class string) string { return class[strings.LastIndexByte(class, '.')+1:] }

// findApp decides which custom folder has the Flower app: the server's and the clients' have to be one and the same.
func (l *loader) findApp(meta *file) error {
	var dirs []string
	for _, d := range l.apps {
		dir := filepath.Join(l.job.Dir, d.name, "custom")
		info, err := os.Stat(dir)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil || !info.IsDir():
			return problem.New(problem.AppInvalid, "make it a folder that can be read", "%s is no folder that can be read", dir)
		case isApp(dir):
			dirs = append(dirs, dir)
		default:
			l.job.Warnings = append(l.job.Warnings, dir+": it has no Flower app (pyproject.toml) and is not used")
		}
	}
	if len(dirs) == 0 {
		for _, d := range l.apps {
			dir := filepath.Join(l.job.Dir, d.name, "custom")
			if sub := appBelow(dir); sub != "" {
				return problem.New(problem.AppInvalid, "move its content one level up", "there is a Flower app in %s, but it has to be in %s itself", sub, dir)
			}
		}
		if l.predeployed() {
			return meta.fault(nil, "", "give the app's own directory: pergola run DIR", "the job has no app: flower_app_path names one that is at the server already")
		}
		return meta.fault(nil, "", "add it: pyproject.toml and the package", "no app of deploy_map has a Flower app in its custom folder")
	}
	first, err := hashTree(dirs[0])
	if err != nil {
		return err
	}
	for _, d := range dirs[1:] {
		other, err := hashTree(d)
		if err != nil {
			return err
		}
		if diff := difference(first, other); diff != "" {
			return problem.New(problem.AppInvalid, "make the two the same: in Pergola server and sites run one app",
				"%s and %s are different apps: %s is not the same", dirs[0], d, diff)
		}
	}
	l.job.AppDir = dirs[0]
	return nil
}

func isApp(dir string) bool {
	has := func(name string) bool {
		info, err := os.Stat(filepath.Join(dir, name))
		return err == nil && info.Mode().IsRegular()
	}
	return has("pyproject.toml") || has("server.py") && has("client.py")
}

// appBelow gives the folder right below dir that has a pyproject.toml, "" if there is none.
func appBelow(dir string) string {
	// Error: the pattern is well-formed, unless the path itself has what patterns are made of; it is for a hint only.
	found, _ := filepath.Glob(filepath.Join(dir, "*", "pyproject.toml"))
	if len(found) == 0 {
		return ""
	}
	return filepath.Dir(found[0])
}

// predeployed tells whether a warning was given of an app that is elsewhere.
func (l *loader) predeployed() bool {
	return slices.ContainsFunc(l.job.Warnings, func(w string) bool { return strings.Contains(w, " flower_app_path: ") })
}

// skipped are never part of an app.
var skipped = map[string]bool{".git": true, "__pycache__": true, ".venv": true, "node_modules": true, ".pytest_cache": true, ".mypy_cache": true, ".ruff_cache": true, "pergola-runs": true, ".pergola": true, ".DS_Store": true}

// What an app may be: as package bundle has it, and for the same reason.
const (
	maxFiles = 20_000
	maxBytes = 512 << 20
)

// walk calls do for all that belongs to the app in dir, folders first.
func walk(dir string, do func(rel string, d fs.DirEntry) error) error {
	files, bytes := 0, int64(0)
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return problem.Wrap(err, problem.AppInvalid, "make it readable", "%s cannot be read", path)
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil || rel == "." {
			return err
		}
		if skipped[d.Name()] {
			if d.IsDir() {
				return filepath.SkipDir
			}
			return nil
		}
		if strings.HasSuffix(d.Name(), ".pyc") {
			return nil
		}
		if info, err := d.Info(); err == nil && d.Type().IsRegular() {
			bytes += info.Size()
		}
		if files++; files > maxFiles || bytes > maxBytes {
			return problem.New(problem.AppInvalid, "move data out of it", "%s has more than %d files or %d bytes", dir, maxFiles, maxBytes)
		}
		if !d.IsDir() && !d.Type().IsRegular() && d.Type()&fs.ModeSymlink == 0 {
			return problem.New(problem.AppInvalid, "remove it", "%s is no file, folder or link", path)
		}
		return do(rel, d)
	})
}

// hashTree gives for each file of an app what it is.
func hashTree(dir string) (map[string]string, error) {
	out := map[string]string{}
	err := walk(dir, func(rel string, d fs.DirEntry) error {
		path := filepath.Join(dir, rel)
		switch {
		case d.IsDir():
		case d.Type()&fs.ModeSymlink != 0:
			to, err := os.Readlink(path)
			out[rel] = "link " + to
			return err
		default:
			b, err := os.ReadFile(path)
			if err != nil {
				return problem.Wrap(err, problem.AppInvalid, "make it readable", "%s cannot be read", path)
			}
			out[rel] = fmt.Sprintf("file %x", sha256.Sum256(b))
		}
		return nil
	})
	return out, err
}

// difference gives the first file in which two trees are not the same.
func difference(a, b map[string]string) string {
	for _, k := range slices.Sorted(maps.Keys(a)) {
		if b[k] != a[k] {
			return k
		}
	}
	for _, k := range slices.Sorted(maps.Keys(b)) {
		if _, ok := a[k]; !ok {
			return k
		}
	}
	return ""
}

// others warns of what else lies in the folder: an app may find files below config/ at run time.
func (l *loader) others() {
	list := func(dir string, known func(string) bool, says string) {
		es, err := os.ReadDir(dir)
		if err != nil {
			return // what is needed of it was read
		}
		for _, e := range es {
			if !known(e.Name()) && !skipped[e.Name()] {
				l.job.Warnings = append(l.job.Warnings, filepath.Join(dir, e.Name())+": "+says)
			}
		}
	}
	config := func(names ...string) func(string) bool {
		return func(file string) bool {
			base, ext, ok := strings.Cut(file, ".")
			return ok && slices.Contains(names, base) && slices.Contains(extensions, "."+ext)
		}
	}
	list(l.job.Dir, func(n string) bool {
		return config("meta")(n) || slices.ContainsFunc(l.apps, func(d deployed) bool { return d.name == n })
	}, "deploy_map does not name it; it is not used")
	for _, d := range l.apps {
		dir := filepath.Join(l.job.Dir, d.name)
		list(dir, func(n string) bool { return n == "config" || n == "custom" }, "it is not used; put what the app needs into its own folder, custom")
		list(filepath.Join(dir, "config"), config(string(InServer), string(InClient)), "it is not used; put what the app needs into its own folder, custom")
	}
}

// ownSettings gives way to an app that has [tool.pergola] itself, and compares names. What is wrong with pyproject.toml is
// left to those who load the app.
func (l *loader) ownSettings() error {
	path := filepath.Join(l.job.AppDir, "pyproject.toml")
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil || info.Size() > maxConfig {
		return nil //nolint:nilerr // see above
	}
	src, err := os.ReadFile(path)
	if err != nil {
		return problem.Wrap(err, problem.AppInvalid, "make it readable", "%s cannot be read", path)
	}
	var doc struct {
		Project struct {
			Name any `toml:"name"`
		} `toml:"project"`
		Tool map[string]any `toml:"tool"`
	}
	if err := toml.Unmarshal(src, &doc); err != nil {
		return nil //nolint:nilerr // see above
	}
	if s, ok := doc.Project.Name.(string); ok && s != l.job.Name {
		l.job.Warnings = append(l.job.Warnings, fmt.Sprintf("%s: the job %q is called %q here, after its app", path, l.job.Name, s))
	}
	if _, ok := doc.Tool["pergola"]; ok && !l.job.Settings.empty() {
		l.job.Warnings = append(l.job.Warnings, fmt.Sprintf("%s: the app has [tool.pergola] itself, which is used as it is; the job folder's settings are not: %s",
			path, strings.Join(l.job.Settings.list(), ", ")))
		l.job.Settings = Settings{}
	}
	return nil
}
