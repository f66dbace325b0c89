package pki

import (
	"bytes"
	"crypto/tls"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/pergolafl/pergola/internal/problem"
)

// SaveKeypair replaces dir/name.crt, dir/name.key and dir/ca.crt, each 0600, durably and as one: the new pair is written as a
// whole into dir/name.next first, which counts as long as it is there, so whoever reads meanwhile, and whoever comes after a
// crash in the middle, has the old pair or the new one.
func SaveKeypair(dir, name string, k Keypair) (err error) {
	unlock, err := lock(dir)
	if err != nil {
		return problem.Wrap(err, problem.Usage, "see that the folder exists and may be written", "the key pair in %s cannot be replaced", dir)
	}
	defer func() { err = errors.Join(err, unlock()) }()
	if err := writeFile(filepath.Join(dir, name+".next"), bytes.Join([][]byte{k.KeyPEM, k.CertPEM, k.CAPEM}, []byte("\n"))); err != nil {
		return err
	}
	return finishLocked(dir, name, k)
}

// finishLocked does the second half of a replacement.
func finishLocked(dir, name string, k Keypair) error {
	next := filepath.Join(dir, name+".next")
	if err := errors.Join(
		writeFile(filepath.Join(dir, name+".key"), k.KeyPEM),
		writeFile(filepath.Join(dir, name+".crt"), k.CertPEM),
		writeFile(filepath.Join(dir, "ca.crt"), k.CAPEM),
	); err != nil {
		return err
	}
	if err := os.Remove(next); err != nil {
		return problem.Wrap(err, problem.Usage, "see that the folder may be written", "%s cannot be removed", next)
	}
	return nil
}

// finish ends a replacement that a crash has cut short.
func finish(dir, name string) (err error) {
	next := filepath.Join(dir, name+".next")
	if _, err := os.Stat(next); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	unlock, err := lock(dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unlock()) }()
	text, err := readFile(next)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // another process was at it, and has finished
	}
	if err != nil {
		return err
	}
	k, err := splitKeypair(text)
	if err != nil {
		return err
	}
	return finishLocked(dir, name, k)
}

// lock keeps other processes from replacing pairs in a folder at the same time.
func lock(dir string) (unlock func() error, err error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	for {
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX); !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f.Close, nil
}

// LoadKeypair reads what [SaveKeypair] wrote, also in the middle of a replacement, and checks that key and certificate fit.
func LoadKeypair(dir, name string) (Keypair, error) {
	// The files are read one after the other. A pair that does not fit was replaced in between: then the next reading finds name.next, or
	// all of the new files.
	var err error
	for range 10 {
		var k Keypair
		if k, err = loadKeypair(dir, name); err == nil {
			return k, nil
		}
	}
	return Keypair{}, err
}

func loadKeypair(dir, name string) (Keypair, error) {
	var k Keypair
	next, err := readFile(filepath.Join(dir, name+".next"))
	switch {
	case err == nil:
		if k, err = splitKeypair(next); err != nil {
			return Keypair{}, err
		}
	case !errors.Is(err, fs.ErrNotExist):
		return Keypair{}, err
	default:
		for file, to := range map[string]*[]byte{name + ".crt": &k.CertPEM, name + ".key": &k.KeyPEM, "ca.crt": &k.CAPEM} {
			b, err := readFile(filepath.Join(dir, file))
			if err != nil {
				return Keypair{}, err
			}
			*to = b
		}
	}
	if _, err := k.Certificate(); err != nil {
		return Keypair{}, fmt.Errorf("%s in %s: %w", name, dir, err)
	}
	if _, err := k.Roots(); err != nil {
		return Keypair{}, fmt.Errorf("ca.crt in %s: %w", dir, err)
	}
	return k, nil
}

// splitKeypair reads a whole pair of one text: key, certificate, authority.
func splitKeypair(text []byte) (Keypair, error) {
	var parts [][]byte
	for rest := text; ; {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			break
		}
		parts = append(parts, pem.EncodeToMemory(b))
	}
	if len(parts) != 3 {
		return Keypair{}, problem.New(problem.Usage, "have the certificate issued again", "what should be a key, its certificate and its authority is something else")
	}
	return Keypair{KeyPEM: parts[0], CertPEM: parts[1], CAPEM: parts[2]}, nil
}

// NewSigned makes a key and has sign, which gets a certificate request for id, issue its certificate. The authority to trust is ca, or the
// one that sign gives.
func NewSigned(id Identity, ca []byte, sign func(csrPEM string) (certPEM, caPEM string, err error)) (Keypair, error) {
	key, err := NewKey()
	if err != nil {
		return Keypair{}, err
	}
	csr, err := NewRequest(key, id)
	if err != nil {
		return Keypair{}, err
	}
	keyPEM, err := EncodeKey(key)
	if err != nil {
		return Keypair{}, err
	}
	cert, own, err := sign(string(csr))
	if err != nil {
		return Keypair{}, err
	}
	k := Keypair{CertPEM: []byte(cert), KeyPEM: keyPEM, CAPEM: ca}
	if ca == nil {
		k.CAPEM = []byte(own)
	}
	got, err := k.Identity()
	if err == nil && got != id {
		err = problem.New(problem.Denied, "check that this is the right hub", "the hub sent the certificate of %s, not of %s", got, id)
	}
	return k, err
}

// leafOf gives the certificate of the pair, which was checked to fit.
func leafOf(k Keypair) (*tls.Certificate, error) {
	c, err := k.Certificate()
	if err != nil {
		return nil, err
	}
	return &c, nil
}
