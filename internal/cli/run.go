package cli

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	human "github.com/dustin/go-humanize"
	"github.com/mattn/go-isatty"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/localrun"
	"github.com/pergolafl/pergola/internal/problem"
)

type runFlags struct {
	sites                                              int
	minSites                                           int
	out, engine, flwr, python, listen, siteProxy, apps string
	isolation                                          string
	clients, workers                                   int
	dials                                              map[string]string
	cpus, gpus                                         int64
	memory                                             string
	resources                                          []string
	priority                                           int
	queue                                              string // --wait-timeout
	runConfig, siteEnv                                 []string
	deadline, noProgress, start, join                  string
	mandatory                                          []string
	strict, strictSet, sitesSet                        bool
	json, quiet, verbose, relock                       bool
}

func newRun(e env) *cobra.Command {
	var f runFlags
	c := &cobra.Command{
		Use:   "run APPDIR|FAB|JOBDIR",
		Short: "Run a Flower app on a hub and sites of this machine, and show its result",
		Long: `Run starts a hub and some sites as processes of their own, with certificates made for this run,
submits the app in APPDIR as a job, shows what happens, and ends everything again.
In place of an app's directory it takes a Flower app bundle (FAB), whose hashes it checks, and the job folder (JOBDIR) of a
Flower job of NVIDIA FLARE: what that says becomes settings, and what has no effect here is named in a warning. Flags win.
APPDIR is never written to. Interrupt (Ctrl-C) once for an orderly end, twice to end at once.

Exit status: 0 succeeded · 1 failed · 2 usage · 3 aborted · 4 rejected · 5 hub unreachable.`,
		Example: `  pergola run examples/quickstart
  pergola run ./app --sites 3 --run-config num-server-rounds=5 --run-config lr=0.1
  pergola run ./app --flwr 1.30.0 --deadline 30m --json
  pergola run lab.quickstart.1-0-0.03840e93.fab
  pergola run /jobs/blood`,
		Args: exactArgs(1, "the app's directory"),
		RunE: func(cmd *cobra.Command, args []string) error {
			f.strictSet, f.sitesSet = cmd.Flags().Changed("strict-clients"), cmd.Flags().Changed("sites")
			return f.run(cmd.Context(), e, args[0])
		},
		ValidArgsFunction: completeApp,
	}
	fl := c.Flags()
	fl.SortFlags = false
	fl.IntVar(&f.sites, "sites", 2, "how many sites; unless you say it, as many as the app's settings name or need")
	fl.IntVar(&f.minSites, "min-sites", 0, "go on with this many when others fail (default: all)")
	fl.StringArrayVar(&f.mandatory, "mandatory-site", nil, "a site without which the job neither starts nor goes on (repeatable)")
	fl.BoolVar(&f.strict, "strict-clients", false, "a site that fails ends the job, whatever --min-sites says")
	fl.StringVar(&f.join, "join-wait", "", "how long to wait for the other sites once --min-sites are there (default 1m)")
	fl.StringArrayVar(&f.runConfig, "run-config", nil, "override values of [tool.flwr.app.config]: key=value, or a TOML file (repeatable)")
	fl.StringVar(&f.flwr, "flwr", "", "run with this version of flwr instead of the one that the app asks for")
	f.addEngine(c)
	fl.StringVar(&f.python, "python", "", "use this interpreter and its packages as they are, build no environment")
	fl.StringArrayVar(&f.siteEnv, "site-env", nil, "variable for the programs at each site: NAME=value (repeatable)")
	f.addResources(fl)
	fl.StringVar(&f.deadline, "deadline", "", "end the job when it takes longer than this, for example 30m")
	fl.StringVar(&f.noProgress, "no-progress", "", "end the job when nothing moves for this long (default 1h)")
	fl.StringVar(&f.start, "start-timeout", "", "longest wait for all parties to be ready, builds not counted (default 10m)")
	fl.StringVar(&f.queue, "wait-timeout", "", "longest wait for the sites to connect (default: start-timeout)")
	fl.StringVar(&f.out, "out", "", "new or empty directory for logs and results (default ./pergola-runs/<app>-<time>)")
	fl.StringVar(&f.apps, "apps", "", "folder with apps that lie ready on this machine, for app-path in [tool.pergola.server] and [tool.pergola.site]")
	fl.StringVar(&f.siteProxy, "site-proxy", "", "have the sites reach the hub through this proxy, to try out what one does to a job")
	must(fl.MarkHidden("site-proxy")) // a rehearsal: here the hub is on this machine
	fl.StringVar(&f.listen, "listen", "", "address of the hub's one port (default any free port of 127.0.0.1)")
	fl.StringToStringVar(&f.dials, "site-dials", nil, "address at which a site reaches the hub, if there is a forwarder between: site-1=host:port (repeatable)")
	must(fl.MarkHidden("site-dials"))
	fl.BoolVar(&f.relock, "relock", false, "resolve the app's dependencies again instead of using the lock of the last 24 h")
	fl.BoolVar(&f.json, "json", false, "one JSON object per event on stdout, the last one the summary")
	fl.BoolVarP(&f.quiet, "quiet", "q", false, "show no log lines of the programs")
	fl.BoolVarP(&f.verbose, "verbose", "v", false, "show Pergola's own log lines, too")
	must(c.MarkFlagDirname("out"))
	return c
}

