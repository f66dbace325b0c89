package uplink

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"syscall"
	"time"
	"unicode"

	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/problem"
)

// ask is what to do about a box that opens TLS. Pergola's ends know one another by certificates of the hub's own authority, so
// trusting the box's authority would not help: the hub has to see the site's certificate, which the box does not pass on.
func askException(hub string) string {
	return "ask whoever runs that box for an exception: connections to " + hub + " must pass it undecrypted (no TLS inspection)"
}

func through(via *proxy) string {
	if via == nil {
		return ""
	}
	return fmt.Sprintf(" through the proxy %s", via)
}

// explain makes a problem of the error of a TLS handshake with the hub.
func explain(err error, hub string, via *proxy, wait time.Duration, late bool) error {
	if ce, ok := errors.AsType[*tls.CertificateVerificationError](err); ok && len(ce.UnverifiedCertificates) > 0 {
		leaf := ce.UnverifiedCertificates[0]
		if _, e := pki.CertIdentity(leaf); e != nil || !slices.Contains(leaf.Issuer.Organization, pki.Organization) {
			// No hub has such a certificate. A box may copy the hub's names, but not its authority's.
			return problem.Wrap(err, problem.TLSIntercepted, askException(hub),
				"the connection to %s%s is decrypted by a middle box whose certificate is issued by %s", hub, through(via), issuer(leaf))
		}
		if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
			return problem.Wrap(err, problem.Denied, "check the address, and that this machine was set up by that hub", "%s is a hub of another authority (%s)", hub, issuer(leaf))
		}
	}
	if p := pki.Explain(err); p != nil {
		p = problem.Wrap(err, p.Code, p.Next, "%s: %s", hub, p.Msg)
		return p
	}
	if rh, ok := errors.AsType[tls.RecordHeaderError](err); ok {
		what := "something else"
		if strings.HasPrefix(string(rh.RecordHeader[:]), "HTTP") {
			what = "plain HTTP"
		}
		return problem.Wrap(err, problem.HubUnreachable, "check that the address is that of the hub's own port, and that no proxy or firewall answers in its place",
			"what answers at %s%s speaks %s, not TLS", hub, through(via), what)
	}
	if code, ok := pki.Alert(err); ok && code == 70 || strings.Contains(err.Error(), "unsupported protocol version") { // protocol_version: RFC 8446, 6.2
		return problem.Wrap(err, problem.TLSIntercepted, askException(hub),
			"what answers at %s%s does not speak TLS 1.3 as a hub does: a middle box decrypts the connection, or this is another service", hub, through(via))
	}
	if late || errors.Is(err, context.DeadlineExceeded) {
		return problem.Wrap(err, problem.HubUnreachable, "check that this is the hub's port, and that no firewall on the way holds TLS up",
			"%s%s takes connections but did not finish the TLS handshake within %s", hub, through(via), wait)
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, net.ErrClosed) {
		return problem.Wrap(err, problem.HubUnreachable, "check that the hub runs, and that no firewall on the way refuses TLS 1.3 to it",
			"the connection to %s%s was broken off during the TLS handshake", hub, through(via))
	}
	return problem.Wrap(err, problem.HubUnreachable, "check that the hub runs", "the TLS handshake with %s%s failed (%s)", hub, through(via), reason(err))
}

// noALPN is the problem of a connection whose other end has the hub's certificate, but not its protocols.
func noALPN(hub string, via *proxy) error {
	return problem.New(problem.TLSIntercepted, askException(hub)+"; a load balancer has to forward TCP, not TLS",
		"what answers at %s%s has the hub's certificate but does not speak its protocols (no ALPN): a middle box or load balancer ends TLS there", hub, through(via))
}

// issuer names who issued a certificate, in printable characters and not too long.
func issuer(c *x509.Certificate) string {
	name := c.Issuer.CommonName
	if o := c.Issuer.Organization; len(o) > 0 && o[0] != name {
		if name != "" {
			name += " of "
		}
		name += o[0]
	}
	name = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) || r == '"' {
			return -1
		}
		return r
	}, name)
	if r := []rune(name); len(r) > 100 {
		name = string(r[:100]) + "…"
	}
	if name == "" {
		return "somebody without a name"
	}
	return `"` + name + `"`
}
