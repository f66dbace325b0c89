// Package chaos is a network that fails as it is told, for tests of what runs over it, and the tests that put the link
// through it. Connections delay, crawl, stall, break off after so many bytes, die in one direction or for one end only, or
// damage a bit; each does what its script says, so that a failure can be had again. Nothing real is involved: inside a
// testing/synctest bubble, time is the bubble's; but [Proxy] is a real HTTP proxy on a real port. It knows nothing of what it
// carries. Start with [Network].
package chaos

import (
	"context"
	"net"
	"sync"
	"syscall"
	"time"
)

// Fate is what happens to one direction of a connection after so many bytes.
type Fate int

// Fates. After any of them but Whole and Damage, no further byte of that direction arrives.
const (
	Whole   Fate = iota // nothing
	Cut                 // both ends see a reset; what is under way the other way is lost
	End                 // both ends see an end, as if a proxy between them had closed in order
	Swallow             // nobody is told: that direction is dead from now on, the other works
	HalfCut             // the sender sees a reset; the receiver is told nothing and may go on sending into the void
	Damage              // one bit of the next byte is turned, all others arrive
)

// Way is one direction. The zero value is perfect.
type Way struct {
	Delay time.Duration // from one end to the other
	Rate  float64       // bytes per second; 0: no limit
	Queue int           // bytes under way before the sender has to wait; 0: 1 MiB
	After int64         // bytes that arrive before Then
	Then  Fate
}

// Script is what a connection does. Up is from the end that dials.
type Script struct {
	Up, Down Way
	Refused  bool // there is no connection at all
}

// Network carries connections from [Network.Dial] to [Network.Listener].
type Network struct {
	// Next gives the script of the n-th connection, counted from 0; nil: all are perfect. It is called by one Dial at a time.
	Next func(n int) Script

	mu    sync.Mutex // guards the rest
	ln    *listener
	count int
	last  *wire
	down  bool
}

// Listener gives the far end of all connections; Dial waits for it to accept.
func (n *Network) Listener() net.Listener {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.listenLocked()
}

func (n *Network) listenLocked() *listener {
	if n.ln == nil {
		n.ln = &listener{conns: make(chan net.Conn), closed: make(chan struct{})}
	}
	return n.ln
}

// Dial makes the next connection.
func (n *Network) Dial(ctx context.Context) (net.Conn, error) {
	n.mu.Lock()
	s := Script{}
	if n.Next != nil {
		s = n.Next(n.count)
	}
	n.count++
	ln := n.listenLocked()
	if s.Refused || n.down {
		n.mu.Unlock()
		return nil, &net.OpError{Op: "dial", Net: "chaos", Err: syscall.ECONNREFUSED}
	}
	w := newWire(s)
	n.last = w
	n.mu.Unlock()
	select {
	case ln.conns <- &Conn{in: w.up, out: w.down}:
		return &Conn{in: w.down, out: w.up}, nil
	case <-ln.closed:
		return nil, &net.OpError{Op: "dial", Net: "chaos", Err: syscall.ECONNREFUSED}
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Count is how many connections were asked for.
func (n *Network) Count() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.count
}

// Cut resets the newest connection.
func (n *Network) Cut() {
	n.mu.Lock()
	w := n.last
	n.mu.Unlock()
	if w != nil {
		w.broken(syscall.ECONNRESET)
	}
}

// Swallow kills the newest connection without telling its ends; up, down or both.
func (n *Network) Swallow(up, down bool) {
	n.mu.Lock()
	w := n.last
	n.mu.Unlock()
	if w == nil {
		return
	}
	if up {
		w.up.set(w.up.dieLocked)
	}
	if down {
		w.down.set(w.down.dieLocked)
	}
}

// SetDown has all further dials refused, or not.
func (n *Network) SetDown(down bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.down = down
}
