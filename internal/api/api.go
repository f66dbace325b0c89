// Package api has what both ends of the API share: problems on the wire, the forms of events and jobs,
// and clients. The messages are generated from proto/ into pergola/v1 below.
//
// It serves nothing and keeps nothing; hub, site and runner do. Start with [NewClient] and [Mount].
package api

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"connectrpc.com/connect/v2/connectproto"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/api/pergola/v1/pergolav1connect"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/sock"
	"github.com/pergolafl/pergola/internal/uplink"
)

// MaxMessage is the largest message in bytes that either end accepts: chunks of bundles and logs are
// 1 MiB at most, and a job's settings 1 MiB.
const MaxMessage = 4 << 20

// MaxChunk is the most bytes of a bundle or a log in one message of a stream.
const MaxChunk = 1 << 20

// MaxUpload is the most bytes of a bundle in one call. Each is answered when it is on the hub's disk, so this is what a cut
// costs at most, and what goes over the wire in one round trip.
const MaxUpload = 3 << 20

// Client calls the services of one hub, or of one runner.
type Client struct {
	Jobs    pergolav1connect.JobServiceClient
	Bundles pergolav1connect.BundleServiceClient
	Sites   pergolav1connect.SiteServiceClient
	Runner  pergolav1connect.RunnerServiceClient
	Who     pergolav1connect.IdentityServiceClient
	http    *http.Client
	conns   *conns
	asking  *asking
}

// NewClient calls the hub at addr, as package uplink takes it, by the way that the environment says. What is wrong with either
// is told by the first call.
func NewClient(addr string, conf *tls.Config) *Client {
	c, err := Dial(uplink.Config{Hubs: []string{addr}, TLS: conf})
	if err != nil {
		return newClient(func() *http.Transport {
			return &http.Transport{DialTLSContext: func(context.Context, string, string) (net.Conn, error) { return nil, err }}
		}, "https://"+pki.HubName)
	}
	return c
}

// Dial calls the hub that up leads to. Calls have no time limit but their context's. The error is one of up's.
func Dial(up uplink.Config) (*Client, error) {
	up.TLS = up.TLS.Clone()
	up.TLS.NextProtos = []string{"h2", "http/1.1"}
	d, err := uplink.New(up)
	if err != nil {
		return nil, err
	}
	return newDialing(d.Dial, "https://"+d.Hubs()[0]), nil
}

// newDialing is a client over TLS connections.
func newDialing(dial func(context.Context) (*tls.Conn, error), base string) *Client {
	last := new(atomic.Pointer[tls.Conn])
	c := newClient(func() *http.Transport {
		return &http.Transport{
			DialTLSContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				conn, err := dial(ctx)
				if err != nil {
					return nil, err // a nil *tls.Conn would be no nil net.Conn
				}
				last.Store(conn)
				return conn, nil
			},
			ForceAttemptHTTP2: true,
			HTTP2:             &http.HTTP2Config{SendPingTimeout: 10 * time.Second, PingTimeout: 5 * time.Second},
		}
	}, base)
	c.conns.last = last
	return c
}

// NewRunnerClient calls the runner that serves the socket at path.
func NewRunnerClient(path string) *Client {
	return newClient(func() *http.Transport {
		return &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return sock.Dial(ctx, path) }}
	}, "http://runner")
}

// conns are a client's connections, which can be left to their calls while later calls have others.
type conns struct {
	make func() *http.Transport
	last *atomic.Pointer[tls.Conn] // the newest one; nil where there is no TLS

	mu  sync.Mutex      // guards the rest
	now *http.Transport // of calls that begin
}

