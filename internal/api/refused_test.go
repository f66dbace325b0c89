package api

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"testing"

	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/pki/pkitest"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/uplink"
)

// A certificate that the hub refuses is told as that, also when the refusal comes between the handshake and the first request.
func TestRefusedCertificate(t *testing.T) {
	auth := pkitest.Authority(t, "test")
	over := x509.CertificateInvalidError{Reason: x509.Expired}
	ln, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{
		Certificates: []tls.Certificate{pkitest.Cert(t, auth, pki.Identity{Kind: pki.KindHub, Name: pki.HubName})},
		ClientAuth:   tls.RequireAnyClientCert, NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS13,
		VerifyConnection: func(tls.ConnectionState) error { return &tls.CertificateVerificationError{Err: over} },
	})
	if err != nil {
		t.Fatal(err)
	}
	refused := make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			if tc, ok := c.(*tls.Conn); !ok || tc.HandshakeContext(context.Background()) == nil {
				t.Error("the handshake succeeded")
			}
			c.Close()
			refused <- struct{}{}
		}
	}()
	t.Cleanup(func() { ln.Close(); <-done })
	conf := pki.ClientTLS(pkitest.Cert(t, auth, pki.Identity{Kind: pki.KindSite, Name: "a"}), auth.Roots(), pki.HubName)
	conf.NextProtos = []string{"h2"}
	d, err := uplink.New(uplink.Config{Hubs: []string{ln.Addr().String()}, TLS: conf})
	if err != nil {
		t.Fatal(err)
	}
	for range 100 {
		c := newDialing(func(ctx context.Context) (*tls.Conn, error) {
			conn, err := d.Dial(ctx)
			if err == nil {
				<-refused // the refusal is there before the client has the connection
			}
			return conn, err
		}, "https://"+pki.HubName)
		_, err := c.Who.GetHub(t.Context(), &pb.GetHubRequest{})
		c.Close()
		if code := problem.CodeOf(err); code != problem.Expired && code != problem.Denied {
			t.Fatalf("%s: %v", code, err)
		}
	}
}
