package link

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-yamux/v5"

	"github.com/pergolafl/pergola/internal/problem"
)

const (
	// MaxWindow is how many bytes of one stream may be on their way: 1 Gbit/s × 100 ms is 12.5 MB.
	MaxWindow = 16 << 20
	// minWindow is the multiplexer's least.
	minWindow = 256 << 10
	// lineRate is what one stream should be able to fill, in bytes per second: 1 Gbit/s.
	lineRate = 125e6
	// windowBudget bounds what the windows of one session may grow in total beyond their start, in bytes: two streams
	// at full width, so that many readers that stall cannot fill the machine's memory.
	windowBudget = 32 << 20
	// MaxStreams is how many streams the other end may have open at a time; further ones are reset.
	MaxStreams = 4096
	// backlog is how many streams may wait for Accept; the end that opens waits when there are more.
	backlog = 1024
	// orphanWait is how long the other end of a closed stream may take to end its half before it is reset.
	orphanWait = 60 * time.Second
)

// Session carries streams between two runners. Its methods may be called concurrently.
type Session struct {
	peer Peer
	id   sessionID
	mux  *yamux.Session

	accepted chan *stream
	closing  atomic.Bool // Close was called
	gone     atomic.Bool // superseded by a newer session of the same peer
	shut     sync.Once
	done     chan struct{}
	err      error // set before done is closed

	running sync.WaitGroup
	mu      sync.Mutex
	ended   bool // guarded by mu: nothing new may run
}

func newSession(conn net.Conn, client bool, peer Peer, id sessionID, rtt time.Duration) (*Session, error) {
	c := yamux.DefaultConfig()
	c.AcceptBacklog = backlog
	c.MaxIncomingStreams = MaxStreams
	c.MaxStreamWindowSize = MaxWindow
	c.InitialStreamWindowSize = firstWindow(rtt)
	c.ReadBufSize = 32 << 10
	c.LogOutput = io.Discard // what it would say is in Err
	// Its own keep-alive takes a full send buffer on a slow path for a dead peer; see transport and keepAlive.
	c.EnableKeepAlive = false
	c.ConnectionWriteTimeout = pingWait
	budget := new(budget)
	newMux := yamux.Server
	if client {
		newMux = yamux.Client
	}
	mux, err := newMux(&transport{Conn: conn}, c, budget.span)
	if err != nil {
		return nil, problem.Wrap(err, problem.Internal, "", "the link's streams cannot be set up")
	}
	s := &Session{peer: peer, id: id, mux: mux, accepted: make(chan *stream), done: make(chan struct{})}
	s.running.Go(s.keepAlive)
	s.running.Go(s.acceptLoop)
	return s, nil
}

// firstWindow is what streams start with over a path of that round trip: on a machine or in a house little, so that
// a reader that stalls holds little memory. Twice what is on the way, as room is announced by halves of the window.
// Growing later is no substitute: in go-yamux 5.1.0 each doubling loses half of the old window, since the room made
// before it is never announced (Stream.sendWindowUpdate overwrites delta), so a window that grew is half as wide.
func firstWindow(rtt time.Duration) uint32 {
	return uint32(min(max(2*lineRate*rtt.Seconds(), minWindow), MaxWindow))
}

// Peer gives the other end.
func (s *Session) Peer() Peer { return s.peer }

// Done is closed when the session has ended, however it did.
func (s *Session) Done() <-chan struct{} { return s.done }

// Err gives nil while the session lives, then [ErrClosed], [ErrPeerClosed], or a link-lost problem.
func (s *Session) Err() error {
	select {
	case <-s.done:
		return s.err
	default:
		return nil
	}
}

// Open opens a stream. It waits only while very many streams await their acceptance. The error is that of
// ctx, or of the session.
func (s *Session) Open(ctx context.Context) (Stream, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	y, err := s.mux.OpenStream(ctx)
	if err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		<-s.done // the multiplexer knows before acceptLoop has said so
		return nil, s.err
	}
	return &stream{y: y, s: s}, nil
}

