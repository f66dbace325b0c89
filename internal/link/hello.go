package link

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"

	"github.com/pergolafl/pergola/internal/compat"
	"github.com/pergolafl/pergola/internal/problem"
)

// ALPN tells a link from the API on the hub's port. It stays the same as long as the first eight bytes of a
// HELLO do; what comes behind them may change with [Version].
const ALPN = "pergola-link/1"

// Version is the newest version of the protocol that this end speaks, MinVersion the oldest. A session speaks one for as long as it
// lives: the newest that both ends do. The dialling end begins with its newest; an accepting end that is older refuses that and names its
// own, and the dialling end comes again with it.
const (
	Version    = 4
	MinVersion = 2
)

// Versions is what this end speaks.
var Versions = compat.Range{Min: MinVersion, Max: Version}

// Limits of the frames that open a link, in bytes without their headers.
const (
	MaxName  = 64  // a job's identifier, or a site's name, in a preface
	maxBody  = 512 // of any such frame: what a later version may grow to without another first read
	headSize = 8
	idSize   = 16
	keySize  = 32
)

// Frames that open a link, or resume it over a new transport; docs/link-protocol.md has their bodies. START goes both
// ways at a session's beginning, for each end to measure the round trip between the runners. All of them begin alike, so
// that ends of different versions still understand a refusal:
//
//	magic "PGLK"   type (1)   reserved, 0 (1)   version (2)   body length (2)   body
const (
	frameHello   = 1
	frameWelcome = 2
	frameRefuse  = 3
	frameStart   = 4
	frameLane    = 5
)

// Reasons in a REFUSE.
const (
	refuseVersion = 1 // no such version: the head has the newest that the refuser speaks, the body behind the reason the oldest
	refusePeer    = 2 // this peer has no business here
	refuseGone    = 3 // this peer has no such session, or not with that secret
	refuseClosed  = 4 // the session was closed in order
	refuseStale   = 5 // a later attempt of the same session has been here
	refuseFull    = 6 // the session has as many lanes as it may have
)

// sessionID names a session for as long as it lives, over however many transports.
type sessionID [idSize]byte

func (id sessionID) String() string { return hex.EncodeToString(id[:4]) }

func newSessionID() (id sessionID, secret [keySize]byte, err error) {
	_, err = rand.Read(id[:])
	if err == nil {
		_, err = rand.Read(secret[:])
	}
	if err != nil {
		err = problem.Wrap(err, problem.Internal, "", "no session could be named")
	}
	return id, secret, err
}

// frame is a HELLO, WELCOME, REFUSE or START.
type frame struct {
	kind    byte
	version uint16
	body    []byte
}

var (
	magic        = [4]byte{'P', 'G', 'L', 'K'}
	prefaceMagic = [4]byte{'P', 'G', 'L', 'P'}
	errNotLink   = errors.New("these are not the bytes of a link")
)

func appendFrame(b []byte, f frame) []byte {
	b = append(b, magic[:]...)
	b = append(b, f.kind, 0)
	b = binary.BigEndian.AppendUint16(b, f.version)
	b = binary.BigEndian.AppendUint16(b, uint16(len(f.body)))
	return append(b, f.body...)
}

// readFrame reads exactly one frame, of any version, and allocates at most maxBody bytes.
func readFrame(r io.Reader) (frame, error) {
	var h [headSize + 2]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return frame{}, err
	}
	f := frame{kind: h[4], version: binary.BigEndian.Uint16(h[6:8])}
	n := int(binary.BigEndian.Uint16(h[8:10]))
	if [4]byte(h[:4]) != magic || h[5] != 0 || f.kind < frameHello || f.kind > frameLane || n > maxBody {
		return frame{}, errNotLink
	}
	f.body = make([]byte, n)
	if _, err := io.ReadFull(r, f.body); err != nil {
		return frame{}, noEOF(err)
	}
	return f, nil
}

// position is where an end stands in both directions, in bytes since the session began.
type position struct {
	received uint64 // has arrived, in order
	sent     uint64 // has ever been sent
	limit    uint64 // may be sent by the other end
}

const positionSize = 24

