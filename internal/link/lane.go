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
	// maxLanes is how many lanes one end of a session may have at a time that it has opened; of those of the other it bears twice as many, since
	// it may not have heard of the end of some. The hub lets each site have 32 links.
	maxLanes = 8
	// laneWait is how long the opening of a lane may take. Whoever wants one takes a stream if there is none.
	laneWait = 10 * time.Second
	// laneRest is for how long nobody tries again after a lane could not be had, or maxBroken in a row broke, if the link was not cut meanwhile:
	// something on the way does not want a second connection.
	laneRest  = 10 * time.Minute
	maxBroken = 3
	// laneStall is how long a lane may stand still before it is taken for broken. With TCP below it, the kernel gives it up after 20 s (see tune).
	laneStall = 60 * time.Second
	// tellEvery is how often an end to which bytes come says so: the other end may have none left to send, and wait for an answer
	// while what lies between them has a lot.
	tellEvery = laneStall / 4
	// slowest is what a lane carries at least, in bytes per second, if it does not stand still.
	slowest = 1 << 10
	// maxPiece is how many bytes one piece of a lane carries at most, slowPiece where one takes more than a second.
	maxPiece  = 256 << 10
	slowPiece = 16 << 10
	pieceHead = 4
	// stillHere is the head of a piece that carries nothing, and says that the other's are coming.
	stillHere = 1<<32 - 1
)

// ErrNoLane is that a lane cannot be had now, while the session lives: a stream will do.
var ErrNoLane = errors.New("the link has no lane")

var (
	errFull       = fmt.Errorf("%w left: it has %d", ErrNoLane, maxLanes)
	errLaneCut    = fmt.Errorf("%w: it was cut meanwhile", ErrNoLane)
	errStays      = fmt.Errorf("%w that leaves the hub", ErrNoLane)
	errLaneDenied = fmt.Errorf("%w: the other end could not make it", ErrNoLane)
)

// lane is a stream on a connection of its own. Unlike the session's streams it does not outlive that, and nothing of it is kept for a
// replay: it is for what is much and can be sent again. The bytes come in pieces, each behind its length, so that an end in order differs
// from a cut, which a unix socket does not tell.
type lane struct {
	conn net.Conn
	wire *coalescer // that conn lies on; nil: none
	l    *line
	s    *Session
	own  bool  // this end wanted it
	out  bool  // it has left the hub
	cuts int64 // of the link, before

	reading sync.Mutex // guards the next five
	head    [pieceHead]byte
	has     int  // bytes of head
	left    int  // bytes of the piece
	eof     bool // the other end has ended its half
	told    time.Time

	writing sync.Mutex // guards the next three
	ended   bool       // this end has ended its half
	slow    bool       // the last piece took its time
	looked  time.Time  // for what the other end tells

	readBy, writeBy   deadline
	closed, destroyed atomic.Bool
	closing           sync.Once
}

// laneAnswer is what comes of an ASK.
type laneAnswer struct {
	la  *lane
	err error
}

// deadline is the earlier one of what the user has set, and of what a lane may stand still.
type deadline struct {
	apply func(time.Time) error

	mu    sync.Mutex // guards the rest
	user  time.Time  // zero: none
	until time.Time  // as it was applied last
	over  bool       // nobody moves it any more
}

// move gives from now on so much time.
func (d *deadline) move(stall time.Duration) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	next := d.nextLocked(stall)
	if d.over || next.Sub(d.until) < time.Second { // it costs little, and not nothing
		return nil
	}
	d.until = next
	return d.apply(next)
}

func (d *deadline) nextLocked(stall time.Duration) time.Time {
	next := time.Now().Add(stall)
	if !d.user.IsZero() && d.user.Before(next) {
		return d.user
	}
	return next
}

// to sets the user's.
func (d *deadline) to(t time.Time) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.user = t
	if d.over {
		return nil
	}
	d.until = d.nextLocked(laneStall)
	return d.apply(d.until)
}

