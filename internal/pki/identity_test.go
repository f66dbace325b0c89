package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pergolafl/pergola/internal/problem"
)

func TestNames(t *testing.T) {
	long := strings.Repeat("a", 63)
	for _, good := range []string{"a", "0", "st-anna", "9lives", "a--b", long, "hub"} {
		if err := ValidName(good); err != nil {
			t.Errorf("ValidName(%q): %v", good, err)
		}
	}
	for _, bad := range []string{"", "-a", "a-", "-", "St-Anna", "st_anna", "st.anna", "a b", "ä", "a/b", "a\n", long + "a", strings.Repeat("x", 1000)} {
		err := ValidName(bad)
		if problem.CodeOf(err) != problem.Usage || !strings.Contains(err.Error(), "1 to 63 lower-case letters") || len(err.Error()) > 400 {
			t.Errorf("ValidName(%q): %v", bad, err)
		}
		if err := ValidSite(bad); problem.CodeOf(err) != problem.Usage {
			t.Errorf("ValidSite(%q): %v", bad, err)
		}
	}
	if err := ValidSite("hub"); problem.CodeOf(err) != problem.Usage || !strings.Contains(err.Error(), "hub's side") {
		t.Errorf("a site named hub: %v", err)
	}
}

func TestIdentities(t *testing.T) {
	for uri, want := range map[string]Identity{
		"pergola:///hub/hub":                   {Kind: KindHub, Name: "hub"},
		"pergola:///site/st-anna":              {Kind: KindSite, Name: "st-anna"},
		"pergola:///user/maria":                {Kind: KindUser, Name: "maria"},
		"pergola:///party/01JABC_d-e/st-anna":  {Kind: KindParty, Name: "st-anna", Job: "01JABC_d-e"},
		"pergola:///party/0/hub":               {Kind: KindParty, Name: "hub", Job: "0"},
		"pergola:///site/hub":                  {},
		"pergola:///site/St-Anna":              {},
		"pergola:///site/st-anna/":             {},
		"pergola:///site/st%2danna":            {},
		"pergola:///site/st-anna?x":            {},
		"pergola://host/site/st-anna":          {},
		"pergola:/site/st-anna":                {},
		"Pergola:///site/st-anna":              {},
		"pergola:///party/st-anna":             {},
		"pergola:///party/../site/st-anna":     {},
		"pergola:///party//st-anna":            {},
		"pergola:///site/a/b":                  {},
		"pergola:///king/arthur":               {},
		"pergola:///":                          {},
		"":                                     {},
		"https://example.org/site/st-anna":     {},
		"pergola:///site/" + long(64):          {},
		"pergola:///party/" + long(65) + "/a":  {},
		"pergola:///party/" + long(9999) + "/": {},
	} {
		got, err := ParseIdentity(uri)
		if got != want || (err == nil) != (want != Identity{}) || (err != nil && problem.CodeOf(err) != problem.Denied) {
			t.Errorf("ParseIdentity(%q) = %v, %v, want %v", clip(uri), got, err, want)
		}
		if err == nil && got.URI() != uri {
			t.Errorf("%q is written %q", uri, got.URI())
		}
	}
}

func long(n int) string { return strings.Repeat("a", n) }

// What parses is written back byte for byte, may stand in a certificate, and reads the same from there.
func FuzzParseIdentity(f *testing.F) {
	for _, s := range []string{"pergola:///hub/hub", "pergola:///site/st-anna", "pergola:///party/01J/st-anna", "pergola:///site/hub", "pergola:///site/%61"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		id, err := ParseIdentity(s)
		if err != nil {
			if id != (Identity{}) || problem.CodeOf(err) != problem.Denied {
				t.Errorf("%q: %v, %v", s, id, err)
			}
			return
		}
		u, err := url.Parse(id.url().String())
		if err != nil || id.Check() != nil || id.URI() != s || u.String() != s {
			t.Errorf("%q gave %+v, which is written %q and in a certificate %q, %v", s, id, id.URI(), u, err)
		}
	})
}

