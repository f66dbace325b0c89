package link

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/pergolafl/pergola/internal/compat"
	"github.com/pergolafl/pergola/internal/problem"
)

// Acceptor is the hub runner's end: it makes sessions of the connections that the hub splices to its socket, and hands
// later connections of a session to it.
type Acceptor struct {
	opts     Options
	sessions chan *Session

	key func() (*laneKey, error) // made when the first lane needs it

	mu   sync.Mutex
	last map[Peer]*Session // guarded by mu: the newest session of each peer, ended or not
}

// NewAcceptor makes an acceptor; [Acceptor.Serve] feeds it.
func NewAcceptor(opts Options) *Acceptor {
	return &Acceptor{opts: opts, sessions: make(chan *Session), key: sync.OnceValues(newLaneKey), last: make(map[Peer]*Session)}
}

// Serve takes the connections of ln until ctx is done, closes ln and what has not been accepted, and returns nil; it returns
// an error if ln fails before. A peer has one session: a new one ends the old one. Sessions that were accepted live on,
// but can resume only while Serve runs.
func (a *Acceptor) Serve(ctx context.Context, ln net.Listener) error {
	var conns sync.WaitGroup
	defer conns.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer ln.Close()
	defer context.AfterFunc(ctx, func() { _ = ln.Close() })()
	slots := make(chan struct{}, maxHandshakes)
	for {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		conn, err := ln.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			<-slots
			if isTransient(err) {
				a.opts.log().Warn("link: accept", "error", err)
				if !pause(ctx, 50*time.Millisecond) {
					return nil
				}
				continue
			}
			return problem.Wrap(err, problem.Internal, "", "links cannot be accepted any more")
		}
		conns.Go(func() {
			s, err := a.welcome(ctx, conn)
			<-slots
			if err != nil {
				hardClose(conn)
				a.opts.log().Warn("link: a connection was refused", "error", err)
			}
			if s == nil {
				return
			}
			select {
			case a.sessions <- s:
			case <-s.Done():
			case <-ctx.Done():
				_ = s.Close() // its end is told by Err
			}
		})
	}
}