// briefly has f run with as good as no time, and gives what there was before back.
func (d *deadline) briefly(f func()) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.over {
		return nil
	}
	if err := d.apply(time.Now().Add(time.Millisecond)); err != nil {
		return err
	}
	f()
	d.until = d.nextLocked(laneStall)
	return d.apply(d.until)
}

// end wakes whoever waits, for good.
func (d *deadline) end() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.over = true
	_ = d.apply(time.Unix(1, 0)) // of a connection that is closed it has woken everybody
}

// passed tells whether it was the user's.
func (d *deadline) passed() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return !d.user.IsZero() && !time.Now().Before(d.user)
}

// OpenLane opens a stream on a connection of its own, which carries much for less than the session's streams do, and holds up none of
// them. A cut ends it: Read and Write give [ErrReset] then, and the session's streams are there for another try. The error is that of ctx or of
// the session, or [ErrNoLane].
func (s *Session) OpenLane(ctx context.Context) (Stream, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if err := s.Err(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, laneWait, ErrNoLane)
	defer cancel()
	la, err := s.line.openLane(ctx)
	if err != nil {
		if s.line.over.Err() != nil {
			<-s.done
		}
		if e := s.Err(); e != nil { // whatever else went wrong, this is why
			return nil, e
		}
		return nil, err
	}
	return la, nil
}

// release gives up the place of a lane that does not come.
func (l *line) release(own bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.releaseLocked(own)
}

func (l *line) releaseLocked(own bool) {
	if own {
		l.ours--
	} else {
		l.theirs--
	}
}

func (l *line) openLane(ctx context.Context) (*lane, error) {
	l.mu.Lock()
	cuts := l.stats.Cuts
	switch {
	case l.ended || l.tr == nil || l.version < lanesSince || !l.laneless.IsZero() && time.Since(l.laneless) < laneRest:
		l.mu.Unlock()
		return nil, ErrNoLane
	case l.ours >= maxLanes:
		l.mu.Unlock()
		return nil, errFull
	}
	l.ours++
	if l.dialer != nil {
		l.mu.Unlock()
		la, err := l.dialLane(ctx, 0)
		return la, l.laneFailed(ctx, cuts, err)
	}
	l.asks++
	number, come := l.asks, make(chan laneAnswer, 1)
	l.asked[number] = come
	l.words = append(l.words, unit{kind: frameAsk, number: number})
	l.tr.poke()
	l.mu.Unlock()
	var err error
	select {
	case a := <-come:
		if a.err != nil {
			l.release(true)
		}
		return a.la, l.laneFailed(ctx, cuts, a.err)
	case <-ctx.Done():
		err = context.Cause(ctx)
	case <-l.over.Done():
		err = ErrNoLane
	}
	l.mu.Lock()
	_, waiting := l.asked[number]
	delete(l.asked, number)
	if waiting {
		l.releaseLocked(true)
	}
	l.mu.Unlock()
	if !waiting { // it comes in this moment
		l.spawn(func() {
			if a := <-come; a.err == nil {
				a.la.destroy()
			} else {
				l.release(true)
			}
		})
	}
	return nil, l.laneFailed(ctx, cuts, err)
}

// laneFailed makes of an error what a caller can go by, and notes that there are no lanes for now, unless a cut, or that there are
// enough, is why.
func (l *line) laneFailed(ctx context.Context, cuts int64, err error) error {
	if err == nil {
		return nil
	}
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, ErrNoLane) {
		return cause // the caller's
	}
	if errors.Is(err, errFull) {
		return err
	}
	l.mu.Lock()
	first := errors.Is(err, errStays) && !l.tried // the next one stays with the hub
	l.tried = l.tried || first
	if l.tr != nil && l.stats.Cuts == cuts && !first {
		l.laneless = time.Now()
	}
	l.mu.Unlock()
	l.opts.log().Info("link: no lane", "session", l.id, "site", l.peer.Site, "because", err)
	if errors.Is(err, ErrNoLane) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrNoLane, err)
}

