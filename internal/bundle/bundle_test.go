package bundle

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/iotest"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/pergolafl/pergola/internal/problem"
)

// plant makes a tree in a new directory: path → content, "-> target" for links, a path with a slash
// at its end for folders, "x:" before the content of an executable.
func plant(t testing.TB, files map[string]string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "src")
	must(t, os.Mkdir(dir, 0o755))
	for name, content := range files {
		p := filepath.Join(dir, name)
		must(t, os.MkdirAll(filepath.Dir(p), 0o755))
		target, isLink := strings.CutPrefix(content, "-> ")
		body, exec := strings.CutPrefix(content, "x:")
		switch {
		case strings.HasSuffix(name, "/"):
			must(t, os.MkdirAll(p, 0o755))
		case isLink:
			must(t, os.Symlink(target, p))
		case exec:
			must(t, os.WriteFile(p, []byte(body), 0o755))
		default:
			must(t, os.WriteFile(p, []byte(content), 0o644))
		}
	}
	return dir
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// found reads a tree back into plant's form.
func found(t testing.TB, dir string) map[string]string {
	t.Helper()
	files := map[string]string{}
	must(t, filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, p)
		switch {
		case d.Type()&fs.ModeSymlink != 0:
			target, err := os.Readlink(p)
			files[rel] = "-> " + target
			return err
		case d.IsDir():
			entries, err := os.ReadDir(p)
			if len(entries) == 0 && rel != "." {
				files[rel+"/"] = ""
			}
			return err
		}
		b, err := os.ReadFile(p)
		files[rel] = string(b)
		if info, e := d.Info(); e == nil && info.Mode() == 0o755 {
			files[rel] = "x:" + string(b)
		}
		return err
	}))
	return files
}

var testInput = Input{App: Meta{"quickstart", "1.0.0"}, Lock: []byte("flwr==1.30.0\n"), Job: []byte(`{"engine":"flower"}`)}

func build(t testing.TB, dir string, in Input) *Bundle {
	t.Helper()
	b, err := Build(dir, in)
	must(t, err)
	return b
}

func written(t testing.TB, b *Bundle) []byte {
	t.Helper()
	var w bytes.Buffer
	must(t, b.Write(&w))
	return w.Bytes()
}

// wantProblem checks code and message, and that it says what to do.
func wantProblem(t testing.TB, err error, code problem.Code, parts ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want %s", code)
	}
	p := problem.From(err)
	if p.Code != code || p.Next == "" {
		t.Fatalf("got code %q and advice %q, want %s with an advice: %v", p.Code, p.Next, code, err)
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("error lacks %q: %v", part, err)
		}
	}
}

var sample = map[string]string{
	"pyproject.toml":      "[project]\nname = \"quickstart\"\n",
	"quickstart/task.py":  "import numpy\n",
	"quickstart/äöü ✓.md": "text",
	"run.sh":              "x:#!/bin/sh\n",
	"empty.txt":           "",
	"out/":                "",
	"latest":              "-> quickstart/task.py",
	"pkg":                 "-> quickstart",
	"quickstart/up":       "-> ../run.sh",
	"deep":                "-> " + strings.Repeat("d/", 20),
	strings.Repeat("d/", 40) + strings.Repeat("n", 200): "deep",
}

func TestRoundTrip(t *testing.T) {
	src := plant(t, sample)
	b := build(t, src, testInput)
	packed := written(t, b)
	dst := filepath.Join(t.TempDir(), "dst")
	m, err := Extract(bytes.NewReader(packed), dst, b.Digest, Limits{})
	must(t, err)
	if diff := cmp.Diff(&b.Manifest, m); diff != "" {
		t.Errorf("manifest changed on its way (-sent +got):\n%s", diff)
	}
	if diff := cmp.Diff(sample, found(t, filepath.Join(dst, "app"))); diff != "" {
		t.Errorf("app changed on its way (-sent +got):\n%s", diff)
	}
	c, err := Read(dst)
	must(t, err)
	want := &Contents{Manifest: m, Digest: b.Digest, Lock: testInput.Lock, Job: testInput.Job, AppDir: filepath.Join(dst, "app")}
	if diff := cmp.Diff(want, c); diff != "" {
		t.Errorf("read back (-want +got):\n%s", diff)
	}
	if again := build(t, c.AppDir, testInput); again.Digest != b.Digest {
		t.Error("the unpacked app has another digest than what was packed")
	}
	if _, err := os.Lstat(dst + ".partial"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("partial directory is left: %v", err)
	}
	if diff := cmp.Diff(sample, found(t, src)); diff != "" {
		t.Errorf("the app's directory was written to (-before +after):\n%s", diff)
	}
}

