package proc

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pergolafl/pergola/internal/problem"
)

// stat is what /proc/<pid>/stat says of a process (proc(5) has the fields' numbers).
type stat struct {
	pid, ppid, pgrp int
	state           byte   // R, S, D, T, t, Z, X …
	kernel          bool   // a thread of the kernel
	start           uint64 // clock ticks since boot
}

func (s stat) dead() bool { return s.state == 'Z' || s.state == 'X' }

func readStat(pid int) (stat, error) {
	b, err := os.ReadFile(procPath(pid, "stat"))
	if err != nil {
		return stat{}, err
	}
	return parseStat(b)
}

// parseStat reads "pid (name) state ppid pgrp …". The name is the program's choice and may itself
// have parentheses, spaces and newlines, so the fields are counted from the last parenthesis.
func parseStat(b []byte) (stat, error) {
	open, end := bytes.IndexByte(b, '('), bytes.LastIndexByte(b, ')')
	if open < 1 || end < open {
		return stat{}, fmt.Errorf("no name in parentheses in %q", b)
	}
	f := strings.Fields(string(b[end+1:])) // f[0] is field 3
	if len(f) < 20 || len(f[0]) != 1 {
		return stat{}, fmt.Errorf("too few fields in %q", b)
	}
	s := stat{state: f[0][0]}
	var errs [5]error
	s.pid, errs[0] = strconv.Atoi(strings.TrimSpace(string(b[:open])))
	s.ppid, errs[1] = strconv.Atoi(f[1])
	s.pgrp, errs[2] = strconv.Atoi(f[2])
	flags, err := strconv.ParseUint(f[6], 10, 64)
	s.kernel, errs[4] = flags&0x00200000 != 0, err // PF_KTHREAD, include/linux/sched.h
	s.start, errs[3] = strconv.ParseUint(f[19], 10, 64)
	return s, errors.Join(errs[:]...)
}

func procPath(pid int, name string) string {
	return "/proc/" + strconv.Itoa(pid) + "/" + name
}

// StartTime gives when the process began, in clock ticks since boot. Together with the pid it
// names a process for as long as the machine is up: a reused pid has another start time.
func StartTime(pid int) (uint64, error) {
	s, err := readStat(pid)
	if err != nil {
		return 0, fmt.Errorf("start time of process %d: %w", pid, err)
	}
	return s.start, nil
}

// BootID names the machine's present boot, which start times count from; "" where that is not known.
func BootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// Alive tells whether the process that had this pid and start time still runs; a zombie does not.
func Alive(pid int, start uint64) bool {
	s, err := readStat(pid)
	return err == nil && s.start == start && !s.dead()
}

// processes lists all processes that can be seen. One that ends meanwhile is left out.
func processes() ([]stat, error) {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil, err
	}
	names, err := dir.Readdirnames(-1)
	if err = errors.Join(err, dir.Close()); err != nil {
		return nil, err
	}
	var all []stat
	for _, n := range names {
		pid, err := strconv.Atoi(n)
		if err != nil {
			continue // not a process
		}
		if s, err := readStat(pid); err == nil {
			all = append(all, s)
		}
	}
	return all, nil
}

// below adds to set every process of all that descends from one in set.
func below(all []stat, set map[int]stat) {
	for grew := true; grew; {
		grew = false
		for _, s := range all {
			if _, in := set[s.pid]; in {
				continue
			}
			// A parent that began after its child is a reused pid.
			if p, in := set[s.ppid]; in && p.start <= s.start {
				set[s.pid], grew = s, true
			}
		}
	}
}

// descendants gives the living descendants of pid, without itself.
func descendants(pid int) ([]stat, error) {
	all, err := processes()
	if err != nil {
		return nil, err
	}
	set := map[int]stat{}
	for _, s := range all {
		if s.pid == pid {
			set[pid] = s
		}
	}
	below(all, set)
	delete(set, pid)
	var out []stat
	for _, s := range set {
		if !s.dead() {
			out = append(out, s)
		}
	}
	return out, nil
}

// Descendants gives the pids of the living children of pid, their children and so on, in no
// particular order. One whose parent ended before has been adopted by another process, and is not found.
func Descendants(pid int) []int {
	found, err := descendants(pid)
	if err != nil {
		return nil // without /proc nothing is known
	}
	pids := make([]int, len(found))
	for i, s := range found {
		pids[i] = s.pid
	}
	return pids
}

