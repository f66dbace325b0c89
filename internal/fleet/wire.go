package fleet

import (
	"encoding/binary"
	"math"
	"strings"

	"google.golang.org/protobuf/encoding/protowire"
)

// What is known of Flower's messages is kept to what does not change from generation to generation: a node is field 1, as a
// number or as a message with the number in its field 1 (flwr/proto/fleet.proto, node.proto, 1.8 – 1.41); the interval of a
// sign of life is the only 64-bit field of its message (PingRequest, CreateNodeRequest, SendNodeHeartbeatRequest,
// ActivateNodeRequest).

// framePrefix is the size of what precedes a gRPC message: a flag and a length.
const framePrefix = 5

// unframe takes the first message out of a gRPC body; ok is false if it is not there whole, or compressed.
func unframe(b []byte) (msg, rest []byte, ok bool) {
	if len(b) < framePrefix || b[0] != 0 {
		return nil, nil, false
	}
	n := uint64(binary.BigEndian.Uint32(b[1:]))
	if uint64(len(b)-framePrefix) < n {
		return nil, nil, false
	}
	return b[framePrefix : framePrefix+n], b[framePrefix+n:], true
}

// frame is the inverse of unframe.
func frame(msg []byte) []byte {
	out := make([]byte, framePrefix, framePrefix+len(msg))
	binary.BigEndian.PutUint32(out[1:], uint32(len(msg))) // callers have at most maxSmall bytes
	return append(out, msg...)
}

// each calls fn with every field of a message, as it stands there. It gives false if the message is malformed.
func each(msg []byte, fn func(num protowire.Number, typ protowire.Type, field, value []byte)) bool {
	for len(msg) > 0 {
		num, typ, n := protowire.ConsumeTag(msg)
		if n < 0 {
			return false
		}
		m := protowire.ConsumeFieldValue(num, typ, msg[n:])
		if m < 0 {
			return false
		}
		fn(num, typ, msg[:n+m], msg[n:n+m])
		msg = msg[n+m:]
	}
	return true
}

// nodeOf gives the node that a request or an answer is about. Protobuf lets a field come again, and the last one count:
// a message that names two nodes, or that is malformed, is not ok.
func nodeOf(msg []byte) (id uint64, found, ok bool) {
	ok = true
	take := func(v uint64) {
		if found && v != id {
			ok = false
		}
		id, found = v, true
	}
	whole := each(msg, func(num protowire.Number, typ protowire.Type, _, value []byte) {
		if num != 1 {
			return
		}
		switch typ {
		case protowire.VarintType:
			v, _ := protowire.ConsumeVarint(value)
			take(v)
		case protowire.BytesType:
			inner, _ := protowire.ConsumeBytes(value)
			if !each(inner, func(num protowire.Number, typ protowire.Type, _, value []byte) {
				if num == 1 && typ == protowire.VarintType {
					v, _ := protowire.ConsumeVarint(value)
					take(v)
				}
			}) {
				ok = false
			}
		}
	})
	return id, found, ok && whole
}

// intervalOf gives the interval that a sign of life announces, in seconds.
func intervalOf(msg []byte) (seconds float64, found bool) {
	each(msg, func(_ protowire.Number, typ protowire.Type, _, value []byte) {
		if typ == protowire.Fixed64Type {
			v, _ := protowire.ConsumeFixed64(value)
			seconds, found = math.Float64frombits(v), true
		}
	})
	return seconds, found
}

// withInterval gives the message with another interval. One without an interval stays as it is.
func withInterval(msg []byte, seconds float64) []byte {
	out := make([]byte, 0, len(msg))
	if !each(msg, func(num protowire.Number, typ protowire.Type, field, _ []byte) {
		if typ == protowire.Fixed64Type {
			out = protowire.AppendTag(out, num, typ)
			out = protowire.AppendFixed64(out, math.Float64bits(seconds))
			return
		}
		out = append(out, field...)
	}) {
		return msg
	}
	return out
}

// text gives the string fields with the given number.
func text(msg []byte, want protowire.Number) (out []string) {
	each(msg, func(num protowire.Number, typ protowire.Type, _, value []byte) {
		if num == want && typ == protowire.BytesType {
			v, _ := protowire.ConsumeBytes(value)
			out = append(out, string(v))
		}
	})
	return out
}

// A container is the one message of the grpc-adapter (flwr/proto/grpcadapter.proto): headers, a message's name, and its bytes.
type container struct {
	name    string // "PingRequest"
	content []byte
	raw     []byte
}

func openContainer(msg []byte) (c container, ok bool) {
	c.raw = msg
	ok = each(msg, func(num protowire.Number, typ protowire.Type, _, value []byte) {
		if typ != protowire.BytesType {
			return
		}
		v, _ := protowire.ConsumeBytes(value)
		switch num {
		case 2:
			c.name = string(v)
		case 3:
			c.content = v
		}
	})
	return c, ok
}

// with gives the container with other content.
func (c container) with(content []byte) []byte {
	out := make([]byte, 0, len(c.raw)+16)
	each(c.raw, func(num protowire.Number, _ protowire.Type, field, _ []byte) {
		if num != 3 {
			out = append(out, field...)
		}
	})
	out = protowire.AppendTag(out, 3, protowire.BytesType)
	return protowire.AppendBytes(out, content)
}

// operation names a call in one way, whatever the wire: "send-node-heartbeat", "SendNodeHeartbeat" and
// "SendNodeHeartbeatRequest" are the same.
func operation(s string) string {
	var b strings.Builder
	up := true
	for _, r := range strings.TrimSuffix(s, "Request") {
		if r == '-' {
			up = true
			continue
		}
		if up {
			b.WriteString(strings.ToUpper(string(r)))
		} else {
			b.WriteRune(r)
		}
		up = false
	}
	return b.String()
}