// Accept gives the next stream that the other end opened. The error is that of ctx, or of the session.
func (s *Session) Accept(ctx context.Context) (Stream, error) {
	select {
	case st := <-s.accepted:
		return st, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-s.done:
		return nil, s.err
	}
}

// Close ends the session in order, and waits for the other end for 5 s at most. Streams that were closed for
// writing are delivered, all others are reset. It always returns nil; it may be called often.
func (s *Session) Close() error {
	s.shut.Do(func() {
		s.closing.Store(true)
		timer := time.AfterFunc(closeWait, func() { _ = s.mux.Close() })
		defer timer.Stop()
		// Behind everything that was written: the other end has it all when it reads this, and closes.
		if s.mux.GoAway() == nil {
			<-s.mux.CloseChan()
		}
		_ = s.mux.Close()
	})
	<-s.done
	s.running.Wait()
	return nil
}

// abandon ends the session at once, for a newer one has taken its place.
func (s *Session) abandon() {
	s.gone.Store(true)
	_ = s.mux.Close()
	<-s.done
}

// acceptLoop hands on the other end's streams, and learns why the session ended.
func (s *Session) acceptLoop() {
	for {
		y, err := s.mux.AcceptStream()
		if err != nil {
			s.err = s.why(err)
			s.mu.Lock()
			s.ended = true
			s.mu.Unlock()
			close(s.done)
			return
		}
		select {
		case s.accepted <- &stream{y: y, s: s}:
		case <-s.mux.CloseChan():
		}
	}
}

// spawn runs f as one of the session's own, or gives false if the session has ended.
func (s *Session) spawn(f func()) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.ended {
		s.running.Go(f)
	}
	return !s.ended
}

func (s *Session) why(err error) error {
	const next = "see whether the network, the hub or the other end's machine went away at this time"
	switch {
	case s.gone.Load():
		return problem.New(problem.LinkLost, "", "the other end of the link came back with a new session")
	case s.closing.Load():
		return ErrClosed
	case errors.Is(err, yamux.ErrRemoteGoAway):
		return ErrPeerClosed
	case errors.Is(err, os.ErrDeadlineExceeded):
		return problem.Wrap(err, problem.LinkLost, next, "the other end of the link was not heard for %v", Silence)
	default:
		return problem.Wrap(noEOF(err), problem.LinkLost, next, "the link broke off")
	}
}

// keepAlive makes this end heard. Whether the other end is, transport tells.
func (s *Session) keepAlive() {
	t := time.NewTicker(pingEvery)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			_, _ = s.mux.Ping() // an answer that is late behind bulk data is no sign of death
		case <-s.mux.CloseChan():
			return
		}
	}
}

// Stream is one bidirectional stream of a session. Close ends this end's half and drops what still comes; Reset ends
// both halves at once and without delivery. After a Reset of either end, Read and Write give [ErrReset]. It is an alias,
// so that it is the same type as every interface with this set of methods.
type Stream = interface {
	net.Conn
	CloseWrite() error
	Reset() error
}

// stream makes a yamux stream as strict as a net.Conn: concurrent writers, os.ErrDeadlineExceeded, and a Close that
// the other end notices when it goes on writing.
type stream struct {
	y *yamux.Stream
	s *Session

	reading sync.Mutex // two readers would steal each other's wake-up
	writing sync.Mutex // two writers would overrun the window; neither lock is needed to close or reset

	closeOnce sync.Once
	closeErr  error
	closed    atomic.Bool // Close was called
	finished  atomic.Bool // io.EOF was read
}

func (st *stream) Read(b []byte) (int, error) {
	st.reading.Lock()
	defer st.reading.Unlock()
	if st.closed.Load() {
		return 0, net.ErrClosed
	}
	n, err := st.y.Read(b)
	if n > 0 {
		// With bytes, the error is that of telling the peer about room: once the session is closed what has
		// come before can still be read, and the next Read finds out by itself.
		return n, nil
	}
	if err != nil && st.closed.Load() {
		return 0, net.ErrClosed // Close woke this reader
	}
	if err == io.EOF { //nolint:errorlint // see mapErr: a reset may wrap one
		st.finished.Store(true)
	}
	return n, mapErr(err)
}

