package flower

import (
	"archive/zip"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/pergolafl/pergola/internal/problem"
)

// What a FAB may unpack to: as package bundle bounds an app, and for the same reason. FABs that Flower itself takes have at
// most 10 MiB packed ([maxFAB]); older versions had no limit.
const (
	maxFABFiles  = 20_000
	maxFABBytes  = 512 << 20
	maxFABPacked = 512 << 20
	maxFABList   = 8 << 20 // of .info/CONTENT: 20,000 lines of 400 bytes
)

// fabList is the part of a FAB that lists the others, a "path,sha256,bits" a line.
const fabList = ".info/CONTENT"

const fabHelp = "build it again with `flwr build`, or give the app's directory"

func badFAB(name, format string, args ...any) error {
	return problem.New(problem.AppInvalid, fabHelp, "%s is not a good FAB: %s", name, fmt.Sprintf(format, args...))
}

// fabName is how `flwr build` names its files: publisher, name, version with hyphens, first digits of the file's hash.
var fabName = regexp.MustCompile(`^.+\.([0-9a-f]{8})\.fab$`)

// UnpackFAB unpacks the Flower app bundle in the file named file into dir, which must exist and be empty. Every file has to be
// listed in .info/CONTENT with its hash and its size, and nothing else may be there; nothing is written outside of dir, and no
// links. If the file's name has a hash, as `flwr build` gives it, it has to be the right one. Errors have the code
// app-invalid and name the file; dir is then left as far as it was filled.
func UnpackFAB(file, dir string) error {
	f, err := os.Open(file)
	if err != nil {
		return problem.Wrap(err, problem.AppInvalid, "give a FAB or the directory of a Flower app", "%s cannot be read", file)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return problem.Wrap(err, problem.AppInvalid, "give a FAB or the directory of a Flower app", "%s cannot be read", file)
	}
	if info.Size() > maxFABPacked {
		return badFAB(file, "it has %d bytes; more than %d are not read", info.Size(), maxFABPacked)
	}
	if m := fabName.FindStringSubmatch(filepath.Base(file)); m != nil {
		h := sha256.New()
		if _, err := io.Copy(h, f); err != nil {
			return problem.Wrap(err, problem.AppInvalid, "look at the disk", "%s cannot be read", file)
		}
		if got := hex.EncodeToString(h.Sum(nil)); !strings.HasPrefix(got, m[1]) {
			return badFAB(file, "its hash begins with %s, its name says %s", got[:8], m[1])
		}
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return problem.Wrap(err, codeOf(err), "make room, or choose another directory", "the app cannot be unpacked to %s", dir)
	}
	defer root.Close()
	return unpackFAB(f, info.Size(), file, root)
}

// fabEntry is a line of .info/CONTENT.
type fabEntry struct {
	hash string
	size uint64 // bytes
}

func unpackFAB(r io.ReaderAt, size int64, name string, root *os.Root) error {
	z, err := zip.NewReader(r, size)
	if err != nil {
		return problem.Wrap(err, problem.AppInvalid, fabHelp, "%s is not a good FAB", name)
	}
	if len(z.File) > maxFABFiles {
		return badFAB(name, "it has more than %d files", maxFABFiles)
	}
	files := map[string]*zip.File{}
	for _, f := range z.File {
		if err := fabPath(f, name); err != nil {
			return err
		}
		if f.Mode().IsDir() {
			continue // made where files need them
		}
		if files[f.Name] != nil {
			return badFAB(name, "%q is in it twice", f.Name)
		}
		files[f.Name] = f
	}
	list, err := fabContent(files[fabList], name)
	if err != nil {
		return err
	}
	for _, f := range z.File { // in the archive's order, so that the same fault is found first each time
		if _, listed := list[f.Name]; !listed && !f.Mode().IsDir() && f.Name != fabList {
			return badFAB(name, "%q is in it, but not in its list of files", f.Name)
		}
	}
	total := uint64(0)
	for _, p := range slices.Sorted(maps.Keys(list)) {
		e := list[p]
		f := files[p]
		switch {
		case f == nil:
			return badFAB(name, "%q is in its list of files, but not in it", p)
		case f.UncompressedSize64 != e.size:
			return badFAB(name, "%q has %d bytes, its list of files says %d", p, f.UncompressedSize64, e.size)
		}
		if total += e.size; e.size > maxFABBytes || total > maxFABBytes {
			return badFAB(name, "it would unpack to more than %d bytes", maxFABBytes)
		}
	}
	if _, ok := list["pyproject.toml"]; !ok {
		return badFAB(name, "it has no pyproject.toml")
	}
	for _, p := range slices.Sorted(maps.Keys(list)) {
		if err := unpackFile(files[p], list[p], name, root); err != nil {
			return err
		}
	}
	return nil
}

