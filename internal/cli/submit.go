package cli

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/pergolafl/pergola/internal/api"
	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/client"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/localrun"
	"github.com/pergolafl/pergola/internal/prepare"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/pyenv"
)

type submitFlags struct {
	runFlags
	context, key string
	sites        []string
	wait         bool
}

func newSubmit(e env) *cobra.Command {
	var f submitFlags
	c := &cobra.Command{
		Use:   "submit APPDIR|FAB|JOBDIR",
		Short: "Submit a Flower app to a hub as a job",
		Long: `Submit packs the app in APPDIR with its settings and the versions of everything that it imports, uploads that to the hub
of the context in use, and submits it as a job. In place of an app's directory it takes a Flower app bundle (FAB) and the job
folder (JOBDIR) of a Flower job of NVIDIA FLARE, as pergola run does. APPDIR is never written to.
It prints the job's id. With --wait it shows what happens until the job is over, and has the job's exit status; an interrupt
(Ctrl-C) ends the watching, and the job goes on.

Exit status: 0 submitted, with --wait succeeded · 1 failed · 2 usage · 3 aborted · 4 rejected · 5 hub unreachable.`,
		Example: `  pergola submit ./app
  pergola submit ./app --wait --sites st-anna,charite --min-sites 1
  pergola submit lab.quickstart.1-0-0.03840e93.fab --json
  pergola submit ./app --cpus 4 --memory 8GiB --gpus 1 --priority 10
  pergola submit ./app --key nightly-2026-11-24`,
		Args: exactArgs(1, "the app's directory"),
		RunE: func(cmd *cobra.Command, args []string) error {
			f.strictSet = cmd.Flags().Changed("strict-clients")
			return f.submit(cmd.Context(), e, args[0])
		},
		ValidArgsFunction: completeApp,
	}
	fl := c.Flags()
	fl.SortFlags = false
	addContext(c, &f.context)
	fl.BoolVar(&f.wait, "wait", false, "show what happens until the job is over")
	fl.StringSliceVar(&f.sites, "sites", nil, "the job's sites, by name: a,b (default: those of the app's settings, else all of the hub)")
	fl.IntVar(&f.minSites, "min-sites", 0, "go on with this many when others fail (default: all)")
	fl.StringArrayVar(&f.mandatory, "mandatory-site", nil, "a site without which the job neither starts nor goes on (repeatable)")
	fl.BoolVar(&f.strict, "strict-clients", false, "a site that fails ends the job, whatever --min-sites says")
	fl.StringVar(&f.join, "join-wait", "", "how long to wait for the other sites once --min-sites are there (default 1m)")
	fl.StringArrayVar(&f.runConfig, "run-config", nil, "override values of [tool.flwr.app.config]: key=value, or a TOML file (repeatable)")
	fl.StringVar(&f.flwr, "flwr", "", "run with this version of flwr instead of the one that the app asks for")
	f.addEngine(c)
	fl.StringArrayVar(&f.siteEnv, "site-env", nil, "variable for the programs at each site: NAME=value (repeatable)")
	f.addResources(fl)
	fl.IntVar(&f.priority, "priority", 0, "higher is taken first: -1000 to 1000")
	fl.StringVar(&f.queue, "wait-timeout", "", "end the job when it is in the queue for longer than this (default: it waits)")
	fl.StringVar(&f.deadline, "deadline", "", "end the job when it takes longer than this, for example 30m")
	fl.StringVar(&f.noProgress, "no-progress", "", "end the job when nothing moves for this long (default 1h)")
	fl.StringVar(&f.start, "start-timeout", "", "longest wait for all parties to be ready, builds not counted (default 10m)")
	fl.StringVar(&f.key, "key", "", "a submission with a key that you have used before gives that job again")
	fl.BoolVar(&f.relock, "relock", false, "resolve the app's dependencies again instead of using the lock of the last 24 h")
	fl.BoolVar(&f.json, "json", false, "the job as JSON; with --wait one JSON object per event, the last one the summary")
	fl.BoolVarP(&f.quiet, "quiet", "q", false, "with --wait: show no log lines of the programs")
	fl.BoolVarP(&f.verbose, "verbose", "v", false, "with --wait: show what installers say, too")
	must(c.RegisterFlagCompletionFunc("sites", completeSites))
	must(c.RegisterFlagCompletionFunc("mandatory-site", completeSites))
	return c
}

func (f *submitFlags) submit(ctx context.Context, e env, arg string) error {
	f.runFlags.sites = max(1, f.minSites) // not what this command counts
	o, err := f.options(arg)
	if err != nil {
		return err
	}
	o.Spec.Sites = f.sites
	ctx, cancel := untilSignal(ctx)
	defer cancel()
	c, known, err := client.Open(f.context)
	if err != nil {
		return err
	}
	defer c.Close()
	defer renewing(ctx, e, known, c)()
	show, end := f.printer(e)
	j, app, err := f.send(ctx, c, arg, o, show)
	if err != nil {
		end()
		return interrupted(ctx, err, "")
	}
	if !f.wait {
		end()
		return f.submitted(e, j)
	}
	sum := localrun.Summary{Job: job.ID(j.GetId()), App: app.Name, Flwr: app.Flwr, Engine: app.Spec.Engine, Why: app.Spec.EngineWhy, State: job.State(j.GetState())}
	return f.watch(ctx, e, c, sum, show, end)
}

func (f *submitFlags) submitted(e env, j *pb.Job) error {
	if f.json {
		return printJSON(e.stdout, j)
	}
	fmt.Fprintln(e.stderr, "see what it does with: pergola events --follow "+j.GetId())
	_, err := fmt.Fprintln(e.stdout, j.GetId())
	return err
}

