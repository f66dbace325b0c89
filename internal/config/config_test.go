package config

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/pergolafl/pergola/internal/problem"
)

type sample struct {
	Listen string            `toml:"listen"`
	Sites  []string          `toml:"sites"`
	Env    map[string]string `toml:"env"`
}

func TestParse(t *testing.T) {
	for _, c := range []struct{ what, text, want string }{
		{"a good file", "listen = \":1\"\nsites = [\"a\"]\n[env]\nA = \"b\"\n", ""},
		{"an empty file", "", ""},
		{"a misspelt key", "sites = []\nlisten = \":1\"\nlissten = \":2\"\n", `hub.toml:3: unknown key lissten; did you mean "listen"?`},
		{"a key like none", "colour = 1\n", "hub.toml:1: unknown key colour"},
		{"a wrong type", "listen = 4\n", "hub.toml:1: "},
		{"no TOML", "listen = \n", "hub.toml:1: "},
		{"a file that is far too long", strings.Repeat("#", maxFile+1), "hub.toml is longer"},
	} {
		var s sample
		err := Parse([]byte(c.text), "hub.toml", &s)
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, want %q", c.what, err, c.want)
		}
		if err != nil && problem.CodeOf(err) != problem.Usage {
			t.Errorf("%s: code %s", c.what, problem.CodeOf(err))
		}
	}
}

func TestWriteRead(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.toml")
	in := sample{Listen: "[::1]:443", Sites: []string{"a", "b"}, Env: map[string]string{"A": "b\n\"c"}}
	if err := Write(path, in); err != nil {
		t.Fatal(err)
	}
	var out sample
	if err := Read(path, &out); err != nil || out.Listen != in.Listen || len(out.Sites) != 2 || out.Env["A"] != in.Env["A"] {
		t.Errorf("read %+v, %v; wrote %+v", out, err, in)
	}
	if err := Read(path+"x", &out); problem.CodeOf(err) != problem.Usage {
		t.Errorf("a missing file: %v", err)
	}
}

// Whatever the text is, the error is one that people can act upon.
func FuzzParse(f *testing.F) {
	f.Add("listen = \":1\"\n")
	f.Add("[a.b]\nc = 1\n")
	f.Add("x = [")
	f.Fuzz(func(t *testing.T, text string) {
		var s sample
		if err := Parse([]byte(text), "x", &s); err != nil && problem.CodeOf(err) != problem.Usage {
			t.Errorf("%q: %v", text, err)
		}
	})
}
