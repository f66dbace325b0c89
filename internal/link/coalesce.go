package link

import (
	"io"
	"net"
	"sync"
	"sync/atomic"
)

// crypto/tls writes each record with a system call of its own, and reads little more than one at a time. A record has at most 16 KiB,
// so that a path over two processes spends more on calls and wake-ups than on ciphers. Between TLS and the network, records of one
// write go together, and what has come is read ahead.
const (
	// maxRecord is the largest TLS record on the wire, in bytes (RFC 8446, 5.2).
	maxRecord = 5 + 1<<14 + 256
	// wireBuffer is what is read ahead, and written together, at most: 32 records and their heads.
	wireBuffer = 32*(5+1<<14+17) + 1<<10
)

var wireBuffers = sync.Pool{New: func() any { return new([wireBuffer]byte) }}

func wire() *[wireBuffer]byte {
	return wireBuffers.Get().(*[wireBuffer]byte) //nolint:errcheck,forcetypeassert // the pool holds nothing else
}

// Coalesce makes the connection for a TLS connection to lie on that is to carry a link: see [Splice] and [Dial], which use it where it
// is there. For others it changes nothing.
func Coalesce(c net.Conn) net.Conn { return &coalescer{Conn: c} }

// coalescer has one reader at a time, as what lies below TLS has.
type coalescer struct {
	net.Conn

	much  bool // the last read filled its buffer: read ahead
	ahead *[wireBuffer]byte
	at    int          // of ahead: what was taken
	left  atomic.Int64 // of ahead, behind at: what was not

	mu   sync.Mutex // guards the rest
	held bool
	out  *[wireBuffer]byte // what was written while it was held; nil: nothing
	n    int
}

// coalescerOf finds the one that a connection lies on; nil if it lies on none.
func coalescerOf(c net.Conn) *coalescer {
	for ; c != nil; c = below(c) {
		if w, ok := c.(*coalescer); ok {
			return w
		}
	}
	return nil
}

// NetConn gives the connection below, as tls.Conn's does.
func (c *coalescer) NetConn() net.Conn { return c.Conn }

// ready tells whether a whole record is there, so that TLS can be read without waiting. A nil coalescer never is.
func (c *coalescer) ready() bool { return c != nil && c.left.Load() >= maxRecord }

// Read implements net.Conn. A connection of which little comes holds no buffer.
func (c *coalescer) Read(b []byte) (int, error) {
	left := int(c.left.Load())
	if left == 0 {
		if !c.much || len(b) >= wireBuffer {
			n, err := c.Conn.Read(b)
			c.much = n == len(b)
			return n, err
		}
		c.ahead = wire()
		n, err := c.Conn.Read(c.ahead[:])
		c.much = n >= maxRecord
		c.at, left = 0, n
		if n == 0 {
			c.put()
			return 0, err
		}
		// An error that came with bytes comes again.
	}
	n := copy(b, c.ahead[c.at:c.at+left])
	c.at += n
	c.left.Store(int64(left - n))
	if n == left {
		c.put()
	}
	return n, nil
}

func (c *coalescer) put() {
	wireBuffers.Put(c.ahead)
	c.ahead = nil
}

// Write implements net.Conn.
func (c *coalescer) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.held {
		return c.Conn.Write(b)
	}
	if c.out != nil && c.n+len(b) > wireBuffer {
		if err := c.flushLocked(); err != nil {
			return 0, err
		}
	}
	if len(b) > wireBuffer {
		return c.Conn.Write(b)
	}
	if c.out == nil {
		c.out = wire()
	}
	c.n += copy(c.out[c.n:], b)
	return len(b), nil
}

func (c *coalescer) flushLocked() error {
	if c.out == nil {
		return nil
	}
	_, err := c.Conn.Write(c.out[:c.n])
	wireBuffers.Put(c.out)
	c.out, c.n = nil, 0
	return err
}

// hold has what is written wait until it is released.
func (c *coalescer) hold() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.held = true
}

func (c *coalescer) release() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.held = false
	return c.flushLocked()
}

// writeTo writes b to a connection that lies on c, which may be nil.
func (c *coalescer) writeTo(to net.Conn, b []byte) error {
	if c == nil || len(b) <= 1<<14 { // of one record there is nothing to put together
		_, err := to.Write(b)
		return err
	}
	c.hold()
	_, err := to.Write(b)
	if e := c.release(); err == nil {
		err = e
	}
	return err
}

// readFrom reads what is there of a reader that lies on c, which may be nil, after waiting for the first of it.
func (c *coalescer) readFrom(r io.Reader, b []byte) (int, error) {
	n, err := r.Read(b)
	for err == nil && n < len(b) && c.ready() {
		var k int
		k, err = r.Read(b[n:])
		n += k
	}
	return n, err
}
