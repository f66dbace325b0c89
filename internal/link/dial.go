package link

import (
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"time"

	"github.com/pergolafl/pergola/internal/compat"
	"github.com/pergolafl/pergola/internal/problem"
)

const (
	// firstPause and maxPause are between attempts to make a transport. The first attempt after a cut is made at once.
	firstPause = 100 * time.Millisecond
	maxPause   = 2 * time.Second
	// steady is how long a transport must last to be worth an attempt at once when it is lost, if it has carried nothing.
	steady = 10 * time.Second
	// dialWait is how long one call of a Dialer may take.
	dialWait = 30 * time.Second
)

// Dial makes a session over a transport from d, and gives it when the other end's runner has welcomed it. The
// error is a version problem if the ends speak different versions, denied if the other end refuses this one,
// otherwise link-lost. From then on d is called again whenever a transport is lost. The session does not end with ctx; call
// [Session.Close].
func Dial(ctx context.Context, d Dialer, opts Options) (*Session, error) {
	id, secret, err := newSessionID()
	if err != nil {
		return nil, err
	}
	l := newLine(id, secret, opts.Peer, opts)
	l.dialer = d
	s, err := dial(ctx, d, l)
	if err != nil {
		l.finish(err)
		return nil, err
	}
	return s, nil
}

func dial(ctx context.Context, d Dialer, l *line) (*Session, error) {
	start, wait := time.Now(), firstPause
	for {
		c, err := l.connect(ctx, d)
		if err == nil {
			return begin(d, l, c)
		}
		if ctx.Err() != nil {
			return nil, problem.Wrap(context.Cause(ctx), problem.LinkLost, "", "the link was given up before it was made")
		}
		if errors.Is(err, errComeDown) {
			l.opts.log().Info("link: the other end is older", "version", l.speaksIn())
			continue // at once: each time the version is an older one
		}
		left := l.opts.Retry - time.Since(start)
		if isFinal(err) || left <= 0 {
			if way, ok := errors.AsType[pathError](err); ok {
				return nil, way.error
			}
			return nil, err
		}
		p := min(jitter(wait), left)
		l.opts.log().Info("link: try again", "in", p, "because", err)
		pause(ctx, p)
		wait = min(2*wait, maxPause)
	}
}

// begin makes a session of the first connection.
func begin(d Dialer, l *line, c *connection) (*Session, error) {
	l.size(c.rtt)
	s, err := newSession(l, true, c.rtt)
	if err != nil {
		hardClose(c.Conn)
		return nil, err
	}
	tr, err := l.attach(c.Conn, c.attempt, c.mine, c.theirs)
	if err != nil {
		hardClose(c.Conn)
		_ = s.Close() // it has ended with l
		return nil, err
	}
	l.spawn(func() { l.keepUp(d, tr) })
	return s, nil
}

// jitter leaves half of a pause to chance, so that many ends do not come back in step.
func jitter(d time.Duration) time.Duration {
	return d/2 + rand.N(d/2) //nolint:gosec // a pause is no secret
}

// errComeDown says that the other end speaks an older version, which this end takes now.
var errComeDown = errors.New("the other end speaks an older version")

// isFinal tells that no further attempt can succeed.
func isFinal(err error) bool {
	code := problem.CodeOf(err)
	return code == problem.Version || code == problem.Denied || errors.Is(err, errGone) || errors.Is(err, ErrClosed)
}

// pathError is a Dialer's. Whatever it says is about the way, which may be better later, and not the other end's word: it keeps a
// session from beginning, but does not end one.
type pathError struct{ error }

func (e pathError) Unwrap() error { return e.error }

