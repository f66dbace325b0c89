package flower

import (
	"archive/zip"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pergolafl/pergola/internal/problem"
)

// zipFile is an entry of a FAB that a test makes; mode 0 is a file's.
type zipFile struct {
	name, text string
	mode       fs.FileMode
}

func makeZip(t testing.TB, files ...zipFile) []byte {
	t.Helper()
	var b bytes.Buffer
	z := zip.NewWriter(&b)
	for _, f := range files {
		h := &zip.FileHeader{Name: f.name, Method: zip.Deflate}
		if f.mode != 0 {
			h.SetMode(f.mode)
		}
		w, err := z.CreateHeader(h)
		if err == nil {
			_, err = w.Write([]byte(f.text))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func fabLine(name, text string) string {
	return fmt.Sprintf("%s,%x,%d", name, sha256.Sum256([]byte(text)), 8*len(text))
}

// A FAB unpacks to the files that it was built of, whatever built it.
func TestUnpackFAB(t *testing.T) {
	src := filepath.Join("..", "..", "test", "apps", "tiny")
	b, hash, err := buildFAB(src, GenControl)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"app.fab", "lab.tiny.1-0-0." + hash[:8] + ".fab"} {
		file, dir := filepath.Join(t.TempDir(), name), t.TempDir()
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := UnpackFAB(file, dir); err != nil {
			t.Fatal(err)
		}
		for _, f := range []string{"pyproject.toml", "tiny/app.py", "tiny/__init__.py"} {
			want, err := os.ReadFile(filepath.Join(src, f))
			if err != nil {
				t.Fatal(err)
			}
			if got, err := os.ReadFile(filepath.Join(dir, f)); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s is not what it was: %v", f, err)
			}
		}
		if _, err := os.Stat(filepath.Join(dir, ".info")); err == nil {
			t.Error("the list of files is in the app")
		}
		if app, err := LoadApp(dir); err != nil || app.Name != "tiny" {
			t.Errorf("it does not load: %v", err)
		}
	}
	file := filepath.Join(t.TempDir(), "lab.tiny.1-0-0.00000000.fab")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := UnpackFAB(file, t.TempDir()); err == nil || !strings.Contains(err.Error(), "its name says 00000000") {
		t.Errorf("a file whose name has another hash: %v", err)
	}
}

// What is wrong with a FAB is said with the file's name, and nothing is written outside of the directory.
func TestUnpackFABFaults(t *testing.T) {
	project := zipFile{name: "pyproject.toml", text: "x"}
	list := func(lines ...string) zipFile {
		return zipFile{name: fabList, text: strings.Join(append([]string{fabLine("pyproject.toml", "x")}, lines...), "\n")}
	}
	good := func(files ...zipFile) []byte {
		var lines []string
		for _, f := range files {
			lines = append(lines, fabLine(f.name, f.text))
		}
		return makeZip(t, append(append([]zipFile{project}, files...), list(lines...))...)
	}
	bomb := strings.Repeat("\x00", 1<<20)
	for _, c := range []struct {
		about string
		fab   []byte
		want  string
	}{
		{"no zip", []byte("hello"), "is not a good FAB: zip"},
		{"half a zip", good()[:60], "is not a good FAB: zip"},
		{"no list", makeZip(t, project), "no list of files"},
		{"no pyproject.toml", makeZip(t, zipFile{name: fabList}), "it has no pyproject.toml"},
		{"a wrong hash", makeZip(t, project, zipFile{name: "a.py", text: "1"}, list(fabLine("a.py", "2"))), `"a.py" is not what its list of files says`},
		{"a wrong size", makeZip(t, project, zipFile{name: "a.py", text: "1"}, list(fabLine("a.py", "22"))), `"a.py" has 1 bytes, its list of files says 2`},
		{"a file too many", makeZip(t, project, zipFile{name: "a.py", text: "1"}, list()), `"a.py" is in it, but not in its list`},
		{"a file too few", makeZip(t, project, list(fabLine("a.py", "2"))), `"a.py" is in its list of files, but not in it`},
		{"twice", makeZip(t, project, project, list()), `"pyproject.toml" is in it twice`},
		{"listed twice", makeZip(t, project, list(fabLine("pyproject.toml", "x"))), "line 2 of .info/CONTENT lists"},
		{"a bad line", makeZip(t, project, list("a.py")), "line 2 of .info/CONTENT is not path,sha256,bits"},
		{"bits that are no bytes", makeZip(t, project, list(strings.TrimSuffix(fabLine("a", "1"), "8")+"9")), "line 2"},
		{"up", good(zipFile{name: "../a.py"}), "leads out of the app"},
		{"up and down", good(zipFile{name: "a/../../a.py"}), "leads out of the app"},
		{"absolute", good(zipFile{name: "/a.py"}), "leads out of the app"},
		{"a backslash", good(zipFile{name: `..\a.py`}), "cannot be the name"},
		{"a link", good(zipFile{name: "a", text: "/etc/passwd", mode: fs.ModeSymlink | 0o777}), `"a" is a link`},
		{"a device", good(zipFile{name: "a", mode: fs.ModeDevice | 0o600}), "neither a file nor a folder"},
		{"a file and a folder", good(zipFile{name: "a"}, zipFile{name: "a/b"}), "is both a file and a folder"},
		{"a bomb", makeZip(t, project, zipFile{name: "a", text: bomb}, list(strings.Replace(fabLine("a", bomb), ",8388608", ",99999999999992", 1))), "its list of files says"},
		{"a second list", good(zipFile{name: ".info/METADATA"}), "does not belong there"},
	} {
		t.Run(c.about, func(t *testing.T) {
			top := t.TempDir()
			file, dir := filepath.Join(top, "app.fab"), filepath.Join(top, "in", "app")
			if err := os.MkdirAll(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(file, c.fab, 0o600); err != nil {
				t.Fatal(err)
			}
			err := UnpackFAB(file, dir)
			if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), file) || problem.CodeOf(err) != problem.AppInvalid {
				t.Errorf("the error is %v, want one with %q", err, c.want)
			}
			for _, d := range []string{top, filepath.Join(top, "in")} {
				if es, err := os.ReadDir(d); err != nil || len(es) > 2 || d != top && len(es) != 1 {
					t.Errorf("%s has %v, %v", d, es, err)
				}
			}
		})
	}
	// A path may have commas; folders may have entries of their own.
	top := t.TempDir()
	file := filepath.Join(top, "app.fab")
	b := makeZip(t, project, zipFile{name: "d/", mode: fs.ModeDir | 0o755}, zipFile{name: "d/a,b.py", text: "1"}, list(fabLine("d/a,b.py", "1"), ""))
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := UnpackFAB(file, t.TempDir()); err != nil {
		t.Error(err)
	}
	if err := UnpackFAB(filepath.Join(top, "none.fab"), t.TempDir()); problem.CodeOf(err) != problem.AppInvalid {
		t.Errorf("no file: %v", err)
	}
}

