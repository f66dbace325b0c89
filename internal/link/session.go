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
	// MaxWindow is how many bytes of one stream may be on their way at most: 1 Gbit/s × 100 ms is 12.5 MB.
	MaxWindow = 16 << 20
	// minWindow is what they are on a short path.
	minWindow = 1 << 20
	// lineRate is what one stream should be able to fill, in bytes per second: 1 Gbit/s.
	lineRate = 125e6
	// memoryLimit bounds what streams whose readers stall can hold in one session, in bytes, by bounding their number.
	memoryLimit = 1 << 30
	// backlog is how many streams may wait for Accept; the end that opens waits when there are more.
	backlog = 1024
	// orphanWait is how long the other end of a closed stream may take to end its half before it is reset.
	orphanWait = 60 * time.Second
)

// Session carries streams between two runners. Its methods may be called concurrently.
type Session struct {
	line *line
	mux  *yamux.Session

	accepted chan Stream
	closing  atomic.Bool // Close was called
	shut     sync.Once
	done     chan struct{}
	err      error // set before done is closed

	running sync.WaitGroup
	mu      sync.Mutex
	ended   bool // guarded by mu: nothing new may run
}

// newSession runs streams over l. The dialling end is the client.
func newSession(l *line, client bool, rtt time.Duration) (*Session, error) {
	c := yamux.DefaultConfig()
	c.AcceptBacklog = backlog
	window := windowFor(rtt)
	c.MaxIncomingStreams = memoryLimit / window
	// Windows do not grow. In go-yamux 5.1.0 each doubling loses at least half of the old window, since the room made before
	// it is never announced (Stream.sendWindowUpdate overwrites delta); after a few, more is lost than has to be
	// free for the next announcement, and the stream stands still for ever.
	c.MaxStreamWindowSize, c.InitialStreamWindowSize = window, window
	c.ReadBufSize = 32 << 10
	c.LogOutput = io.Discard // what it would say is in Err
	// It must not notice an outage: the line keeps its transports alive, and ignores deadlines. What is left of this is how
	// long a measurement of the round trip may take.
	c.EnableKeepAlive = false
	c.ConnectionWriteTimeout = Silence
	newMux := yamux.Server
	if client {
		newMux = yamux.Client
	}
	mux, err := newMux(l, c, nil)
	if err != nil {
		return nil, problem.Wrap(err, problem.Internal, "", "the link's streams cannot be set up")
	}
	s := &Session{line: l, mux: mux, accepted: make(chan Stream), done: make(chan struct{})}
	l.mu.Lock()
	l.session = s
	l.mu.Unlock()
	s.running.Go(s.acceptLoop)
	return s, nil
}

// windowFor gives the window of streams over a path of that round trip: on a machine or in a house little, so that
// a reader that stalls holds little memory. It is twice what is on the way, as room is announced by halves of the window.
// The other end may have [memoryLimit] / window streams open at a time, 64 to 1,024; further ones are reset.
func windowFor(rtt time.Duration) uint32 {
	return uint32(min(max(2*lineRate*rtt.Seconds(), minWindow), MaxWindow))
}

// Peer gives the other end.
func (s *Session) Peer() Peer { return s.line.peer }

// Stats gives the counters as they are now.
func (s *Session) Stats() Stats { return s.line.snapshot() }

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

// Close ends the session in order, and waits for the other end for 10 s at most, in an outage for 5 s. Streams that were
// closed for writing are delivered, all others are reset. It always returns nil; it may be called often.
func (s *Session) Close() error {
	s.shut.Do(func() {
		s.closing.Store(true)
		timer := time.AfterFunc(closeWait, func() {
			s.line.finish(nil)
			_ = s.mux.Close()
		})
		defer timer.Stop()
		// Behind everything that was written: the other end has it all when it reads this, and closes.
		if s.mux.GoAway() == nil {
			<-s.mux.CloseChan()
		}
		_ = s.mux.Close()
	})
	<-s.done
	s.running.Wait()
	<-s.line.over.Done()
	s.line.running.Wait()
	return nil
}

// abandon ends the session at once, for a newer one has taken its place.
func (s *Session) abandon() {
	s.line.finish(problem.New(problem.LinkLost, "", "the other end of the link came back with a new session"))
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
	failure := s.line.failure()
	switch {
	case s.closing.Load():
		return ErrClosed
	case errors.Is(err, yamux.ErrRemoteGoAway):
		return ErrPeerClosed
	case failure != nil:
		return failure
	default:
		return problem.Wrap(noEOF(err), problem.LinkLost, "see the other end's log for why", "the other end gave the link up")
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
	for {
		before := st.s.Stats()
		_ = st.y.SetReadDeadline(time.Now().Add(orphanWait))
		_, err := st.y.Read(make([]byte, 1))
		if err == io.EOF { //nolint:errorlint // see mapErr: a reset may wrap one
			return
		}
		after := st.s.Stats()
		if errors.Is(err, yamux.ErrTimeout) && (!after.Down.IsZero() || after.Cuts != before.Cuts) {
			continue // it could not have been heard, nor may it have heard us
		}
		_ = st.y.Reset()
		return
	}
}

// LocalAddr gives no more than a name: transports come and go.
func (st *stream) LocalAddr() net.Addr { return st.y.LocalAddr() }

// RemoteAddr does the same.
func (st *stream) RemoteAddr() net.Addr { return st.y.RemoteAddr() }

// SetDeadline sets both deadlines.
func (st *stream) SetDeadline(t time.Time) error { return st.y.SetDeadline(t) }

// SetReadDeadline is net.Conn's.
func (st *stream) SetReadDeadline(t time.Time) error { return st.y.SetReadDeadline(t) }

// SetWriteDeadline is net.Conn's.
func (st *stream) SetWriteDeadline(t time.Time) error { return st.y.SetWriteDeadline(t) }

// mapErr gives the errors of this package for the multiplexer's. Only io.EOF itself is the end of a stream: the reset
// of a session that ended wraps one.
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
