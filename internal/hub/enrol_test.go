package hub

import (
	"bytes"
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/enrol"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/store"
)

// A token lets one come, once, as who it says; and somebody who was removed is no site any more.
func TestEnrol(t *testing.T) {
	s := serve(t)
	token := func(kind pki.Kind, name string, ttl time.Duration) enrol.Token {
		now := time.Now()
		tok := enrol.Token{Kind: kind, Name: name, Hubs: []string{s.addr}, CA: s.auth.Fingerprint(), Secret: enrol.NewSecret(), Expires: now.Add(ttl)}
		if err := s.hub.db.PutToken(t.Context(), store.Token{Hash: enrol.Hash(tok.Secret), Kind: string(kind), Name: name, Created: now, Expires: tok.Expires, By: "test"}); err != nil {
			t.Fatal(err)
		}
		return tok
	}
	tok := token(pki.KindSite, "c", time.Minute)
	wrong := tok
	wrong.Name = "d"
	if _, err := enrol.Join(t.Context(), wrong, ""); problem.CodeOf(err) != problem.Denied || !strings.Contains(err.Error(), "not for site d") {
		t.Errorf("somebody else's token: %v", err)
	}
	if k, err := enrol.Join(t.Context(), tok, ""); err != nil {
		t.Errorf("a request that was refused has used the token up: %v", err)
	} else if id, err := k.Identity(); err != nil || id != (pki.Identity{Kind: pki.KindSite, Name: "c"}) {
		t.Errorf("enrolled as %v, %v", id, err)
	}
	if _, err := enrol.Join(t.Context(), tok, ""); problem.CodeOf(err) != problem.Denied || !strings.Contains(err.Error(), "was used already") {
		t.Errorf("a token that was used: %v", err)
	}
	if _, err := enrol.Join(t.Context(), token(pki.KindUser, "maria", -time.Second), ""); problem.CodeOf(err) != problem.Denied {
		t.Errorf("a token whose time is over: %v", err)
	}
	foreign := token(pki.KindUser, "maria", time.Minute)
	foreign.CA[3] ^= 1
	if _, err := enrol.Join(t.Context(), foreign, ""); problem.CodeOf(err) != problem.Denied || !strings.Contains(err.Error(), "not the hub that made the token") {
		t.Errorf("the token of another hub: %v", err)
	}

	user := s.as(pki.Identity{Kind: pki.KindUser, Name: "maria"})
	names := func() (out []string) {
		res, err := user.Jobs.ListSites(t.Context(), &pb.ListSitesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		for _, x := range res.GetSites() {
			out = append(out, x.GetName())
		}
		return out
	}
	if got := names(); !slices.Equal(got, []string{"a", "b", "c"}) {
		t.Errorf("sites %v", got)
	}
	for _, n := range []string{"b", "c"} {
		if err := s.hub.db.RemoveIdentity(t.Context(), string(pki.KindSite), n, time.Now()); err != nil {
			t.Fatal(err)
		}
	}
	if got := names(); !slices.Equal(got, []string{"a"}) {
		t.Errorf("sites after two were removed: %v", got)
	}
	if _, err := s.as(pki.Identity{Kind: pki.KindSite, Name: "c"}).Sites.GetLogOffsets(t.Context(), &pb.GetLogOffsetsRequest{JobId: "01"}); problem.CodeOf(err) != problem.Removed {
		t.Errorf("a site that was removed: %v", err)
	}
}

// Without a certificate there is nothing but enrolment, whichever protocols are asked for.
func TestNewcomersGetAtNothingElse(t *testing.T) {
	s := serve(t)
	conf := pki.JoinClientTLS(s.auth.Fingerprint())
	client := &http.Client{Transport: &http.Transport{DialTLSContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&tls.Dialer{Config: conf}).DialContext(ctx, "tcp", s.addr)
	}, DisableKeepAlives: true}}
	for path, want := range map[string]int{
		"/pergola.v1.EnrolService/Enrol":       http.StatusForbidden, // it is there, and wants a token
		"/pergola.v1.JobService/ListJobs":      http.StatusNotFound,
		"/pergola.v1.SiteService/WatchDesired": http.StatusNotFound,
		"/":                                    http.StatusNotFound,
	} {
		res, err := client.Post("https://hub"+path, "application/json", strings.NewReader(`{}`))
		if err != nil {
			t.Errorf("%s: %v", path, err)
			continue
		}
		body, err := io.ReadAll(res.Body)
		if err != nil || res.StatusCode != want {
			t.Errorf("%s: %s %s, %v", path, res.Status, body, err)
		}
		res.Body.Close()
	}
	big := bytes.Repeat([]byte("x"), maxJoinBytes+1)
	if res, err := client.Post("https://hub/pergola.v1.EnrolService/Enrol", "application/proto", bytes.NewReader(big)); err == nil {
		if res.StatusCode < 400 {
			t.Errorf("a request that is too long: %s", res.Status)
		}
		res.Body.Close()
	}
	for _, alpn := range [][]string{{pki.JoinALPN, "h2"}, {"h2", pki.JoinALPN}, {"http/1.1"}, {"pergola-link/1", pki.JoinALPN}, nil} {
		c := conf.Clone()
		c.NextProtos = alpn
		c.VerifyConnection = nil
		conn, err := tls.Dial("tcp", s.addr, c)
		if err != nil {
			continue // refused at once
		}
		_, err = conn.Write([]byte("POST /pergola.v1.EnrolService/Enrol HTTP/1.1\r\nHost: hub\r\nContent-Length: 0\r\n\r\n"))
		if err == nil {
			_, err = conn.Read(make([]byte, 1)) // with TLS 1.3 the refusal comes with the first read
		}
		if err == nil {
			t.Errorf("with the protocols %v the hub answers somebody without a certificate", alpn)
		}
		conn.Close()
	}
}
