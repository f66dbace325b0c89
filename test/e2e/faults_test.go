package e2e

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	_ "modernc.org/sqlite" // the store's own, to be in its way

	"github.com/pergolafl/pergola/internal/api"
	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/config"
	"github.com/pergolafl/pergola/internal/hub"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/logs"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/runner"
)

// With -faults the whole table runs; otherwise only its rows that are marked fast.
var (
	allFaults  = flag.Bool("faults", false, "run every row of the table of faults")
	longFaults = flag.Bool("long-faults", false, "run the rows of the table of faults that take long, too")
	writeDocs  = flag.Bool("write-docs", false, "write the table of faults into docs/faults.md")
)

// A fault is a row of the table: what happens to a job of a hub and two sites that run for years, and how the job has to end.
// What holds for every row is checked by victim.end: the end comes in time, and nothing is left of the job anywhere.
type fault struct {
	name   string // a sentence
	app    string // "" = slow
	flwr   string // "" = oldFlwr
	spec   job.Spec
	exit   string // program:what, of a program that does something by itself; see testdata/fault
	begins bool   // it does so when it begins
	act    func(v *victim)

	state job.State // "" = failed
	code  problem.Code
	party string
	says  []string      // in the cause's message
	warns []string      // in some warning
	limit time.Duration // from the event to the end; 0 = endLimit
	sites []string      // those that run from the start; nil = both

	soak bool                           // it takes a quarter of an hour and more, and is there with -long-faults only
	fast bool                           // it is in every run of the tests
	own  bool                           // its hub and sites serve no other row: they are hurt themselves
	prep func(t *testing.T, f *fleetOf) // before they start
	more func(v *victim)
}

var bothSites = []string{"site-1", "site-2"}

// Settings of jobs.
var (
	long     = job.Spec{RunConfig: []string{"sleep=90"}} // surely in its first round when something happens to it
	short    = job.Spec{RunConfig: []string{"sleep=4"}}  // ends by itself, with the numbers of two rounds
	watchful = job.Spec{RunConfig: []string{"sleep=90"}, NoProgress: job.Duration(20 * time.Second)}
	nervous  = job.Spec{RunConfig: []string{"sleep=90"}, OutageTolerance: job.Duration(15 * time.Second)}
	busy     = job.Spec{RunConfig: []string{"sleep=2", "num-server-rounds=40"}} // writes all the time
	timed    = job.Spec{RunConfig: []string{"sleep=15"}, Deadline: job.Duration(10 * time.Minute), StartTimeout: job.Duration(5 * time.Minute)}
	patient  = job.Spec{RunConfig: []string{"sleep=15"}} // ends by itself after an outage in its first round
)

const (
	linkProgram = "flower-superlink"
	appProgram  = "flower-server-app"
	nodeProgram = "flower-supernode"

	// The processes in which newer versions run apps, and the program that starts them.
	newAppProgram    = "flwr-serverapp"
	newClientProgram = "flwr-clientapp"
	execProgram      = "flower-superexec"

	// The native engine's, by the last word of their command lines.
	serverProcess = "server"
	workerProcess = "client"
)

// native gives the same settings for the native engine.
func native(s job.Spec, isolation string) job.Spec {
	s.Engine, s.Isolation = job.EngineNative, isolation
	return s
}

