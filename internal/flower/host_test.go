package flower

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// An app is run from where Flower's programs of its generation run it from, with the files that belong into a FAB.
func TestInstallApp(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"pyproject.toml": "[project]\nname = \"lab\"\nversion = \"1.0.0\"\n[tool.flwr.app]\npublisher = \"me\"\n[tool.flwr.app.components]\nserverapp = \"lab.app:server\"\nclientapp = \"lab.app:client\"\n",
		"lab/app.py":     "server = client = None\n",
		"data.csv":       "1,2\n",
		"lab/test_it.py": "",
	} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		version string
		place   string // below FLWR_HOME; "" = where it lies
		files   []string
	}{
		{"1.12.0", "", nil},
		{"1.15.2", "apps/me.lab.1.0.0.", []string{"lab/app.py", "lab/test_it.py", "pyproject.toml"}},
		{"1.41.0", "apps/me.lab.1.0.0.", []string{"lab/app.py", "pyproject.toml"}},
	} {
		bin := filepath.Join(t.TempDir(), "bin")
		if err := os.MkdirAll(filepath.Join(filepath.Dir(bin), "lib", "python3.12", "site-packages", "flwr-"+c.version+".dist-info"), 0o700); err != nil {
			t.Fatal(err)
		}
		inst, err := Installed(t.Context(), Env{Bin: bin})
		if err != nil || inst.Version != c.version {
			t.Fatalf("%+v, %v", inst, err)
		}
		home := t.TempDir()
		got, err := InstallApp(inst, dir, home)
		if err != nil {
			t.Fatal(err)
		}
		if c.place == "" {
			if got != dir {
				t.Errorf("%s runs the app in %s", c.version, got)
			}
			continue
		}
		if rel, err := filepath.Rel(home, got); err != nil || !strings.HasPrefix(rel, c.place) || len(rel) != len(c.place)+8 {
			t.Errorf("%s runs the app in %s", c.version, got)
		}
		var files []string
		if err := filepath.WalkDir(got, func(path string, d os.DirEntry, err error) error {
			if err == nil && !d.IsDir() {
				files = append(files, strings.TrimPrefix(path, got+"/"))
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(files, c.files) {
			t.Errorf("%s runs the app with %q, want %q", c.version, files, c.files)
		}
	}
}
