package flower

import (
	"archive/zip"
	"bytes"
	"errors"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/pelletier/go-toml/v2"

	"github.com/pergolafl/pergola/internal/problem"
)

const goodApp = `
[project]
name = "my_app"
version = "1.2.0"
requires-python = ">=3.10"
dependencies = ["flwr>=1.21", "numpy"]
[tool.flwr.app]
publisher = "acme"
[tool.flwr.app.components]
serverapp = "my_app.server:app"
clientapp = "my_app.client:app"
[tool.flwr.app.config]
rounds = 3
rate = 0.5
fast = true
name = "x"
nested.value = 7
[tool.flwr.federations]
default = "local-simulation"
[tool.flwr.federations.local-simulation]
options.num-supernodes = 10
`

// write makes a directory with the given files.
func write(t testing.TB, files map[string]string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "My App_2")
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// files are a directory's, by name.
type files map[string]string

// but changes pyproject.toml once more.
func (f files) but(old, with string) files {
	f["pyproject.toml"] = strings.Replace(f["pyproject.toml"], old, with, 1)
	return f
}

func appFiles(pyproject string) files {
	return files{"pyproject.toml": pyproject, "my_app/__init__.py": "", "my_app/server.py": "app = 1", "my_app/client.py": "app = 2"}
}

func TestLoadApp(t *testing.T) {
	a, err := LoadApp(write(t, appFiles(goodApp)))
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]any{"rounds": int64(3), "rate": 0.5, "fast": true, "name": "x", "nested.value": int64(7)}
	if d := cmp.Diff(want, a.Config); d != "" {
		t.Error(d)
	}
	if a.Style != StyleNew || a.Name != "my_app" || a.Version != "1.2.0" || a.Publisher != "acme" || a.ServerApp != "my_app.server:app" ||
		a.RequiresPython != ">=3.10" || !slices.Equal(a.Dependencies, []string{"flwr>=1.21", "numpy"}) {
		t.Errorf("%+v", a)
	}
}

func TestLoadAppOfOldStyles(t *testing.T) {
	for _, c := range []struct {
		name  string
		files files
		want  App
	}{
		{"components of 1.10", appFiles("[project]\nname='a'\nversion='1'\n[tool.flwr]\npublisher='p'\n[tool.flwr.components]\nserverapp='my_app.server:app'\nclientapp='my_app.client:app'"), App{
			Style: StyleComponents, Name: "a", Version: "1", Publisher: "p", ServerApp: "my_app.server:app", ClientApp: "my_app.client:app",
		}},
		{"components of 1.8 with poetry", appFiles("[tool.poetry]\nname='a'\nversion='2'\n[tool.poetry.dependencies]\npython='^3.8'\nflwr={version='>=1.8,<2.0',extras=['simulation']}\ntorch='1.13.1'\nx='~1.2'\ny='*'\nz={version='^0.3',optional=true}\n[flower.components]\nserverapp='my_app.server:app'\nclientapp='my_app.client:app'"), App{
			Style: StyleComponents, Name: "a", Version: "2", Publisher: "pergola", ServerApp: "my_app.server:app", ClientApp: "my_app.client:app", RequiresPython: ">=3.8,<4",
			Dependencies: []string{"flwr[simulation]>=1.8,<2.0", "torch==1.13.1", "x>=1.2,<1.3", "y"},
		}},
		{"modules without pyproject", map[string]string{"server.py": "", "client.py": "", "requirements.txt": "# all\nflwr>=1.8 # or newer\n\n-r other.txt\nnumpy\n"}, App{
			Style: StyleModules, Name: "My-App-2", Version: "0.0.0", Publisher: "pergola", ServerApp: "server:app", ClientApp: "client:app", Dependencies: []string{"flwr>=1.8", "numpy"},
		}},
		{"modules with a pyproject of other things", map[string]string{"server.py": "", "client.py": "", "pyproject.toml": "[project]\nname='n'\nversion='3'\n[tool.ruff]\nx=1"}, App{
			Style: StyleModules, Name: "n", Version: "3", Publisher: "pergola", ServerApp: "server:app", ClientApp: "client:app",
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, err := LoadApp(write(t, c.files))
			if err != nil {
				t.Fatal(err)
			}
			got := App{
				Style: a.Style, Name: a.Name, Version: a.Version, Publisher: a.Publisher, ServerApp: a.ServerApp, ClientApp: a.ClientApp,
				RequiresPython: a.RequiresPython, Dependencies: a.Dependencies,
			}
			if d := cmp.Diff(c.want, got, cmp.AllowUnexported(App{})); d != "" {
				t.Error(d)
			}
			// Whatever the style, the staged copy is of the new one and loads.
			dst := filepath.Join(t.TempDir(), "staged")
			if err := Stage(a, a.Dir, dst, &Installation{}); err != nil {
				t.Fatal(err)
			}
			staged, err := LoadApp(dst)
			if err != nil || staged.Style != StyleNew || staged.ServerApp != a.ServerApp || staged.Name != nameOf(a.Name) {
				t.Errorf("staged: %+v, %v", staged, err)
			}
		})
	}
}

