package chaos

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// wire is one connection: two pipes that may end one another.
type wire struct{ up, down *pipe }

func newWire(s Script) *wire {
	w := &wire{}
	w.up, w.down = newPipe(w, s.Up), newPipe(w, s.Down)
	return w
}

// Pipe gives the two ends of a connection without a network.
func Pipe(s Script) (near, far *Conn) {
	w := newWire(s)
	return &Conn{in: w.down, out: w.up}, &Conn{in: w.up, out: w.down}
}

// broken ends both directions at once for both ends.
func (w *wire) broken(err error) {
	for _, p := range []*pipe{w.up, w.down} {
		p.set(func() { p.breakLocked(err) })
	}
}

// pipe is one direction: bytes come out Delay after they went in, at Rate, and writers wait while Queue bytes are under way.
type pipe struct {
	way  Way
	wire *wire

	mu       sync.Mutex // guards the rest
	changed  *sync.Cond
	segments []segment
	queued   int
	passed   int64     // bytes that were let in
	free     time.Time // when the line has sent what is queued
	dead     bool      // swallows everything
	closed   error     // for the reader, after what is queued
	refused  error     // for the writer
	last     error     // what the reader finds when it has read everything that came before a fate
	readBy   time.Time
	writeBy  time.Time
}

type segment struct {
	at   time.Time
	data []byte
}

func newPipe(w *wire, way Way) *pipe {
	if way.Queue == 0 {
		way.Queue = 1 << 20
	}
	p := &pipe{way: way, wire: w}
	p.changed = sync.NewCond(&p.mu)
	return p
}

func (p *pipe) set(f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f()
	p.changed.Broadcast()
}

func (p *pipe) breakLocked(err error) {
	p.segments, p.queued = nil, 0
	p.dead = true
	if p.closed == nil {
		p.closed = err
	}
	if p.refused == nil {
		p.refused = err
	}
}

func (p *pipe) dieLocked() { p.dead, p.segments, p.queued = true, nil, 0 }

// waitLocked waits for a change, or until a time.
func (p *pipe) waitLocked(until time.Time) {
	if !until.IsZero() {
		t := time.AfterFunc(time.Until(until), p.changed.Broadcast)
		defer t.Stop()
	}
	p.changed.Wait()
}

func past(t time.Time) bool { return !t.IsZero() && !time.Now().Before(t) }

func (p *pipe) read(b []byte) (int, error) {
	n, last, err := p.take(b)
	if last != nil {
		p.wire.broken(last)
		return p.read(b)
	}
	return n, err
}

// take is read, up to the point where a fate has to end the connection.
func (p *pipe) take(b []byte) (n int, last, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		if past(p.readBy) {
			return 0, nil, os.ErrDeadlineExceeded
		}
		until := p.readBy
		if len(p.segments) > 0 {
			s := &p.segments[0]
			if !s.at.After(time.Now()) {
				n := copy(b, s.data)
				if s.data = s.data[n:]; len(s.data) == 0 {
					p.segments = p.segments[1:]
				}
				p.queued -= n
				p.changed.Broadcast()
				return n, nil, nil
			}
			if until.IsZero() || s.at.Before(until) {
				until = s.at
			}
		} else {
			if p.last != nil && p.closed == nil {
				return 0, p.last, nil
			}
			if p.closed != nil {
				return 0, nil, p.closed
			}
		}
		p.waitLocked(until)
	}
}

func (p *pipe) write(b []byte) (int, error) {
	total := 0
	for total < len(b) {
		n, halfCut, err := p.put(b[total:])
		total += n
		if halfCut {
			other := p.other()
			other.set(func() { other.dieLocked(); other.closed = syscall.ECONNRESET })
		}
		if err != nil {
			return total, err
		}
	}
	return total, nil
}

func (p *pipe) other() *pipe {
	if p == p.wire.down {
		return p.wire.up
	}
	return p.wire.down
}

// put writes the next piece. With halfCut the writer's other direction has ended too.
func (p *pipe) put(b []byte) (n int, halfCut bool, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		switch {
		case p.refused != nil:
			return 0, false, p.refused
		case past(p.writeBy):
			return 0, false, os.ErrDeadlineExceeded
		case p.queued >= p.way.Queue:
			p.waitLocked(p.writeBy)
			continue
		}
		break
	}
	b = b[:min(len(b), 16<<10)]
	if p.way.Then != Whole {
		if left := p.way.After - p.passed; left > 0 {
			b = b[:min(left, int64(len(b)))]
		} else {
			then := p.way.Then
			p.way.Then = Whole
			switch then {
			case Cut:
				p.last = syscall.ECONNRESET
			case End:
				p.last = io.EOF
			case Swallow:
				p.dead = true // what was let in still arrives
			case HalfCut:
				p.dead, p.refused = true, syscall.ECONNRESET
				return 0, true, p.refused
			case Damage:
				b = []byte{b[0] ^ 0x10}
			}
		}
	}
	p.passLocked(b)
	return len(b), false, nil
}

// passLocked puts bytes on their way.
func (p *pipe) passLocked(piece []byte) {
	if now := time.Now(); p.free.Before(now) {
		p.free = now
	}
	if p.way.Rate > 0 {
		p.free = p.free.Add(time.Duration(float64(len(piece)) / p.way.Rate * float64(time.Second)))
	}
	p.passed += int64(len(piece))
	p.queued += len(piece) // of a dead direction nothing is taken out any more
	if !p.dead && p.last == nil {
		p.segments = append(p.segments, segment{p.free.Add(p.way.Delay), bytes.Clone(piece)})
	}
	p.changed.Broadcast()
}

// Conn is one end of a connection.
type Conn struct{ in, out *pipe }

// Read is net.Conn's.
func (c *Conn) Read(b []byte) (int, error) { return c.in.read(b) }

// Write is net.Conn's.
func (c *Conn) Write(b []byte) (int, error) { return c.out.write(b) }

// Close is net.Conn's: what was written still arrives. The other end learns of it unless the way there is dead.
func (c *Conn) Close() error {
	reaches := false
	c.out.set(func() {
		reaches = !c.out.dead
		c.out.refused = net.ErrClosed
		if c.out.closed == nil && reaches {
			c.out.closed = io.EOF
		}
	})
	c.in.set(func() {
		c.in.dieLocked()
		c.in.closed = net.ErrClosed
		if c.in.refused == nil && reaches {
			c.in.refused = syscall.EPIPE
		}
	})
	return nil
}

// CloseWrite ends one direction in order.
func (c *Conn) CloseWrite() error {
	c.out.set(func() {
		c.out.refused = net.ErrClosed
		if c.out.closed == nil && !c.out.dead {
			c.out.closed = io.EOF
		}
	})
	return nil
}

// LocalAddr is net.Conn's.
func (c *Conn) LocalAddr() net.Addr { return addr{} }

// RemoteAddr is net.Conn's.
func (c *Conn) RemoteAddr() net.Addr { return addr{} }

// SetDeadline is net.Conn's.
func (c *Conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// SetReadDeadline is net.Conn's.
func (c *Conn) SetReadDeadline(t time.Time) error {
	c.in.set(func() { c.in.readBy = t })
	return nil
}

// SetWriteDeadline is net.Conn's.
func (c *Conn) SetWriteDeadline(t time.Time) error {
	c.out.set(func() { c.out.writeBy = t })
	return nil
}

type addr struct{}

func (addr) Network() string { return "chaos" }
func (addr) String() string  { return "chaos" }

type listener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *listener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *listener) Addr() net.Addr { return addr{} }
