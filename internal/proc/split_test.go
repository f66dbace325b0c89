package proc

import (
	"encoding/json"
	"slices"
	"testing"

	"github.com/pergolafl/pergola/internal/problem"
)

var splitCases = []struct {
	in   string
	want []string // nil and bad: refused
	bad  bool
}{
	{"", nil, false},
	{"  \t\r\n ", nil, false},
	{"flower-superlink --insecure --database state.db", []string{"flower-superlink", "--insecure", "--database", "state.db"}, false},
	{`a 'b c' "d e"f`, []string{"a", "b c", "d ef"}, false},
	{`'' ""`, []string{"", ""}, false},
	{`a\ b \'c\' \\`, []string{"a b", "'c'", `\`}, false},
	{`"a\"b\\c\$d\n"`, []string{`a"b\c\$d\n`}, false},
	{`'a\b"c'`, []string{`a\b"c`}, false},
	{"'a\nb' c\nd", []string{"a\nb", "c", "d"}, false},
	{`--run-config 'lr=0.1 name="x y"'`, []string{"--run-config", `lr=0.1 name="x y"`}, false},
	{`a # b; c | d > e && $HOME *`, []string{"a", "#", "b;", "c", "|", "d", ">", "e", "&&", "$HOME", "*"}, false},
	{"é\u00a0ü", []string{"é\u00a0ü"}, false},
	{`'a`, nil, true},
	{`"a`, nil, true},
	{`"a\"`, nil, true},
	{`a\`, nil, true},
}

func TestSplit(t *testing.T) {
	for _, c := range splitCases {
		got, err := Split(c.in)
		if !slices.Equal(got, c.want) || (err != nil) != c.bad {
			t.Errorf("Split(%q) = %q, %v; want %q", c.in, got, err, c.want)
		}
		if err != nil && problem.CodeOf(err) != problem.Usage {
			t.Errorf("Split(%q): %v is not a usage problem", c.in, err)
		}
	}
}

// The rules are those of shlex.split, so ask it.
func TestSplitAsPython(t *testing.T) {
	in := make([]string, len(splitCases))
	for i, c := range splitCases {
		in[i] = c.in
	}
	b, err := json.Marshal(in)
	if err != nil {
		t.Fatal(err)
	}
	args := append(python(t, `
import json, shlex, sys
def split(s):
    try: return shlex.split(s)
    except ValueError: return None
print(json.dumps([split(s) for s in json.loads(sys.argv[1])]))
`), string(b))
	out, err := Run(t.Context(), Spec{Args: args})
	if err != nil || !out.Exit.OK() {
		t.Fatalf("%v %v %s", out.Exit, err, out.Stderr)
	}
	var python [][]string
	if err := json.Unmarshal([]byte(out.Stdout), &python); err != nil {
		t.Fatal(err)
	}
	for i, c := range splitCases {
		if got, err := Split(c.in); (err != nil) != (python[i] == nil) || !slices.Equal(got, python[i]) {
			t.Errorf("Split(%q) = %q, %v; Python gives %q", c.in, got, err, python[i])
		}
	}
}

// FuzzSplit: what is split and joined again splits into the same words.
func FuzzSplit(f *testing.F) {
	for _, c := range splitCases {
		f.Add(c.in)
	}
	f.Fuzz(func(t *testing.T, in string) {
		words, err := Split(in)
		if err != nil {
			if problem.CodeOf(err) != problem.Usage {
				t.Errorf("%q: %v", in, err)
			}
			return
		}
		again, err := Split(Join(words))
		if err != nil || !slices.Equal(again, words) {
			t.Errorf("%q: words %q, joined %q, split again %q, %v", in, words, Join(words), again, err)
		}
	})
}

// What Join writes, a real shell takes apart in the same way.
func TestJoinForAShell(t *testing.T) {
	words := []string{"", "plain", "two words", "it's", `"quoted"`, "$HOME", "*", "~", "a\nb", "#x", `\`, "é", "a=b", "!x", "{a,b}"}
	out, err := Run(t.Context(), Spec{Args: sh(`printf '%s\0' ` + Join(words))})
	if err != nil {
		t.Fatal(err)
	}
	want := ""
	for _, w := range words {
		want += w + "\x00"
	}
	if out.Stdout != want {
		t.Errorf("%q, want %q", out.Stdout, want)
	}
}
