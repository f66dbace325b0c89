package flower

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"
)

// speaksHTTP2 tells whether the server at addr answers HTTP/2's connection preface with its SETTINGS,
// which is what a gRPC server does as soon as it serves (RFC 9113, section 3.4).
func speaksHTTP2(ctx context.Context, addr string) error {
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	deadline := time.Now().Add(5 * time.Second)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	if err := conn.SetDeadline(deadline); err != nil {
		return err
	}
	const settings = 4 // frame type
	if _, err := conn.Write([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + "\x00\x00\x00\x04\x00\x00\x00\x00\x00")); err != nil {
		return err
	}
	var header [9]byte
	if _, err := io.ReadFull(conn, header[:]); err != nil {
		return err
	}
	if header[3] != settings {
		return fmt.Errorf("%s does not speak HTTP/2", addr)
	}
	return nil
}

// speaksHTTP1 tells whether the server at addr answers an HTTP request; any status will do.
func speaksHTTP1(ctx context.Context, addr string) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+"/", nil)
	if err != nil {
		return err
	}
	t := &http.Transport{DisableKeepAlives: true}
	defer t.CloseIdleConnections()
	resp, err := t.RoundTrip(req)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

// readyPause is the time between two looks at a port that does not answer yet.
const readyPause = 25 * time.Millisecond

// waitReady waits until every check passes, died is closed or ctx ends; it gives the last reason.
func waitReady(ctx context.Context, died <-chan struct{}, checks []func(context.Context) error) error {
	tick := time.NewTicker(readyPause)
	defer tick.Stop()
	last := errors.New("no answer yet")
	for _, check := range checks {
		for {
			if err := check(ctx); err == nil {
				break
			} else if ctx.Err() == nil {
				last = err
			}
			select {
			case <-died:
				return errDied
			case <-ctx.Done():
				return fmt.Errorf("%w: %w", context.Cause(ctx), last)
			case <-tick.C:
			}
		}
	}
	select {
	case <-died:
		return errDied
	default:
		return nil
	}
}

var errDied = errors.New("the program ended")
