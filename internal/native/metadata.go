package native

import (
	"google.golang.org/protobuf/encoding/protowire"
)

// Fields of Flower's protobufs, the same from 1.12 on (flwr/proto/message.proto).
const (
	messageMetadata = 1
	metadataSrc     = 3 // src_node_id
	metadataDst     = 4 // dst_node_id
)

// ends gives the nodes that a Message's protobuf names as its source and destination; 0 where it names none. It reads as protobuf's own
// readers do: a field of another kind is none of these, and what comes last counts.
func ends(proto []byte) (src, dst uint64, err error) {
	err = fields(proto, func(num protowire.Number, typ protowire.Type, value []byte) error {
		if num != messageMetadata || typ != protowire.BytesType {
			return nil
		}
		meta, n := protowire.ConsumeBytes(value)
		if n < 0 {
			return protowire.ParseError(n)
		}
		return fields(meta, func(num protowire.Number, typ protowire.Type, value []byte) error {
			if typ != protowire.VarintType {
				return nil
			}
			v, n := protowire.ConsumeVarint(value)
			if n < 0 {
				return protowire.ParseError(n)
			}
			switch num {
			case metadataSrc:
				src = v
			case metadataDst:
				dst = v
			}
			return nil
		})
	})
	return src, dst, err
}

// fields calls f with each field of a message.
func fields(b []byte, f func(num protowire.Number, typ protowire.Type, value []byte) error) error {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		if n = protowire.ConsumeFieldValue(num, typ, b); n < 0 {
			return protowire.ParseError(n)
		}
		if err := f(num, typ, b[:n]); err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}