// dialLane makes the connection of a lane, for which there is a place, and greets the other end. Number 0 is one of this end's own.
func (l *line) dialLane(ctx context.Context, number uint64) (*lane, error) {
	l.mu.Lock()
	tr := l.tr
	l.mu.Unlock()
	conn, err := l.greetLane(ctx, number)
	if err == nil {
		var la *lane
		if la, err = l.adopt(conn, number == 0, tr); err == nil {
			return la, nil
		}
		hardClose(conn)
	}
	l.release(number == 0)
	return nil, err
}

func (l *line) greetLane(ctx context.Context, number uint64) (net.Conn, error) {
	d := l.opts.DialLane
	if d == nil {
		d = l.dialer
	}
	conn, err := d(ctx)
	if err != nil {
		return nil, err
	}
	tune(conn)
	below := innermost(conn)
	defer context.AfterFunc(ctx, func() { _ = below.Close() })()
	greeting := laneFrame(l.id, l.secret, number).in(l.speaksIn())
	var f frame
	err = conn.SetDeadline(time.Now().Add(handshakeWait))
	if err == nil {
		_, err = conn.Write(appendFrame(nil, greeting))
	}
	if err == nil {
		f, err = readFrame(conn)
	}
	switch {
	case err != nil:
	case f.kind == frameRefuse && len(f.body) == 1 && f.body[0] == refuseFull:
		err = errFull
	case f.kind == frameRefuse:
		err = errGone
	default:
		var pin []byte
		pin, err = f.handedStart(l.id, greeting.version)
		if err == nil && pin != nil {
			over, e := leaveHub(ctx, conn, pin, greeting)
			if e == nil {
				conn = over
			} else {
				err = fmt.Errorf("%w: %w", errStays, e)
			}
		}
		if err == nil {
			err = conn.SetDeadline(time.Time{})
		}
	}
	if err != nil {
		hardClose(conn)
		return nil, noEOF(err)
	}
	return conn, nil
}

// adopt makes a lane of a connection on which the ends greet each other, or have; for which there is a place, and which began with the
// transport tr. On an error, connection and place stay the caller's.
func (l *line) adopt(conn net.Conn, own bool, tr *transport) (*lane, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, out := conn.(handed)
	switch {
	case l.ended:
		return nil, ErrNoLane
	case out && (tr == nil || l.tr != tr): // the hub has ended it, or may have wanted to
		return nil, errLaneCut
	}
	now := time.Now()
	la := &lane{conn: conn, wire: coalescerOf(conn), l: l, s: l.session, own: own, out: out, cuts: l.stats.Cuts, told: now, looked: now}
	la.readBy.apply, la.writeBy.apply = conn.SetReadDeadline, conn.SetWriteDeadline
	l.lanes[la] = true
	return la, nil
}

// ask is told by the accepting end that it wants a lane.
func (l *line) ask(tr *transport, number uint64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.tr != tr:
		return errReplaced
	case l.dialer == nil || l.version < lanesSince:
		return violation("ASK of lane %d", number)
	case l.theirs >= 2*maxLanes:
		l.sayNoLocked(number, noFull)
		return nil
	}
	l.theirs++
	l.running.Go(func() {
		ctx, cancel := context.WithTimeout(l.over, laneWait)
		defer cancel()
		la, err := l.dialLane(ctx, number)
		if err == nil {
			l.hand(la)
			return
		}
		l.opts.log().Info("link: no lane", "session", l.id, "because", err)
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.tr == tr { // or else whoever waited has heard of the cut
			l.sayNoLocked(number, noWay)
		}
	})
	return nil
}

func (l *line) sayNoLocked(number uint64, why uint64) {
	if len(l.words) < maxLanes { // an end that asks for more than it may have gets no more answers
		l.words = append(l.words, unit{kind: frameNo, length: noBody, number: number, limit: why})
		l.tr.poke()
	}
}

// denied is told by the dialling end that a lane will not come.
func (l *line) denied(tr *transport, u unit) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.tr != tr:
		return errReplaced
	case l.dialer != nil || l.version < lanesSince:
		return violation("NO to lane %d", u.number)
	}
	err := errLaneDenied
	if u.limit == noFull {
		err = errFull
	}
	l.answerLocked(u.number, err)
	return nil
}