func TestSameTreeSameDigest(t *testing.T) {
	a := plant(t, sample)
	first := build(t, a, testInput)
	old := syscall.Umask(0o077)
	defer syscall.Umask(old)
	b := plant(t, sample)
	must(t, os.Chtimes(filepath.Join(b, "run.sh"), time.Unix(1, 0), time.Unix(1, 0)))
	must(t, os.Chmod(filepath.Join(b, "empty.txt"), 0o600))
	must(t, os.Mkdir(filepath.Join(b, "quickstart/__pycache__"), 0o755))
	must(t, os.WriteFile(filepath.Join(b, "quickstart/__pycache__/task.pyc"), []byte("x"), 0o644))
	must(t, os.Mkdir(filepath.Join(b, "out/__pycache__"), 0o755))
	if os.Geteuid() == 0 {
		must(t, os.Chown(filepath.Join(b, "run.sh"), 4711, 4711))
	}
	second := build(t, b, testInput)
	if first.Digest != second.Digest {
		t.Fatalf("digests differ: %s", cmp.Diff(first.Manifest, second.Manifest))
	}
	if !bytes.Equal(written(t, first), written(t, second)) {
		t.Error("the same bundle was written as different bytes")
	}
	for name, change := range map[string]func(in *Input){
		"name":    func(in *Input) { in.App.Name = "other" },
		"version": func(in *Input) { in.App.Version = "2" },
		"lock":    func(in *Input) { in.Lock = []byte("flwr==1.41.0\n") },
		"job":     func(in *Input) { in.Job = []byte(`{}`) },
		"exclude": func(in *Input) { in.Exclude = []string{"empty.txt"} },
	} {
		in := testInput
		change(&in)
		if build(t, a, in).Digest == first.Digest {
			t.Errorf("another %s gives the same digest", name)
		}
	}
	must(t, os.Chmod(filepath.Join(b, "run.sh"), 0o600))
	if build(t, b, testInput).Digest == first.Digest {
		t.Error("a file that may no longer be executed gives the same digest")
	}
}

func TestExcludes(t *testing.T) {
	keep := map[string]string{"pyproject.toml": "x", "pkg/a.py": "a", "pkg/build/x.py": "x", "dist/__init__.py": "", "data/small.csv": "1"}
	all := map[string]string{
		".git/HEAD": "", "pkg/__pycache__/a.pyc": "", "pkg/b.pyc": "", ".venv/bin/python": "", "venv/x": "", "node_modules/x": "",
		"pergola-runs/x": "", ".pergola/x": "", "build/lib/x": "", "pkg.egg-info/PKG-INFO": "", "myenv/pyvenv.cfg": "", "myenv/lib/x": "",
		"pkg/.#a.py": "-> me@host.123", "data/big.npy": "big", "scratch/x": "", "pkg/scratch/y": "", "notes.md": "", "sub/notes.md": "kept by /notes.md",
	}
	for k, v := range keep {
		all[k] = v
	}
	keep["sub/notes.md"] = all["sub/notes.md"]
	in := testInput
	in.Exclude = []string{"data/*.npy", "scratch/", "/notes.md", "pyproject.toml/"}
	var got []string
	for _, e := range build(t, plant(t, all), in).Manifest.Files {
		got = append(got, e.Path)
	}
	var want []string
	for k := range keep {
		want = append(want, k)
	}
	slices.Sort(want)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("kept (-want +got):\n%s", diff)
	}
}