func (c *conns) transport() *http.Transport {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

// RoundTrip implements http.RoundTripper.
func (c *conns) RoundTrip(r *http.Request) (*http.Response, error) {
	res, err := c.transport().RoundTrip(r)
	if err == nil || c.last == nil || pki.Explain(err) != nil {
		return res, err
	}
	if conn := c.last.Load(); conn != nil && (cannotWrite(err) || strings.Contains(err.Error(), notEstablished)) {
		if why := ending(conn); pki.Explain(why) != nil {
			return nil, why
		}
	}
	return nil, err
}

// notEstablished is what net/http says, in place of the reason, of a new connection whose end was read before the first request
// was written, as when a certificate is refused after this end's part of the handshake (h2_bundle.go, errClientConnNotEstablished).
const notEstablished = "client conn could not be established"

// cannotWrite tells whether a connection takes no more.
func cannotWrite(err error) bool {
	op, ok := errors.AsType[*net.OpError](err)
	return ok && op.Op == "write"
}

// ending gives the error that the reader of a connection that is over has met: crypto/tls gives it to every later reader, too.
func ending(c *tls.Conn) error {
	if err := c.SetReadDeadline(time.Now().Add(50 * time.Millisecond)); err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	_, err := c.Read(make([]byte, 1))
	return err
}

// CloseIdleConnections is what http.Client calls.
func (c *conns) CloseIdleConnections() { c.transport().CloseIdleConnections() }

// Fresh has calls from now on make connections of their own, as when there is another certificate. Those that are open go on
// with their calls, and the hub closes them when they are idle.
func (c *Client) Fresh() {
	c.conns.mu.Lock()
	old := c.conns.now
	c.conns.now = c.conns.make()
	c.conns.mu.Unlock()
	old.CloseIdleConnections()
}

func newClient(t func() *http.Transport, base string) *Client {
	own := &conns{make: t, now: t()}
	h := &http.Client{Transport: own}
	say := &asking{}
	c := connect.NewClient(connecthttp.NewTransport(h, base, connecthttp.WithReadMaxBytes(MaxMessage)), clientProblems, say.ask)
	return &Client{
		Jobs: pergolav1connect.NewJobServiceClient(c), Bundles: pergolav1connect.NewBundleServiceClient(c),
		Sites: pergolav1connect.NewSiteServiceClient(c), Runner: pergolav1connect.NewRunnerServiceClient(c),
		Who: pergolav1connect.NewIdentityServiceClient(c), http: h, conns: own, asking: say,
	}
}

// Close drops idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Mount puts the services registered on a server onto mux. The server must have been made by NewServer.
func Mount(mux *http.ServeMux, s *connect.Server) {
	connecthttp.Mount(mux, s, connecthttp.WithReadMaxBytes(MaxMessage))
}

// Observe hears of a call when it begins; done hears of its end: "ok", "canceled" by the caller, or the code of a problem.
type Observe func(procedure string, stream bool) (done func(code string))

// NewServer makes a server whose handlers may return problems. The errors below them go to log, not to the caller. Observers
// hear of each call of a procedure that there is.
func NewServer(log *slog.Logger, observe ...Observe) *connect.Server {
	return NewGatedServer(log, nil, observe...)
}

// NewGatedServer is NewServer with an interceptor that says which calls get to the handlers, and may return problems as they do.
func NewGatedServer(log *slog.Logger, gate connect.ServerInterceptor, observe ...Observe) *connect.Server {
	within := []connect.ServerInterceptor{func(next connect.ServerFunc) connect.ServerFunc {
		return func(ctx context.Context, spec connect.Spec, stream connect.ServerStream) (err error) {
			var ends []func(string)
			for _, o := range observe {
				ends = append(ends, o(spec.Procedure, spec.StreamType != connect.StreamTypeUnary))
			}
			defer func() {
				for _, end := range ends {
					end(outcome(ctx, err))
				}
			}()
			err = next(ctx, spec, stream)
			if err != nil && ctx.Err() == nil {
				log.Info("a call was refused", "procedure", spec.Procedure, "err", err)
			}
			if _, ok := errors.AsType[*problem.Error](err); !ok && ctx.Err() != nil && errors.Is(err, context.Canceled) {
				// Its caller has gone and hears nothing of it; or this process ends, and takes its streams along.
				err = errStopped
			}
			return toWire(err)
		}
	}}
	within = append(within, answer)
	if gate != nil {
		within = append(within, gate)
	}
	return connect.NewServer(within...)
}

var errStopped = problem.New(problem.HubUnreachable, "it is back in a moment if it was started again", "the hub has stopped")

// outcome names how a call ended.
func outcome(ctx context.Context, err error) string {
	if err == nil {
		return "ok"
	}
	if errors.Is(err, errStopped) {
		return "canceled"
	}
	if _, ok := errors.AsType[*problem.Error](err); !ok && (ctx.Err() != nil || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)) {
		return "canceled"
	}
	if ce, ok := errors.AsType[*connect.Error](err); ok {
		for _, d := range ce.Details() {
			if m, e := connectproto.UnmarshalErrorDetail(d); e == nil {
				if p, ok := m.(*pb.Problem); ok {
					return p.GetCode()
				}
			}
		}
		return ce.Code().String()
	}
	return string(problem.CodeOf(err))
}

// clientProblems turns what a call or its stream gives back into problems.
func clientProblems(next connect.ClientFunc) connect.ClientFunc {
	return func(ctx context.Context, spec connect.Spec) (connect.ClientStream, error) {
		s, err := next(ctx, spec)
		if err != nil {
			return nil, fromWire(err)
		}
		return problemStream{s}, nil
	}
}

type problemStream struct{ connect.ClientStream }

func (s problemStream) Send(msg any) error    { return fromWire(s.ClientStream.Send(msg)) }
func (s problemStream) Receive(msg any) error { return fromWire(s.ClientStream.Receive(msg)) }

