package hub

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pergolafl/pergola/internal/link"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/pki/pkitest"
)

// hostile are ways to begin a handshake and not to end it.
func hostile(conf *tls.Config) []func(net.Conn) {
	wait := func(c net.Conn) { _, _ = io.Copy(io.Discard, c) } // until the hub has had enough
	say := func(b ...byte) func(net.Conn) {
		return func(c net.Conn) {
			if _, err := c.Write(b); err == nil {
				wait(c)
			}
		}
	}
	return []func(net.Conn){
		wait,
		say(0x16, 0x03),                         // half of a record's head
		say(0x16, 0x03, 0x01, 0xff, 0xff),       // a record beyond any size
		say(0x16, 0x03, 0x01, 0x40, 0x00, 0x01), // a full record, of which nothing comes
		say(0x16, 0x03, 0x01, 0x00, 0x04, 0x01, 0xff, 0xff, 0xff), // a message of 16 MiB
		say([]byte("GET / HTTP/1.1\r\n\r\n")...),
		func(c net.Conn) { // a byte at a time
			for {
				if _, err := c.Write([]byte{0x16}); err != nil {
					return
				}
				time.Sleep(10 * time.Millisecond) // slowly is the point
			}
		},
		func(c net.Conn) { // all of it, but no certificate
			tc := tls.Client(c, &tls.Config{RootCAs: conf.ClientCAs, ServerName: pki.HubName, NextProtos: []string{link.ALPN}, MinVersion: tls.VersionTLS13})
			if tc.Handshake() == nil {
				wait(tc)
			}
		},
	}
}

// 10,000 strangers who hold connections without saying who they are cost the hub a bounded amount of memory, and do not keep a site out.
func TestStrangersAreBounded(t *testing.T) {
	if testing.Short() {
		t.Skip("it makes 10,000 connections")
	}
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err != nil || files.Max < 17_000 {
		t.Skip("not enough descriptors: ", files.Max, err)
	}
	auth := pkitest.Authority(t, "test")
	s := &served{T: t, auth: auth}
	conf := pki.ServerTLS(s.cert(pki.Identity{Kind: pki.KindHub, Name: pki.HubName}), auth.Roots(), "h2", link.ALPN)
	var lc net.ListenConfig
	ln, err := lc.Listen(t.Context(), "tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := newPort(ln, conf, slog.New(slog.DiscardHandler))
	p.wait = time.Second
	ctx, cancel := context.WithCancel(t.Context())
	links := make(chan struct{}, 1)
	done := make(chan error, 1)
	go func() {
		done <- p.run(ctx, func(c *tls.Conn) {
			defer c.Close()
			links <- struct{}{}
		})
	}()
	used := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapInuse + m.StackInuse
	}
	before, most := used(), uint64(0)
	var all sync.WaitGroup
	ways := hostile(conf)
	refused := make(chan struct{}, 10_000)
	const strangers = 10_000
	for i := range strangers {
		// From 50 addresses, so that the limit for each of them alone does not do.
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 9, byte(1+i%50))}}
		c, err := d.DialContext(ctx, "tcp4", ln.Addr().String())
		if err != nil {
			t.Fatalf("stranger %d: %v", i, err)
		}
		all.Go(func() {
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(time.Minute)) // only so that a hub that waits for ever is seen
			ways[i%len(ways)](c)
			if _, err := c.Read(make([]byte, 1)); errors.Is(err, context.DeadlineExceeded) || err == nil {
				t.Errorf("stranger %d still has a connection", i)
			}
			refused <- struct{}{}
		})
		if i%2000 == 1999 {
			most = max(most, used())
			if n := len(p.busy); n > maxHandshakes {
				t.Errorf("%d handshakes are under way", n)
			}
		}
	}
	// In the middle of it a site comes.
	td := tls.Dialer{Config: pki.ClientTLS(s.cert(siteA), auth.Roots(), pki.HubName, link.ALPN)}
	c, err := td.DialContext(ctx, "tcp4", ln.Addr().String())
	if err != nil {
		t.Fatalf("a site was kept out: %v", err)
	}
	<-links
	c.Close()
	most = max(most, used())
	all.Wait()
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if len(p.sources) != 0 || len(p.busy) != 0 {
		t.Errorf("%d sources and %d handshakes are still counted", len(p.sources), len(p.busy))
	}
	grown := (int64(most) - int64(before)) >> 20
	t.Logf("%d MiB at most, the strangers' own ends included", grown)
	if grown > 128 {
		t.Errorf("%d MiB for %d strangers", grown, strangers)
	}
}

