// Package pkitest makes the certificates that tests of other packages need. Start with [Authority].
package pkitest

import (
	"crypto/tls"
	"testing"
	"time"

	"github.com/pergolafl/pergola/internal/pki"
)

// Authority makes an authority of that name, or ends the test.
func Authority(t testing.TB, name string) *pki.Authority {
	t.Helper()
	a, err := pki.NewAuthority(name)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// Keypair has it certify an identity for 1,000 hours, or ends the test.
func Keypair(t testing.TB, a *pki.Authority, id pki.Identity) pki.Keypair {
	t.Helper()
	k, err := a.NewKeypair(id, nil, 1000*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// Cert is a [Keypair] as TLS takes it.
func Cert(t testing.TB, a *pki.Authority, id pki.Identity) tls.Certificate {
	t.Helper()
	c, err := Keypair(t, a, id).Certificate()
	if err != nil {
		t.Fatal(err)
	}
	return c
}
