package flower

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
)

// A run's states, as Flower names them (flwr/common/constant.py, Status and SubStatus, 1.13 – 1.41).
const (
	statusFinished = "finished"

	subCompleted = "completed"
	subStopped   = "stopped"
)

type runStatus struct{ status, sub, details string }

// control is a client of a superlink's API for runs. The calls' field numbers are the same from 1.13 to
// 1.41 (flwr/proto/exec.proto, control.proto, run.proto, fab.proto, transport.proto); what changed is
// the service's name, and the transport, at 1.37 or so.
type control struct {
	base    string // "http://127.1.2.3:9093"
	service string // "flwr.proto.Exec" or "flwr.proto.Control"; "" is HTTP
	client  *http.Client
	stream  *http.Client // without a limit of time
}

const (
	callTimeout = 20 * time.Second // loopback; the first call may wait for the server's threads
	maxReply    = 16 << 20         // ListRuns of one run is a few hundred bytes
)

func newControl(addr string, gen Generation) *control {
	t := &http.Transport{
		Proxy:           nil, // loopback, whatever the environment says
		DialContext:     (&net.Dialer{Timeout: 5 * time.Second}).DialContext,
		IdleConnTimeout: time.Minute,
		Protocols:       new(http.Protocols),
	}
	c := &control{base: "http://" + addr, client: &http.Client{Transport: t, Timeout: callTimeout}, stream: &http.Client{Transport: t}}
	switch {
	case gen >= GenMixed:
		t.Protocols.SetHTTP1(true)
	case gen >= GenControl:
		c.service = "flwr.proto.Control"
	default:
		c.service = "flwr.proto.Exec"
	}
	if c.service != "" {
		t.Protocols.SetUnencryptedHTTP2(true)
	}
	return c
}

func (c *control) close() { c.client.CloseIdleConnections() }

// errNotOffered says that the superlink does not have that call.
var errNotOffered = errors.New("the superlink does not offer this call")

// callError is a superlink's refusal.
type callError struct {
	code int // gRPC or HTTP status
	msg  string
}

func (e *callError) Error() string { return fmt.Sprintf("%s (status %d)", e.msg, e.code) }

// startRun submits a FAB and gives the run's id.
func (c *control) startRun(ctx context.Context, fab []byte, hash string, overrides map[string]any) (uint64, error) {
	var f []byte
	f = appendString(f, 1, hash)
	f = protowire.AppendTag(f, 2, protowire.BytesType)
	f = protowire.AppendBytes(f, fab)
	req := protowire.AppendTag(nil, 1, protowire.BytesType)
	req = protowire.AppendBytes(req, f)
	for _, key := range slices.Sorted(maps.Keys(overrides)) {
		entry := appendString(nil, 1, key)
		entry = protowire.AppendTag(entry, 2, protowire.BytesType)
		entry = protowire.AppendBytes(entry, scalar(overrides[key]))
		req = protowire.AppendTag(req, 2, protowire.BytesType)
		req = protowire.AppendBytes(req, entry)
	}
	reply, err := c.call(ctx, "StartRun", "start-run", req)
	if refused, ok := errors.AsType[*callError](err); ok && strings.Contains(refused.msg, "Federation ''") {
		// 1.24 and 1.25 want the name of their only federation (NOOP_FEDERATION in flwr/supercore/constant.py); others take none for it.
		reply, err = c.call(ctx, "StartRun", "start-run", appendString(req, 5, "default"))
	}
	if err != nil {
		return 0, err
	}
	var id uint64
	err = fields(reply, func(n protowire.Number, v uint64, _ []byte) error {
		if n == 1 {
			id = v
		}
		return nil
	})
	if err == nil && id == 0 {
		err = errors.New("the superlink refused the run; its log says why")
	}
	return id, err
}

// state asks for a run's status.
func (c *control) state(ctx context.Context, run uint64) (runStatus, error) {
	req := protowire.AppendTag(nil, 1, protowire.VarintType)
	req = protowire.AppendVarint(req, run)
	reply, err := c.call(ctx, "ListRuns", "list-runs", req)
	if err != nil {
		return runStatus{}, err
	}
	return decodeRuns(reply, run)
}

