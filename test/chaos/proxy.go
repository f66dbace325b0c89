package chaos

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
)

// Proxy is an HTTP CONNECT proxy on a real TCP port of this machine, which does what a proxy may do to those behind it. Set
// the fields before [Proxy.Start], or with [Proxy.Set] later.
type Proxy struct {
	User, Password string            // wanted, if User is not empty
	Sign           []string          // Proxy-Authenticate of a 407; nil: Basic
	Hosts          map[string]string // host:port asked for → address to dial; others are dialled as they are
	Status         int               // the answer to every request, if not 0
	Garbage        string            // the answer to every request, if not empty
	Hang           bool              // no answer at all
	Cert           *tls.Certificate  // of an https:// proxy

	mu    sync.Mutex // guards the rest, and the fields above once started
	ln    net.Listener
	conns map[net.Conn]bool
	asked []string
	wg    sync.WaitGroup
}

// Start listens on addr ("127.0.0.1:0" for any free port), and gives the address. A proxy that was stopped may be started again.
func (p *Proxy) Start(ctx context.Context, addr string) (string, error) {
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, "tcp", addr)
	if err != nil {
		return "", err
	}
	addr = ln.Addr().String()
	if p.Cert != nil {
		ln = tls.NewListener(ln, &tls.Config{Certificates: []tls.Certificate{*p.Cert}, MinVersion: tls.VersionTLS12})
	}
	p.mu.Lock()
	p.ln, p.conns = ln, map[net.Conn]bool{}
	p.mu.Unlock()
	p.wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			if !p.hold(c) {
				continue
			}
			p.wg.Go(func() {
				defer p.drop(c)
				p.serve(c)
			})
		}
	})
	return addr, nil
}

// Stop ends the proxy and everything that goes through it, as if it had been killed.
func (p *Proxy) Stop() {
	p.mu.Lock()
	ln := p.ln
	p.ln = nil
	p.mu.Unlock()
	if ln != nil {
		_ = ln.Close()
	}
	p.Cut()
	p.wg.Wait()
}

// Cut ends all connections that go through the proxy.
func (p *Proxy) Cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		_ = c.Close()
	}
}

// Set changes the proxy while it runs.
func (p *Proxy) Set(f func(*Proxy)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f(p)
}

// Asked gives the host:port of every CONNECT so far.
func (p *Proxy) Asked() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]string(nil), p.asked...)
}

func (p *Proxy) hold(c net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ln == nil {
		_ = c.Close()
		return false
	}
	p.conns[c] = true
	return true
}

func (p *Proxy) drop(c net.Conn) {
	p.mu.Lock()
	delete(p.conns, c)
	p.mu.Unlock()
	_ = c.Close()
}

func (p *Proxy) serve(c net.Conn) {
	r := bufio.NewReader(c)
	req, err := http.ReadRequest(r)
	if err != nil {
		return
	}
	p.mu.Lock()
	p.asked = append(p.asked, req.Host)
	user, password, sign, status, garbage, hang := p.User, p.Password, p.Sign, p.Status, p.Garbage, p.Hang
	addr, ok := p.Hosts[req.Host]
	p.mu.Unlock()
	if !ok {
		addr = req.Host
	}
	answer := func(code int, head string) {
		_, _ = fmt.Fprintf(c, "HTTP/1.1 %d %s\r\n%s\r\n", code, http.StatusText(code), head) // who asked may be gone
	}
	switch {
	case hang:
		_, _ = io.Copy(io.Discard, c)
		return
	case garbage != "":
		_, _ = io.WriteString(c, garbage)
		return
	case req.Method != http.MethodConnect:
		answer(http.StatusMethodNotAllowed, "")
		return
	case user != "" && req.Header.Get("Proxy-Authorization") != "Basic "+base64.StdEncoding.EncodeToString([]byte(user+":"+password)):
		if sign == nil {
			sign = []string{`Basic realm="here"`}
		}
		head := ""
		for _, s := range sign {
			head += "Proxy-Authenticate: " + s + "\r\n"
		}
		answer(http.StatusProxyAuthRequired, head)
		return
	case status != 0:
		answer(status, "")
		return
	}
	var d net.Dialer
	up, err := d.DialContext(context.Background(), "tcp", addr)
	if err != nil {
		answer(http.StatusBadGateway, "")
		return
	}
	if !p.hold(up) {
		return
	}
	defer p.drop(up)
	answer(http.StatusOK, "")
	var ways sync.WaitGroup
	pass := func(from io.Reader, to net.Conn) {
		_, _ = io.Copy(to, from)
		if h, ok := to.(interface{ CloseWrite() error }); ok {
			_ = h.CloseWrite()
		}
	}
	ways.Go(func() { pass(r, up) })
	pass(up, c)
	ways.Wait()
}
