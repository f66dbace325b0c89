package relay

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"

	"github.com/pergolafl/pergola/internal/problem"
)

func TestHeaders(t *testing.T) {
	cases := []struct {
		name, bytes string
		want        string // the target, or ""
		code        problem.Code
	}{
		{"the usual one", "R\x01\x05fleetREST", "fleet", ""},
		{"the longest", "R\x01\x3f" + strings.Repeat("a", 63), strings.Repeat("a", 63), ""},
		{"too long", "R\x01\x40" + strings.Repeat("a", 64), "", problem.Internal},
		{"empty", "R\x01\x00", "", problem.Internal},
		{"a later version", "R\x02\x05fleet", "", problem.Version},
		{"something else", "GET / HTTP/1.1\r\n", "", problem.Internal},
		{"capitals", "R\x01\x05Fleet", "", problem.Internal},
		{"cut off", "R\x01\x05fle", "", problem.Internal},
		{"nothing", "", "", problem.Internal},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			r := strings.NewReader(c.bytes)
			got, err := readHeader(r)
			if got != c.want || (err != nil) != (c.want == "") || problem.CodeOf(err) != c.code {
				t.Errorf("readHeader(%q) = %q, %v, want %q and code %q", c.bytes, got, err, c.want, c.code)
			}
			if c.name == "the usual one" && r.Len() != len("REST") {
				t.Errorf("%d bytes are left, want what stands behind the header", r.Len())
			}
		})
	}
	for _, bad := range []string{"", "-a", "a-", "a b", "ä", strings.Repeat("a", 64)} {
		if err := Listen(context.Background(), closedListener{}, bad, nil); err == nil {
			t.Errorf("Listen took the target %q", bad)
		}
	}
}

type closedListener struct{ net.Listener }

func (closedListener) Close() error { return nil }

// What parses is written back byte for byte, and nothing behind it is read.
func FuzzReadHeader(f *testing.F) {
	for _, s := range []string{"R\x01\x05fleet", "R\x01\x01x and more", "R\x02\x05fleet", "R\x01\xff", "", "R"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		target, err := readHeader(r)
		if err != nil {
			if target != "" {
				t.Errorf("an error with the target %q", target)
			}
			if len(b) >= 3+MaxTarget && errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("%q is long enough, but: %v", b, err)
			}
			return
		}
		again, err := appendHeader(nil, target)
		if err != nil || !bytes.HasPrefix(b, again) || r.Len() != len(b)-len(again) {
			t.Errorf("%q gave %q, which is written %q, %v; %d bytes left", b, target, again, err, r.Len())
		}
	})
}
