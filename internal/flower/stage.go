package flower

import (
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"github.com/pergolafl/pergola/internal/problem"
)

// Stage makes dstDir, which must not exist or be empty, a copy of srcDir that the installation can run:
// an older style becomes [tool.flwr.app] with its components, publisher, version and a name that this
// generation takes are filled in, a.Config (with overrides) becomes its config, and federations are
// left out, since newer `flwr run` commands would rewrite the file or start a simulation for them.
// A pyproject.toml that needs none of that is copied as it is. srcDir is never written to.
func Stage(app *App, srcDir, dstDir string, inst *Installation) error {
	if err := copyTree(srcDir, dstDir); err != nil {
		return problem.Wrap(err, codeOf(err), "make room, or make the app's files readable", "the app could not be copied to %s", dstDir)
	}
	doc, err := app.staged(inst)
	if err != nil || doc == nil {
		return err
	}
	return writePyproject(dstDir, doc)
}

// writePyproject replaces the pyproject.toml of a staged copy.
func writePyproject(dir string, doc map[string]any) error {
	raw, err := toml.Marshal(doc)
	if err != nil {
		return problem.Wrap(err, problem.AppInvalid, "simplify the file", "the app's pyproject.toml cannot be written anew")
	}
	if err := os.WriteFile(filepath.Join(dir, "pyproject.toml"), raw, 0o644); err != nil {
		return problem.Wrap(err, codeOf(err), "make room", "the staged pyproject.toml cannot be written")
	}
	return nil
}

// staged is the pyproject.toml that app needs, nil if the one that it has will do.
func (a *App) staged(inst *Installation) (map[string]any, error) {
	doc := map[string]any{}
	if a.Pyproject != nil {
		// A fresh tree: what is changed here must not change a.
		if err := toml.Unmarshal(a.Pyproject, &doc); err != nil {
			return nil, tomlProblem(filepath.Join(a.Dir, "pyproject.toml"), err)
		}
	}
	changed := a.Style != StyleNew
	project := table(doc, "project", &changed)
	set := func(t map[string]any, key string, value any) {
		if old, ok := t[key]; !ok || old != value {
			t[key], changed = value, true
		}
	}
	if len(a.Dependencies) > 0 && project["dependencies"] == nil {
		project["dependencies"], changed = a.Dependencies, true
	}
	set(project, "name", a.stagedName(inst))
	set(project, "version", a.Version)
	if dynamic, ok := project["dynamic"].([]any); ok {
		// A field may not be both given and dynamic.
		var rest []any
		for _, d := range dynamic {
			if d != "version" {
				rest = append(rest, d)
			}
		}
		if len(rest) != len(dynamic) {
			project["dynamic"], changed = rest, true
		}
	}
	tool := table(doc, "tool", &changed)
	flwr := table(tool, "flwr", &changed)
	for _, old := range []string{"federations", "components", "publisher"} {
		if _, ok := flwr[old]; ok {
			delete(flwr, old)
			changed = true
		}
	}
	app := table(flwr, "app", &changed)
	set(app, "publisher", a.Publisher)
	components := table(app, "components", &changed)
	set(components, "serverapp", a.ServerApp)
	set(components, "clientapp", a.ClientApp)

	before := map[string]any{}
	config, _ := app["config"].(map[string]any)
	flatten(config, "", before)
	same := len(before) == len(a.Config)
	for k, v := range a.Config {
		same = same && before[k] == v
	}
	if !same {
		// Flat keys need quotes in TOML and read back the same: Flower flattens what it reads.
		app["config"], changed = a.Config, true
	}
	if !changed {
		return nil, nil
	}
	return doc, nil
}

// stagedName is the project's name; from 1.28 or so `flwr run` takes only letters, digits and hyphens,
// and every generation takes those.
func (a *App) stagedName(*Installation) string { return nameOf(a.Name) }

func table(in map[string]any, key string, changed *bool) map[string]any {
	if t, ok := in[key].(map[string]any); ok {
		return t
	}
	t := map[string]any{}
	in[key], *changed = t, true
	return t
}

// skipDirs are never part of what runs.
var skipDirs = map[string]bool{".git": true, "__pycache__": true, ".venv": true, "node_modules": true, "pergola-runs": true, ".pergola": true}

// copyTree copies files, directories and symbolic links (as links), with their permission bits; other
// kinds of files are left out, as is what cannot be part of an app (skipDirs).
func copyTree(src, dst string) error {
	return filepath.WalkDir(src, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(src, path)
		if err != nil {
			return err
		}
		target := filepath.Join(dst, rel)
		switch {
		case d.IsDir():
			if rel != "." && skipDirs[d.Name()] {
				return filepath.SkipDir
			}
			return os.MkdirAll(target, 0o755)
		case d.Type()&fs.ModeSymlink != 0:
			link, err := os.Readlink(path)
			if err != nil {
				return err
			}
			return os.Symlink(link, target)
		case !d.Type().IsRegular() || strings.HasSuffix(d.Name(), ".pyc"):
			return nil
		}
		return copyFile(path, target)
	})
}

func copyFile(src, dst string) (err error) {
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		return err
	}
	out, err := os.OpenFile(dst, os.O_WRONLY|os.O_CREATE|os.O_EXCL, info.Mode().Perm()|0o600)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := out.Close(); err == nil {
			err = cerr
		}
	}()
	_, err = io.Copy(out, in)
	return err
}