// KillTree kills pid and its descendants, waits until they are gone, and gives their number. The
// calling process itself is never killed, but its descendants are with KillTree(os.Getpid()).
func KillTree(pid int) (n int, err error) {
	return killAll(fmt.Sprintf("process %d and its descendants", pid), func() ([]stat, error) {
		found, err := descendants(pid)
		if s, serr := readStat(pid); serr == nil && !s.dead() {
			found = append(found, s)
		}
		return found, err
	})
}

// KillMarked kills every process of this user that has MarkVar=mark in the environment that it was
// started with, however it came to be, waits until they are gone, and gives their number. The calling process is spared.
// A process that hides its environment from its own user (prctl PR_SET_DUMPABLE) is not found.
func KillMarked(mark string) (n int, err error) {
	if mark == "" {
		return 0, problem.New(problem.Internal, "please report this", "KillMarked needs a mark")
	}
	want := MarkVar + "=" + mark
	return killAll("the processes marked "+mark, func() ([]stat, error) {
		all, err := processes()
		var found []stat
		for _, s := range all {
			if !s.dead() && ownUser(s.pid) && environHas(s, func(kv string) bool { return kv == want }) {
				found = append(found, s)
			}
		}
		return found, err
	})
}

// KillCommand kills every process of this user that was started with just these arguments after its program's name, waits
// until they are gone, and gives their number. The calling process is spared.
func KillCommand(args ...string) (n int, err error) {
	if len(args) == 0 {
		return 0, problem.New(problem.Internal, "please report this", "KillCommand needs arguments")
	}
	want := "\x00" + strings.Join(args, "\x00") + "\x00"
	return killAll("the processes called with "+strings.Join(args, " "), func() ([]stat, error) {
		all, err := processes()
		var found []stat
		for _, s := range all {
			if s.dead() || !ownUser(s.pid) {
				continue
			}
			line := string(readSome(s.pid, "cmdline"))
			if i := strings.IndexByte(line, 0); i >= 0 && line[i:] == want {
				found = append(found, s)
			}
		}
		return found, err
	})
}

// ownUser tells whether the process runs as our user: root can read every environment, but what
// another user's process calls itself is no reason to kill it.
func ownUser(pid int) bool {
	var st unix.Stat_t
	return unix.Stat(procPath(pid, ""), &st) == nil && int(st.Uid) == os.Geteuid()
}

// maxEnviron is more than the kernel lets a program start with by default (a quarter of an 8 MiB stack).
const maxEnviron = 4 << 20

// environHas tells whether an entry of the process's first environment matches. A process that is
// gone, or that we may not look into, has none.
func environHas(s stat, match func(kv string) bool) bool {
	if s.kernel {
		return false
	}
	b := readSome(s.pid, "environ")
	// In the middle of exec a process has neither environment nor arguments. That is over within
	// microseconds, a few milliseconds if the program is not in memory yet; nothing tells when.
	for range 100 {
		if len(b) > 0 || len(readSome(s.pid, "cmdline")) > 0 || !Alive(s.pid, s.start) {
			break
		}
		time.Sleep(time.Millisecond)
		b = readSome(s.pid, "environ")
	}
	if len(b) == 0 {
		b = readSome(s.pid, "environ") // exec may have ended between the two looks
	}
	for kv := range bytes.SplitSeq(b, []byte{0}) {
		if match(string(kv)) {
			return true
		}
	}
	return false
}

// readSome reads a file of a process, or nothing.
func readSome(pid int, name string) []byte {
	f, err := os.Open(procPath(pid, name))
	if err != nil {
		return nil
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxEnviron))
	if err != nil {
		return nil
	}
	return b
}

