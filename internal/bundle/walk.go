package bundle

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	human "github.com/dustin/go-humanize"

	"github.com/pergolafl/pergola/internal/problem"
)

// What is never part of an app: what version control, Python, its tools and Pergola itself leave in
// a directory. Compared with names, at any depth.
var (
	excludedNames = []string{
		".git", ".hg", ".svn", ".jj",
		"__pycache__", ".venv", "venv", ".tox", ".nox", ".eggs", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis",
		".ipynb_checkpoints", "node_modules", ".idea", ".vscode", ".DS_Store",
		"pergola-runs", ".pergola",
	}
	excludedPatterns = []string{
		"*.pyc", "*.pyo", "*.egg-info", "*.swp", "*~",
		".#*", // Emacs keeps its locks as links that lead nowhere
	}
	// At the top these two are what `python -m build` leaves, unless they are Python packages.
	buildNames = []string{"build", "dist"}
)

const (
	excludeHint = "exclude of [tool.pergola] in pyproject.toml"
	appDirHint  = "give the directory that holds the app's pyproject.toml"
)

// openApp opens the app's directory and gives its absolute path, for messages.
func openApp(srcDir string) (*os.Root, string, error) {
	const next = appDirHint
	abs, err := filepath.Abs(srcDir)
	if err != nil {
		return nil, "", problem.Wrap(err, problem.AppInvalid, next, "the app directory %q cannot be found", srcDir)
	}
	info, err := os.Stat(abs)
	switch {
	case srcDir == "":
		return nil, "", problem.New(problem.AppInvalid, next, "no app directory is given")
	case errors.Is(err, fs.ErrNotExist):
		if link, err := os.Readlink(abs); err == nil {
			return nil, "", problem.New(problem.AppInvalid, next, "the app directory %s is a link to %s, which does not exist", abs, link)
		}
		return nil, "", problem.New(problem.AppInvalid, next, "the app directory %s does not exist", abs)
	case errors.Is(err, syscall.ELOOP):
		return nil, "", problem.New(problem.AppInvalid, next, "the app directory %s is a symlink loop: following its links never ends", abs)
	case errors.Is(err, syscall.ENOTDIR):
		return nil, "", problem.Wrap(err, problem.AppInvalid, next, "the app directory %s does not exist", abs)
	case err != nil:
		return nil, "", problem.Wrap(err, problem.AppInvalid, next, "the app directory %s cannot be opened", abs)
	case !info.IsDir():
		hint := next
		if filepath.Base(abs) == "pyproject.toml" {
			hint = "give its directory: " + filepath.Dir(abs)
		}
		return nil, "", problem.New(problem.AppInvalid, hint, "%s is %s, not an app directory", abs, kindName(info.Mode()))
	}
	root, err := os.OpenRoot(abs)
	if err != nil {
		return nil, "", problem.Wrap(err, problem.AppInvalid, "make it readable", "the app directory %s cannot be read", abs)
	}
	return root, abs, nil
}

func kindName(m fs.FileMode) string {
	switch {
	case m.IsRegular():
		return "a file"
	case m.IsDir():
		return "a directory"
	case m&fs.ModeNamedPipe != 0:
		return "a named pipe"
	case m&fs.ModeSocket != 0:
		return "a socket"
	case m&fs.ModeDevice != 0:
		return "a device"
	case m&fs.ModeSymlink != 0:
		return "a link"
	}
	return "something else than a file"
}

type walker struct {
	root    *os.Root
	abs     string
	exclude []string
	lim     Limits

	files   []Entry
	dirs    int // folders without an entry of their own
	bytes   int64
	use     map[string]usage
	stopped bool // the rest was not looked at

	bad     error // about badPath, the first path that no bundle may hold
	badPath string
}

// refuse keeps the problem of the first path in order: folders come in the file system's order, and the
// same app should give the same message.
func (w *walker) refuse(p string, err error) {
	if w.bad == nil || p < w.badPath {
		w.bad, w.badPath = err, p
	}
}

func (w *walker) count() int { return len(w.files) + w.dirs }

// usage is what a folder, with all below it, or a file takes.
type usage struct {
	bytes int64
	files int
	dir   bool
}

// How far the walk goes on beyond the limit on files, to say which folder it is that is too big, before
// it is content to say "at least": somebody who gives / waits a second, not minutes.
const walkFactor = 3

