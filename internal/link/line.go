package link

import (
	"context"
	"crypto/subtle"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pergolafl/pergola/internal/compat"
	"github.com/pergolafl/pergola/internal/problem"
)

const (
	// DefaultTolerance is for how long a session waits for a transport before it ends.
	DefaultTolerance = time.Hour
	// DefaultBuffer is how many bytes each end keeps for a replay, and how many it takes before they are read, on
	// paths where that is enough: see bufferFor.
	DefaultBuffer = 8 << 20
	// maxBuffer is what the default grows to.
	maxBuffer = 32 << 20
	// maxUnsent is how many bytes may wait to be sent for the first time: what the multiplexer puts in comes out in
	// order, so a small request waits for all of it.
	maxUnsent = 256 << 10
	// keepRing is how much memory an emptied replay buffer keeps while there is little traffic.
	keepRing = 1 << 20
	// ackDelay is how long an end waits for more to acknowledge.
	ackDelay = 25 * time.Millisecond
	// maxAckStep is how many bytes an end lets go unacknowledged at most, where the buffers are of the default size.
	maxAckStep = 256 << 10
	// noticeAfter is for how long an outage is nobody's business yet.
	noticeAfter = 5 * time.Second
	// maxViolations is how often the other end may break the protocol: damage on the way ends a transport, a defect of
	// the other end must not go on for ever.
	maxViolations = 16
)

var (
	errReplaced = errors.New("a newer connection of the same session has taken over")
	errGone     = errors.New("no such session")
	errStale    = errors.New("a later attempt has been here")
)

// line is the byte stream of a session in both directions over successive transports. It numbers the bytes, keeps
// what the other end has not acknowledged, and sends that again over the next transport; whoever reads and writes it only
// ever waits. One reader and one writer may use it at a time: it is the multiplexer's net.Conn.
type line struct {
	id     sessionID
	secret [keySize]byte
	peer   Peer
	opts   Options
	over   context.Context // ends with the line; its cause is why
	end    context.CancelCauseFunc

	running sync.WaitGroup // transports, and who dials

	mu    sync.Mutex // guards the rest
	room  *sync.Cond // of Write
	data  *sync.Cond // of Read
	tr    *transport // nil in an outage
	buf   int        // bytes kept for a replay, and taken before they are read
	ended bool
	err   error // why it ended; nil if in order

	version     uint16 // that the session speaks; the dialling end may have to take an older one before it is established
	attempt     uint32 // newest transport
	established bool   // dialling end: the other end has the session
	attached    bool   // there has been a transport

	out   ring      // what the other end has not acknowledged
	full  time.Time // when it was last larger than keepRing
	acked uint64    // offset of its first byte
	sent  uint64    // offset to send from next, over this transport
	high  uint64    // offset up to which anything was ever sent
	limit uint64    // offset up to which the other end takes bytes

	in       ring   // what has not been read
	received uint64 // offset of what comes next
	told     uint64 // of it, what the other end knows
	granted  uint64 // the highest limit the other end was told

	closing    bool // Close was called
	peerClosed bool // the other end has closed in order
	linger     *time.Timer
	expiry     *time.Timer
	cutAt      time.Time
	violations int
	notice     *time.Timer // of an outage that lasts
	stats      Stats

	dialer   Dialer   // dialling end
	session  *Session // whose line this is
	lanes    map[*lane]bool
	ours     int                        // places of lanes that this end has opened, or is opening
	theirs   int                        // and of those of the other end
	asks     uint64                     // lanes that this end, which does not dial, has asked for
	asked    map[uint64]chan laneAnswer // those that have not come
	words    []unit                     // of ASK and NO that have not been said
	laneless time.Time                  // when a lane could not be had; zero if the link was cut since
	broken   int                        // lanes that broke in a row, while the link did not
	stays    bool                       // one could not leave the hub, though the hub had let it: something on the way does not want that
	tried    bool                       // one of this end's could not

	laneSent, laneReceived atomic.Int64 // bytes
}

func newLine(id sessionID, secret [keySize]byte, peer Peer, opts Options) *line {
	l := &line{id: id, secret: secret, peer: peer, opts: opts, buf: opts.Buffer, version: uint16(opts.speaks().Max), lanes: map[*lane]bool{}, asked: map[uint64]chan laneAnswer{}}
	if l.buf == 0 {
		l.buf = DefaultBuffer
	}
	l.over, l.end = context.WithCancelCause(context.Background())
	l.room, l.data = sync.NewCond(&l.mu), sync.NewCond(&l.mu)
	return l
}

