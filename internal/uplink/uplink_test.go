package uplink

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/net/dns/dnsmessage"

	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/pki/pkitest"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/test/chaos"
)

func TestMain(m *testing.M) {
	for _, v := range []string{"https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"} {
		if err := os.Unsetenv(v); err != nil {
			panic(err)
		}
	}
	goleak.VerifyTestMain(m)
}

const alpn = "pergola-link/1"

// house is an authority with the certificates of a hub and of a site.
type house struct {
	auth         *pki.Authority
	server, site *tls.Config
}

func newHouse(t *testing.T, name string) house {
	t.Helper()
	a := pkitest.Authority(t, name)
	return house{
		auth:   a,
		server: pki.ServerTLS(pkitest.Cert(t, a, pki.Identity{Kind: pki.KindHub, Name: pki.HubName}), a.Roots(), alpn),
		site:   pki.ClientTLS(pkitest.Cert(t, a, pki.Identity{Kind: pki.KindSite, Name: "st-anna"}), a.Roots(), pki.HubName, alpn),
	}
}

// listen gives the address of a server that treats each connection so.
func listen(t *testing.T, addr string, serve func(net.Conn)) string {
	t.Helper()
	var lc net.ListenConfig
	ln, err := lc.Listen(t.Context(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				serve(c)
			})
		}
	})
	t.Cleanup(func() { ln.Close(); wg.Wait() })
	return ln.Addr().String()
}

// echo is a hub that says its name and then what it hears.
func echo(conf *tls.Config, name string) func(net.Conn) {
	return func(c net.Conn) {
		tc := tls.Server(c, conf)
		if tc.Handshake() != nil {
			return
		}
		if _, err := io.WriteString(tc, name); err == nil {
			_, _ = io.Copy(tc, tc) // until the other end has seen enough
		}
	}
}

func newDialer(t *testing.T, c Config) *Dialer {
	t.Helper()
	d, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	d.waits = waits{2 * time.Second, 2 * time.Second, 2 * time.Second}
	return d
}

// reaches checks that a connection of d leads to the hub of that name, and carries bytes.
func reaches(t *testing.T, d *Dialer, name string) {
	t.Helper()
	c, err := d.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	want := name + "hello"
	if _, err := io.WriteString(c, "hello"); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != want {
		t.Fatalf("got %q, %v; want %q", got, err, want)
	}
}

func startProxy(t *testing.T, p *chaos.Proxy) string {
	t.Helper()
	addr, err := p.Start(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Stop)
	return addr
}

func TestParseAddress(t *testing.T) {
	for in, want := range map[string]string{
		"hub.example.org:8443": "hub.example.org:8443", "hub.example.org": "hub.example.org:443", "10.0.0.1": "10.0.0.1:443", "[::1]:8443": "[::1]:8443",
		"::1": "[::1]:443", "[2001:db8::1]": "[2001:db8::1]:443", "https://hub.example.org": "hub.example.org:443", "https://[::1]:8443/": "[::1]:8443",
		"fe80::1%eth0": "", "[fe80::1%eth0]:8443": "[fe80::1%eth0]:8443",
		"2001:db8::1:8443": "[2001:db8::1:8443]:443", // it is an address as well
		"::1:8443:x":       "", "http://hub": "", "hub:": "", "hub:0": "", "hub:99999": "", "hub:x": "", "": "", ":8443": "", "a b:1": "", "user@hub:1": "", "hub/x:1": "",
	} {
		got, err := ParseAddress(in)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("ParseAddress(%q) = %q, %v; want %q", in, got, err, want)
		}
		if err != nil && (problem.CodeOf(err) != problem.Usage || problem.From(err).Next == "") {
			t.Errorf("ParseAddress(%q) gave %v", in, err)
		}
	}
}

func FuzzParseAddress(f *testing.F) {
	for _, s := range []string{"hub:1", "[::1]:8443", "https://hub/", "::1", "a:b:c", "[", "https://"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		a, err := ParseAddress(s)
		if err != nil {
			return
		}
		if b, err := ParseAddress(a); err != nil || b != a {
			t.Errorf("%q became %q, and that %q, %v", s, a, b, err)
		}
	})
}

