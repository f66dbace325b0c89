package logs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/pergolafl/pergola/internal/problem"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv("LOGS_TEST_FULL"); dir != "" {
		os.Exit(fillDisk(dir))
	}
	goleak.VerifyTestMain(m)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestAppend(t *testing.T) {
	for _, c := range []struct {
		name   string
		has    string // "" = no file
		offset int64
		data   string
		want   string
		size   int64
		err    error
	}{
		{"makes the file", "", 0, "abc", "abc", 3, nil},
		{"goes on at the end", "abc", 3, "def", "abcdef", 6, nil},
		{"skips what is there", "abc", 0, "abcdef", "abcdef", 6, nil},
		{"skips all of a repeated call", "abcdef", 3, "def", "abcdef", 6, nil},
		{"skips what lies before the end", "abcdef", 1, "bc", "abcdef", 6, nil},
		{"takes nothing", "abc", 3, "", "abc", 3, nil},
		{"leaves no gap", "abc", 4, "x", "abc", 3, ErrGap},
		{"leaves no gap for nothing", "abc", 4, "", "abc", 3, ErrGap},
		{"leaves no gap in a new file", "", 1, "x", "", 0, ErrGap},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "x.txt")
			if c.has != "" {
				must(t, os.WriteFile(path, []byte(c.has), 0o600))
			}
			size, err := Append(path, c.offset, []byte(c.data))
			if size != c.size || !errors.Is(err, c.err) {
				t.Errorf("got %d, %v; want %d, %v", size, err, c.size, c.err)
			}
			if got, _ := os.ReadFile(path); string(got) != c.want {
				t.Errorf("file has %q, want %q", got, c.want)
			}
		})
	}
}

func TestAppendRefuses(t *testing.T) {
	dir := t.TempDir()
	target := filepath.Join(dir, "target")
	must(t, os.WriteFile(target, nil, 0o600))
	must(t, os.Symlink(target, filepath.Join(dir, "link.txt")))
	must(t, unix.Mkfifo(filepath.Join(dir, "fifo.txt"), 0o600))
	must(t, os.Mkdir(filepath.Join(dir, "dir.txt"), 0o700))
	for _, name := range []string{"link.txt", "fifo.txt", "dir.txt"} {
		if _, err := Append(filepath.Join(dir, name), 0, []byte("x")); !errors.Is(err, errNotRegular) {
			t.Errorf("%s: got %v", name, err)
		}
		if name != "dir.txt" {
			if err := Follow(t.Context(), filepath.Join(dir, name), nil, 0, 0, nil); !errors.Is(err, errNotRegular) {
				t.Errorf("follow %s: got %v", name, err)
			}
		}
	}
	if _, err := Append(filepath.Join(dir, "x.txt"), -1, nil); err == nil {
		t.Error("a negative offset was taken")
	}
	if _, err := Append(filepath.Join(dir, "none", "x.txt"), 0, nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no folder: got %v", err)
	}
	if err := Follow(t.Context(), filepath.Join(dir, "x.txt"), nil, -1, 0, nil); err == nil {
		t.Error("following from a negative offset")
	}
}

// Many senders of one file, each of which repeats itself: what a hub sees after reconnects.
func TestAppendConcurrently(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.txt")
	want := make([]byte, 64<<10)
	for i := range want {
		want[i] = byte(rand.Uint32())
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for at := int64(0); at < int64(len(want)); {
				n := min(1+rand.Int64N(5000), int64(len(want))-at)
				next, err := Append(path, at, want[at:at+n])
				if err != nil {
					t.Error(err)
					return
				}
				at = next
			}
		})
	}
	wg.Wait()
	got, err := os.ReadFile(path)
	must(t, err)
	if !bytes.Equal(got, want) {
		t.Errorf("file has %d bytes, other than the %d that were sent", len(got), len(want))
	}
}

func TestAppendToFullDisk(t *testing.T) {
	dir := t.TempDir()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "LOGS_TEST_FULL="+dir)
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

// fillDisk appends to a file system of 64 KiB until it is full, and once more after there is room again.
func fillDisk(dir string) int {
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		fmt.Println("mount:", err)
		return 77
	}
	filler := filepath.Join(dir, "filler")
	path := filepath.Join(dir, "x.txt")
	data := bytes.Repeat([]byte("0123456789abcde\n"), 4<<10)
	if err := os.WriteFile(filler, make([]byte, 20<<10), 0o600); err != nil {
		fmt.Println(err)
		return 1
	}
	var n int64
	var err error
	for err == nil && n < int64(len(data))-4096 {
		n, err = Append(path, n, data[n:n+1000])
	}
	if info, e := os.Stat(path); !errors.Is(err, syscall.ENOSPC) || e != nil || info.Size() != n || n == 0 {
		fmt.Printf("append to a full disk: %d, %v, %v\n", n, err, e)
		return 1
	}
	if err := os.Remove(filler); err != nil {
		fmt.Println(err)
		return 1
	}
	data = data[:n+4096]
	if n, err = Append(path, n, data[n:]); err != nil {
		fmt.Printf("append after the disk has space again: %d, %v\n", n, err)
		return 1
	}
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, data) {
		fmt.Printf("the file has %d bytes, not what was sent, %v\n", len(got), err)
		return 1
	}
	return 0
}