func (p position) append(b []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, p.received)
	b = binary.BigEndian.AppendUint64(b, p.sent)
	return binary.BigEndian.AppendUint64(b, p.limit)
}

func parsePosition(b []byte) position {
	return position{binary.BigEndian.Uint64(b), binary.BigEndian.Uint64(b[8:]), binary.BigEndian.Uint64(b[16:])}
}

// greeting is what a HELLO says.
type greeting struct {
	id      sessionID
	secret  [keySize]byte // whoever resumes the session has to know it
	attempt uint32        // counts the transports of the session from 1: an older one that was held up is told by it
	resume  bool          // the other end is known to have the session
	at      position
}

const helloBody = idSize + keySize + 4 + 1 + positionSize

func helloFrame(g greeting) frame {
	b := append(make([]byte, 0, helloBody), g.id[:]...)
	b = append(b, g.secret[:]...)
	b = binary.BigEndian.AppendUint32(b, g.attempt)
	if g.resume {
		b = append(b, 1)
	} else {
		b = append(b, 0)
	}
	return frame{kind: frameHello, version: Version, body: g.at.append(b)}
}

// greeting reads a HELLO of this version. One that begins a session has received nothing and sent nothing.
func (f frame) greeting() (greeting, error) {
	b := f.body
	if f.kind != frameHello || len(b) != helloBody || b[52] > 1 {
		return greeting{}, errNotLink
	}
	g := greeting{
		id: sessionID(b), secret: [keySize]byte(b[idSize:]), attempt: binary.BigEndian.Uint32(b[48:]), resume: b[52] == 1,
		at: parsePosition(b[53:]),
	}
	if g.attempt == 0 || !g.resume && (g.at.received != 0 || g.at.sent != 0) {
		return greeting{}, errNotLink
	}
	return g, nil
}

func welcomeFrame(id sessionID, at position) frame {
	return frame{kind: frameWelcome, version: Version, body: at.append(append(make([]byte, 0, idSize+positionSize), id[:]...))}
}

// welcome reads a WELCOME of this version to session id.
func (f frame) welcome(id sessionID) (position, error) {
	if f.kind != frameWelcome || len(f.body) != idSize+positionSize || sessionID(f.body) != id {
		return position{}, errNotLink
	}
	return parsePosition(f.body[idSize:]), nil
}

func startFrame(id sessionID) frame {
	return frame{kind: frameStart, version: Version, body: id[:]}
}

// readStart reads the START of session id in this end's own version.
func readStart(r io.Reader, id sessionID) error { return readStartIn(r, id, Version) }

func readStartIn(r io.Reader, id sessionID, version uint16) error {
	f, err := readFrame(r)
	if err != nil {
		return noEOF(err)
	}
	return f.start(id, version)
}

// start reads a START of session id.
func (f frame) start(id sessionID, version uint16) error {
	if len(f.body) != idSize {
		return errNotLink
	}
	_, err := f.handedStart(id, version)
	return err
}

// handedFrame is the START of a lane that is handed over: the fingerprint is behind the session.
func handedFrame(id sessionID, pin [pinSize]byte) frame {
	return frame{kind: frameStart, version: Version, body: append(append(make([]byte, 0, idSize+pinSize), id[:]...), pin[:]...)}
}

// handedStart reads the START of a lane of session id, and gives the fingerprint if the lane is handed over.
func (f frame) handedStart(id sessionID, version uint16) (pin []byte, err error) {
	handed := len(f.body) == idSize+pinSize && version >= handedSince
	if f.kind != frameStart || f.version != version || len(f.body) != idSize && !handed || sessionID(f.body) != id {
		return nil, errNotLink
	}
	if handed {
		pin = f.body[idSize:]
	}
	return pin, nil
}

const laneBody = idSize + keySize + 8

// laneFrame begins a lane: number 0 is one that the dialling end opens, others are those that the accepting end has asked for.
func laneFrame(id sessionID, secret [keySize]byte, number uint64) frame {
	b := append(make([]byte, 0, laneBody), id[:]...)
	b = append(b, secret[:]...)
	return frame{kind: frameLane, version: Version, body: binary.BigEndian.AppendUint64(b, number)}
}

