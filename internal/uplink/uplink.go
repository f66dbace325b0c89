// Package uplink makes the TLS connections from a machine to its hub, for the API and for links alike: by one of several
// addresses, through an HTTP CONNECT or SOCKS proxy where there is one, and with an error that says what stands in the way
// when something does: a proxy that refuses, a box that opens TLS, a port that is none of a hub.
//
// It keeps no connection and resolves every name anew, so that whoever dials again after a loss follows a change of the DNS. It
// knows nothing of what the connections carry. Start with [New] and [Dialer.Dial].
package uplink

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pergolafl/pergola/internal/link"
	"github.com/pergolafl/pergola/internal/problem"
)

const (
	// connectWait is how long a TCP connection may take, to a hub or a proxy.
	connectWait = 10 * time.Second
	// proxyWait is how long a proxy may take to answer: it has to connect in its turn.
	proxyWait = 15 * time.Second
	// tlsWait is how long the handshake with the hub may take.
	tlsWait = 10 * time.Second
	// DefaultPort is that of an address without one.
	DefaultPort = "443"
)

// Config says where the hub is and which way to take.
type Config struct {
	// Hubs are the hub's addresses as [ParseAddress] takes them, tried in turn. One that worked is kept.
	Hubs []string
	// Proxy is the proxy's URL, http://, https:// or socks5://, with user:password@ where it wants them; "direct" for none
	// whatever the environment says; "" for what the environment says: HTTPS_PROXY, else ALL_PROXY, but for the hosts of NO_PROXY
	// and loopback addresses.
	Proxy string
	// TLS is the client's configuration; see pki.ClientTLS. Its NextProtos are what the hub must agree to one of.
	TLS *tls.Config
	// Resolver looks names up; nil: the system's.
	Resolver *net.Resolver
}

// Dialer dials one hub. Its methods may be called concurrently.
type Dialer struct {
	hubs  []string
	tls   *tls.Config
	net   *net.Dialer
	proxy func(hub string) (*proxy, error)
	waits waits

	proxyRoots *x509.CertPool // of https:// proxies; nil: the system's

	mu sync.Mutex
	at int // guarded by mu: the address to begin with
}

// waits are the limits of the steps; tests have shorter ones.
type waits struct{ connect, proxy, tls time.Duration }

// New makes a dialer. The error is a usage problem that names what is wrong with an address or with the proxy, never its password.
func New(c Config) (*Dialer, error) {
	d := &Dialer{tls: c.TLS, net: &net.Dialer{Resolver: c.Resolver}, waits: waits{connectWait, proxyWait, tlsWait}}
	for _, h := range c.Hubs {
		a, err := ParseAddress(h)
		if err != nil {
			return nil, err
		}
		if slices.Contains(d.hubs, a) {
			return nil, problem.New(problem.Usage, "name each once", "the hub's address %s is there twice", h)
		}
		d.hubs = append(d.hubs, a)
	}
	if len(d.hubs) == 0 {
		return nil, problem.New(problem.Usage, "give one as HOST:PORT", "no address of a hub was given")
	}
	var err error
	d.proxy, err = chooseProxy(c.Proxy)
	return d, err
}

// ParseAddress gives HOST:PORT for HOST:PORT, [IPv6]:PORT, either without a port (443 then), or https:// before any of these.
func ParseAddress(s string) (string, error) {
	bad := func(next string) (string, error) {
		return "", problem.New(problem.Usage, next, "%q is not the address of a hub", s)
	}
	a := s
	if scheme, rest, ok := strings.Cut(a, "://"); ok {
		if scheme != "https" {
			return bad("write it like hub.example.org:8443, or https://hub.example.org:8443")
		}
		a = strings.TrimSuffix(rest, "/")
	}
	host, port, err := net.SplitHostPort(a)
	if err != nil {
		bare := strings.TrimSuffix(strings.TrimPrefix(a, "["), "]")
		switch {
		case net.ParseIP(bare) != nil, !strings.Contains(a, ":"):
			host, port = bare, DefaultPort
		case strings.Count(a, ":") > 1:
			return bad("put an IPv6 address into brackets: [2001:db8::1]:8443")
		}
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return bad("write it like hub.example.org:8443")
	}
	if host == "" || strings.ContainsAny(host, "/?#@[] \t\r\n") {
		return bad("write it like hub.example.org:8443")
	}
	return net.JoinHostPort(host, port), nil
}

// Hubs gives the addresses as they are dialled.
func (d *Dialer) Hubs() []string { return slices.Clone(d.hubs) }

// Proxy gives the name of the proxy, without user and password, that is asked for the first of the hub's addresses; "" for none.
func (d *Dialer) Proxy() string {
	p, err := d.proxy(d.hubs[0])
	if err != nil || p == nil {
		return ""
	}
	return p.String()
}

// Dial gives a connection whose handshake is over, by the address that worked last, or else the next that does; each is tried once.
// The error is a problem: hub-unreachable, proxy-failed, tls-intercepted, denied or version; with several addresses it names each.
func (d *Dialer) Dial(ctx context.Context) (*tls.Conn, error) {
	d.mu.Lock()
	first := d.at
	d.mu.Unlock()
	var failed []*problem.Error
	for i := range d.hubs {
		n := (first + i) % len(d.hubs)
		c, err := d.dial(ctx, d.hubs[n])
		d.mu.Lock()
		if err == nil {
			d.at = n
		} else if d.at == n {
			d.at = (n + 1) % len(d.hubs)
		}
		d.mu.Unlock()
		if err == nil {
			return c, nil
		}
		failed = append(failed, problem.From(err))
		if ctx.Err() != nil {
			break
		}
	}
	return nil, worst(failed)
}