func TestValidName(t *testing.T) {
	for name, ok := range map[string]bool{
		"superlink.txt": true, "server-app.log": true, "0_a.b.txt": true, "metrics.jsonl": true, "other.jsonl": false, strings.Repeat("a", 124) + ".txt": true,
		"": false, ".txt": false, "a": false, "../a.txt": false, "a/b.txt": false, "-a.txt": false, "a b.txt": false, ".a.log": false,
		"ä.txt": false, "a\n.txt": false, strings.Repeat("a", 125) + ".txt": false,
	} {
		if err := ValidName(name); (err == nil) != ok || (err != nil && problem.CodeOf(err) != problem.Usage) {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestSizes(t *testing.T) {
	dir := t.TempDir()
	if got, err := Sizes(filepath.Join(dir, "none")); err != nil || len(got) != 0 {
		t.Errorf("no directory: %v, %v", got, err)
	}
	must(t, os.WriteFile(filepath.Join(dir, "a.txt"), []byte("abc"), 0o600))
	must(t, os.WriteFile(filepath.Join(dir, "b.log"), nil, 0o600))
	must(t, os.WriteFile(filepath.Join(dir, "c.bin"), []byte("abc"), 0o600))
	must(t, os.Symlink("a.txt", filepath.Join(dir, "d.txt")))
	got, err := Sizes(dir)
	must(t, err)
	if diff := cmp.Diff(map[string]int64{"a.txt": 3, "b.log": 0}, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if n, err := Size(filepath.Join(dir, "none.txt")); n != 0 || err != nil {
		t.Errorf("no file: %d, %v", n, err)
	}
}

// The whole way: writers append while a follower copies to another directory; the copy is cut off at any time and begins
// again from what the copy has; the link between them repeats itself. Nothing is lost, doubled or out of order.
func TestNothingLostNorDoubled(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		base, err := os.MkdirTemp("", "logs")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(base)
		from, to := filepath.Join(base, "from"), filepath.Join(base, "to")
		if err := os.Mkdir(to, 0o700); err != nil {
			t.Fatal(err)
		}
		files := rapid.MapOf(rapid.SampledFrom([]string{"a.txt", "b.log", "c.txt"}),
			rapid.SliceOfN(rapid.SliceOfN(rapid.Byte(), 0, 300), 0, 20)).Draw(t, "files")
		chunk := rapid.IntRange(1, 100).Draw(t, "chunk")
		notify := rapid.Bool().Draw(t, "notify")
		cuts := rapid.SliceOfN(rapid.IntRange(0, 30), 0, 5).Draw(t, "cuts")
		lateDir := rapid.Bool().Draw(t, "the directory appears later")
		if !lateDir {
			if err := os.Mkdir(from, 0o700); err != nil {
				t.Fatal(err)
			}
		}

		done := make(chan struct{})
		var writers sync.WaitGroup
		for name, parts := range files {
			writers.Go(func() {
				if err := os.MkdirAll(from, 0o700); err != nil {
					t.Error(err)
					return
				}
				f, err := os.OpenFile(filepath.Join(from, name), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
				if err != nil {
					t.Error(err)
					return
				}
				defer f.Close()
				for _, part := range parts {
					if _, err := f.Write(part); err != nil {
						t.Error(err)
					}
				}
			})
		}
		go func() { writers.Wait(); close(done) }()

		cut := errors.New("cut")
		for try := 0; ; try++ {
			start, err := Sizes(to)
			if err != nil {
				t.Fatal(err)
			}
			budget := -1
			if try < len(cuts) {
				budget = cuts[try]
			}
			f := &follower{dir: from, chunk: chunk, notify: notify, offsets: start, fn: func(c Chunk) error {
				name, offset, data := c.Name, c.Offset, c.Data
				if budget == 0 {
					return cut
				}
				budget--
				for range 2 {
					if end, err := Append(filepath.Join(to, name), offset, data); err != nil || end != offset+int64(len(data)) {
						return fmt.Errorf("append %d bytes at %d: %d, %w", len(data), offset, end, err)
					}
				}
				return nil
			}}
			if err = f.run(context.Background(), done); err == nil {
				break
			}
			if !errors.Is(err, cut) {
				t.Fatal(err)
			}
		}
		writers.Wait()
		for name, parts := range files {
			got, err := os.ReadFile(filepath.Join(to, name))
			if want := bytes.Join(parts, nil); !bytes.Equal(got, want) {
				t.Errorf("%s: got %d bytes %q, want %d %q, %v", name, len(got), got, len(want), want, err)
			}
		}
	})
}

// With and without the kernel's help, a line arrives while the follower goes on.
func TestFollowSeesGrowth(t *testing.T) {
	for _, notify := range []bool{true, false} {
		t.Run(fmt.Sprintf("notify=%v", notify), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "later", "x.txt")
			got := make(chan string)
			ended := make(chan error, 1)
			ctx, cancel := context.WithCancelCause(t.Context())
			f := &follower{dir: filepath.Dir(path), only: "x.txt", notify: notify, offsets: map[string]int64{}, fn: func(c Chunk) error {
				got <- fmt.Sprintf("%d %s", c.Offset, c.Data)
				return nil
			}}
			go func() { ended <- f.run(ctx, nil) }()
			must(t, os.Mkdir(filepath.Dir(path), 0o700))
			must(t, os.WriteFile(filepath.Join(filepath.Dir(path), "other.txt"), []byte("no"), 0o600))
			at := int64(0)
			for _, line := range []string{"one", "two"} {
				n, err := Append(path, at, []byte(line))
				must(t, err)
				if want, have := fmt.Sprintf("%d %s", at, line), <-got; have != want {
					t.Errorf("got %q, want %q", have, want)
				}
				at = n
			}
			why := errors.New("enough")
			cancel(why)
			if err := <-ended; !errors.Is(err, why) {
				t.Errorf("ended with %v", err)
			}
		})
	}
}

func TestFollowEnds(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "x.txt")
	closed := make(chan struct{})
	close(closed)
	var got []string
	collect := func(c Chunk) error {
		got = append(got, fmt.Sprintf("%d %s", c.Offset, c.Data))
		return nil
	}
	must(t, Follow(t.Context(), path, closed, 0, 0, collect))
	must(t, FollowDir(t.Context(), filepath.Join(dir, "none"), closed, nil, nil))
	must(t, os.WriteFile(path, []byte("abcdefg"), 0o600))
	must(t, Follow(t.Context(), path, closed, 1, 4, collect))
	if diff := cmp.Diff([]string{"1 bcde", "5 fg"}, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if err := Follow(t.Context(), path, closed, 8, 0, collect); !errors.Is(err, ErrTruncated) {
		t.Errorf("beyond the end: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Follow(ctx, path, nil, 7, 0, collect); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	// A function that ends the context is not called again.
	ctx, cancel = context.WithCancel(t.Context())
	calls := 0
	err := Follow(ctx, path, closed, 0, 1, func(Chunk) error { calls++; cancel(); return nil })
	if calls != 1 || !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled by its function: %d calls, %v", calls, err)
	}
}

// A writer that never stops keeps the follower neither from the other files nor from its end.
func TestFollowEndless(t *testing.T) {
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "endless.txt"), []byte("0"), 0o600))
	done := make(chan struct{})
	size := int64(1)
	other := false
	must(t, FollowDir(t.Context(), dir, done, nil, func(c Chunk) error {
		if c.Name == "other.txt" {
			other = true
			close(done)
		}
		if size == 100 {
			must(t, os.WriteFile(filepath.Join(dir, "other.txt"), []byte("x"), 0o600))
		}
		var err error
		size, err = Append(filepath.Join(dir, "endless.txt"), size, []byte("x"))
		return err
	}))
	if !other {
		t.Error("the other file was never seen")
	}
}

func TestFollowDirGoesOnWithoutABrokenFile(t *testing.T) {
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "a.txt"), []byte("a"), 0o600))
	must(t, os.WriteFile(filepath.Join(dir, "b.txt"), []byte("b"), 0o600))
	must(t, os.Symlink("/etc/passwd", filepath.Join(dir, "link.txt")))
	must(t, os.Mkdir(filepath.Join(dir, "dir.txt"), 0o700))
	must(t, os.WriteFile(filepath.Join(dir, "c.bin"), []byte("c"), 0o600))
	closed := make(chan struct{})
	close(closed)
	start := map[string]int64{"a.txt": 5}
	got := map[string]string{}
	err := FollowDir(t.Context(), dir, closed, start, func(c Chunk) error {
		got[c.Name] += string(c.Data)
		return nil
	})
	if !errors.Is(err, ErrTruncated) || !strings.Contains(err.Error(), "a.txt") {
		t.Errorf("got %v", err)
	}
	if diff := cmp.Diff(map[string]string{"b.txt": "b"}, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if start["a.txt"] != 5 || len(start) != 1 {
		t.Errorf("start was changed: %v", start)
	}
}