// Newcomers, who need no certificate, are strangers until they are served: they count as such, and are not kept for ever.
func TestNewcomersAreBounded(t *testing.T) {
	auth := pkitest.Authority(t, "test")
	s := &served{T: t, auth: auth}
	conf := auth.WithJoin(pki.ServerTLS(s.cert(pki.Identity{Kind: pki.KindHub, Name: pki.HubName}), auth.Roots(), "h2", link.ALPN))
	var lc net.ListenConfig
	ln, err := lc.Listen(t.Context(), "tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := newPort(ln, conf, slog.New(slog.DiscardHandler))
	p.wait = 2 * time.Second
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- p.run(ctx, func(c *tls.Conn) { c.Close() }) }()
	d := tls.Dialer{Config: pki.JoinClientTLS(auth.Fingerprint())}
	come := func() net.Conn {
		t.Helper()
		c, err := d.DialContext(t.Context(), "tcp4", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		_ = c.SetDeadline(time.Now().Add(20 * time.Second)) // only so that a hub that waits for ever is seen
		return c
	}
	for _, c := range []net.Conn{come(), come(), come()} { // whom nobody serves
		if _, err := c.Read(make([]byte, 1)); errors.Is(err, context.DeadlineExceeded) || err == nil {
			t.Errorf("a newcomer that nobody serves still has a connection: %v", err)
		}
		c.Close()
	}
	c := come()
	defer c.Close()
	served, err := p.join.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := served.Write([]byte("x")); err != nil {
		t.Error(err)
	}
	if _, err := c.Read(make([]byte, 1)); err != nil {
		t.Errorf("one that is served: %v", err)
	}
	served.Close()
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if len(p.sources) != 0 || len(p.busy) != 0 {
		t.Errorf("%d sources and %d handshakes are still counted", len(p.sources), len(p.busy))
	}
}

// One address cannot fill the house, an IPv6 network is one address, and what leaves makes room.
func TestHandshakesOfOneSource(t *testing.T) {
	p := &port{sources: map[netip.Addr]int{}}
	a, b := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
	for range maxPerSource {
		if !p.enter(a) {
			t.Fatal("refused below the limit")
		}
	}
	if p.enter(a) {
		t.Error("one source may have more than the limit")
	}
	if !p.enter(b) {
		t.Error("another source has to do with it")
	}
	p.leave(a)
	if !p.enter(a) {
		t.Error("what left makes no room")
	}
	for addr, want := range map[string]string{
		"10.0.0.1:1": "10.0.0.1", "[::ffff:10.0.0.1]:1": "10.0.0.1", "[2001:db8::1:2:3:4]:5": "2001:db8::", "[2001:db8::9]:5": "2001:db8::", "[fe80::1%eth0]:1": "fe80::",
	} {
		if got := sourceOf(addressed{addr: addr}); got != netip.MustParseAddr(want) {
			t.Errorf("sourceOf(%s) = %v, want %s", addr, got, want)
		}
	}
	h := &Hub{links: map[pki.Identity]int{}}
	anna, bert := pki.Identity{Kind: pki.KindParty, Name: "anna", Job: "j"}, pki.Identity{Kind: pki.KindParty, Name: "bert", Job: "j"}
	for range maxLinks {
		if !h.linkUp(anna) {
			t.Fatal("a link refused below the limit")
		}
	}
	if h.linkUp(anna) || !h.linkUp(bert) {
		t.Error("links are not counted by identity")
	}
	h.linkDown(anna)
	h.linkDown(bert)
	if !h.linkUp(anna) || len(h.links) != 1 {
		t.Errorf("links that ended are still counted: %v", h.links)
	}
}

// addressed is a connection that has nothing but a remote address.
type addressed struct {
	net.Conn
	addr string
}

func (a addressed) RemoteAddr() net.Addr { return a }
func (addressed) Network() string        { return "tcp" }
func (a addressed) String() string       { return a.addr }
