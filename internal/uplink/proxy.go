package uplink

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"golang.org/x/net/http/httpproxy"
	xproxy "golang.org/x/net/proxy"

	"github.com/pergolafl/pergola/internal/problem"
)

// Direct in place of a proxy's URL says that there is none, whatever the environment says.
const Direct = "direct"

// maxAnswer bounds the head of a proxy's answer, in bytes.
const maxAnswer = 64 << 10

// fromConfig is where a proxy comes from that the environment does not name.
const fromConfig = "the configuration"

// proxy is one that was chosen.
type proxy struct {
	url  *url.URL
	from string // where it was named, for messages: a variable or the configuration
}

// String names the proxy without user and password.
func (p *proxy) String() string { return p.url.Scheme + "://" + p.addr() }

func (p *proxy) addr() string {
	port := p.url.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443", "socks5": "1080", "socks5h": "1080"}[p.url.Scheme]
	}
	return net.JoinHostPort(p.url.Hostname(), port)
}

// parseProxy reads a proxy's URL; HOST:PORT alone is http. The error does not repeat what was read: it may have a password.
func parseProxy(s, from string) (*proxy, error) {
	next := "write it like http://proxy.example.org:3128, or http://user:password@proxy.example.org:3128 with % and two digits for special characters"
	if !strings.Contains(s, "://") {
		s = "http://" + s
	}
	u, err := url.Parse(s)
	if err != nil || u.Hostname() == "" {
		return nil, problem.New(problem.Usage, next, "the proxy in %s cannot be read", from)
	}
	switch u.Scheme {
	case "http", "https", "socks5", "socks5h":
	default:
		return nil, problem.New(problem.Usage, next, "the proxy in %s is of the unknown kind %q", from, u.Scheme)
	}
	return &proxy{url: u, from: from}, nil
}

// chooseProxy gives the rule by which an address has a proxy or none.
func chooseProxy(conf string) (func(hub string) (*proxy, error), error) {
	switch conf {
	case "":
		return environment()
	case Direct:
		return func(string) (*proxy, error) { return nil, nil }, nil //nolint:nilnil // no proxy is no error
	}
	p, err := parseProxy(conf, fromConfig)
	return func(string) (*proxy, error) { return p, err }, err
}

// environment follows the variables of the environment as of now, by the rules of golang.org/x/net/http/httpproxy. ALL_PROXY is
// curl's.
func environment() (func(hub string) (*proxy, error), error) {
	var p *proxy
	for _, name := range []string{"https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"} {
		if v := os.Getenv(name); v != "" {
			var err error
			if p, err = parseProxy(v, name); err != nil {
				return nil, err
			}
			break
		}
	}
	rules := httpproxy.FromEnvironment()
	rules.HTTPSProxy = ""
	if p != nil {
		rules.HTTPSProxy = "http://" + p.addr() // which one is decided above; whether, by the rules
	}
	uses := rules.ProxyFunc()
	return func(hub string) (*proxy, error) {
		u, err := uses(hostURL(hub))
		if err != nil || u == nil {
			return nil, err
		}
		return p, nil
	}, nil
}

func (p *proxy) problem(err error, next, format string, args ...any) *problem.Error {
	e := problem.New(problem.ProxyFailed, next, "the proxy %s (from %s) %s", p, p.from, fmt.Sprintf(format, args...))
	e.Err = err
	return e
}

// connect gives a connection to the hub through the proxy.
func (p *proxy) connect(ctx context.Context, d *Dialer, hub string) (net.Conn, error) {
	if strings.HasPrefix(p.url.Scheme, "socks") {
		return p.socks(ctx, d, hub)
	}
	c, err := p.reach(ctx, d)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	defer stop()
	tunnel, err := p.ask(c, hub, d.waits.proxy)
	if err == nil && !stop() {
		err = context.Cause(ctx)
	}
	if err != nil {
		_ = c.Close()
		if ctx.Err() != nil {
			return nil, p.problem(err, "check that the proxy works", "did not answer in time")
		}
		return nil, err
	}
	return tunnel, nil
}

// reach connects to the proxy itself.
func (p *proxy) reach(ctx context.Context, d *Dialer) (net.Conn, error) {
	c, err := d.tcp(ctx, p.addr())
	if err != nil {
		return nil, p.problem(err, "check that the proxy runs, and its address in "+p.from, "cannot be reached (%s)", reason(err))
	}
	if p.url.Scheme != "https" {
		return c, nil
	}
	tc := tls.Client(c, &tls.Config{ServerName: p.url.Hostname(), MinVersion: tls.VersionTLS12, RootCAs: d.proxyRoots})
	hs, cancel := context.WithTimeout(ctx, d.waits.tls)
	defer cancel()
	if err := tc.HandshakeContext(hs); err != nil {
		_ = c.Close()
		return nil, p.problem(err, "give it as http:// if it takes plain connections; if its certificate comes from your own authority, name that with SSL_CERT_FILE",
			"cannot be spoken to by TLS (%s)", reason(err))
	}
	return tc, nil
}