func TestBadConfigurations(t *testing.T) {
	for name, c := range map[string]Config{
		"no hub":         {},
		"hub twice":      {Hubs: []string{"hub:443", "https://hub"}},
		"proxy's kind":   {Hubs: []string{"hub"}, Proxy: "ftp://u:secret@p:1"},
		"proxy's escape": {Hubs: []string{"hub"}, Proxy: "http://u:secret%zz@p:1"},
		"proxy's port":   {Hubs: []string{"hub"}, Proxy: "http://u:secret@p:x"},
		"proxy's host":   {Hubs: []string{"hub"}, Proxy: "http://u:secret@:1"},
	} {
		_, err := New(c)
		if problem.CodeOf(err) != problem.Usage || strings.Contains(fmt.Sprintf("%+v %v", err, problem.From(err).Err), "secret") {
			t.Errorf("%s gave %v", name, err)
		}
	}
	t.Setenv("HTTPS_PROXY", "http://u:secret%zz@p:1")
	if _, err := New(Config{Hubs: []string{"hub"}}); err == nil || !strings.Contains(err.Error(), "HTTPS_PROXY") || strings.Contains(err.Error(), "secret") {
		t.Errorf("a bad HTTPS_PROXY gave %v", err)
	}
}

// Which proxy is asked, by configuration and environment.
func TestChoiceOfProxy(t *testing.T) {
	for _, c := range []struct {
		conf, hub string
		env       map[string]string
		want      string
	}{
		{hub: "hub.test", want: ""},
		{hub: "hub.test", env: map[string]string{"HTTPS_PROXY": "p:3128"}, want: "http://p:3128"},
		{hub: "hub.test", env: map[string]string{"https_proxy": "http://u:p@p", "HTTPS_PROXY": "http://q"}, want: "http://p:80"},
		{hub: "hub.test", env: map[string]string{"HTTPS_PROXY": "https://p"}, want: "https://p:443"},
		{hub: "hub.test", env: map[string]string{"ALL_PROXY": "socks5h://p"}, want: "socks5h://p:1080"},
		{hub: "hub.test", env: map[string]string{"ALL_PROXY": "socks5://p", "https_proxy": "p"}, want: "http://p:80"},
		{hub: "hub.test", env: map[string]string{"HTTP_PROXY": "p:3128"}, want: ""},
		{hub: "hub.test", env: map[string]string{"HTTPS_PROXY": "p:3128", "NO_PROXY": "other.test,.test"}, want: ""},
		{hub: "hub.test:8443", env: map[string]string{"HTTPS_PROXY": "p:3128", "no_proxy": "hub.test:443"}, want: "http://p:3128"},
		{hub: "10.1.2.3", env: map[string]string{"HTTPS_PROXY": "p:3128", "NO_PROXY": "10.0.0.0/8"}, want: ""},
		{hub: "hub.test", env: map[string]string{"HTTPS_PROXY": "p:3128", "NO_PROXY": "*"}, want: ""},
		{hub: "localhost:1", env: map[string]string{"HTTPS_PROXY": "p:3128"}, want: ""},
		{hub: "[::1]:1", env: map[string]string{"HTTPS_PROXY": "p:3128"}, want: ""},
		{hub: "[2001:db8::1]:1", env: map[string]string{"HTTPS_PROXY": "[2001:db8::2]:3128"}, want: "http://[2001:db8::2]:3128"},
		{conf: "http://u:p@c:1", hub: "hub.test", env: map[string]string{"HTTPS_PROXY": "p:3128", "NO_PROXY": "*"}, want: "http://c:1"},
		{conf: "c:1", hub: "127.0.0.1:1", want: "http://c:1"},
		{conf: "direct", hub: "hub.test", env: map[string]string{"HTTPS_PROXY": "p:3128"}, want: ""},
	} {
		t.Run(fmt.Sprint(c.conf, c.hub, c.env), func(t *testing.T) {
			for k, v := range c.env {
				t.Setenv(k, v)
			}
			d, err := New(Config{Hubs: []string{c.hub}, Proxy: c.conf})
			if err != nil {
				t.Fatal(err)
			}
			if got := d.Proxy(); got != c.want {
				t.Errorf("the proxy is %q, want %q", got, c.want)
			}
		})
	}
}