// follow passes on what the server app prints from the given time on (seconds since 1970, the
// superlink's clock), until the run has ended, the stream breaks or ctx ends. It gives the time to go on from.
// A nil error means that the superlink ended the stream.
func (c *control) follow(ctx context.Context, run uint64, after float64, fn func(text string)) (float64, error) {
	req := protowire.AppendTag(nil, 1, protowire.VarintType)
	req = protowire.AppendVarint(req, run)
	req = protowire.AppendTag(req, 2, protowire.Fixed64Type)
	req = protowire.AppendFixed64(req, math.Float64bits(after))
	path, contentType, header := "/v1/control/stream-logs", "application/protobuf", 4
	if c.service != "" {
		path, contentType, header = "/"+c.service+"/StreamLogs", "application/grpc", 5
		req = grpcFrame(req)
	}
	resp, err := c.post(ctx, c.stream, path, contentType, req)
	if err != nil {
		return after, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return after, &callError{resp.StatusCode, "no log stream"}
	}
	head := make([]byte, header)
	for {
		if _, err := io.ReadFull(resp.Body, head); err != nil {
			if errors.Is(err, io.EOF) {
				return after, nil // gRPC's status says nothing that ListRuns does not
			}
			return after, err
		}
		size := binary.BigEndian.Uint32(head[header-4:])
		if size > maxReply {
			return after, fmt.Errorf("the log stream announces a message of %d bytes", size)
		}
		msg := make([]byte, size)
		if _, err := io.ReadFull(resp.Body, msg); err != nil {
			return after, err
		}
		err := fields(msg, func(n protowire.Number, v uint64, b []byte) error {
			switch n {
			case 1:
				fn(string(b))
			case 2:
				after = math.Float64frombits(v)
			}
			return nil
		})
		if err != nil {
			return after, err
		}
	}
}

func grpcFrame(msg []byte) []byte {
	frame := make([]byte, 5, 5+len(msg))
	binary.BigEndian.PutUint32(frame[1:], uint32(len(msg))) // a FAB of at most 10 MiB and its config
	return append(frame, msg...)
}

// decodeRuns finds a run's status in a ListRunsResponse.
func decodeRuns(reply []byte, run uint64) (st runStatus, err error) {
	found := false
	err = fields(reply, func(n protowire.Number, _ uint64, entry []byte) error {
		if n != 1 {
			return nil
		}
		var id uint64
		var this runStatus
		err := fields(entry, func(n protowire.Number, v uint64, b []byte) error {
			switch n {
			case 1:
				id = v
			case 2:
				return fields(b, func(n protowire.Number, _ uint64, b []byte) error {
					if n != 10 {
						return nil
					}
					return fields(b, func(n protowire.Number, _ uint64, b []byte) error {
						switch n {
						case 1:
							this.status = string(b)
						case 2:
							this.sub = string(b)
						case 3:
							this.details = string(b)
						}
						return nil
					})
				})
			}
			return nil
		})
		if err == nil && id == run {
			st, found = this, true
		}
		return err
	})
	if err == nil && !found {
		err = fmt.Errorf("the superlink does not know run %d", run)
	}
	return st, err
}

// fields calls fn for each field of a protobuf message: v for varints and 64-bit ones, b for length-delimited ones.
func fields(msg []byte, fn func(n protowire.Number, v uint64, b []byte) error) error {
	for len(msg) > 0 {
		num, typ, n := protowire.ConsumeTag(msg)
		if n < 0 {
			return fmt.Errorf("bad message: %w", protowire.ParseError(n))
		}
		msg = msg[n:]
		var v uint64
		var b []byte
		switch typ {
		case protowire.VarintType:
			v, n = protowire.ConsumeVarint(msg)
		case protowire.BytesType:
			b, n = protowire.ConsumeBytes(msg)
		case protowire.Fixed64Type:
			v, n = protowire.ConsumeFixed64(msg)
		default:
			n = protowire.ConsumeFieldValue(num, typ, msg)
		}
		if n < 0 {
			return fmt.Errorf("bad message: %w", protowire.ParseError(n))
		}
		msg = msg[n:]
		if err := fn(num, v, b); err != nil {
			return err
		}
	}
	return nil
}

