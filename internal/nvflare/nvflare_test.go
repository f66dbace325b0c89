package nvflare

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/pelletier/go-toml/v2"
	"github.com/rogpeppe/go-internal/txtar"

	"github.com/pergolafl/pergola/internal/problem"
)

var update = flag.Bool("update", false, "rewrite docs/nvflare-jobs.md and what testdata/jobs wants")

// unpackJob writes the files below a/ of an archive to a folder of its own.
func unpackJob(t *testing.T, a *txtar.Archive) string {
	t.Helper()
	dir := t.TempDir()
	for _, f := range a.Files {
		if rel, ok := strings.CutPrefix(f.Name, "a/"); ok {
			path := filepath.Join(dir, "a", filepath.FromSlash(rel))
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, f.Data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	return filepath.Join(dir, "a")
}

// Each archive of testdata/jobs is a job folder a/ and what comes of it: the last file, want. Look at what
// go test ./internal/nvflare -update writes there before it is kept.
func TestJobs(t *testing.T) {
	paths, err := filepath.Glob("testdata/jobs/*.txtar")
	if err != nil || len(paths) < 30 {
		t.Fatalf("%d cases, %v", len(paths), err)
	}
	for _, path := range paths {
		name := strings.TrimSuffix(filepath.Base(path), ".txtar")
		t.Run(name, func(t *testing.T) {
			a, err := txtar.ParseFile(path)
			if err != nil {
				t.Fatal(err)
			}
			dir := unpackJob(t, a)
			if !Is(dir) {
				t.Error("it is not seen to be a job folder")
			}
			var got strings.Builder
			j, err := Load(dir)
			if err != nil {
				if p := problem.From(err); p.Code != problem.AppInvalid || p.Next == "" {
					t.Errorf("the error %v has the code %s, want app-invalid and what to do", err, p.Code)
				}
				fmt.Fprintln(&got, "error:", strings.ReplaceAll(err.Error(), dir, "a"))
			} else {
				rel, err := filepath.Rel(dir, j.AppDir)
				if err != nil {
					t.Fatal(err)
				}
				fmt.Fprintf(&got, "%s is the app %s\n%s", j.Name, filepath.ToSlash(rel), j.Settings.TOML())
				for _, w := range j.Warnings {
					fmt.Fprintln(&got, "warning:", strings.ReplaceAll(w, dir, "a"))
				}
			}
			if wrong := strings.HasPrefix(name, "bad-"); wrong != (err != nil) && name != "predeployed" {
				t.Errorf("the error is %v", err)
			}
			want := ""
			if last := len(a.Files) - 1; a.Files[last].Name == "want" {
				want = string(a.Files[last].Data)
				a.Files = a.Files[:last]
			}
			if *update {
				a.Files = append(a.Files, txtar.File{Name: "want", Data: []byte(got.String())})
				if err := os.WriteFile(path, txtar.Format(a), 0o600); err != nil {
					t.Fatal(err)
				}
				return
			}
			if d := cmp.Diff(want, got.String()); d != "" {
				t.Errorf("(-want +got):\n%s", d)
			}
		})
	}
}

// The app that is written is the custom folder, byte for byte, and its pyproject.toml with the settings at the end.
func TestWrite(t *testing.T) {
	a, err := txtar.ParseFile("testdata/jobs/every-field.txtar")
	if err != nil {
		t.Fatal(err)
	}
	j, err := Load(unpackJob(t, a))
	if err != nil {
		t.Fatal(err)
	}
	src := "# mine\r\n[project]  # a comment\r\nname = 'blood'\r\n[tool.flwr.app]\npublisher = \"ä\"" // no line feed at its end
	put := func(rel, text string) {
		t.Helper()
		path := filepath.Join(j.AppDir, rel)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	put("pyproject.toml", src)
	put("blood/run.sh", "#!/bin/sh\n")
	put("__pycache__/x.pyc", "x")
	put(".git/config", "x")
	dst := filepath.Join(t.TempDir(), "out", "app")
	if err := j.Write(dst); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(filepath.Join(dst, "pyproject.toml"))
	if err != nil {
		t.Fatal(err)
	}
	rest, ok := bytes.CutPrefix(got, []byte(src))
	if !ok || !strings.HasSuffix(string(rest), j.Settings.TOML()) {
		t.Errorf("pyproject.toml is\n%s", got)
	}
	var doc map[string]any
	if err := toml.Unmarshal(got, &doc); err != nil {
		t.Errorf("it is no TOML: %v\n%s", err, got)
	}
	if info, err := os.Stat(filepath.Join(dst, "blood/run.sh")); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("run.sh: %v %v, want the mode that it had", info, err)
	}
	for _, gone := range []string{"__pycache__", ".git"} {
		if _, err := os.Stat(filepath.Join(dst, gone)); err == nil {
			t.Errorf("%s was copied", gone)
		}
	}
	if err := j.Write(dst); problem.CodeOf(err) != problem.Exists {
		t.Errorf("written twice: %v", err)
	}
	put("pyproject.toml", "tool = { flwr = {} }\n")
	if err := j.Write(filepath.Join(t.TempDir(), "x")); err == nil || !strings.Contains(err.Error(), "cannot be added to") {
		t.Errorf("a table that cannot be added to: %v", err)
	}
	b, err := json.Marshal(j.Settings)
	if err != nil || !strings.Contains(string(b), `"min-sites":2`) || !strings.Contains(string(b), `"ready-timeout":"90.5s"`) {
		t.Errorf("as JSON: %s, %v", b, err)
	}
}

// docs/nvflare-jobs.md has the table of fields. Rewrite it with: go test ./internal/nvflare -run TestDocs -update
func TestDocs(t *testing.T) {
	const path, begin, end = "../../docs/nvflare-jobs.md", "<!-- fields -->\n", "<!-- end of fields -->\n"
	have, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	head, rest, ok1 := strings.Cut(string(have), begin)
	_, tail, ok2 := strings.Cut(rest, end)
	if !ok1 || !ok2 {
		t.Fatalf("%s has no %s", path, strings.TrimSpace(begin))
	}
	var b strings.Builder
	b.WriteString(head + begin)
	place := Place("")
	for _, f := range Fields() {
		if f.In != place {
			place = f.In
			fmt.Fprintf(&b, "\n### %s\n\n| field | default there | in Pergola |\n|---|---|---|\n", place)
		}
		def, says := "", f.Says
		if f.Default != "" {
			def = "`" + f.Default + "`"
		}
		switch {
		case f.Setting != "":
			says = "`" + f.Setting + "`: " + says
		case f.Warned():
			says = "*warning:* " + says
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", f.Key, def, says)
	}
	b.WriteString("\n" + end + tail)
	if *update {
		if err := os.WriteFile(path, []byte(b.String()), 0o600); err != nil {
			t.Fatal(err)
		}
		return
	}
	if d := cmp.Diff(b.String(), string(have)); d != "" {
		t.Errorf("%s is not what the table says; rewrite it with -update (-want +got):\n%s", path, d)
	}
}

// Every field of the table is in the case that says something in each, and comes out as a setting or a warning.
func TestEveryField(t *testing.T) {
	b, err := os.ReadFile("testdata/jobs/every-field.txtar")
	if err != nil {
		t.Fatal(err)
	}
	in, want, _ := strings.Cut(string(b), "-- want --")
	for _, f := range Fields() {
		if !strings.Contains(in, `"`+f.Key+`"`) {
			t.Errorf("the case has no %s", f.Key)
		}
		if f.Warned() && !strings.Contains(want, ": "+f.Key+": ") {
			t.Errorf("no warning names %s", f.Key)
		}
		if f.Setting != "" && !strings.Contains(want, f.Setting[strings.LastIndexByte(f.Setting, '.')+1:]+" = ") {
			t.Errorf("nothing comes of %s, which is to be %s", f.Key, f.Setting)
		}
	}
}

// What HOCON is read to, as JSON; where the two differ, as pyhocon 0.3.61 reads it.
func TestHOCON(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"", `{}`},
		{"a = 1 2", `{"a":"1 2"}`},
		{"a.b = 3\na.c = 4\na {d=5}", `{"a":{"b":3,"c":4,"d":5}}`},
		{"a = foo bar # c", `{"a":"foo bar"}`},
		{"a = [1,2\n3\n]", `{"a":[1,2,3]}`},
		{"a = \"\"\"x\ny\"\"\"", `{"a":"x\ny"}`},
		{"a = \"\"\"x\"\"\"\"", `{"a":"x\""}`},
		{"a = 1.0, b=true : c", `{"a":1,"b":"true : c"}`},
		{"a = null", `{"a":null}`},
		{`a="x" "y"`, `{"a":"x y"}`},
		{"{a:1}", `{"a":1}`},
		{"a = {b=1} {c=2}", `{"a":{"b":1,"c":2}}`},
		{"a = http://x", `{"a":"http://x"}`},
		{"a = 1 // x\n// y\nb = 2", `{"a":1,"b":2}`},
		{"a = 1\na = 2", `{"a":2}`},
		{`"a.b" = 1`, `{"a.b":1}`},
		{"a : 1, b : 2,", `{"a":1,"b":2}`},
		{"a = 1e3\nb = -5", `{"a":1000,"b":-5}`},
		{"a = 'x'", `{"a":"'x'"}`},
		{"ä = ö", `{"ä":"ö"}`},
		{"a b = 1", `{"a b":1}`},
		{"a = 1 b = 2", `{"a":"1 b = 2"}`},
		{"a { b }", "error"},
		{"a", "error"},
		{"a = ", "error"},
		{"a = {", "error"},
		{"a = [", "error"},
		{`a = "x`, "error"},
		{"a = ${b}", "error"},
		{"include \"x\"", "error"},
		{"a += 1", "error"},
		{"= 1", "error"},
		{"a = {} x", "error"},
		{"a = [] []", "error"},
		{"[1]", "error"},
		{"{} x", "error"},
		{".a = 1", "error"},
		{"a..b = 1", "error"},
		{"a = x {}", "error"},
		{"a = \"\\x\"", "error"},
		{"a = ,", "error"},
		{"{a = 1, , b = 2}", "error"},
		{strings.Repeat("a={", 100), "error"},
		{strings.Repeat("a.", 100) + "b=1", "error"},
		{"a=" + strings.Repeat("[", 100), "error"},
		{"\xff = 1", "error"},
	} {
		f, err := parseConfig([]byte(c.in), "x.conf")
		got := "error"
		if err == nil {
			b, e := json.Marshal(plain(f.root))
			if e != nil {
				t.Fatal(e)
			}
			got = string(b)
		} else if !strings.HasPrefix(err.Error(), "x.conf:") {
			t.Errorf("%q: the error %v names no line", c.in, err)
		}
		if got != c.want {
			t.Errorf("%q is %s, want %s (%v)", c.in, got, c.want, err)
		}
	}
}

// plain gives a value as encoding/json has it.
func plain(n *node) any {
	switch n.kind {
	case kindBool:
		return n.b
	case kindInt:
		return n.i
	case kindFloat:
		return n.f
	case kindString:
		return n.s
	case kindList:
		out := []any{}
		for _, e := range n.list {
			out = append(out, plain(e))
		}
		return out
	case kindObject:
		out := map[string]any{}
		for _, k := range n.keys {
			out[k] = plain(n.obj[k])
		}
		return out
	}
	return nil
}

// Variables stand for what NVIDIA FLARE's _EnvUpdater makes of them.
func TestVariables(t *testing.T) {
	f, err := parseConfig([]byte(`{"n": 5, "s": "x", "o": {"k": "{s}"}, "on": true, "loop": "{loop}"}`), "x.json")
	if err != nil {
		t.Fatal(err)
	}
	for in, want := range map[string]string{
		"{n}": "5", " {s} ": `"x"`, "{o}": `{"k":"x"}`, "a{n}b{on}": `"a5bTrue"`, "{n}{nope}": `"{n}{nope}"`, "{{n}}{s}": `"{n}x"`,
		"{SITE_NAME}": `"{SITE_NAME}"`, "/{SITE_NAME}/{s}": `"/{SITE_NAME}/x"`, "${secret:x}{s}": `"${secret:x}{s}"`, "{": `"{"`, "{}": "error", "{nope}": "error",
		"{@o:a=1}": "error", "{loop}": "error", "{$HOME}": `"{$HOME}"`, "a{o}": `"a{o}"`,
	} {
		r := &resolver{f: f, used: map[string]bool{}}
		got := "error"
		if n, err := r.value(&node{kind: kindString, s: in}, 0); err == nil {
			b, e := json.Marshal(plain(n))
			if e != nil {
				t.Fatal(e)
			}
			got = string(b)
		}
		if got != want {
			t.Errorf("%q stands for %s, want %s", in, got, want)
		}
	}
}

// Whatever a file has, reading it ends with a value or a problem that names the file; JSON is read to what encoding/json reads.
func FuzzConfig(f *testing.F) {
	for _, ext := range []string{".json", ".conf", ".yml"} {
		for _, s := range []string{`{"a": [1, 2.5, "x", null, true, {"b": {}}]}`, "a.b = c d # e\nl = [1\n2]", "a: {b: [1, 2]}\nc: &x 1\nd: *x", `a = """x"""`, "{", "a = ${b}"} {
			f.Add([]byte(s), ext)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte, ext string) {
		if ext != ".json" && ext != ".yml" {
			ext = ".conf"
		}
		c, err := parseConfig(b, "x"+ext)
		if err != nil {
			if problem.CodeOf(err) != problem.AppInvalid || !strings.HasPrefix(err.Error(), "x"+ext+":") {
				t.Fatalf("the error is %v", err)
			}
			return
		}
		if c.root == nil || c.root.kind != kindObject {
			t.Fatal("it is no object")
		}
		_ = c.root.text()
		if ext == ".json" {
			var want map[string]any
			if err := json.Unmarshal(b, &want); err != nil {
				t.Fatalf("it is no JSON: %v", err)
			}
			got, err := json.Marshal(plain(c.root))
			if err != nil {
				t.Fatal(err)
			}
			var again map[string]any
			if err := json.Unmarshal(got, &again); err != nil || !cmp.Equal(want, again) {
				t.Fatalf("(-want +got):\n%s", cmp.Diff(want, again))
			}
		}
	})
}
