package proc

import (
	"bytes"
	"errors"
	"maps"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// The nursery exists while this process has programs. It is two goroutines:
//
// The starter is locked to one OS thread and starts all programs, because the kernel sends
// Pdeathsig when the *thread* that started a child ends, and Go ends threads at will.
//
// The reaper waits for adopted orphans when a child has ended.
var nursery struct {
	mu      sync.Mutex // guards the rest
	count   int        // programs started or about to be, and not yet reaped
	start   chan func()
	sigchld chan os.Signal
	done    sync.WaitGroup
}

// goPidfds tells whether os.StartProcess holds a pidfd for each child; known once one was started.
var goPidfds atomic.Pointer[bool]

// subreaper tells that orphans of our programs become our children.
var subreaper atomic.Bool

// Subreaper makes orphaned descendants of this process its children, so that none can hide by
// ending its parent. They are reaped while programs of [Start] or [Run] exist, and what is left of
// them is killed when the last of these has ended.
func Subreaper() error {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl PR_SET_CHILD_SUBREAPER", err)
	}
	subreaper.Store(true)
	return nil
}

// enter makes sure of the nursery; each enter has one leave.
func enter() {
	n := &nursery
	n.mu.Lock()
	defer n.mu.Unlock()
	n.count++
	if n.count > 1 {
		return
	}
	n.start = make(chan func())
	n.sigchld = make(chan os.Signal, 1) // one waiting signal stands for any number
	start, sigchld := n.start, n.sigchld
	signal.Notify(sigchld, unix.SIGCHLD)
	n.done.Go(func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread() // no program is left that depends on the thread
		for f := range start {
			f()
		}
	})
	n.done.Go(func() {
		for range sigchld {
			ReapAdopted()
		}
	})
}

// leave ends the nursery with the last program. Orphans that nothing showed to belong to one
// program (no group, no token, no pipe) are killed now that none is left that could need them.
func leave() (err error) {
	n := &nursery
	n.mu.Lock() // no program begins meanwhile
	defer n.mu.Unlock()
	n.count--
	if n.count > 0 {
		return nil
	}
	if subreaper.Load() {
		_, err = killAll("adopted orphans", adopted)
	}
	ReapAdopted()
	signal.Stop(n.sigchld) // after this no signal is sent to the channel
	close(n.sigchld)
	close(n.start)
	n.done.Wait() // neither goroutine takes the lock
	return err
}

// spawn runs os.StartProcess on the starter's thread. The caller has entered.
func spawn(path string, argv []string, attr *os.ProcAttr) (p *os.Process, err error) {
	done := make(chan struct{})
	nursery.start <- func() {
		defer close(done)
		p, err = os.StartProcess(path, argv, attr)
		if err == nil && goPidfds.Load() == nil {
			own := ownPidfds()[p.Pid]
			goPidfds.Store(&own)
		}
	}
	<-done
	return p, err
}

// ReapAdopted reaps zombies that this process has adopted, if it is a subreaper or process 1, and
// leaves alone all that it started itself: an exit code belongs to who waits for it. It runs by
// itself while programs of this package exist.
//
// Own children are told from adopted ones by the pidfd that os.StartProcess opens with each and
// keeps until it was waited for; where the kernel has no pidfds (before 5.4) nothing is reaped that
// leads a process group or shares ours.
func ReapAdopted() {
	if !subreaper.Load() && os.Getpid() != 1 {
		return
	}
	all, err := processes()
	if err != nil {
		return // no /proc, no zombies to be seen
	}
	dead := slices.DeleteFunc(childrenOf(os.Getpid(), all), func(s stat) bool { return !s.dead() })
	if len(dead) == 0 {
		return
	}
	for _, s := range notOurs(dead) {
		var ws unix.WaitStatus
		_, _ = unix.Wait4(s.pid, &ws, unix.WNOHANG, nil) // ECHILD: somebody was faster
	}
}

// notOurs leaves of some children those that were adopted. The pidfds are looked up after the
// children: a child has its pidfd from its first moment until after it was reaped.
func notOurs(kids []stat) []stat {
	own, group := ownPidfds(), unix.Getpgrp()
	known := goPidfds.Load()
	return slices.DeleteFunc(kids, func(s stat) bool {
		return own[s.pid] || ((known == nil || !*known) && (s.pgrp == s.pid || s.pgrp == group))
	})
}

// adopted gives the living children that this process has adopted.
func adopted() ([]stat, error) {
	all, err := processes()
	if err != nil {
		return nil, err
	}
	set := map[int]stat{}
	for _, s := range notOurs(slices.DeleteFunc(childrenOf(os.Getpid(), all), stat.dead)) {
		set[s.pid] = s
	}
	below(all, set)
	return slices.DeleteFunc(slices.Collect(maps.Values(set)), stat.dead), nil
}

func childrenOf(pid int, all []stat) []stat {
	var out []stat
	for _, s := range all {
		if s.ppid == pid {
			out = append(out, s)
		}
	}
	return out
}

// ownPidfds gives the pids to which this process holds a pidfd.
func ownPidfds() map[int]bool {
	own := map[int]bool{}
	dir, err := os.Open("/proc/self/fdinfo")
	if err != nil {
		return own
	}
	names, err := dir.Readdirnames(-1)
	if err = errors.Join(err, dir.Close()); err != nil {
		return own
	}
	for _, n := range names {
		b, err := os.ReadFile("/proc/self/fdinfo/" + n)
		if err != nil {
			continue // closed since
		}
		for line := range bytes.Lines(b) {
			if v, ok := bytes.CutPrefix(line, []byte("Pid:")); ok {
				if pid, err := strconv.Atoi(string(bytes.TrimSpace(v))); err == nil {
					own[pid] = true
				}
			}
		}
	}
	return own
}
