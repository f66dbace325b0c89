package flower

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/proc"
)

// Names of log files and prefixes are those of the reference system (NVIDIA FLARE's Flower applets), so
// that tools which look for them go on finding them.
const (
	SuperlinkLog = "superlink_log.txt"
	ServerAppLog = "server_app_log.txt"
	ClientAppLog = "client_app_log.txt"

	prefixSuperlink = "FLWR-SL"
	prefixServerApp = "FLWR-SA"
	prefixClientApp = "FLWR-CA"
)

// Names of the programs in events and messages.
const (
	ProgramSuperlink = "flower-superlink"
	ProgramSupernode = "flower-supernode"
	ProgramServerApp = "flower-server-app"
	ProgramClientApp = "flower-client-app" // in the supernode's place up to 1.9
	ProgramFlwrRun   = "flwr run"

	// Of the native engine, by the names that Flower gives to the processes of apps.
	ProgramHostServer = "flwr-serverapp"
	ProgramHostClient = "flwr-clientapp"
)

// firstPort is where the ports of a party's programs begin: below Linux's ephemeral range (32768 and
// up), so that no outgoing connection can hold one. The party's address is its own, so only a program
// that listens on all addresses can be in the way; then the next ports are tried.
const (
	firstPort    = 9091
	portStep     = 20
	portAttempts = 40
)

// freePorts gives n neighbouring ports that are free on ip now, from the given attempt on.
func freePorts(ctx context.Context, ip string, n, attempt int) (ports []int, next int, err error) {
	var config net.ListenConfig
	for ; attempt < portAttempts; attempt++ {
		base := firstPort + attempt*portStep
		free := true
		for i := range n {
			var l net.Listener
			if l, err = config.Listen(ctx, "tcp", net.JoinHostPort(ip, strconv.Itoa(base+i))); err != nil {
				free = false
				if !errors.Is(err, syscall.EADDRINUSE) {
					return nil, attempt, problem.Wrap(err, problem.ProgramFailed, "check the machine's loopback interface", "no port can be opened on %s", ip)
				}
				break
			}
			if err = l.Close(); err != nil {
				return nil, attempt, problem.Wrap(err, problem.ProgramFailed, "check the machine's loopback interface", "no port can be opened on %s", ip)
			}
		}
		if free {
			for i := range n {
				ports = append(ports, base+i)
			}
			return ports, attempt + 1, nil
		}
	}
	return nil, attempt, problem.Wrap(err, problem.ProgramFailed, "stop what listens on all addresses there", "no free ports from %d on at %s", firstPort, ip)
}

// portTaken tells from a program's last lines that another program had its port.
func portTaken(tail []string) bool {
	for _, line := range tail {
		l := strings.ToLower(line)
		for _, s := range []string{"address already in use", "errno 98", "failed to bind to address", "is already in use", "port in server address", "could not bind"} {
			if strings.Contains(l, s) {
				return true
			}
		}
	}
	return false
}

// telemetry is the variable that makes Flower report its use to its makers, or not.
const telemetry = "FLWR_TELEMETRY_ENABLED"

// programEnv is the environment of Flower's programs: given, with what the package comment promises. Telemetry is off unless given
// has it: whoever calls leaves out what the user's own environment says.
// The hosts of direct are never reached by way of a proxy. Keys in given win nowhere: what is set here is what keeps a job inside of its directory and address.
func programEnv(given []string, bin, home string, direct ...string) []string {
	set := map[string]string{
		"FLWR_DISABLE_UPDATE_CHECK": "1",
		"FLWR_HOME":                 home,
		"PYTHONUNBUFFERED":          "1",
	}
	drop := map[string]bool{
		"PYTHONDONTWRITEBYTECODE": true, // each of Flower's processes would compile all of flwr anew, for seconds
		"PYTHONHOME":              true, // of another interpreter
		"VIRTUAL_ENV":             true,
	}
	path, noProxy, report := "", "", "0"
	var env []string
	for _, kv := range given {
		key, value, ok := strings.Cut(kv, "=")
		if !ok || drop[key] {
			continue
		}
		switch key {
		case "PATH":
			path = value
			continue
		case "NO_PROXY", "no_proxy":
			noProxy = value
			continue
		case telemetry:
			report = value
			continue
		}
		if _, ours := set[key]; !ours {
			env = append(env, kv)
		}
	}
	if path == "" {
		path = "/usr/local/bin:/usr/bin:/bin"
	}
	set[telemetry] = report
	set["PATH"] = bin + string(os.PathListSeparator) + path
	// gRPC and httpx honour http_proxy for loopback addresses too.
	hosts := []string{"localhost", "127.0.0.1"}
	for _, h := range direct {
		if !slices.Contains(hosts, h) {
			hosts = append(hosts, h)
		}
	}
	if noProxy != "" {
		hosts = append([]string{noProxy}, hosts...)
	}
	set["NO_PROXY"] = strings.Join(hosts, ",")
	set["no_proxy"] = set["NO_PROXY"]
	for _, key := range slices.Sorted(maps.Keys(set)) {
		env = append(env, key+"="+set[key])
	}
	return env
}