// keepUp makes a new transport whenever one is lost, until the line ends.
func (l *line) keepUp(d Dialer, tr *transport) {
	wait := time.Duration(0)
	for {
		before := l.moved()
		began := time.Now()
		select {
		case <-tr.lost:
		case <-l.over.Done():
			return
		}
		if l.moved() != before || time.Since(began) >= steady {
			wait = 0
		}
		for {
			if wait > 0 && !pause(l.over, jitter(wait)) || l.over.Err() != nil {
				return
			}
			wait = min(max(2*wait, firstPause), maxPause)
			c, err := l.connect(l.over, d)
			if err == nil {
				if tr, err = l.attach(c.Conn, c.attempt, c.mine, c.theirs); err == nil {
					break
				}
				hardClose(c.Conn)
			}
			if _, way := errors.AsType[pathError](err); !way && isFinal(err) {
				l.refused(err)
				return
			}
			l.opts.log().Info("link: still cut", "session", l.id, "because", err)
		}
	}
}

// connection is a transport on which both ends have greeted each other.
type connection struct {
	net.Conn
	attempt      uint32
	mine, theirs position
	rtt          time.Duration // of a session's beginning
}

// connect makes one transport and greets the other end.
func (l *line) connect(ctx context.Context, d Dialer) (*connection, error) {
	dctx, cancel := context.WithTimeout(ctx, dialWait)
	conn, err := d(dctx)
	cancel()
	if err != nil {
		if _, ok := errors.AsType[*problem.Error](err); ok {
			return nil, pathError{err}
		}
		return nil, pathError{problem.Wrap(err, problem.LinkLost, "check that the hub runs and can be reached from this machine", "the other end of the link cannot be reached")}
	}
	tune(conn)
	c, err := l.greet(ctx, conn)
	if err != nil {
		hardClose(conn)
		return nil, err
	}
	return c, nil
}

// greet says HELLO and waits for the WELCOME. At a session's beginning it also measures the round trip.
func (l *line) greet(ctx context.Context, conn net.Conn) (*connection, error) {
	defer context.AfterFunc(ctx, func() { hardClose(conn) })()
	lost := func(err error) (*connection, error) {
		return nil, problem.Wrap(noEOF(err), problem.LinkLost, "see the hub's log for why it closed the connection", "the other end of the link did not answer")
	}
	if err := conn.SetDeadline(time.Now().Add(handshakeWait)); err != nil {
		return lost(err)
	}
	hello, version := l.hello(), l.speaksIn()
	c := &connection{Conn: conn, attempt: hello.attempt, mine: hello.at}
	if _, err := conn.Write(appendFrame(nil, helloFrame(hello).in(version))); err != nil {
		return lost(err)
	}
	f, err := readFrame(conn)
	switch {
	case err != nil:
		return lost(err)
	case f.version != version:
		theirs, ok := f.spoken()
		if !ok {
			theirs = compat.Range{Min: int(f.version), Max: int(f.version)}
		}
		if ok && l.comeDown(theirs) {
			return nil, errComeDown
		}
		return nil, versionProblem(l.opts.speaks(), theirs)
	case f.kind == frameRefuse && len(f.body) == 1:
		return nil, refusal(f.body[0])
	}
	if c.theirs, err = f.welcome(l.id); err != nil {
		return lost(err)
	}
	if !hello.resume {
		// Not HELLO and WELCOME: between those the hub may have waited for its runner.
		began := time.Now()
		if _, err := conn.Write(appendFrame(nil, startFrame(l.id).in(version))); err != nil {
			return lost(err)
		}
		if err := readStartIn(conn, l.id, version); err != nil {
			return lost(err)
		}
		c.rtt = time.Since(began)
		l.mu.Lock()
		l.established = true
		l.mu.Unlock()
	}
	if err := conn.SetDeadline(time.Time{}); err != nil {
		return lost(err)
	}
	return c, nil
}

// refusal gives the error for the reason of a REFUSE.
func refusal(reason byte) error {
	switch reason {
	case refusePeer:
		return problem.New(problem.Denied, "see the log of the hub's runner", "the other end of the link refused this one")
	case refuseGone:
		return problem.Wrap(errGone, problem.LinkLost, "see the other end's log for how the session ended there", "the other end of the link has given the session up")
	case refuseClosed:
		return ErrPeerClosed
	case refuseStale:
		return problem.Wrap(errStale, problem.LinkLost, "", "the other end of the link has a newer connection")
	}
	return problem.New(problem.LinkLost, "see the log of the hub's runner", "the other end of the link refused the connection for reason %d", reason)
}