var wireCodes = map[int]connect.Code{
	400: connect.CodeInvalidArgument, 403: connect.CodePermissionDenied, 404: connect.CodeNotFound,
	409: connect.CodeAlreadyExists, 500: connect.CodeInternal, 503: connect.CodeUnavailable, 507: connect.CodeResourceExhausted,
}

func toWire(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := errors.AsType[*connect.Error](err); ok {
		return err
	}
	// A problem may have come of a time limit that the hub itself had set; then it is no answer about the caller's.
	if _, ok := errors.AsType[*problem.Error](err); !ok && (errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)) {
		return err
	}
	p := problem.From(err)
	out := connect.NewError(wireCodes[problem.Codes[p.Code].HTTP], p.Msg).WithCause(err)
	if d, e := connectproto.NewErrorDetail(Problem(p)); e == nil {
		out = out.WithDetail(d)
	}
	return out
}

func fromWire(err error) error {
	if err == nil {
		return nil
	}
	if p, ok := errors.AsType[*problem.Error](err); ok {
		return p // of the way to the hub
	}
	ce, ok := errors.AsType[*connect.Error](err)
	if !ok {
		return err
	}
	for _, d := range ce.Details() {
		if m, e := connectproto.UnmarshalErrorDetail(d); e == nil {
			if p, ok := m.(*pb.Problem); ok {
				return FromProblem(p)
			}
		}
	}
	if ce.Code() == connect.CodeUnavailable {
		if p := pki.Explain(err); p != nil { // with TLS 1.3 the hub refuses a certificate when the handshake is over for this end
			return p
		}
		return &problem.Error{Code: problem.HubUnreachable, Msg: "the hub does not answer", Err: err, Next: "check that it runs, and that its address is right"}
	}
	return err
}

// Problem gives p's form on the wire. The error below it stays here: it may name what is nobody else's business.
func Problem(p *problem.Error) *pb.Problem {
	if p == nil {
		return nil
	}
	return &pb.Problem{Code: string(p.Code), Party: p.Party, Message: p.Msg, Next: p.Next, Log: p.Log}
}

// FromProblem gives the problem that p stands for.
func FromProblem(p *pb.Problem) *problem.Error {
	if p == nil {
		return nil
	}
	return &problem.Error{Code: problem.Code(p.Code), Party: p.Party, Msg: p.Message, Next: p.Next, Log: p.Log}
}

// Event gives e's form on the wire.
func Event(e job.Event) (*pb.Event, error) {
	out := &pb.Event{Seq: e.Seq, JobId: string(e.Job), Time: timestamppb.New(e.At), Party: e.Party, Kind: e.Kind}
	if len(e.Body) > 0 {
		out.Body = &structpb.Struct{}
		if err := protojson.Unmarshal(e.Body, out.Body); err != nil {
			return nil, fmt.Errorf("body of event %s: %w", e.Kind, err)
		}
	}
	return out, nil
}

// FromEvent gives the event that e stands for.
func FromEvent(e *pb.Event) (job.Event, error) {
	out := job.Event{Seq: e.GetSeq(), Job: job.ID(e.GetJobId()), At: e.GetTime().AsTime(), Party: e.GetParty(), Kind: e.GetKind()}
	if e.GetBody() != nil {
		b, err := json.Marshal(e.GetBody().AsMap())
		if err != nil {
			return job.Event{}, fmt.Errorf("body of event %s: %w", e.GetKind(), err)
		}
		out.Body = b
	}
	return out, nil
}

// Job gives j's form on the wire.
func Job(j job.Job, parties []job.Party) *pb.Job {
	out := &pb.Job{
		Id: string(j.ID), Name: j.Name, State: string(j.State), Reason: j.Reason, Cause: Problem(j.Cause),
		BundleDigest: j.Bundle, Submitter: j.Submitter, CreateTime: stamp(j.Created), StartTime: stamp(j.Started), EndTime: stamp(j.Ended),
		Priority: int32(j.Spec.Priority), Engine: j.Spec.Engine, EngineWhy: j.Spec.EngineWhy,
	}
	for _, p := range parties {
		out.Parties = append(out.Parties, &pb.Party{Name: p.Name, State: string(p.State), Reason: p.Reason, Cause: Problem(p.Cause), UpdateTime: stamp(p.Updated)})
	}
	return out
}

func stamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

// NewEnrolClient calls the hub to which t connects as a newcomer.
func NewEnrolClient(t *http.Transport) pergolav1connect.EnrolServiceClient {
	c := connect.NewClient(connecthttp.NewTransport(&http.Client{Transport: t}, "https://"+pki.HubName, connecthttp.WithReadMaxBytes(MaxMessage)), clientProblems, (&asking{}).ask)
	return pergolav1connect.NewEnrolServiceClient(c)
}
