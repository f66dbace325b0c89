package flower

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/proc"
)

// DefaultReadyTimeout is how long a superlink may take to be ready. The reference has 10 s; a cold
// start of Python on a slow disk takes longer.
const DefaultReadyTimeout = 60 * time.Second

// ServerConfig says how to run the server's side of a job.
type ServerConfig struct {
	Install      *Installation
	AppDir       string   // the staged app; the programs' working directory
	RunDir       string   // where Database is, if it is relative
	LogDir       string   // superlink_log.txt and server_app_log.txt
	FlwrHome     string   // this party's own FLWR_HOME
	IP           string   // a loopback address of this party alone
	Env          []string // complete environment, "K=V", to which what keeps the job in its place is added
	Args         []string // to the server app: flower-server-app or `flwr run`; --run-config is taken out and added to RunConfig
	RunConfig    []string // overrides, see ParseRunConfig
	Installs     bool     // Flower may install the app's dependencies at run time
	Database     string   // "" keeps the superlink's state in memory
	ReadyTimeout time.Duration
	StopGrace    time.Duration // for a run to be stopped by way of Flower before programs are; 0 is DefaultStopGrace, less is none
	Party        string        // behind the prefix of echoed lines
	Echo         io.Writer     // nil: no echo
	OnEvent      func(Event)
	OnLogError   func(error)
	OpenLog      func(path string) (io.WriteCloser, error) // opens a log in LogDir to append to it; nil: a file
}

// Server is a running superlink, and its server app once RunApp was called.
type Server struct {
	cfg   ServerConfig
	party *party
	args  []string // cfg.Args without run config
	over  map[string]any

	link             *proc.Process
	fleet, api, rest string // addresses: Fleet; Driver, Exec or Control; ServerAppIo or Runtime
	control          *control
	linkLog          *parser

	done chan struct{} // closed when the superlink has ended
	wait sync.WaitGroup

	fab func() (bundle, error)

	mu       sync.Mutex // guards the rest
	app      *proc.Process
	run      uint64
	nodes    int
	changed  chan struct{} // closed and replaced when nodes changes
	stopping bool
	finished bool    // the run has finished, or was asked to stop
	lastApp  *raised // the newest exception of the server app
}

// bundle is a FAB and its SHA-256.
type bundle struct {
	content []byte
	hash    string
}

// raised is an exception that was printed.
type raised struct {
	exception string
	traceback []string
	marked    bool // the supernode said that it is the client app's
}

// StartServer starts the superlink on cfg.IP and waits until its ports accept connections and speak
// their protocol. Errors have the codes start-timeout, program-failed, app-invalid and usage, or wrap
// the cause of ctx; nothing is left running then. ctx is for starting only: end the server with Stop.
func StartServer(ctx context.Context, cfg ServerConfig) (*Server, error) {
	s := &Server{cfg: cfg, done: make(chan struct{}), changed: make(chan struct{})}
	var err error
	if s.args, s.over, err = serverArgs(cfg); err != nil {
		return nil, err
	}
	s.party, err = newParty(cfg.Install, cfg.AppDir, cfg.LogDir, cfg.FlwrHome, cfg.OpenLog, cfg.Env, cfg.Party, cfg.Echo, cfg.OnEvent, cfg.OnLogError, cfg.IP)
	if err != nil {
		return nil, err
	}
	if s.cfg.ReadyTimeout <= 0 {
		s.cfg.ReadyTimeout = DefaultReadyTimeout
	}
	if s.cfg.StopGrace == 0 {
		s.cfg.StopGrace = DefaultStopGrace
	}
	if w := cfg.Install.Warning; w != "" {
		s.party.events.emit(Event{Kind: Warning, Message: w})
	}
	gen := cfg.Install.Caps.Generation
	if gen == GenModule && len(s.over) > 0 {
		return nil, TakesConfig(cfg.Install.Version, []string{"-"})
	}
	if gen == GenDriver {
		if err := overrideStaged(cfg.AppDir, s.over); err != nil {
			return nil, err
		}
	}
	// Packing costs as long as the superlink's start does: together.
	s.fab = sync.OnceValues(func() (bundle, error) {
		content, hash, err := buildFAB(cfg.AppDir, gen)
		return bundle{content, hash}, err
	})
	if gen > GenDriver {
		s.wait.Go(func() { _, _ = s.fab() }) // its error comes again in RunApp
	}
	for attempt := 0; ; {
		var ports []int
		if ports, attempt, err = freePorts(ctx, cfg.IP, 4, attempt); err != nil {
			break
		}
		if err = s.startLink(ctx, ports); err == nil || !errors.Is(err, errPortTaken) {
			break
		}
	}
	if err != nil {
		s.wait.Wait()
		return nil, err
	}
	s.control = newControl(s.api, gen)
	s.wait.Go(func() {
		<-s.link.Done()
		s.party.ended(ProgramSuperlink, s.link)
		close(s.done)
	})
	return s, nil
}

