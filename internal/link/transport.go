package link

import (
	"bufio"
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// spliceBuffer is what one direction of a splice reads at a time, in bytes: 32 TLS records.
const spliceBuffer = 512 << 10

// idleBuffer is what one direction of a splice holds while little comes.
const idleBuffer = 2 << 10

var buffers = sync.Pool{New: func() any { return new([spliceBuffer]byte) }}

// sendBuffer is the most that one write to a transport takes: an ACK, a DATA frame of sendData bytes, a CLOSE, and some of ASK or NO. It is four TLS
// records, as large as they can be.
const (
	sendBuffer = 64 << 10
	sendData   = sendBuffer - (unitHead + ackBody) - unitHead - unitHead - maxLanes*(unitHead+noBody)
)

// sendBuffers have what is written, and what is read of one frame.
var sendBuffers = sync.Pool{New: func() any { return new([sendBuffer]byte) }}

// transport is a line's present connection: one goroutine reads it, one writes.
type transport struct {
	conn net.Conn
	wire *coalescer // that conn lies on; nil: none
	l    *line
	wake chan struct{} // the writer has something to look at
	lost chan struct{} // closed by drop
	last atomic.Int64  // when anything was heard, in nanoseconds since began

	began time.Time

	// Guarded by the line's lock.
	ackAt     time.Time // by when what has come is to be acknowledged; zero if it is
	wrote     time.Time // when the last frame was made
	closeSent bool
	dropped   bool
}

func newTransport(conn net.Conn, l *line) *transport {
	now := time.Now()
	return &transport{conn: conn, wire: coalescerOf(conn), l: l, wake: make(chan struct{}, 1), lost: make(chan struct{}), began: now, wrote: now}
}

// poke has the writer look at the line again.
func (t *transport) poke() {
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

// drop ends the transport without ceremony. The line's lock is held.
func (t *transport) drop() {
	if !t.dropped {
		t.dropped = true
		close(t.lost)
		hardClose(t.conn)
	}
}

// heard is when anything last came.
func (t *transport) heard() time.Time { return t.began.Add(time.Duration(t.last.Load())) }

// while gives a context that is done when the transport is lost, too. The caller ends it.
func (t *transport) while(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		select {
		case <-t.lost:
			cancel()
		case <-ctx.Done():
		}
	}()
	return ctx, func() {
		cancel()
		<-done
	}
}

// run carries the line until the transport is lost or both ends have closed.
func (t *transport) run() {
	var writer sync.WaitGroup
	writer.Go(func() {
		if err := t.write(); err != nil {
			t.l.detach(t, err)
		}
	})
	if err := t.read(); err != nil {
		t.l.detach(t, err)
	}
	writer.Wait()
	// The last words of both ends have been read and written: now the transport may take its own leave.
	_ = t.conn.Close()
	t.l.retire(t)
}

// read takes frames until the other end's CLOSE (nil) or an error.
func (t *transport) read() error {
	r := bufio.NewReaderSize(&watched{t: t}, 4<<10)
	buf := sendBuffers.Get().(*[sendBuffer]byte) //nolint:errcheck // the pool holds nothing else
	defer sendBuffers.Put(buf)
	var head [unitHead + ackBody]byte
	for {
		u, err := readUnit(r, &head)
		if err != nil {
			return noEOF(err)
		}
		switch u.kind {
		case frameData:
			if err := t.l.expect(t, u); err != nil {
				return err
			}
			// Each piece at once: what has arrived of a frame that is cut needs not come again.
			for left := u.length; left > 0; {
				n, err := t.wire.readFrom(r, buf[:min(left, len(buf))])
				if n > 0 {
					left -= n
					if err := t.l.deliver(t, buf[:n]); err != nil {
						return err
					}
				}
				if err != nil {
					return noEOF(err)
				}
			}
		case frameAck:
			if err := t.l.onAck(t, u); err != nil {
				return err
			}
		case frameAsk:
			if err := t.l.ask(t, u.number); err != nil {
				return err
			}
		case frameNo:
			if err := t.l.denied(t, u); err != nil {
				return err
			}
		case frameClose:
			return t.l.onClose(t, u)
		}
	}
}

// write sends frames until both ends have closed (nil) or an error.
func (t *transport) write() error {
	timer := time.NewTimer(pingEvery)
	defer timer.Stop()
	var sent time.Time // when the deadline was last set
	for {
		buf := sendBuffers.Get().(*[sendBuffer]byte) //nolint:errcheck // the pool holds nothing else
		b, until, over, err := t.l.frames(t, buf[:0])
		if len(b) > 0 {
			if now := time.Now(); now.Sub(sent) > time.Second {
				sent = now
				err = t.conn.SetWriteDeadline(now.Add(writeStall))
			}
			if err == nil {
				err = t.wire.writeTo(t.conn, b)
			}
		}
		sendBuffers.Put(buf)
		if err != nil || over {
			return err
		}
		if len(b) > 0 {
			continue
		}
		timer.Reset(time.Until(until))
		select {
		case <-t.wake:
		case <-timer.C:
		case <-t.lost:
			return errReplaced
		}
	}
}

// watched is the reading side: a read that hears nothing for Silence fails. The deadline is renewed once a second at most,
// which costs nothing.
type watched struct {
	t   *transport
	set time.Time
}

func (w *watched) Read(b []byte) (int, error) {
	now := time.Now()
	if now.Sub(w.set) > time.Second {
		w.set = now
		if err := w.t.conn.SetReadDeadline(now.Add(Silence)); err != nil {
			return 0, err
		}
	}
	n, err := w.t.conn.Read(b)
	if n > 0 {
		w.t.last.Store(int64(time.Since(w.t.began)))
	}
	return n, err
}

// hardClose ends a connection that is lost anyway, without waiting to tell its other end.
func hardClose(c net.Conn) {
	_ = innermost(c).Close()
}

// innermost gives the connection below TLS, even if that runs in a proxy's.
func innermost(c net.Conn) net.Conn {
	for b := below(c); b != nil; b = below(c) {
		c = b
	}
	return c
}

// below gives the connection that one lies on; nil if it lies on none.
func below(c net.Conn) net.Conn {
	if t, ok := c.(interface{ NetConn() net.Conn }); ok {
		return t.NetConn()
	}
	return nil
}

// tune makes the kernel give up a TCP peer that acknowledges nothing, in about the time in which a session would. A
// splice in the middle of writing does not otherwise notice a dead peer for a quarter of an hour.
func tune(c net.Conn) {
	t, ok := innermost(c).(*net.TCPConn)
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
