package bundle

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path"
	"path/filepath"
	"syscall"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/pergolafl/pergola/internal/problem"
)

const tryAgain = "submit the job again; if it happens again, the bundle was changed on its way"

func invalid(format string, args ...any) error {
	return problem.New(problem.BundleInvalid, tryAgain, "the bundle is not what it should be: "+format, args...)
}

// Extract unpacks the bundle that r has into the directory dst, which must not exist (its parent must). It writes to
// dst+".partial", which it removes if anything is wrong, makes it durable and renames it: dst is there as a
// whole or not at all, also after a power cut. wantDigest is what the bundle was announced as; empty where nothing was
// announced. Nothing is written that manifest and limits do not allow, and nothing outside of dst.
//
// Errors are problems: BundleInvalid for a damaged or hostile bundle, DiskFull, Exists when dst is there or another
// Extract is at it. An error of r other than io.EOF is returned wrapped, as the sender's affair.
func Extract(r io.Reader, dst, wantDigest string, lim Limits) (_ *Manifest, err error) {
	lim = lim.orDefaults()
	dst, err = filepath.Abs(dst)
	if err != nil {
		return nil, diskProblem(err, dst)
	}
	if _, err := os.Lstat(dst); !errors.Is(err, fs.ErrNotExist) {
		if err != nil {
			return nil, diskProblem(err, dst)
		}
		return nil, problem.New(problem.Exists, "remove it, or use another directory", "%s exists already", dst)
	}
	partial := dst + ".partial"
	root, release, err := claim(partial)
	if err != nil {
		return nil, err
	}
	defer release()
	defer root.Close()
	defer func() {
		if err != nil {
			if e := os.RemoveAll(partial); e != nil {
				err = errors.Join(err, e)
			}
		}
	}()

	source := &sourceReader{r: r}
	x := &extractor{root: root, dst: dst, buf: make([]byte, 256<<10)}
	m, err := x.run(source, wantDigest, lim)
	if source.err != nil {
		return nil, fmt.Errorf("read bundle: %w", source.err)
	}
	if err != nil {
		return nil, err
	}
	if err := syncTree(partial); err != nil {
		return nil, diskProblem(err, dst)
	}
	if err := os.Rename(partial, dst); err != nil {
		return nil, diskProblem(err, dst)
	}
	// The directory above too: after a power cut the rename alone may be gone.
	if err := syncPath(filepath.Dir(dst)); err != nil {
		return nil, diskProblem(err, dst)
	}
	return m, nil
}

// Check reads a bundle as Extract does, and writes nothing. Its errors are those of Extract.
func Check(r io.Reader, wantDigest string, lim Limits) (*Manifest, error) {
	source := &sourceReader{r: r}
	x := &extractor{buf: make([]byte, 256<<10)}
	m, err := x.run(source, wantDigest, lim.orDefaults())
	if source.err != nil {
		return nil, fmt.Errorf("read bundle: %w", source.err)
	}
	return m, err
}

// space refuses what cannot fit before anything of it is written.
func space(dir string, need int64) error {
	var st unix.Statfs_t
	if unix.Statfs(dir, &st) != nil || st.Blocks == 0 {
		return nil //nolint:nilerr // not every file system tells; writing will
	}
	if free := st.Bavail * uint64(st.Bsize); need > 0 && uint64(need) > free {
		return fmt.Errorf("%d bytes are to be written, and %d are free: %w", need, free, syscall.ENOSPC)
	}
	return nil
}

func diskProblem(err error, dst string) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return problem.Wrap(err, problem.DiskFull, "free some space there", "there is no space left where the bundle is unpacked, %s", dst)
	}
	return problem.Wrap(err, problem.Internal, "look at the directory's permissions and file system", "the bundle cannot be unpacked to %s", dst)
}

// claim makes an empty directory at partial, also from what an interrupted Extract left, and keeps others from it
// until release is called.
func claim(partial string) (_ *os.Root, release func(), err error) {
	if err := os.Mkdir(partial, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, nil, diskProblem(err, partial)
	}
	root, err := os.OpenRoot(partial)
	if err != nil {
		return nil, nil, diskProblem(err, partial)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, root.Close())
		}
	}()
	lock, err := root.Open(".")
	if err != nil {
		return nil, nil, diskProblem(err, partial)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, lock.Close())
		}
	}()
	busy := problem.New(problem.Exists, "wait for it to end", "%s is being unpacked already", partial)
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, nil, busy
		}
		return nil, nil, diskProblem(err, partial)
	}
	// Between opening and locking another one may have finished and renamed it.
	here, err1 := lock.Stat()
	there, err2 := os.Lstat(partial)
	if err1 != nil || err2 != nil || !os.SameFile(here, there) {
		return nil, nil, busy
	}
	names, err := lock.Readdirnames(-1)
	if err != nil {
		return nil, nil, diskProblem(err, partial)
	}
	for _, name := range names {
		if err := root.RemoveAll(name); err != nil {
			return nil, nil, diskProblem(err, partial)
		}
	}
	return root, func() { _ = lock.Close() }, nil
}

