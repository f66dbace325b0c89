// Package prepare makes of an app's directory what is submitted to a hub: it reads the app and its settings, decides on every
// version, packs the bundle and uploads it. What is wrong with any of these is said before anything starts.
//
// It neither starts a hub nor follows a job; localrun and the command line do. Start with [Look].
package prepare

import (
	"context"
	"encoding/json"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pergolafl/pergola/internal/api"
	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/bundle"
	"github.com/pergolafl/pergola/internal/flower"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/pyenv"
)

// Flags are what a command line says; they win over the app's [tool.pergola].
type Flags struct {
	Spec          job.Spec // zero values: as the file says
	StrictClients *bool    // nil: as the file says
}

// App is an app on its way to a hub.
type App struct {
	*flower.App
	Dir  string
	Spec job.Spec   // flags over file; neither validated nor with defaults, since the sites may not be known yet
	Lock pyenv.Lock // empty before Resolve, and where an interpreter is used as it is
	Flwr string     // the version that runs, known after Resolve
}

// Look reads the app in dir and puts its settings together.
func Look(dir string, f Flags) (*App, error) {
	app, err := flower.LoadApp(dir)
	if err != nil {
		return nil, err
	}
	spec, err := job.ParseSpec(app.Pyproject, filepath.Join(dir, "pyproject.toml"))
	if err != nil {
		return nil, err
	}
	if f.Spec.Engine != "" {
		spec.Engine = f.Spec.Engine
	}
	for _, d := range []struct{ to, from *job.Duration }{
		{&spec.Deadline, &f.Spec.Deadline},
		{&spec.NoProgress, &f.Spec.NoProgress},
		{&spec.StartTimeout, &f.Spec.StartTimeout},
		{&spec.OutageTolerance, &f.Spec.OutageTolerance},
		{&spec.JoinWait, &f.Spec.JoinWait},
		{&spec.WaitTimeout, &f.Spec.WaitTimeout},
	} {
		if *d.from != 0 {
			*d.to = *d.from
		}
	}
	if f.Spec.Isolation != "" {
		spec.Isolation = f.Spec.Isolation
	}
	if f.Spec.Workers != 0 {
		spec.Workers = f.Spec.Workers
	}
	if f.Spec.Clients != 0 {
		spec.Clients = f.Spec.Clients
	}
	if f.Spec.MinSites != 0 {
		spec.MinSites = f.Spec.MinSites
	}
	if len(f.Spec.MandatorySites) > 0 {
		spec.MandatorySites = f.Spec.MandatorySites
	}
	if len(f.Spec.Sites) > 0 {
		spec.Sites = f.Spec.Sites
	}
	if f.StrictClients != nil {
		spec.StrictClients = *f.StrictClients
	}
	for k, v := range f.Spec.Site.Env {
		if spec.Site.Env == nil {
			spec.Site.Env = map[string]string{}
		}
		spec.Site.Env[k] = v
	}
	spec.Priority = f.Spec.Priority
	for k, n := range f.Spec.Site.Resources { // before what the file says of a single site, as flags come before the file
		if spec.Site.Resources == nil {
			spec.Site.Resources = job.Resources{}
		}
		spec.Site.Resources[k] = n
		for _, one := range spec.Site.Named {
			delete(one.Resources, k)
		}
	}
	var overrides []string
	if spec.Server.Args, overrides, err = flower.SplitArgs(spec.Server.Args); err != nil {
		return nil, err
	}
	overrides = slices.Concat(spec.RunConfig, overrides, f.Spec.RunConfig)
	if err := app.Override(overrides); err != nil {
		return nil, err
	}
	// As pairs: a file among them is on this machine alone.
	if spec.RunConfig, err = flower.RunConfig(overrides); err != nil {
		return nil, err
	}
	spec.Flwr = f.Spec.Flwr
	spec.App = job.App{Name: app.Name, Version: app.Version}
	return &App{App: app, Dir: dir, Spec: spec}, nil
}

