package proc

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pergolafl/pergola/internal/problem"
)

// procVar carries, separated by slashes, the tokens of the programs of this package that a process
// descends from. By it a descendant is found that left the tree and the group.
const procVar = "PERGOLA_PROC"

// Process is a program that was started, and whatever it starts.
type Process struct {
	spec  Spec
	os    *os.Process
	begun stat // identity of the leader
	token string
	sink  *sink
	pipes []string // "pipe:[inode]" of each output pipe, as /proc/<pid>/fd shows it
	oom   OOMCount

	left chan struct{} // closed when the leader has ended, maybe before it is reaped
	done chan struct{} // closed when nothing is left of it
	exit Exit          // valid after done

	mu     sync.Mutex     // guards the rest and the closing of left; held while signals are sent
	asked  bool           // SIGTERM was sent
	killed bool           // SIGKILL was sent by us
	tree   map[int]uint64 // pid → start time of descendants seen at a Stop
}

// stream is one pipe of output.
type stream struct {
	r, w *os.File
	also func([]byte) // gets the bytes as they come; may be nil
}

// Start starts a program. The error is a *problem.Error with code program-failed (disk-full if the
// log cannot be begun for want of space) and says why; the exit code to report is ExitCannotStart.
// The caller must see to it that the program ends, by Stop if in no other way: the goroutines that
// watch it stay until Done.
func Start(spec Spec) (*Process, error) {
	return start(spec, nil, nil)
}

// start starts a program with stdout and stderr in one pipe, or, if out and err are given, in a pipe each.
func start(spec Spec, out, errs func([]byte)) (p *Process, err error) {
	if spec.Name == "" && len(spec.Args) > 0 {
		spec.Name = filepath.Base(spec.Args[0])
	}
	if err := check(&spec); err != nil {
		return nil, err
	}
	snk, err := newSink(&spec)
	if err != nil {
		return nil, logProblem(spec, err)
	}
	streams := []*stream{{also: out}}
	if errs != nil {
		streams = append(streams, &stream{also: errs})
	}
	defer func() {
		for _, s := range streams {
			closeAll(s.w) // the program has its own
			if err != nil {
				closeAll(s.r)
			}
		}
		if err != nil {
			snk.close()
		}
	}()
	p = &Process{
		spec: spec, sink: snk, token: rand.Text(), oom: readOOM(),
		left: make(chan struct{}), done: make(chan struct{}), tree: map[int]uint64{},
	}
	for _, s := range streams {
		if s.r, s.w, err = os.Pipe(); err != nil {
			return nil, cannot(spec, err)
		}
		var st unix.Stat_t
		if err := unix.Fstat(int(s.w.Fd()), &st); err != nil {
			return nil, cannot(spec, err)
		}
		p.pipes = append(p.pipes, fmt.Sprintf("pipe:[%d]", st.Ino))
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, cannot(spec, err)
	}
	defer closeAll(null)
	enter()
	p.os, err = spawn(spec.Args[0], spec.Args, &os.ProcAttr{
		Dir:   spec.Dir,
		Env:   environ(spec.Env, p.token),
		Files: append([]*os.File{null, streams[0].w, streams[len(streams)-1].w}, spec.Files...),
		Sys:   &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL},
	})
	if err != nil {
		if lerr := leave(); lerr != nil {
			err = errors.Join(err, lerr)
		}
		return nil, cannot(spec, err)
	}
	// Even if it has ended already it is a zombie until we reap it, so this is its own start time.
	if p.begun, err = readStat(p.os.Pid); err != nil {
		p.begun, err = stat{pid: p.os.Pid}, nil // no /proc: fewer descendants can be found
	}
	var readers sync.WaitGroup
	for _, s := range streams {
		readers.Go(func() { p.read(s) })
	}
	read := make(chan struct{})
	go func() {
		readers.Wait()
		close(read)
	}()
	go p.watch(streams, read)
	return p, nil
}

// closeAll closes files of which the error at closing says nothing: pipes and /dev/null.
func closeAll(files ...*os.File) {
	for _, f := range files {
		if f != nil {
			_ = f.Close()
		}
	}
}