// bufferFor gives the buffer for a path of that round trip, of which one buffer of bytes is sent at most: 8 MiB are
// 84 MB/s at 100 ms. Where that is less than lineRate the default is twice what is on the way, up to 32 MiB.
func bufferFor(rtt time.Duration) int {
	return int(min(max(2*lineRate*rtt.Seconds(), DefaultBuffer), maxBuffer))
}

// size adjusts the buffer to the path, before anything is sent.
func (l *line) size(rtt time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.opts.Buffer == 0 {
		l.buf = bufferFor(rtt)
	}
}

// ackStep is after how many bytes an acknowledgement does not wait for more. Buffers of the same size at both ends
// are eight of them, so that neither waits for the other.
func (l *line) ackStep() uint64 { return uint64(min(max(l.buf/8, 1), maxAckStep)) }

func (l *line) consumedLocked() uint64 { return l.received - uint64(l.in.n) }
func (l *line) endLocked() uint64      { return l.acked + uint64(l.out.n) }
func (l *line) grantLocked() uint64    { return l.consumedLocked() + uint64(l.buf) }

// tellLocked gives what the other end is told of this one. What was granted holds, even if it was not heard.
func (l *line) tellLocked() position {
	l.granted = max(l.granted, l.grantLocked())
	return position{received: l.received, sent: l.high, limit: l.granted}
}

// Read gives bytes in order, and io.EOF only after the other end has closed in order.
func (l *line) Read(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for {
		switch {
		case l.closing:
			return 0, net.ErrClosed
		case l.in.n > 0:
			n := l.in.read(b)
			if l.tr != nil && l.grantLocked()-l.granted >= l.ackStep() {
				l.tr.poke()
			}
			return n, nil
		case l.ended && l.err != nil:
			return 0, l.err
		case l.peerClosed:
			return 0, io.EOF
		case l.ended:
			return 0, net.ErrClosed
		}
		l.data.Wait()
	}
}

// Write takes b, and returns when all of it has a place in the replay buffer.
func (l *line) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	done := 0
	for {
		switch {
		case l.ended && l.err != nil:
			return done, l.err
		case l.closing:
			return done, net.ErrClosed
		case l.ended, l.peerClosed:
			return len(b), nil // nobody reads it; the end is told to the reader
		case done == len(b):
			return done, nil
		}
		n := min(len(b)-done, l.buf-l.out.n, maxUnsent-int(l.endLocked()-l.sent))
		if n <= 0 {
			l.room.Wait()
			continue
		}
		l.out.write(b[done : done+n])
		if l.out.n > keepRing {
			l.full = time.Now()
		}
		done += n
		if l.tr != nil {
			l.tr.poke()
		}
	}
}

// Close begins an orderly end and does not wait for it: what was written is sent, then that it is all. What still
// comes is dropped. If the other end has not said the same after 5 s the line ends anyway.
func (l *line) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closing || l.ended {
		return nil
	}
	l.closing = true
	l.in = ring{}
	l.data.Broadcast()
	l.room.Broadcast()
	switch {
	case l.tr != nil:
		l.tr.poke()
	case l.peerClosed:
		l.finishLocked(nil)
		return nil
	}
	l.linger = time.AfterFunc(closeWait, func() { l.finish(nil) })
	return nil
}

// finish ends the line at once; err is nil if that is in order.
func (l *line) finish(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.finishLocked(err)
}

func (l *line) finishLocked(err error) {
	if l.ended {
		return
	}
	l.ended, l.err = true, err
	for _, t := range []*time.Timer{l.linger, l.expiry, l.notice} {
		if t != nil {
			t.Stop()
		}
	}
	if l.tr != nil {
		l.tr.drop()
		l.tr = nil
	}
	for la := range l.lanes {
		la.cut()
	}
	l.out = ring{}
	l.data.Broadcast()
	l.room.Broadcast()
	if err == nil {
		err = ErrClosed
	}
	l.end(err)
}

// failure gives why the line ended, nil if it has not or did so in order.
func (l *line) failure() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

// spawn runs f as one of the line's own; false if the line has ended.
func (l *line) spawn(f func()) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.ended {
		l.running.Go(f)
	}
	return !l.ended
}