func TestIssueRefuses(t *testing.T) {
	a := authority(t)
	key, err := NewKey()
	if err != nil {
		t.Fatal(err)
	}
	site := Identity{Kind: KindSite, Name: "a"}
	for name, do := range map[string]func() ([]byte, error){
		"a site named hub": func() ([]byte, error) {
			return a.Issue(key.Public(), Identity{KindSite, "hub", ""}, Grant{TTL: time.Hour})
		},
		"a bad name": func() ([]byte, error) {
			return a.Issue(key.Public(), Identity{KindSite, "A", ""}, Grant{TTL: time.Hour})
		},
		"an unknown kind": func() ([]byte, error) { return a.Issue(key.Public(), Identity{"king", "a", ""}, Grant{TTL: time.Hour}) },
		"a site with a job": func() ([]byte, error) {
			return a.Issue(key.Public(), Identity{KindSite, "a", "j"}, Grant{TTL: time.Hour})
		},
		"a party without one": func() ([]byte, error) {
			return a.Issue(key.Public(), Identity{KindParty, "a", ""}, Grant{TTL: time.Hour})
		},
		"a party of a path": func() ([]byte, error) {
			return a.Issue(key.Public(), Identity{KindParty, "a", "../x"}, Grant{TTL: time.Hour})
		},
		"a site with a host name": func() ([]byte, error) {
			return a.Issue(key.Public(), site, Grant{TTL: time.Hour, Hosts: []string{"hub"}})
		},
		"no time": func() ([]byte, error) { return a.Issue(key.Public(), site, Grant{}) },
	} {
		if b, err := do(); problem.CodeOf(err) != problem.Usage || b != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestCertificates(t *testing.T) {
	a := authority(t)
	k, err := a.NewKeypair(Identity{Kind: KindHub, Name: "h"}, []string{"127.0.0.1", "::1", "hub.example.org", "h"}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	c, err := k.Certificate()
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	if l := c.Leaf; l.NotBefore.After(now.Add(-4*time.Minute)) || l.NotAfter.Sub(now) > time.Hour || l.NotAfter.Sub(now) < 59*time.Minute {
		t.Errorf("valid from %v to %v, at %v", l.NotBefore, l.NotAfter, now)
	}
	if got := strings.Join(c.Leaf.DNSNames, " "); got != "h hub.example.org" || len(c.Leaf.IPAddresses) != 2 {
		t.Errorf("host names %q, addresses %v", got, c.Leaf.IPAddresses)
	}
	// No certificate outlives its authority, and none is an authority.
	k, err = a.NewKeypair(Identity{Kind: KindSite, Name: "s"}, nil, 100*365*24*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if c, err = k.Certificate(); err != nil || c.Leaf.NotAfter.After(a.cert.NotAfter) || c.Leaf.IsCA {
		t.Errorf("a site's certificate until %v (authority: %v), authority itself: %v, %v", c.Leaf.NotAfter, a.cert.NotAfter, c.Leaf.IsCA, err)
	}
	if id, err := k.Identity(); err != nil || id.Name != "s" {
		t.Errorf("Identity = %v, %v", id, err)
	}
}

func TestSign(t *testing.T) {
	a := authority(t)
	key, err := NewKey()
	if err != nil {
		t.Fatal(err)
	}
	want := Identity{Kind: KindSite, Name: "st-anna"}
	csr, err := NewRequest(key, want)
	if err != nil {
		t.Fatal(err)
	}
	all := func(Identity) error { return nil }
	certPEM, err := a.Sign(csr, all, Grant{TTL: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	keyPEM, err := EncodeKey(key)
	if err != nil {
		t.Fatal(err)
	}
	if id, err := (Keypair{CertPEM: certPEM, KeyPEM: keyPEM}).Identity(); err != nil || id != want {
		t.Errorf("signed for %v, %v, want %v", id, err, want)
	}
	no := errors.New("no")
	if _, err := a.Sign(csr, func(id Identity) error {
		if id != want {
			t.Errorf("asked about %v", id)
		}
		return no
	}, Grant{TTL: time.Hour}); !errors.Is(err, no) {
		t.Errorf("a refusal became %v", err)
	}

	made := func(k any, change func(*x509.CertificateRequest)) []byte {
		r := &x509.CertificateRequest{URIs: []*url.URL{want.url()}}
		change(r)
		der, err := x509.CreateCertificateRequest(rand.Reader, r, k)
		if err != nil {
			t.Fatal(err)
		}
		return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(csr)
	block.Bytes[len(block.Bytes)-1] ^= 1
	for name, bad := range map[string][]byte{
		"nothing":             nil,
		"a certificate":       certPEM,
		"a spoilt signature":  pem.EncodeToMemory(block),
		"another curve":       made(p384, func(*x509.CertificateRequest) {}),
		"no identity":         made(key, func(r *x509.CertificateRequest) { r.URIs = nil }),
		"two identities":      made(key, func(r *x509.CertificateRequest) { r.URIs = append(r.URIs, r.URIs[0]) }),
		"a host name as well": made(key, func(r *x509.CertificateRequest) { r.DNSNames = []string{"hub"} }),
		"a foreign URI":       made(key, func(r *x509.CertificateRequest) { r.URIs[0] = &url.URL{Scheme: "https", Host: "x"} }),
	} {
		if _, err := a.Sign(bad, all, Grant{TTL: time.Hour}); problem.CodeOf(err) != problem.Denied {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// No request makes Sign panic, and what it signs has the identity that was allowed.
func FuzzSign(f *testing.F) {
	a, err := NewAuthority("fuzz")
	if err != nil {
		f.Fatal(err)
	}
	key, err := NewKey()
	if err != nil {
		f.Fatal(err)
	}
	csr, err := NewRequest(key, Identity{Kind: KindSite, Name: "a"})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(csr)
	f.Fuzz(func(t *testing.T, b []byte) {
		var allowed Identity
		out, err := a.Sign(b, func(id Identity) error { allowed = id; return nil }, Grant{TTL: time.Hour})
		if err != nil {
			return
		}
		block, _ := pem.Decode(out)
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		if id, err := CertIdentity(c); err != nil || id != allowed || c.IsCA || len(c.DNSNames) != 0 {
			t.Errorf("signed %v (%v), allowed %v", id, err, allowed)
		}
	})
}

func TestFiles(t *testing.T) {
	dir := t.TempDir()
	a := authority(t)
	if err := a.Save(dir); err != nil {
		t.Fatal(err)
	}
	again, err := LoadAuthority(dir)
	if err != nil || string(again.CertPEM()) != string(a.CertPEM()) {
		t.Fatalf("loaded another authority: %v", err)
	}
	k, err := again.NewKeypair(Identity{Kind: KindSite, Name: "st-anna"}, nil, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // replacing is fine
		if err := SaveKeypair(dir, "st-anna", k); err != nil {
			t.Fatal(err)
		}
	}
	got, err := LoadKeypair(dir, "st-anna")
	if err != nil || string(got.CertPEM) != string(k.CertPEM) || string(got.KeyPEM) != string(k.KeyPEM) || string(got.CAPEM) != string(a.CertPEM()) {
		t.Errorf("loaded another keypair: %v", err)
	}
	files, err := os.ReadDir(dir)
	if err != nil || len(files) != 4 {
		t.Errorf("files %v, %v, want ca.crt, ca.key, st-anna.crt and st-anna.key", files, err)
	}
	for _, f := range files {
		if i, err := f.Info(); err != nil || i.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v, %v", f.Name(), i.Mode(), err)
		}
	}

	if _, err := LoadKeypair(dir, "nobody"); problem.CodeOf(err) != problem.NotFound {
		t.Errorf("a keypair that is not there: %v", err)
	}
	if err := SaveKeypair(filepath.Join(dir, "no"), "x", k); err == nil {
		t.Error("saved into a folder that is not there")
	}
	other := authority(t)
	if err := other.Save(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "ca.crt"), a.CertPEM(), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadAuthority(dir); problem.CodeOf(err) != problem.Usage {
		t.Errorf("certificate and key of two authorities: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "st-anna.crt"), make([]byte, maxPEM+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadKeypair(dir, "st-anna"); problem.CodeOf(err) != problem.Usage {
		t.Errorf("a file that is too large: %v", err)
	}
	// A site's certificate does not make an authority.
	if err := errors.Join(os.WriteFile(filepath.Join(dir, "ca.crt"), k.CertPEM, 0o600), os.WriteFile(filepath.Join(dir, "ca.key"), k.KeyPEM, 0o600)); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadAuthority(dir); problem.CodeOf(err) != problem.Usage {
		t.Errorf("a site as authority: %v", err)
	}
}
