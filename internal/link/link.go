// Package link carries streams between the two runners of a job over one connection at a time. It knows nothing of jobs,
// of TLS or of Flower: a [Dialer] gives the transport, any reliable byte stream will do.
//
//	site runner ── Dial ═ TLS ═ hub: WritePreface, Splice ═ unix socket ═ Acceptor ── hub runner
//	               HELLO{version, session} ──────────────────────▶
//	               ◀────────────────── WELCOME{version, session} or REFUSE{version, reason}
//	               ── START ────────────────────────────────────▶
//	               ◀──────────────────────────────────── START ──
//	               ◀═════════════ streams (yamux) ═══════════════▶
//
// A session is one transport long for now: what the transport loses ends it, with a link-lost problem. Its name is
// exchanged and its interface does not show the transport, so that a session can come to outlive transports.
// Both ends send something at least every few seconds; an end that hears nothing for 15 s takes the path for dead.
// Start with [Dial] and [NewAcceptor]; the frames are in hello.go.
package link

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"sync"
	"time"

	"github.com/pergolafl/pergola/internal/problem"
)

const (
	// Silence is for how long an end may hear nothing before it takes the path for dead.
	Silence = 15 * time.Second
	// pingEvery is how often an end makes itself heard. A ping that is not answered is given up after pingWait, so
	// two of them are tried well within Silence even on a congested path.
	pingEvery = 3 * time.Second
	pingWait  = 4 * time.Second
	// writeStall is how long one write to the transport may take: with full buffers, 1 KiB/s still gets by.
	writeStall = 60 * time.Second
	// handshakeWait is how long HELLO and WELCOME may take together.
	handshakeWait = 15 * time.Second
	// closeWait is how long an orderly close waits for the other end.
	closeWait = 5 * time.Second
	// maxHandshakes bounds the connections that have not yet said who they are.
	maxHandshakes = 256
)

// ErrClosed is the end of a session that was closed in order; [ErrPeerClosed] is one too.
var ErrClosed = errors.New("the link is closed")

// ErrPeerClosed is the end of a session that the other end closed in order.
var ErrPeerClosed = fmt.Errorf("%w by the other end", ErrClosed)

// ErrReset is what a stream's Read and Write give after either end has reset it, or its session is gone.
var ErrReset = errors.New("the stream was reset")

// Peer is the other end of a session.
type Peer struct{ Job, Site string }

// Dialer makes one transport. It is called again after the last one is lost, or could not be made.
type Dialer func(ctx context.Context) (net.Conn, error)

// Options of a session or an acceptor. The zero value will do.
type Options struct {
	// Peer is what the session of a dialling end calls its other end; acceptors learn it from the preface.
	Peer Peer
	// Retry is how long Dial goes on trying when no transport can be made, with pauses of 0.1 to 5 s. 0: one attempt.
	// A refusal ends the trying at once.
	Retry time.Duration
	// Allow decides about a peer before it is welcomed (acceptors); nil allows every one. The peer is told no more
	// than that it was refused.
	Allow func(Peer) error
	// Log takes what nobody is there to be told: connections that never became a session. nil: nowhere.
	Log *slog.Logger
}

func (o Options) log() *slog.Logger {
	if o.Log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return o.Log
}

// Dial makes a session over a transport from d, and gives it when the other end's runner has welcomed it. The
// error is a version problem if the ends speak different versions, denied if the other end refuses this one,
// otherwise link-lost. The session does not end with ctx; call [Session.Close].
func Dial(ctx context.Context, d Dialer, opts Options) (*Session, error) {
	id, err := newSessionID()
	if err != nil {
		return nil, err
	}
	start, wait := time.Now(), 100*time.Millisecond
	for {
		s, err := dialOnce(ctx, d, id, opts)
		if err == nil {
			return s, nil
		}
		if ctx.Err() != nil {
			return nil, problem.Wrap(context.Cause(ctx), problem.LinkLost, "", "the link was given up before it was made")
		}
		code := problem.CodeOf(err)
		left := opts.Retry - time.Since(start)
		if code == problem.Version || code == problem.Denied || left <= 0 {
			return nil, err
		}
		// Half of the pause is left to chance, so that many ends do not come back in step.
		pause := min(wait/2+rand.N(wait/2), left) //nolint:gosec // a pause is no secret
		opts.log().Info("link: try again", "in", pause, "because", err)
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
		}
		wait = min(2*wait, 5*time.Second)
	}
}

