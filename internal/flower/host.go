package flower

import (
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/proc"
)

// HostConfig says where and how Python processes run that host an app in the place of Flower's programs.
type HostConfig struct {
	Install    *Installation
	Server     bool   // they host the server app, else the client app
	Dir        string // their working directory
	LogDir     string // server_app_log.txt, client_app_log.txt
	FlwrHome   string // this party's own FLWR_HOME
	IP         string // a loopback address of this party alone
	Env        []string
	Party      string
	Echo       io.Writer
	OnEvent    func(Event)
	OnLogError func(error)
	OpenLog    func(path string) (io.WriteCloser, error) // opens a log in LogDir to append to it; nil: a file
}

// Host starts such processes. What they print goes where the lines of Flower's programs go, and is read for events as those are.
type Host struct {
	cfg   HostConfig
	party *party
}

// NewHost makes a Host; it starts nothing.
func NewHost(cfg HostConfig) (*Host, error) {
	p, err := newParty(cfg.Install, cfg.Dir, cfg.LogDir, cfg.FlwrHome, cfg.OpenLog, cfg.Env, cfg.Party, cfg.Echo, cfg.OnEvent, cfg.OnLogError, cfg.IP)
	if err != nil {
		return nil, err
	}
	return &Host{cfg: cfg, party: p}, nil
}

// Hosted is a process of a Host.
type Hosted struct {
	*proc.Process
	done    chan struct{}
	log     string
	program string

	mu   sync.Mutex // guards the rest
	last *raised
}

// Start starts a process with the arguments behind the interpreter's, more variables, and files as descriptors 3 and on.
func (h *Host) Start(args, env []string, files ...*os.File) (*Hosted, error) {
	p := &Hosted{done: make(chan struct{}), log: ClientAppLog, program: ProgramHostClient}
	prefix, parse := prefixClientApp, newParser(ProgramSupernode)
	if h.cfg.Server {
		p.log, p.program = ServerAppLog, ProgramHostServer
		prefix, parse = prefixServerApp, newParser(ProgramServerApp)
	}
	handle := func(events []Event) {
		for _, e := range events {
			if e.Kind == AppException {
				p.mu.Lock()
				p.last = &raised{exception: e.Exception, traceback: e.Traceback}
				p.mu.Unlock()
			}
			e.Program = p.program
			e.Message = strings.Replace(e.Message, "the supernode printed", "a worker printed", 1)
			h.party.events.emit(e)
		}
	}
	one := *h.party
	one.env = append(slices.Clone(one.env), env...)
	var err error
	p.Process, err = one.start(p.program, p.log, prefix, append([]string{h.cfg.Install.Python}, args...), func(line string) { handle(parse.line(line)) }, files...)
	if err != nil {
		return nil, err
	}
	go func() { // ends with the process: Done is awaited by whoever started it
		defer close(p.done)
		<-p.Process.Done()
		handle(parse.end())
		h.party.ended(p.program, p.Process)
	}()
	return p, nil
}

// Done is closed when the process has ended and its log was read.
func (p *Hosted) Done() <-chan struct{} { return p.done }

// AppProblem is the problem of a server app that did not end well, once its process has ended; said is what that itself gave as the
// exception, "" if nothing.
func (p *Hosted) AppProblem(said string) *problem.Error {
	<-p.done
	p.mu.Lock()
	last := p.last
	p.mu.Unlock()
	if last == nil && said != "" {
		last = &raised{exception: said}
	}
	exit := p.Exit()
	return appProblem(exit.String(), p.log, p.Tail(20), exit, last)
}

// Died is the problem of a process that ended when it should not have.
func (p *Hosted) Died() *problem.Error {
	<-p.done
	return died(p.program, p.log, p.Process)
}

// Installed gives what is known of an installation without asking its programs: enough for a Host. The generation is that of the
// version's number.
func Installed(ctx context.Context, env Env) (*Installation, error) {
	v, err := version(ctx, env, env.Bin)
	if err != nil {
		return nil, err
	}
	inst := &Installation{Version: v, Bin: env.Bin, Python: env.Python}
	inst.Caps.Generation = GenHTTP
	if major, minor, ok := releaseOf(v); ok && major == 1 {
		for _, g := range []struct {
			first int
			gen   Generation
		}{{0, GenModule}, {11, GenDriver}, {13, GenExec}, {21, GenControl}, {35, GenRuntime}, {37, GenMixed}, {40, GenHTTP}} {
			if minor >= g.first {
				inst.Caps.Generation = g.gen
			}
		}
	}
	inst.judge()
	return inst, nil
}

// InstallApp puts a staged app where Flower's programs of this generation run it from, and gives that folder: from 1.13 on they unpack
// the FAB below FLWR_HOME, with the files that belong into one and no others; before, they run the app where it lies.
func InstallApp(inst *Installation, appDir, home string) (string, error) {
	if inst.Caps.Generation <= GenDriver {
		return appDir, nil
	}
	content, hash, err := buildFAB(appDir, inst.Caps.Generation)
	if err != nil {
		return "", err
	}
	app, err := LoadApp(appDir)
	if err != nil {
		return "", err
	}
	dir := filepath.Join(home, "apps", app.Publisher+"."+app.Name+"."+app.Version+"."+hash[:8])
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", problem.Wrap(err, codeOf(err), "make room, or choose another directory", "the app cannot be unpacked to %s", dir)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return "", problem.Wrap(err, codeOf(err), "make room, or choose another directory", "the app cannot be unpacked to %s", dir)
	}
	defer root.Close()
	return dir, unpackFAB(bytes.NewReader(content), int64(len(content)), "the app's bundle", root)
}
