package relay

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

var buffers = sync.Pool{New: func() any { return new([bufferSize]byte) }}

// join carries bytes and ends between a program's connection and its stream until both directions have ended,
// or one failed, or ctx is done; then neither is open any more.
func join(ctx context.Context, conn net.Conn, s Stream) {
	// Once is enough: a reset of a stream that is gone and a close of a closed connection have no effect, but an
	// abort must not overtake the orderly end below.
	fail := sync.OnceFunc(func() {
		_ = s.Reset()
		abort(conn)
	})
	stop := context.AfterFunc(ctx, fail)
	over := make(chan struct{}) // both directions have ended
	var watch sync.WaitGroup
	var ways sync.WaitGroup
	var mu sync.Mutex
	failed := false
	var told atomic.Bool // the program has been, or is being, told the stream's end
	end := func(err error) {
		if err != nil {
			mu.Lock()
			failed = true
			mu.Unlock()
			fail()
		}
	}
	ways.Go(func() {
		err := carry(conn, s)
		if err == nil && died(conn) && !told.Load() {
			err = syscall.ECONNRESET
		}
		if err == nil {
			// The program will send no more, but may still be killed while it waits for its answer; only the
			// kernel knows, since reads give io.EOF from now on.
			watch.Go(func() {
				if waitReset(conn, over) {
					end(syscall.ECONNRESET)
				}
			})
			err = s.CloseWrite()
		}
		end(err)
	})
	ways.Go(func() {
		err := carry(s, conn)
		if err == nil {
			told.Store(true)
			err = closeWrite(conn)
		}
		end(err)
	})
	ways.Wait()
	close(over)
	if !stop() {
		fail() // ctx ended; a second call waits for the first
	}
	mu.Lock()
	ok := !failed
	mu.Unlock()
	if ok {
		// Everything was written: an orderly close leaves the delivery of the last bytes to the kernel and the session.
		_ = s.Close()
		_ = conn.Close()
	}
	watch.Wait()
}

// carry copies until from ends (nil) or either fails.
func carry(from io.Reader, to io.Writer) error {
	b := buffers.Get().(*[bufferSize]byte) //nolint:errcheck // the pool holds nothing else
	defer buffers.Put(b)
	for {
		n, err := from.Read(b[:])
		if n > 0 {
			if _, werr := to.Write(b[:n]); werr != nil {
				return werr
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// closeWrite tells the program that no more comes. A transport without half-close can only be closed.
func closeWrite(c net.Conn) error {
	if h, ok := c.(interface{ CloseWrite() error }); ok {
		return h.CloseWrite()
	}
	return c.Close()
}

// abort ends c by a TCP reset, so that the program does not take the end for an orderly one. A unix socket knows no
// reset: its program sees the end of the stream, or a reset if bytes of its own were never read.
func abort(c net.Conn) {
	if l, ok := c.(interface{ SetLinger(int) error }); ok {
		_ = l.SetLinger(0)
	}
	_ = c.Close()
}

// died tells that a TCP connection is over in the kernel. The kernel reports a reset once: if a write was told, reads give
// io.EOF, which passed on would make half an answer look whole. Only before this end has sent its own end is that
// certain, for an orderly connection is over in the kernel too once both ends have been sent.
func died(c net.Conn) bool {
	t, ok := c.(*net.TCPConn)
	if !ok {
		return false
	}
	raw, err := t.SyscallConn()
	if err != nil {
		return true
	}
	const tcpClose = 7 // TCP_CLOSE in the kernel's net/tcp_states.h
	over := false
	err = raw.Control(func(fd uintptr) {
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		over = err == nil && info.State == tcpClose
	})
	return over || err != nil
}

// waitReset waits until the peer of a connection that has sent its end resets it (true), or over is closed
// (false). Connections that no descriptor stands behind are never reset.
func waitReset(c net.Conn, over <-chan struct{}) bool {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return false
	}
	reset := false
	// The runtime calls this again each time the descriptor's state changes, and returns when c is closed.
	_ = raw.Read(func(fd uintptr) bool {
		select {
		case <-over:
			return true
		default:
		}
		p := []unix.PollFd{{Fd: int32(fd)}} // no events asked for: errors and hang-ups are told anyway
		if n, err := unix.Poll(p, 0); err == nil && n > 0 && p[0].Revents&unix.POLLERR != 0 {
			reset = true
			return true
		}
		return false
	})
	return reset
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