var errPortTaken = errors.New("another program has the port")

// startLink starts a superlink on the given ports and waits for it.
func (s *Server) startLink(ctx context.Context, ports []int) error {
	addr := func(i int) string { return net.JoinHostPort(s.cfg.IP, strconv.Itoa(ports[i])) }
	caps := s.cfg.Install.Caps
	args := []string{s.cfg.Install.program(ProgramSuperlink), "--insecure"}
	grpc := func(a string) func(context.Context) error {
		return func(ctx context.Context) error { return speaksHTTP2(ctx, a) }
	}
	http := func(a string) func(context.Context) error {
		return func(ctx context.Context) error { return speaksHTTP1(ctx, a) }
	}
	s.rest, s.fleet, s.api = addr(0), addr(1), addr(2)
	var checks []func(context.Context) error
	switch caps.Generation {
	case GenModule, GenDriver:
		s.api = s.rest
		args = append(args, "--driver-api-address", s.rest)
		if _, ok := caps.Superlink["--fleet-api-address"]; ok {
			args = append(args, "--fleet-api-address", s.fleet)
		} else { // 1.8
			args = append(args, "--grpc-rere", "--grpc-rere-fleet-api-address", s.fleet)
		}
		checks = append(checks, grpc(s.rest), grpc(s.fleet))
	case GenExec, GenControl:
		name := "--exec-api-address"
		if caps.Generation == GenControl {
			name = "--control-api-address"
		}
		args = append(args, "--serverappio-api-address", s.rest, "--fleet-api-address", s.fleet, name, s.api)
		if _, ok := caps.Superlink["--simulationio-api-address"]; ok && caps.Generation == GenExec {
			args = append(args, "--simulationio-api-address", addr(3)) // its default is all addresses
		}
		checks = append(checks, grpc(s.api), grpc(s.fleet), grpc(s.rest))
	case GenRuntime:
		args = append(args, "--host", s.cfg.IP, "--port", strconv.Itoa(ports[0]), "--fleet-api-address", s.fleet, "--control-api-address", s.api)
		checks = append(checks, grpc(s.api), grpc(s.fleet), http(s.rest))
	case GenMixed:
		s.api = s.rest
		args = append(args, "--host", s.cfg.IP, "--port", strconv.Itoa(ports[0]), "--fleet-api-address", s.fleet)
		checks = append(checks, http(s.rest), grpc(s.fleet))
	default:
		s.fleet, s.api = s.rest, s.rest
		args = append(args, "--host", s.cfg.IP, "--port", strconv.Itoa(ports[0]))
		checks = append(checks, http(s.rest))
	}
	if caps.Generation <= GenDriver && caps.GRPCAdapter {
		args = append(args, "--fleet-api-type", "grpc-adapter") // as the reference does with this generation
	}
	args = append(args, runtimeInstalls(caps.Superlink, s.cfg.Installs)...)
	if db := s.cfg.Database; db != "" {
		if db != ":memory:" && s.cfg.RunDir != "" && !filepath.IsAbs(db) {
			db = filepath.Join(s.cfg.RunDir, db)
		}
		args = append(args, "--database", db)
	}

	s.linkLog = newParser(ProgramSuperlink)
	link, err := s.party.start(ProgramSuperlink, SuperlinkLog, prefixSuperlink, args, s.onLinkLine)
	if err != nil {
		return err
	}
	rctx, cancel := context.WithTimeoutCause(ctx, s.cfg.ReadyTimeout, errNotReady)
	defer cancel()
	err = waitReady(rctx, link.Done(), checks)
	if err == nil {
		s.link = link
		return nil
	}
	link.Stop(0)
	s.party.ended(ProgramSuperlink, link)
	switch {
	case errors.Is(err, errDied) && portTaken(link.Tail(50)):
		s.party.events.emit(Event{Kind: Warning, Program: ProgramSuperlink, Message: fmt.Sprintf("a port from %d on was taken on %s; trying others", ports[0], s.cfg.IP)})
		return fmt.Errorf("%w: %w", errPortTaken, died(ProgramSuperlink, SuperlinkLog, link))
	case errors.Is(err, errDied):
		return died(ProgramSuperlink, SuperlinkLog, link)
	case ctx.Err() != nil:
		return ctxError(ctx, "start the superlink")
	}
	e := problem.New(problem.StartTimeout, "see "+SuperlinkLog+"; raise ready-timeout of [tool.pergola.server] if the machine is slow",
		"%s was not ready within %s (%v)%s", ProgramSuperlink, s.cfg.ReadyTimeout, err, lastWords(link.Tail(20)))
	e.Log = SuperlinkLog
	return e
}

