package enrol

import (
	"context"
	"crypto/sha256"
	"encoding/pem"
	"net"
	"net/http"
	"time"

	"github.com/pergolafl/pergola/internal/api"
	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/uplink"
)

// Wait is how long the hub may take to answer.
const Wait = 30 * time.Second

// Join enrols by a token: it makes a key, which never leaves this machine, and has the hub sign its certificate. Proxy is as package
// uplink takes it.
func Join(ctx context.Context, t Token, proxy string) (pki.Keypair, error) {
	if time.Now().After(t.Expires.Add(24 * time.Hour)) { // not a matter of clocks that differ a little
		return pki.Keypair{}, problem.New(problem.Denied, "ask the hub's operator for a new one", "the token was good until %s", t.Expires.Format(time.RFC3339))
	}
	key, err := pki.NewKey()
	if err != nil {
		return pki.Keypair{}, err
	}
	csr, err := pki.NewRequest(key, pki.Identity{Kind: t.Kind, Name: t.Name})
	if err != nil {
		return pki.Keypair{}, err
	}
	keyPEM, err := pki.EncodeKey(key)
	if err != nil {
		return pki.Keypair{}, err
	}
	d, err := uplink.New(uplink.Config{Hubs: t.Hubs, Proxy: proxy, TLS: pki.JoinClientTLS(t.CA)})
	if err != nil {
		return pki.Keypair{}, err
	}
	tr := &http.Transport{DialTLSContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return d.Dial(ctx) }}
	defer tr.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(ctx, Wait)
	defer cancel()
	res, err := api.NewEnrolClient(tr).Enrol(ctx, &pb.EnrolRequest{Secret: t.Secret, CsrPem: string(csr)})
	if err != nil {
		if p := pki.Explain(err); p != nil {
			return pki.Keypair{}, p
		}
		return pki.Keypair{}, err
	}
	k := pki.Keypair{CertPEM: []byte(res.GetCertificatePem()), KeyPEM: keyPEM, CAPEM: []byte(res.GetCaPem())}
	if block, _ := pem.Decode(k.CAPEM); block == nil || sha256.Sum256(block.Bytes) != t.CA {
		return pki.Keypair{}, problem.New(problem.Denied, "ask the hub's operator for a new token", "the hub sent another authority than the token's")
	}
	id, err := k.Identity()
	if err != nil {
		return pki.Keypair{}, err
	}
	if want := (pki.Identity{Kind: t.Kind, Name: t.Name}); id != want {
		return pki.Keypair{}, problem.New(problem.Denied, "ask the hub's operator for a new token", "the hub sent the certificate of %s, not of %s", id, want)
	}
	return k, nil
}
