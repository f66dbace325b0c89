package pki

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"path/filepath"
	"time"

	"github.com/pergolafl/pergola/internal/problem"
)

// LookClientTLS is [JoinClientTLS] for whoever only looks at how things are: the hub's certificate may be over or not begun, as it is where a clock
// is wrong. Nothing that is secret may be sent over such a connection.
func LookClientTLS(authority [sha256.Size]byte) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: []string{JoinALPN}, ServerName: HubName, SessionTicketsDisabled: true,
		InsecureSkipVerify: true, //nolint:gosec // VerifyConnection compares the fingerprint and checks the signature
		VerifyConnection: func(cs tls.ConnectionState) error {
			other := problem.New(problem.Denied, "check the address, and that this machine was set up by that hub", "whoever answers is a hub of another authority, or none")
			if len(cs.PeerCertificates) != 2 || sha256.Sum256(cs.PeerCertificates[1].Raw) != authority {
				return other
			}
			roots := x509.NewCertPool()
			roots.AddCert(cs.PeerCertificates[1])
			leaf := cs.PeerCertificates[0]
			if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, CurrentTime: leaf.NotBefore.Add(time.Second)}); err != nil {
				return other
			}
			_, err := Expect(cs, KindHub)
			return err
		},
	}
}

// Pair is a certificate with its authority, as they lie on disk.
type Pair struct {
	Leaf, Authority *x509.Certificate
	Identity        Identity
}

// LookAt reads dir/name.crt, name.key and ca.crt, and checks that they belong together; whether they are valid now is not looked at.
func LookAt(dir, name string) (Pair, error) {
	k, err := LoadKeypair(dir, name)
	if err != nil {
		return Pair{}, err
	}
	c, err := k.Certificate()
	if err != nil {
		return Pair{}, err
	}
	block, _ := pem.Decode(k.CAPEM)
	ca, err := x509.ParseCertificate(block.Bytes) // LoadKeypair has read it already
	if err != nil {
		return Pair{}, err
	}
	p := Pair{Leaf: c.Leaf, Authority: ca}
	if p.Identity, err = CertIdentity(c.Leaf); err != nil {
		return p, err
	}
	if err := c.Leaf.CheckSignatureFrom(ca); err != nil {
		return p, problem.Wrap(err, problem.Denied, "restore the files from one backup, or enrol again with a new token",
			"%s was not issued by the authority of %s", filepath.Join(dir, name+".crt"), filepath.Join(dir, "ca.crt"))
	}
	return p, nil
}
