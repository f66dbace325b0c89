package enrol

import (
	"crypto/sha256"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/problem"
)

func sample() Token {
	return Token{Kind: pki.KindSite, Name: "st-anna", Hubs: []string{"hub.example.org:8443", "192.0.2.7:8443"}, CA: sha256.Sum256([]byte("ca")), Secret: NewSecret(), Expires: time.Unix(1800000000, 0)}
}

func TestToken(t *testing.T) {
	want := sample()
	text := want.String()
	got, err := Parse(" "+text+"\n", pki.KindSite)
	if err != nil || got.Name != want.Name || !slices.Equal(got.Hubs, want.Hubs) || got.CA != want.CA || got.Secret != want.Secret || !got.Expires.Equal(want.Expires) {
		t.Errorf("%+v, %v", got, err)
	}
	if strings.Contains(text, want.Secret) || !strings.HasPrefix(text, "pergola-site-") {
		t.Errorf("written as %s", text)
	}
	if _, err := Parse(text, pki.KindUser); problem.CodeOf(err) != problem.Usage || !strings.Contains(err.Error(), "pergola site join") {
		t.Errorf("used as a user's: %v", err)
	}
	// No single character can be wrong, missing or doubled unseen.
	for i := len("pergola-site-"); i < len(text); i++ {
		c := byte('A')
		if text[i] == c {
			c = 'B'
		}
		for what, bad := range map[string]string{"wrong": text[:i] + string(c) + text[i+1:], "missing": text[:i] + text[i+1:]} {
			if _, err := Parse(bad, pki.KindSite); problem.CodeOf(err) != problem.Usage {
				t.Fatalf("character %d %s: %v", i, what, err)
			}
		}
	}
	hub := want
	hub.Kind = pki.KindHub
	named := want
	named.Name = "hub"
	for _, bad := range []string{"", "pergola-", "pergola-site-", "token", strings.Repeat("x", 5000), Prefix + strings.Repeat("A", 5000), hub.String(), named.String(), strings.Replace(text, "-site-", "-user-", 1)} {
		if _, err := Parse(bad, pki.KindSite); problem.CodeOf(err) != problem.Usage || len(err.Error()) > 500 {
			t.Errorf("%.40q: %v", bad, err)
		}
	}
}

// What parses is written again as it was.
func FuzzParse(f *testing.F) {
	f.Add(sample().String())
	f.Add("pergola-site-AAAA")
	f.Add("pergola-user-")
	f.Fuzz(func(t *testing.T, s string) {
		for _, k := range []pki.Kind{pki.KindSite, pki.KindUser} {
			tok, err := Parse(s, k)
			if err != nil {
				if problem.CodeOf(err) != problem.Usage {
					t.Errorf("%q: %v", s, err)
				}
				continue
			}
			again, err := Parse(tok.String(), k)
			if err != nil || again.Secret != tok.Secret || again.Name != tok.Name {
				t.Errorf("%q: written %q, %v", s, tok.String(), err)
			}
		}
	})
}