func dialOnce(ctx context.Context, d Dialer, id sessionID, opts Options) (*Session, error) {
	conn, err := d(ctx)
	if err != nil {
		if p, ok := errors.AsType[*problem.Error](err); ok {
			return nil, p
		}
		return nil, problem.Wrap(err, problem.LinkLost, "check that the hub runs and can be reached from this machine", "the other end of the link cannot be reached")
	}
	rtt, err := greet(ctx, conn, id)
	if err != nil {
		return nil, errors.Join(err, ignoreClosed(conn.Close()))
	}
	return newSession(conn, true, opts.Peer, id, rtt)
}

// greet says HELLO, waits for the WELCOME and measures the round trip.
func greet(ctx context.Context, conn net.Conn, id sessionID) (time.Duration, error) {
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	lost := func(err error) (time.Duration, error) {
		return 0, problem.Wrap(noEOF(err), problem.LinkLost, "see the hub's log for why it closed the connection", "the other end of the link did not answer")
	}
	if err := conn.SetDeadline(time.Now().Add(handshakeWait)); err != nil {
		return lost(err)
	}
	if _, err := conn.Write(appendFrame(nil, helloFrame(id))); err != nil {
		return lost(err)
	}
	f, err := readFrame(conn)
	if err != nil {
		return lost(err)
	}
	switch {
	case f.version != Version:
		return 0, versionProblem(f.version)
	case f.kind == frameRefuse && len(f.body) == 1 && f.body[0] == refusePeer:
		return 0, problem.New(problem.Denied, "see the log of the hub's runner", "the other end of the link refused this one")
	case f.kind != frameWelcome:
		return lost(errNotLink)
	}
	if got, err := f.session(); err != nil || got != id {
		return lost(errNotLink)
	}
	// Not HELLO and WELCOME: between those the hub may have waited for its runner.
	began := time.Now()
	if _, err := conn.Write(appendFrame(nil, startFrame(id))); err != nil {
		return lost(err)
	}
	if err := readStart(conn, id); err != nil {
		return lost(err)
	}
	rtt := time.Since(began)
	if err := conn.SetDeadline(time.Time{}); err != nil {
		return lost(err)
	}
	return rtt, nil
}

// Acceptor is the hub runner's end: it makes sessions of the connections that the hub splices to its socket.
type Acceptor struct {
	opts     Options
	sessions chan *Session

	mu   sync.Mutex
	last map[Peer]*Session // guarded by mu: the newest session of each peer
}

// NewAcceptor makes an acceptor; [Acceptor.Serve] feeds it.
func NewAcceptor(opts Options) *Acceptor {
	return &Acceptor{opts: opts, sessions: make(chan *Session), last: make(map[Peer]*Session)}
}

// Serve takes the connections of ln until ctx is done, closes ln and what has not been accepted, and returns nil; it returns
// an error if ln fails before. A peer has one session: a new one ends the old one, whose transport may not have
// noticed yet that it is dead.
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
				a.opts.log().Warn("link: a connection was refused", "error", err)
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

