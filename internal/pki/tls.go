package pki

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"slices"
	"strconv"
	"time"

	"github.com/pergolafl/pergola/internal/problem"
)

// ServerTLS is the configuration of the hub's port: TLS 1.3 alone, and a client needs a certificate of roots
// that has an identity. Which kinds of identity are let in is for the caller to say, by [Peer] or [Expect].
func ServerTLS(cert tls.Certificate, roots *x509.CertPool, alpn ...string) *tls.Config {
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{cert},
		ClientCAs:    roots,
		ClientAuth:   tls.RequireAndVerifyClientCert,
		NextProtos:   alpn,
		// A ticket would let a peer in again without its certificate being looked at.
		SessionTicketsDisabled: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			_, err := Peer(cs)
			return err
		},
	}
}

// ClientTLS is the configuration of whoever dials the hub. HubName is the hub's name, or a host name or address
// that its certificate has. A server whose certificate is not that of a hub is refused, whatever it is called.
func ClientTLS(cert tls.Certificate, roots *x509.CertPool, hubName string, alpn ...string) *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		Certificates:           []tls.Certificate{cert},
		RootCAs:                roots,
		ServerName:             hubName,
		NextProtos:             alpn,
		SessionTicketsDisabled: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			_, err := Expect(cs, KindHub)
			return err
		},
	}
}

// Peer gives the identity of the other end of a finished handshake. Without one, the error is a denied problem.
func Peer(cs tls.ConnectionState) (Identity, error) {
	if len(cs.PeerCertificates) == 0 {
		return Identity{}, problem.New(problem.Denied, "connect with the certificate that the hub's authority issued",
			"the other end showed no certificate")
	}
	return CertIdentity(cs.PeerCertificates[0])
}

// Expect is [Peer] for those who take identities of some kinds only; another kind is a denied problem.
func Expect(cs tls.ConnectionState, kinds ...Kind) (Identity, error) {
	id, err := Peer(cs)
	if err != nil {
		return Identity{}, err
	}
	if !slices.Contains(kinds, id.Kind) {
		return Identity{}, problem.New(problem.Denied, "use the certificate that was issued for this purpose",
			"the other end is %s, where a %s is wanted", id, orList(kinds))
	}
	return id, nil
}

func orList(kinds []Kind) string {
	s := ""
	for i, k := range kinds {
		if i > 0 {
			s += " or "
		}
		s += string(k)
	}
	return s
}

// CertIdentity gives the one identity of a certificate, a denied problem if it has none; validity and signature are not looked at.
func CertIdentity(c *x509.Certificate) (Identity, error) {
	if len(c.URIs) != 1 {
		return Identity{}, problem.New(problem.Denied, "have the certificate issued again by this hub's authority",
			"the certificate of %q has %d identities instead of one", clip(c.Subject.CommonName), len(c.URIs))
	}
	return ParseIdentity(c.URIs[0].String())
}

// Enrolled gives the enrolment by which a certificate was issued, as the time of it: each enrolment of a site or user under the
// same name is later than those before, so a certificate of an older one is told by it. Zero: of none, as for a site that
// stands in hub.toml. It is the serial number in the certificate's subject, in nanoseconds since 1970.
func Enrolled(c *x509.Certificate) time.Time {
	n, err := strconv.ParseInt(c.Subject.SerialNumber, 10, 64)
	if err != nil || n <= 0 {
		return time.Time{}
	}
	return time.Unix(0, n)
}

// Alert gives the code (RFC 8446, 6.2) of the alert with which the other end has ended a handshake or a connection.
func Alert(err error) (uint8, bool) {
	op, ok := errors.AsType[*net.OpError](err)
	if !ok || op.Op != "remote error" {
		return 0, false
	}
	// Over TCP crypto/tls gives a type of its own, which can only be told by its text.
	for code := range uint8(121) {
		if op.Err.Error() == tls.AlertError(code).Error() {
			return code, true
		}
	}
	return 0, false
}

// Explain turns the error of a TLS handshake that this end broke off over the other end's certificate, or the
// other end over ours, into a problem that says so; it gives nil for any other error, such as a refused connection.
func Explain(err error) *problem.Error {
	if p, ok := errors.AsType[*problem.Error](err); ok {
		return p
	}
	if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
		return problem.Wrap(err, problem.Denied, "check that both ends were set up by the same hub, and that no proxy on the way opens TLS",
			"the other end's certificate comes from another authority")
	}
	if _, ok := errors.AsType[x509.HostnameError](err); ok {
		return problem.Wrap(err, problem.Denied, "dial the hub by a name that its certificate has", "the other end is not the hub that was dialled")
	}
	if e, ok := errors.AsType[x509.CertificateInvalidError](err); ok {
		if e.Reason == x509.Expired {
			return problem.Wrap(err, problem.Denied, "renew it, and check the clocks of both machines",
				"the other end's certificate is not valid now (from %v to %v)", e.Cert.NotBefore.UTC(), e.Cert.NotAfter.UTC())
		}
		return problem.Wrap(err, problem.Denied, "have it issued again for this purpose", "the other end's certificate is not made for this")
	}
	if code, ok := Alert(err); ok {
		switch code {
		case 45: // certificate_expired
			return problem.Wrap(err, problem.Expired, "ask the hub's operator for a new token, and use it with pergola site join or pergola login; check the clocks of both machines",
				"this end's certificate is over, by the clock of the other end")
		case 42, 43, 44, 46, 48, 49, 116:
			return problem.Wrap(err, problem.Denied, "have this end's certificate issued again by the hub's authority, and check the clocks of both machines",
				"the other end refused this end's certificate")
		case 120:
			return problem.Wrap(err, problem.Version, "install the same version of pergola at both ends", "the other end does not speak this protocol")
		}
	}
	return nil
}