func TestThroughProxies(t *testing.T) {
	h := newHouse(t, "here")
	hub := listen(t, "127.0.0.1:0", echo(h.server, "one"))
	hosts := map[string]string{"hub.test:8443": hub} // a name that only the proxy knows
	t.Run("without a password", func(t *testing.T) {
		p := &chaos.Proxy{Hosts: hosts}
		t.Setenv("HTTPS_PROXY", "http://"+startProxy(t, p))
		reaches(t, newDialer(t, Config{Hubs: []string{"hub.test:8443"}, TLS: h.site}), "one")
	})
	t.Run("with a password", func(t *testing.T) {
		p := &chaos.Proxy{Hosts: hosts, User: "an na", Password: "p@ss:w/ord%"}
		u := url.URL{Scheme: "http", User: url.UserPassword(p.User, p.Password), Host: startProxy(t, p)}
		t.Setenv("HTTPS_PROXY", "http://127.0.0.1:1") // the configuration wins
		reaches(t, newDialer(t, Config{Hubs: []string{"hub.test:8443"}, TLS: h.site, Proxy: u.String()}), "one")
		if got := p.Asked(); len(got) != 1 || got[0] != "hub.test:8443" {
			t.Errorf("the proxy was asked for %q", got)
		}
	})
	t.Run("by TLS", func(t *testing.T) {
		cert, file := selfSigned(t, "127.0.0.1")
		p := &chaos.Proxy{Hosts: hosts, Cert: &cert}
		addr := startProxy(t, p)
		d := newDialer(t, Config{Hubs: []string{"hub.test:8443"}, TLS: h.site, Proxy: "https://" + addr})
		if _, err := d.Dial(t.Context()); problem.CodeOf(err) != problem.ProxyFailed || !strings.Contains(err.Error(), "SSL_CERT_FILE") {
			t.Errorf("a proxy with an unknown certificate gave %v", err)
		}
		roots := x509.NewCertPool()
		b, err := os.ReadFile(file)
		if err != nil || !roots.AppendCertsFromPEM(b) {
			t.Fatal(err)
		}
		d.proxyRoots = roots // the system's are read once in a process
		reaches(t, d, "one")
	})
	t.Run("that sends ahead", func(t *testing.T) {
		// The answer and the first bytes of the tunnel in one piece: nothing of them may be lost.
		addr := listen(t, "127.0.0.1:0", func(c net.Conn) {
			b := make([]byte, 4096)
			if _, err := c.Read(b); err == nil {
				_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\nahead")
			}
		})
		d := newDialer(t, Config{Hubs: []string{"hub.test:8443"}, TLS: h.site, Proxy: "http://" + addr})
		via, err := d.proxy("hub.test:8443")
		if err != nil {
			t.Fatal(err)
		}
		c, err := via.connect(t.Context(), d, "hub.test:8443")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if b, err := io.ReadAll(c); string(b) != "ahead" || err != nil {
			t.Errorf("read %q, %v", b, err)
		}
	})
	t.Run("SOCKS", func(t *testing.T) {
		addr := listen(t, "127.0.0.1:0", socks(t, "u", "secret", hosts))
		reaches(t, newDialer(t, Config{Hubs: []string{"hub.test:8443"}, TLS: h.site, Proxy: "socks5://u:secret@" + addr}), "one")
		_, err := newDialer(t, Config{Hubs: []string{"hub.test:8443"}, TLS: h.site, Proxy: "socks5://u:wrong-secret@" + addr}).Dial(t.Context())
		if problem.CodeOf(err) != problem.ProxyFailed || !strings.Contains(err.Error(), addr) || strings.Contains(err.Error(), "secret") {
			t.Errorf("a wrong password gave %v", err)
		}
	})
}