var faults = []fault{
	// Flower's programs, each killed, stopped, hanging, and ending by itself.
	{
		name: "the superlink is killed", spec: long, act: struck(job.HubParty, linkProgram, syscall.SIGKILL),
		code: problem.ProgramFailed, party: "hub", says: []string{linkProgram, "killed"}, fast: true,
	},
	{
		name: "the superlink is stopped", spec: long, act: struck(job.HubParty, linkProgram, syscall.SIGSTOP),
		code: problem.ProgramFailed, party: "hub", says: []string{linkProgram}, warns: []string{"SIGSTOP"},
	},
	{
		name: "the superlink hangs", spec: watchful, exit: linkProgram + ":hang", act: triggered,
		code: problem.NoProgress, says: []string{"20s"}, limit: 80 * time.Second,
	},
	{
		name: "the superlink exits with 0", spec: long, exit: linkProgram + ":0", act: triggered,
		code: problem.ProgramFailed, party: "hub", says: []string{linkProgram, "unexpectedly"}, fast: true,
	},
	{
		name: "the superlink exits with 3", spec: long, exit: linkProgram + ":3", act: triggered,
		code: problem.ProgramFailed, party: "hub", says: []string{linkProgram, "exit code 3"},
	},
	{
		name: "the server app is killed", spec: long, act: struck(job.HubParty, appProgram, syscall.SIGKILL),
		code: problem.ProgramFailed, party: "hub", says: []string{"server app", "killed"},
	},
	{
		name: "the server app is stopped", spec: long, act: struck(job.HubParty, appProgram, syscall.SIGSTOP),
		code: problem.ProgramFailed, party: "hub", says: []string{"server app"}, warns: []string{"SIGSTOP"},
	},
	{
		name: "the server app hangs", spec: watchful, exit: appProgram + ":hang", act: triggered,
		code: problem.NoProgress, says: []string{"20s"}, limit: 80 * time.Second,
	},
	{
		// As in the reference system: the server app says when the run is over.
		name: "the server app exits with 0", spec: long, exit: appProgram + ":0", act: triggered, state: job.Succeeded,
	},
	{
		name: "the server app exits with 3", spec: long, exit: appProgram + ":3", act: triggered,
		code: problem.AppError, party: "hub", says: []string{"exit code 3"},
	},
	{
		name: "a supernode is killed", spec: long, act: struck("site-1", nodeProgram, syscall.SIGKILL),
		code: problem.ProgramFailed, party: "site-1", says: []string{nodeProgram, "killed"},
	},
	{
		name: "a supernode is stopped", spec: long, act: struck("site-1", nodeProgram, syscall.SIGSTOP),
		code: problem.ProgramFailed, party: "site-1", says: []string{nodeProgram}, warns: []string{"SIGSTOP"}, fast: true,
	},
	{
		name: "a supernode is stopped for a while and goes on", spec: patient, act: func(v *victim) {
			v.round(1)
			pid := v.process("site-1", nodeProgram)
			v.signal(pid, syscall.SIGSTOP)
			time.Sleep(10 * time.Second) // that is the fault
			v.signal(pid, syscall.SIGCONT)
		}, state: job.Succeeded, limit: 2 * time.Minute, more: sameNumbers,
	},
	{
		name: "a supernode hangs", spec: watchful, exit: nodeProgram + ":hang", act: triggered,
		code: problem.NoProgress, says: []string{"20s"}, limit: 80 * time.Second,
	},
	{
		name: "a supernode exits with 0", spec: long, exit: nodeProgram + ":0", act: triggered,
		code: problem.ProgramFailed, party: "site-1", says: []string{"by itself"},
	},
	{
		name: "a supernode exits with 3", spec: long, exit: nodeProgram + ":3", act: triggered,
		code: problem.ProgramFailed, party: "site-1", says: []string{nodeProgram, "exit code 3"},
	},

	// The same where each app runs in a process of its own.
	{
		name: "the superlink is stopped, newest flwr", flwr: newFlwr, spec: long, act: struck(job.HubParty, linkProgram, syscall.SIGSTOP),
		code: problem.ProgramFailed, party: "hub", says: []string{linkProgram}, warns: []string{"SIGSTOP"},
	},
	{
		name: "the superlink hangs, newest flwr", flwr: newFlwr, spec: watchful, exit: linkProgram + ":hang", act: triggered,
		code: problem.NoProgress, says: []string{"20s"}, limit: 80 * time.Second,
	},
	{
		name: "the server app's process is killed", flwr: newFlwr, spec: long, act: struck(job.HubParty, newAppProgram, syscall.SIGKILL),
		code: problem.ProgramFailed, party: "hub", says: []string{"without a result"},
	},
	{
		name: "the server app's process is stopped", flwr: newFlwr, spec: long, act: struck(job.HubParty, newAppProgram, syscall.SIGSTOP),
		code: problem.ProgramFailed, party: "hub", says: []string{"without a result"}, warns: []string{"SIGSTOP"},
	},
	{
		name: "the server app's process hangs", flwr: newFlwr, spec: watchful, exit: newAppProgram + ":hang", act: triggered,
		code: problem.NoProgress, says: []string{"20s"}, limit: 80 * time.Second,
	},
	{
		name: "the server app's process exits with 0", flwr: newFlwr, spec: long, exit: newAppProgram + ":0", act: triggered,
		code: problem.ProgramFailed, party: "hub", says: []string{"without a result"},
	},
	{
		name: "the server app's process exits with 3", flwr: newFlwr, spec: long, exit: newAppProgram + ":3", act: triggered,
		code: problem.ProgramFailed, party: "hub", says: []string{"without a result"},
	},
	{
		// The strategy goes on with the other site, as FedAvg does.
		name: "a client app's process is killed", flwr: newFlwr, spec: short, act: struck("site-1", newClientProgram, syscall.SIGKILL),
		state: job.Succeeded, limit: 2 * time.Minute,
	},
	{
		name: "a client app's process is stopped", flwr: newFlwr, spec: short, act: struck("site-1", newClientProgram, syscall.SIGSTOP),
		state: job.Succeeded, limit: 3 * time.Minute, warns: []string{"SIGSTOP"},
	},
	{
		name: "a client app's process hangs", flwr: newFlwr, spec: watchful, exit: newClientProgram + ":hang", act: triggered,
		code: problem.NoProgress, says: []string{"20s"}, limit: 80 * time.Second,
	},
	{
		name: "a client app's process exits with 0", flwr: newFlwr, spec: short, exit: newClientProgram + ":0", act: triggered,
		state: job.Succeeded, limit: 2 * time.Minute,
	},
	{
		name: "a client app's process exits with 3", flwr: newFlwr, spec: short, exit: newClientProgram + ":3", act: triggered,
		state: job.Succeeded, limit: 2 * time.Minute,
	},
	{
		name: "a supernode's starter of apps is killed", flwr: newFlwr, spec: long, act: struck("site-1", execProgram, syscall.SIGKILL),
		code: problem.ProgramFailed, party: "site-1", says: []string{execProgram},
	},

	// The native engine's processes.
	{
		name: "a worker is killed", spec: native(short, "warm"), act: struckAtWork("site-1", workerProcess, syscall.SIGKILL),
		state: job.Succeeded, warns: []string{"a worker of site-1 is gone (ended by signal 9", "while it had a message"}, fast: true,
	},
	{
		name: "a worker is killed while it forks for each message", flwr: newFlwr, spec: native(short, "fork"), act: struckAtWork("site-1", workerProcess, syscall.SIGKILL),
		state: job.Succeeded,
	},
	{
		name: "a worker that serves one message is killed", flwr: newFlwr, spec: native(short, "process"), act: struckAtWork("site-1", workerProcess, syscall.SIGKILL),
		state: job.Succeeded,
	},
	{
		name: "a worker is stopped", spec: native(short, "warm"), act: struckAtWork("site-1", workerProcess, syscall.SIGSTOP),
		state: job.Succeeded, warns: []string{"SIGSTOP", "a worker of site-1 is gone"}, limit: 2 * time.Minute,
	},
	{
		name: "a worker hangs", spec: native(watchful, "warm"), exit: workerProcess + ":hang", act: triggered,
		code: problem.NoProgress, says: []string{"20s"}, limit: 80 * time.Second,
	},
	{
		name: "a worker exits with 0", spec: native(short, "warm"), exit: workerProcess + ":0", act: triggered,
		state: job.Succeeded, warns: []string{"a worker of site-1 is gone (exit code 0)"},
	},
	{
		name: "a worker exits with 3", spec: native(short, "warm"), exit: workerProcess + ":3", act: triggered,
		state: job.Succeeded, warns: []string{"a worker of site-1 is gone (exit code 3)"},
	},
	{
		name: "a worker answers garbage", spec: native(short, "warm"), exit: workerProcess + ":garbage", act: triggered,
		state: job.Succeeded, warns: []string{"a worker of site-1 is gone (the other end does not speak"}, fast: true,
	},
	{
		name: "a worker exits with 3 at its start", spec: native(short, "warm"), exit: workerProcess + ":3", begins: true,
		state: job.Succeeded, warns: []string{"a worker of site-1 is gone (exit code 3)"}, more: sameNumbers,
	},
	{
		name: "the ServerApp's process is killed, native engine", spec: native(long, "auto"), act: struck(job.HubParty, serverProcess, syscall.SIGKILL),
		code: problem.ProgramFailed, party: "hub", says: []string{"server app", "killed"}, fast: true,
	},
	{
		name: "the ServerApp's process is stopped, native engine", spec: native(long, "auto"), act: struck(job.HubParty, serverProcess, syscall.SIGSTOP),
		code: problem.ProgramFailed, party: "hub", says: []string{"server app"}, warns: []string{"SIGSTOP"},
	},
	{
		name: "the ServerApp's process hangs, native engine", spec: native(watchful, "auto"), exit: serverProcess + ":hang", act: triggered,
		code: problem.NoProgress, says: []string{"20s"}, limit: 80 * time.Second,
	},
	{
		name: "the ServerApp's process exits with 0, native engine", spec: native(long, "auto"), exit: serverProcess + ":0", act: triggered,
		code: problem.AppError, party: "hub", says: []string{"by itself"},
	},
	{
		name: "the ServerApp's process exits with 3, native engine", spec: native(long, "auto"), exit: serverProcess + ":3", act: triggered,
		code: problem.AppError, party: "hub", says: []string{"exit code 3"},
	},
	{
		name: "the hub's runner is killed, native engine", spec: native(long, "auto"), act: runnerOf(job.HubParty, syscall.SIGKILL),
		code: problem.HubRunnerDied, party: "hub",
	},
	{
		name: "a site's runner is killed, native engine", spec: native(long, "auto"), act: runnerOf("site-2", syscall.SIGKILL),
		code: problem.SiteRunnerDied, party: "site-2",
	},

	// Programs that never get so far.
	{
		name: "the superlink hangs at its start", spec: job.Spec{Server: job.Server{ReadyTimeout: job.Duration(10 * time.Second)}}, exit: linkProgram + ":hang", begins: true,
		code: problem.StartTimeout, party: "hub", says: []string{"10s"},
	},
	{
		name: "the superlink exits with 0 at its start", spec: long, exit: linkProgram + ":0", begins: true,
		code: problem.ProgramFailed, party: "hub", says: []string{linkProgram},
	},
	{
		name: "a supernode hangs at its start", spec: job.Spec{Server: job.Server{ReadyTimeout: job.Duration(10 * time.Second)}}, exit: nodeProgram + ":hang", begins: true,
		code: problem.StartTimeout, party: "hub", says: []string{"2 supernodes"},
	},
	{
		name: "a supernode exits with 3 at its start", spec: long, exit: nodeProgram + ":3", begins: true,
		code: problem.ProgramFailed, party: "site-1", says: []string{nodeProgram, "exit code 3"},
	},
	{
		name: "the server app hangs at its start", spec: watchful, exit: appProgram + ":hang", begins: true,
		code: problem.NoProgress, says: []string{"20s"}, limit: 80 * time.Second,
	},

	// The runners.
	{
		name: "the hub's runner is killed", spec: long, act: runnerOf(job.HubParty, syscall.SIGKILL),
		code: problem.HubRunnerDied, party: "hub", fast: true,
	},
	{
		name: "the hub's runner hangs", spec: long, act: runnerOf(job.HubParty, syscall.SIGSTOP),
		code: problem.HubRunnerDied, party: "hub", says: []string{"SIGSTOP"},
	},
	{
		name: "the hub's runner is told to end", spec: long, act: runnerOf(job.HubParty, syscall.SIGTERM),
		code: problem.HubRunnerDied, party: "hub", says: []string{"from outside"},
	},
	{
		name: "the hub's runner crashes", spec: long, act: runnerOf(job.HubParty, syscall.SIGQUIT), // Go's programs exit with 2
		code: problem.HubRunnerDied, party: "hub",
	},
	{
		name: "a site's runner is killed", spec: long, act: runnerOf("site-2", syscall.SIGKILL),
		code: problem.SiteRunnerDied, party: "site-2",
	},
	{
		name: "a site's runner hangs", spec: long, act: runnerOf("site-2", syscall.SIGSTOP),
		code: problem.SiteRunnerDied, party: "site-2", says: []string{"SIGSTOP"}, fast: true,
	},
	{
		name: "a site's runner is told to end", spec: long, act: runnerOf("site-2", syscall.SIGTERM),
		code: problem.SiteRunnerDied, party: "site-2", says: []string{"from outside"},
	},
	{
		name: "a site's runner crashes", spec: long, act: runnerOf("site-2", syscall.SIGQUIT),
		code: problem.SiteRunnerDied, party: "site-2",
	},

	// The hub and an agent: they are started again, and the job goes on.
	{
		name: "the hub is killed and started again", spec: patient, act: again((*victim).hub, syscall.SIGKILL), own: true,
		state: job.Succeeded, limit: 2 * time.Minute, more: sameNumbers,
	},
	{
		name: "the hub is stopped for a while", spec: patient, act: paused((*victim).hub), own: true,
		state: job.Succeeded, limit: 2 * time.Minute, more: sameNumbers,
	},
	{
		name: "the hub ends in order and is started again", spec: patient, act: again((*victim).hub, syscall.SIGTERM), own: true,
		state: job.Succeeded, limit: 2 * time.Minute, more: sameNumbers,
	},
	{
		name: "the hub crashes and is started again", spec: patient, act: again((*victim).hub, syscall.SIGQUIT), own: true,
		state: job.Succeeded, limit: 2 * time.Minute, more: sameNumbers,
	},
	{
		name: "an agent is killed and started again", spec: patient, act: again((*victim).agent, syscall.SIGKILL), own: true,
		state: job.Succeeded, limit: 2 * time.Minute, more: sameNumbers,
	},
	{
		name: "an agent is stopped for a while", spec: patient, act: paused((*victim).agent), own: true,
		state: job.Succeeded, limit: 2 * time.Minute, more: sameNumbers,
	},
	{
		name: "an agent ends in order and is started again", spec: patient, act: again((*victim).agent, syscall.SIGTERM), own: true,
		state: job.Succeeded, limit: 2 * time.Minute, more: sameNumbers,
	},
	{
		name: "an agent crashes and is started again", spec: patient, act: again((*victim).agent, syscall.SIGQUIT), own: true,
		state: job.Succeeded, limit: 2 * time.Minute, more: sameNumbers,
	},
	{
		name: "an agent hangs for ever", spec: nervous, own: true, act: func(v *victim) {
			v.round(1)
			v.signal(v.agent().cmd.Process.Pid, syscall.SIGSTOP)
		}, code: problem.SiteLost, party: "site-1", says: []string{"15s"},
		more: func(v *victim) { v.signal(v.agent().cmd.Process.Pid, syscall.SIGCONT) }, // and takes away what it has left
	},
	{
		name: "an agent is killed and its job ends before it is started again", spec: nervous, own: true, act: func(v *victim) {
			v.round(1)
			v.strike()
			v.agent().kill()
		}, code: problem.SiteLost, party: "site-1", more: func(v *victim) { v.agent().start() },
	},

	{
		name: "the hub comes back at another address", spec: patient, own: true, act: func(v *victim) {
			v.round(1)
			v.strike()
			v.f.hub.kill()
			var conf hub.Config
			path := filepath.Join(v.f.hub.dir, hub.ConfigFile)
			if err := config.Read(path, &conf); err != nil {
				v.Fatal(err)
			}
			conf.Listen = v.f.addrs[1]
			if err := config.Write(path, conf); err != nil {
				v.Fatal(err)
			}
			v.f.hub.start()
		}, state: job.Succeeded, limit: 2 * time.Minute, more: sameNumbers,
	},
	{
		name: "hub and agents are replaced by a newer binary at the same place", spec: patient, own: true, prep: ownBinary, act: func(v *victim) {
			v.round(1)
			v.strike()
			newer(v.T, v.f.hub.exe)
			for _, d := range append(slices.Clone(v.f.sites), v.f.hub) {
				d.kill()
			}
			v.f.start()
		}, state: job.Succeeded, limit: 2 * time.Minute, more: func(v *victim) {
			sameNumbers(v)
			v.another("")
		},
	},
	{
		name: "the hub's disk is full", spec: busy, own: true, prep: smallDiskOf(func(f *fleetOf) *daemon { return f.hub }), act: func(v *victim) { v.fillDisk(v.f.hub) },
		code: problem.DiskFull, party: "hub", says: []string{"no space"}, more: func(v *victim) { v.another("full") },
	},
	{
		name: "a site's disk is full", spec: busy, own: true, prep: smallDiskOf(func(f *fleetOf) *daemon { return f.sites[0] }), act: func(v *victim) { v.fillDisk(v.f.sites[0]) },
		code: problem.DiskFull, party: "site-1", says: []string{"no space"}, more: func(v *victim) { v.another("full") },
	},
	{
		name: "the store takes nothing for a minute", spec: patient, own: true, act: func(v *victim) {
			v.round(1)
			v.strike()
			v.lockStore(time.Minute)
		}, state: job.Succeeded, limit: 3 * time.Minute, more: sameNumbers,
	},

	{
		name: "the hub's clock is set a day ahead, and it is started again", spec: timed, own: true, prep: clockOfItsOwn, act: setClock("24h"),
		state: job.Succeeded, limit: 2 * time.Minute, more: sameNumbers,
	},
	{
		name: "the hub's clock is set a day back, and it is started again", spec: timed, own: true, prep: clockOfItsOwn, act: setClock("-24h"),
		state: job.Succeeded, limit: 2 * time.Minute, more: sameNumbers,
	},
	{
		name: "the hub is killed and started again while the parties prepare", spec: short, own: true, act: func(v *victim) {
			v.wait("a party preparing", func(e job.Event) bool { return e.Kind == job.KindPartyState })
			v.strike()
			v.f.hub.kill()
			v.f.hub.start()
		}, state: job.Succeeded, limit: 2 * time.Minute, more: sameNumbers,
	},
	{
		name: "an agent is killed and started again while its party prepares", spec: short, own: true, act: func(v *victim) {
			v.wait("site-1 preparing", func(e job.Event) bool { return e.Kind == job.KindPartyState && e.Party == "site-1" })
			v.strike()
			v.agent().kill()
			v.agent().start()
		}, state: job.Succeeded, limit: 2 * time.Minute, more: sameNumbers,
	},

	// Whole machines.
	{
		name: "a site leaves for ever", spec: nervous, own: true, act: func(v *victim) {
			v.round(1)
			v.strike()
			v.agent().kill()
			v.killParty("site-1")
		}, code: problem.SiteLost, party: "site-1", more: func(v *victim) { v.agent().start() }, // its disk is still there
	},
	{
		name: "a site joins late", spec: short, own: true, sites: []string{"site-1"}, act: func(v *victim) {
			v.reason("site-2")
			v.strike()
			v.f.sites[1].start()
		}, state: job.Succeeded, limit: 2 * time.Minute, more: sameNumbers,
	},
	{
		name: "the power fails everywhere", spec: long, own: true, fast: true, act: func(v *victim) {
			v.round(1)
			v.strike()
			v.powerCut()
		}, code: problem.HubRunnerDied, party: "hub",
	},

	{
		name: "the power fails everywhere, in a job that may begin anew", flwr: "1.30.0", spec: job.Spec{RunConfig: []string{"sleep=4"}, Server: job.Server{Restarts: 1, Database: "state.db"}}, own: true, act: func(v *victim) {
			v.round(1)
			v.strike()
			v.powerCut()
		}, state: job.Succeeded, limit: 2 * time.Minute, warns: []string{"attempt 2 of 2"}, more: sameNumbers,
	},

	// Ends that are asked for.
	{
		name: "the hub is killed while the job is stopping", app: "faulty", spec: job.Spec{RunConfig: []string{`fault="ignore-term"`}}, own: true, fast: true, act: func(v *victim) {
			v.round(1)
			v.said("site-1", "ignores SIGTERM")
			v.abort()
			v.f.hub.kill()
			v.f.hub.start()
		}, state: job.Aborted, code: problem.AbortedByUser, more: (*victim).everyPartySpoke,
	},
	{
		name: "an agent is killed while the job is stopping", app: "faulty", spec: job.Spec{RunConfig: []string{`fault="ignore-term"`}}, own: true, act: func(v *victim) {
			v.round(1)
			v.said("site-1", "ignores SIGTERM")
			v.abort()
			v.agent().kill()
			v.agent().start()
		}, state: job.Aborted, code: problem.AbortedByUser,
	},
	{
		name: "the app ignores SIGTERM and leaves its process group", app: "faulty", spec: job.Spec{RunConfig: []string{`fault="ignore-term"`}}, act: func(v *victim) {
			v.round(1)
			v.said("site-1", "ignores SIGTERM")
			v.abort()
		}, state: job.Aborted, code: problem.AbortedByUser, fast: true,
	},

	// Logs and reports.
	{
		name: "a client app prints 10 GB, of which 1 GiB is kept", app: "faulty", soak: true, spec: job.Spec{RunConfig: []string{`fault="mebibytes"`, "mebibytes=10240"}}, act: func(v *victim) {
			v.round(1)
			v.strike()
			v.logsStayWithin(int64(job.DefaultLogQuota))
		}, state: job.Succeeded, limit: time.Hour, warns: []string{"have reached their quota", "are left out between"}, more: keptOf(10240<<20, int64(job.DefaultLogQuota)),
	},
	{
		name: "a client app prints 32 MB, of which 2 MiB are kept", app: "faulty", fast: true, spec: job.Spec{RunConfig: []string{`fault="mebibytes"`, "mebibytes=32"}, LogQuota: 2 << 20}, act: func(v *victim) {
			v.round(1)
			v.strike()
			v.logsStayWithin(2 << 20)
		}, state: job.Succeeded, limit: 2 * time.Minute, warns: []string{"have reached their quota of 2.0 MiB", "are left out between"}, more: keptOf(32<<20, 2<<20),
	},
	{
		name: "a client app prints 100,000 lines a second", app: "faulty", spec: job.Spec{RunConfig: []string{`fault="lines"`, "rate=100000", "seconds=10"}}, act: func(v *victim) {
			v.round(1)
			v.strike()
		}, state: job.Succeeded, limit: 3 * time.Minute, more: allLines(1_000_000),
	},
	{
		name: "a party reports everything twice", spec: short, fast: true, act: func(v *victim) {
			v.round(1)
			v.strike()
			v.replay("site-1")
		}, state: job.Succeeded, more: onceEach,
	},
}