// environ gives env, or our own if that is nil, with the last of equal keys and the program's token.
func environ(env []string, token string) []string {
	if env == nil {
		env = os.Environ()
	}
	chain := token
	if outer := os.Getenv(procVar); outer != "" {
		chain = outer + "/" + token
	}
	env = append(slices.Clone(env), procVar+"="+chain)
	seen := map[string]bool{}
	out := make([]string, 0, len(env))
	for _, kv := range slices.Backward(env) {
		if k, _, ok := strings.Cut(kv, "="); ok {
			if seen[k] {
				continue // C libraries take the first, people mean the last
			}
			seen[k] = true
		}
		out = append(out, kv)
	}
	slices.Reverse(out)
	return out
}

// Pid gives the program's process id, which is also the id of its process group.
func (p *Process) Pid() int { return p.begun.pid }

// StartTime gives the program's start time, see [StartTime].
func (p *Process) StartTime() uint64 { return p.begun.start }

// Done is closed when the program has ended, all that it left behind is gone, its output was read
// to the end and the log is closed.
func (p *Process) Done() <-chan struct{} { return p.done }

// Exit waits for Done and tells how the program ended.
func (p *Process) Exit() Exit {
	<-p.done
	return p.exit
}

// Tail gives the last n finished lines of output, oldest first: at most 50, of each at most 4 KiB.
func (p *Process) Tail(n int) []string { return p.sink.last(n) }

// Stop ends the program: SIGTERM to its process group, and after grace, or at once if that is not
// positive, SIGKILL to the group and all descendants. It waits until all are gone. It may be called
// any number of times, also at the same time: SIGTERM is sent once, and the first grace to run out counts.
func (p *Process) Stop(grace time.Duration) Exit {
	if grace > 0 {
		p.terminate()
		t := time.NewTimer(grace)
		defer t.Stop()
		select {
		case <-p.left:
		case <-t.C:
		}
	}
	p.kill()
	return p.Exit()
}

// terminate asks the group to end.
func (p *Process) terminate() {
	p.signal(func() {
		if !p.asked {
			p.asked = true
			p.toGroup(unix.SIGTERM)
			p.toGroup(unix.SIGCONT) // one that is stopped could not hear the other
		}
	})
}

// kill kills the leader and its group. The sweep that follows the leader's end kills the rest.
func (p *Process) kill() {
	p.signal(func() {
		p.killed = true
		p.toGroup(unix.SIGKILL)
		_ = p.os.Signal(unix.SIGKILL) // it may have moved to another group
	})
}

// signal calls send while the leader is there. What it has started by now is remembered: once it
// has ended, its children have no longer the parent by which they could be found.
func (p *Process) signal(send func()) {
	found, _ := descendants(p.begun.pid) // without /proc the group must do
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-p.left:
		return // the sweep is under way, and soon the pid is another's
	default:
	}
	for _, s := range found {
		p.tree[s.pid] = s.start
	}
	send()
}

// toGroup signals the group; ESRCH is what it gives for a group of zombies.
func (p *Process) toGroup(sig syscall.Signal) { _ = unix.Kill(-p.begun.pid, sig) }

// watch waits for the leader, then ends the rest.
func (p *Process) watch(streams []*stream, read <-chan struct{}) {
	var err error
	for {
		// WNOWAIT leaves the leader a zombie: its pid, by which the group is known, cannot be reused.
		if err = unix.Waitid(unix.P_PID, p.begun.pid, nil, unix.WEXITED|unix.WNOWAIT, nil); !errors.Is(err, unix.EINTR) {
			break
		}
	}
	p.mu.Lock()
	close(p.left)
	killed := p.killed
	p.mu.Unlock()

	_, sweepErr := killAll("what "+p.spec.Name+" left behind", p.remains)
	// A process whose first thread has ended looks dead, but its other threads may run.
	p.toGroup(unix.SIGKILL)

	state, err := p.os.Wait() // after left is closed nobody sends signals by pid
	sweepErr = errors.Join(sweepErr, leave())

	p.exit = exitOf(state, err)
	if (p.exit.Signal == syscall.SIGKILL || p.exit.Code == 128+int(syscall.SIGKILL)) && !killed {
		p.exit.OOM = readOOM().since(p.oom)
	}
	// Nothing of the program is left to write, so the end of the output is near, unless somebody
	// whom we may not kill has the pipe.
	t := time.NewTimer(drainPatience)
	defer t.Stop()
	select {
	case <-read:
	case <-t.C:
		for _, s := range streams {
			_ = s.r.SetReadDeadline(time.Now()) // fails only where already closed
		}
		<-read
	}
	if sweepErr != nil {
		p.sink.note(sweepErr)
	}
	p.sink.close()
	close(p.done)
}