func TestBuildRefuses(t *testing.T) {
	app := func(more map[string]string) func(t *testing.T) string {
		return func(t *testing.T) string {
			files := map[string]string{"pyproject.toml": "x", "pkg/a.py": "a"}
			for k, v := range more {
				files[k] = v
			}
			return plant(t, files)
		}
	}
	special := func(name string, create func(p string) error) func(t *testing.T) string {
		return func(t *testing.T) string {
			dir := plant(t, map[string]string{"pyproject.toml": "x"})
			must(t, create(filepath.Join(dir, name)))
			return dir
		}
	}
	small := Input{Job: []byte("{}"), MaxBytes: 1000, MaxFiles: 9}
	for _, c := range []struct {
		name string
		dir  func(t *testing.T) string
		in   Input
		want []string
	}{
		{"that does not exist", func(t *testing.T) string { return filepath.Join(t.TempDir(), "none") }, small, []string{"none does not exist", "pyproject.toml"}},
		{"no name", func(*testing.T) string { return "" }, small, []string{"no app directory is given"}},
		{"below a file", func(t *testing.T) string { return filepath.Join(app(nil)(t), "pyproject.toml", "x") }, small, []string{"does not exist"}},
		{"a file", func(t *testing.T) string { return filepath.Join(app(nil)(t), "pkg/a.py") }, small, []string{"a.py is a file, not an app directory"}},
		{"the pyproject.toml itself", func(t *testing.T) string { return filepath.Join(app(nil)(t), "pyproject.toml") }, small, []string{"is a file", "give its directory: /"}},
		{"a fifo", func(t *testing.T) string {
			dir := special("pipe", func(p string) error { return unix.Mkfifo(p, 0o600) })(t)
			return filepath.Join(dir, "pipe")
		}, small, []string{"is a named pipe"}},
		{"empty", func(t *testing.T) string { return t.TempDir() }, small, []string{"is empty"}},
		{"with folders only", func(t *testing.T) string { return plant(t, map[string]string{"a/b/": ""}) }, small, []string{"is empty"}},
		{"with caches only", func(t *testing.T) string { return plant(t, map[string]string{"__pycache__/a.pyc": ""}) }, small, []string{"is empty"}},
		{"a symlink loop", func(t *testing.T) string {
			return filepath.Join(plant(t, map[string]string{"a": "-> b", "b": "-> a"}), "a")
		}, small, []string{"/a is a symlink loop"}},
		{"a link to nothing", func(t *testing.T) string { return filepath.Join(plant(t, map[string]string{"a": "-> b"}), "a") }, small, []string{"is a link to b, which does not exist"}},
		{"a loop of links inside", app(map[string]string{"x": "-> y", "y": "-> x"}), small, []string{`"x" is a link that leads to itself`, "exclude"}},
		{"a link to its own folder", app(map[string]string{"pkg/self": "-> ."}), small, []string{`"pkg/self" is a link that makes`}},
		{"a link to the app's directory", app(map[string]string{"pkg/top": "-> .."}), small, []string{`"pkg/top" is a link that makes`}},
		{"two folders that hold links to each other", app(map[string]string{"a/x": "-> ../b", "b/y": "-> ../a"}), small, []string{"is a link that makes the folder"}},
		{"a link that leaves", app(map[string]string{"pkg/out": "-> ../../other"}), small, []string{`"pkg/out" is a link to "../../other", which is outside`}},
		{"a link that leaves and comes back", app(map[string]string{"back": "-> ../src/pyproject.toml"}), small, []string{`"back" is a link`, "outside"}},
		{"a link that leaves by way of another", app(map[string]string{"a/b": "-> ../pkg", "l": "-> a/b/../../x"}), small, []string{`"l" is a link`, "outside"}},
		{"an absolute link", app(map[string]string{"abs": "-> /etc/passwd"}), small, []string{`"abs" is a link to the absolute path "/etc/passwd"`}},
		{"a link to what is excluded", app(map[string]string{"l": "-> .venv/x", ".venv/x": ""}), small, []string{`"l" is a link to ".venv/x", which is not in the app`}},
		{"a link through a file", app(map[string]string{"l": "-> pyproject.toml/../pkg"}), small, []string{"not in the app"}},
		{"a named pipe inside", special("p", func(p string) error { return unix.Mkfifo(p, 0o600) }), small, []string{`"p" in the app directory`, "is a named pipe"}},
		{"a socket inside", special("s", func(p string) error {
			l, err := net.ListenUnix("unix", &net.UnixAddr{Name: p})
			if err != nil {
				return err
			}
			l.SetUnlinkOnClose(false)
			return l.Close()
		}), small, []string{`"s" in the app directory`, "is a socket"}},
		{"a name that is not UTF-8", app(map[string]string{"a\xff": ""}), small, []string{`"a\xff" is not valid UTF-8`, "rename it"}},
		{"a name with an escape sequence", app(map[string]string{"a\x1b[2J": ""}), small, []string{`\x1b[2J" has control characters`}},
		{"too deep", app(map[string]string{strings.Repeat("d/", 70) + "f": ""}), Input{Job: []byte("{}")}, []string{"more than 64 folders deep"}},
		{
			"too big", app(map[string]string{"src/pkg/data/x.npy": strings.Repeat("x", 9000), "model.bin": strings.Repeat("x", 900), "tiny": "x"}), small,
			[]string{"too big", "9.7 KiB in 9 files", "limit is 1000 B;", `"src/pkg/data/x.npy" (8.8 KiB), "model.bin" (900 B);`, "exclude"},
		},
		{
			"too many", app(map[string]string{"d/1": "", "d/2": "", "d/3": "", "d/4": "", "d/5": "", "d/6": "", "d/7": ""}), small,
			[]string{"in 11 files and folders", "limit is 9 files and folders", `"d/"`},
		},
		{"far too many", app(map[string]string{"d/" + strings.Repeat("e/", 60): ""}), small, []string{"has at least", `"d/`}},
		{"a bad pattern", app(nil), Input{Job: []byte("{}"), Exclude: []string{"[a"}}, []string{`"[a" in exclude`, "path.Match"}},
		{"everything excluded", app(nil), Input{Job: []byte("{}"), Exclude: []string{"*"}}, []string{"is empty"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := Build(c.dir(t), c.in)
			wantProblem(t, err, problem.AppInvalid, c.want...)
		})
	}
}