// welcome reads preface and HELLO and answers.
func (a *Acceptor) welcome(ctx context.Context, conn net.Conn) (s *Session, err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, ignoreClosed(conn.Close()))
		}
	}()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	if err := conn.SetDeadline(time.Now().Add(handshakeWait)); err != nil {
		return nil, err
	}
	peer, err := ReadPreface(conn)
	if err != nil {
		return nil, err
	}
	f, err := readFrame(conn)
	if err != nil {
		return nil, fmt.Errorf("read the HELLO of %s: %w", peer.Site, noEOF(err))
	}
	if f.kind != frameHello {
		return nil, fmt.Errorf("read the HELLO of %s: %w", peer.Site, errNotLink)
	}
	refuse := func(reason byte, err error) error {
		_, werr := conn.Write(appendFrame(nil, refuseFrame(reason)))
		return errors.Join(fmt.Errorf("link of %s: %w", peer.Site, err), werr)
	}
	if f.version != Version {
		return nil, refuse(refuseVersion, versionProblem(f.version))
	}
	id, err := f.session()
	if err != nil {
		return nil, fmt.Errorf("read the HELLO of %s: %w", peer.Site, err)
	}
	if a.opts.Allow != nil {
		if err := a.opts.Allow(peer); err != nil {
			return nil, refuse(refusePeer, err)
		}
	}
	if _, err := conn.Write(appendFrame(nil, welcomeFrame(id))); err != nil {
		return nil, fmt.Errorf("welcome %s: %w", peer.Site, err)
	}
	began := time.Now()
	if err := readStart(conn, id); err != nil {
		return nil, fmt.Errorf("read the START of %s: %w", peer.Site, err)
	}
	rtt := time.Since(began)
	if _, err := conn.Write(appendFrame(nil, startFrame(id))); err != nil {
		return nil, fmt.Errorf("start %s: %w", peer.Site, err)
	}
	if err := conn.SetDeadline(time.Time{}); err != nil {
		return nil, err
	}
	s, err = newSession(conn, false, peer, id, rtt)
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	old := a.last[peer]
	for p, s := range a.last {
		if s.Err() != nil {
			delete(a.last, p) // holds on to no session that has ended
		}
	}
	a.last[peer] = s
	a.mu.Unlock()
	if old != nil {
		old.abandon()
	}
	return s, nil
}

// Splice copies between a and b, each direction until its end, which is passed on as a half-close, and closes both.
// It returns nil after both ends, else the first error, or ctx's. Once one direction has ended, the other may be
// silent for 15 s at most, for the peer of an ended link has nothing more to say.
func Splice(ctx context.Context, a, b net.Conn) error {
	tune(a)
	tune(b)
	stop := context.AfterFunc(ctx, func() { _, _ = a.Close(), b.Close() })
	var mu sync.Mutex
	var first error
	var once sync.WaitGroup
	ended := make(chan struct{})
	var endedOnce sync.Once
	one := func(from, to net.Conn) {
		err := pump(from, to, ended)
		if err == nil {
			err = closeWrite(to)
		}
		if err == nil {
			endedOnce.Do(func() {
				close(ended)
				_ = to.SetReadDeadline(time.Now().Add(Silence)) // the read that waits now; later ones set their own
			})
			return
		}
		mu.Lock()
		if first == nil {
			first = err
		}
		mu.Unlock()
		_, _ = a.Close(), b.Close() // wakes the other direction
	}
	once.Go(func() { one(a, b) })
	once.Go(func() { one(b, a) })
	once.Wait()
	if !stop() {
		first = context.Cause(ctx)
	}
	_, _ = a.Close(), b.Close()
	return first
}

// pump copies until from ends (nil) or either fails.
func pump(from, to net.Conn, ended <-chan struct{}) error {
	b := buffers.Get().(*[spliceBuffer]byte) //nolint:errcheck // the pool holds nothing else
	defer buffers.Put(b)
	for {
		select {
		case <-ended:
			if err := from.SetReadDeadline(time.Now().Add(Silence)); err != nil {
				return err
			}
		default:
		}
		n, err := from.Read(b[:])
		if n > 0 {
			if _, werr := to.Write(b[:n]); werr != nil {
				return werr
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