func TestLoadAppRefuses(t *testing.T) {
	replace := func(old, with string) files { return appFiles(strings.Replace(goodApp, old, with, 1)) }
	for _, c := range []struct {
		name  string
		files files
		want  []string // in the error
	}{
		{"an empty directory", map[string]string{"x.txt": ""}, []string{"neither pyproject.toml nor server.py"}},
		{"no [tool.flwr]", appFiles("[project]\nname='x'\n"), []string{"[tool.flwr.app] is missing"}},
		{"no components", appFiles("[project]\nname='x'\n[tool.flwr.app]\npublisher='x'\n"), []string{"[tool.flwr.app.components] is missing"}},
		{"no clientapp", replace(`clientapp = "my_app.client:app"`, ""), []string{"line 9", "clientapp is missing", "add clientapp ="}},
		{"no attribute", replace(`my_app.client:app`, "my_app.client"), []string{"line 11", `"my_app.client" does not name`}},
		{"a number for a component", replace(`"my_app.client:app"`, "3"), []string{"line 11", `"3"`}},
		{"a module that is not there", replace(`my_app.client:app`, "my_app.clint:app"), []string{"line 11", "there is no my_app/clint.py"}},
		{"a syntax error", replace("rounds = 3", "rounds = = 3"), []string{"line 13, column"}},
		{"a list in the config", replace("rounds = 3", "rounds = [3]"), []string{"line 13", `"rounds"`, "a list"}},
		{"a date in a nested table", replace("nested.value = 7", "nested.value = 2024-01-01"), []string{"line 17", `"nested.value"`, "date"}},
		{"dependencies that are no list", replace(`["flwr>=1.21", "numpy"]`, `"numpy"`), []string{"line 6", "dependencies is not a list"}},
		{"config that is no table", replace(`publisher = "acme"`, "publisher = 'acme'\nconfig = 1\n").but("[tool.flwr.app.config]", "[tool.x]"), []string{"line 9", "config is not a table"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := LoadApp(write(t, c.files))
			if problem.CodeOf(err) != problem.AppInvalid {
				t.Fatalf("error %v", err)
			}
			for _, w := range c.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("%q is not in %q", w, err)
				}
			}
			if problem.From(err).Next == "" {
				t.Error("nothing to do is named")
			}
		})
	}
	for _, path := range []string{write(t, map[string]string{"f": ""}) + "/f", "/nowhere"} {
		if _, err := LoadApp(path); problem.CodeOf(err) != problem.AppInvalid {
			t.Errorf("LoadApp(%s): %v", path, err)
		}
	}
}

