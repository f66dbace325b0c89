package runner

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

func TestCollect(t *testing.T) {
	dir, to := t.TempDir(), filepath.Join(t.TempDir(), "results")
	write := func(name, text string) {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range []string{"pyproject.toml", "app/server.py", "data/table.csv", "data/same.csv"} {
		write(n, "before")
	}
	s, err := takeSnapshot(dir)
	if err != nil {
		t.Fatal(err)
	}
	write("pyproject.toml", "rewritten by Flower")
	write("data/table.csv", "after, longer")
	if err := os.Chtimes(filepath.Join(dir, "app/server.py"), time.Time{}, time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	for _, n := range []string{"final.npz", "checkpoints/round-1/model.npz", "app/__pycache__/server.cpython-311.pyc", "stray.pyc", "pergola.app.1-0-0.fab"} {
		write(n, "new")
	}
	if err := os.Symlink("round-1", filepath.Join(dir, "checkpoints/latest")); err != nil {
		t.Fatal(err)
	}
	if err := s.collect(dir, to); err != nil {
		t.Fatal(err)
	}
	after, err := takeSnapshot(to)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for n := range after {
		got = append(got, n)
	}
	slices.Sort(got)
	if want := []string{"app/server.py", "checkpoints/latest", "checkpoints/round-1/model.npz", "data/table.csv", "final.npz"}; !slices.Equal(got, want) {
		t.Errorf("results are %q, want %q", got, want)
	}
	if b, err := os.ReadFile(filepath.Join(to, "checkpoints/latest/model.npz")); err != nil || string(b) != "new" {
		t.Errorf("through the link: %q %v", b, err)
	}
}