type extractor struct {
	root *os.Root // nil: nothing is written
	dst  string
	tar  *tar.Reader
	buf  []byte
}

func (x *extractor) run(r io.Reader, wantDigest string, lim Limits) (*Manifest, error) {
	// MaxMemory bounds the window that a stream may ask for, which is all that the decoder keeps.
	z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(8<<20), zstd.WithDecoderLowmem(true))
	if err != nil {
		return nil, invalid("it cannot be decompressed: %v", err)
	}
	defer z.Close()
	x.tar = tar.NewReader(z)

	encoded, err := x.part(manifestName, nil, MaxManifest)
	if err != nil {
		return nil, err
	}
	if digest := "sha256:" + sum(encoded); wantDigest != "" && digest != wantDigest {
		return nil, invalid("its digest is %s, announced was %s", digest, wantDigest)
	}
	m, err := ParseManifest(encoded, lim)
	if err != nil {
		return nil, invalid("%v", err)
	}
	if x.root != nil {
		if err := space(filepath.Dir(x.dst), m.Size()); err != nil {
			return nil, diskProblem(err, x.dst)
		}
	}
	if _, err := x.part(lockName, &m.Lock, MaxPart); err != nil {
		return nil, err
	}
	if _, err := x.part(jobName, &m.Job, MaxPart); err != nil {
		return nil, err
	}
	if err := x.mkdir(appName); err != nil {
		return nil, err
	}
	for _, e := range m.Files {
		if err := x.entry(e); err != nil {
			return nil, err
		}
	}
	switch h, err := x.tar.Next(); {
	case err == nil:
		return nil, invalid("%q is in it, but not in its manifest", h.Name)
	case !errors.Is(err, io.EOF):
		return nil, invalid("it is damaged at its end: %v", err)
	}
	// Reading to the end checks zstd's own checksum, and that nothing is hidden behind the archive.
	if n, err := io.CopyN(io.Discard, z, 1); n != 0 || !errors.Is(err, io.EOF) {
		return nil, invalid("something follows its end")
	}
	// Links come last: there is none while files are being written.
	for _, e := range m.Files {
		if e.Kind == Link && x.root != nil {
			if err := x.root.Symlink(e.Target, filepath.FromSlash(path.Join(appName, e.Path))); err != nil {
				return nil, diskProblem(err, x.dst)
			}
		}
	}
	return m, nil
}

// next goes to the archive's next entry, which must be exactly what the manifest makes of it: same name, type,
// size and mode (so no setuid bits), no other attributes of consequence.
func (x *extractor) next(name string, want Entry, sized bool) error {
	h, err := x.tar.Next()
	if errors.Is(err, io.EOF) {
		return invalid("it ends before %q", name)
	}
	if err != nil {
		return invalid("it is damaged before %q: %v", name, err)
	}
	w := header(name, want)
	if !sized {
		w.Size = h.Size
	}
	if h.Name != w.Name {
		return invalid("%.200q is where %q should be", h.Name, w.Name)
	}
	if h.Typeflag != w.Typeflag || h.Size != w.Size || h.Mode != w.Mode || h.Linkname != w.Linkname {
		return invalid("the type, size, mode or target of %q is not as its manifest says", name)
	}
	return nil
}

// part reads and writes one of the parts that are no files of the app. want is nil for the manifest itself.
func (x *extractor) part(name string, want *Part, limit int64) ([]byte, error) {
	e := Entry{Kind: File}
	if want != nil {
		e.Size = want.Size
	}
	if err := x.next(name, e, want != nil); err != nil {
		return nil, err
	}
	data, err := io.ReadAll(io.LimitReader(x.tar, limit+1))
	switch {
	case err != nil:
		return nil, invalid("it is damaged in %q: %v", name, err)
	case int64(len(data)) > limit:
		return nil, invalid("%q has more than %d bytes", name, limit)
	case want != nil && sum(data) != want.SHA256:
		return nil, invalid("%q is damaged: its digest is another than the manifest's", name)
	}
	if _, err := x.write(name, 0o644, bytes.NewReader(data)); err != nil {
		return nil, err
	}
	return data, nil
}