func TestOverride(t *testing.T) {
	for _, c := range []struct {
		over []string
		want map[string]any // changes; nil: refused
		text string
	}{
		{over: []string{"rounds=5 rate=1e-3", `name="a b"`}, want: map[string]any{"rounds": int64(5), "rate": 1e-3, "name": "a b"}},
		{over: []string{"nested.value=8 fast=false", ""}, want: map[string]any{"nested.value": int64(8), "fast": false}},
		{over: []string{"name='it=1'"}, want: map[string]any{"name": "it=1"}},
		{over: []string{"name=x"}, text: "text needs quotes"},
		{over: []string{"ronuds=3"}, text: `did you mean "rounds"?`},
		{over: []string{"rounds"}, text: "not made of key=value"},
		{over: []string{"rounds=[1]"}, text: "a list"},
		{over: []string{"missing.toml"}, text: "cannot be read"},
	} {
		a, err := LoadApp(write(t, appFiles(goodApp)))
		if err != nil {
			t.Fatal(err)
		}
		want := maps.Clone(a.Config)
		maps.Copy(want, c.want)
		err = a.Override(c.over)
		if c.want == nil {
			if problem.CodeOf(err) != problem.Usage || !strings.Contains(err.Error(), c.text) {
				t.Errorf("%q: %v", c.over, err)
			}
			continue
		}
		if d := cmp.Diff(want, a.Config); err != nil || d != "" {
			t.Errorf("%q: %v %s", c.over, err, d)
		}
	}
	dir := write(t, map[string]string{"o.toml": "rounds = 9\n[nested]\nvalue = 1\n"})
	a := &App{Config: map[string]any{"rounds": int64(1), "nested.value": int64(2)}}
	if err := a.Override([]string{filepath.Join(dir, "o.toml")}); err != nil || a.Config["rounds"] != int64(9) || a.Config["nested.value"] != int64(1) {
		t.Errorf("%v, %v", a.Config, err)
	}
}