// printer gives how things are shown: to a machine on stdout, to people on stderr.
func (f *runFlags) printer(e env) (show printer, end func()) {
	if f.json {
		show = &machine{w: json.NewEncoder(e.stdout), quiet: f.quiet}
	} else {
		show = &people{w: e.stderr, flags: f, tty: isTerminal(e.stderr), began: time.Now()}
	}
	return show, show.end
}

// send prepares the app, and submits it.
func (f *submitFlags) send(ctx context.Context, c *api.Client, arg string, o localrun.Options, show printer) (j *pb.Job, app *prepare.App, err error) {
	dir := arg
	in, err := input(arg)
	if err != nil {
		return nil, nil, err
	}
	tell := func(kind string, body any) {
		if f.json && !f.wait {
			return // the job is all that is printed
		}
		if ev, err := job.NewEvent("", "", kind, body, time.Now()); err == nil { // else it cannot be JSON, and they all can
			show.event(localrun.Event{Event: ev})
		}
	}
	if in != nil {
		tmp, e := os.MkdirTemp("", "pergola-submit-*")
		if e != nil {
			return nil, nil, e
		}
		defer func() {
			if e := os.RemoveAll(tmp); e != nil && err == nil {
				err = e
			}
		}()
		dir = filepath.Join(tmp, in.Name)
		if err := os.Mkdir(dir, 0o755); err != nil {
			return nil, nil, err
		}
		for _, w := range in.Warnings {
			tell(job.KindWarning, job.Text{Message: w})
		}
		if err := in.Write(dir); err != nil {
			return nil, nil, err
		}
	}
	j, app, err = f.prepared(ctx, c, dir, o, tell)
	if p, ok := errors.AsType[*problem.Error](err); ok && in != nil {
		named := *p.Told()
		named.Msg, named.Next = strings.ReplaceAll(p.Msg, dir, in.Shown), strings.ReplaceAll(p.Next, dir, in.Shown)
		err = &named
	}
	return j, app, err
}

func (f *submitFlags) prepared(ctx context.Context, c *api.Client, dir string, o localrun.Options, tell func(string, any)) (*pb.Job, *prepare.App, error) {
	app, err := prepare.Look(dir, prepare.Flags{Spec: o.Spec, StrictClients: o.StrictClients})
	if err != nil {
		return nil, nil, err
	}
	if err := app.Settle(); err != nil {
		return nil, nil, err
	}
	// A hub that is not there, or knows none of these sites, is told of before versions are resolved.
	known, err := c.Jobs.ListSites(ctx, &pb.ListSitesRequest{})
	if err != nil {
		return nil, nil, err
	}
	var names []string
	for _, s := range known.GetSites() {
		names = append(names, s.GetName())
	}
	for _, n := range app.Spec.Sites {
		if !contains(names, n) {
			return nil, nil, problem.New(problem.NotFound, "see the enrolled ones with: pergola sites", "no site is named %q%s", n, problem.DidYouMean(n, names))
		}
	}
	if _, err := app.Resolve(ctx, prepare.Resolving{Cache: pyenv.DefaultCache(), Fresh: f.relock, Tell: tell}); err != nil {
		return nil, nil, err
	}
	packed, err := app.Pack()
	if err != nil {
		return nil, nil, err
	}
	if err := prepare.Upload(ctx, c, packed, tell); err != nil {
		return nil, nil, err
	}
	key := f.key
	if key == "" {
		key = rand.Text() // so that a retried call is one job
	}
	var j *pb.Job
	err = again(ctx, func() error { j, err = app.Submit(ctx, c, packed.Digest, key); return err })
	return j, app, err
}

// watch shows a job until it is over, and gives its end.
func (f *submitFlags) watch(ctx context.Context, e env, c *api.Client, sum localrun.Summary, show printer, end func()) error {
	id := string(sum.Job)
	began := time.Now()
	res, err := c.Jobs.GetJob(ctx, &pb.GetJobRequest{Id: id})
	if err == nil {
		for _, p := range res.GetJob().GetParties() {
			if p.GetName() != job.HubParty {
				sum.Sites = append(sum.Sites, p.GetName())
			}
		}
		err = followJob(ctx, c, id, func(ev job.Event) { sum.Take(ev); show.event(localrun.Event{Event: ev}) }, func(party, program, line string) {
			show.event(logLine(sum.Job, party, program, line))
		}, func(text string) {
			if ev, err := job.NewEvent(sum.Job, "", job.KindNote, job.Text{Message: text}, time.Now()); err == nil {
				show.event(localrun.Event{Event: ev})
			}
		})
	}
	end()
	if err != nil {
		return interrupted(ctx, err, id)
	}
	sum.Seconds = time.Since(began).Seconds()
	if sum.State == job.Succeeded {
		sum.Cause = nil
	}
	var failed error
	if sum.Cause != nil {
		failed = sum.Cause
	}
	if m, ok := show.(*machine); ok {
		return errOf(m.summary(sum), failed)
	}
	if err := printSummary(e.stdout, sum); err != nil {
		return err
	}
	fmt.Fprintf(e.stdout, "\njob %s: its logs and results come with: pergola download %s\n", id, id)
	if failed != nil {
		return silent{failed}
	}
	return nil
}

// interrupted tells what an interrupt means for a job: nothing.
func interrupted(ctx context.Context, err error, id string) error {
	if ctx.Err() == nil {
		return err
	}
	if id == "" {
		return problem.New(problem.AbortedByUser, "submit it again when you want it", "interrupted; nothing was submitted, as far as is known here")
	}
	return problem.New(problem.AbortedByUser, "see it with: pergola show "+id+"; end it with: pergola abort "+id, "interrupted; job %s goes on", id)
}

func contains(list []string, s string) bool {
	for _, x := range list {
		if x == s {
			return true
		}
	}
	return false
}