// party is what the server's and the client's side have in common.
type party struct {
	inst       *Installation
	dir        string // working directory of the programs
	logDir     string
	openLog    func(path string) (io.WriteCloser, error)
	env        []string
	name       string // for the echo's prefix
	echo       io.Writer
	onLogError func(error)
	events     *emitter
}

func newParty(inst *Installation, appDir, logDir, home string, openLog func(string) (io.WriteCloser, error), env []string, name string, echo io.Writer, onEvent func(Event), onLogError func(error), direct ...string) (*party, error) {
	for _, dir := range []string{logDir, home} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, problem.Wrap(err, codeOf(err), "make room, or choose another directory", "the directory %s cannot be made", dir)
		}
	}
	return &party{
		inst: inst, dir: appDir, logDir: logDir, openLog: openLog, env: programEnv(env, inst.Bin, home, direct...), name: name, echo: echo,
		onLogError: onLogError, events: &emitter{fn: onEvent},
	}, nil
}

// start starts one of the programs; onLine gets its lines with colours and other escapes removed.
func (p *party) start(name, log, prefix string, args []string, onLine func(string), files ...*os.File) (*proc.Process, error) {
	if p.name != "" {
		prefix += "@" + p.name
	}
	process, err := proc.Start(proc.Spec{
		Name: name, Args: args, Dir: p.dir, Env: p.env, Log: filepath.Join(p.logDir, log), OpenLog: p.openLog, Prefix: prefix, Echo: p.echo,
		OnLine: func(line string) { onLine(plain(line)) }, OnLogError: p.onLogError, Files: files,
	})
	if err != nil {
		p.events.emit(Event{Kind: ProgramEnded, Program: name, Exit: proc.Exit{Code: proc.ExitCannotStart}, Tail: []string{err.Error()}})
		if e, ok := errors.AsType[*problem.Error](err); ok && e.Log == "" {
			e.Log = log
		}
		return nil, err
	}
	p.events.emit(Event{Kind: ProgramStarted, Program: name, Pid: process.Pid()})
	return process, nil
}

// ended reports a program's end.
func (p *party) ended(name string, process *proc.Process) {
	p.events.emit(Event{Kind: ProgramEnded, Program: name, Pid: process.Pid(), Exit: process.Exit(), Tail: plainLines(process.Tail(20))})
}

// died is the problem of a program that ended when it should not have.
func died(name, log string, process *proc.Process) *problem.Error {
	exit := process.Exit()
	code, next := problem.ProgramFailed, "see the end of "+log
	switch {
	case exit.OOM:
		code, next = problem.OutOfMemory, moreMemory(log)
	case fromOutside(exit):
		next = killedNext(log)
	}
	e := problem.New(code, next, "%s ended unexpectedly (%s)%s", name, exit, lastWords(process.Tail(20)))
	e.Log = log
	return e
}

// fromOutside tells whether a signal that a program does not raise by itself has ended it. Of the others (SIGSEGV, SIGABRT
// and so on) its own code is the cause.
func fromOutside(exit proc.Exit) bool {
	switch exit.Signal {
	case syscall.SIGKILL, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT:
		return true
	}
	return false
}

func killedNext(log string) string {
	return "find out who ended it (dmesg tells of kills by the kernel); its last lines are in " + log
}

func moreMemory(log string) string {
	return "give the machine more memory, or the app less work at a time; its last lines are in " + log
}

// lastWords quotes the last lines that say something, for a message of one sentence.
func lastWords(tail []string) string {
	var words []string
	for _, line := range slices.Backward(plainLines(tail)) {
		line = strings.TrimSpace(line)
		if line == "" {
			continue
		}
		words = append(words, line[:min(len(line), 300)])
		if len(words) == 3 {
			break
		}
	}
	if len(words) == 0 {
		return "; it printed nothing"
	}
	slices.Reverse(words)
	return "; it last said: " + strings.ToValidUTF8(strings.Join(words, " | "), "")
}

func plainLines(lines []string) []string {
	out := make([]string, len(lines))
	for i, l := range lines {
		out[i] = plain(l)
	}
	return out
}

// ctxError gives why ctx ended.
func ctxError(ctx context.Context, doing string) error {
	return fmt.Errorf("%s: %w", doing, context.Cause(ctx))
}