// walk lists the app's files by what the directories say of them; it reads no file. Entries have no digests yet.
func walk(root *os.Root, abs string, exclude []string, lim Limits) ([]Entry, error) {
	w := &walker{root: root, abs: abs, exclude: exclude, lim: lim, use: map[string]usage{}}
	for _, p := range exclude {
		if _, err := path.Match(strings.TrimSuffix(p, "/"), "x"); err != nil || strings.Trim(p, "/") == "" {
			return nil, problem.New(problem.AppInvalid, "write it as Go's path.Match has it: * ? [a-z], and \\ before a character that stands for itself",
				"%q in %s is not a pattern", p, excludeHint)
		}
	}
	w.dir(".")
	if w.stopped || w.bytes > lim.MaxBytes || w.count() > lim.MaxFiles {
		return nil, w.tooBig()
	}
	if w.bad != nil {
		return nil, w.bad
	}
	if !slices.ContainsFunc(w.files, func(e Entry) bool { return e.Kind != Dir }) {
		return nil, problem.New(problem.AppInvalid, appDirHint,
			"the app directory %s is empty, or has nothing but what is left out (.git, __pycache__, .venv, …)", abs)
	}
	slices.SortFunc(w.files, func(a, b Entry) int { return strings.Compare(a.Path, b.Path) })
	t, err := newTree(w.files, lim.MaxFiles)
	if err == nil {
		err = t.checkLinks()
	}
	if err != nil {
		return nil, w.badLink(err)
	}
	return w.files, nil
}

// dir walks one directory and tells whether anything in it is kept.
func (w *walker) dir(name string) (kept bool) {
	before := usage{bytes: w.bytes, files: w.count(), dir: true}
	subdirs, kept := w.list(name)
	slices.Sort(subdirs)
	for _, p := range subdirs {
		if w.stopped {
			break
		}
		if err := checkPath(p); err != nil {
			w.refuse(p, w.badName(err))
			continue
		}
		// A virtual environment, whatever its name: thousands of files that fit no other machine.
		if _, err := w.root.Lstat(filepath.FromSlash(path.Join(p, "pyvenv.cfg"))); err == nil {
			w.dirs--
			continue
		}
		kept = true
		if !w.dir(p) {
			w.dirs--
			w.files = append(w.files, Entry{Path: p, Kind: Dir})
		}
	}
	w.use[name] = usage{bytes: w.bytes - before.bytes, files: w.count() - before.files, dir: true}
	return kept
}

// list takes up the files of one directory and gives its folders.
func (w *walker) list(name string) (subdirs []string, kept bool) {
	d, err := w.root.Open(filepath.FromSlash(name))
	if err != nil {
		w.refuse(name, unreadable(err, name, w.abs))
		return nil, true
	}
	defer d.Close()
	for {
		// In portions: a directory may have millions of entries.
		entries, err := d.ReadDir(1024)
		for _, de := range entries {
			p := path.Join(name, de.Name())
			if w.excluded(p, de.Name(), de.IsDir(), name == ".") {
				continue
			}
			info, err := de.Info()
			switch {
			case errors.Is(err, fs.ErrNotExist): // gone since
				continue
			case err != nil:
				w.refuse(p, unreadable(err, p, w.abs))
			case info.IsDir():
				subdirs = append(subdirs, p)
				w.dirs++
			default:
				kept = true
				w.file(p, info)
			}
			if w.count() > walkFactor*w.lim.MaxFiles {
				w.stopped = true
				return subdirs, kept
			}
		}
		if errors.Is(err, io.EOF) {
			return subdirs, kept
		}
		if err != nil {
			w.refuse(name, unreadable(err, name, w.abs))
			return subdirs, true
		}
	}
}

func (w *walker) badName(err error) error {
	return problem.New(problem.AppInvalid, "rename it, or list it in "+excludeHint, "the app directory %s cannot be packed: %v", w.abs, err)
}

func (w *walker) badLink(err error) error {
	return problem.New(problem.AppInvalid, "replace the link by what it leads to, have it point to another place in the app by a relative path, or list it in "+excludeHint,
		"the app directory %s cannot be packed: %v", w.abs, err)
}

