// Package bundle packs exactly what a job will run — the app's files, the lock of its dependencies,
// the job's configuration — into one stream whose digest stands for every byte of it, and unpacks such a stream at
// a site so that nothing else can come out of it.
//
// A bundle is a tar archive, compressed with zstd, of
//
//	manifest.json   every file with its size and SHA-256; the digest is that of this file
//	lock.txt        the locked dependencies
//	job.json        the job's configuration
//	app/…           the app's files in the manifest's order
//
// It does not read the app's pyproject.toml, resolve dependencies or sign anything, and never writes to the
// app's directory. Memory use does not depend on the size of the files, only (by the manifest) on their number.
//
// Start with [Build] and [Extract]; [Read] opens what Extract wrote.
package bundle

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"hash"
	"io"
	"os"
	"path/filepath"
	"syscall"

	"github.com/klauspost/compress/zstd"

	"github.com/pergolafl/pergola/internal/problem"
)

// Names of a bundle's parts, in the archive as in the directory that Extract writes.
const (
	manifestName = "manifest.json"
	lockName     = "lock.txt"
	jobName      = "job.json"
	appName      = "app"
)

// What an app may be unless Input or Limits say otherwise: code, and a model to begin with, not data.
const (
	DefaultMaxBytes = 4 << 30
	DefaultMaxFiles = 20_000 // files and folders together
)

// The window bounds the memory of both ends (about 4 MiB each); code compresses no better with a larger one.
const window = 1 << 20

// Limits bound what a bundle may hold; a zero field stands for its default.
type Limits struct {
	MaxBytes int64
	MaxFiles int
}

func (l Limits) orDefaults() Limits {
	if l.MaxBytes <= 0 {
		l.MaxBytes = DefaultMaxBytes
	}
	if l.MaxFiles <= 0 {
		l.MaxFiles = DefaultMaxFiles
	}
	return l
}

// Input is what Build needs beyond the app's directory.
type Input struct {
	App  Meta
	Lock []byte // locked dependencies
	Job  []byte // the job's configuration, JSON

	// Exclude are further patterns of path.Match for what to leave out: one without a slash is compared
	// with the names of files and folders, one with a slash with the path from the app's directory; a
	// slash at the end stands for folders only. What an excluded folder holds is excluded.
	Exclude []string

	MaxBytes int64 // of all files together; 0 = DefaultMaxBytes
	MaxFiles int   // 0 = DefaultMaxFiles
}

// Bundle is an app that was looked at and digested; its files are still where they were.
type Bundle struct {
	Manifest Manifest
	Digest   string // "sha256:…" of the manifest

	dir     string
	encoded []byte
	lock    []byte
	job     []byte
}

// Build walks the app in srcDir, decides whether it can be a bundle before it reads any file, and
// digests its files. The same tree gives the same digest whatever its times, owners or umask. All
// errors are problems: AppInvalid for whatever the app's author can change, Internal for the rest.
func Build(srcDir string, in Input) (*Bundle, error) {
	if err := checkParts(in); err != nil {
		return nil, err
	}
	lim := Limits{in.MaxBytes, in.MaxFiles}.orDefaults()
	root, abs, err := openApp(srcDir)
	if err != nil {
		return nil, err
	}
	defer root.Close()

	files, err := walk(root, abs, in.Exclude, lim)
	if err != nil {
		return nil, err
	}
	b := &Bundle{
		dir: abs, lock: in.Lock, job: in.Job,
		Manifest: Manifest{
			Format: Format, App: in.App, Files: files,
			Lock: Part{int64(len(in.Lock)), sum(in.Lock)},
			Job:  Part{int64(len(in.Job)), sum(in.Job)},
		},
	}
	buf := make([]byte, 256<<10)
	for i := range files {
		if files[i].Kind != File {
			continue
		}
		h := sha256.New()
		if err := copyFile(root, abs, files[i], h, buf); err != nil {
			return nil, err
		}
		files[i].SHA256 = hexSum(h)
	}
	// walk has refused all that check could; this holds the two against each other.
	if err := b.Manifest.check(lim); err != nil {
		return nil, problem.Wrap(err, problem.Internal, "please report this", "the app in %s cannot be listed", abs)
	}
	if b.encoded, err = b.Manifest.Encode(); err != nil {
		return nil, problem.Wrap(err, problem.Internal, "please report this", "the app in %s cannot be listed", abs)
	}
	if len(b.encoded) > MaxManifest {
		return nil, problem.New(problem.AppInvalid, "use fewer files or shorter paths", "the list of the files in %s has %d bytes, more than %d", abs, len(b.encoded), MaxManifest)
	}
	b.Digest = "sha256:" + sum(b.encoded)
	return b, nil
}