var errNotReady = errors.New("not ready in time")

// serverArgs takes the run config out of the server app's arguments.
func serverArgs(cfg ServerConfig) (rest []string, over map[string]any, err error) {
	rest, overrides, err := SplitArgs(cfg.Args)
	if err != nil {
		return nil, nil, err
	}
	over, err = ParseRunConfig(append(slices.Clone(cfg.RunConfig), overrides...))
	return rest, over, err
}

// overrideStaged writes overrides into a staged app's own config: this generation's flower-server-app
// takes none, and its supernodes read the app's directory.
func overrideStaged(dir string, over map[string]any) error {
	if len(over) == 0 {
		return nil
	}
	raw, err := readText(filepath.Join(dir, "pyproject.toml"))
	if err != nil {
		return problem.Wrap(err, problem.AppInvalid, "stage the app first", "the staged app has no pyproject.toml")
	}
	var doc map[string]any
	if err := toml.Unmarshal(raw, &doc); err != nil {
		return tomlProblem(filepath.Join(dir, "pyproject.toml"), err)
	}
	var changed bool
	app := table(table(table(doc, "tool", &changed), "flwr", &changed), "app", &changed)
	config, _ := app["config"].(map[string]any)
	flat := map[string]any{}
	flatten(config, "", flat)
	for k, v := range over {
		if _, ok := flat[k]; !ok {
			return unknownKey(k, flat)
		}
		flat[k] = v
	}
	app["config"] = flat
	return writePyproject(dir, doc)
}

// FleetAddr is where supernodes connect, "host:port".
func (s *Server) FleetAddr() string { return s.fleet }

// Done is closed when the superlink has ended, for whatever reason.
func (s *Server) Done() <-chan struct{} { return s.done }

// Failure tells why the superlink ended, nil while it runs and after Stop.
func (s *Server) Failure() error {
	select {
	case <-s.done:
	default:
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping {
		return nil
	}
	return died(ProgramSuperlink, SuperlinkLog, s.link)
}

// Nodes is how many supernodes have registered.
func (s *Server) Nodes() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.nodes
}

