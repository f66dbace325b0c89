package link

import (
	"context"
	"errors"
	"net"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// spliceBuffer is what one direction of a splice reads at a time, in bytes: four TLS records.
const spliceBuffer = 64 << 10

var buffers = sync.Pool{New: func() any { return new([spliceBuffer]byte) }}

// transport is the connection below a session: a read that hears nothing for Silence fails, and so does a write
// that moves nothing for writeStall. Deadlines are renewed once a second at most, which costs nothing.
type transport struct {
	net.Conn
	heard, sent time.Time // when the deadlines were last set; one reader, one writer
}

func (t *transport) Read(b []byte) (int, error) {
	if now := time.Now(); now.Sub(t.heard) > time.Second {
		t.heard = now
		if err := t.SetReadDeadline(now.Add(Silence)); err != nil {
			return 0, err
		}
	}
	return t.Conn.Read(b)
}

func (t *transport) Write(b []byte) (int, error) {
	if now := time.Now(); now.Sub(t.sent) > time.Second {
		t.sent = now
		if err := t.Conn.SetWriteDeadline(now.Add(writeStall)); err != nil {
			return 0, err
		}
	}
	return t.Conn.Write(b)
}

// SetWriteDeadline ignores the multiplexer's, which would take a slow path for a dead one: it is as short as its wait
// for a ping.
func (t *transport) SetWriteDeadline(time.Time) error { return nil }

// tune makes the kernel give up a TCP peer that acknowledges nothing, in about the time in which a session would. A
// splice in the middle of writing does not otherwise notice a dead peer for a quarter of an hour.
func tune(c net.Conn) {
	if t, ok := c.(interface{ NetConn() net.Conn }); ok { // crypto/tls
		c = t.NetConn()
	}
	t, ok := c.(*net.TCPConn)
	if !ok {
		return
	}
	_ = t.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: 5 * time.Second, Interval: 5 * time.Second, Count: 3})
	if raw, err := t.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) {
			// Best effort: where it cannot be set, the keep-alive above and the kernel's own limit remain.
			_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(20*time.Second/time.Millisecond))
		})
	}
}

// closeWrite passes an end on. A transport without half-close can only be closed.
func closeWrite(c net.Conn) error {
	if h, ok := c.(interface{ CloseWrite() error }); ok {
		return h.CloseWrite()
	}
	return c.Close()
}

// ignoreClosed drops the error of closing what was closed by a context already.
func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// isTransient tells that accepting may go on: the connection was gone already, or descriptors or memory ran out for now.
func isTransient(err error) bool {
	for _, e := range []error{syscall.ECONNABORTED, syscall.EINTR, syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