func (f frame) lane() (id sessionID, secret [keySize]byte, number uint64, err error) {
	if f.kind != frameLane || len(f.body) != laneBody {
		return id, secret, 0, errNotLink
	}
	return sessionID(f.body), [keySize]byte(f.body[idSize:]), binary.BigEndian.Uint64(f.body[idSize+keySize:]), nil
}

func refuseFrame(reason byte) frame {
	return frame{kind: frameRefuse, version: Version, body: []byte{reason}}
}

// in gives the frame in another version. So far there is no difference but the number.
func (f frame) in(version uint16) frame {
	f.version = version
	return f
}

// versionFrame refuses a HELLO of a version that an end does not speak that speaks own.
func versionFrame(own compat.Range) frame {
	return frame{kind: frameRefuse, version: uint16(own.Max), body: binary.BigEndian.AppendUint16([]byte{refuseVersion}, uint16(own.Min))}
}

// spoken gives what the end speaks that has refused a version; ok is false for any other frame. Ends that spoke one version alone
// name no oldest.
func (f frame) spoken() (r compat.Range, ok bool) {
	if f.kind != frameRefuse || len(f.body) == 0 || f.body[0] != refuseVersion {
		return compat.Range{}, false
	}
	r = compat.Range{Min: int(f.version), Max: int(f.version)}
	if len(f.body) >= 3 {
		r.Min = int(binary.BigEndian.Uint16(f.body[1:]))
	}
	return r, r.Valid()
}

func versionProblem(own, theirs compat.Range) error {
	return compat.Refusal("link", compat.Side{Name: "this end of the link", Speaks: own}, compat.Side{Name: "the other end", Speaks: theirs})
}

// WritePreface tells the hub's runner who is at the other end of the connection that the hub is about to splice to
// it. The hub takes it from the peer's certificate:
//
//	magic "PGLP"   version 1 (1)   length (1) job   length (1) site
func WritePreface(w io.Writer, p Peer) error {
	if err := p.check(); err != nil {
		return err
	}
	b := append(make([]byte, 0, 7+len(p.Job)+len(p.Site)), prefaceMagic[:]...)
	b = append(b, 1, byte(len(p.Job)))
	b = append(b, p.Job...)
	b = append(b, byte(len(p.Site)))
	b = append(b, p.Site...)
	if _, err := w.Write(b); err != nil {
		return fmt.Errorf("write a link's preface: %w", err)
	}
	return nil
}

// ReadPreface reads exactly what [WritePreface] wrote, at most 135 bytes. Other bytes are an internal problem, for
// only the hub writes to a runner's socket.
func ReadPreface(r io.Reader) (Peer, error) {
	fail := func(err error) (Peer, error) {
		return Peer{}, problem.Wrap(noEOF(err), problem.Internal, "", "a connection to the hub's runner does not begin as the hub's do")
	}
	var b [256]byte
	if _, err := io.ReadFull(r, b[:6]); err != nil {
		return fail(err)
	}
	if [4]byte(b[:4]) != prefaceMagic || b[4] != 1 || b[5] > MaxName {
		return fail(errNotLink)
	}
	job := b[6 : 6+int(b[5])]
	rest := b[6+len(job):]
	if _, err := io.ReadFull(r, b[6:6+len(job)+1]); err != nil {
		return fail(err)
	}
	n := int(rest[0])
	if n > MaxName {
		return fail(errNotLink)
	}
	site := rest[1 : 1+n]
	if _, err := io.ReadFull(r, site); err != nil {
		return fail(err)
	}
	p := Peer{Job: string(job), Site: string(site)}
	if err := p.check(); err != nil {
		return fail(errNotLink)
	}
	return p, nil
}

// check holds both names to printable ASCII without spaces; what they mean is not this package's business.
func (p Peer) check() error {
	for _, s := range []string{p.Job, p.Site} {
		ok := len(s) >= 1 && len(s) <= MaxName
		for i := 0; ok && i < len(s); i++ {
			ok = s[i] > ' ' && s[i] < 0x7f
		}
		if !ok {
			return problem.New(problem.Internal, "", "a link cannot belong to job %q of site %q", p.Job, p.Site)
		}
	}
	return nil
}

// noEOF makes an end in the middle of something an unexpected one.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