func (x *extractor) entry(e Entry) error {
	name := appName + "/" + e.Path
	if err := x.next(name, e, true); err != nil {
		return err
	}
	switch e.Kind {
	case Link:
		return x.mkdir(path.Dir(name))
	case Dir:
		return x.mkdir(name)
	}
	if err := x.mkdir(path.Dir(name)); err != nil {
		return err
	}
	mode := fs.FileMode(0o644)
	if e.Exec {
		mode = 0o755
	}
	h := sha256.New()
	n, err := x.write(name, mode, io.TeeReader(x.tar, h))
	if err != nil {
		return err
	}
	if n != e.Size || hexSum(h) != e.SHA256 {
		return invalid("%q is damaged: its digest is another than the manifest's", name)
	}
	return nil
}

func (x *extractor) mkdir(name string) error {
	if x.root == nil {
		return nil
	}
	if err := x.root.MkdirAll(filepath.FromSlash(name), 0o755); err != nil {
		return diskProblem(err, x.dst)
	}
	return nil
}

// write makes a new file of what r has.
func (x *extractor) write(name string, mode fs.FileMode, r io.Reader) (n int64, err error) {
	if x.root == nil {
		if n, err = io.CopyBuffer(struct{ io.Writer }{io.Discard}, r, x.buf); err != nil {
			err = invalid("it is damaged in %q: %v", name, err)
		}
		return n, err
	}
	f, err := x.root.OpenFile(filepath.FromSlash(name), os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return 0, diskProblem(err, x.dst)
	}
	defer func() {
		if e := f.Close(); e != nil && err == nil {
			err = diskProblem(e, x.dst)
		}
	}()
	source := &sourceReader{r: r}
	n, err = io.CopyBuffer(struct{ io.Writer }{f}, source, x.buf)
	if source.err != nil {
		return n, invalid("it is damaged in %q: %v", name, source.err)
	}
	if err != nil {
		return n, diskProblem(err, x.dst)
	}
	// Whatever the umask, the same bundle gives the same modes.
	if err := f.Chmod(mode); err != nil {
		return n, diskProblem(err, x.dst)
	}
	return n, nil
}

// syncTree makes all below dir durable. Several at a time, because a journaling file system commits them together.
func syncTree(dir string) error {
	var g errgroup.Group
	g.SetLimit(8)
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err == nil && (d.IsDir() || d.Type().IsRegular()) {
			g.Go(func() error { return syncPath(p) })
		}
		return err
	})
	return errors.Join(err, g.Wait())
}

func syncPath(p string) error {
	f, err := os.Open(p)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// Contents is an extracted bundle.
type Contents struct {
	Manifest *Manifest
	Digest   string
	Lock     []byte
	Job      []byte // JSON
	AppDir   string // absolute
}

// Read opens what Extract wrote to dir and holds manifest, lock and job against each other; it does not digest the
// app's files again, and sets no limits: Extract had them. BundleInvalid if they do not fit, NotFound if there is no bundle.
func Read(dir string) (*Contents, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, diskProblem(err, dir)
	}
	encoded, err := readPart(dir, manifestName, MaxManifest)
	if err != nil {
		return nil, err
	}
	c := &Contents{Digest: "sha256:" + sum(encoded), AppDir: filepath.Join(dir, appName)}
	if c.Manifest, err = ParseManifest(encoded, Limits{math.MaxInt64, math.MaxInt}); err != nil {
		return nil, invalid("%v", err)
	}
	for _, p := range []struct {
		name string
		want Part
		to   *[]byte
	}{{lockName, c.Manifest.Lock, &c.Lock}, {jobName, c.Manifest.Job, &c.Job}} {
		data, err := readPart(dir, p.name, MaxPart)
		if err != nil {
			return nil, err
		}
		if sum(data) != p.want.SHA256 {
			return nil, invalid("%q in %s is damaged: its digest is another than the manifest's", p.name, dir)
		}
		*p.to = data
	}
	return c, nil
}

func readPart(dir, name string, limit int64) (_ []byte, err error) {
	f, err := os.Open(filepath.Join(dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, problem.Wrap(err, problem.NotFound, "unpack it first", "there is no bundle in %s", dir)
	}
	if err != nil {
		return nil, problem.Wrap(err, problem.Internal, "look at the directory's permissions and file system", "the bundle in %s cannot be read", dir)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, problem.Wrap(err, problem.Internal, "look at the directory's permissions and file system", "the bundle in %s cannot be read", dir)
	}
	if int64(len(data)) > limit {
		return nil, invalid("%q in %s has more than %d bytes", name, dir, limit)
	}
	return data, nil
}