// What proxies do instead of letting through, and what is said of it.
func TestProxiesThatRefuse(t *testing.T) {
	h := newHouse(t, "here")
	for name, c := range map[string]struct {
		proxy     *chaos.Proxy
		user      string // in the URL
		says      string
		next      string
		notListen bool
	}{
		"no password":    {proxy: &chaos.Proxy{User: "anna", Password: "secret"}, says: "wants a user and a password (407", next: "http://user:password@"},
		"wrong password": {proxy: &chaos.Proxy{User: "anna", Password: "secret"}, user: "anna:wrong-secret", says: "refuses the user and password", next: "correct user and password in the configuration"},
		"NTLM":           {proxy: &chaos.Proxy{User: "anna", Sign: []string{"NTLM", "Negotiate abc"}}, user: "anna:secret", says: "not supported: NTLM, Negotiate", next: "cntlm"},
		"forbidden":      {proxy: &chaos.Proxy{Status: 403}, says: "does not allow connections to hub.test:8443 (403", next: "allow CONNECT to hub.test:8443"},
		"bad gateway":    {proxy: &chaos.Proxy{Status: 502}, says: "could not reach hub.test:8443 (502", next: "the hub runs"},
		"odd status":     {proxy: &chaos.Proxy{Status: 418}, says: "refused the connection to hub.test:8443 (418", next: "CONNECT"},
		"garbage":        {proxy: &chaos.Proxy{Garbage: "SSH-2.0-\x1b[31mOpenSSH\r\n"}, says: "does not answer as an HTTP proxy", next: "address of an HTTP proxy"},
		"endless":        {proxy: &chaos.Proxy{Garbage: "HTTP/1.1 200 OK\r\nA: " + strings.Repeat("x", 1<<20)}, says: "without an answer", next: "address of an HTTP proxy"},
		"hang":           {proxy: &chaos.Proxy{Hang: true}, says: "did not answer within", next: "that it works"},
		"not there":      {proxy: &chaos.Proxy{}, notListen: true, says: "cannot be reached (connection refused)", next: "the proxy runs"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			addr := startProxy(t, c.proxy)
			if c.notListen {
				c.proxy.Stop()
			}
			raw := "http://" + addr
			if c.user != "" {
				raw = "http://" + c.user + "@" + addr
			}
			d := newDialer(t, Config{Hubs: []string{"hub.test:8443"}, TLS: h.site, Proxy: raw})
			d.waits.proxy = 200 * time.Millisecond
			if name != "hang" {
				d.waits.proxy = 20 * time.Second
			}
			_, err := d.Dial(t.Context())
			p := problem.From(err)
			if p == nil || p.Code != problem.ProxyFailed || !strings.Contains(p.Msg, "http://"+addr) || !strings.Contains(p.Msg, "the configuration") ||
				!strings.Contains(p.Msg, c.says) || !strings.Contains(p.Next, c.next) {
				t.Errorf("got %v\nwant %q, next %q", err, c.says, c.next)
			}
			if s := fmt.Sprintf("%v %+v", err, errors.Unwrap(err)); strings.Contains(s, "secret") || strings.Contains(s, "OpenSSH") {
				t.Errorf("the error tells too much: %s", s)
			}
		})
	}
}

// Whatever answers in the hub's place is named as what it is.
func TestMiddleBoxes(t *testing.T) {
	here, there := newHouse(t, "here"), newHouse(t, "pergola of there")
	box, _ := selfSigned(t, pki.HubName)
	old := &tls.Config{Certificates: []tls.Certificate{box}, MaxVersion: tls.VersionTLS12}
	noALPN := here.server.Clone()
	noALPN.NextProtos = nil
	otherALPN := here.server.Clone()
	otherALPN.NextProtos = []string{"pergola-link/9"}
	for name, c := range map[string]struct {
		serve      func(net.Conn)
		code       problem.Code
		says, next string
	}{
		"another authority": {
			echo(&tls.Config{Certificates: []tls.Certificate{box}, NextProtos: []string{alpn}}, ""), problem.TLSIntercepted,
			`is decrypted by a middle box whose certificate is issued by "Box CA of Ministry of Inspection"`, "exception",
		},
		"no ALPN":      {echo(noALPN, ""), problem.TLSIntercepted, "no ALPN", "forward TCP"},
		"old TLS":      {echo(old, ""), problem.TLSIntercepted, "does not speak TLS 1.3", "exception"},
		"other ALPN":   {echo(otherALPN, ""), problem.Version, "does not speak this protocol", "same version"},
		"another hub":  {echo(there.server, ""), problem.Denied, `a hub of another authority ("pergola of there of Pergola")`, "set up by that hub"},
		"plain HTTP":   {func(c net.Conn) { _, _ = io.WriteString(c, "HTTP/1.1 400 Bad Request\r\n\r\n") }, problem.HubUnreachable, "speaks plain HTTP, not TLS", "hub's own port"},
		"another kind": {func(c net.Conn) { _, _ = io.WriteString(c, "SSH-2.0-OpenSSH_9.6\r\n") }, problem.HubUnreachable, "speaks something else, not TLS", "hub's own port"},
		"closes":       {func(c net.Conn) { _, _ = c.Read(make([]byte, 4096)) }, problem.HubUnreachable, "broken off during the TLS handshake", "firewall"},
		"silent":       {func(c net.Conn) { _, _ = io.Copy(io.Discard, c) }, problem.HubUnreachable, "did not finish the TLS handshake within", "firewall"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			addr := listen(t, "127.0.0.1:0", c.serve)
			for _, proxied := range []bool{false, true} {
				conf := Config{Hubs: []string{addr}, TLS: here.site, Proxy: Direct}
				if proxied {
					conf.Proxy = "http://" + startProxy(t, &chaos.Proxy{})
				}
				d := newDialer(t, conf)
				d.waits.tls = 10 * time.Second
				if name == "silent" {
					d.waits.tls = 100 * time.Millisecond
				}
				_, err := d.Dial(t.Context())
				p := problem.From(err)
				if p == nil || p.Code != c.code || !strings.Contains(p.Msg, addr) || !strings.Contains(p.Msg, c.says) || !strings.Contains(p.Next, c.next) {
					t.Errorf("proxied %v: got %s, %v\nwant %s, %q, next %q", proxied, p.Code, err, c.code, c.says, c.next)
				}
			}
		})
	}
}