// file takes up what is not a directory.
func (w *walker) file(p string, info fs.FileInfo) {
	e := Entry{Path: p, Kind: File, Size: info.Size(), Exec: info.Mode()&0o100 != 0}
	if err := checkPath(p); err != nil {
		w.refuse(p, w.badName(err))
	}
	switch {
	case info.Mode()&fs.ModeSymlink != 0:
		e = Entry{Path: p, Kind: Link}
		var err error
		if e.Target, err = w.root.Readlink(filepath.FromSlash(p)); err != nil {
			w.refuse(p, unreadable(err, p, w.abs))
		} else if err := checkTarget(e); err != nil {
			w.refuse(p, w.badLink(err))
		}
	case !info.Mode().IsRegular():
		w.refuse(p, problem.New(problem.AppInvalid, "remove it, or list it in "+excludeHint,
			"%q in the app directory %s is %s, which cannot be packed", p, w.abs, kindName(info.Mode())))
	}
	w.files = append(w.files, e)
	w.bytes += e.Size
	if path.Dir(p) == "." || e.Size >= w.lim.MaxBytes/8 {
		w.use[p] = usage{bytes: e.Size, files: 1}
	}
}

func (w *walker) excluded(p, name string, isDir, top bool) bool {
	if slices.Contains(excludedNames, name) {
		return true
	}
	for _, pattern := range excludedPatterns {
		if ok, _ := path.Match(pattern, name); ok {
			return true
		}
	}
	if top && isDir && slices.Contains(buildNames, name) {
		if _, err := w.root.Lstat(filepath.Join(name, "__init__.py")); err != nil {
			return true
		}
	}
	for _, pattern := range w.exclude {
		pattern, dirOnly := strings.CutSuffix(strings.TrimPrefix(pattern, "./"), "/")
		subject := name
		if strings.Contains(pattern, "/") {
			pattern, subject = strings.TrimPrefix(pattern, "/"), p
		}
		if ok, _ := path.Match(pattern, subject); ok && (isDir || !dirOnly) {
			return true
		}
	}
	return false
}

// tooBig says by how much the app is too big, and where that lies.
func (w *walker) tooBig() error {
	var limits []string
	files := w.count()
	weight := func(u usage) int64 { return u.bytes }
	if w.bytes > w.lim.MaxBytes {
		limits = append(limits, human.IBytes(uint64(w.lim.MaxBytes)))
	}
	if files > w.lim.MaxFiles {
		limits = append(limits, human.Comma(int64(w.lim.MaxFiles))+" files and folders")
		if w.bytes <= w.lim.MaxBytes {
			weight = func(u usage) int64 { return int64(u.files) }
		}
	}
	children := map[string][]string{}
	for p := range w.use {
		if p != "." {
			children[path.Dir(p)] = append(children[path.Dir(p)], p)
		}
	}
	for _, c := range children {
		slices.SortFunc(c, func(a, b string) int {
			return cmp.Or(cmp.Compare(weight(w.use[b]), weight(w.use[a])), strings.Compare(a, b))
		})
	}
	var biggest []string
	for _, p := range children["."][:min(3, len(children["."]))] {
		// Name src/app/data rather than src where nearly all of src is that.
		for c := children[p]; len(c) > 0 && weight(w.use[c[0]])*5 >= weight(w.use[p])*4; c = children[p] {
			p = c[0]
		}
		u := w.use[p]
		if weight(u)*20 < weight(w.use["."]) && len(biggest) > 0 {
			break
		}
		if u.dir {
			biggest = append(biggest, fmt.Sprintf("%q (%s in %s files)", p+"/", human.IBytes(uint64(u.bytes)), human.Comma(int64(u.files))))
		} else {
			biggest = append(biggest, fmt.Sprintf("%q (%s)", p, human.IBytes(uint64(u.bytes))))
		}
	}
	atLeast := ""
	if w.stopped {
		atLeast = "at least "
	}
	return problem.New(problem.AppInvalid,
		"keep data outside of the app directory (each site brings its own), or list it in "+excludeHint,
		"the app directory %s is too big to be sent: it has %s%s in %s files and folders, the limit is %s; the biggest are %s",
		w.abs, atLeast, human.IBytes(uint64(w.bytes)), human.Comma(int64(files)), strings.Join(limits, " and "), strings.Join(biggest, ", "))
}
