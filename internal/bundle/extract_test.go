package bundle

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/pergolafl/pergola/internal/problem"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv("BUNDLE_TEST_FULL"); dir != "" {
		os.Exit(extractToFullDisk(dir))
	}
	goleak.VerifyTestMain(m)
}

// member is one entry of a hand-made archive.
type member struct {
	tar.Header
	data string
}

func regular(name, data string) member {
	return member{tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(data))}, data}
}

func pack(t testing.TB, members ...member) []byte {
	t.Helper()
	var b bytes.Buffer
	z, err := zstd.NewWriter(&b, zstd.WithEncoderConcurrency(1))
	must(t, err)
	w := tar.NewWriter(z)
	for _, m := range members {
		must(t, w.WriteHeader(&m.Header))
		_, err := io.WriteString(w, m.data)
		must(t, err)
	}
	must(t, w.Close())
	must(t, z.Close())
	return b.Bytes()
}

// manifestOf gives a manifest of these entries, unchecked; files without a digest have the content of their path.
func manifestOf(t testing.TB, entries ...Entry) string {
	t.Helper()
	m := Manifest{
		Format: Format, App: Meta{"a", "1"}, Files: entries,
		Lock: Part{4, sum([]byte("lock"))}, Job: Part{2, sum([]byte("{}"))},
	}
	for i, e := range m.Files {
		if e.Kind == File && e.SHA256 == "" {
			m.Files[i].Size, m.Files[i].SHA256 = int64(len(e.Path)), sum([]byte(e.Path))
		}
	}
	b, err := m.Encode()
	must(t, err)
	return string(b)
}

func file(path string) Entry         { return Entry{Path: path, Kind: File} }
func link(path, target string) Entry { return Entry{Path: path, Kind: Link, Target: target} }

// outer gives the members before the app's files.
func outer(manifest string) []member {
	return []member{regular("manifest.json", manifest), regular("lock.txt", "lock"), regular("job.json", "{}")}
}