// addResources adds the flags of what a job asks of each site.
func (f *runFlags) addResources(fl *pflag.FlagSet) {
	fl.Int64Var(&f.cpus, "cpus", 0, "CPUs of each site for the job alone")
	fl.StringVar(&f.memory, "memory", "", "memory of each site for the job alone, for example 8GiB")
	fl.Int64Var(&f.gpus, "gpus", 0, "GPUs of each site for the job alone, which its programs see by CUDA_VISIBLE_DEVICES")
	fl.StringArrayVar(&f.resources, "resource", nil, "what else of each site, by a name that sites declare: licence-x=1 (repeatable)")
}

// asked reads them.
func (f *runFlags) asked() (job.Resources, error) {
	out := job.Resources{}
	put := func(flag, name string, n int64) error {
		if msg, next := job.ResourceFault(name, n); msg != "" {
			return problem.New(problem.Usage, next, "--%s: %s", flag, msg)
		}
		out[name] = n
		return nil
	}
	for _, r := range []struct {
		name string
		n    int64
	}{{job.CPUs, f.cpus}, {job.GPUs, f.gpus}} {
		if r.n != 0 {
			if err := put(r.name, r.name, r.n); err != nil {
				return nil, err
			}
		}
	}
	if f.memory != "" {
		n, err := job.ParseSize(f.memory)
		if err != nil {
			p := problem.From(err)
			return nil, problem.New(problem.Usage, p.Next, "--memory %s", p.Msg)
		}
		if err := put(job.Memory, job.Memory, n); err != nil {
			return nil, err
		}
	}
	for _, kv := range f.resources {
		k, v, ok := strings.Cut(kv, "=")
		n, err := strconv.ParseInt(v, 10, 64)
		if k == job.Memory {
			n, err = job.ParseSize(v)
		}
		if !ok || k == "" || err != nil {
			return nil, problem.New(problem.Usage, "write it like licence-x=1", "--resource %q is not NAME=AMOUNT", kv)
		}
		if err := put("resource", k, n); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// must is for what only a defect of the program can make fail.
func must(err error) {
	if err != nil {
		panic(err)
	}
}

// addEngine adds the flags about how the app runs.
func (f *runFlags) addEngine(c *cobra.Command) {
	fl := c.Flags()
	fl.StringVar(&f.engine, "engine", "", "how the app runs: native, flower (its own programs), or auto (default auto: native where that is known to do the same)")
	fl.StringVar(&f.isolation, "isolation", "", "native engine: what a message may see of the one before: warm, fork, process or auto (default auto: as in plain Flower)")
	fl.IntVar(&f.clients, "clients", 0, "native engine: so many clients, spread over the sites (default one at each)")
	fl.IntVar(&f.workers, "workers", 0, "native engine: processes that work at the same time at each site (default as many as processors)")
	must(c.RegisterFlagCompletionFunc("engine", cobra.FixedCompletions(job.Engines, cobra.ShellCompDirectiveNoFileComp)))
	must(c.RegisterFlagCompletionFunc("isolation", cobra.FixedCompletions(job.Isolations, cobra.ShellCompDirectiveNoFileComp)))
}

// checkEngine refuses values that no job can have.
func (f *runFlags) checkEngine() error {
	if f.engine != "" && !slices.Contains(job.Engines, f.engine) {
		return problem.New(problem.Usage, "use "+strings.Join(job.Engines, ", "), "--engine %q is unknown%s", f.engine, problem.DidYouMean(f.engine, job.Engines))
	}
	if f.isolation != "" && !slices.Contains(job.Isolations, f.isolation) {
		return problem.New(problem.Usage, "use "+strings.Join(job.Isolations, ", "), "--isolation %q is unknown%s", f.isolation, problem.DidYouMean(f.isolation, job.Isolations))
	}
	if f.clients < 0 || f.clients > job.MaxClients {
		return problem.New(problem.Usage, "choose 1 to "+strconv.Itoa(job.MaxClients), "--clients %d is out of range", f.clients)
	}
	if f.workers < 0 {
		return problem.New(problem.Usage, "choose 1 or more", "--workers %d is out of range", f.workers)
	}
	return nil
}

// checkListen refuses what cannot be listened on, before the hub has to.
func checkListen(addr string) error {
	if addr == "" {
		return nil
	}
	_, port, err := net.SplitHostPort(addr)
	if err == nil {
		_, err = strconv.ParseUint(port, 10, 16)
	}
	if err != nil {
		return problem.New(problem.Usage, "write it like 0.0.0.0:8443, or 127.0.0.1:0 for any free port", "--listen %q is not HOST:PORT", addr)
	}
	return nil
}

// checkOut refuses a directory that has something in it, or lies in the app's, before time is spent on the run.
func checkOut(dir, app string) error {
	if dir == "" {
		return nil
	}
	if in, err := inside(dir, app); err == nil && in {
		return problem.New(problem.Usage, "choose one outside of it", "--out %s lies in the app's directory, which is never written to", dir)
	}
	const next = "choose a new or an empty one with --out"
	switch es, err := os.ReadDir(dir); {
	case errors.Is(err, fs.ErrNotExist):
		return nil // it will be made
	case errors.Is(err, syscall.ENOTDIR):
		return problem.New(problem.Usage, next, "--out %s is not a directory", dir)
	case err != nil:
		return problem.Wrap(err, problem.Usage, next, "--out %s cannot be used", dir)
	case len(es) > 0:
		return problem.New(problem.Usage, next, "%s is not empty", dir)
	}
	return nil
}

// inside tells whether dir, which need not exist, is app or lies below it.
func inside(dir, app string) (bool, error) {
	d, err := filepath.Abs(dir)
	if err != nil {
		return false, err
	}
	a, err := filepath.Abs(app)
	if err != nil {
		return false, err
	}
	rel, err := filepath.Rel(a, d)
	return err == nil && filepath.IsLocal(rel), err
}

// options checks the flags.
func (f *runFlags) options(app string) (localrun.Options, error) {
	if f.apps != "" {
		var err error
		if f.apps, err = filepath.Abs(f.apps); err != nil {
			return localrun.Options{}, err
		}
	}
	o := localrun.Options{App: app, Apps: f.apps, Out: f.out, Sites: f.sites, Listen: f.listen, Dials: f.dials, SiteProxy: f.siteProxy, Relock: f.relock, Level: slog.LevelInfo}
	if f.verbose {
		o.Level = slog.LevelDebug
	}
	if f.sites < 1 || f.sites > localrun.MaxSites {
		return o, problem.New(problem.Usage, "choose 1 to "+strconv.Itoa(localrun.MaxSites), "--sites %d is out of range", f.sites)
	}
	if f.minSites < 0 || f.minSites > f.sites {
		return o, problem.New(problem.Usage, "choose 1 to the number of --sites", "--min-sites %d does not fit %d sites", f.minSites, f.sites)
	}
	if err := f.checkEngine(); err != nil {
		return o, err
	}
	if err := checkListen(f.listen); err != nil {
		return o, err
	}
	if err := checkOut(f.out, app); err != nil {
		return o, err
	}
	if f.quiet && f.verbose {
		return o, problem.New(problem.Usage, "choose one", "--quiet and --verbose contradict each other")
	}
	if f.python != "" && f.flwr != "" {
		return o, problem.New(problem.Usage, "choose one", "--flwr builds an environment, --python uses one as it is")
	}
	o.Python = f.python
	if f.python != "" && strings.ContainsRune(f.python, filepath.Separator) {
		abs, err := filepath.Abs(f.python) // the agents run elsewhere
		if err != nil {
			return o, err
		}
		o.Python = abs
	}
	o.Spec = job.Spec{Engine: f.engine, Isolation: f.isolation, Clients: f.clients, Workers: f.workers, MinSites: f.minSites, MandatorySites: f.mandatory, Flwr: f.flwr, RunConfig: f.runConfig}
	if f.strictSet {
		o.StrictClients = &f.strict
	}
	for _, d := range []struct {
		flag, text string
		to         *job.Duration
	}{{"deadline", f.deadline, &o.Spec.Deadline}, {"no-progress", f.noProgress, &o.Spec.NoProgress}, {"start-timeout", f.start, &o.Spec.StartTimeout}, {"join-wait", f.join, &o.Spec.JoinWait}, {"wait-timeout", f.queue, &o.Spec.WaitTimeout}} {
		if d.text == "" {
			continue
		}
		v, err := job.ParseDuration(d.text)
		if err != nil {
			return o, problem.New(problem.Usage, "write it like 90s, 30m, 6h or 2d", "--%s %q is not a duration", d.flag, d.text)
		}
		*d.to = v
	}
	if f.priority < -job.MaxPriority || f.priority > job.MaxPriority {
		return o, problem.New(problem.Usage, fmt.Sprintf("choose %d to %d", -job.MaxPriority, job.MaxPriority), "--priority %d is out of range", f.priority)
	}
	o.Spec.Priority = f.priority
	res, err := f.asked()
	if err != nil {
		return o, err
	}
	if len(res) > 0 {
		o.Spec.Site.Resources = res
	}
	for _, kv := range f.siteEnv {
		k, v, ok := strings.Cut(kv, "=")
		if !ok || k == "" {
			return o, problem.New(problem.Usage, "write it like DATA=/data/ct", "--site-env %q has no NAME=value", kv)
		}
		if o.Spec.Site.Env == nil {
			o.Spec.Site.Env = map[string]string{}
		}
		o.Spec.Site.Env[k] = v
	}
	return o, nil
}

func (f *runFlags) run(ctx context.Context, e env, app string) error {
	o, err := f.options(app)
	if err == nil {
		if !f.sitesSet && f.minSites == 0 {
			o.Sites = 0
		}
		o.Input, err = input(app)
	}
	if err != nil {
		return f.fail(e, app, err)
	}
	interrupted, killed := make(chan struct{}), make(chan struct{})
	o.Interrupted, o.Killed = interrupted, killed
	sig := make(chan os.Signal, 4)
	signal.Notify(sig, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	done := make(chan struct{})
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		for _, c := range []chan struct{}{interrupted, killed} {
			select {
			case <-sig:
				close(c)
			case <-done:
				return
			}
		}
	}()
	m := &machine{w: json.NewEncoder(e.stdout), quiet: f.quiet}
	var show printer = m
	if !f.json {
		show = &people{w: e.stderr, flags: f, tty: isTerminal(e.stderr), began: time.Now()}
	}
	o.Event = show.event
	sum, err := localrun.Run(ctx, o)
	signal.Stop(sig)
	close(done)
	<-watched
	show.end()
	if f.json {
		return errOf(m.summary(sum), err)
	}
	if sum.Out == "" && err != nil {
		return err // nothing was started: the error says it all
	}
	if e2 := printSummary(e.stdout, sum); e2 != nil {
		return e2
	}
	if err != nil {
		return silent{err}
	}
	return nil
}

// fail reports what kept the run from being tried at all.
func (f *runFlags) fail(e env, app string, err error) error {
	if !f.json {
		return err
	}
	return failJSON(e, filepath.Base(app), err)
}

// failJSON is the only line of a run that was not tried.
func failJSON(e env, app string, err error) error {
	m := &machine{w: json.NewEncoder(e.stdout)}
	return errOf(m.summary(localrun.Summary{App: app, State: job.Failed, Cause: problem.From(err).Told(), Engine: job.EngineAuto}), err)
}

func errOf(printing, err error) error {
	if printing != nil {
		return printing
	}
	if err != nil {
		return silent{err}
	}
	return nil
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && isatty.IsTerminal(f.Fd())
}

// printer shows events.
type printer interface {
	event(localrun.Event)
	end()
}

// machine prints one JSON object per line.
type machine struct {
	w     *json.Encoder
	quiet bool // no log lines
	err   error
}

type line struct {
	Time  time.Time `json:"time"`
	Kind  string    `json:"kind"`
	Party string    `json:"party,omitempty"`
	Job   job.ID    `json:"job,omitempty"`
	Body  any       `json:"body,omitempty"`
}

func (m *machine) event(e localrun.Event) {
	if m.quiet && e.Kind == localrun.KindLog {
		return
	}
	var body any
	if len(e.Body) > 0 {
		body = e.Body
	}
	if err := m.w.Encode(line{e.At, e.Kind, e.Party, e.Job, body}); err != nil && m.err == nil {
		m.err = err
	}
}

func (m *machine) end() {}

func (m *machine) summary(s localrun.Summary) error {
	if m.err != nil {
		return m.err
	}
	if s.Sites == nil {
		s.Sites = []string{} // a list for whoever reads it, even if it is empty
	}
	return m.w.Encode(line{time.Now(), localrun.KindSummary, "", s.Job, s})
}

// people prints lines that people read while they wait.
type people struct {
	w        io.Writer
	flags    *runFlags
	tty      bool
	began    time.Time
	progress bool // the last thing printed is a progress line
	env      map[string]job.EnvProgress
}

func (p *people) end() {
	if p.progress {
		fmt.Fprintln(p.w)
		p.progress = false
	}
}

// say prints a line of Pergola's own.
func (p *people) say(format string, args ...any) {
	p.end()
	fmt.Fprintf(p.w, "%6.1fs  %s\n", time.Since(p.began).Seconds(), fmt.Sprintf(format, args...))
}

func (p *people) event(e localrun.Event) {
	switch e.Kind {
	case localrun.KindLog:
		// What installers say in passing is in the log, and in the message when they fail.
		if !p.flags.quiet && (p.flags.verbose || e.Program != localrun.ProgramInstaller) {
			p.end()
			fmt.Fprintf(p.w, "[%s@%s] %s\n", e.Program, e.Party, e.Line)
		}
	case job.KindEnvProgress:
		p.building(e)
	case job.KindJobState:
		var c job.JobState
		if e.Decode(&c) != nil {
			return
		}
		switch c.To {
		case job.Queued:
			if c.Reason != "" {
				p.say("in the queue: %s", c.Reason)
			}
		case job.Preparing:
			p.say("preparing")
		case job.Running:
			p.say("the app runs")
		case job.Stopping:
			if c.Cause != nil {
				p.say("stopping: %s", strings.ReplaceAll(text(c.Cause), "\n", "\n         "))
			} else {
				p.say("the app has finished; stopping its programs")
			}
		}
	case job.KindPartyState:
		var c job.PartyStateChange
		if e.Decode(&c) != nil {
			return
		}
		switch c.To {
		case job.PartyReady:
			p.say("%s is ready", e.Party)
		case job.PartyFailed:
			if c.Cause != nil {
				p.say("%s failed: %s", e.Party, c.Cause.Msg)
			}
		}
	case job.KindRound:
		var r job.Round
		if e.Decode(&r) != nil {
			return
		}
		if r.Total > 0 {
			p.say("round %d of %d", r.Round, r.Total)
		} else {
			p.say("round %d", r.Round)
		}
	case job.KindClientFailure:
		var c job.ClientFailure
		if e.Decode(&c) == nil {
			p.say("%s", failureLine(e.Party, c))
		}
	case job.KindProgramEnded:
		var g job.Program
		if e.Decode(&g) == nil && g.Code != 0 && g.Signal != "terminated" && g.Code != -15 {
			p.say("%s at %s ended with %d", g.Name, e.Party, g.Code)
		}
	case job.KindWarning:
		var t job.Text
		if e.Decode(&t) == nil {
			p.say("warning: %s", t.Message)
		}
	case job.KindLink:
		var l job.Link
		if e.Decode(&l) == nil && !l.Since.IsZero() {
			p.say("site %s unreachable since %s; its programs go on, and the job waits for it", l.Site, l.Since.Local().Format(time.TimeOnly))
		}
	case job.KindEngine:
		var c job.EngineChoice
		if e.Decode(&c) == nil {
			p.say("%s", engineLine(c))
		}
	case job.KindNote:
		var t job.Text
		if e.Decode(&t) == nil && e.Party == "" {
			p.say("%s", t.Message)
		}
	}
}

// engineLine says how the app runs, and why.
func engineLine(c job.EngineChoice) string {
	text := "engine " + c.Engine
	if c.Engine == job.EngineFlower {
		text += " (Flower's own programs)"
	}
	text += ", flwr " + c.Flwr
	if c.Python != "" {
		text += " on Python " + c.Python
	}
	return text + ": " + c.Why
}

func failureLine(party string, c job.ClientFailure) string {
	var b strings.Builder
	if c.Round > 0 {
		fmt.Fprintf(&b, "round %d: ", c.Round)
	}
	switch {
	case c.Exception != "":
		fmt.Fprintf(&b, "the client app at %s raised %s", party, c.Exception)
	case c.Count > 0:
		fmt.Fprintf(&b, "the strategy counted %d failed clients", c.Count)
	default:
		fmt.Fprintf(&b, "a client failed at %s", party)
	}
	if c.Message != "" {
		fmt.Fprintf(&b, " (%s)", c.Message)
	}
	return b.String()
}

// building shows how far environments are: on a terminal in one line that is written over.
func (p *people) building(e localrun.Event) {
	var g job.EnvProgress
	if e.Decode(&g) != nil {
		return
	}
	if p.env == nil {
		p.env = map[string]job.EnvProgress{}
	}
	last, seen := p.env[e.Party]
	p.env[e.Party] = g
	who := e.Party
	if who != "" {
		who += ": "
	}
	step := ""
	if g.Total > 0 {
		step = fmt.Sprintf(" %d/%d", g.Done, g.Total)
	}
	msg := g.Message
	if msg != "" {
		msg = " " + msg
	}
	if p.tty && seen && last.Phase == g.Phase {
		fmt.Fprintf(p.w, "\r\x1b[K%6.1fs  %senvironment: %s%s%.80s", time.Since(p.began).Seconds(), who, g.Phase, step, msg)
		p.progress = true
		return
	}
	if !seen || last.Phase != g.Phase {
		p.say("%senvironment: %s%s%s", who, g.Phase, step, msg)
	}
}

// printSummary prints the result.
func printSummary(w io.Writer, s localrun.Summary) error {
	tw := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintf(tw, "\napp\t%s\n", s.App)
	if s.Flwr != "" {
		fmt.Fprintf(tw, "engine\t%s, flwr %s\n", s.Engine, s.Flwr)
		if s.Why != "" {
			fmt.Fprintf(tw, "\t%s\n", s.Why)
		}
	}
	fmt.Fprintf(tw, "sites\t%s\n", strings.Join(s.Sites, ", "))
	fmt.Fprintf(tw, "state\t%s\n", s.State)
	fmt.Fprintf(tw, "duration\t%.1f s\n", s.Seconds)
	if s.Cause != nil {
		fmt.Fprintf(tw, "cause\t%s\n", s.Cause.Code)
		fmt.Fprintf(tw, "\t%s\n", strings.ReplaceAll(text(s.Cause), "\n", "\n\t"))
	}
	for i, f := range s.Failures {
		fmt.Fprintf(tw, "client failure\t%s\n", failureLine(s.FailedAt[i], f))
	}
	for _, t := range s.Warnings {
		fmt.Fprintf(tw, "warning\t%s\n", t)
	}
	if s.Out != "" {
		fmt.Fprintf(tw, "logs\t%s\n", filepath.Join(s.Out, "logs"))
		if _, err := os.Stat(filepath.Join(s.Out, "results")); err == nil {
			fmt.Fprintf(tw, "results\t%s\n", filepath.Join(s.Out, "results"))
		}
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	if err := printRounds(w, s.Rounds); err != nil {
		return err
	}
	return printClients(w, s.Clients)
}

// clientRows is how many rows of clients' numbers are printed; the summary has all.
const clientRows = 40

// printClients prints a row for each round, phase and site: what the site's replies had in them.
func printClients(w io.Writer, all []job.ClientMetrics) error {
	if len(all) == 0 {
		return nil
	}
	rows := slices.Clone(all)
	phases := []string{"train", "evaluate"}
	order := func(p string) int { return (slices.Index(phases, p) + 3) % 3 } // others last
	slices.SortStableFunc(rows, func(a, b job.ClientMetrics) int {
		return cmp.Or(cmp.Compare(a.Round, b.Round), cmp.Compare(order(a.Phase), order(b.Phase)), strings.Compare(a.Phase, b.Phase), strings.Compare(a.Site, b.Site))
	})
	hidden := len(rows) - clientRows
	if hidden > 0 {
		rows = rows[hidden:]
	}
	names := map[string]bool{}
	for _, r := range rows {
		for n := range r.Values {
			names[n] = true
		}
	}
	cols := slices.Sorted(maps.Keys(names))
	if len(cols) > clientColumns {
		cols = cols[:clientColumns]
	}
	tw := tabwriter.NewWriter(w, 0, 4, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(tw, "\nround\tphase\tsite\treplies\terrors\tseconds\tsent\treceived\t")
	for _, n := range cols {
		fmt.Fprintf(tw, "%s\t", n)
	}
	fmt.Fprintln(tw)
	for _, r := range rows {
		fmt.Fprintf(tw, "%d\t%s\t%s\t%d\t%d\t%.3g\t%s\t%s\t", r.Round, r.Phase, r.Site, r.Replies, r.Errors, r.Seconds.Mean, human.IBytes(uint64(r.SentBytes)), human.IBytes(uint64(r.ReceivedBytes)))
		for _, n := range cols {
			s, ok := r.Values[n]
			switch {
			case !ok:
				fmt.Fprint(tw, "\t")
			case s.Count == 1 || s.Min == s.Max:
				fmt.Fprintf(tw, "%.6g\t", s.Mean)
			default:
				fmt.Fprintf(tw, "%.4g (%.4g – %.4g)\t", s.Mean, s.Min, s.Max)
			}
		}
		fmt.Fprintln(tw)
	}
	if err := tw.Flush(); err != nil || hidden <= 0 {
		return err
	}
	_, err := fmt.Fprintf(w, "%d rows before these, and all numbers, are in client_metrics of summary.json\n", hidden)
	return err
}

// clientColumns is how many numbers of clients are printed beside one another.
const clientColumns = 8

// printRounds prints a row a round, a column for each metric of each phase.
func printRounds(w io.Writer, rounds []localrun.RoundMetrics) error {
	if len(rounds) == 0 {
		return nil
	}
	type column struct{ phase, name string }
	set := map[column]bool{}
	for _, r := range rounds {
		for ph, vs := range r.Phases {
			for n := range vs {
				set[column{ph, n}] = true
			}
		}
	}
	order := []string{"train", "evaluate", "server"}
	cols := slices.SortedFunc(maps.Keys(set), func(a, b column) int {
		if d := slices.Index(order, a.phase) - slices.Index(order, b.phase); d != 0 {
			return d
		}
		return strings.Compare(a.name, b.name)
	})
	tw := tabwriter.NewWriter(w, 0, 4, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(tw, "\nround\t")
	for _, c := range cols {
		fmt.Fprintf(tw, "%s %s\t", c.phase, c.name)
	}
	fmt.Fprintln(tw)
	for _, r := range rounds {
		fmt.Fprintf(tw, "%d\t", r.Round)
		for _, c := range cols {
			if v, ok := r.Phases[c.phase][c.name]; ok {
				fmt.Fprintf(tw, "%.6g\t", v)
			} else {
				fmt.Fprint(tw, "\t")
			}
		}
		fmt.Fprintln(tw)
	}
	return tw.Flush()
}