// answerLocked tells who waits for a lane why it does not come.
func (l *line) answerLocked(number uint64, err error) {
	if come := l.asked[number]; come != nil {
		delete(l.asked, number)
		come <- laneAnswer{err: err} // has room for one
	}
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
func (a *Acceptor) lane(ctx context.Context, peer Peer, conn net.Conn, raw *os.File, f frame) error {
	refuse := func(reason byte, err error) error {
		return errors.Join(fmt.Errorf("a lane of %s: %w", peer.Site, err), refuseOn(conn, refuseFrame(reason).in(f.version)))
	}
	id, secret, number, err := f.lane()
	if err != nil {
		return fmt.Errorf("read the greeting of a lane of %s: %w", peer.Site, err)
	}
	a.mu.Lock()
	s := a.last[peer]
	a.mu.Unlock()
	if s == nil || s.line.id != id || !s.line.knows(greeting{secret: secret}) || s.line.speaksIn() != f.version {
		return refuse(refuseGone, errGone)
	}
	l := s.line
	l.mu.Lock()
	come := l.asked[number] // whoever waits there has its place
	delete(l.asked, number)
	full := l.theirs >= 2*maxLanes
	tr, stays := l.tr, l.stays
	if number == 0 && !full {
		l.theirs++
	}
	l.mu.Unlock()
	switch {
	case number > 0 && come == nil:
		return refuse(refuseGone, errLate)
	case number == 0 && full:
		return refuse(refuseFull, errFull)
	}
	var la *lane
	if tr == nil || stays {
		raw = nil
	}
	begun, err := a.start(ctx, conn, raw, f, id, tr)
	if errors.Is(err, errStays) {
		l.mu.Lock()
		l.stays = l.stays || l.tr == tr && ctx.Err() == nil
		l.mu.Unlock()
	}
	if err == nil {
		err = begun.SetDeadline(time.Time{})
	}
	if err == nil {
		la, err = l.adopt(begun, number > 0, tr)
	}
	if err != nil && begun != nil {
		hardClose(begun)
	}
	switch {
	case come != nil:
		come <- laneAnswer{la, err} // has room for one
	case err != nil:
		l.release(false)
	default:
		l.hand(la)
	}
	if err != nil {
		return fmt.Errorf("a lane of %s: %w", peer.Site, err)
	}
	return nil
}

// start answers the greeting f of a lane, and gives the connection that it is on from then on: raw, which is below conn's TLS, where there
// is one. That is while the session has transport tr, with which the hub would end it.
func (a *Acceptor) start(ctx context.Context, conn net.Conn, raw *os.File, f frame, id sessionID, tr *transport) (net.Conn, error) {
	if raw == nil || f.version < handedSince {
		tune(conn)
		_, err := conn.Write(appendFrame(nil, startFrame(id).in(f.version)))
		return conn, err
	}
	key, err := a.key()
	if err != nil {
		return nil, err
	}
	if _, err := conn.Write(appendFrame(nil, handedFrame(id, key.pin).in(f.version))); err != nil {
		return nil, err
	}
	ctx, cancel := tr.while(ctx)
	defer cancel()
	over, err := key.takeOver(ctx, conn, raw, f)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errStays, err)
	}
	return over, nil
}

var errLate = errors.New("nobody waits for it any more")

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
	for la.left == 0 {
		if err := la.readBy.move(laneStall); err != nil {
			return 0, la.broken(err, &la.readBy)
		}
		if err := la.next(); err != nil {
			return 0, la.broken(err, &la.readBy)
		}
		if la.eof {
			return 0, io.EOF
		}
	}
	if err := la.readBy.move(laneStall); err != nil {
		return 0, la.broken(err, &la.readBy)
	}
	n, err := la.wire.readFrom(la.conn, b[:min(len(b), la.left)])
	la.left -= n
	la.l.laneReceived.Add(int64(n))
	if n > 0 { // an error comes again
		la.tell()
		return n, nil
	}
	return 0, la.broken(err, &la.readBy)
}