// TestFaults runs the table. Rows whose fault concerns their job alone share a hub and its sites, so that each shows as well
// that the others are not disturbed.
func TestFaults(t *testing.T) {
	t.Parallel()
	shared := sync.OnceValue(func() *fleetOf {
		f := daemons(t, bothSites...)
		f.start()
		t.Cleanup(func() { f.nothingLeft(t) })
		return f
	})
	shared() // before the rows run, on this test's own goroutine
	for _, c := range faults {
		t.Run(c.name, func(t *testing.T) {
			if c.soak && !*longFaults || !c.fast && !*allFaults {
				t.Skip("a row of the whole table: run with -faults, or -faults -long-faults (make soak)")
			}
			t.Parallel()
			idle <- struct{}{}
			defer func() { <-idle }()
			f := shared()
			if c.own {
				f = daemons(t, bothSites...)
				if c.prep != nil {
					c.prep(t, f)
				}
				f.hub.start()
				for i, s := range f.sites {
					if c.sites == nil || slices.Contains(c.sites, bothSites[i]) {
						s.start()
					}
				}
			}
			newVictim(t, f, c).run()
		})
	}
}

// The table in docs/faults.md is the table of this test.
func TestFaultsAreDocumented(t *testing.T) {
	const begin, end = "<!-- table: written by go test ./test/e2e -run TestFaultsAreDocumented -write-docs -->\n", "<!-- end of the table -->\n"
	path := "../../docs/faults.md"
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	head, rest, ok := strings.Cut(string(b), begin)
	_, tail, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s has no place for the table", path)
	}
	var w strings.Builder
	w.WriteString("\n| what happens | the job | cause | party | at most after |\n|---|---|---|---|---|\n")
	names := map[string]bool{}
	for _, c := range faults {
		if names[c.name] {
			t.Errorf("two rows are called %q", c.name)
		}
		names[c.name] = true
		state, code, limit := c.state, "", c.limit
		if state == "" {
			state = job.Failed
		}
		if c.code != "" {
			code = fmt.Sprintf("[%s](causes.md#%[1]s)", c.code)
		}
		if limit == 0 {
			limit = endLimit
		}
		setting := ""
		switch {
		case c.spec.NoProgress > 0:
			setting = fmt.Sprintf(", with no-progress %s", c.spec.NoProgress)
		case c.spec.OutageTolerance > 0:
			setting = fmt.Sprintf(", with outage-tolerance %s", c.spec.OutageTolerance)
		case c.spec.Server.ReadyTimeout > 0:
			setting = fmt.Sprintf(", with ready-timeout %s", c.spec.Server.ReadyTimeout)
		}
		fmt.Fprintf(&w, "| %s%s | %s | %s | %s | %.0f s |\n", c.name, setting, state, code, c.party, limit.Seconds())
	}
	w.WriteString("\n")
	want := head + begin + w.String() + end + tail
	if want == string(b) {
		return
	}
	if !*writeDocs {
		t.Fatalf("%s is not what the table says: run go test ./test/e2e -run TestFaultsAreDocumented -write-docs", path)
	}
	if err := os.WriteFile(path, []byte(want), 0o600); err != nil {
		t.Fatal(err)
	}
}

