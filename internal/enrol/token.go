// Package enrol lets a machine or a person become known to a hub: by a token, a short text that carries the hub's addresses, the fingerprint
// of its authority, and a secret that works once and not for long. Whoever has it needs no other file.
//
// It does not decide who may enrol; the hub does, which knows the secret's hash. Start with [Token.String] and [Join].
package enrol

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"hash/crc32"
	"strings"
	"time"

	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/problem"
)

// Prefix begins every token, so that people and scanners for secrets know it.
const Prefix = "pergola-"

// maxToken bounds a token's length in bytes.
const maxToken = 4096

// Token is what somebody needs to enrol.
type Token struct {
	Kind    pki.Kind // KindSite or KindUser
	Name    string
	Hubs    []string          // "host:port", tried in turn
	CA      [sha256.Size]byte // of the authority's certificate, as DER
	Secret  string
	Expires time.Time // to the second
}

type wire struct {
	Kind    string   `json:"k"`
	Name    string   `json:"n"`
	Hubs    []string `json:"h"`
	CA      []byte   `json:"c"`
	Secret  string   `json:"s"`
	Expires int64    `json:"e"`
}

// NewSecret makes a token's secret: 130 random bits.
func NewSecret() string { return rand.Text() }

// Hash gives the form in which a hub keeps a secret: hexadecimal SHA-256. A secret is long and random, so no salt is needed.
func Hash(secret string) string {
	h := sha256.Sum256([]byte(secret))
	return hex.EncodeToString(h[:])
}

// String gives the token as a text without spaces: the prefix, the kind, and base64 of its fields with a checksum.
func (t Token) String() string {
	b, err := json.Marshal(wire{string(t.Kind), t.Name, t.Hubs, t.CA[:], t.Secret, t.Expires.Unix()}) //nolint:gosec // to carry the secret is what a token is for
	if err != nil {
		return "" // texts and numbers are JSON
	}
	b = binary.BigEndian.AppendUint32(b, crc32.ChecksumIEEE(b))
	return Prefix + string(t.Kind) + "-" + base64.RawURLEncoding.EncodeToString(b)
}

// Parse reads a token of one kind. Whether its time is over is not looked at: the hub's clock counts.
func Parse(text string, kind pki.Kind) (Token, error) {
	text = strings.TrimSpace(text)
	bad := func(what string) (Token, error) {
		return Token{}, problem.New(problem.Usage, "copy it whole, from "+Prefix+" to its end, or ask the hub's operator for a new one", "the token %s", what)
	}
	rest, ok := strings.CutPrefix(text, Prefix)
	if !ok || len(text) > maxToken {
		return bad("does not begin with " + Prefix + ", or is too long")
	}
	of, body, _ := strings.Cut(rest, "-")
	b, err := base64.RawURLEncoding.Strict().DecodeString(body)
	if err != nil || len(b) < 5 {
		return bad("is damaged: a character is missing or wrong")
	}
	data, sum := b[:len(b)-4], binary.BigEndian.Uint32(b[len(b)-4:])
	if crc32.ChecksumIEEE(data) != sum {
		return bad("is damaged: a character is missing or wrong")
	}
	var w wire
	if err := json.Unmarshal(data, &w); err != nil || w.Kind != of || len(w.CA) != sha256.Size || len(w.Hubs) == 0 || w.Secret == "" {
		return bad("is not one of this version's")
	}
	t := Token{Kind: pki.Kind(w.Kind), Name: w.Name, Hubs: w.Hubs, CA: [sha256.Size]byte(w.CA), Secret: w.Secret, Expires: time.Unix(w.Expires, 0)}
	if err := (pki.Identity{Kind: t.Kind, Name: t.Name}).Check(); err != nil {
		return bad("is for nobody that can enrol")
	}
	if t.Kind != kind {
		cmd := map[pki.Kind]string{pki.KindSite: "pergola site join", pki.KindUser: "pergola login"}[t.Kind]
		if cmd == "" {
			return bad("is for nobody that can enrol")
		}
		return Token{}, problem.New(problem.Usage, "use it with: "+cmd, "the token is for %s %s, not for a %s", t.Kind, t.Name, kind)
	}
	return t, nil
}
