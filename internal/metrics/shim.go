package metrics

import (
	"embed"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/pergolafl/pergola/internal/problem"
)

//go:embed all:shim
var shims embed.FS

const (
	shimFolder = "nvflare"
	shimMarker = "_pergola_shim.py"
)

// InstallShim puts into the app's folder a Python package in place of nvflare, by which code that was written for its
// tracking writers logs here. A folder of that name which is not an earlier shim is left alone. The package steps aside
// where the real one is installed.
func InstallShim(app string) (dir string, err error) {
	if _, err := os.Stat(filepath.Join(app, "pyproject.toml")); err != nil {
		return "", problem.Wrap(err, problem.Usage, "give the app's directory with -o", "%s is no Flower app", app)
	}
	dir = filepath.Join(app, shimFolder)
	if info, err := os.Lstat(dir); err == nil {
		if m, err := os.Lstat(filepath.Join(dir, shimMarker)); err != nil || !m.Mode().IsRegular() || !info.IsDir() {
			return "", problem.New(problem.Usage, "rename or remove it if the stand-in is to take its place", "%s is there already, and is not of `pergola shim`", dir)
		}
		if err := os.RemoveAll(dir); err != nil {
			return "", err
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	sub, err := fs.Sub(shims, "shim/"+shimFolder)
	if err != nil {
		return "", err
	}
	if err := fs.WalkDir(sub, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			return os.Mkdir(filepath.Join(dir, path), 0o755)
		}
		b, err := fs.ReadFile(sub, path)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(dir, path), b, 0o644)
	}); err != nil {
		return "", problem.Wrap(err, problem.Usage, "check that the app's directory can be written", "the stand-in could not be put into %s", app)
	}
	return dir, nil
}
