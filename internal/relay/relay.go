// Package relay carries TCP or unix connections over streams: a listener at one end, a dial at the other, one
// stream per connection. The programs at both ends see what they would see on a direct connection: half-close,
// reset, a refused far end (as a reset, for the near end has connected already) and the other's slowness.
//
//	program ─▶ Listen ═ stream: header, then bytes ═ Serve ─▶ program
//
// It never looks inside the bytes and knows nothing of what carries the streams. A stream begins with a header, sent
// by the end that opened it:
//
//	'R'  version (1)  length n (1–63)  n bytes: the target's name, a lower-case DNS label
//
// Whatever goes wrong on one side of a connection is a reset on the other; there is no second way to fail.
// Start with [Listen] and [Serve], or with [Open] and [Streams] where there is no connection to carry.
package relay

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/pergolafl/pergola/internal/problem"
)

// Stream is one bidirectional stream. CloseWrite ends the writing half: the peer reads what was sent and then
// io.EOF. Reset drops both halves at once: the peer's reads and writes fail. It is an alias, so that functions
// which give the same set of methods fit without an adapter.
type Stream = interface {
	net.Conn
	CloseWrite() error
	Reset() error
}

const (
	headerMark    = 'R'
	headerVersion = 1
	// MaxTarget is the greatest length of a target's name in bytes.
	MaxTarget = 63
	// bufferSize is what one direction of one connection reads at a time, in bytes: two TLS records.
	bufferSize = 32 << 10
)

// Listen carries every connection that ln accepts over a stream of its own to the target, until ctx is done; then it closes
// ln, resets what is still open, waits for it and returns nil. It returns an error if ln fails before. A stream that
// cannot be opened resets its connection.
func Listen(ctx context.Context, ln net.Listener, target string, open func(context.Context) (Stream, error)) error {
	head, err := appendHeader(nil, target)
	if err != nil {
		return errors.Join(err, ln.Close())
	}
	var conns sync.WaitGroup
	defer conns.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// Close's error is of no use: the listener is gone either way, and an earlier close by its owner is fine.
	defer context.AfterFunc(ctx, func() { _ = ln.Close() })()
	defer ln.Close()
	for {
		conn, err := ln.Accept()
		switch {
		case err == nil:
		case ctx.Err() != nil:
			return nil
		case isTransient(err):
			if !pause(ctx, 50*time.Millisecond) {
				return nil
			}
			continue
		default:
			return problem.Wrap(err, problem.Internal, "", "the relay to %s cannot accept connections any more", target)
		}
		conns.Go(func() {
			s, err := open(ctx)
			if err != nil {
				abort(conn)
				return
			}
			if _, err := s.Write(head); err != nil {
				_ = s.Reset()
				abort(conn)
				return
			}
			join(ctx, conn, s)
		})
	}
}

// Serve carries every stream that accept gives to the connection that dial makes for the target named in its header, until
// ctx is done (it returns nil) or accept fails (it returns that error); then it resets what is still open and waits
// for it. A dial may block until the program is ready; its error resets the stream.
func Serve(ctx context.Context, accept func(context.Context) (Stream, error), dial func(ctx context.Context, target string) (net.Conn, error)) error {
	var conns sync.WaitGroup
	defer conns.Wait()
	outer := ctx
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for {
		s, err := accept(ctx)
		if err != nil {
			if outer.Err() != nil {
				return nil
			}
			return fmt.Errorf("accept a stream: %w", err)
		}
		conns.Go(func() {
			target, err := acceptHeader(ctx, s)
			if err != nil {
				_ = s.Reset()
				return
			}
			conn, err := dial(ctx, target)
			if err != nil {
				_ = s.Reset()
				return
			}
			join(ctx, conn, s)
		})
	}
}

// Streams hands every stream that accept gives, its header read, to handle with the target named in it, each on a goroutine of its own:
// for ends that make something of streams without a connection behind them. handle closes the stream. It returns as [Serve] does,
// when all of them have.
func Streams(ctx context.Context, accept func(context.Context) (Stream, error), handle func(ctx context.Context, target string, s Stream)) error {
	var streams sync.WaitGroup
	defer streams.Wait()
	outer := ctx
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for {
		s, err := accept(ctx)
		if err != nil {
			if outer.Err() != nil {
				return nil
			}
			return fmt.Errorf("accept a stream: %w", err)
		}
		streams.Go(func() {
			target, err := acceptHeader(ctx, s)
			if err != nil {
				_ = s.Reset()
				return
			}
			handle(ctx, target, s)
		})
	}
}

// Open opens a stream that names target, for what [Streams] hands on at the far end.
func Open(ctx context.Context, target string, open func(context.Context) (Stream, error)) (Stream, error) {
	head, err := appendHeader(nil, target)
	if err != nil {
		return nil, err
	}
	s, err := open(ctx)
	if err != nil {
		return nil, fmt.Errorf("open a stream: %w", err)
	}
	if _, err := s.Write(head); err != nil {
		_ = s.Reset()
		return nil, fmt.Errorf("name a stream's target: %w", err)
	}
	return s, nil
}

// Signal opens a stream that names target and carries nothing, and waits until the far end has ended it: its dial has
// returned then. The error is that of ctx or of the session.
func Signal(ctx context.Context, target string, open func(context.Context) (Stream, error)) error {
	s, err := Open(ctx, target, open)
	if err != nil {
		return err
	}
	defer s.Close()
	defer context.AfterFunc(ctx, func() { _ = s.Reset() })()
	_, _ = s.Read(make([]byte, 1)) // its end, which a reset is
	return ctx.Err()
}

// acceptHeader reads the header. The opener sends it at once, but it has no limit in time: what carries the streams may be cut between
// a stream's opening and its header, for hours. An opener that never sends one has been let in by its certificate, and the
// streams that it may have open are limited.
func acceptHeader(ctx context.Context, s Stream) (string, error) {
	defer context.AfterFunc(ctx, func() { _ = s.Reset() })()
	return readHeader(s)
}

// appendHeader writes the header that names target.
func appendHeader(b []byte, target string) ([]byte, error) {
	if !validTarget(target) {
		return nil, problem.New(problem.Internal, "", "%q cannot be a relay's target", target)
	}
	b = append(b, headerMark, headerVersion, byte(len(target)))
	return append(b, target...), nil
}

// readHeader reads exactly one header and nothing behind it.
func readHeader(r io.Reader) (string, error) {
	var b [3 + MaxTarget]byte
	if _, err := io.ReadFull(r, b[:3]); err != nil {
		return "", fmt.Errorf("read a relay header: %w", err)
	}
	if b[0] != headerMark {
		return "", problem.New(problem.Internal, "", "a stream does not begin with a relay header")
	}
	if b[1] != headerVersion {
		return "", problem.New(problem.Version, "install the same version of pergola at both ends",
			"the other end's relay speaks version %d, this one version %d", b[1], headerVersion)
	}
	n := int(b[2])
	if n < 1 || n > MaxTarget {
		return "", problem.New(problem.Internal, "", "a relay header names a target of %d bytes", n)
	}
	name := b[3 : 3+n]
	if _, err := io.ReadFull(r, name); err != nil {
		return "", fmt.Errorf("read a relay header: %w", err)
	}
	if !validTarget(string(name)) {
		return "", problem.New(problem.Internal, "", "a relay header names the target %q", name)
	}
	return string(name), nil
}

func validTarget(s string) bool {
	if s == "" || len(s) > MaxTarget || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	for i := range len(s) {
		if c := s[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}

func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
