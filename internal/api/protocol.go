package api

import (
	"context"
	"errors"
	"io"
	"strings"
	"sync/atomic"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"

	"github.com/pergolafl/pergola/internal/compat"
	"github.com/pergolafl/pergola/internal/link"
	"github.com/pergolafl/pergola/internal/pki"
)

// Control is what this Pergola speaks of the control protocol: all that users, agents and newcomers call at a hub. Its versions
// (docs/versions.md):
//
//	1  the first
//	2  certificates are renewed (IdentityService); both ends say in each call what they speak
var Control = compat.Range{Min: 1, Max: 2}

// Renewing is the version of the control protocol from which on a hub renews certificates.
const Renewing = 2

// Runner is what this Pergola speaks of the runner protocol: the control socket of a runner, its journal, its directory and the preface of
// links at its socket. A hub or agent that was upgraded finds runners that an older one has started. Its versions:
//
//	1  the first
var Runner = compat.Range{Min: 1, Max: 1}

// Protocols gives what this Pergola speaks, by the protocols' names.
func Protocols() map[string]compat.Range {
	return map[string]compat.Range{"control": Control, "link": link.Versions, "runner": Runner}
}

// Protocol is what agents say in WatchDesired, for hubs that look nowhere else: those of version 1 want just that. What is spoken is
// in the headers.
const Protocol = 1

// The headers in which each end says what it speaks, in a request and in its answer, and which Pergola it is. A request without one is of
// version 1, and so is an answer.
const (
	ProtocolHeader = "Pergola-Protocol"
	BuildHeader    = "Pergola-Version"
)

// protocolOf gives the protocol to which a procedure belongs.
func protocolOf(procedure string) (name string, own compat.Range, server, caller string) {
	if strings.HasPrefix(procedure, "/pergola.v1.RunnerService/") {
		return "runner", Runner, "the runner", "its starter"
	}
	return "control", Control, "the hub", "the caller"
}

// said reads what the other end speaks; a header that cannot be read is of no version that anybody knows.
func said(h *connect.Header) compat.Range {
	text := h.Get(ProtocolHeader)
	if text == "" {
		return compat.First
	}
	r, ok := compat.Parse(text)
	if !ok {
		return compat.Range{}
	}
	return r
}

// build reads of which Pergola the other end is, as it may be shown.
func build(h *connect.Header) string {
	v := h.Get(BuildHeader)
	if len(v) > 40 || strings.ContainsFunc(v, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return ""
	}
	return v
}

type versionKey struct{}

// Spoken gives the version of the protocol in which a call is answered.
func Spoken(ctx context.Context) int {
	v, _ := ctx.Value(versionKey{}).(int)
	return max(v, compat.First.Min)
}

// answer has a server say what it speaks, and refuses callers with which it has no version in common.
func answer(next connect.ServerFunc) connect.ServerFunc {
	return func(ctx context.Context, spec connect.Spec, stream connect.ServerStream) error {
		info, ok := connect.CallInfoForServerContext(ctx)
		if !ok {
			return next(ctx, spec, stream)
		}
		name, own, server, caller := protocolOf(spec.Procedure)
		info.ResponseHeader().Set(ProtocolHeader, own.String())
		info.ResponseHeader().Set(BuildHeader, BuildVersion())
		theirs := said(info.RequestHeader())
		v, common := own.Common(theirs)
		if !theirs.Valid() || !common {
			if h, ok := connecthttp.ServerInfoForContext(ctx); ok && h.TLS() != nil {
				if id, err := pki.Peer(*h.TLS()); err == nil {
					caller = id.String()
				}
			}
			return compat.Refusal(name, compat.Side{Name: server, Build: BuildVersion(), Speaks: own}, compat.Side{Name: caller, Build: build(info.RequestHeader()), Speaks: theirs})
		}
		return next(context.WithValue(ctx, versionKey{}, v), spec, stream)
	}
}

// asking is a client's side of it.
type asking struct{ spoken atomic.Int64 }

// Spoken gives the version that this end and the other have in common, as the last answer had it; 0 before the first.
func (c *Client) Spoken() int { return int(c.asking.spoken.Load()) }

// ask has a client say what it speaks, and refuses what answers in no version that it knows.
func (a *asking) ask(next connect.ClientFunc) connect.ClientFunc {
	return func(ctx context.Context, spec connect.Spec) (connect.ClientStream, error) {
		info, ok := connect.CallInfoForClientContext(ctx)
		if !ok {
			return next(ctx, spec)
		}
		_, own, _, _ := protocolOf(spec.Procedure)
		info.RequestHeader().Set(ProtocolHeader, own.String())
		info.RequestHeader().Set(BuildHeader, BuildVersion())
		s, err := next(ctx, spec)
		if err != nil {
			return nil, err
		}
		return &answered{ClientStream: s, a: a, info: info, procedure: spec.Procedure}, nil
	}
}

// answered is a stream whose first answer is looked at.
type answered struct {
	connect.ClientStream
	a         *asking
	info      *connect.CallInfo
	procedure string
	looked    bool
}

func (s *answered) Receive(msg any) error {
	err := s.ClientStream.Receive(msg)
	if s.looked || err != nil && !errors.Is(err, io.EOF) {
		return err // a refusal says by itself what it is about
	}
	s.looked = true
	name, own, server, _ := protocolOf(s.procedure)
	theirs := said(s.info.ResponseHeader())
	v, common := own.Common(theirs)
	if !theirs.Valid() || !common {
		return compat.Refusal(name, compat.Side{Name: "this machine", Build: BuildVersion(), Speaks: own}, compat.Side{Name: server, Build: build(s.info.ResponseHeader()), Speaks: theirs})
	}
	s.a.spoken.Store(int64(v))
	return err
}
