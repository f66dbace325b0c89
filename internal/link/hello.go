package link

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"

	"github.com/pergolafl/pergola/internal/problem"
)

// ALPN tells a link from the API on the hub's port. It stays the same as long as the first eight bytes of a
// HELLO do; what comes behind them may change with [Version].
const ALPN = "pergola-link/1"

// Version is the protocol version that this end speaks. There is no range of versions: both ends of a job run
// what their operators installed, and the refusal tells both what the other has.
const Version = 1

// Limits of the frames that open a link, in bytes without their headers.
const (
	MaxName   = 64  // a job's identifier, or a site's name, in a preface
	maxBody   = 512 // of any such frame: what a later version may grow to without another first read
	headSize  = 8
	helloSize = 16
)

// Frames that open a link. START goes both ways, for each end to measure the round trip between the runners. All of them begin alike, so that ends of different versions still understand a refusal:
//
//	magic "PGLK"   type (1)   reserved, 0 (1)   version (2)   body length (2)   body
const (
	frameHello   = 1
	frameWelcome = 2
	frameRefuse  = 3
	frameStart   = 4
)

// Reasons in a REFUSE.
const (
	refuseVersion = 1 // the versions differ
	refusePeer    = 2 // this peer has no business here
)

// sessionID names a session for as long as it lives, over however many transports.
type sessionID [helloSize]byte

func (id sessionID) String() string { return hex.EncodeToString(id[:4]) }

func newSessionID() (sessionID, error) {
	var id sessionID
	if _, err := rand.Read(id[:]); err != nil {
		return id, problem.Wrap(err, problem.Internal, "", "no session could be named")
	}
	return id, nil
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
	if [4]byte(h[:4]) != magic || h[5] != 0 || f.kind < frameHello || f.kind > frameStart || n > maxBody {
		return frame{}, errNotLink
	}
	f.body = make([]byte, n)
	if _, err := io.ReadFull(r, f.body); err != nil {
		return frame{}, noEOF(err)
	}
	return f, nil
}

// hello is what a HELLO says in this version. Resuming adds the secret and the received offset behind the session.
func helloFrame(id sessionID) frame {
	return frame{kind: frameHello, version: Version, body: id[:]}
}

func welcomeFrame(id sessionID) frame {
	return frame{kind: frameWelcome, version: Version, body: id[:]}
}

func startFrame(id sessionID) frame {
	return frame{kind: frameStart, version: Version, body: id[:]}
}

// readStart reads the START of session id.
func readStart(r io.Reader, id sessionID) error {
	f, err := readFrame(r)
	if err != nil {
		return noEOF(err)
	}
	if got, err := f.session(); err != nil || got != id || f.kind != frameStart || f.version != Version {
		return errNotLink
	}
	return nil
}

func refuseFrame(reason byte) frame {
	return frame{kind: frameRefuse, version: Version, body: []byte{reason}}
}

// session gives the session of a HELLO, WELCOME or START of this version.
func (f frame) session() (sessionID, error) {
	if len(f.body) != helloSize {
		return sessionID{}, errNotLink
	}
	return sessionID(f.body), nil
}

func versionProblem(theirs uint16) error {
	return problem.New(problem.Version, "install the same version of pergola at the hub and at every site",
		"the other end of the link speaks link version %d, this end version %d", theirs, Version)
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
