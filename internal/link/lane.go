package link

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// lanesSince is the version of the link that has lanes.
	lanesSince = 3
	// maxLanes is how many lanes a session may have at a time. The hub lets each site have four times as many links.
	maxLanes = 8
	// laneWait is how long the opening of a lane may take. Whoever wants one takes a stream if there is none.
	laneWait = 10 * time.Second
	// laneRest is for how long nobody tries again after a lane could not be had, if the link was not cut meanwhile: something on the way
	// does not want a second connection.
	laneRest = 10 * time.Minute
	// laneStall is how long a lane may stand still before it is taken for broken.
	laneStall = 60 * time.Second
	// maxPiece is how many bytes one piece of a lane carries at most.
	maxPiece  = 256 << 10
	pieceHead = 4
)

// ErrNoLane is that a lane cannot be had now, while the session lives: a stream will do.
var ErrNoLane = errors.New("the link has no lane")

// lane is a stream on a connection of its own. Unlike the session's streams it does not outlive that, and nothing of it is kept for a
// replay: it is for what is much and can be sent again. The bytes come in pieces, each behind its length, so that an end in order differs
// from a cut, which a unix socket does not tell.
type lane struct {
	conn net.Conn
	wire *coalescer // that conn lies on; nil: none
	l    *line
	s    *Session

	reading sync.Mutex // guards the next four
	head    [pieceHead]byte
	has     int  // bytes of head
	left    int  // bytes of the piece
	eof     bool // the other end has ended its half

	writing sync.Mutex // guards ended
	ended   bool       // this end has ended its half

	readBy, writeBy   deadline
	closed, destroyed atomic.Bool
	closing           sync.Once
}

// deadline is the earlier one of what the user has set, and of what a lane may stand still.
type deadline struct {
	user atomic.Int64 // in nanoseconds since 1970; 0: none
	set  atomic.Int64 // when it was last moved
}

// move moves the deadline on, once a second at most.
func (d *deadline) move(set func(time.Time) error) error {
	now := time.Now()
	if last := d.set.Load(); last != 0 && now.UnixNano()-last < int64(time.Second) {
		return nil
	}
	d.set.Store(now.UnixNano())
	return set(d.next(now))
}

func (d *deadline) next(now time.Time) time.Time {
	next := now.Add(laneStall)
	if u := d.user.Load(); u != 0 && u < next.UnixNano() {
		return time.Unix(0, u)
	}
	return next
}

func (d *deadline) to(t time.Time, set func(time.Time) error) error {
	n := int64(0)
	if !t.IsZero() {
		n = t.UnixNano()
	}
	d.user.Store(n)
	return set(d.next(time.Now()))
}

// passed tells whether it was the user's.
func (d *deadline) passed() bool {
	u := d.user.Load()
	return u != 0 && time.Now().UnixNano() >= u
}

// OpenLane opens a stream on a connection of its own, which carries much for less than the session's streams do, and holds up none of
// them. A cut ends it: Read and Write give [ErrReset] then, and the session's streams are there for another try. The error is that of ctx or of
// the session, or [ErrNoLane].
func (s *Session) OpenLane(ctx context.Context) (Stream, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, laneWait, ErrNoLane)
	defer cancel()
	la, err := s.line.openLane(ctx)
	if err != nil {
		if s.line.over.Err() != nil {
			<-s.done
			return nil, s.err
		}
		return nil, err
	}
	return la, nil
}

func (l *line) openLane(ctx context.Context) (*lane, error) {
	l.mu.Lock()
	switch {
	case l.ended || l.tr == nil || l.version < lanesSince || len(l.lanes)+len(l.asked) >= maxLanes || !l.laneless.IsZero() && time.Since(l.laneless) < laneRest:
		l.mu.Unlock()
		return nil, ErrNoLane
	case l.dialer != nil:
		l.mu.Unlock()
		la, err := l.dialLane(ctx, 0)
		return la, l.laneFailed(ctx, err)
	}
	l.asks++
	number, come := l.asks, make(chan *lane, 1)
	l.asked[number] = come
	l.toAsk = append(l.toAsk, number)
	l.tr.poke()
	l.mu.Unlock()
	var err error
	select {
	case la := <-come:
		if la != nil {
			return la, nil
		}
		err = ErrNoLane
	case <-ctx.Done():
		err = context.Cause(ctx)
	case <-l.over.Done():
		err = ErrNoLane
	}
	l.mu.Lock()
	_, waiting := l.asked[number]
	delete(l.asked, number)
	l.mu.Unlock()
	if !waiting { // it comes in this moment
		l.spawn(func() {
			if la := <-come; la != nil {
				la.destroy()
			}
		})
	}
	return nil, l.laneFailed(ctx, err)
}

// laneFailed makes of an error what a caller can go by, and notes that there are no lanes for now.
func (l *line) laneFailed(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, ErrNoLane) {
		return cause // the caller's
	}
	l.mu.Lock()
	l.laneless = time.Now()
	l.mu.Unlock()
	l.opts.log().Info("link: no lane", "session", l.id, "site", l.peer.Site, "because", err)
	if errors.Is(err, ErrNoLane) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrNoLane, err)
}

