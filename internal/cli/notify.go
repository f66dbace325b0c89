package cli

import (
	"context"
	"log/slog"
	"net"
	"os"
	"strconv"
	"time"
)

// manager is the service manager that started this process, as far as it wants to hear of it: systemd, for a unit of
// Type=notify (sd_notify(3)). Without one every call does nothing.
type manager struct {
	log    *slog.Logger
	socket string        // NOTIFY_SOCKET
	every  time.Duration // the longest that it wants to hear nothing; 0: as long as may be
}

func newManager(log *slog.Logger) manager {
	m := manager{log: log, socket: os.Getenv("NOTIFY_SOCKET")}
	us, err := strconv.ParseInt(os.Getenv("WATCHDOG_USEC"), 10, 64)
	if pid := os.Getenv("WATCHDOG_PID"); err == nil && us > 0 && (pid == "" || pid == strconv.Itoa(os.Getpid())) {
		m.every = time.Duration(us) * time.Microsecond
	}
	return m
}

// patience is how long a manager that does not listen holds up the service.
const patience = time.Second

func (m manager) tell(state string) {
	if m.socket == "" {
		return
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: m.socket, Net: "unixgram"})
	if err == nil {
		defer c.Close()
		if err = c.SetWriteDeadline(time.Now().Add(patience)); err == nil {
			_, err = c.Write([]byte(state))
		}
	}
	if err != nil {
		m.log.Warn("the service manager could not be told", "state", state, "err", err)
	}
}

// status is what `systemctl status` shows.
func (m manager) status(text string) { m.tell("STATUS=" + text) }

// run says that the service is ready, and that it lives, at half the interval that the manager wants (WatchdogSec=): each
// time only after alive has returned, so that a process that hangs is started again. It returns when ctx is done.
func (m manager) run(ctx context.Context, alive func()) {
	m.tell("READY=1")
	defer m.tell("STOPPING=1")
	if m.every == 0 {
		<-ctx.Done()
		return
	}
	t := time.NewTicker(max(m.every/2, time.Millisecond))
	defer t.Stop()
	for {
		alive()
		m.tell("WATCHDOG=1")
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
	}
}