func appendString(b []byte, n protowire.Number, s string) []byte {
	return protowire.AppendString(protowire.AppendTag(b, n, protowire.BytesType), s)
}

// scalar encodes a run config value as flwr.proto.Scalar (transport.proto).
func scalar(v any) []byte {
	switch v := v.(type) {
	case float64:
		return protowire.AppendFixed64(protowire.AppendTag(nil, 1, protowire.Fixed64Type), math.Float64bits(v))
	case int64:
		return protowire.AppendVarint(protowire.AppendTag(nil, 8, protowire.VarintType), protowire.EncodeZigZag(v))
	case bool:
		return protowire.AppendVarint(protowire.AppendTag(nil, 13, protowire.VarintType), protowire.EncodeBool(v))
	}
	return appendString(nil, 14, fmt.Sprint(v))
}

func (c *control) call(ctx context.Context, method, path string, msg []byte) ([]byte, error) {
	if c.service == "" {
		return c.callHTTP(ctx, "/v1/control/"+path, msg)
	}
	return c.callGRPC(ctx, "/"+c.service+"/"+method, msg)
}

func (c *control) callHTTP(ctx context.Context, path string, msg []byte) ([]byte, error) {
	resp, err := c.post(ctx, c.client, path, "application/protobuf", msg)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxReply))
	switch {
	case err != nil:
		return nil, fmt.Errorf("%s: %w", path, err)
	case resp.StatusCode == http.StatusNotFound, resp.StatusCode == http.StatusMethodNotAllowed, resp.StatusCode == http.StatusUnsupportedMediaType:
		return nil, fmt.Errorf("%s: %w: HTTP %s: %s", path, errNotOffered, resp.Status, clip(body))
	case resp.StatusCode != http.StatusOK:
		return nil, &callError{resp.StatusCode, clip(body)}
	}
	return body, nil
}

// callGRPC makes a unary gRPC call (https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md).
func (c *control) callGRPC(ctx context.Context, path string, msg []byte) ([]byte, error) {
	resp, err := c.post(ctx, c.client, path, "application/grpc", grpcFrame(msg))
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxReply))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	status, text := resp.Trailer.Get("Grpc-Status"), resp.Trailer.Get("Grpc-Message")
	if status == "" { // a reply of headers only
		status, text = resp.Header.Get("Grpc-Status"), resp.Header.Get("Grpc-Message")
	}
	if decoded, err := url.PathUnescape(text); err == nil {
		text = decoded
	}
	switch {
	case status == "12": // UNIMPLEMENTED
		return nil, fmt.Errorf("%s: %w: %s", path, errNotOffered, text)
	case resp.StatusCode != http.StatusOK || status == "":
		return nil, fmt.Errorf("%s: HTTP %s without a gRPC status", path, resp.Status)
	case status != "0":
		code := 0
		if _, err := fmt.Sscan(status, &code); err != nil {
			code = -1
		}
		return nil, &callError{code, text}
	case len(body) < 5 || body[0] != 0 || int(binary.BigEndian.Uint32(body[1:])) != len(body)-5:
		return nil, fmt.Errorf("%s: the reply is not one uncompressed gRPC message", path)
	}
	return body[5:], nil
}

func (c *control) post(ctx context.Context, client *http.Client, path, contentType string, body []byte) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.base+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", contentType)
	if contentType == "application/grpc" {
		req.Header.Set("TE", "trailers")
	} else {
		req.Header.Set("Accept-Encoding", "identity")
	}
	return client.Do(req)
}

func clip(b []byte) string {
	s := strings.ToValidUTF8(strings.TrimSpace(string(b)), "?")
	return s[:min(len(s), 500)]
}