// ask sends CONNECT (RFC 9110, 9.3.6) and reads the answer.
func (p *proxy) ask(c net.Conn, hub string, wait time.Duration) (net.Conn, error) {
	if err := c.SetDeadline(time.Now().Add(wait)); err != nil {
		return nil, err
	}
	head := "CONNECT " + hub + " HTTP/1.1\r\nHost: " + hub + "\r\nUser-Agent: pergola\r\n"
	user := p.url.User
	if user != nil {
		pass, _ := user.Password()
		head += "Proxy-Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(user.Username()+":"+pass)) + "\r\n"
	}
	_, err := io.WriteString(c, head+"\r\n")
	limit := &io.LimitedReader{R: c, N: maxAnswer}
	r := bufio.NewReader(limit)
	var res *http.Response
	if err == nil {
		res, err = http.ReadResponse(r, &http.Request{Method: http.MethodConnect})
	}
	if err != nil {
		return nil, p.silent(err, wait)
	}
	_ = res.Body.Close() // the connection goes with it, or has no body at all
	if res.StatusCode != http.StatusOK {
		return nil, p.refused(res, hub, user != nil)
	}
	if err := c.SetDeadline(time.Time{}); err != nil {
		return nil, err
	}
	limit.N = 1 << 62
	if r.Buffered() == 0 {
		return c, nil
	}
	return &ahead{Conn: c, r: r}, nil
}

// silent is the problem of a proxy that gives no answer, or none of HTTP.
func (p *proxy) silent(err error, wait time.Duration) error {
	const next = "check that this is the address of an HTTP proxy that allows CONNECT"
	if ne, ok := errors.AsType[net.Error](err); ok && ne.Timeout() {
		return p.problem(err, next+", and that it works", "did not answer within %s", wait)
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.As(err, new(*net.OpError)) {
		return p.problem(err, next, "broke the connection off without an answer")
	}
	return p.problem(noText{err}, next, "does not answer as an HTTP proxy")
}

// noText keeps what a stranger has sent out of messages.
type noText struct{ error }

func (noText) Error() string   { return "malformed answer" }
func (e noText) Unwrap() error { return e.error }

// refused is the problem of an answer that is not 200.
func (p *proxy) refused(res *http.Response, hub string, gaveUser bool) error {
	status := fmt.Sprintf("%d %s", res.StatusCode, http.StatusText(res.StatusCode))
	switch res.StatusCode {
	case http.StatusProxyAuthRequired:
		basic, others := false, []string(nil)
		for _, v := range res.Header.Values("Proxy-Authenticate") {
			scheme, _, _ := strings.Cut(v, " ")
			if strings.EqualFold(scheme, "basic") {
				basic = true
			} else if isToken(scheme) {
				others = append(others, scheme)
			}
		}
		switch {
		case !basic && len(others) > 0:
			return p.problem(nil, "ask whoever runs it to let this machine reach "+hub+" without, or run a local helper that does it (such as cntlm) and name that as the proxy",
				"wants a way of signing in that is not supported: %s (%s)", strings.Join(others, ", "), status)
		case gaveUser:
			return p.problem(nil, "correct user and password in "+p.from+"; special characters in them are written as % and two digits",
				"refuses the user and password that it was given (%s)", status)
		}
		return p.problem(nil, "give them: http://user:password@"+p.addr()+" as HTTPS_PROXY, or as proxy in site.toml", "wants a user and a password (%s)", status)
	case http.StatusForbidden, http.StatusMethodNotAllowed, http.StatusUnavailableForLegalReasons:
		return p.problem(nil, "ask whoever runs it to allow CONNECT to "+hub, "does not allow connections to %s (%s)", hub, status)
	case http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return p.problem(nil, "check that the hub runs, and that the proxy can reach it: some resolve names differently or allow port 443 alone", "could not reach %s (%s)", hub, status)
	}
	return p.problem(nil, "check that this is the address of an HTTP proxy that allows CONNECT to "+hub, "refused the connection to %s (%s)", hub, status)
}

// isToken keeps a stranger's text out of messages, but for a short word.
func isToken(s string) bool {
	if s == "" || len(s) > 32 {
		return false
	}
	for _, c := range s {
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}

// socks gives a connection through a SOCKS5 proxy, which resolves the hub's name.
func (p *proxy) socks(ctx context.Context, d *Dialer, hub string) (net.Conn, error) {
	var auth *xproxy.Auth
	if u := p.url.User; u != nil {
		pass, _ := u.Password()
		auth = &xproxy.Auth{User: u.Username(), Password: pass}
	}
	s, err := xproxy.SOCKS5("tcp", p.addr(), auth, forward{d})
	if err != nil {
		return nil, p.problem(err, "check the proxy in "+p.from, "cannot be used")
	}
	ctx, cancel := context.WithTimeout(ctx, d.waits.connect+d.waits.proxy)
	defer cancel()
	c, err := s.(xproxy.ContextDialer).DialContext(ctx, "tcp", hub) //nolint:errcheck // documented to be one
	if err != nil {
		return nil, p.problem(err, "check that the proxy runs and allows connections to "+hub, "gives no connection to %s (%s)", hub, reason(err))
	}
	return c, nil
}

// forward reaches a SOCKS proxy.
type forward struct{ d *Dialer }

func (f forward) Dial(_, addr string) (net.Conn, error) { return f.d.tcp(context.Background(), addr) }

func (f forward) DialContext(ctx context.Context, _, addr string) (net.Conn, error) {
	return f.d.tcp(ctx, addr)
}

// ahead is a connection of which a little was read already.
type ahead struct {
	net.Conn
	r *bufio.Reader
}

func (a *ahead) Read(b []byte) (int, error) { return a.r.Read(b) }

// NetConn gives the connection below, as crypto/tls does.
func (a *ahead) NetConn() net.Conn { return a.Conn }