// refused checks that Extract refuses the bundle and leaves nothing behind, inside of dst or out.
func refused(t *testing.T, packed []byte, digest string, lim Limits, parts ...string) {
	t.Helper()
	parent := t.TempDir()
	_, err := Extract(bytes.NewReader(packed), filepath.Join(parent, "dst"), digest, lim)
	wantProblem(t, err, problem.BundleInvalid, parts...)
	if left := found(t, parent); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestExtractRefusesManifests(t *testing.T) {
	many := make([]Entry, 9)
	for i := range many {
		many[i] = file(fmt.Sprint(i))
	}
	ok := manifestOf(t, file("a"))
	small := Limits{MaxBytes: 100, MaxFiles: 8}
	for name, c := range map[string]struct{ manifest, want string }{
		"no JSON":                     {"x", "cannot be read"},
		"another format":              {strings.Replace(ok, Format, "pergola-bundle/2", 1), `format "pergola-bundle/2", this program knows "pergola-bundle/1"`},
		"an unknown field":            {strings.Replace(ok, `"format"`, `"extra":1,"format"`, 1), "unknown field"},
		"a field twice":               {strings.Replace(ok, `"format"`, `"format":"x","format"`, 1), "canonical"},
		"other spacing":               {strings.Replace(ok, `:`, `: `, 1), "canonical"},
		"something after it":          {ok + "{}", "canonical"},
		"case of keys":                {strings.Replace(ok, `"path"`, `"Path"`, 1), "canonical"},
		"an absolute path":            {manifestOf(t, file("/etc/passwd")), "not a path inside"},
		"a path upward":               {manifestOf(t, file("../x")), "not a path inside"},
		"a path upward in the middle": {manifestOf(t, file("a/../../x")), "not a path inside"},
		"an empty path":               {manifestOf(t, file("")), "not a path inside"},
		"the directory itself":        {manifestOf(t, Entry{Path: ".", Kind: Dir}), "not a path inside"},
		"a NUL":                       {manifestOf(t, file("a\x00b")), "control"},
		"an endless name":             {manifestOf(t, file(strings.Repeat("a", 256))), "255 bytes"},
		"an endless path":             {manifestOf(t, file(strings.Repeat("a/", 600)+"b")), "longer than"},
		"a deep path":                 {manifestOf(t, file(strings.Repeat("a/", 64)+"b")), "folders deep"},
		"no order":                    {manifestOf(t, file("b"), file("a")), "out of order"},
		"a path twice":                {manifestOf(t, file("a"), file("a")), "there twice"},
		"a file in a file":            {manifestOf(t, file("a"), file("a/b")), "both a file and a folder"},
		"a file through a link":       {manifestOf(t, link("a", "b"), file("a/x"), file("b/y")), "both a link and a folder"},
		"a folder listed with files":  {manifestOf(t, Entry{Path: "a", Kind: Dir}, file("a/b")), "listed as a dir"},
		"a file far below a file":     {manifestOf(t, file("a"), file("a/b/c/d")), "both a file and a folder"},
		"a listed folder, files deep": {manifestOf(t, Entry{Path: "a", Kind: Dir}, file("a/b/c")), "listed as a dir"},
		"a deep folder in itself":     {manifestOf(t, file("a/b/c/f"), link("a/b/c/l", "../..")), "contain itself"},
		"an unknown kind":             {manifestOf(t, Entry{Path: "a", Kind: "device"}), "unknown kind"},
		"no digest":                   {manifestOf(t, Entry{Path: "a", Kind: File, SHA256: "x"}), "no proper size"},
		"capital digest":              {manifestOf(t, Entry{Path: "a", Kind: File, SHA256: strings.Repeat("A", 64)}), "no proper size"},
		"negative size":               {manifestOf(t, Entry{Path: "a", Kind: File, Size: -1, SHA256: sum(nil)}), "no proper size"},
		"too big":                     {manifestOf(t, Entry{Path: "a", Kind: File, Size: 101, SHA256: sum(nil)}), "more than 100 bytes"},
		"too big together":            {manifestOf(t, Entry{Path: "a", Kind: File, Size: 60, SHA256: sum(nil)}, Entry{Path: "b", Kind: File, Size: 60, SHA256: sum(nil)}), "more than 100 bytes"},
		"so big that it is negative":  {manifestOf(t, Entry{Path: "a", Kind: File, Size: 1<<63 - 1, SHA256: sum(nil)}, Entry{Path: "b", Kind: File, Size: 1<<63 - 1, SHA256: sum(nil)}), "more than 100 bytes"},
		"too many":                    {manifestOf(t, many...), "more than 8 files"},
		"too many folders":            {manifestOf(t, file("a/b/c/d/e/f/g/h")), ""},
		"an absolute link":            {manifestOf(t, link("a", "/etc")), "absolute"},
		"a link upward":               {manifestOf(t, link("a", "../x")), "outside"},
		"a link to nothing":           {manifestOf(t, link("a", "b")), "not in the app"},
		"a link without target":       {manifestOf(t, link("a", "")), "improper target"},
		"a link to itself":            {manifestOf(t, link("a", "a")), "leads to itself"},
		"links to one another":        {manifestOf(t, link("a", "b"), link("b", "a")), "leads to itself"},
		"a folder in itself":          {manifestOf(t, file("a/f"), link("a/l", "../a")), "contain itself"},
		"a link of many steps":        {manifestOf(t, file("d/f"), link("l", strings.Repeat("d/../", 200)+"d/f"), link("m", strings.Repeat("l/", 10))), "not in the app"},
		"a link that is a file too":   {manifestOf(t, Entry{Path: "a", Kind: Link, Target: "b", Size: 1}, file("b")), "file's properties"},
		"a folder with a target":      {manifestOf(t, Entry{Path: "a", Kind: Dir, Target: "b"}), "file's properties"},
		"a lock beyond bounds":        {strings.Replace(ok, `"lock":{"size":4`, `"lock":{"size":99999999`, 1), "lock.txt has no proper size"},
	} {
		t.Run(name, func(t *testing.T) {
			if name == "too many folders" { // 7 folders and a file: just allowed
				if _, err := ParseManifest([]byte(c.manifest), small); err != nil {
					t.Error(err)
				}
				_, err := ParseManifest([]byte(c.manifest), Limits{MaxFiles: 7})
				if err == nil {
					t.Error("8 files and folders are taken where 7 are allowed")
				}
				return
			}
			refused(t, pack(t, outer(c.manifest)...), "", small, c.want)
		})
	}
}

func TestExtractRefusesArchives(t *testing.T) {
	one := manifestOf(t, file("a"), file("b"))
	a, b := regular("app/a", "a"), regular("app/b", "b")
	with := func(m member, change func(*member)) member { change(&m); return m }
	evil := func(name string) member { return regular(name, "evil") }
	for name, c := range map[string]struct {
		members []member
		want    string
	}{
		"nothing":              {nil, `ends before "manifest.json"`},
		"no manifest":          {[]member{regular("lock.txt", "lock")}, `"lock.txt" is where "manifest.json"`},
		"another lock":         {[]member{regular("manifest.json", one), regular("lock.txt", "kcol")}, `"lock.txt" is damaged`},
		"a longer lock":        {[]member{regular("manifest.json", one), regular("lock.txt", "locks")}, `not as its manifest says`},
		"a missing file":       {append(outer(one), a), `ends before "app/b"`},
		"files in wrong order": {append(outer(one), b, a), `"app/b" is where "app/a"`},
		"an extra file":        {append(outer(one), a, b, evil("app/c")), `"app/c" is in it, but not in its manifest`},
		"an absolute name":     {append(outer(one), a, b, evil("/etc/cron.d/x")), `not in its manifest`},
		"a name upward":        {append(outer(one), evil("app/../../x")), `is where "app/a"`},
		"a file twice":         {append(outer(one), a, a, b), `"app/a" is where "app/b"`},
		"other content":        {append(outer(one), a, regular("app/b", "c")), `"app/b" is damaged`},
		"setuid":               {append(outer(one), with(a, func(m *member) { m.Mode = 0o4755 }), b), "mode"},
		"executable, not said": {append(outer(one), with(a, func(m *member) { m.Mode = 0o755 }), b), "mode"},
		"a link for a file":    {append(outer(one), member{Header: tar.Header{Name: "app/a", Typeflag: tar.TypeSymlink, Linkname: "/etc", Mode: 0o777}}), "type"},
		"a hard link":          {append(outer(one), member{Header: tar.Header{Name: "app/a", Typeflag: tar.TypeLink, Linkname: "/etc/passwd", Mode: 0o644}}), "type"},
		"a device":             {append(outer(one), member{Header: tar.Header{Name: "app/a", Typeflag: tar.TypeChar, Devmajor: 1, Mode: 0o644}}), "type"},
		"a fifo":               {append(outer(one), member{Header: tar.Header{Name: "app/a", Typeflag: tar.TypeFifo, Mode: 0o644}}), "type"},
		"another target": {append(outer(manifestOf(t, file("a"), link("b", "a"))), a,
			member{Header: tar.Header{Name: "app/b", Typeflag: tar.TypeSymlink, Linkname: "/etc", Mode: 0o777}}), "target"},
	} {
		t.Run(name, func(t *testing.T) { refused(t, pack(t, c.members...), "", Limits{}, c.want) })
	}
}

func TestExtractRefusesStreams(t *testing.T) {
	b := build(t, plant(t, map[string]string{"a.py": strings.Repeat("import a\n", 1000), "b.py": "b"}), testInput)
	good := written(t, b)
	refused(t, good, "sha256:"+strings.Repeat("0", 64), Limits{}, "its digest is "+b.Digest+", announced was sha256:00")
	refused(t, good, b.Digest, Limits{MaxBytes: 1000}, "more than 1000 bytes")
	refused(t, good, b.Digest, Limits{MaxFiles: 1}, "more than 1 files and folders")
	refused(t, nil, "", Limits{})
	refused(t, []byte("no zstd at all"), "", Limits{})
	for n := range len(good) {
		if n%7 != 0 && n < len(good)-10 {
			continue
		}
		refused(t, good[:n], b.Digest, Limits{})
		damaged := slices.Clone(good)
		damaged[n] ^= 0x10
		if _, err := Extract(bytes.NewReader(damaged), filepath.Join(t.TempDir(), "dst"), b.Digest, Limits{}); err != nil {
			wantProblem(t, err, problem.BundleInvalid)
		}
	}

	raw := func(tail []byte, opts ...zstd.EOption) []byte {
		z, err := zstd.NewReader(bytes.NewReader(good))
		must(t, err)
		defer z.Close()
		plain, err := io.ReadAll(z)
		must(t, err)
		var out bytes.Buffer
		w, err := zstd.NewWriter(&out, opts...)
		must(t, err)
		_, err = w.Write(append(plain, tail...))
		must(t, err)
		must(t, w.Close())
		return out.Bytes()
	}
	refused(t, raw([]byte("hidden")), b.Digest, Limits{}, "something follows its end")
	refused(t, raw(make([]byte, 1<<10)), b.Digest, Limits{}, "something follows its end")
	// A window of 64 MiB is what a hostile sender asks for to have us allocate it.
	refused(t, raw(make([]byte, 65<<20), zstd.WithWindowSize(64<<20), zstd.WithSingleSegment(false)), b.Digest, Limits{}, "window size exceeded")
}

func TestExtractGivesReadersError(t *testing.T) {
	b := build(t, plant(t, sample), testInput)
	cut := errors.New("connection lost")
	for _, n := range []int{0, 1, 100, len(written(t, b)) / 2} {
		parent := t.TempDir()
		r := io.MultiReader(bytes.NewReader(written(t, b)[:n]), iotest.ErrReader(cut))
		if _, err := Extract(r, filepath.Join(parent, "dst"), b.Digest, Limits{}); !errors.Is(err, cut) || problem.CodeOf(err) == problem.BundleInvalid {
			t.Errorf("cut off after %d bytes: %v", n, err)
		}
		if left := found(t, parent); len(left) != 0 {
			t.Errorf("left behind: %v", left)
		}
	}
	dst := filepath.Join(t.TempDir(), "dst")
	_, err := Extract(iotest.OneByteReader(bytes.NewReader(written(t, b))), dst, b.Digest, Limits{})
	must(t, err)
}

func TestExtractDestination(t *testing.T) {
	b := build(t, plant(t, map[string]string{"a": "a"}), testInput)
	packed := written(t, b)
	extract := func(dst string) error {
		_, err := Extract(bytes.NewReader(packed), dst, b.Digest, Limits{})
		return err
	}
	parent := t.TempDir()
	dst := filepath.Join(parent, "dst")

	// What an interrupted one left is cleared away.
	must(t, os.MkdirAll(dst+".partial/app/old/older", 0o755))
	must(t, os.WriteFile(dst+".partial/manifest.json", nil, 0o400))
	must(t, os.Symlink(parent, dst+".partial/link"))
	must(t, extract(dst))
	if diff := cmp.Diff([]string{"app/a", "job.json", "lock.txt", "manifest.json"}, slices.Sorted(maps.Keys(found(t, dst)))); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}

	wantProblem(t, extract(dst), problem.Exists, dst+" exists already")
	must(t, os.Symlink("nowhere", filepath.Join(parent, "link")))
	wantProblem(t, extract(filepath.Join(parent, "link")), problem.Exists)
	must(t, os.Mkdir(filepath.Join(parent, "other"), 0o755))
	must(t, os.Symlink("other", filepath.Join(parent, "trap.partial")))
	wantProblem(t, extract(filepath.Join(parent, "trap")), problem.Exists, "already")
	wantProblem(t, extract(filepath.Join(parent, "none", "dst")), problem.Internal)

	// Two at a time: one is told so, and what the other makes is whole.
	pr, pw := io.Pipe()
	var wg sync.WaitGroup
	var first error
	twice := filepath.Join(parent, "twice")
	wg.Go(func() { _, first = Extract(pr, twice, b.Digest, Limits{}) })
	_, err := pw.Write(packed[:1]) // taken: the first one has its directory
	must(t, err)
	wantProblem(t, extract(twice), problem.Exists, "being unpacked already")
	_, err = pw.Write(packed[1:])
	must(t, err)
	must(t, pw.Close())
	wg.Wait()
	must(t, first)
	_, err = Read(twice)
	must(t, err)
}