func (f *fleetOf) start() {
	f.hub.start()
	for _, s := range f.sites {
		s.start()
	}
}

// victim is a row's job.
type victim struct {
	*testing.T
	f       *fleetOf
	c       fault
	id      job.ID
	trigger string // the file that has a program do what fault.exit says
	struck  time.Time

	mu     sync.Mutex // guards the rest
	events []job.Event
	more   chan struct{} // closed and replaced with each event
	over   *job.Event    // the job's last move
	at     time.Time     // when it came
	took   time.Duration // from the event
	seen   map[string]string
}

func newVictim(t *testing.T, f *fleetOf, c fault) *victim {
	t.Helper()
	v := &victim{T: t, f: f, c: c, more: make(chan struct{}), seen: map[string]string{}, trigger: filepath.Join(t.TempDir(), "now")}
	s := c.spec
	s.Sites, s.Flwr = bothSites, c.flwr
	if s.Flwr == "" {
		s.Flwr = oldFlwr
	}
	if program, what, ok := strings.Cut(c.exit, ":"); ok {
		dir, err := filepath.Abs("testdata/fault")
		if err != nil {
			t.Fatal(err)
		}
		env := map[string]string{"PYTHONPATH": dir, "FAULT_OF": program, "FAULT": what, "FAULT_WHEN": v.trigger}
		if slices.Contains([]string{linkProgram, appProgram, newAppProgram, serverProcess}, program) {
			s.Server.Env = env
		} else {
			s.Site.Named = map[string]job.Site{"site-1": {Env: env}}
		}
	}
	app := c.app
	if app == "" {
		app = "slow"
	}
	if c.begins { // with the program
		if err := os.WriteFile(v.trigger, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		v.strike()
	}
	v.id = f.submit(t, app, s)
	go v.follow(t.Context())
	return v
}

// follow takes in the job's events, whatever becomes of the hub meanwhile, until the last one or the test's end.
func (v *victim) follow(ctx context.Context) {
	var after int64
	for ctx.Err() == nil {
		s, err := v.f.client.Jobs.WatchJob(ctx, &pb.WatchJobRequest{Id: string(v.id), After: after})
		for err == nil {
			var m *pb.WatchJobResponse
			if m, err = s.Receive(); err != nil {
				break
			}
			e, convert := api.FromEvent(m.GetEvent())
			if convert != nil {
				v.Error(convert)
				return
			}
			after = e.Seq
			var to job.JobState
			last := e.Kind == job.KindJobState && e.Decode(&to) == nil && to.To.Terminal()
			v.mu.Lock()
			v.events = append(v.events, e)
			if last {
				v.over, v.at = &e, time.Now()
			}
			close(v.more)
			v.more = make(chan struct{})
			v.mu.Unlock()
			if last {
				_ = s.Close() // nothing comes after it
				return
			}
		}
		select {
		case <-time.After(100 * time.Millisecond): // the hub is away
		case <-ctx.Done():
		}
	}
}

// wait gives the first event for which ok is true.
func (v *victim) wait(what string, ok func(job.Event) bool) job.Event {
	v.Helper()
	late := time.After(limit)
	for n := 0; ; {
		v.mu.Lock()
		es, more, over := v.events, v.more, v.over
		v.mu.Unlock()
		for ; n < len(es); n++ {
			if ok(es[n]) {
				return es[n]
			}
		}
		if over != nil {
			v.Fatalf("the job was over before there was: %s\n%s", what, v.tail())
		}
		select {
		case <-more:
		case <-late:
			v.Fatalf("there never was: %s\n%s", what, v.tail())
		}
	}
}

func (v *victim) tail() string {
	v.mu.Lock()
	defer v.mu.Unlock()
	var b strings.Builder
	for _, e := range v.events[max(0, len(v.events)-25):] {
		fmt.Fprintf(&b, "%s %s %s %.400s\n", e.At.Format("15:04:05.000"), e.Kind, e.Party, e.Body)
	}
	return b.String()
}

func (v *victim) round(n int) {
	v.Helper()
	v.wait(fmt.Sprintf("round %d", n), func(e job.Event) bool {
		var r job.Round
		return e.Kind == job.KindRound && e.Decode(&r) == nil && r.Round == n
	})
	v.look()
}

// said waits until a party's client app has printed something.
func (v *victim) said(site, text string) {
	v.Helper()
	path := filepath.Join(v.f.hub.dir, "jobs", string(v.id), "logs", site, "client_app_log.txt")
	v.until(text+" in "+path, time.Minute, func() bool {
		b, err := os.ReadFile(path)
		return err == nil && bytes.Contains(b, []byte(text))
	})
}

// reason waits until the job waits for something.
func (v *victim) reason(text string) {
	v.Helper()
	v.until("the reason "+text, time.Minute, func() bool { return strings.Contains(v.job().GetReason(), text) })
}

// until waits for what gives no sign.
func (v *victim) until(what string, patience time.Duration, ok func() bool) {
	v.Helper()
	for deadline := time.Now().Add(patience); !ok(); {
		if time.Now().After(deadline) {
			v.Fatalf("there never was: %s\n%s", what, v.tail())
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func (v *victim) job() *pb.Job {
	v.Helper()
	res, err := v.f.client.Jobs.GetJob(v.Context(), &pb.GetJobRequest{Id: string(v.id)})
	if err != nil {
		v.Fatal(err)
	}
	return res.GetJob()
}

func (v *victim) strike() { v.struck = time.Now() }

func (v *victim) signal(pid int, s syscall.Signal) {
	v.Helper()
	v.strike()
	if err := syscall.Kill(pid, s); err != nil {
		v.Fatalf("signal %s to %d: %v", s, pid, err)
	}
}

func (v *victim) hub() *daemon   { return v.f.hub }
func (v *victim) agent() *daemon { return v.f.sites[0] }

func (v *victim) dirOf(party string) string {
	if party == job.HubParty {
		return v.f.hub.dir
	}
	return v.f.sites[slices.Index(bothSites, party)].dir // as its processes know it
}

// partyDir is the party's directory as the test sees it.
func (v *victim) partyDir(party string) string {
	d := v.f.hub
	if party != job.HubParty {
		d = v.f.sites[slices.Index(bothSites, party)]
	}
	return d.sees(filepath.Join(d.dir, "jobs", string(v.id), "party"))
}

// processes gives those of the job at a party ("" = all), its runner among them.
func (v *victim) processes(party string) []process {
	es, err := os.ReadDir("/proc")
	if err != nil {
		v.Fatal(err)
	}
	mark := fmt.Sprintf("PERGOLA_MARK=%s-%s-%s", v.f.mark, v.id, party)
	dir := filepath.Join("jobs", string(v.id))
	if party != "" {
		dir = filepath.Join(v.dirOf(party), dir)
	}
	var out []process
	for _, e := range es {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		// Errors: it has gone meanwhile, or belongs to somebody else.
		env, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "environ"))
		line, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		ours := bytes.Contains(line, []byte(dir))
		for kv := range bytes.SplitSeq(env, []byte{0}) {
			ours = ours || string(kv) == mark || party == "" && strings.HasPrefix(string(kv), mark)
		}
		if ours {
			out = append(out, process{pid, strings.Split(strings.TrimRight(string(line), "\x00"), "\x00")})
		}
	}
	return out
}

// process gives the pid of a program at a party, named by its file.
func (v *victim) process(party, name string) int {
	v.Helper()
	var pid int
	v.until(name+" of "+party, time.Minute, func() bool {
		for _, p := range v.processes(party) {
			if slices.ContainsFunc(p.args[:min(3, len(p.args))], func(a string) bool { return filepath.Base(a) == name }) {
				pid = p.pid
				return true
			}
		}
		return false
	})
	return pid
}

// struck sends a signal to a program in the first round.
func struck(party, name string, s syscall.Signal) func(*victim) {
	return func(v *victim) {
		v.round(1)
		v.signal(v.process(party, name), s)
	}
}

// struckAtWork signals a process of a site when that has a message.
func struckAtWork(site, name string, s syscall.Signal) func(*victim) {
	return func(v *victim) {
		v.round(1)
		v.said(site, "a fit begins")
		v.signal(v.process(site, name), s)
	}
}

// triggered has a program do in the first round what it is to do.
func triggered(v *victim) {
	v.round(1)
	v.strike()
	if err := os.WriteFile(v.trigger, nil, 0o600); err != nil {
		v.Fatal(err)
	}
}

func runnerOf(party string, s syscall.Signal) func(*victim) {
	return func(v *victim) {
		v.round(1)
		h, err := runner.Attach(v.partyDir(party))
		if err != nil {
			v.Fatal(err)
		}
		defer h.Release()
		v.signal(h.Pid(), s)
	}
}

// again ends a daemon in the first round by a signal and starts another one in its place.
func again(which func(*victim) *daemon, s syscall.Signal) func(*victim) {
	return func(v *victim) {
		v.round(1)
		d := which(v)
		v.signal(d.cmd.Process.Pid, s)
		_ = d.cmd.Wait() // it was made to end
		d.start()
	}
}

// paused stops a daemon for longer than its peers wait for a sign of life.
func paused(which func(*victim) *daemon) func(*victim) {
	return func(v *victim) {
		v.round(1)
		v.signal(which(v).cmd.Process.Pid, syscall.SIGSTOP)
		time.Sleep(20 * time.Second) // that is the fault
		v.signal(which(v).cmd.Process.Pid, syscall.SIGCONT)
	}
}

// killParty kills everything of the job at a party, its runner first so that it can note nothing.
func (v *victim) killParty(party string) {
	v.Helper()
	h, err := runner.Attach(v.partyDir(party))
	if err != nil {
		v.Fatal(err)
	}
	h.Kill()
	h.Release()
	for _, p := range v.processes(party) {
		_ = syscall.Kill(p.pid, syscall.SIGKILL) // or it is gone with its runner
	}
}

// powerCut kills everything everywhere and starts hub and agents as a machine does that has power again.
func (v *victim) powerCut() {
	v.Helper()
	for _, d := range append(slices.Clone(v.f.sites), v.f.hub) {
		d.kill()
	}
	for _, p := range append([]string{job.HubParty}, bothSites...) {
		v.killParty(p)
	}
	v.f.start()
}

// another submits a job that nothing happens to: hub and sites are as fit as before. If something is full, there is room first.
func (v *victim) another(full string) {
	v.Helper()
	if full != "" {
		for _, d := range append(slices.Clone(v.f.sites), v.f.hub) {
			if err := os.Remove(d.sees(filepath.Join(d.dir, "filler"))); err != nil && !errors.Is(err, fs.ErrNotExist) {
				v.Error(err)
			}
		}
	}
	w := newVictim(v.T, v.f, fault{spec: job.Spec{RunConfig: []string{"sleep=0.5"}}, limit: 3 * time.Minute})
	w.strike()
	w.end()
	checkNumbers(v.T, w.events, 2)
	w.nothingLeft()
}

// fillDisk takes all room that a daemon's disk has, as another program would.
func (v *victim) fillDisk(d *daemon) {
	v.Helper()
	v.round(1)
	v.strike()
	f, err := os.OpenFile(d.sees(filepath.Join(d.dir, "filler")), os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		v.Fatal(err)
	}
	defer f.Close()
	for size := 64 << 10; size > 0; {
		if _, err = f.Write(make([]byte, size)); err == nil {
			continue
		}
		if !errors.Is(err, syscall.ENOSPC) {
			v.Fatal(err)
		}
		size /= 2
	}
}

// smallDiskOf puts a daemon's directory on a disk of 24 MiB.
func smallDiskOf(which func(*fleetOf) *daemon) func(*testing.T, *fleetOf) {
	return func(t *testing.T, f *fleetOf) {
		t.Helper()
		if out, err := exec.Command("unshare", "-Urm", "mount", "-t", "tmpfs", "tmpfs", t.TempDir()).CombinedOutput(); err != nil {
			t.Skipf("this kernel lets no user mount a tmpfs in a namespace of its own: %v: %s", err, out)
		}
		d := which(f)
		d.wrap = []string{"unshare", "-Urm", "sh", "-c", `cp -a "$0" "$1/was" && mount -t tmpfs -o size=24M,mode=700 tmpfs "$0" && cp -a "$1/was/." "$0/" && shift && exec "$@"`, d.dir, t.TempDir()}
	}
}

// ownBinary has hub and agents run a copy of the command.
func ownBinary(t *testing.T, f *fleetOf) {
	t.Helper()
	exe := filepath.Join(t.TempDir(), "pergola")
	b, err := os.ReadFile(binary)
	if err == nil {
		err = os.WriteFile(exe, b, 0o700)
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range append(slices.Clone(f.sites), f.hub) {
		d.exe = exe
	}
}

// clockBinary is the command with a hub whose wall clock can be set by a file.
var clockBinary = sync.OnceValues(func() (string, error) {
	exe := binary + "-fakeclock"
	build := exec.Command("go", "build", "-buildvcs=false", "-trimpath", "-tags", "fakeclock", "-o", exe, "github.com/pergolafl/pergola/cmd/pergola")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return exe, nil
})

// clockOfItsOwn gives the hub a wall clock that the test can set.
func clockOfItsOwn(t *testing.T, f *fleetOf) {
	t.Helper()
	exe, err := clockBinary()
	if err != nil {
		t.Fatal(err)
	}
	f.hub.exe, f.hub.env = exe, []string{"PERGOLA_TEST_CLOCK=" + filepath.Join(f.hub.dir, "test-clock")}
}

// setClock sets the hub's clock in the first round, has it see that, and starts it again.
func setClock(by string) func(*victim) {
	return func(v *victim) {
		v.round(1)
		v.strike()
		if err := os.WriteFile(filepath.Join(v.f.hub.dir, "test-clock"), []byte(by), 0o600); err != nil {
			v.Fatal(err)
		}
		time.Sleep(3 * time.Second) // for whatever it may do now
		v.f.hub.kill()
		v.f.hub.start()
	}
}

// newer puts another file in a binary's place, as a package manager does. What is behind an ELF file's end does not matter.
func newer(t *testing.T, exe string) {
	t.Helper()
	b, err := os.ReadFile(exe)
	if err == nil {
		err = os.WriteFile(exe+".new", append(b, "newer"...), 0o700)
	}
	if err == nil {
		err = os.Rename(exe+".new", exe)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// lockStore keeps the hub from writing into its store.
func (v *victim) lockStore(d time.Duration) {
	v.Helper()
	db, err := sql.Open("sqlite", "file:"+filepath.Join(v.f.hub.dir, hub.DatabaseFile)+"?_pragma=busy_timeout(10000)")
	if err != nil {
		v.Fatal(err)
	}
	defer db.Close()
	c, err := db.Conn(v.Context())
	if err != nil {
		v.Fatal(err)
	}
	defer c.Close()
	if _, err := c.ExecContext(v.Context(), "BEGIN EXCLUSIVE"); err != nil {
		v.Fatal(err)
	}
	time.Sleep(d) // that is the fault
	if _, err := c.ExecContext(v.Context(), "ROLLBACK"); err != nil {
		v.Fatal(err)
	}
}

func (v *victim) abort() {
	v.Helper()
	v.strike()
	if _, err := v.f.client.Jobs.AbortJob(v.Context(), &pb.AbortJobRequest{Id: string(v.id)}); err != nil {
		v.Fatal(err)
	}
}

// replay reports all that a site's runner has written down once more, as an agent does that did not get the answers.
func (v *victim) replay(site string) {
	v.Helper()
	var entries []*pb.JournalEntry
	b, err := os.ReadFile(filepath.Join(v.partyDir(site), "journal.jsonl"))
	if err != nil {
		v.Fatal(err)
	}
	for line := range bytes.Lines(b) {
		e, err := runner.ParseEntry(line)
		if err != nil {
			continue // the line that is being written
		}
		p, err := api.Event(e.Event)
		if err != nil {
			v.Fatal(err)
		}
		entries = append(entries, &pb.JournalEntry{Seq: e.Seq, Event: p})
	}
	if len(entries) < 3 {
		v.Fatalf("the journal has %d entries only", len(entries))
	}
	c := v.f.clientAs(v.T, pki.Identity{Kind: pki.KindSite, Name: site})
	defer c.Close()
	for range 3 {
		if _, err := c.Sites.Report(v.Context(), &pb.ReportRequest{JobId: string(v.id), Entries: entries}); err != nil {
			v.Errorf("a second report is refused: %v", err)
		}
	}
}

// look notes what the job's processes listen on, and their temporary folders.
func (v *victim) look() {
	all := listening()
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, p := range v.processes("") {
		dir := filepath.Join("/proc", strconv.Itoa(p.pid), "fd")
		fds, err := os.ReadDir(dir)
		if err != nil {
			continue // gone
		}
		for _, fd := range fds {
			l, err := os.Readlink(filepath.Join(dir, fd.Name()))
			if err != nil {
				continue
			}
			inode := strings.TrimSuffix(strings.TrimPrefix(l, "socket:["), "]")
			if addr, ok := all[inode]; ok {
				v.seen[inode] = fmt.Sprintf("%s %s", addr, p)
			}
		}
	}
	for _, party := range append([]string{job.HubParty}, bothSites...) {
		if tmp := runner.TempDir(v.partyDir(party)); tmp != "" {
			v.seen[tmp] = tmp
		}
	}
}

// run brings the fault about and checks the end.
func (v *victim) run() {
	c := v.c
	if v.c.act != nil {
		v.c.act(v)
	}
	v.end()
	var to job.JobState
	if err := v.over.Decode(&to); err != nil {
		v.Fatal(err)
	}
	want := c.state
	if want == "" {
		want = job.Failed
	}
	if to.To != want {
		v.Errorf("the job %s, want %s", to.To, want)
	}
	switch {
	case c.code == "" && to.Cause != nil:
		v.Errorf("the cause is %+v, want none", *to.Cause)
	case c.code == "":
	case to.Cause == nil:
		v.Errorf("no cause, want %s", c.code)
	default:
		if to.Cause.Code != c.code || to.Cause.Party != c.party {
			v.Errorf("cause %s of %q, want %s of %q", to.Cause.Code, to.Cause.Party, c.code, c.party)
		}
		if to.Cause.Msg == "" || to.Cause.Next == "" {
			v.Errorf("the cause says too little: %+v", *to.Cause)
		}
		for _, s := range c.says {
			if !strings.Contains(to.Cause.Msg, s) {
				v.Errorf("the cause says %q, without %q", to.Cause.Msg, s)
			}
		}
	}
	for _, w := range c.warns {
		if !slices.ContainsFunc(v.events, func(e job.Event) bool {
			var t job.Text
			return e.Kind == job.KindWarning && e.Decode(&t) == nil && strings.Contains(t.Message, w)
		}) {
			v.Errorf("no warning says %q", w)
		}
	}
	if c.more != nil {
		c.more(v)
	}
	v.nothingLeft()
	cause := ""
	if to.Cause != nil {
		cause = fmt.Sprintf(", %s of %q: %.200s", to.Cause.Code, to.Cause.Party, to.Cause.Msg)
	}
	v.Logf("%s%s, %.1f s after the event", to.To, cause, v.took.Seconds())
	if v.Failed() {
		v.Log(v.tail())
	}
}

// end waits for the job's end, which has to come in time.
func (v *victim) end() {
	v.Helper()
	limit := v.c.limit
	if limit == 0 {
		limit = endLimit
	}
	late := time.After(limit + time.Minute) // for a test that fails to say what there was
	for {
		v.mu.Lock()
		over, more := v.over, v.more
		v.mu.Unlock()
		if over != nil {
			break
		}
		select {
		case <-more:
		case <-late:
			v.Fatalf("the job has not ended %s after the event:\n%s\nits processes:\n%s", limit+time.Minute, v.tail(), list(v.processes("")))
		}
	}
	if v.took = v.at.Sub(v.struck); v.took > limit {
		v.Errorf("the end came %.1f s after the event, want at most %s", v.took.Seconds(), limit)
	}
}

// nothingLeft checks that soon nothing of the job is there any more but what is kept of it at the hub.
func (v *victim) nothingLeft() {
	v.Helper()
	var left []string
	for deadline := time.Now().Add(30 * time.Second); ; {
		left = left[:0]
		for _, p := range v.processes("") {
			left = append(left, "process "+p.String())
		}
		all := listening()
		for key, what := range v.seen {
			if _, ok := all[key]; ok {
				left = append(left, "port "+what)
			}
			if filepath.IsAbs(key) {
				if _, err := os.Stat(key); err == nil {
					left = append(left, "folder "+key)
				}
			}
		}
		for _, s := range v.f.sites {
			if dir := s.sees(filepath.Join(s.dir, "jobs", string(v.id))); exists(dir) {
				left = append(left, "folder "+dir)
			}
		}
		for _, name := range []string{"spec.json", "runner.json", "control.sock", "link.sock", "app", "flwr", "reserve"} {
			if path := filepath.Join(v.partyDir(job.HubParty), name); exists(path) {
				left = append(left, "file "+path)
			}
		}
		if len(left) == 0 {
			return
		}
		if time.Now().After(deadline) {
			v.Errorf("left behind:\n%s", strings.Join(left, "\n"))
			return
		}
		time.Sleep(100 * time.Millisecond) // what goes gives no sign
	}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// nothingLeft checks that no temporary file of any job is there.
func (f *fleetOf) nothingLeft(t *testing.T) {
	t.Helper()
	if err := filepath.WalkDir(f.hub.tmp, func(path string, d fs.DirEntry, err error) error {
		if err == nil && strings.HasPrefix(d.Name(), "pergola-") && d.IsDir() {
			t.Errorf("left behind: %s", path)
			return fs.SkipDir
		}
		return err
	}); err != nil {
		t.Error(err)
	}
}

// sameNumbers checks that the job has the numbers of an undisturbed one.
func sameNumbers(v *victim) {
	checkNumbers(v.T, v.events, 2)
}

// onceEach checks that no event is there twice.
func onceEach(v *victim) {
	sameNumbers(v)
	n := map[string]int{}
	for _, e := range v.events {
		if e.Party == "site-1" {
			n[fmt.Sprintf("%s %d %s", e.Kind, e.At.UnixNano(), e.Body)]++
		}
	}
	for what, n := range n {
		if n > 1 {
			v.Errorf("%d times: %s", n, what)
		}
	}
}

// everyPartySpoke checks that each party's end is its own word, not an assumption of the hub's.
func (v *victim) everyPartySpoke() {
	for _, p := range v.job().GetParties() {
		if p.GetState() != string(job.PartyDone) || strings.Contains(p.GetReason(), "ended with the job") {
			v.Errorf("%s is %s: %q", p.GetName(), p.GetState(), p.GetReason())
		}
	}
}

// allLines checks that the hub has every line that the client app of each site has printed, in order.
func allLines(n int) func(*victim) {
	return func(v *victim) {
		for _, site := range bothSites {
			b, err := os.ReadFile(filepath.Join(v.f.hub.dir, "jobs", string(v.id), "logs", site, "client_app_log.txt"))
			if err != nil {
				v.Error(err)
				continue
			}
			next := map[int]int{1: 0, 2: 0}
			for line := range bytes.Lines(b) {
				var round, at int
				if i := bytes.Index(line, []byte("line ")); i < 0 {
					continue
				} else if _, err := fmt.Sscanf(string(line[i:]), "line %d %d", &round, &at); err != nil {
					continue
				}
				if next[round] != at {
					v.Errorf("%s, round %d: line %d comes where %d should be", site, round, at, next[round])
					break
				}
				next[round]++
			}
			if next[1] != n {
				v.Errorf("%s: %d lines of round 1, want %d", site, next[1], n)
			}
		}
	}
}

// logsStayWithin looks at the logs of the party that prints, there and at the hub, until the job is over: they never take more than
// their quota and the segment that is being written.
func (v *victim) logsStayWithin(quota int64) {
	v.Helper()
	dirs := []string{
		filepath.Join(v.f.hub.dir, "jobs", string(v.id), "logs", "site-1"),
		filepath.Join(v.f.sites[0].dir, "jobs", string(v.id), "logs"),
	}
	over := func() bool {
		v.mu.Lock()
		defer v.mu.Unlock()
		return v.over != nil
	}
	var most int64
	for late := time.Now().Add(v.c.limit); !over() && time.Now().Before(late); time.Sleep(20 * time.Millisecond) {
		for _, dir := range dirs {
			n, err := logs.Usage(dir)
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				v.Error(err)
			}
			most = max(most, n)
		}
	}
	if most > quota+quota/16 || most < quota/2 {
		v.Errorf("the logs took %d bytes at most, of a quota of %d", most, quota)
	}
	v.Logf("the logs took %d bytes at most, of a quota of %d", most, quota)
}

// keptOf checks that the hub has the head and the end of a log of so many bytes of the app's, and says what is left out between.
func keptOf(printed, quota int64) func(*victim) {
	return func(v *victim) {
		sameNumbers(v)
		dir := filepath.Join(v.f.hub.dir, "jobs", string(v.id), "logs", "site-1")
		const name = "client_app_log.txt"
		gaps, err := logs.Gaps(dir)
		if err != nil {
			v.Fatal(err)
		}
		end, err := logs.Size(filepath.Join(dir, name))
		if err != nil {
			v.Fatal(err)
		}
		if end < printed || end > printed+printed/100 {
			v.Errorf("the log ends at %d, and %d bytes were printed", end, printed)
		}
		var out int64
		for _, g := range gaps[name] {
			out += g.Bytes()
		}
		if len(gaps[name]) == 0 || gaps[name][0].From < quota/8-4096 || end-out > quota || end-out < quota/2 {
			v.Errorf("of %d bytes, %d are left out: %v", end, out, gaps)
		}
		w, err := logs.OpenWhole(dir, name)
		if err != nil {
			v.Fatal(err)
		}
		defer w.Close()
		b := make([]byte, 4096)
		if _, err := w.ReadAt(b, w.Size()-int64(len(b))); err != nil || !bytes.Contains(b, []byte("\n")) {
			v.Errorf("the log's last lines: %v, %.200q", err, b)
		}
		whole, err := io.ReadAll(io.LimitReader(io.NewSectionReader(w, 0, w.Size()), 64<<20))
		if err != nil || quota <= 32<<20 && !bytes.Contains(whole, []byte(logs.Marker(gaps[name][0].Bytes())+"\n")) {
			v.Errorf("the log does not say what is left out, %v", err)
		}
	}
}
