package pyenv

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
)

// Installer is a program that can build environments here, as [Installers] found it.
type Installer struct {
	Name string `json:"name"` // "uv" or "pip"
	Path string `json:"path"`
	Err  error  `json:"-"` // why it cannot
}

// Installers tells what there is to build environments with, uv first, without fetching or installing anything.
func Installers(ctx context.Context, cacheDir string, in Interpreter) []Installer {
	env := cleanEnv(nil)
	uv := Installer{Name: "uv", Err: errors.New("not on PATH, not beside the interpreter, and not fetched yet")}
	var places []string
	for dir := range strings.SplitSeq(env["PATH"], ":") {
		if path := filepath.Join(dir, "uv"); filepath.IsAbs(path) && executable(path) {
			places = append(places, path)
			break
		}
	}
	places = append(places, filepath.Join(filepath.Dir(in.Real), "uv"), filepath.Join(cacheDir, "tools", "uv", "bin", "uv"))
	for _, p := range places {
		if !executable(p) {
			continue
		}
		uv.Path = p
		if uv.Err = uvWorks(ctx, p, env); uv.Err == nil {
			break
		}
	}
	pip := Installer{Name: "pip", Path: in.Path}
	r, err := run(ctx, command{name: "python", args: []string{in.Path, "-E", "-s", "-c", "import venv, ensurepip"}, env: env.list()})
	switch {
	case err != nil:
		pip.Err = err
	case !r.ok():
		pip.Err = errors.New("its modules venv and ensurepip are missing (on Debian: apt install python3-venv)")
	}
	return []Installer{uv, pip}
}

// Built gives the versions of flwr of the environments that are built in cacheDir, one for each.
func Built(cacheDir string) ([]string, error) {
	marks, err := filepath.Glob(filepath.Join(cacheDir, "envs", "*", markerName))
	var out []string
	for _, m := range marks {
		infos, err := filepath.Glob(filepath.Join(filepath.Dir(m), "lib", "python*", "site-packages", "flwr*-*.dist-info"))
		if err != nil || len(infos) == 0 {
			continue
		}
		if _, err := os.Stat(filepath.Join(filepath.Dir(m), "bin", "python")); err != nil {
			continue // the interpreter that it was made for is gone
		}
		_, version, _ := strings.Cut(strings.TrimSuffix(filepath.Base(infos[0]), ".dist-info"), "-")
		out = append(out, version)
	}
	return out, err
}