// killAll kills what find finds until it finds nothing more. First all are stopped: what stands
// still cannot fork, so that no child slips away while its parent is killed.
func killAll(what string, find func() ([]stat, error)) (n int, err error) {
	deadline := time.Now().Add(killPatience)
	for {
		victims, err := freeze(find)
		for _, v := range victims {
			_ = v.signal(unix.SIGKILL) // gone already: as wanted
		}
		left := awaitGone(victims, deadline)
		n += len(victims) - len(left)
		ReapAdopted()
		switch {
		case err != nil:
			return n, problem.Wrap(err, problem.Internal, "see that /proc is mounted and readable", "cannot look for %s", what)
		case len(victims) == 0:
			return n, nil
		case len(left) > 0: // awaitGone has used up the time
			pids := strings.Join(left, ",")
			return n, problem.New(problem.Internal, "see what they wait for: ps -o pid,stat,wchan,args -p "+pids,
				"of %s, some were killed but have not ended after %s (process %s)", what, killPatience, pids)
		case !time.Now().Before(deadline):
			return n, problem.New(problem.Internal, "limit the number of the user's processes: ulimit -u",
				"%s start others faster than they can be killed: %d in %s", what, n, killPatience)
		}
	}
}

// freezeRounds is how often freeze looks again: each round can only find what was being forked in the one before.
const freezeRounds = 20

// freeze stops what find finds until it finds nothing new.
func freeze(find func() ([]stat, error)) (victims []victim, err error) {
	type identity struct {
		pid   int
		start uint64
	}
	seen, self := map[identity]bool{}, os.Getpid()
	for range freezeRounds {
		found, ferr := find()
		err = ferr
		fresh := false
		for _, s := range found {
			id := identity{s.pid, s.start}
			if seen[id] || s.pid == self || s.pid == 1 {
				continue
			}
			seen[id] = true
			if v, ok := catch(s); ok {
				victims, fresh = append(victims, v), true
				_ = v.signal(unix.SIGSTOP) // as above
			}
		}
		if !fresh {
			break
		}
	}
	return victims, err
}

// victim is a process that is to be killed.
type victim struct {
	stat
	fd int // pidfd, or -1 where the kernel has none (before 5.3) or we have no descriptor left
}

// catch takes hold of exactly the process of s; false if it is gone or not ours to kill. The
// identity is compared after the pidfd was opened, so the pid cannot be reused in between.
func catch(s stat) (victim, bool) {
	v := victim{stat: s, fd: -1}
	if fd, err := unix.PidfdOpen(s.pid, 0); err == nil {
		v.fd = fd
	}
	if !Alive(s.pid, s.start) || v.signal(0) != nil {
		v.close()
		return victim{}, false
	}
	return v, true
}

// signal sends to the process of v. An error means that it is gone, which is what is wanted.
func (v victim) signal(sig syscall.Signal) error {
	if v.fd >= 0 {
		return unix.PidfdSendSignal(v.fd, sig, nil, 0)
	}
	if !Alive(v.pid, v.start) {
		return unix.ESRCH
	}
	return unix.Kill(v.pid, sig)
}

func (v victim) close() {
	if v.fd >= 0 {
		_ = unix.Close(v.fd) // nothing was written to it
	}
}

// awaitGone waits until all are gone or zombies, and closes their pidfds. It gives the pids of
// those that are still there at the deadline.
func awaitGone(victims []victim, deadline time.Time) (left []string) {
	for _, v := range victims {
		for Alive(v.pid, v.start) {
			rest := time.Until(deadline)
			if rest <= 0 {
				left = append(left, strconv.Itoa(v.pid))
				break
			}
			v.await(rest)
		}
		v.close()
	}
	return left
}

// await waits for the end of v, or a part of limit.
func (v victim) await(limit time.Duration) {
	if v.fd >= 0 {
		fds := []unix.PollFd{{Fd: int32(v.fd), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, int(limit.Milliseconds())+1); err == nil || errors.Is(err, unix.EINTR) {
			return
		}
	}
	time.Sleep(min(limit, 5*time.Millisecond)) // without a pidfd there is nothing to wait on but time
}

// Suspended is a process that a signal (SIGSTOP, SIGTSTP) has stopped.
type Suspended struct {
	Pid   int
	Start uint64 // see StartTime
	Name  string // as /proc has it, at most 15 bytes
}

// SuspendedBelow gives the descendants of pid that a signal has stopped, in no particular order. One that a debugger has
// stopped is not among them.
func SuspendedBelow(pid int) ([]Suspended, error) {
	found, err := descendants(pid)
	if err != nil {
		return nil, err
	}
	var out []Suspended
	for _, s := range found {
		if s.state == 'T' {
			out = append(out, Suspended{Pid: s.pid, Start: s.start, Name: strings.TrimSpace(string(readSome(s.pid, "comm")))})
		}
	}
	return out, nil
}