// WaitNodes waits until n supernodes have registered, the superlink has ended or ctx does.
func (s *Server) WaitNodes(ctx context.Context, n int) error {
	for {
		s.mu.Lock()
		nodes, changed := s.nodes, s.changed
		s.mu.Unlock()
		if nodes >= n {
			return nil
		}
		select {
		case <-changed:
		case <-s.done:
			if err := s.Failure(); err != nil {
				return err
			}
			return problem.New(problem.ProgramFailed, "", "the superlink was stopped")
		case <-ctx.Done():
			return ctxError(ctx, fmt.Sprintf("wait for %d supernodes, %d are there", n, nodes))
		}
	}
}

// createdForm is how superlinks report a new run (1.13 – 1.41).
var createdForm = regexp.MustCompile(`Created (?:\w+ )?run (\d+)`)

func (s *Server) onLinkLine(line string) {
	if m := createdForm.FindStringSubmatch(line); m != nil {
		if id, err := strconv.ParseUint(m[1], 10, 64); err == nil {
			s.mu.Lock()
			s.run = id
			s.mu.Unlock()
		}
	}
	s.handle(s.linkLog.line(line))
}

// handle takes note of what a parser found and passes it on.
func (s *Server) handle(events []Event) {
	for _, e := range events {
		switch e.Kind {
		case NodeReady:
			s.mu.Lock()
			s.nodes++
			close(s.changed)
			s.changed = make(chan struct{})
			s.mu.Unlock()
		case AppException:
			s.mu.Lock()
			s.lastApp = &raised{exception: e.Exception, traceback: e.Traceback}
			s.mu.Unlock()
		}
		s.party.events.emit(e)
	}
}

// Stop ends the server app, then the superlink and everything that they started, each within grace,
// then by force. A run that goes on is stopped by way of Flower first, for at most the StopGrace of the
// configuration, unless grace is 0. It is idempotent and waits until all are gone.
func (s *Server) Stop(grace time.Duration) {
	s.mu.Lock()
	s.stopping = true
	app := s.app
	s.mu.Unlock()
	if grace > 0 {
		s.stopRun(context.Background())
	}
	if app != nil {
		if grace > 0 && s.cfg.Install.Caps.Generation <= GenDriver {
			grace = max(grace, s.cfg.StopGrace) // its SIGTERM is how this generation's runs are stopped
		}
		app.Stop(grace)
	}
	s.link.Stop(grace)
	<-s.done
	s.wait.Wait()
	s.control.close()
}

// RunApp runs the server app to its end: nil when it finished well. Otherwise the error is app-error
// with what it raised, program-failed if the superlink or another program died, or wraps the cause of
// ctx; programs go on running then, until Stop. It can be called once.
func (s *Server) RunApp(ctx context.Context) error {
	gen := s.cfg.Install.Caps.Generation
	if gen == GenModule {
		app, err := LoadApp(s.cfg.AppDir)
		if err != nil {
			return err
		}
		flag := "--superlink"
		if _, ok := s.cfg.Install.Caps.ServerApp[flag]; !ok { // 1.8
			flag = "--server"
		}
		args := []string{s.cfg.Install.program(ProgramServerApp), "--insecure", flag, s.api, "--dir", s.cfg.AppDir}
		return s.runProgram(ctx, ProgramServerApp, append(append(args, s.args...), app.ServerApp))
	}
	if gen == GenDriver {
		args := []string{s.cfg.Install.program(ProgramServerApp), "--insecure", "--superlink", s.api}
		return s.runProgram(ctx, ProgramServerApp, append(append(args, s.args...), s.cfg.AppDir))
	}
	if len(s.args) > 0 {
		return s.flwrRun(ctx)
	}
	fab, err := s.fab()
	if err != nil {
		return err
	}
	run, err := s.control.startRun(ctx, fab.content, fab.hash, s.over)
	refused, isRefusal := errors.AsType[*callError](err)
	switch {
	case err == nil:
	case errors.Is(err, errNotOffered):
		s.party.events.emit(Event{Kind: Warning, Message: "the superlink does not know the call that starts a run; using `flwr run`"})
		return s.flwrRun(ctx)
	case ctx.Err() != nil:
		return ctxError(ctx, "start the run")
	case s.linkDied():
		return s.Failure()
	case isRefusal:
		return problem.New(problem.AppInvalid, "see the end of "+SuperlinkLog, "the superlink refused the app: %s", refused.msg)
	default:
		return problem.Wrap(err, problem.ProgramFailed, "see the end of "+SuperlinkLog, "the run could not be started")
	}
	return s.watch(ctx, run)
}

