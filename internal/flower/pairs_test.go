package flower

import (
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"os"
	"os/exec"
	"reflect"
	"slices"
	"testing"
	"unicode/utf8"

	"github.com/pergolafl/pergola/internal/problem"
)

// oddConfigs are what people give to --run-config, right and wrong: the arguments, and what is different from flwr's own parser.
var oddConfigs = []struct {
	args []string
	more map[string]any // what is read where flwr reads something else; see why
	why  string         // "" = the same as flwr; "refused" = flwr takes it, or takes it for something else
}{
	{args: []string{"a=1"}},
	{args: []string{"a=1 b=2.5 c=true d='x y' e=\"z\""}},
	{args: []string{"a=1", "b=2", "a=3"}},
	{args: []string{"a.b.c=1 a.b.d=2", "a.e=3"}, more: map[string]any{"a.b.c": int64(1), "a.b.d": int64(2), "a.e": int64(3)}, why: "flwr forgets a.b when a later argument says a.e"},
	{args: []string{"a=-7 b=+7 c=1_000 d=0x1F e=0o17 f=0b11"}},
	{args: []string{"a=1e5 b=-0.0 c=inf d=-inf e=6.02E+23 f=1.0"}},
	{args: []string{"a=true", "b=false"}},
	{args: []string{"a=True"}},
	{args: []string{"a=text"}},
	{args: []string{"a=''", "b=\"\""}},
	{args: []string{"a='it \"says\"' b=\"it's\""}},
	{args: []string{"a='x=1' b=\"c=2 d=3\""}},
	{args: []string{"a=\"tab\\there \\u00e9\""}},
	{args: []string{"a='é ü 漢'"}},
	{args: []string{"  a=1   b=2  "}},
	{args: []string{""}},
	{args: []string{}},
	{args: []string{"a='x' # not a comment=1"}, why: "refused"},
	{args: []string{"a=1,b=2"}},
	{args: []string{"a=1 junk"}, why: "refused"},
	{args: []string{"junk"}, why: "refused"},
	{args: []string{"a = 1"}, why: "refused"},
	{args: []string{"=1"}, why: "refused"},
	{args: []string{"a="}, why: "refused"},
	{args: []string{"a=[1,2]"}},
	{args: []string{"a={b=1}"}},
	{args: []string{"a=2024-01-01"}},
	{args: []string{"a=1 a=2"}},
	{args: []string{"a=1 a.b=2"}},
	{args: []string{"a=9223372036854775807"}},
	{args: []string{"a=9223372036854775808"}, why: "refused"},
	{args: []string{"a='unclosed"}},
	{args: []string{"\"quoted-key\"=1"}},
	{args: []string{"a-b_c=1 7=2"}},
	{args: []string{"good.toml"}},
	{args: []string{"missing.toml"}},
	{args: []string{"broken.toml"}},
	{args: []string{"list.toml"}},
	{args: []string{"good.toml", "a=1"}, more: map[string]any{"rate": 0.5, "deep.er.n": int64(1), "deep.text": "both ' and \"\nnext", "fast": true, "a": int64(1)}, why: "flwr refuses a file beside pairs"},
}

var oddFiles = map[string]string{
	"good.toml":   "rate = 0.5\nfast = true\n[deep]\ntext = \"\"\"both ' and \"\nnext\"\"\"\ner.n = 1\n",
	"broken.toml": "a = \n",
	"list.toml":   "a = [1]\n",
}