// fabPath refuses what no app has: names that lead elsewhere, links, devices.
func fabPath(f *zip.File, name string) error {
	p := strings.TrimSuffix(f.Name, "/")
	switch {
	case !utf8.ValidString(p) || strings.ContainsAny(p, "\\\x00\n\r") || p == "" || p == "." || len(p) > 1024:
		return badFAB(name, "%.100q cannot be the name of a file", f.Name)
	case path.IsAbs(p) || path.Clean(p) != p || !filepath.IsLocal(filepath.FromSlash(p)):
		return badFAB(name, "%.100q leads out of the app", f.Name)
	case f.Mode()&fs.ModeSymlink != 0:
		return badFAB(name, "%q is a link", f.Name)
	case !f.Mode().IsRegular() && !f.Mode().IsDir():
		return badFAB(name, "%q is neither a file nor a folder", f.Name)
	case strings.HasPrefix(p, ".info/") && p != fabList, f.Mode().IsDir() != strings.HasSuffix(f.Name, "/"):
		return badFAB(name, "%q does not belong there", f.Name)
	}
	return nil
}

func fabContent(f *zip.File, name string) (map[string]fabEntry, error) {
	if f == nil {
		return nil, badFAB(name, "it has no list of files, %s", fabList)
	}
	if f.UncompressedSize64 > maxFABList {
		return nil, badFAB(name, "its list of files, %s, has more than %d bytes", fabList, maxFABList)
	}
	r, err := f.Open()
	if err != nil {
		return nil, badFAB(name, "%s cannot be read: %v", fabList, err)
	}
	defer r.Close()
	text, err := io.ReadAll(io.LimitReader(r, maxFABList+1))
	if err != nil {
		return nil, badFAB(name, "%s cannot be read: %v", fabList, err)
	}
	list := map[string]fabEntry{}
	n := 0
	for line := range strings.Lines(string(text)) {
		n++
		if line = strings.TrimRight(line, "\r\n"); line == "" {
			continue
		}
		// From the end: a path may have commas.
		rest, bits, ok1 := cutLast(line, ",")
		p, hash, ok2 := cutLast(rest, ",")
		size, err := strconv.ParseUint(bits, 10, 63)
		if _, e := hex.DecodeString(hash); !ok1 || !ok2 || err != nil || size%8 != 0 || e != nil || len(hash) != 2*sha256.Size {
			return nil, badFAB(name, "line %d of %s is not path,sha256,bits: %.100q", n, fabList, line)
		}
		if _, twice := list[p]; twice || p == fabList {
			return nil, badFAB(name, "line %d of %s lists %q, which cannot be", n, fabList, p)
		}
		list[p] = fabEntry{strings.ToLower(hash), size / 8}
	}
	return list, nil
}

func cutLast(s, sep string) (before, after string, found bool) {
	if i := strings.LastIndex(s, sep); i >= 0 {
		return s[:i], s[i+len(sep):], true
	}
	return s, "", false
}

func unpackFile(f *zip.File, e fabEntry, name string, root *os.Root) (err error) {
	r, err := f.Open()
	if err != nil {
		return badFAB(name, "%q cannot be read: %v", f.Name, err)
	}
	defer r.Close()
	failed := func(err error) error {
		if errors.Is(err, fs.ErrExist) || strings.Contains(err.Error(), "not a directory") {
			return badFAB(name, "%q is both a file and a folder", f.Name)
		}
		return problem.Wrap(err, codeOf(err), "make room, or choose another directory", "%q of %s cannot be unpacked", f.Name, name)
	}
	if dir := path.Dir(f.Name); dir != "." {
		if err := root.MkdirAll(filepath.FromSlash(dir), 0o755); err != nil {
			return failed(err)
		}
	}
	out, err := root.OpenFile(filepath.FromSlash(f.Name), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return failed(err)
	}
	defer func() {
		if e := out.Close(); err == nil && e != nil {
			err = failed(e)
		}
	}()
	h := sha256.New()
	src := &zipReader{r: io.LimitReader(r, int64(e.size)+1)}
	n, err := io.Copy(io.MultiWriter(out, h), src)
	switch {
	case src.err != nil:
		return badFAB(name, "%q is damaged: %v", f.Name, src.err)
	case err != nil:
		return failed(err)
	case uint64(n) != e.size || hex.EncodeToString(h.Sum(nil)) != e.hash:
		return badFAB(name, "%q is not what its list of files says: the hash is another", f.Name)
	}
	return nil
}

// zipReader keeps the archive's own error apart from those of the disk.
type zipReader struct {
	r   io.Reader
	err error
}

func (z *zipReader) Read(p []byte) (int, error) {
	n, err := z.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		z.err = err
	}
	return n, err
}