// dialLane makes the connection of a lane and greets the other end.
func (l *line) dialLane(ctx context.Context, number uint64) (*lane, error) {
	d := l.opts.DialLane
	if d == nil {
		d = l.dialer
	}
	conn, err := d(ctx)
	if err != nil {
		return nil, err
	}
	tune(conn)
	stop := context.AfterFunc(ctx, func() { hardClose(conn) })
	version := l.speaksIn()
	err = conn.SetDeadline(time.Now().Add(handshakeWait))
	if err == nil {
		_, err = conn.Write(appendFrame(nil, laneFrame(l.id, l.secret, number).in(version)))
	}
	if err == nil {
		err = readStartIn(conn, l.id, version)
	}
	if err == nil {
		err = conn.SetDeadline(time.Time{})
	}
	stop()
	if err == nil {
		var la *lane
		if la, err = l.lane(conn); err == nil {
			return la, nil
		}
	}
	hardClose(conn)
	return nil, err
}

// ask is told by the accepting end that it wants a lane. One that cannot be had is not answered: whoever wants it has a time for that.
func (l *line) ask(tr *transport, number uint64) error {
	l.mu.Lock()
	current, full := l.tr == tr, len(l.lanes)+l.dialling >= maxLanes
	may := l.dialer != nil && l.version >= lanesSince
	if current && may && !full {
		l.dialling++
	}
	l.mu.Unlock()
	switch {
	case !current:
		return errReplaced
	case !may:
		return violation("ASK of lane %d", number)
	case full:
		return nil
	}
	l.spawn(func() {
		ctx, cancel := context.WithTimeout(l.over, laneWait)
		defer cancel()
		la, err := l.dialLane(ctx, number)
		l.mu.Lock()
		l.dialling--
		l.mu.Unlock()
		if err != nil {
			l.opts.log().Info("link: no lane", "session", l.id, "because", err)
			return
		}
		l.hand(la)
	})
	return nil
}

// lane makes a lane of a connection on which the ends have greeted each other. The caller keeps conn on an error.
func (l *line) lane(conn net.Conn) (*lane, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended || len(l.lanes) >= maxLanes {
		return nil, ErrNoLane
	}
	la := &lane{conn: conn, wire: coalescerOf(conn), l: l, s: l.session}
	l.lanes[la] = true
	return la, nil
}

// hand gives a lane that the other end has opened to the session's Accept, when that is called.
func (l *line) hand(la *lane) {
	may := l.spawn(func() {
		select {
		case la.s.accepted <- la:
		case <-l.over.Done():
			la.destroy()
		}
	})
	if !may {
		la.destroy()
	}
}

// lane takes the greeting of a lane of a session that is there.
func (a *Acceptor) lane(peer Peer, conn net.Conn, f frame) error {
	id, secret, number, err := f.lane()
	if err != nil {
		return fmt.Errorf("read the greeting of a lane of %s: %w", peer.Site, err)
	}
	a.mu.Lock()
	s := a.last[peer]
	a.mu.Unlock()
	if s == nil || s.line.id != id || !s.line.knows(greeting{secret: secret}) || s.line.speaksIn() != f.version {
		return fmt.Errorf("a lane of %s: %w", peer.Site, errGone)
	}
	l := s.line
	var come chan *lane
	if number > 0 {
		l.mu.Lock()
		come = l.asked[number]
		delete(l.asked, number)
		l.mu.Unlock()
		if come == nil {
			return fmt.Errorf("a lane of %s that nobody waits for", peer.Site)
		}
	}
	// Before the answer: the other end may use it at once.
	la, err := l.lane(conn)
	if err == nil {
		if err = la.start(f.version); err != nil {
			la.destroy()
		}
	}
	switch {
	case err != nil:
		if come != nil {
			close(come)
		}
		return fmt.Errorf("a lane of %s: %w", peer.Site, err)
	case come != nil:
		come <- la // has room for one
	default:
		l.hand(la)
	}
	return nil
}

// start tells the dialling end that it has its lane.
func (la *lane) start(version uint16) error {
	if _, err := la.conn.Write(appendFrame(nil, startFrame(la.l.id).in(version))); err != nil {
		return err
	}
	return la.conn.SetDeadline(time.Time{})
}

// Read implements net.Conn.
func (la *lane) Read(b []byte) (int, error) {
	la.reading.Lock()
	defer la.reading.Unlock()
	switch {
	case la.closed.Load():
		return 0, net.ErrClosed
	case la.eof:
		return 0, io.EOF
	case len(b) == 0:
		return 0, nil
	}
	return la.read(b)
}

func (la *lane) read(b []byte) (int, error) {
	if err := la.readBy.move(la.conn.SetReadDeadline); err != nil {
		return 0, la.broken(err, &la.readBy)
	}
	if la.left == 0 {
		n, err := io.ReadFull(la.conn, la.head[la.has:])
		la.has += n
		if err != nil {
			return 0, la.broken(err, &la.readBy)
		}
		la.has = 0
		size := binary.BigEndian.Uint32(la.head[:])
		if size == 0 {
			la.eof = true
			return 0, io.EOF
		}
		if size > maxPiece {
			return 0, la.broken(violation("a piece of %d bytes", size), &la.readBy)
		}
		la.left = int(size)
	}
	n, err := la.wire.readFrom(la.conn, b[:min(len(b), la.left)])
	la.left -= n
	la.l.laneReceived.Add(int64(n))
	if n > 0 { // an error comes again
		return n, nil
	}
	return 0, la.broken(err, &la.readBy)
}