func exitOf(state *os.ProcessState, err error) Exit {
	if err != nil {
		return Exit{Code: ExitFatal} // somebody else has reaped it: its code is lost
	}
	ws, _ := state.Sys().(syscall.WaitStatus)
	if sig := ws.Signal(); sig > 0 {
		return Exit{Code: -int(sig), Signal: sig}
	}
	return Exit{Code: ws.ExitStatus()}
}

// remains gives what there is of the program apart from its dead leader: its group, its tree,
// whoever carries its token or holds its output open, and what these have started.
func (p *Process) remains() ([]stat, error) {
	// From a fork to its exec a child has all of our files, this program's output pipes among them, and must not be taken for one of its
	// descendants. The lock is held for writing from one to the other, whoever forks (syscall/exec_unix.go; os/exec of any package does).
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	all, err := processes()
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	tree := maps.Clone(p.tree)
	p.mu.Unlock()
	self, set := os.Getpid(), map[int]stat{}
	for _, s := range all {
		if s.pid == self || s.start < p.begun.start {
			continue
		}
		start, seen := tree[s.pid]
		if s.pid == p.begun.pid || s.pgrp == p.begun.pid || (seen && start == s.start) ||
			(!s.dead() && (p.tokened(s) || p.piped(s.pid))) {
			set[s.pid] = s
		}
	}
	below(all, set)
	var found []stat
	for _, s := range set {
		if !s.dead() && s.pid != self {
			found = append(found, s)
		}
	}
	return found, nil
}

func (p *Process) tokened(s stat) bool {
	return environHas(s, func(kv string) bool {
		v, ok := strings.CutPrefix(kv, procVar+"=")
		return ok && slices.Contains(strings.Split(v, "/"), p.token)
	})
}

// piped tells whether the process holds an output pipe of the program.
func (p *Process) piped(pid int) bool {
	dir, err := os.Open(procPath(pid, "fd"))
	if err != nil {
		return false // gone, or not ours to look into
	}
	defer closeAll(dir)
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return false
	}
	return slices.ContainsFunc(names, func(n string) bool {
		to, err := os.Readlink(procPath(pid, "fd/"+n))
		return err == nil && slices.Contains(p.pipes, to)
	})
}