// worst makes one problem of those of several addresses. What a person can change comes before what may pass by itself.
func worst(failed []*problem.Error) error {
	best := failed[0]
	for _, p := range failed[1:] {
		if best.Code == problem.HubUnreachable && p.Code != problem.HubUnreachable {
			best = p
		}
	}
	if len(failed) == 1 {
		return best
	}
	all := make([]string, 0, len(failed))
	below := make([]error, 0, len(failed))
	for _, p := range failed {
		all = append(all, p.Msg)
		below = append(below, p)
	}
	e := problem.New(best.Code, best.Next, "none of the hub's addresses can be used: %s", strings.Join(all, "; "))
	e.Err = causes(below)
	return e
}

// causes are errors whose text is in the problem already.
type causes []error

func (c causes) Error() string   { return strconv.Itoa(len(c)) + " attempts failed" }
func (c causes) Unwrap() []error { return c }

// dial makes a connection to one address.
func (d *Dialer) dial(ctx context.Context, hub string) (*tls.Conn, error) {
	via, err := d.proxy(hub)
	if err != nil {
		return nil, err
	}
	var c net.Conn
	if via == nil {
		c, err = d.direct(ctx, hub)
	} else {
		c, err = via.connect(ctx, d, hub)
	}
	if err != nil {
		return nil, err
	}
	conf := d.tls.Clone()
	tc := tls.Client(&hearsOut{Conn: link.Coalesce(c)}, conf)
	hs, cancel := context.WithTimeout(ctx, d.waits.tls)
	defer cancel()
	if err := tc.HandshakeContext(hs); err != nil {
		_ = c.Close()
		return nil, explain(err, hub, via, d.waits.tls, hs.Err() != nil && ctx.Err() == nil)
	}
	if p := tc.ConnectionState().NegotiatedProtocol; len(conf.NextProtos) > 0 && p == "" {
		_ = c.Close()
		return nil, noALPN(hub, via)
	}
	return tc, nil
}

// hearsOut is a connection whose last received bytes can be read after it was closed, if it was closed because the other end
// takes no more: what the other end said before tells why, as a TLS alert about this end's certificate does.
type hearsOut struct {
	net.Conn
	refused atomic.Bool // a write failed

	reading sync.Mutex // held while bytes are read, and guards rest
	rest    []byte
}

// lastWait is how long a closing end waits for bytes that the other end may have sent before it took no more; they are there already.
const lastWait = 50 * time.Millisecond

// NetConn gives the connection below, as tls.Conn's does.
func (c *hearsOut) NetConn() net.Conn { return c.Conn }

func (c *hearsOut) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	if err != nil {
		c.refused.Store(true)
	}
	return n, err
}

func (c *hearsOut) Read(b []byte) (int, error) {
	c.reading.Lock()
	defer c.reading.Unlock()
	if len(c.rest) > 0 {
		n := copy(b, c.rest)
		c.rest = c.rest[n:]
		return n, nil
	}
	return c.Conn.Read(b)
}

func (c *hearsOut) Close() error {
	if c.refused.Swap(false) && c.SetReadDeadline(time.Now().Add(lastWait)) == nil {
		c.reading.Lock()          // whoever reads now has an end soon
		last := make([]byte, 512) // of a record with an alert, 24 bytes
		if n, _ := c.Conn.Read(last); n > 0 {
			c.rest = append(c.rest, last[:n]...)
		}
		c.reading.Unlock()
	}
	return c.Conn.Close()
}

// direct connects to the hub without a proxy.
func (d *Dialer) direct(ctx context.Context, hub string) (net.Conn, error) {
	c, err := d.tcp(ctx, hub)
	if err == nil {
		return c, nil
	}
	next := "check that the hub runs and that nothing between it and this machine refuses its port"
	if dns, ok := errors.AsType[*net.DNSError](err); ok {
		next = "check the address, and this machine's DNS"
		return nil, problem.Wrap(err, problem.HubUnreachable, next, "the hub's name in %s cannot be resolved (%s)", hub, dns.Err)
	}
	return nil, problem.Wrap(err, problem.HubUnreachable, next, "the hub cannot be reached at %s (%s)", hub, reason(err))
}

// tcp makes a TCP connection; a name is resolved each time.
func (d *Dialer) tcp(ctx context.Context, addr string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, d.waits.connect)
	defer cancel()
	return d.net.DialContext(ctx, "tcp", addr)
}

// reason is the innermost part of a network error: "connection refused".
func reason(err error) string {
	if ne, ok := errors.AsType[net.Error](err); ok && ne.Timeout() || errors.Is(err, context.DeadlineExceeded) {
		return "no answer in time"
	}
	if op, ok := errors.AsType[*net.OpError](err); ok {
		err = op.Err
	}
	s := err.Error()
	if i := strings.LastIndex(s, ": "); i >= 0 && !strings.Contains(s, "tls:") {
		s = s[i+2:]
	}
	return s
}

// hostURL is what httpproxy's rules look at.
func hostURL(hub string) *url.URL { return &url.URL{Scheme: "https", Host: hub} }