// next reads the head of a piece.
func (la *lane) next() error {
	n, err := io.ReadFull(la.conn, la.head[la.has:])
	la.has += n
	if err != nil {
		return err
	}
	la.has = 0
	switch size := binary.BigEndian.Uint32(la.head[:]); {
	case size == 0:
		la.eof = true
	case size == stillHere:
	case size > maxPiece:
		return violation("a piece of %d bytes", size)
	default:
		la.left = int(size)
	}
	return nil
}

// tell says to the other end that its bytes are coming.
func (la *lane) tell() {
	now := time.Now()
	if now.Sub(la.told) < tellEvery || !la.writing.TryLock() { // a writer tells as much
		return
	}
	defer la.writing.Unlock()
	la.told = now
	if !la.ended && !la.closed.Load() {
		_ = la.write(stillHere, nil) // who reads or writes next finds out
	}
}

// look takes what the other end tells while this one does nothing but write: it would fill the way back in the end.
func (la *lane) look() {
	la.looked = time.Now()
	if !la.reading.TryLock() {
		return // it is read anyway
	}
	defer la.reading.Unlock()
	_ = la.readBy.briefly(func() { // what goes wrong is found again
		for la.left == 0 && !la.eof && la.next() == nil {
		}
	})
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
		size := maxPiece
		if la.slow {
			size = slowPiece
		}
		piece := b[done:min(len(b), done+size)]
		begun := time.Now()
		if err := la.write(uint32(len(piece)), piece); err != nil {
			return done, err
		}
		took := time.Since(begun)
		la.slow = took > time.Second
		done += len(piece)
		la.l.laneSent.Add(int64(len(piece)))
		if begun.Add(took).Sub(la.looked) >= laneStall {
			la.look()
		}
	}
	return done, nil
}

// write writes a head, and the piece that it is of.
func (la *lane) write(head uint32, piece []byte) error {
	h := binary.BigEndian.AppendUint32(make([]byte, 0, pieceHead), head)
	err := la.writeBy.move(laneStall + time.Duration(len(piece))*time.Second/slowest)
	switch {
	case err != nil:
	case la.wire == nil && len(piece) > 0:
		_, err = (&net.Buffers{h, piece}).WriteTo(la.conn)
	case la.wire == nil:
		_, err = la.conn.Write(h)
	default:
		la.wire.hold()
		if _, err = la.conn.Write(h); err == nil && len(piece) > 0 {
			_, err = la.conn.Write(piece)
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
	la.l.laneBroke(la)
	return fmt.Errorf("%w: %w", ErrReset, noEOF(err))
}

// laneBroke takes note of a lane that broke while the link did not.
func (l *line) laneBroke(la *lane) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.tr == nil || l.stats.Cuts != la.cuts {
		return
	}
	if l.broken++; l.broken >= maxBroken {
		l.broken, l.laneless = 0, time.Now()
	}
}

// cut ends the connection at once.
func (la *lane) cut() {
	la.destroyed.Store(true)
	hardClose(la.conn)
}

// destroy ends the connection at once, and gives up the lane's place.
func (la *lane) destroy() {
	la.cut()
	l := la.l
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.lanes[la] {
		delete(l.lanes, la)
		l.releaseLocked(la.own)
	}
}

// leave ends the connection in order: both halves have ended.
func (la *lane) leave() {
	_ = la.conn.Close()
	la.l.mu.Lock()
	defer la.l.mu.Unlock()
	la.l.broken = 0
}

// CloseWrite ends this end's half.
func (la *lane) CloseWrite() error {
	la.writing.Lock()
	defer la.writing.Unlock()
	if la.ended {
		return nil
	}
	la.ended = true
	return la.write(0, nil)
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
		la.readBy.end()
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
	if !la.eof && la.conn.SetReadDeadline(time.Now().Add(closeWait)) != nil {
		return
	}
	for la.left == 0 && !la.eof {
		if la.next() != nil {
			return
		}
	}
	if la.eof {
		la.leave()
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
func (la *lane) SetReadDeadline(t time.Time) error { return la.readBy.to(t) }

// SetWriteDeadline is net.Conn's.
func (la *lane) SetWriteDeadline(t time.Time) error { return la.writeBy.to(t) }