// Write implements net.Conn. One that has timed out has ended the lane.
func (la *lane) Write(b []byte) (int, error) {
	la.writing.Lock()
	defer la.writing.Unlock()
	if la.ended || la.closed.Load() {
		return 0, net.ErrClosed
	}
	done := 0
	for done < len(b) {
		piece := b[done:min(len(b), done+maxPiece)]
		if err := la.write(piece); err != nil {
			return done, err
		}
		done += len(piece)
		la.l.laneSent.Add(int64(len(piece)))
	}
	return done, nil
}

// write writes a piece, or the end.
func (la *lane) write(piece []byte) error {
	head := binary.BigEndian.AppendUint32(make([]byte, 0, pieceHead), uint32(len(piece)))
	err := la.writeBy.move(la.conn.SetWriteDeadline)
	switch {
	case err != nil:
	case la.wire == nil && len(piece) > 0:
		_, err = (&net.Buffers{head, piece}).WriteTo(la.conn)
	case la.wire == nil:
		_, err = la.conn.Write(head)
	default:
		la.wire.hold()
		_, err = la.conn.Write(head)
		for err == nil && len(piece) > 0 {
			n := min(len(piece), sendBuffer)
			if _, err = la.conn.Write(piece[:n]); err == nil {
				err = la.writeBy.move(la.conn.SetWriteDeadline) // slow is not still
			}
			piece = piece[n:]
		}
		if e := la.wire.release(); err == nil {
			err = e
		}
	}
	if err != nil {
		err = la.broken(err, &la.writeBy)
		la.destroy()
	}
	return err
}

// broken makes of a connection's error that of a stream. Only a deadline of the user's leaves the lane as it is.
func (la *lane) broken(err error, by *deadline) error {
	switch {
	case la.closed.Load():
		return net.ErrClosed
	case la.destroyed.Load():
		return ErrReset
	case errors.Is(err, os.ErrDeadlineExceeded) && by.passed():
		return os.ErrDeadlineExceeded
	}
	la.destroy()
	return fmt.Errorf("%w: %w", ErrReset, noEOF(err))
}

// destroy ends the connection at once.
func (la *lane) destroy() {
	la.destroyed.Store(true)
	hardClose(la.conn)
	la.l.forget(la)
}

func (l *line) forget(la *lane) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.lanes, la)
}

// CloseWrite ends this end's half.
func (la *lane) CloseWrite() error {
	la.writing.Lock()
	defer la.writing.Unlock()
	if la.ended {
		return nil
	}
	la.ended = true
	return la.write(nil)
}

// Reset ends both halves at once.
func (la *lane) Reset() error {
	la.destroy()
	return nil
}

// Close behaves as that of the session's streams: what was written is delivered, and a peer that writes on is reset. It waits for a Write
// that is under way.
func (la *lane) Close() error {
	var err error
	la.closing.Do(func() {
		if !la.destroyed.Load() {
			err = la.CloseWrite()
		}
		la.closed.Store(true)
		_ = la.conn.SetReadDeadline(time.Unix(1, 0)) // wakes a reader
		if la.destroyed.Load() || !la.s.spawn(la.orphaned) {
			la.destroy()
		}
	})
	if errors.Is(err, ErrReset) {
		return nil
	}
	return err
}

// orphaned waits for the peer's end of a closed lane: a connection that is closed before it is read drops what was written.
func (la *lane) orphaned() {
	la.reading.Lock()
	defer la.reading.Unlock()
	defer la.destroy()
	if la.eof {
		_ = la.conn.Close() // in order
		return
	}
	if la.left > 0 || la.conn.SetReadDeadline(time.Now().Add(closeWait)) != nil {
		return
	}
	if _, err := io.ReadFull(la.conn, la.head[la.has:]); err == nil && binary.BigEndian.Uint32(la.head[:]) == 0 {
		_ = la.conn.Close()
	}
}

// LocalAddr is net.Conn's.
func (la *lane) LocalAddr() net.Addr { return la.conn.LocalAddr() }

// RemoteAddr is net.Conn's.
func (la *lane) RemoteAddr() net.Addr { return la.conn.RemoteAddr() }

// SetDeadline is net.Conn's.
func (la *lane) SetDeadline(t time.Time) error {
	return errors.Join(la.SetReadDeadline(t), la.SetWriteDeadline(t))
}

// SetReadDeadline is net.Conn's.
func (la *lane) SetReadDeadline(t time.Time) error {
	return la.readBy.to(t, la.conn.SetReadDeadline)
}

// SetWriteDeadline is net.Conn's.
func (la *lane) SetWriteDeadline(t time.Time) error {
	return la.writeBy.to(t, la.conn.SetWriteDeadline)
}