// Settle checks the settings and fills in what is not said. The sites stand in Spec by now, if anybody has named them.
func (a *App) Settle() error {
	if err := a.Spec.Validate(); err != nil {
		return err
	}
	a.Spec = a.Spec.WithDefaults()
	return nil
}

// Resolving says how versions are decided on.
type Resolving struct {
	Cache  string // of environments and locks
	Python string // an interpreter to use as it is; "" = an environment is built, and needs a lock
	Fresh  bool   // resolve again although a lock is at hand

	// Tell, if there is one, hears what is done: an event's kind and body.
	Tell func(kind string, body any)
}

// Resolve decides on the versions of everything that the app imports, and gives the version of the Python that they are for; "" with an
// interpreter that is used as it is.
func (a *App) Resolve(ctx context.Context, r Resolving) (python string, err error) {
	tell := r.Tell
	if tell == nil {
		tell = func(string, any) {}
	}
	req := pyenv.Requirements{Names: a.Dependencies, Flwr: a.Spec.Flwr, RequiresPython: a.RequiresPython}
	if r.Python != "" {
		env, err := pyenv.Existing(ctx, r.Python, req)
		if err != nil {
			return "", err
		}
		a.Flwr = env.Flwr
		return "", a.runnable("", tell)
	}
	in, err := pyenv.Find(ctx, "")
	if err != nil {
		return "", err
	}
	tell(job.KindEnvProgress, job.EnvProgress{Phase: "resolving", Message: "dependencies of " + a.Name + " for Python " + in.Version})
	if a.Lock, err = pyenv.MakeLock(ctx, r.Cache, in, req, pyenv.Options{Fresh: r.Fresh}); err != nil {
		return "", err
	}
	a.Flwr = a.Lock.Flwr
	if err := a.runnable(a.Lock.Python, tell); err != nil {
		return "", err
	}
	a.Spec.FlwrVersion, a.Spec.PythonVersion = a.Lock.Flwr, a.Lock.Python
	return in.Version, nil
}

// runnable refuses a version of Flower that cannot run the job, before anything starts, and decides on the engine.
func (a *App) runnable(python string, tell func(string, any)) error {
	if err := flower.Supported(a.Flwr); err != nil {
		return err
	}
	if err := flower.TakesConfig(a.Flwr, a.Spec.RunConfig); err != nil {
		return err
	}
	if err := a.Spec.ChooseEngine(a.Flwr); err != nil {
		return err
	}
	tell(job.KindEngine, job.EngineChoice{Engine: a.Spec.Engine, Flwr: a.Flwr, Python: python, Why: a.Spec.EngineWhy})
	return nil
}

// Pack makes the bundle of app, lock and settings.
func (a *App) Pack() (*bundle.Bundle, error) {
	spec, err := json.Marshal(a.Spec)
	if err != nil {
		return nil, err
	}
	return bundle.Build(a.Dir, bundle.Input{
		App: bundle.Meta{Name: a.Name, Version: a.Version}, Lock: []byte(a.Lock.Text), Job: spec, Exclude: a.Spec.Exclude,
	})
}

// Submit makes a job of an uploaded bundle. Repeating it with the same key, which may be empty, gives the same job.
func (a *App) Submit(ctx context.Context, c *api.Client, digest, key string) (*pb.Job, error) {
	spec, err := json.Marshal(a.Spec)
	if err != nil {
		return nil, err
	}
	res, err := c.Jobs.SubmitJob(ctx, &pb.SubmitJobRequest{Key: key, Name: JobName(a.Name), BundleDigest: digest, SpecJson: string(spec)})
	if err != nil {
		return nil, err
	}
	return res.GetJob(), nil
}

// JobName makes a DNS label of an app's name.
func JobName(app string) string {
	var b strings.Builder
	for _, c := range strings.ToLower(app) {
		if c >= 'a' && c <= 'z' || c >= '0' && c <= '9' {
			b.WriteRune(c)
		} else {
			b.WriteByte('-')
		}
	}
	s := strings.Trim(b.String(), "-")
	if len(s) > 40 {
		s = strings.TrimRight(s[:40], "-")
	}
	if s == "" {
		return "app"
	}
	return s
}