// Addresses are tried in turn, each once in a dial; one that worked is kept until it fails.
func TestSeveralAddresses(t *testing.T) {
	h := newHouse(t, "here")
	one, two := listen(t, "127.0.0.1:0", echo(h.server, "one")), listen(t, "127.0.0.1:0", echo(h.server, "two"))
	var lc net.ListenConfig
	ln, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := ln.Addr().String()
	ln.Close()
	d := newDialer(t, Config{Hubs: []string{closed, one, two}, TLS: h.site})
	reaches(t, d, "one")
	if d.at != 1 {
		t.Errorf("it begins with address %d the next time", d.at)
	}
	reaches(t, d, "one")
	d = newDialer(t, Config{Hubs: []string{one, two}, TLS: h.site})
	d.at = 1
	reaches(t, d, "two")
	reaches(t, d, "two")

	box, _ := selfSigned(t, pki.HubName)
	boxed := listen(t, "127.0.0.1:0", echo(&tls.Config{Certificates: []tls.Certificate{box}, MinVersion: tls.VersionTLS12}, ""))
	d = newDialer(t, Config{Hubs: []string{closed, boxed}, TLS: h.site})
	_, err = d.Dial(t.Context())
	if p := problem.From(err); p.Code != problem.TLSIntercepted || !strings.Contains(p.Msg, closed) || !strings.Contains(p.Msg, boxed) || !strings.Contains(p.Next, "exception") {
		t.Errorf("two addresses that fail gave %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := d.Dial(ctx); problem.CodeOf(err) != problem.HubUnreachable || !errors.Is(err, context.Canceled) {
		t.Errorf("a dial that was given up gave %v", err)
	}
}

func TestIPv6(t *testing.T) {
	var lc net.ListenConfig
	ln, err := lc.Listen(t.Context(), "tcp", "[::1]:0")
	if err != nil {
		t.Skip("no IPv6 on this machine: ", err)
	}
	ln.Close()
	h := newHouse(t, "here")
	hub := listen(t, "[::1]:0", echo(h.server, "six"))
	reaches(t, newDialer(t, Config{Hubs: []string{"https://" + hub}, TLS: h.site}), "six")
	p := &chaos.Proxy{}
	reaches(t, newDialer(t, Config{Hubs: []string{hub}, TLS: h.site, Proxy: startProxy(t, p)}), "six")
	if got := p.Asked(); len(got) != 1 || got[0] != hub {
		t.Errorf("the proxy was asked for %q, want %q", got, hub)
	}
}

// A name is looked up for each connection: a hub that has moved is found.
func TestDNSChanges(t *testing.T) {
	h := newHouse(t, "here")
	one := listen(t, "127.0.0.1:0", echo(h.server, "one"))
	_, port, err := net.SplitHostPort(one)
	if err != nil {
		t.Fatal(err)
	}
	listen(t, "127.0.0.2:"+port, echo(h.server, "two"))
	names := &nameServer{ip: [4]byte{127, 0, 0, 1}}
	d := newDialer(t, Config{Hubs: []string{"hub.test:" + port}, TLS: h.site, Resolver: names.start(t)})
	reaches(t, d, "one")
	names.set([4]byte{127, 0, 0, 2})
	reaches(t, d, "two")
	names.set([4]byte{})
	if _, err := d.Dial(t.Context()); problem.CodeOf(err) != problem.HubUnreachable || !strings.Contains(err.Error(), "cannot be resolved") {
		t.Errorf("a name that is gone gave %v", err)
	}
}

// nameServer is a DNS server on a UDP port that gives one address for every name; zero: there is no such name.
type nameServer struct {
	mu sync.Mutex
	ip [4]byte
}

func (n *nameServer) set(ip [4]byte) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.ip = ip
}