// hello gives what the dialling end's next transport begins with.
func (l *line) hello() greeting {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.attempt++
	at := l.tellLocked()
	return greeting{id: l.id, secret: l.secret, attempt: l.attempt, resume: l.established, at: at}
}

// speaksIn gives the version of the session.
func (l *line) speaksIn() uint16 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.version
}

// comeDown takes an older version that the other end, which refused the session's, speaks too; false if there is none, or the session is
// established and has one.
func (l *line) comeDown(theirs compat.Range) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	v, ok := l.opts.speaks().Common(theirs)
	if !ok || l.established || v >= int(l.version) {
		return false
	}
	l.version = uint16(v)
	return true
}

// knows tells whether a HELLO has the session's secret.
func (l *line) knows(g greeting) bool {
	return subtle.ConstantTimeCompare(l.secret[:], g.secret[:]) == 1
}

// takeOver makes way for a new transport at the accepting end, and gives what its WELCOME says: the old one delivers nothing
// from now on. A HELLO with the right secret that cannot be continued from ends the session.
func (l *line) takeOver(g greeting) (position, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.ended && l.err == nil:
		return position{}, ErrClosed
	case l.ended:
		return position{}, errGone
	case g.attempt <= l.attempt:
		return position{}, errStale
	}
	if err := l.fitsLocked(g.at); err != nil {
		l.finishLocked(brokenProblem(err))
		return position{}, errGone
	}
	l.attempt = g.attempt
	l.detachLocked(l.tr, errReplaced)
	if l.ended { // both ends had closed already
		return position{}, ErrClosed
	}
	return l.tellLocked(), nil
}

// fitsLocked checks that both ends can go on from where the other says it is.
func (l *line) fitsLocked(theirs position) error {
	switch {
	case theirs.received < l.acked || theirs.received > l.high:
		return violation("it has received %d bytes of %d, and had %d before", theirs.received, l.high, l.acked)
	case theirs.sent < l.received || theirs.sent > l.granted:
		return violation("it has sent %d bytes, of which %d arrived and %d were allowed", theirs.sent, l.received, l.granted)
	case theirs.limit < theirs.received:
		return violation("it takes %d bytes and has received %d", theirs.limit, theirs.received)
	}
	return nil
}

func brokenProblem(err error) error {
	return problem.Wrap(err, problem.LinkLost, "please report this with both runners' logs", "the ends of the link do not agree on what was sent")
}

// attach goes on over conn, on which the ends have told each other their positions. The caller keeps conn on an error.
func (l *line) attach(conn net.Conn, attempt uint32, mine, theirs position) (*transport, error) {
	l.mu.Lock()
	outage, tr, err := l.attachLocked(conn, attempt, mine, theirs)
	l.mu.Unlock()
	if err != nil {
		return nil, err
	}
	if outage != nil {
		l.opts.log().Info("link: resumed", "session", l.id, "site", l.peer.Site, "down", outage.Resumed.Sub(outage.Cut), "resent", outage.Resent)
		if l.opts.OnOutage != nil {
			l.opts.OnOutage(*outage)
		}
	}
	return tr, nil
}

func (l *line) attachLocked(conn net.Conn, attempt uint32, mine, theirs position) (*Outage, *transport, error) {
	switch {
	case l.ended && l.err != nil:
		return nil, nil, l.err
	case l.ended:
		return nil, nil, ErrClosed
	case attempt != l.attempt || l.tr != nil || mine.received != l.received:
		return nil, nil, errStale
	}
	if err := l.fitsLocked(theirs); err != nil {
		err = brokenProblem(err)
		l.finishLocked(err)
		return nil, nil, err
	}
	var outage *Outage
	if l.attached {
		outage = &Outage{Peer: l.peer, Cut: l.cutAt, Resumed: time.Now(), Resent: int64(l.high-theirs.received) + int64(theirs.sent-l.received)}
		l.stats.Resumes++
		l.stats.Away += outage.Resumed.Sub(outage.Cut)
	}
	l.attached = true
	l.laneless, l.broken = time.Time{}, 0
	l.stats.Down = time.Time{}
	for _, t := range []*time.Timer{l.expiry, l.notice} {
		if t != nil {
			t.Stop()
		}
	}
	l.ackedLocked(theirs.received, theirs.limit)
	l.sent = theirs.received
	l.told = mine.received
	l.tr = newTransport(conn, l)
	l.room.Broadcast()
	l.running.Go(l.tr.run)
	return outage, l.tr, nil
}

