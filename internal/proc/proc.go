// Package proc runs other programs and answers for them: each gets a process group of its own, its
// output goes line by line to a log file and to whoever listens, and when it ends, or is stopped,
// everything that it left behind is ended too. One-shot commands have bounded output and end with
// their context.
//
// It knows nothing of Flower, never uses a shell, does not restart what died and does not decide
// what an exit code means for a job. Linux only.
//
// Start with [Start] and [Process.Stop], or [Run] for a one-shot command. The way of a program's end:
//
//	leader ends ─▶ (still a zombie, so its pid and group cannot be reused)
//	            ─▶ sweep: group, tree, marked and pipe-holding processes are killed until none is left
//	            ─▶ leader reaped ─▶ output read to its end ─▶ log closed ─▶ Done
package proc

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"syscall"
	"time"
)

// Exit codes that this layer gives to what did not end by itself, the same numbers as in the
// reference system (NVIDIA FLARE 2.5–2.9, nvflare/app_common/tie/defs.py and process_mgr.py).
const (
	ExitCannotStart = 101 // the program could not be started
	ExitFatal       = 102 // a fatal error outside of the program ended it
	ExitException   = 103 // the app itself failed although its program ended well
)

const (
	// MaxLine is the largest part of a line, in bytes, that OnLine and the echo get; the log gets all.
	// It is also the longest form of a progress line that can still be replaced by the next form.
	MaxLine = 64 << 10
	// DefaultMaxOutput is what [Run] keeps of each stream, in bytes, if Spec.MaxOutput is 0.
	DefaultMaxOutput = 8 << 20

	tailLines = 50      // lines kept for Tail
	tailBytes = 4 << 10 // of each
)

// MarkVar is the environment variable by which [KillMarked] finds processes.
const MarkVar = "PERGOLA_MARK"

// Spec says what to run and where its output goes.
type Spec struct {
	Name    string                                    // for messages, e.g. "flower-superlink"; default: the last part of Args[0]
	Args    []string                                  // argv; Args[0] is a path and is not searched for on PATH
	Dir     string                                    // working directory; "" is the caller's
	Env     []string                                  // the complete environment, "K=V", the last of equal keys counts; nil is the caller's
	Log     string                                    // file to append every line to; "" is none
	OpenLog func(path string) (io.WriteCloser, error) // opens Log; nil appends to the file
	Prefix  string                                    // lines are echoed as "[Prefix] line"; "" echoes them bare
	Echo    io.Writer                                 // gets one Write per line; must be safe for use by several programs at a time; nil is no echo

	// Files are given to the program as descriptors 3, 4, …; the caller keeps its own, and closes them.
	Files []*os.File

	// Progress also echoes the passing forms of a progress line, as "\r[Prefix] form".
	Progress bool

	// OnLine gets each finished line in order, without its newline, as valid UTF-8 (invalid bytes
	// replaced by U+FFFD) of at most MaxLine bytes. It is called on the reading goroutine: while it
	// blocks, the program's output waits. It must not wait for the program (Stop, Done, Exit).
	OnLine func(line string)

	// OnLogError is called once, when the log could not be written (ENOSPC and others) or closed;
	// from then on nothing more is logged, but the program's output is still read and echoed.
	OnLogError func(error)

	// MaxOutput is for Run only: bytes kept of each of stdout and stderr; 0 is DefaultMaxOutput.
	MaxOutput int
}

// Exit tells how a program ended.
type Exit struct {
	Code   int            // its own code, or the negative number of the signal: -9 killed, -15 terminated
	Signal syscall.Signal // the signal that ended it, 0 if it exited
	OOM    bool           // the kernel counted an out-of-memory kill in its cgroup, and nobody else killed it
}

// OK tells whether the program ended with code 0.
func (e Exit) OK() bool { return e == Exit{} }

// String gives for example "exit code 3" or "killed by signal 9 (killed)".
func (e Exit) String() string {
	switch {
	case e.OOM:
		return "killed by the kernel for want of memory"
	case e.Signal != 0:
		return fmt.Sprintf("ended by signal %d (%s)", int(e.Signal), e.Signal)
	case e.Code == ExitCannotStart:
		return "exit code 101 (cannot start)"
	}
	return "exit code " + strconv.Itoa(e.Code)
}

// Times that are not the caller's to choose. They bound waits for things that should not happen.
const (
	killPatience  = 10 * time.Second // for killed processes to be gone; one in uninterruptible sleep may stay
	drainPatience = 2 * time.Second  // for the end of the output once nothing that we may kill holds the pipe
	runGrace      = time.Second      // between SIGTERM and SIGKILL when Run's context ends
)