func checkParts(in Input) error {
	for _, p := range []struct {
		name string
		data []byte
	}{{"list of locked dependencies", in.Lock}, {"configuration", in.Job}} {
		if len(p.data) > MaxPart {
			return problem.New(problem.AppInvalid, "make it shorter", "the %s of app %q has %d bytes, more than %d", p.name, in.App.Name, len(p.data), MaxPart)
		}
	}
	if !json.Valid(in.Job) {
		return problem.New(problem.Internal, "please report this", "the configuration of app %q is not JSON", in.App.Name)
	}
	return nil
}

func hexSum(h hash.Hash) string { return hex.EncodeToString(h.Sum(nil)) }

// copyFile copies a file of the app to w and fails unless it has the size that walk saw.
func copyFile(root *os.Root, abs string, e Entry, w io.Writer, buf []byte) error {
	changed := func() error {
		return problem.New(problem.AppInvalid, "let nothing write to the app's directory and try again",
			"%q in %s changed while it was being packed", e.Path, abs)
	}
	// O_NONBLOCK: what was a file when it was looked at may be a fifo by now.
	f, err := root.OpenFile(filepath.FromSlash(e.Path), os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if errors.Is(err, os.ErrNotExist) {
		return changed()
	}
	if err != nil {
		return unreadable(err, e.Path, abs)
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() || info.Size() != e.Size {
		return changed()
	}
	r := &sourceReader{r: io.LimitReader(f, e.Size)}
	n, err := io.CopyBuffer(struct{ io.Writer }{w}, r, buf)
	switch {
	case r.err != nil:
		return unreadable(r.err, e.Path, abs)
	case err != nil:
		return err
	case n != e.Size:
		return changed()
	}
	return nil
}

func unreadable(err error, name, abs string) error {
	return problem.Wrap(err, problem.AppInvalid, "make it readable, or list it in exclude of [tool.pergola] in pyproject.toml",
		"%q in the app directory %s cannot be read", name, abs)
}

// sourceReader remembers its own errors, to tell them from those of whatever is being written to.
type sourceReader struct {
	r   io.Reader
	err error
}

func (s *sourceReader) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err != nil && err != io.EOF {
		s.err = err
	}
	return n, err
}

// Write writes the bundle; the same bundle gives the same bytes. A file that changed since Build is
// AppInvalid; an error of w is returned as it is.
func (b *Bundle) Write(w io.Writer) error {
	root, err := os.OpenRoot(b.dir)
	if err != nil {
		return unreadable(err, ".", b.dir)
	}
	defer root.Close()

	z, err := zstd.NewWriter(w, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(window), zstd.WithEncoderCRC(true))
	if err != nil {
		return err
	}
	t := tar.NewWriter(z)
	err = b.writeAll(t, root)
	if err == nil {
		err = t.Close()
	}
	if err == nil {
		return z.Close()
	}
	// Not z.Close: it would end the stream as if it were whole.
	z.Reset(nil)
	return err
}

func (b *Bundle) writeAll(t *tar.Writer, root *os.Root) error {
	for _, p := range []struct {
		name string
		data []byte
	}{{manifestName, b.encoded}, {lockName, b.lock}, {jobName, b.job}} {
		if err := t.WriteHeader(header(p.name, Entry{Kind: File, Size: int64(len(p.data))})); err != nil {
			return err
		}
		if _, err := t.Write(p.data); err != nil {
			return err
		}
	}
	buf := make([]byte, 256<<10)
	for _, e := range b.Manifest.Files {
		if err := t.WriteHeader(header(appName+"/"+e.Path, e)); err != nil {
			return err
		}
		if e.Kind != File {
			continue
		}
		h := sha256.New()
		if err := copyFile(root, b.dir, e, io.MultiWriter(t, h), buf); err != nil {
			return err
		}
		if hexSum(h) != e.SHA256 {
			return problem.New(problem.AppInvalid, "let nothing write to the app's directory and try again",
				"%q in %s changed while it was being packed", e.Path, b.dir)
		}
	}
	return nil
}

// header gives the one form in which an entry may stand in the archive.
func header(name string, e Entry) *tar.Header {
	h := &tar.Header{Name: name, Typeflag: tar.TypeReg, Size: e.Size, Mode: 0o644}
	switch {
	case e.Kind == Link:
		h.Typeflag, h.Linkname, h.Mode = tar.TypeSymlink, e.Target, 0o777
	case e.Kind == Dir:
		h.Typeflag, h.Name, h.Mode = tar.TypeDir, name+"/", 0o755
	case e.Exec:
		h.Mode = 0o755
	}
	return h
}