func (st *stream) Write(b []byte) (int, error) {
	st.writing.Lock()
	defer st.writing.Unlock()
	n, err := st.y.Write(b)
	return n, mapErr(err)
}

// CloseWrite ends this end's half.
func (st *stream) CloseWrite() error { return mapErr(st.y.CloseWrite()) }

// Reset ends both halves at once.
func (st *stream) Reset() error { return mapErr(st.y.Reset()) }

// Close behaves as TCP's: what was written is delivered, readers are woken, and a peer that writes on is reset instead
// of waiting for room that never comes.
func (st *stream) Close() error {
	st.closeOnce.Do(func() {
		st.closed.Store(true)
		if err := mapErr(st.y.CloseWrite()); !errors.Is(err, ErrReset) {
			st.closeErr = err
		}
		_ = st.y.SetReadDeadline(time.Unix(1, 0)) // a stream that is over needs none, and says so
		if st.finished.Load() || !st.s.spawn(st.orphaned) {
			_ = st.y.CloseRead() // never fails
		}
	})
	return st.closeErr
}

// orphaned waits for the peer's end of a closed stream.
func (st *stream) orphaned() {
	st.reading.Lock()   // the last reader has been woken; later ones see that the stream is closed
	st.reading.Unlock() //nolint:staticcheck // an empty section on purpose: holding it would make them wait
	_ = st.y.SetReadDeadline(time.Now().Add(orphanWait))
	if _, err := st.y.Read(make([]byte, 1)); err != io.EOF { //nolint:errorlint // see mapErr: a reset may wrap one
		_ = st.y.Reset()
	}
}

// LocalAddr gives the transport's address.
func (st *stream) LocalAddr() net.Addr { return st.y.LocalAddr() }

// RemoteAddr gives the transport's other address.
func (st *stream) RemoteAddr() net.Addr { return st.y.RemoteAddr() }

// SetDeadline sets both deadlines.
func (st *stream) SetDeadline(t time.Time) error { return st.y.SetDeadline(t) }

// SetReadDeadline is net.Conn's.
func (st *stream) SetReadDeadline(t time.Time) error { return st.y.SetReadDeadline(t) }

// SetWriteDeadline is net.Conn's.
func (st *stream) SetWriteDeadline(t time.Time) error { return st.y.SetWriteDeadline(t) }

// mapErr gives the errors of this package for the multiplexer's. Only io.EOF itself is the end of a stream: the reset
// of a session whose transport ended wraps one.
func mapErr(err error) error {
	switch {
	case err == nil, err == io.EOF: //nolint:errorlint // a wrapped one is not the stream's end
		return err
	case errors.Is(err, yamux.ErrStreamReset):
		return ErrReset
	case errors.Is(err, yamux.ErrTimeout):
		return os.ErrDeadlineExceeded
	case errors.Is(err, yamux.ErrStreamClosed):
		return net.ErrClosed
	default: // the end of the session
		return ErrReset
	}
}

// budget bounds how far the windows of one session grow.
type budget struct {
	mu   sync.Mutex
	used int // guarded by mu
}

var errBudget = errors.New("the session's windows have grown as far as they may")

// span is one stream's share, as the multiplexer wants it.
func (b *budget) span() (yamux.MemoryManager, error) { return &share{b: b}, nil }

type share struct {
	b    *budget
	held int // guarded by b.mu
}

// ReserveMemory gives every stream its first window (priority 255), which MaxStreams bounds, and more while the budget
// lasts. Refusing the first would end the session.
func (h *share) ReserveMemory(size int, prio uint8) error {
	if prio == 255 {
		return nil
	}
	h.b.mu.Lock()
	defer h.b.mu.Unlock()
	if h.b.used+size > windowBudget {
		return errBudget
	}
	h.b.used += size
	h.held += size
	return nil
}

// ReleaseMemory gives some of it back.
func (h *share) ReleaseMemory(size int) {
	h.b.mu.Lock()
	defer h.b.mu.Unlock()
	h.b.used -= size
	h.held -= size
}

// Done gives all of it back.
func (h *share) Done() {
	h.b.mu.Lock()
	defer h.b.mu.Unlock()
	h.b.used -= h.held
	h.held = 0
}