// linkDied gives the superlink a moment to be seen dead: a call fails before its end is known.
func (s *Server) linkDied() bool {
	select {
	case <-s.done:
		return true
	case <-time.After(time.Second):
		return false
	}
}

// runProgram runs a server app that is a program of its own.
func (s *Server) runProgram(ctx context.Context, name string, args []string) error {
	log := newParser(name)
	app, err := s.party.start(name, ServerAppLog, prefixServerApp, args, func(line string) { s.handle(log.line(line)) })
	if err != nil {
		return err
	}
	s.mu.Lock()
	stopping := s.stopping
	s.app = app
	s.mu.Unlock()
	if stopping {
		app.Stop(0)
	}
	// What it raised is known once its log was read to the end.
	ended := make(chan struct{})
	s.wait.Go(func() {
		defer close(ended)
		<-app.Done()
		s.handle(log.end())
		s.party.ended(name, app)
	})
	select {
	case <-ended:
	case <-ctx.Done():
		return ctxError(ctx, "run the server app")
	case <-s.done:
		select {
		case <-ended: // both have ended: the server app's code counts, as in the reference
		default:
			if err := s.Failure(); err != nil {
				return err
			}
			<-ended
		}
	}
	exit := app.Exit()
	if exit.OK() {
		return nil
	}
	return s.appError(exit.String(), ServerAppLog, app.Tail(20), exit)
}

// appError is the problem of a server app that did not end well.
func (s *Server) appError(how, log string, tail []string, exit proc.Exit) error {
	s.mu.Lock()
	last := s.lastApp
	s.mu.Unlock()
	return appProblem(how, log, tail, exit, last)
}

// appProblem is the problem of a server app that did not end well; last is the newest exception that it printed, or nil.
func appProblem(how, log string, tail []string, exit proc.Exit, last *raised) *problem.Error {
	e := problem.New(problem.AppError, "correct the app; the traceback is in "+log, "the server app failed (%s)%s", how, lastWords(tail))
	switch {
	case exit.OOM:
		e.Code, e.Next = problem.OutOfMemory, moreMemory(log)
	case fromOutside(exit):
		e.Code, e.Next = problem.ProgramFailed, killedNext(log)
	case last != nil:
		e.Msg = "the server app raised " + last.exception
		if module, ok := missingModule(last.exception); ok {
			e.Code = problem.DependencyMissing
			e.Next = fmt.Sprintf("add the package that has the module %q to dependencies in the app's pyproject.toml; the traceback is in %s", module, log)
		}
	}
	e.Log = log
	return e
}

var missingForm = regexp.MustCompile(`^ModuleNotFoundError: No module named '([^']+)'`)

// missingModule tells from an exception which module could not be imported.
func missingModule(exception string) (module string, ok bool) {
	m := missingForm.FindStringSubmatch(exception)
	if m == nil {
		return "", false
	}
	module, _, _ = strings.Cut(m[1], ".")
	return module, true
}