func TestHugeIsRefusedUnread(t *testing.T) {
	dir := plant(t, map[string]string{"pyproject.toml": "x"})
	f, err := os.Create(filepath.Join(dir, "data.bin"))
	must(t, err)
	must(t, f.Truncate(8<<40)) // sparse; reading it would take an hour
	must(t, f.Close())
	_, err = Build(dir, testInput)
	wantProblem(t, err, problem.AppInvalid, `"data.bin" (8.0 TiB)`, "the limit is 4.0 GiB")
}

func TestUnreadable(t *testing.T) {
	if os.Geteuid() == 0 {
		t.Skip("root can read everything")
	}
	for _, name := range []string{"secret", "dir/x"} {
		dir := plant(t, map[string]string{"pyproject.toml": "x", "secret": "s", "dir/x": ""})
		p := filepath.Join(dir, strings.TrimSuffix(name, "/x"))
		must(t, os.Chmod(p, 0))
		_, err := Build(dir, testInput)
		must(t, os.Chmod(p, 0o700))
		wantProblem(t, err, problem.AppInvalid, filepath.Base(p), "cannot be read", "make it readable")
	}
}

func TestChangedSinceBuild(t *testing.T) {
	for name, change := range map[string]func(p string) error{
		"other bytes":  func(p string) error { return os.WriteFile(p, []byte("b"), 0o644) },
		"longer":       func(p string) error { return os.WriteFile(p, []byte("aa"), 0o644) },
		"gone":         os.Remove,
		"now a fifo":   func(p string) error { return errors.Join(os.Remove(p), unix.Mkfifo(p, 0o600)) },
		"now a folder": func(p string) error { return errors.Join(os.Remove(p), os.Mkdir(p, 0o700)) },
		"now outside": func(p string) error {
			return errors.Join(os.Remove(p), os.Symlink("/etc/hostname", p))
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := plant(t, map[string]string{"a.py": "a"})
			b := build(t, dir, testInput)
			must(t, change(filepath.Join(dir, "a.py")))
			var w bytes.Buffer
			wantProblem(t, b.Write(&w), problem.AppInvalid, `"a.py"`)
			_, err := Extract(&w, filepath.Join(t.TempDir(), "dst"), b.Digest, Limits{})
			wantProblem(t, err, problem.BundleInvalid)
		})
	}
}

func TestWriteGivesWritersError(t *testing.T) {
	b := build(t, plant(t, sample), testInput)
	full := errors.New("full")
	if err := b.Write(failing{full}); !errors.Is(err, full) {
		t.Errorf("got %v", err)
	}
	if err := b.Write(iotest.TruncateWriter(io.Discard, 10)); err != nil {
		t.Errorf("got %v", err)
	}
}

type failing struct{ err error }

func (f failing) Write([]byte) (int, error) { return 0, f.err }
