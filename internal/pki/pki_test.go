package pki

import (
	"crypto/tls"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/pergolafl/pergola/internal/problem"
)

type ends struct {
	server, client       *tls.Config
	serverErr, clientErr error
	serverSaw, clientSaw tls.ConnectionState
}

// shake does one real handshake over loopback, and one byte each way: under TLS 1.3 a client learns only then
// that its certificate was refused.
func (e *ends) shake(t *testing.T) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		raw, err := ln.Accept()
		if err != nil {
			e.serverErr = err
			return
		}
		c := tls.Server(raw, e.server)
		defer c.Close()
		if e.serverErr = c.Handshake(); e.serverErr == nil {
			e.serverSaw = c.ConnectionState()
			_, e.serverErr = c.Write([]byte{1})
		}
		if e.serverErr == nil {
			_, e.serverErr = c.Read(make([]byte, 1))
		}
	}()
	c, err := tls.Dial("tcp", ln.Addr().String(), e.client)
	if err == nil {
		e.clientSaw = c.ConnectionState()
		if _, err = c.Read(make([]byte, 1)); err == nil {
			_, err = c.Write([]byte{1})
		}
		defer c.Close()
	}
	e.clientErr = err
	<-done
}

func authority(t *testing.T) *Authority {
	t.Helper()
	a, err := NewAuthority("test")
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func cert(t *testing.T, a *Authority, id Identity, ttl time.Duration, hosts ...string) tls.Certificate {
	t.Helper()
	k, err := a.NewKeypair(id, hosts, ttl)
	if err != nil {
		t.Fatal(err)
	}
	c, err := k.Certificate()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestHandshakes(t *testing.T) {
	a, other := authority(t), authority(t)
	hub := Identity{Kind: KindHub, Name: "hub"}
	site := Identity{Kind: KindSite, Name: "st-anna"}
	party := Identity{Kind: KindParty, Name: "st-anna", Job: "01JABCDEFGHJKMNPQRSTVWXYZ0"}
	later := func(d time.Duration) func() time.Time { return func() time.Time { return time.Now().Add(d) } }
	server := func(ca *Authority, id Identity, hosts ...string) *tls.Config {
		return ServerTLS(cert(t, ca, id, time.Hour, hosts...), a.Roots(), "x/1", "y/1")
	}
	client := func(ca *Authority, id Identity, name string) *tls.Config {
		return ClientTLS(cert(t, ca, id, time.Hour), a.Roots(), name, "y/1")
	}
	with := func(c *tls.Config, f func(*tls.Config)) *tls.Config { f(c); return c }
	cases := []struct {
		name           string
		server, client *tls.Config
		refused        string // by "": nobody; else the end that refuses and what Explain says there
		byServer       bool
	}{
		{"a site reaches its hub by the hub's name", server(a, hub), client(a, site, "hub"), "", false},
		{"a party does, by address", server(a, hub, "127.0.0.1", "hub.example.org"), client(a, party, "127.0.0.1"), "", false},
		{"a party does, by host name", server(a, hub, "127.0.0.1", "hub.example.org"), client(a, party, "hub.example.org"), "", false},
		{"another hub of the same authority", server(a, Identity{Kind: KindHub, Name: "hub-b"}), client(a, site, "hub"), "not the hub", false},
		{"a hub of another authority", server(other, hub), client(a, site, "hub"), "comes from another authority", false},
		{"a site of another authority", server(a, hub), client(other, site, "hub"), "comes from another authority", true},
		{
			"a site that says it is the hub", ServerTLS(cert(t, a, Identity{Kind: KindSite, Name: "evil"}, time.Hour), a.Roots()),
			client(a, site, "evil"), "not the hub", false,
		},
		{"an expired site", with(server(a, hub), func(c *tls.Config) { c.Time = later(2 * time.Hour) }), client(a, site, "hub"), "not valid now", true},
		{"an expired hub", server(a, hub), with(client(a, site, "hub"), func(c *tls.Config) { c.Time = later(2 * time.Hour) }), "not valid now", false},
		{"a hub whose clock is four minutes late", with(server(a, hub), func(c *tls.Config) { c.Time = later(-4 * time.Minute) }), client(a, site, "hub"), "", false},
		{"no certificate at all", server(a, hub), with(client(a, site, "hub"), func(c *tls.Config) { c.Certificates = nil }), "provide a certificate", true},
		{"TLS 1.2", server(a, hub), with(client(a, site, "hub"), func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 }), "version", true},
		{"no protocol in common", server(a, hub), with(client(a, site, "hub"), func(c *tls.Config) { c.NextProtos = []string{"z/1"} }), "protocol", true},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			e := &ends{server: c.server, client: c.client}
			e.shake(t)
			if c.refused == "" {
				if e.serverErr != nil || e.clientErr != nil {
					t.Fatalf("server: %v, client: %v, want both to be content", e.serverErr, e.clientErr)
				}
				if e.serverSaw.Version != tls.VersionTLS13 || e.serverSaw.NegotiatedProtocol != "y/1" || e.serverSaw.DidResume {
					t.Errorf("negotiated %+v", e.serverSaw)
				}
				if id, err := Peer(e.serverSaw); err != nil || id.Name != "st-anna" {
					t.Errorf("server saw %v, %v", id, err)
				}
				if id, err := Peer(e.clientSaw); err != nil || id.Kind != KindHub {
					t.Errorf("client saw %v, %v", id, err)
				}
				return
			}
			err, far := e.clientErr, e.serverErr
			if c.byServer {
				err, far = far, err
			}
			if err == nil || far == nil {
				t.Fatalf("server: %v, client: %v, want both to fail", e.serverErr, e.clientErr)
			}
			text := err.Error()
			if p := Explain(err); p != nil {
				text = p.Msg
			}
			if !strings.Contains(text, c.refused) {
				t.Errorf("refused with %q, want it to say %q", text, c.refused)
			}
		})
	}
}

func TestKinds(t *testing.T) {
	a := authority(t)
	site := Identity{Kind: KindSite, Name: "st-anna"}
	e := &ends{
		server: ServerTLS(cert(t, a, Identity{Kind: KindHub, Name: "h"}, time.Hour), a.Roots()),
		client: ClientTLS(cert(t, a, site, time.Hour), a.Roots(), "h"),
	}
	e.shake(t)
	if id, err := Expect(e.serverSaw, KindUser, KindSite); err != nil || id != site {
		t.Errorf("Expect = %v, %v, want %v", id, err, site)
	}
	_, err := Expect(e.serverSaw, KindHub, KindParty)
	if problem.CodeOf(err) != problem.Denied || !strings.Contains(err.Error(), "site st-anna, where a hub or party is wanted") {
		t.Errorf("a site where a hub or party is wanted gave %v", err)
	}
	if _, err := Peer(tls.ConnectionState{}); problem.CodeOf(err) != problem.Denied {
		t.Errorf("no certificate gave %v", err)
	}
}
