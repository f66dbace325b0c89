package link

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pergolafl/pergola/internal/sock"
)

// handedSince is the version of the link in which a lane may leave the hub.
const handedSince = 4

const pinSize = sha256.Size

// A lane carries much, and the hub would decrypt, pass on and encrypt all of it between two processes that it knows already. So the
// hub hands what lies below its TLS to the job's runner beside each connection. For a lane the runner answers with the fingerprint of a key that
// it has made for this; both ends then end the hub's TLS in order and begin their own on the same connection, without the hub:
//
//	site runner ═ TLS ═ hub ─ splice ─ hub runner     LANE, START with the fingerprint
//	site runner ═══════ TLS ═══════════ hub runner     LANE once more, then the lane
//
// The hub has seen to who may come, as ever. The site's runner knows the key by the fingerprint, which came by the hub's TLS; the hub's runner
// knows the site's by the session's secret, which nobody else has.

// HandOn tells the hub's runner, at the other end of up, what [WritePreface] does, and hands it what lies below c. The caller splices the two
// as if it had not; the runner uses what it was handed once both ends have ended what they do over c, or never.
func HandOn(up net.Conn, p Peer, c net.Conn) error {
	u, isUnix := up.(*net.UnixConn)
	raw, isFile := innermost(c).(syscall.Conn)
	if !isUnix || !isFile {
		return WritePreface(up, p)
	}
	var preface bytes.Buffer
	if err := WritePreface(&preface, p); err != nil {
		return err
	}
	rc, err := raw.SyscallConn()
	if err != nil {
		return WritePreface(up, p)
	}
	n := 0
	e := rc.Control(func(fd uintptr) { n, _, err = u.WriteMsgUnix(preface.Bytes(), unix.UnixRights(int(fd)), nil) })
	switch err = errors.Join(e, err); {
	case err == nil:
		return nil
	case n == 0: // too many descriptors are on their way, perhaps: lanes stay with the hub
		return WritePreface(up, p)
	}
	return fmt.Errorf("hand a link on: %w", err)
}

// readHandedOn reads a preface, and what came with it; nil: nothing did.
func readHandedOn(conn net.Conn) (Peer, *os.File, error) {
	u, ok := conn.(*net.UnixConn)
	if !ok {
		p, err := ReadPreface(conn)
		return p, nil, err
	}
	r := &fileReader{conn: u}
	p, err := ReadPreface(r)
	if err != nil && r.file != nil {
		_ = r.file.Close() // it is not used
		r.file = nil
	}
	return p, r.file, err
}

// fileReader reads a unix socket, and takes the file that comes with its bytes.
type fileReader struct {
	conn *net.UnixConn
	file *os.File
}

func (r *fileReader) Read(b []byte) (int, error) {
	n, files, err := sock.ReadFiles(r.conn, b, 1)
	for _, f := range files {
		if r.file != nil {
			_ = f.Close() // one is what the hub sends
			continue
		}
		r.file = f
	}
	if errors.Is(err, sock.ErrLost) {
		err = nil // the lane stays with the hub
	}
	return n, err
}

// handed is a connection that has left the hub.
type handed struct{ *tls.Conn }

// laneKey is a key that an acceptor makes for its lanes, with the fingerprint of its certificate.
type laneKey struct {
	conf *tls.Config
	pin  [pinSize]byte
}

func newLaneKey() (*laneKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	// Nobody looks at what it says: it is told by its fingerprint.
	t := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Unix(0, 0), NotAfter: time.Now().AddDate(100, 0, 0)}
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return nil, err
	}
	return &laneKey{
		conf: &tls.Config{
			Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, MinVersion: tls.VersionTLS13, SessionTicketsDisabled: true,
		},
		pin: sha256.Sum256(der),
	}, nil
}

// takeOver has the hub end its part in a lane that LANE frame f has begun, and gives the connection without it. conn is closed if that succeeds.
func (k *laneKey) takeOver(ctx context.Context, conn net.Conn, raw *os.File, f frame) (net.Conn, error) {
	defer context.AfterFunc(ctx, func() { hardClose(conn) })()
	if err := awaitEnd(conn); err != nil {
		return nil, err
	}
	if err := closeWrite(conn); err != nil {
		return nil, err
	}
	c, err := net.FileConn(raw)
	if err != nil {
		return nil, fmt.Errorf("take a connection over: %w", err)
	}
	tune(c)
	defer context.AfterFunc(ctx, func() { hardClose(c) })()
	tc := tls.Server(Coalesce(c), k.conf)
	err = tc.SetDeadline(time.Now().Add(handshakeWait))
	if err == nil {
		err = tc.HandshakeContext(ctx)
	}
	var again frame
	if err == nil {
		again, err = readFrame(tc)
	}
	if err == nil && (again.kind != f.kind || again.version != f.version || subtle.ConstantTimeCompare(again.body, f.body) == 0) {
		err = errNotLink
	}
	if err != nil {
		hardClose(tc)
		return nil, noEOF(err)
	}
	return handed{tc}, conn.Close()
}

// awaitEnd waits for the other end's half to end: nothing else may come while a lane leaves the hub.
func awaitEnd(r io.Reader) error {
	var b [1]byte
	if n, err := r.Read(b[:]); n > 0 || !errors.Is(err, io.EOF) {
		return errors.Join(errNotLink, err)
	}
	return nil
}

// leaveHub ends the hub's TLS over a lane, and begins that with the hub's runner, which has the key with that fingerprint.
func leaveHub(ctx context.Context, conn net.Conn, pin []byte, greeting frame) (net.Conn, error) {
	c, ok := conn.(interface {
		net.Conn
		CloseWrite() error
		NetConn() net.Conn
	})
	if !ok {
		return nil, violation("a lane that is handed over without TLS")
	}
	if err := c.CloseWrite(); err != nil {
		return nil, err
	}
	if err := awaitEnd(c); err != nil {
		return nil, err
	}
	tc := tls.Client(c.NetConn(), &tls.Config{
		MinVersion:         tls.VersionTLS13,
		InsecureSkipVerify: true, //nolint:gosec // the fingerprint says more than a name
		VerifyConnection: func(s tls.ConnectionState) error {
			if len(s.PeerCertificates) == 0 {
				return errNotLink
			}
			if sum := sha256.Sum256(s.PeerCertificates[0].Raw); subtle.ConstantTimeCompare(sum[:], pin) == 0 {
				return errNotLink
			}
			return nil
		},
	})
	err := tc.SetDeadline(time.Now().Add(handshakeWait)) // TLS has left one that is over
	if err == nil {
		err = tc.HandshakeContext(ctx)
	}
	if err == nil {
		_, err = tc.Write(appendFrame(nil, greeting))
	}
	return handed{tc}, err
}
