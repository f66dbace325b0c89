package runner

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// A server app writes its results where it runs: in the folder of the staged app, whose files it may also want to read
// there. What is new or changed after the run is its result, and moves to where results are kept.

// fileState is enough to see that a file was written.
type fileState struct {
	size int64
	mod  time.Time
}

// snapshot has the files below a folder, by their path there.
type snapshot map[string]fileState

func takeSnapshot(dir string) (snapshot, error) {
	s := snapshot{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		s[rel] = fileState{info.Size(), info.ModTime()}
		return err
	})
	return s, err
}

// collect moves files and links that are not as in s from dir to the same place below to. It goes on after an error, so
// that as much as possible is kept.
func (s snapshot) collect(dir, to string) error {
	var errs []error
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			errs = append(errs, err)
			return nil
		case d.IsDir() && isByproduct(d.Name()):
			return fs.SkipDir
		case d.IsDir() || isByproduct(d.Name()) || !d.Type().IsRegular() && d.Type() != fs.ModeSymlink:
			return nil
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			errs = append(errs, err)
			return nil
		}
		// Flower writes to the pyproject.toml of its copy.
		if was, ok := s[rel]; ok && (rel == "pyproject.toml" || was.size == info.Size() && was.mod.Equal(info.ModTime())) {
			return nil
		}
		target := filepath.Join(to, rel)
		err = os.MkdirAll(filepath.Dir(target), 0o755)
		if err == nil {
			err = os.Rename(path, target)
		}
		if err != nil {
			errs = append(errs, err)
		}
		return nil
	})
	return errors.Join(append(errs, err)...)
}

// isByproduct tells whether a file or folder is one that Python or Flower make by themselves.
func isByproduct(name string) bool {
	return name == "__pycache__" || strings.HasSuffix(name, ".pyc") || strings.HasSuffix(name, ".fab")
}