// detach is told that a transport is lost. It is a cut only for the current one.
func (l *line) detach(tr *transport, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.tr == tr {
		l.detachLocked(tr, err)
	}
}

func (l *line) detachLocked(tr *transport, err error) {
	if tr == nil {
		return
	}
	tr.drop()
	l.tr = nil
	if l.closing && l.peerClosed {
		l.finishLocked(nil) // all was said; only the other end may not have heard the last of it
		return
	}
	for la := range l.lanes {
		if la.out { // the hub ends a link that is not to be any more, and cannot reach these
			la.cut()
			delete(l.lanes, la)
			l.releaseLocked(la.own)
		}
	}
	l.words = nil
	for number := range l.asked {
		l.answerLocked(number, errLaneCut)
	}
	l.cutAt = time.Now()
	if errors.Is(err, os.ErrDeadlineExceeded) {
		l.cutAt = tr.heard() // found dead by its silence, it has been so since the last word
	}
	l.stats.Cuts++
	l.stats.Down = l.cutAt
	l.opts.log().Info("link: cut", "session", l.id, "site", l.peer.Site, "because", err)
	if errors.Is(err, errViolation) {
		if l.violations++; l.violations >= maxViolations {
			l.finishLocked(brokenProblem(err))
			return
		}
	}
	l.expireLocked()
	if l.opts.OnCut == nil {
		return
	}
	cut, since := l.stats.Cuts, l.cutAt
	l.notice = time.AfterFunc(max(noticeAfter-time.Since(since), 0), func() {
		l.mu.Lock()
		still := l.tr == nil && l.stats.Cuts == cut && !l.ended && !l.closing
		l.mu.Unlock()
		if still {
			l.opts.OnCut(l.peer, since)
		}
	})
}

// expireLocked ends the line unless it has a transport in time.
func (l *line) expireLocked() {
	if l.expiry != nil {
		l.expiry.Stop()
	}
	tolerance := l.opts.Tolerance
	if tolerance == 0 {
		tolerance = DefaultTolerance
	}
	if tolerance < 0 {
		return
	}
	cut := l.stats.Cuts
	l.expiry = time.AfterFunc(tolerance-time.Since(l.cutAt), func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.tr == nil && l.stats.Cuts == cut {
			l.finishLocked(problem.New(problem.LinkLost, "see whether the network, the hub or the other end's machine went away at that time",
				"the link was cut and could not be had back for %v", tolerance))
		}
	})
}

// ackedLocked drops what the other end has.
func (l *line) ackedLocked(received, limit uint64) {
	l.out.discard(int(received - l.acked))
	l.acked = received
	l.limit = max(l.limit, limit)
	if l.out.n == 0 && len(l.out.buf) > keepRing && time.Since(l.full) > time.Second { // one that is in use would be made anew at once
		l.out.release()
	}
	l.room.Broadcast()
}

// onAck takes an ACK.
func (l *line) onAck(tr *transport, u unit) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.tr != tr:
		return errReplaced
	case u.number < l.acked || u.number > l.sent || u.limit < l.limit || u.limit < u.number:
		return violation("an ACK of %d and up to %d, after %d and up to %d, of %d sent", u.number, u.limit, l.acked, l.limit, l.sent)
	}
	l.ackedLocked(u.number, u.limit)
	tr.poke()
	return nil
}

// expect takes the head of a DATA frame.
func (l *line) expect(tr *transport, u unit) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.tr != tr:
		return errReplaced
	case u.number != l.received:
		return violation("DATA from %d on where %d comes next", u.number, l.received)
	case uint64(u.length) > l.granted-l.received:
		return violation("DATA up to %d where %d is the limit", u.number+uint64(u.length), l.granted)
	}
	return nil
}

// deliver takes a piece of a DATA frame.
func (l *line) deliver(tr *transport, p []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.tr != tr {
		return errReplaced
	}
	if !l.closing {
		l.in.write(p)
	}
	l.received += uint64(len(p))
	switch {
	case l.received-l.told >= l.ackStep():
		tr.poke()
	case tr.ackAt.IsZero():
		tr.ackAt = time.Now().Add(ackDelay)
		tr.poke()
	}
	l.data.Signal()
	return nil
}