func TestReadRefuses(t *testing.T) {
	b := build(t, plant(t, map[string]string{"a": "a"}), testInput)
	_, err := Read(t.TempDir())
	wantProblem(t, err, problem.NotFound, "there is no bundle")
	for name, change := range map[string]func(dir string) error{
		"manifest": func(dir string) error { return os.WriteFile(filepath.Join(dir, "manifest.json"), []byte("{}"), 0o644) },
		"lock":     func(dir string) error { return os.WriteFile(filepath.Join(dir, "lock.txt"), []byte("x"), 0o644) },
		"job":      func(dir string) error { return os.WriteFile(filepath.Join(dir, "job.json"), []byte("{}"), 0o644) },
	} {
		dst := filepath.Join(t.TempDir(), "dst")
		_, err := Extract(bytes.NewReader(written(t, b)), dst, b.Digest, Limits{})
		must(t, err)
		must(t, change(dst))
		_, err = Read(dst)
		wantProblem(t, err, problem.BundleInvalid)
		_ = name
	}
}

// Memory does not grow with the files: 96 MiB pass through both ends within 24 MiB of heap.
func TestConstantMemory(t *testing.T) {
	dir := plant(t, map[string]string{"pyproject.toml": "x"})
	f, err := os.Create(filepath.Join(dir, "model.bin"))
	must(t, err)
	must(t, f.Truncate(96<<20))
	must(t, f.Close())
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	b := build(t, dir, testInput)
	pr, pw := io.Pipe()
	var wg sync.WaitGroup
	wg.Go(func() { pw.CloseWithError(b.Write(pw)) })
	_, err = Extract(pr, filepath.Join(t.TempDir(), "dst"), b.Digest, Limits{})
	wg.Wait()
	must(t, err)
	runtime.ReadMemStats(&after)
	// TotalAlloc counts what was ever allocated, so no collection can hide a buffer.
	if got := after.TotalAlloc - before.TotalAlloc; got > 24<<20 {
		t.Errorf("allocated %d MiB", got>>20)
	}
}

