package pyenv

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pergolafl/pergola/internal/problem"
)

// answering writes a stand-in for an interpreter of some version.
func answering(t *testing.T, dir, name, version string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	return script(t, dir, name, `echo 'a line from sitecustomize'; echo 'PERGOLA:{"version":"`+version+`","path":"`+path+`","real":"`+path+`","platform":"linux-x86_64-cpython"}'`)
}

func TestFindByName(t *testing.T) {
	t.Setenv("PERGOLA_CACHE", t.TempDir())
	dir := t.TempDir()
	good := answering(t, dir, "good", "3.12.1")
	link := filepath.Join(dir, "link")
	if err := os.Symlink(good, link); err != nil {
		t.Fatal(err)
	}
	plain := filepath.Join(dir, "plain.txt")
	if err := os.WriteFile(plain, []byte("text"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir)
	answering(t, dir, "python3.11", "3.11.4")
	for want, path := range map[string]string{good: good, "good": good, link: link, "3.11": filepath.Join(dir, "python3.11")} {
		if in, err := Find(t.Context(), want); err != nil || in.Path != path {
			t.Errorf("Find(%q) = %+v, %v; want %s", want, in, err, path)
		}
	}
	for want, word := range map[string]string{
		answering(t, dir, "old", "3.9.18"):               "is Python 3.9.18",
		answering(t, dir, "ancient", "2.7.18"):           "3.10 or newer",
		script(t, dir, "mute", "exit 3"):                 "exit code 3",
		script(t, dir, "other", "echo 'not a python'"):   "not a python",
		script(t, dir, "liar", "echo 'PERGOLA:{\"x\":'"): "not a Python interpreter",
		filepath.Join(dir, "missing"):                    "there is no Python at",
		plain:                                            "may not be executed",
		dir:                                              "without bin/python",
		"3.99":                                           "there is no Python at 3.99",
	} {
		_, err := Find(t.Context(), want)
		if problem.CodeOf(err) != problem.PythonUnsuitable || !strings.Contains(err.Error(), word) || problem.From(err).Next == "" {
			t.Errorf("Find(%q): got %v, want %q", want, err, word)
		}
	}
}

func TestFindTakesTheNewestOnPath(t *testing.T) {
	t.Setenv("PERGOLA_CACHE", t.TempDir())
	dir := t.TempDir()
	t.Setenv("PATH", dir)
	t.Setenv("PERGOLA_PYTHON", "")
	if _, err := Find(t.Context(), ""); problem.CodeOf(err) != problem.PythonUnsuitable || !strings.Contains(err.Error(), "no python3 on PATH") {
		t.Errorf("nothing on PATH: %v", err)
	}
	answering(t, dir, "python3", "3.8.10")
	if _, err := Find(t.Context(), ""); problem.CodeOf(err) != problem.PythonUnsuitable || !strings.Contains(err.Error(), "python3 is 3.8.10") {
		t.Errorf("an old one: %v", err)
	}
	answering(t, dir, "python3.11", "3.11.2")
	script(t, dir, "python3.13", "echo 'pyenv: python3.13: command not found' >&2; exit 127")
	want := answering(t, dir, "python3.12", "3.12.0")
	if in, err := Find(t.Context(), ""); err != nil || in.Path != want {
		t.Errorf("got %+v, %v; want %s", in, err, want)
	}
	answering(t, dir, "python3", "3.12.0")
	if in, err := Find(t.Context(), ""); err != nil || in.Path != filepath.Join(dir, "python3") {
		t.Errorf("of two alike: %+v, %v; want python3", in, err)
	}
	t.Setenv("PERGOLA_PYTHON", "python3.11")
	if in, err := Find(t.Context(), ""); err != nil || in.Version != "3.11.2" {
		t.Errorf("PERGOLA_PYTHON: %+v, %v", in, err)
	}
}

// What was found is found again without a program, until the file changes.
func TestFindRemembers(t *testing.T) {
	t.Setenv("PERGOLA_CACHE", t.TempDir())
	root := t.TempDir()
	dir := filepath.Join(root, "shims")
	calls := filepath.Join(root, "calls")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	bin := answering(t, root, "real", "3.12.1")
	shim := func() string {
		return script(t, dir, "python3", `# pyenv
echo called >>"`+calls+`"; exec "`+bin+`" "$@"`)
	}()
	count := func() int {
		b, err := os.ReadFile(calls)
		if err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		return strings.Count(string(b), "called")
	}
	find := func(wantCalls int, why string) {
		t.Helper()
		in, err := Find(t.Context(), shim)
		if err != nil || in.Path != bin || count() != wantCalls {
			t.Errorf("%s: %+v, %v after %d calls, want %d", why, in, err, count(), wantCalls)
		}
	}
	// The interpreter that the shim starts is itself a script here, which is not remembered; make it long enough to count
	// as a program.
	if b, err := os.ReadFile(bin); err != nil {
		t.Fatal(err)
	} else if err := os.WriteFile(bin, append(b, []byte(strings.Repeat("#\n", 4096))...), 0o755); err != nil {
		t.Fatal(err)
	}
	find(1, "first")
	find(1, "again")
	if err := os.WriteFile(filepath.Join(root, "version"), []byte("3.12.1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	find(2, "another version may be chosen")
	t.Setenv("PYENV_VERSION", "3.12.1")
	find(3, "the variable was set")
	find(3, "again")
	if err := os.Remove(bin); err != nil {
		t.Fatal(err)
	}
	if _, err := Find(t.Context(), shim); problem.CodeOf(err) != problem.PythonUnsuitable {
		t.Errorf("the interpreter is gone: %v", err)
	}
}

func TestARealInterpreterIsRemembered(t *testing.T) {
	t.Setenv("PERGOLA_CACHE", t.TempDir())
	in := testPython(t)
	if in.Version == "" || in.Platform == "" || !filepath.IsAbs(in.Real) {
		t.Errorf("got %+v", in)
	}
	kept, err := filepath.Glob(filepath.Join(os.Getenv("PERGOLA_CACHE"), "interpreters", "*.json"))
	if err != nil || len(kept) == 0 {
		t.Errorf("nothing kept: %v", err)
	}
	again, err := Find(t.Context(), in.Path)
	if err != nil || again != in {
		t.Errorf("again: %+v, %v; want %+v", again, err, in)
	}
}