func (n *nameServer) start(t *testing.T) *net.Resolver {
	t.Helper()
	var lc net.ListenConfig
	pc, err := lc.ListenPacket(t.Context(), "udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		b := make([]byte, 1500)
		for {
			size, from, err := pc.ReadFrom(b)
			if err != nil {
				return
			}
			var m dnsmessage.Message
			if m.Unpack(b[:size]) != nil || len(m.Questions) != 1 {
				continue
			}
			n.mu.Lock()
			ip := n.ip
			n.mu.Unlock()
			m.Header = dnsmessage.Header{ID: m.ID, Response: true, Authoritative: true}
			m.Additionals = nil
			switch q := m.Questions[0]; {
			case ip == [4]byte{}:
				m.RCode = dnsmessage.RCodeNameError
			case q.Type == dnsmessage.TypeA:
				m.Answers = []dnsmessage.Resource{{Header: dnsmessage.ResourceHeader{Name: q.Name, Class: dnsmessage.ClassINET, TTL: 3600}, Body: &dnsmessage.AResource{A: ip}}}
			}
			if out, err := m.Pack(); err == nil {
				_, _ = pc.WriteTo(out, from) // who asked asks again
			}
		}
	})
	t.Cleanup(func() { pc.Close(); wg.Wait() })
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "udp", pc.LocalAddr().String())
	}}
}

// selfSigned gives a certificate as a middle box has, and the file of its authority.
func selfSigned(t *testing.T, host string) (tls.Certificate, string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	sign := func(c, parent *x509.Certificate) []byte {
		c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
		der, err := x509.CreateCertificate(rand.Reader, c, parent, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Box CA", Organization: []string{"Ministry of \x07Inspection"}}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	caDER := sign(ca, ca)
	leaf := &x509.Certificate{SerialNumber: big.NewInt(2), DNSNames: []string{host}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	if ip := net.ParseIP(host); ip != nil {
		leaf.DNSNames, leaf.IPAddresses = nil, []net.IP{ip}
	}
	file := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: caDER}), 0o600); err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{sign(leaf, ca)}, PrivateKey: key}, file
}

// socks is a SOCKS5 proxy (RFC 1928, 1929) that wants a user.
func socks(t *testing.T, user, password string, hosts map[string]string) func(net.Conn) {
	return func(c net.Conn) {
		read := func(n int) []byte {
			b := make([]byte, n)
			if _, err := io.ReadFull(c, b); err != nil {
				return make([]byte, n)
			}
			return b
		}
		say := func(b ...byte) { _, _ = c.Write(b) }
		read(int(read(2)[1])) // version, methods
		say(5, 2)
		u := string(read(int(read(2)[1])))
		if p := string(read(int(read(1)[0]))); u != user || p != password {
			say(1, 1)
			return
		}
		say(1, 0)
		head := read(5)
		if head[3] != 3 {
			t.Errorf("the SOCKS proxy was asked for an address of kind %d, not a name", head[3])
			return
		}
		host := string(read(int(head[4])))
		port := read(2)
		var d net.Dialer
		up, err := d.DialContext(context.Background(), "tcp", hosts[net.JoinHostPort(host, fmt.Sprint(int(port[0])<<8|int(port[1])))])
		if err != nil {
			say(5, 5, 0, 1, 0, 0, 0, 0, 0, 0)
			return
		}
		defer up.Close()
		say(5, 0, 0, 1, 0, 0, 0, 0, 0, 0)
		var wg sync.WaitGroup
		wg.Go(func() { _, _ = io.Copy(up, c); up.Close() })
		_, _ = io.Copy(c, up)
		c.Close()
		wg.Wait()
	}
}