func TestExtractToFullDisk(t *testing.T) {
	b := build(t, plant(t, map[string]string{"a": strings.Repeat("x", 100<<10)}), testInput)
	dir := t.TempDir()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "BUNDLE_TEST_FULL="+dir)
	cmd.Stdin = bytes.NewReader(written(t, b))
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
	}
	out, err := cmd.CombinedOutput()
	if exit, ran := errors.AsType[*exec.ExitError](err); err != nil && (!ran || exit.ExitCode() == 77) {
		t.Skipf("no namespaces or tmpfs here: %v: %s", err, out)
	}
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

func extractToFullDisk(dir string) int {
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		fmt.Println("mount:", err)
		return 77
	}
	_, err := Extract(os.Stdin, filepath.Join(dir, "dst"), "", Limits{})
	if problem.CodeOf(err) != problem.DiskFull || !errors.Is(err, syscall.ENOSPC) {
		fmt.Println("got", err)
		return 1
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		fmt.Println("left behind", left, err)
		return 1
	}
	return 0
}

// What parses is safe by rules that this states again in its own words, and is written back byte for byte.
func FuzzParseManifest(f *testing.F) {
	f.Add([]byte(manifestOf(f, file("a"), Entry{Path: "d", Kind: Dir}, file("e/f"), link("l", "e"), link("m", "e/../l/f"))))
	f.Add([]byte(manifestOf(f, file("a/b"), link("a/c", "../a"))))
	f.Add([]byte(manifestOf(f, file("../a"), link("b", "/c"))))
	f.Add([]byte(`{"format":"pergola-bundle/1"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := ParseManifest(b, Limits{})
		if err != nil {
			return
		}
		if again, err := m.Encode(); err != nil || !bytes.Equal(again, b) {
			t.Errorf("%q is written back as %q, %v", b, again, err)
		}
		for _, e := range m.Files {
			if !filepath.IsLocal(e.Path) || filepath.Clean(e.Path) != e.Path || e.Kind == Link && filepath.IsAbs(e.Target) {
				t.Errorf("unsafe entry %+v", e)
			}
		}
	})
}

// Whatever comes: either it is refused as a problem with nothing left, or what lies there afterwards is what the
// manifest says, no link of it leaves it, and building it again gives the same files. Nothing outside is touched.
func FuzzExtract(f *testing.F) {
	plain := func(b []byte) []byte {
		z, err := zstd.NewReader(bytes.NewReader(b))
		must(f, err)
		defer z.Close()
		out, err := io.ReadAll(z)
		must(f, err)
		return out
	}
	two := manifestOf(f, file("a"), link("b", "a"))
	symlink := func(name, target string) member {
		return member{Header: tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: target, Mode: 0o777}}
	}
	f.Add(plain(written(f, build(f, plant(f, map[string]string{"a.py": "a", "d/": "", "l": "-> a.py", "x": "x:y"}), testInput))))
	f.Add(plain(pack(f, append(outer(two), regular("app/a", "a"), symlink("app/b", "a"))...)))
	f.Add(plain(pack(f, append(outer(two), regular("app/a", "a"), symlink("app/b", "../../outside"))...)))
	f.Add(plain(pack(f, append(outer(manifestOf(f, link("a", "../.."), file("a/x"))), symlink("app/a", "../.."), regular("app/a/x", "a/x"))...)))
	f.Add(plain(pack(f, append(outer(manifestOf(f, file("../x"))), regular("app/../x", "../x"))...)))
	f.Add(plain(pack(f, regular("/etc/x", "evil"), regular("../x", "evil"))))
	parent := f.TempDir()
	f.Fuzz(func(t *testing.T, archive []byte) {
		dir, err := os.MkdirTemp(parent, "")
		must(t, err)
		defer os.RemoveAll(dir)
		must(t, os.WriteFile(filepath.Join(dir, "outside"), []byte("secret"), 0o600))
		var packed bytes.Buffer
		z, err := zstd.NewWriter(&packed, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedFastest))
		must(t, err)
		_, err = z.Write(archive)
		must(t, err)
		must(t, z.Close())

		dst := filepath.Join(dir, "dst")
		m, err := Extract(&packed, dst, "", Limits{MaxBytes: 1 << 20, MaxFiles: 100})
		if err != nil {
			wantProblem(t, err, problem.BundleInvalid)
			if diff := cmp.Diff(map[string]string{"outside": "secret"}, found(t, dir)); diff != "" {
				t.Errorf("left behind (-want +got):\n%s", diff)
			}
			return
		}
		have := found(t, filepath.Join(dst, "app"))
		for _, e := range m.Files {
			name := e.Path
			if e.Kind == Dir {
				name += "/"
			}
			content, ok := have[name]
			if body := strings.TrimPrefix(content, "x:"); !ok || e.Kind == File && !e.Exec && sum([]byte(content)) != e.SHA256 || e.Exec && sum([]byte(body)) != e.SHA256 {
				t.Errorf("%+v is there as %q, %v", e, content, ok)
			}
			if e.Kind == Link {
				to, err := filepath.EvalSymlinks(filepath.Join(dst, "app", e.Path))
				if err != nil || !strings.HasPrefix(to, filepath.Join(dst, "app")+"/") {
					t.Errorf("%+v leads to %s, %v", e, to, err)
				}
			}
		}
		if len(have) != len(m.Files) && len(m.Files) > 0 {
			t.Errorf("%d files are there, %d in the manifest", len(have), len(m.Files))
		}
		if entries, err := os.ReadDir(dir); err != nil || len(entries) != 2 {
			t.Errorf("there is more than the bundle: %v, %v", entries, err)
		}
	})
}