// flwrRun starts the run by `flwr run`, for options that only it has, and then watches it.
func (s *Server) flwrRun(ctx context.Context) error {
	if err := s.connect(); err != nil {
		return err
	}
	args := []string{s.cfg.Install.program("flwr"), "run"}
	for k, v := range s.over {
		args = append(args, "--run-config", tomlPair(k, v))
	}
	args = append(args, s.args...)
	args = append(args, s.cfg.AppDir, connection)
	if err := s.runProgram(ctx, ProgramFlwrRun, args); err != nil {
		return err
	}
	s.mu.Lock()
	run := s.run
	s.mu.Unlock()
	if run == 0 {
		return problem.New(problem.ProgramFailed, "see "+ServerAppLog+" and "+SuperlinkLog, "`flwr run` ended well, but the superlink did not report a run")
	}
	return s.watch(ctx, run)
}

const connection = "pergola" // the name of the superlink in Flower's configuration

// connect tells `flwr run` where the superlink is: by $FLWR_HOME/config.toml (1.26 and on), and by the
// staged app's [tool.flwr.federations] before that.
func (s *Server) connect() error {
	config := fmt.Sprintf("[superlink]\ndefault = %q\n[superlink.%s]\naddress = %q\ninsecure = true\n", connection, connection, s.api)
	if err := os.WriteFile(filepath.Join(s.cfg.FlwrHome, "config.toml"), []byte(config), 0o600); err != nil {
		return problem.Wrap(err, codeOf(err), "make room", "Flower's configuration cannot be written")
	}
	if s.cfg.Install.Caps.Generation >= GenRuntime {
		return nil
	}
	major, minor, ok := releaseOf(s.cfg.Install.Version)
	if ok && (major > 1 || minor >= 26) {
		return nil
	}
	path := filepath.Join(s.cfg.AppDir, "pyproject.toml")
	raw, err := readText(path)
	if err != nil {
		return problem.Wrap(err, problem.AppInvalid, "stage the app first", "the staged app has no pyproject.toml")
	}
	var doc map[string]any
	if err := toml.Unmarshal(raw, &doc); err != nil {
		return tomlProblem(path, err)
	}
	var changed bool
	flwr := table(table(doc, "tool", &changed), "flwr", &changed)
	flwr["federations"] = map[string]any{"default": connection, connection: map[string]any{"address": s.api, "insecure": true}}
	return writePyproject(s.cfg.AppDir, doc)
}

// Times of watching a run. The stream of the server app's output ends with the run, so the state is
// asked for then; each question costs two lines of superlink_log.txt.
const (
	statusPause = 10 * time.Second       // between questions while the stream is open
	streamPause = 200 * time.Millisecond // before the stream is opened again
	lookPause   = time.Second            // between looks at the server app's process
	drainTime   = 2 * time.Second        // for the rest of the stream after the run's end
	deadTime    = 5 * time.Second        // from its end until the run counts as failed, if its state does not change
)

// appProcess is the name of the server app's process (1.13 and on) as /proc has it.
const appProcess = "flwr-serverapp"

// appAlive tells whether the server app's process runs below the superlink.
func (s *Server) appAlive() bool {
	for _, pid := range proc.Descendants(s.link.Pid()) {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			continue // gone meanwhile
		}
		// pid (comm) state …; a zombie is dead already.
		if open, end := strings.IndexByte(string(stat), '('), strings.LastIndex(string(stat), ") "); open >= 0 && end > open && len(stat) > end+2 {
			if string(stat[open+1:end]) == appProcess && stat[end+2] != 'Z' {
				return true
			}
		}
	}
	return false
}

