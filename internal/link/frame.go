package link

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Frames of a session once its ends have greeted each other, see docs/link-protocol.md:
//
//	type (1)   body length (3)   number (8)   body
//
//	DATA   number: offset of the first byte      body: 1 to 65,536 bytes
//	ACK    number: offset received up to         body: offset that may be sent up to (8)
//	PING   number: 0                             no body
//	CLOSE  number: offset of the end             no body
//	ASK    number: of the lane that is wanted    no body
//	NO     number: of the lane that is not had   body: why (1)
const (
	frameData  = 1
	frameAck   = 2
	framePing  = 3
	frameClose = 4
	frameAsk   = 5
	frameNo    = 6

	unitHead = 12
	ackBody  = 8
	noBody   = 1

	noFull = 1 // there are as many lanes as there may be
	noWay  = 2 // it could not be made
	// MaxData is how many bytes one DATA frame carries at most.
	MaxData = 64 << 10
)

// errViolation is what all breaches of the protocol are.
var errViolation = errors.New("the other end broke the link's protocol")

func violation(format string, args ...any) error {
	return fmt.Errorf("%w: %s", errViolation, fmt.Sprintf(format, args...))
}

// unit is the head of such a frame; limit is the body of an ACK or a NO. A DATA frame's body is left to be read.
type unit struct {
	kind   byte
	length int
	number uint64
	limit  uint64
}

func appendUnit(b []byte, u unit) []byte {
	b = append(b, u.kind, byte(u.length>>16), byte(u.length>>8), byte(u.length))
	b = binary.BigEndian.AppendUint64(b, u.number)
	switch u.kind {
	case frameAck:
		b = binary.BigEndian.AppendUint64(b, u.limit)
	case frameNo:
		b = append(b, byte(u.limit))
	}
	return b
}

func ackUnit(received, limit uint64) unit {
	return unit{kind: frameAck, length: ackBody, number: received, limit: limit}
}

// readUnit reads a frame, of DATA only the head, into b. It allocates nothing. An end between two frames is io.EOF.
func readUnit(r io.Reader, b *[unitHead + ackBody]byte) (unit, error) {
	if _, err := io.ReadFull(r, b[:unitHead]); err != nil {
		return unit{}, err
	}
	u := unit{kind: b[0], length: int(b[1])<<16 | int(b[2])<<8 | int(b[3]), number: binary.BigEndian.Uint64(b[4:])}
	ok := false
	switch u.kind {
	case frameData:
		ok = u.length >= 1 && u.length <= MaxData
	case frameAck:
		ok = u.length == ackBody
	case framePing:
		ok = u.length == 0 && u.number == 0
	case frameClose:
		ok = u.length == 0
	case frameAsk:
		ok = u.length == 0 && u.number > 0
	case frameNo:
		ok = u.length == noBody && u.number > 0
	}
	if !ok {
		return unit{}, violation("a frame of type %d, %d bytes, number %d", u.kind, u.length, u.number)
	}
	switch u.kind {
	case frameAck:
		if _, err := io.ReadFull(r, b[unitHead:]); err != nil {
			return unit{}, noEOF(err)
		}
		u.limit = binary.BigEndian.Uint64(b[unitHead:])
	case frameNo:
		if _, err := io.ReadFull(r, b[unitHead:unitHead+noBody]); err != nil {
			return unit{}, noEOF(err)
		}
		if u.limit = uint64(b[unitHead]); u.limit != noFull && u.limit != noWay {
			return unit{}, violation("NO for reason %d", u.limit)
		}
	}
	return u, nil
}
