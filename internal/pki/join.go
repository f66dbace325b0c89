package pki

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"

	"github.com/pergolafl/pergola/internal/problem"
)

// JoinALPN is the protocol of newcomers, who have no certificate yet: HTTP/1.1 with the one call that gives them one. The hub's
// authority is part of the chain that it shows there, so that its fingerprint can be compared.
const JoinALPN = "pergola-join/1"

// Fingerprint gives the SHA-256 of an authority's certificate.
func (a *Authority) Fingerprint() [sha256.Size]byte { return sha256.Sum256(a.cert.Raw) }

// WithJoin gives conf for a port that newcomers may use too: those that ask for [JoinALPN] alone need no certificate, and get at nothing else.
func (a *Authority) WithJoin(conf *tls.Config) *tls.Config {
	out := conf.Clone()
	out.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		if len(h.SupportedProtos) != 1 || h.SupportedProtos[0] != JoinALPN {
			return nil, nil // as the rest of the port
		}
		own, err := serverCertificate(conf, h)
		if err != nil {
			return nil, err
		}
		cert := *own
		cert.Certificate = append(append([][]byte(nil), cert.Certificate[0]), a.cert.Raw)
		return &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}, NextProtos: []string{JoinALPN}, SessionTicketsDisabled: true}, nil
	}
	return out
}

// serverCertificate gives the certificate that a server shows at present.
func serverCertificate(conf *tls.Config, h *tls.ClientHelloInfo) (*tls.Certificate, error) {
	if conf.GetCertificate != nil {
		return conf.GetCertificate(h)
	}
	return &conf.Certificates[0], nil
}

// JoinClientTLS is the configuration of a newcomer who knows the fingerprint of the hub's authority and nothing else.
func JoinClientTLS(authority [sha256.Size]byte) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: []string{JoinALPN}, ServerName: HubName, SessionTicketsDisabled: true,
		InsecureSkipVerify: true, //nolint:gosec // nothing is known of the hub but the fingerprint, which VerifyConnection compares
		VerifyConnection: func(cs tls.ConnectionState) error {
			other := problem.New(problem.Denied, "check the address, that no proxy on the way opens TLS, and that the token is of this hub",
				"whoever answers is not the hub that made the token")
			if len(cs.PeerCertificates) != 2 || sha256.Sum256(cs.PeerCertificates[1].Raw) != authority {
				return other
			}
			roots := x509.NewCertPool()
			roots.AddCert(cs.PeerCertificates[1])
			if _, err := cs.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}); err != nil {
				if p := Explain(err); p != nil {
					return p
				}
				return other
			}
			_, err := Expect(cs, KindHub)
			return err
		},
	}
}