// Whatever the bytes are, unpacking ends, with a problem or with exactly the files that are listed, each with its hash.
func FuzzUnpackFAB(f *testing.F) {
	project := zipFile{name: "pyproject.toml", text: "x"}
	f.Add(makeZip(f, project, zipFile{name: fabList, text: fabLine("pyproject.toml", "x")}))
	f.Add(makeZip(f, project, zipFile{name: "../a", text: "x"}, zipFile{name: fabList, text: fabLine("pyproject.toml", "x") + "\n" + fabLine("../a", "x")}))
	f.Add([]byte("PK\x03\x04"))
	f.Fuzz(func(t *testing.T, b []byte) {
		top := t.TempDir()
		dir := filepath.Join(top, "app")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		root, err := os.OpenRoot(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer root.Close()
		err = unpackFAB(bytes.NewReader(b), int64(len(b)), "x.fab", root)
		if es, e := os.ReadDir(top); e != nil || len(es) != 1 {
			t.Fatalf("outside of the directory there is %v, %v", es, e)
		}
		if err != nil {
			if c := problem.CodeOf(err); c != problem.AppInvalid {
				t.Fatalf("the code is %s: %v", c, err)
			}
			return
		}
		z, err := zip.NewReader(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range z.File {
			if e.Name != fabList || e.Mode().IsDir() {
				continue
			}
			list, err := fabContent(e, "x.fab")
			if err != nil {
				t.Fatal(err)
			}
			for p, want := range list {
				got, err := os.ReadFile(filepath.Join(dir, filepath.FromSlash(p)))
				if sum := sha256.Sum256(got); err != nil || hex.EncodeToString(sum[:]) != want.hash {
					t.Fatalf("%q: %v, hash %x", p, err, sum)
				}
			}
		}
	})
}