// Accept gives the next session. The error is that of ctx.
func (a *Acceptor) Accept(ctx context.Context) (*Session, error) {
	select {
	case s := <-a.sessions:
		return s, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// welcome reads preface and HELLO and answers. It gives a session if that is new, even if its first transport fails at the
// last moment: the other end knows it and comes back.
func (a *Acceptor) welcome(ctx context.Context, conn net.Conn) (*Session, error) {
	stop := context.AfterFunc(ctx, func() { hardClose(conn) })
	defer stop()
	if err := conn.SetDeadline(time.Now().Add(handshakeWait)); err != nil {
		return nil, err
	}
	peer, raw, err := readHandedOn(conn)
	if err != nil {
		return nil, err
	}
	if raw != nil {
		defer raw.Close() // a lane has its own by then
	}
	f, err := readFrame(conn)
	if err != nil {
		return nil, fmt.Errorf("read the HELLO of %s: %w", peer.Site, noEOF(err))
	}
	if f.kind == frameLane {
		return nil, a.lane(ctx, peer, conn, raw, f)
	}
	if f.kind != frameHello {
		return nil, fmt.Errorf("read the HELLO of %s: %w", peer.Site, errNotLink)
	}
	refuseBy := func(r frame, err error) (*Session, error) {
		return nil, errors.Join(fmt.Errorf("link of %s: %w", peer.Site, err), refuseOn(conn, r))
	}
	refuse := func(reason byte, err error) (*Session, error) {
		return refuseBy(refuseFrame(reason).in(f.version), err)
	}
	if own := a.opts.speaks(); int(f.version) < own.Min || int(f.version) > own.Max {
		return refuseBy(versionFrame(own), versionProblem(own, compat.Range{Min: int(f.version), Max: int(f.version)}))
	}
	g, err := f.greeting()
	if err != nil {
		return nil, fmt.Errorf("read the HELLO of %s: %w", peer.Site, err)
	}
	if a.opts.Allow != nil {
		if err := a.opts.Allow(peer); err != nil {
			return refuse(refusePeer, err)
		}
	}
	known, mine, err := a.find(peer, g, f.version)
	if err != nil {
		return refuse(reasonFor(err), err)
	}
	if _, err := conn.Write(appendFrame(nil, welcomeFrame(g.id, mine).in(f.version))); err != nil {
		return nil, fmt.Errorf("welcome %s: %w", peer.Site, err)
	}
	var made *Session
	if !g.resume {
		began := time.Now()
		if err := readStartIn(conn, g.id, f.version); err != nil {
			return nil, fmt.Errorf("read the START of %s: %w", peer.Site, err)
		}
		if known == nil {
			if made, err = a.begin(peer, g, f.version, time.Since(began)); err != nil {
				return nil, err
			}
			known = made
		}
		// From here on the other end may know the session.
		if _, err := conn.Write(appendFrame(nil, startFrame(g.id).in(f.version))); err != nil {
			return made, fmt.Errorf("start %s: %w", peer.Site, err)
		}
	}
	if err := conn.SetDeadline(time.Time{}); err != nil {
		return made, err
	}
	stop()
	if _, err := known.line.attach(conn, g.attempt, mine, g.at); err != nil {
		return made, fmt.Errorf("link of %s: %w", peer.Site, err)
	}
	return made, nil
}

// Refuse tells the dialling end of a link that begins that it has no business here, so that its session ends, and closes conn. It is
// for whoever passes links on.
func Refuse(conn net.Conn) error {
	defer hardClose(conn)
	if err := conn.SetDeadline(time.Now().Add(handshakeWait)); err != nil {
		return err
	}
	f, err := readFrame(conn)
	if err != nil {
		return noEOF(err)
	}
	// There is nothing in it that a version could change.
	return refuseOn(conn, refuseFrame(refusePeer).in(f.version))
}

// refuseOn says a REFUSE and ends the connection in order, so that the reason arrives.
func refuseOn(conn net.Conn, r frame) error {
	if _, err := conn.Write(appendFrame(nil, r)); err != nil {
		return err
	}
	return ignoreClosed(conn.Close())
}

func reasonFor(err error) byte {
	switch {
	case errors.Is(err, ErrClosed):
		return refuseClosed
	case errors.Is(err, errStale):
		return refuseStale
	}
	return refuseGone
}

// find gives the session of a HELLO, nil if it is to be made, and what the WELCOME says. A peer finds its own
// session only, and only with its secret; whatever is wrong, it is told the same.
func (a *Acceptor) find(peer Peer, g greeting, version uint16) (*Session, position, error) {
	a.mu.Lock()
	s := a.last[peer]
	a.mu.Unlock()
	if s == nil || s.line.id != g.id {
		if g.resume {
			return nil, position{}, errGone
		}
		return nil, position{limit: uint64(a.buffer())}, nil
	}
	if !s.line.knows(g) {
		return nil, position{}, fmt.Errorf("%w with this secret", errGone)
	}
	if s.line.speaksIn() != version {
		return nil, position{}, fmt.Errorf("%w in version %d of the link", errGone, version)
	}
	mine, err := s.line.takeOver(g)
	return s, mine, err
}

func (a *Acceptor) buffer() int {
	if a.opts.Buffer > 0 {
		return a.opts.Buffer
	}
	return DefaultBuffer
}

// begin makes the session of a HELLO. A connection of the same session that was faster wins: the other end has
// given it up, and comes back.
func (a *Acceptor) begin(peer Peer, g greeting, version uint16, rtt time.Duration) (*Session, error) {
	l := newLine(g.id, g.secret, peer, a.opts)
	l.attempt, l.version, l.granted = g.attempt, version, uint64(a.buffer())
	l.size(rtt)
	a.mu.Lock()
	old := a.last[peer]
	if old != nil && old.line.id == g.id {
		a.mu.Unlock()
		l.finish(errStale)
		return nil, fmt.Errorf("link of %s: %w", peer.Site, errStale)
	}
	s, err := newSession(l, false, rtt)
	if err != nil {
		a.mu.Unlock()
		l.finish(err)
		return nil, err
	}
	a.last[peer] = s
	a.mu.Unlock()
	l.waitForFirst()
	if old != nil {
		old.abandon()
	}
	return s, nil
}
