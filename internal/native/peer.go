package native

import (
	"context"
	"errors"
	"io"
	"net"
	"time"

	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/relay"
)

// Names of what a stream of the link can be opened to.
const (
	Target     = "native"      // the control stream, opened by a site's runner
	PackTarget = "native-pack" // one pack, opened by whoever has it
)

// Stream is a stream of the link.
type Stream = relay.Stream

// OpenFunc opens a stream of the link to a target.
type OpenFunc func(ctx context.Context, target string) (Stream, error)

// Opener opens streams of a link.
type Opener struct {
	Open OpenFunc
	Lane OpenFunc // opens one that carries much for less, and breaks when the link is cut; nil: there are none
}

// Process is a Python process and the runner's end of its socket pair.
type Process struct {
	Conn net.Conn
	Pid  int
	Done <-chan struct{} // it has ended, and what it printed was read

	// Stop ends it: asks, and after grace kills. It waits until the process is gone.
	Stop func(grace time.Duration)
	// Exit says how it ended; it waits for that.
	Exit func() string
}

// Peer is a process that has greeted.
type Peer struct {
	Process
	conn *conn
	Flwr string // the version that it runs with
}

// Greet waits for a process's greeting. The error is that of ctx, io.EOF where the process ended or closed its socket, or a version problem.
func Greet(ctx context.Context, p Process) (*Peer, error) {
	c := newConn(p.Conn)
	stop := context.AfterFunc(ctx, c.close)
	f, err := c.read()
	if !stop() && ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if err != nil {
		return nil, ended(err)
	}
	f.close()
	if f.T != tHello || f.Protocol != Protocol {
		return nil, problem.New(problem.Version, "run `pergola` of one version on this machine", "the Python side of the native engine speaks version %d of its protocol, this one %d", f.Protocol, Protocol)
	}
	return &Peer{Process: p, conn: c, Flwr: f.Flwr}, nil
}

// ended makes io.EOF of every way in which a socket tells that its other end is gone.
func ended(err error) error {
	if _, ok := errors.AsType[*problem.Error](err); ok || errors.Is(err, io.EOF) {
		return err
	}
	return errors.Join(io.EOF, err)
}
