// Package link carries streams between the two runners of a job over a connection that may come and go. Bytes arrive
// once and in order; an outage costs at most the replay buffer (8 MiB each way unless set otherwise) and nobody above
// notices more than a pause, as long as it is shorter than [Options].Tolerance. It knows nothing of jobs or of
// Flower: a [Dialer] gives the transports, any reliable byte stream will do.
//
//	site runner ── Dial ═ TLS ═ hub: HandOn, Splice ═ unix socket ═ Acceptor ── hub runner
//
//	streams (yamux)            Session, session.go
//	  └─ one byte stream       line.go: numbers, keeps and replays; never ends by an outage
//	      └─ transports        transport.go: frames of DATA, ACK, PING, CLOSE; one at a time, each begins with
//	                           HELLO{session, secret, position} ─▶ ◀─ WELCOME{position} or REFUSE{reason}
//
// What is much and can be sent again may have a lane beside that, lane.go: a stream on a connection of its own, which costs less and ends with it.
// Where the hub passes what lies below its TLS to its runner ([HandOn]), a lane leaves it, handover.go.
//
// Both ends send something at least every few seconds; an end that hears nothing for 15 s takes the path for dead, and the
// dialling end makes a new one. Start with [Dial] and [NewAcceptor]; docs/link-protocol.md has the protocol.
package link

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/pergolafl/pergola/internal/compat"
)

const (
	// Silence is for how long an end may hear nothing before it takes the path for dead.
	Silence = 15 * time.Second
	// pingEvery is how often an end makes itself heard.
	pingEvery = 3 * time.Second
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
	// Retry is how long Dial goes on trying when no transport can be made, with pauses of 0.1 to 2 s. 0: one attempt.
	// A refusal ends the trying at once.
	Retry time.Duration
	// DialLane makes the connection of a lane (dialling ends); nil: as any other.
	DialLane Dialer
	// Allow decides about a peer before it is welcomed (acceptors); nil allows every one. The peer is told no more
	// than that it was refused.
	Allow func(Peer) error
	// Tolerance is for how long the session waits for a transport after a cut before it ends. 0: [DefaultTolerance];
	// negative: for ever.
	Tolerance time.Duration
	// Buffer is how many bytes each end keeps until the other has acknowledged them, and takes from the other before
	// they are read. One buffer is sent in a round trip at most. 0: [DefaultBuffer], or up to 32 MiB where the round trip at
	// the session's beginning asks for it.
	Buffer int
	// OnCut is told of each outage once, when it has lasted 5 s: whose it is, and since when. It must not block.
	OnCut func(Peer, time.Time)
	// OnOutage is told each outage of each session when it is over and the session has resumed. It must not block. An
	// outage that ends the session is told by its Err alone.
	OnOutage func(Outage)
	// Log takes what nobody is there to be told: connections that never became a session. nil: nowhere.
	Log *slog.Logger

	speak compat.Range // tests play ends of other ages; zero: Versions
}

func (o Options) speaks() compat.Range {
	if o.speak == (compat.Range{}) {
		return Versions
	}
	return o.speak
}

// Outage is a time in which a session had no transport.
type Outage struct {
	Peer    Peer
	Cut     time.Time // when the path was last known to work
	Resumed time.Time
	Resent  int64 // bytes of both directions that were sent before and are sent again
}

// Stats counts what a session has been through.
type Stats struct {
	Cuts     int64         // transports that were lost
	Resumes  int64         // transports that came after one that was lost
	Resent   int64         // bytes that this end has sent more than once
	Sent     int64         // bytes that this end has sent, each counted once, frames and handshakes not
	Received int64         // bytes that have come, counted so too
	Away     time.Duration // without a transport, all outages that are over together
	Down     time.Time     // since when there is no transport; zero if there is one
}

func (o Options) log() *slog.Logger {
	if o.Log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return o.Log
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
	// A splice that is idle holds little: the large buffer is only had while there is much to carry.
	little := make([]byte, idleBuffer)
	b := little
	var large *[spliceBuffer]byte
	defer func() {
		if large != nil {
			buffers.Put(large)
		}
	}()
	source, sink := coalescerOf(from), coalescerOf(to)
	for {
		select {
		case <-ended:
			if err := from.SetReadDeadline(time.Now().Add(Silence)); err != nil {
				return err
			}
		default:
		}
		n, err := source.readFrom(from, b)
		if n > 0 {
			if werr := sink.writeTo(to, b[:n]); werr != nil {
				return werr
			}
		}
		switch {
		case n == len(little) && large == nil:
			large = buffers.Get().(*[spliceBuffer]byte) //nolint:errcheck // the pool holds nothing else
			b = large[:]
		case n < len(little) && large != nil:
			buffers.Put(large)
			large, b = nil, little
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