// The parser agrees with flwr's, of a real installation, but for what is said to be better.
func TestParseRunConfigAsFlwr(t *testing.T) {
	python := realEnvironment(t, realVersion).Python
	t.Chdir(t.TempDir())
	for name, text := range oddFiles {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var cases [][]string
	for _, c := range oddConfigs {
		cases = append(cases, c.args)
	}
	question, err := json.Marshal(cases)
	if err != nil {
		t.Fatal(err)
	}
	const script = `
import json, sys
from flwr.common.config import parse_config_args
out = []
for args in json.loads(sys.argv[1]):
    try:
        out.append({k: [type(v).__name__, v if isinstance(v, str) else repr(v)] for k, v in parse_config_args(args).items()})
    except BaseException as e:
        out.append(None)
print(json.dumps(out))
`
	cmd := exec.CommandContext(t.Context(), python, "-c", script, string(question))
	cmd.Env = append(os.Environ(), "FLWR_HOME="+t.TempDir(), "FLWR_TELEMETRY_ENABLED=0")
	cmd.Stderr = os.Stderr
	answer, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var theirs []map[string][2]string
	if err := json.Unmarshal(answer, &theirs); err != nil {
		t.Fatal(err)
	}
	for i, c := range oddConfigs {
		ours, err := ParseRunConfig(c.args)
		switch {
		case err != nil && problem.CodeOf(err) != problem.Usage:
			t.Errorf("%q: %v has the code %s", c.args, err, problem.CodeOf(err))
		case c.why == "refused":
			if err == nil {
				t.Errorf("%q was taken: %v", c.args, ours)
			}
		case c.more != nil:
			if err != nil || !reflect.DeepEqual(ours, c.more) {
				t.Errorf("%q: %v, %v; want %v (%s)", c.args, ours, err, c.more, c.why)
			}
		case theirs[i] == nil:
			if err == nil {
				t.Errorf("%q was taken (%v); flwr refuses it", c.args, ours)
			}
		case err != nil:
			t.Errorf("%q: %v; flwr gives %v", c.args, err, theirs[i])
		default:
			if got := asPython(ours); !maps.Equal(got, theirs[i]) {
				t.Errorf("%q: %v, flwr gives %v", c.args, got, theirs[i])
			}
		}
		if err != nil {
			continue
		}
		// What travels says the same.
		pairs, err := RunConfig(c.args)
		if err != nil {
			t.Errorf("%q: %v", c.args, err)
			continue
		}
		if again, err := ParseRunConfig(pairs); err != nil || !reflect.DeepEqual(again, ours) {
			t.Errorf("%q became %q, which is %v (%v), not %v", c.args, pairs, again, err, ours)
		}
	}
}

// asPython writes values as Python shows them.
func asPython(config map[string]any) map[string][2]string {
	out := map[string][2]string{}
	for k, v := range config {
		switch v := v.(type) {
		case string:
			out[k] = [2]string{"str", v}
		case bool:
			out[k] = [2]string{"bool", map[bool]string{true: "True", false: "False"}[v]}
		case int64:
			out[k] = [2]string{"int", fmt.Sprint(v)}
		case float64:
			out[k] = [2]string{"float", pythonFloat(v)}
		}
	}
	return out
}

func pythonFloat(v float64) string {
	switch {
	case math.IsInf(v, 0):
		return map[bool]string{true: "inf", false: "-inf"}[v > 0]
	case v == 0 && math.Signbit(v):
		return "-0.0"
	case v == math.Trunc(v) && math.Abs(v) < 1e16:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%g", v)
}

func TestSplitArgs(t *testing.T) {
	rest, over, err := SplitArgs([]string{"--verbose", "-c", "a=1", "--run-config=b=2", "x", "--run-config", "c=3"})
	if err != nil || !slices.Equal(rest, []string{"--verbose", "x"}) || !slices.Equal(over, []string{"a=1", "b=2", "c=3"}) {
		t.Errorf("%q %q %v", rest, over, err)
	}
	if _, _, err := SplitArgs([]string{"--run-config"}); problem.CodeOf(err) != problem.Usage {
		t.Error(err)
	}
}

// What is written as a pair is read back as the same.
func FuzzPair(f *testing.F) {
	f.Add("a.b", "it's \"x\"", 0.5)
	f.Add("k y=,'", "\n\x00\t,", 1e-300)
	f.Fuzz(func(t *testing.T, key, text string, number float64) {
		if key == "" || math.IsNaN(number) || !utf8.ValidString(key) || !utf8.ValidString(text) {
			t.Skip()
		}
		want := map[string]any{key: text}
		if got, err := ParseRunConfig([]string{tomlPair(key, text)}); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%q: %q gives %v, %v", want, tomlPair(key, text), got, err)
		}
		if got, err := ParseRunConfig([]string{tomlPair(key, number)}); err != nil || got[key] != number {
			t.Errorf("%q = %v: %q gives %v, %v", key, number, tomlPair(key, number), got, err)
		}
	})
}
