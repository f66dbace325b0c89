package runner

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/pergolafl/pergola/internal/proc"
)

// LeashVar names the process that a runner belongs to, as "pid:start" (see proc.StartTime), where it belongs to one:
// `pergola run`. When that process is gone the runner ends its programs and itself. Runners of services have no leash.
const LeashVar = "PERGOLA_LEASH"

// NewLeash gives the variable's value for the calling process.
func NewLeash() (string, error) {
	start, err := proc.StartTime(os.Getpid())
	return fmt.Sprintf("%d:%d", os.Getpid(), start), err
}

// leash gives a channel that is closed when the process named by LeashVar is gone; nil if there is none.
func leash() (<-chan struct{}, error) {
	v := os.Getenv(LeashVar)
	if v == "" {
		return nil, nil
	}
	var pid int
	var start uint64
	if _, err := fmt.Sscanf(v, "%d:%d", &pid, &start); err != nil {
		return nil, fmt.Errorf("%s=%q: %w", LeashVar, v, err)
	}
	return untilGone(pid, start), nil
}

// untilGone gives a channel that is closed when the process that began at start is no more.
func untilGone(pid int, start uint64) <-chan struct{} {
	gone := make(chan struct{})
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil || !proc.Alive(pid, start) {
		if err == nil {
			_ = unix.Close(fd)
		}
		close(gone)
		return gone
	}
	go func() { // ends with that process
		defer close(gone)
		defer func() { _ = unix.Close(fd) }()
		// Readable when the process ends (pidfd_open(2)). EINTR: look again.
		for {
			n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1)
			if n > 0 || (err != nil && !errors.Is(err, unix.EINTR)) {
				return
			}
		}
	}()
	return gone
}