// onClose takes a CLOSE.
func (l *line) onClose(tr *transport, u unit) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.tr != tr:
		return errReplaced
	case u.number != l.received:
		return violation("a CLOSE at %d where %d comes next", u.number, l.received)
	}
	l.peerClosed = true
	l.data.Broadcast()
	l.room.Broadcast()
	tr.poke()
	return nil
}

// refused ends the line for a reason that the other end gave; an orderly one is an end of the stream.
func (l *line) refused(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.peerClosed || l.closing {
		err = nil
	}
	l.finishLocked(err)
}

// frames appends what is to be sent now over tr. With nothing to send it gives until when nothing will be; with over,
// there will be nothing any more.
func (l *line) frames(tr *transport, b []byte) (out []byte, until time.Time, over bool, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.tr != tr {
		return b, time.Time{}, false, errReplaced
	}
	now := time.Now()
	if tr.closeSent {
		return b, now.Add(time.Hour), l.peerClosed, nil
	}
	end := l.endLocked()
	n := 0
	if to := min(end, l.limit); to > l.sent {
		n = int(min(to-l.sent, sendData))
	}
	grant := max(l.grantLocked(), l.granted)
	news := l.received > l.told || grant > l.granted
	due := l.received-l.told >= l.ackStep() || grant-l.granted >= l.ackStep() || !tr.ackAt.IsZero() && !now.Before(tr.ackAt)
	if news && (due || n > 0) {
		b = appendUnit(b, ackUnit(l.received, grant))
		l.told, l.granted = l.received, grant
	}
	if l.received == l.told {
		tr.ackAt = time.Time{}
	}
	if n > 0 {
		b = appendUnit(b, unit{kind: frameData, length: n, number: l.sent})
		at := len(b)
		b = b[:at+n]
		l.out.peek(b[at:], int(l.sent-l.acked))
		if l.sent < l.high {
			l.stats.Resent += int64(min(uint64(n), l.high-l.sent))
		}
		l.sent += uint64(n)
		l.high = max(l.high, l.sent)
		l.room.Broadcast()
	}
	for _, u := range l.words {
		if u.kind == frameNo || l.asked[u.number] != nil { // it is still waited for: maxLanes at most, as there are of NO
			b = appendUnit(b, u)
		}
	}
	l.words = nil
	if l.closing && l.sent == end {
		b = appendUnit(b, unit{kind: frameClose, number: end})
		tr.closeSent = true
	}
	ping := tr.wrote.Add(pingEvery)
	if len(b) == 0 && !now.Before(ping) {
		b = appendUnit(b, unit{kind: framePing})
		l.out.release()
		l.in.release()
	}
	if len(b) > 0 {
		tr.wrote = now
		return b, time.Time{}, false, nil
	}
	if !tr.ackAt.IsZero() && tr.ackAt.Before(ping) {
		return b, tr.ackAt, false, nil
	}
	return b, ping, false, nil
}

// retire ends the line if both ends have closed over tr.
func (l *line) retire(tr *transport) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.tr == tr && tr.closeSent && l.peerClosed {
		l.tr = nil
		l.finishLocked(nil)
	}
}

func (l *line) snapshot() Stats {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.stats
	s.Sent, s.Received = int64(l.high)+l.laneSent.Load(), int64(l.received)+l.laneReceived.Load()
	return s
}

// moved changes whenever the other end has heard or said something new.
func (l *line) moved() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.received + l.acked
}

// LocalAddr gives no address: those of transports come and go.
func (l *line) LocalAddr() net.Addr { return lineAddr{} }

// RemoteAddr gives none either.
func (l *line) RemoteAddr() net.Addr { return lineAddr{} }

// SetDeadline does nothing, as the next two: the multiplexer's deadlines would take an outage for the end.
func (l *line) SetDeadline(time.Time) error { return nil }

// SetReadDeadline does nothing.
func (l *line) SetReadDeadline(time.Time) error { return nil }

// SetWriteDeadline does nothing.
func (l *line) SetWriteDeadline(time.Time) error { return nil }

type lineAddr struct{}

func (lineAddr) Network() string { return "link" }
func (lineAddr) String() string  { return "link" }

// waitForFirst has a line of the accepting end expire if its first transport never comes.
func (l *line) waitForFirst() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.tr == nil && !l.ended {
		l.cutAt = time.Now()
		l.expireLocked()
	}
}