// snapshot gives every file below dir with its contents.
func snapshot(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		if d.Type()&fs.ModeSymlink != 0 {
			out[rel], err = os.Readlink(path)
			return err
		}
		raw, err := os.ReadFile(path)
		out[rel] = string(raw)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestStage(t *testing.T) {
	files := map[string]string(appFiles(goodApp))
	maps.Copy(files, map[string]string{"data/x.csv": "1,2", ".git/config": "", "my_app/__pycache__/a.pyc": "", "config/config.json": "{}"})
	src := write(t, files)
	if err := os.Symlink("x.csv", filepath.Join(src, "data", "link.csv")); err != nil {
		t.Fatal(err)
	}
	before := snapshot(t, src)
	a, err := LoadApp(src)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Override([]string{"rounds=9"}); err != nil {
		t.Fatal(err)
	}
	dst := filepath.Join(t.TempDir(), "app")
	if err := Stage(a, src, dst, &Installation{}); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(before, snapshot(t, src)); d != "" {
		t.Error("the source was written to", d)
	}
	got := snapshot(t, dst)
	want := []string{"config/config.json", "data/link.csv", "data/x.csv", "my_app/__init__.py", "my_app/client.py", "my_app/server.py", "pyproject.toml"}
	if names := slices.Sorted(maps.Keys(got)); !slices.Equal(names, want) {
		t.Errorf("staged %q", names)
	}
	var doc map[string]any
	if err := toml.Unmarshal([]byte(got["pyproject.toml"]), &doc); err != nil {
		t.Fatal(err)
	}
	if lookup(doc, "tool.flwr.federations") != nil || lookup(doc, "project.name") != "my-app" || lookup(doc, "tool.flwr.app.config.rounds") != int64(9) {
		t.Errorf("staged pyproject.toml:\n%s", got["pyproject.toml"])
	}
}

func TestStageLeavesAGoodFileAlone(t *testing.T) {
	text := strings.Replace(goodApp[:strings.Index(goodApp, "[tool.flwr.federations]")], "my_app\"", "my-app\"", 1) + "# a comment\n"
	src := write(t, appFiles(text))
	a, err := LoadApp(src)
	if err != nil {
		t.Fatal(err)
	}
	dst := filepath.Join(t.TempDir(), "app")
	if err := Stage(a, src, dst, &Installation{}); err != nil {
		t.Fatal(err)
	}
	if got := snapshot(t, dst)["pyproject.toml"]; got != text {
		t.Errorf("changed to\n%s", got)
	}
}

func TestBuildFAB(t *testing.T) {
	files := map[string]string(appFiles(goodApp))
	maps.Copy(files, map[string]string{
		"README.md": "r", "conf.yaml": "c", "data.csv": "no", "secret.py": "ignored", ".gitignore": "secret.py\n/out/\n", "out/x.py": "", "my_app/out/x.py": "",
		"my_app/test_a.py": "t", "LICENSE": "l", "build/b.py": "no", "my_app/__pycache__/x.py": "no",
	})
	dir := write(t, files)
	content, hash, err := buildFAB(dir, GenControl)
	if err != nil {
		t.Fatal(err)
	}
	again, hash2, err := buildFAB(dir, GenControl)
	if err != nil || hash != hash2 || !bytes.Equal(content, again) || len(hash) != 64 {
		t.Error("the same files give another bundle")
	}
	z, err := zip.NewReader(bytes.NewReader(content), int64(len(content)))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	var manifest string
	for _, f := range z.File {
		names = append(names, f.Name)
		if f.Name == ".info/CONTENT" {
			r, err := f.Open()
			if err != nil {
				t.Fatal(err)
			}
			raw, err := io.ReadAll(r)
			if err != nil {
				t.Fatal(err)
			}
			manifest = string(raw)
		}
	}
	want := []string{"pyproject.toml", "LICENSE", "README.md", "conf.yaml", "my_app/__init__.py", "my_app/client.py", "my_app/out/x.py", "my_app/server.py", ".info/CONTENT"}
	if !slices.Equal(names, want) {
		t.Errorf("files %q", names)
	}
	if !strings.Contains(manifest, "\nLICENSE,acac86c0e609ca906f632b0e2dacccb2b77d22b0621f20ebece1a4835b93f6f0,8\n") {
		t.Errorf("manifest\n%s", manifest)
	}
	if _, old, err := buildFAB(dir, GenExec); err != nil || old == hash {
		t.Error("the exec generation should take the tests too")
	}
	big := write(t, appFiles(goodApp))
	noise := make([]byte, 12<<20)
	x := uint32(1)
	for i := range noise {
		x = x*1664525 + 1013904223
		noise[i] = byte(x >> 24)
	}
	if err := os.WriteFile(filepath.Join(big, "big.json"), noise, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, _, err := buildFAB(big, GenControl); problem.CodeOf(err) != problem.AppInvalid || !strings.Contains(err.Error(), "at most") {
		t.Errorf("a bundle too large: %v", err)
	}
}

func TestIgnoreRules(t *testing.T) {
	for _, c := range []struct {
		lines string
		take  string
		leave string
	}{
		{"*.pyc\n", "a.pyc x/y.pyc", "a.py pyc"},
		{"/a\n", "a a/b", "x/a"},
		{"a/\n", "a/b x/a/c", "a x/a"},
		{"a/b\n", "a/b a/b/c", "x/a/b"},
		{"**/a/*.py\n", "a/x.py x/a/y.py", "a/b/x.py"},
		{"a/**\n", "a/b a/b/c", "a b/a/c"},
		{"*.py\n!keep.py\n", "x.py", "keep.py d/keep.py"},
		{"# no\n\\#x\n\n", "#x", "no"},
		{"x[0-9].py\n[!a]b\n", "x1.py cb", "xa.py ab"},
		{"a?c\n", "abc", "a/c ac"},
		{"[\n**\n", "a a/b", ""},
	} {
		rs := ignoreRules(strings.Split(c.lines, "\n")...)
		for _, name := range strings.Fields(c.take) {
			if !rs.match(name) {
				t.Errorf("%q leaves %s", c.lines, name)
			}
		}
		for _, name := range strings.Fields(c.leave) {
			if rs.match(name) {
				t.Errorf("%q takes %s", c.lines, name)
			}
		}
	}
}

// Any pyproject.toml is taken or refused with a code; what is taken can be staged and is then of the new style.
func FuzzLoadApp(f *testing.F) {
	f.Add([]byte(goodApp))
	f.Add([]byte("[tool.flwr.components]\nserverapp='server:app'\nclientapp='client:app'"))
	f.Add([]byte("[tool.poetry.dependencies]\nflwr='^1.8'"))
	f.Add([]byte("project = 3\ntool = []"))
	f.Fuzz(func(t *testing.T, pyproject []byte) {
		files := appFiles(string(pyproject))
		files["server.py"], files["client.py"] = "", ""
		dir := write(t, files)
		a, err := LoadApp(dir)
		if err != nil {
			if _, ok := errors.AsType[*problem.Error](err); !ok {
				t.Fatalf("not a problem: %v", err)
			}
			return
		}
		dst := filepath.Join(t.TempDir(), "app")
		if err := Stage(a, dir, dst, &Installation{}); err != nil {
			t.Fatal(err)
		}
		staged, err := LoadApp(dst)
		if err != nil || staged.Style != StyleNew || staged.ServerApp != a.ServerApp || staged.ClientApp != a.ClientApp || len(staged.Config) != len(a.Config) {
			t.Errorf("staged %+v, %v", staged, err)
		}
	})
}