// read hands the output on until its end. A read deadline means: take what is there, then end.
func (p *Process) read(s *stream) {
	defer closeAll(s.r)
	sp := p.sink.splitter()
	defer p.sink.end(sp)
	buf := make([]byte, 64<<10)
	take := func(b []byte) {
		if s.also != nil {
			s.also(b)
		}
		p.sink.feed(sp, b)
	}
	for {
		n, err := s.r.Read(buf)
		if n > 0 {
			take(buf[:n])
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		if err != nil {
			return // io.EOF; a pipe has no other
		}
	}
	// A reader that was held up by OnLine finds the deadline passed and the pipe full.
	if err := s.r.SetReadDeadline(time.Time{}); err != nil {
		return
	}
	raw, err := s.r.SyscallConn()
	if err != nil {
		return
	}
	for taken := 0; taken < 1<<20; { // the largest pipe an ordinary user can make
		n := 0
		err := raw.Read(func(fd uintptr) bool {
			n, _ = unix.Read(int(fd), buf)
			return true // whatever came: do not wait for more
		})
		if err != nil || n <= 0 {
			return
		}
		taken += n
		take(buf[:n])
	}
}

// check finds out beforehand what the kernel would report too vaguely.
func check(spec *Spec) error {
	if len(spec.Args) == 0 || spec.Args[0] == "" {
		return problem.New(problem.ProgramFailed, "give the program's path and arguments", "%s could not start: no command was given", nameOr(spec.Name))
	}
	if spec.Dir != "" {
		if st, err := os.Stat(spec.Dir); err != nil {
			return problem.Wrap(err, problem.ProgramFailed, "create the directory or correct the setting", "%s could not start: its working directory cannot be used", spec.Name)
		} else if !st.IsDir() {
			return problem.New(problem.ProgramFailed, "give a directory", "%s could not start: its working directory %s is not a directory", spec.Name, spec.Dir)
		}
	}
	path := spec.path()
	st, err := os.Stat(path)
	switch {
	case errors.Is(err, os.ErrNotExist) && !strings.Contains(spec.Args[0], "/"):
		return problem.Wrap(err, problem.ProgramFailed, "give the program's full path", "%s could not start: %s is not a path, and programs are not searched for", spec.Name, spec.Args[0])
	case errors.Is(err, os.ErrNotExist):
		return problem.Wrap(err, problem.ProgramFailed, "see that "+spec.Name+" is installed there", "%s could not start: there is no %s", spec.Name, path)
	case err != nil:
		return problem.Wrap(err, problem.ProgramFailed, "check the path and its permissions", "%s could not start", spec.Name)
	case st.IsDir():
		return problem.New(problem.ProgramFailed, "give the program's path", "%s could not start: %s is a directory", spec.Name, path)
	}
	return nil
}

func nameOr(name string) string {
	if name == "" {
		return "a program"
	}
	return name
}

// path is where Args[0] is seen from here: the program is looked for after the change of directory.
func (s *Spec) path() string {
	if s.Dir == "" || filepath.IsAbs(s.Args[0]) {
		return s.Args[0]
	}
	return filepath.Join(s.Dir, s.Args[0])
}

// cannot turns an error of starting into a problem with the reason in words.
func cannot(spec Spec, err error) error {
	why, next := "", "see the reason above; run it by hand: "+Join(spec.Args)
	path := spec.path()
	switch {
	case errors.Is(err, syscall.ENOENT):
		why = "; it exists, so its interpreter or loader does not"
		if line := shebang(path); line != "" {
			why = fmt.Sprintf("; its interpreter, named in its first line %q, does not exist", line)
		}
		next = "reinstall " + spec.Name + ", environments cannot be moved"
	case errors.Is(err, syscall.EACCES):
		why, next = "; "+path+" may not be executed", "check the permissions with: ls -l "+Join([]string{path})
	case errors.Is(err, syscall.ENOEXEC):
		why, next = "; "+path+" is not a program for this machine", "see what it is with: file "+Join([]string{path})
	case errors.Is(err, syscall.E2BIG):
		why, next = "; its arguments and environment are too long", "shorten the arguments, or use a file"
	case errors.Is(err, syscall.EINVAL):
		why, next = "; an argument or environment entry has a NUL byte", "remove the NUL byte"
	case errors.Is(err, syscall.EAGAIN), errors.Is(err, syscall.ENOMEM):
		why, next = "; this user or machine has too many processes or too little memory", "check the limits with: ulimit -a; free -m"
	case errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE):
		why, next = "; too many files are open", "raise the limit: ulimit -n"
	}
	return problem.Wrap(err, problem.ProgramFailed, next, "%s could not start%s", spec.Name, why)
}

func logProblem(spec Spec, err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return problem.Wrap(err, problem.DiskFull, "make room, then start again", "%s could not start: no space for its log %s", spec.Name, spec.Log)
	}
	return problem.Wrap(err, problem.ProgramFailed, "check that the directory exists and may be written", "%s could not start: its log cannot be opened", spec.Name)
}

// shebang gives the interpreter line of a script without "#!", or "".
func shebang(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer closeAll(f)
	b := make([]byte, 256) // the kernel reads no more (BINPRM_BUF_SIZE)
	n, err := io.ReadFull(f, b)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
		return ""
	}
	line, _, _ := bytes.Cut(b[:n], []byte{'\n'})
	if rest, ok := bytes.CutPrefix(line, []byte("#!")); ok {
		return strings.TrimSpace(string(rest))
	}
	return ""
}