// watch waits for a run's end, and passes on meanwhile what the server app prints.
func (s *Server) watch(ctx context.Context, run uint64) error {
	s.mu.Lock()
	s.run = run
	s.mu.Unlock()
	s.party.events.emit(Event{Kind: ProgramStarted, Program: ProgramServerApp}) // by the superlink: its pid is not told
	out := s.newAppLog()
	defer out.close()
	exit, ooms := proc.Exit{Code: proc.ExitFatal}, proc.OOMKills()
	defer func() {
		s.party.events.emit(Event{Kind: ProgramEnded, Program: ProgramServerApp, Exit: exit, Tail: out.tail})
	}()
	// What it says while it is being stopped is read, too.
	sctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	ended := make(chan struct{}, 1)
	var reader sync.WaitGroup
	defer reader.Wait()
	defer cancel()
	reader.Go(func() {
		after := 0.0
		for sctx.Err() == nil {
			// A broken stream is no failure of the run: its state is asked for, and it is opened again.
			after, _ = s.control.follow(sctx, run, after, out.write)
			select {
			case ended <- struct{}{}:
			case <-sctx.Done():
			}
			select {
			case <-time.After(streamPause):
			case <-sctx.Done():
			}
		}
	})
	tick := time.NewTicker(statusPause)
	defer tick.Stop()
	look := time.NewTicker(lookPause)
	defer look.Stop()
	var seen bool      // the server app's process has been there
	var gone time.Time // since when it is not there any more
	for failures := 0; ; {
		drained := false
		select {
		case <-ended:
			drained = true
		case <-tick.C:
		case <-look.C:
			// A server app that is killed tells nobody: the superlink notices after 60 s, or never (1.15).
			if s.appAlive() {
				seen, gone = true, time.Time{}
				continue
			}
			if !seen {
				continue
			}
			if gone.IsZero() {
				gone = time.Now()
			}
		case <-ctx.Done():
			exit = s.stopRun(sctx)
			return ctxError(ctx, "run the server app")
		case <-s.done:
			if err := s.Failure(); err != nil {
				return err
			}
			return problem.New(problem.ProgramFailed, "", "the superlink was stopped before the run ended")
		}
		st, err := s.control.state(ctx, run)
		switch {
		case err == nil:
			failures = 0
			if st.status == statusFinished {
				if !drained {
					// What the server app said last is on its way.
					select {
					case <-ended:
					case <-time.After(drainTime):
					case <-s.done:
					}
				}
				cancel()
				reader.Wait()
				out.close()
				s.runEnded()
				exit = exitOfRun(st)
				return s.verdict(st, out.tail)
			}
			if !gone.IsZero() && time.Since(gone) > deadTime {
				cancel()
				reader.Wait()
				out.close()
				s.runEnded()
				exit.OOM = proc.OOMKilled(ooms)
				return s.processGone(out.tail, exit.OOM)
			}
		case ctx.Err() != nil:
			exit = s.stopRun(sctx)
			return ctxError(ctx, "run the server app")
		default:
			if failures++; failures > 20 {
				return problem.Wrap(err, problem.ProgramFailed, "see the end of "+SuperlinkLog, "the superlink does not tell the state of the run")
			}
		}
	}
}

// processGone is the problem of a server app whose process is no more while its run goes on: the superlink has not seen
// how it ended. What it raised would have been its last lines; without, it was ended from outside, or by a call like
// os._exit, and nothing tells which (some versions of flwr report the latter, so mostly it was the former).
func (s *Server) processGone(tail []string, oom bool) error {
	s.mu.Lock()
	raised := s.lastApp != nil
	s.mu.Unlock()
	if raised || oom {
		return s.appError("its process ended without a result", ServerAppLog, tail, proc.Exit{OOM: oom})
	}
	e := problem.New(problem.ProgramFailed, killedNext(ServerAppLog)+", unless the app ends its own process (os._exit)",
		"the server app failed (its process ended without a result)%s", lastWords(tail))
	e.Log = ServerAppLog
	return e
}

// verdict is what a finished run's state means.
func (s *Server) verdict(st runStatus, tail []string) error {
	if st.sub == subCompleted {
		return nil
	}
	how := st.status + ":" + st.sub
	if st.details != "" {
		details, _, _ := strings.Cut(strings.TrimSpace(st.details), "\n")
		how += ", " + details
	}
	return s.appError(how, ServerAppLog, tail, proc.Exit{})
}
