package e2e

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"
)

// network forwards connections to an address, until it is told to fail.
type network struct {
	ln net.Listener
	to string

	slow *slowness // nil: as fast as this machine

	// passed is told when a connection has carried so many bytes towards the address (out) or from it; true breaks that connection. 0:
	// nobody is told.
	much   int64
	passed func(out bool) bool

	mu    sync.Mutex // guards the rest
	state netState
	conns map[net.Conn]struct{}
	wg    sync.WaitGroup
}

// slowness is what a TCP connection over a bad line looks like from its ends: late, slow, and standing still for a while
// where a packet was lost, since what comes behind it has to wait.
type slowness struct {
	delay time.Duration // one way
	rate  float64       // bytes per second, of each connection and direction
	loss  float64       // the share of packets that are sent again
	rand  *rand.Rand
	mu    sync.Mutex // guards rand
}

// packet is what a line carries at once; resend is the least time after which TCP sends again (RFC 6298 has 1 s, Linux 0.2 s).
const (
	packet = 1400
	resend = 200 * time.Millisecond
)

// lost tells whether a packet is.
func (s *slowness) lost() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.rand.Float64() < s.loss
}

// copy carries bytes so; forward tells whether they may pass.
func (s *slowness) copy(dst io.Writer, src io.Reader, forward func() bool) {
	type piece struct {
		data []byte
		at   time.Time
	}
	line := make(chan piece, 512) // 700 KB under way
	done := make(chan struct{})
	go func() {
		defer close(done)
		for p := range line {
			time.Sleep(time.Until(p.at))
			if forward() {
				if _, err := dst.Write(p.data); err != nil {
					break
				}
			}
		}
		for range line { // the reader must not be held up
		}
	}()
	free := time.Now()
	for {
		buf := make([]byte, packet)
		n, err := src.Read(buf)
		if n > 0 {
			if now := time.Now(); free.Before(now) {
				free = now
			}
			free = free.Add(time.Duration(float64(n) / s.rate * float64(time.Second)))
			if s.lost() {
				free = free.Add(2*s.delay + resend)
			}
			line <- piece{buf[:n], free.Add(s.delay)}
		}
		if err != nil {
			break
		}
	}
	close(line)
	<-done
}

type netState int

const (
	up   netState = iota
	cut           // connections break, and there are no new ones
	hole          // nobody is told: bytes vanish
)

// forward starts a network between whoever dials its address and the given one. It ends with the test.
func forward(t *testing.T, to string) *network {
	t.Helper()
	return (&network{to: to}).start(t)
}

func forwardSlowly(t *testing.T, to string, slow *slowness) *network {
	t.Helper()
	return (&network{to: to, slow: slow}).start(t)
}

func (n *network) start(t *testing.T) *network {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	n.ln, n.conns = ln, map[net.Conn]struct{}{}
	n.wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			n.wg.Go(func() { n.carry(c) })
		}
	})
	t.Cleanup(func() {
		ln.Close()
		n.set(cut)
		n.wg.Wait()
	})
	return n
}

func (n *network) addr() string { return n.ln.Addr().String() }

func (n *network) set(s netState) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if s == n.state {
		return
	}
	n.state = s
	if s == cut || s == up { // what was in a hole is lost when the network comes back
		for c := range n.conns {
			reset(c)
		}
	}
}

func reset(c net.Conn) {
	if t, ok := c.(*net.TCPConn); ok {
		_ = t.SetLinger(0)
	}
	_ = c.Close()
}

// add takes note of a connection, unless there is no network.
func (n *network) add(c net.Conn) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.state == cut {
		return false
	}
	n.conns[c] = struct{}{}
	return true
}

func (n *network) passes() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.state == up
}

func (n *network) carry(c net.Conn) {
	defer reset(c)
	if !n.add(c) {
		return
	}
	defer func() {
		n.mu.Lock()
		delete(n.conns, c)
		n.mu.Unlock()
	}()
	far, err := net.Dial("tcp", n.to)
	if err != nil || !n.add(far) {
		return
	}
	defer func() {
		reset(far)
		n.mu.Lock()
		delete(n.conns, far)
		n.mu.Unlock()
	}()
	done := make(chan struct{}, 2)
	for _, way := range [][2]net.Conn{{c, far}, {far, c}} {
		n.wg.Go(func() {
			n.copy(way[1], way[0], way[1] == far)
			done <- struct{}{}
		})
	}
	<-done // one way's end ends both: TLS needs no half-closed connections
}

func (n *network) copy(dst, src net.Conn, out bool) {
	if n.slow != nil {
		n.slow.copy(dst, src, n.passes)
		return
	}
	buf := make([]byte, 64<<10)
	for total := int64(0); ; {
		k, err := src.Read(buf)
		if k > 0 && n.passes() {
			if _, werr := dst.Write(buf[:k]); werr != nil {
				return
			}
			total += int64(k)
			if total >= n.much && total-int64(k) < n.much && n.passed(out) {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// freeAddress gives an address of this machine at which nobody listens now.
func freeAddress(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}

// TestForward shows that the faulty network is one: otherwise the tests that use it show nothing.
func TestForward(t *testing.T) {
	t.Parallel()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() { _, _ = io.Copy(c, c) }()
		}
	}()
	n := forward(t, ln.Addr().String())
	echo := func(c net.Conn) error {
		if _, err := c.Write([]byte("ping")); err != nil {
			return err
		}
		_, err := io.ReadFull(c, make([]byte, 4))
		return err
	}
	c, err := net.Dial("tcp", n.addr())
	if err != nil {
		t.Fatal(err)
	}
	if err := echo(c); err != nil {
		t.Fatal(err)
	}
	n.set(cut)
	if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a cut connection reads: %v", err)
	}
	if c, err := net.Dial("tcp", n.addr()); err == nil {
		if err := echo(c); err == nil {
			t.Error("there is a network after the cut")
		}
		c.Close()
	}
	n.set(up)
	c, err = net.Dial("tcp", n.addr())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := echo(c); err != nil {
		t.Error(fmt.Errorf("after the cut: %w", err))
	}
}
