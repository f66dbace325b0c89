package runner

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pergolafl/pergola/internal/job"
)

func note(j *journal, text string) error { return j.add(job.KindNote, job.Text{Message: text}) }

func opened(t *testing.T, dir string) *journal {
	t.Helper()
	j, err := openJournal(dir, job.NewID(time.Now()), "a")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { j.file.Close() })
	return j
}

// Each watcher gets each entry once and in order, whenever it comes, until the final one.
func TestJournalOrder(t *testing.T) {
	j := opened(t, t.TempDir())
	const writers, each = 8, 50
	var wg sync.WaitGroup
	watch := func(after int64) {
		wg.Go(func() {
			next := after + 1
			if err := j.watch(t.Context(), after, func(e Entry) error {
				if e.Seq != next {
					return fmt.Errorf("entry %d came where %d was due", e.Seq, next)
				}
				next++
				return nil
			}); err != nil {
				t.Error(err)
			}
			if next != writers*each+2 {
				t.Errorf("a watcher from %d on saw the last entry as %d", after, next-1)
			}
		})
	}
	watch(0)
	watch(17)
	var ws sync.WaitGroup
	for range writers {
		ws.Go(func() {
			for n := range each {
				if err := note(j, fmt.Sprint(n)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	ws.Wait()
	watch(0)
	if err := j.add(job.KindPartyState, job.PartyStateChange{To: job.PartyDone}); err != nil {
		t.Fatal(err)
	}
	watch(0)
	wg.Wait()
	// What is on disk is what was told.
	es, err := readJournal(j.path)
	if err != nil || len(es) != writers*each+1 {
		t.Errorf("on disk are %d entries (%v)", len(es), err)
	}
	// A watcher's error and its context end the watching.
	boom := errors.New("boom")
	if err := j.watch(t.Context(), 0, func(Entry) error { return boom }); !errors.Is(err, boom) {
		t.Errorf("got %v", err)
	}
	k := opened(t, t.TempDir())
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := k.watch(ctx, 0, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if _, err := openJournal(j.path, "x", "a"); !errors.Is(err, os.ErrExist) {
		t.Errorf("a second runner took the journal over: %v", err)
	}
}

func TestParseJournal(t *testing.T) {
	line := func(n int) string { return fmt.Sprintf(`{"seq":%d,"event":{"kind":"note"}}`+"\n", n) }
	for _, c := range []struct {
		name, text string
		want       int
	}{
		{"nothing", "", 0},
		{"whole", line(1) + line(2), 2},
		{"a torn last line, of a runner that was killed", line(1) + line(2)[:12], 1},
		{"a last line without its end may be torn", line(1) + strings.TrimSuffix(line(2), "\n"), 1},
		{"a broken piece on a full disk, and its repetition", line(1) + line(2)[:9] + "\n" + line(2) + line(3), 3},
		{"zeros after a power cut", line(1) + "\x00\x00\x00\n", 1},
		{"an entry twice", line(1) + line(1) + line(2), 2},
		{"a gap: what comes after it cannot be told apart from another journal's", line(1) + line(3), 1},
	} {
		es, err := parseJournal(strings.NewReader(c.text))
		if err != nil || len(es) != c.want {
			t.Errorf("%s: %d entries (%v), want %d", c.name, len(es), err, c.want)
		}
	}
	if es, err := readJournal(t.TempDir()); err != nil || es != nil {
		t.Errorf("no journal: %v %v", es, err)
	}
}

// Whatever the bytes are, what comes out is numbered from 1 without gaps, and reads the same when written again.
func FuzzParseJournal(f *testing.F) {
	f.Add([]byte(`{"seq":1,"event":{"kind":"note","body":{"message":"x"}}}` + "\n" + `{"seq":2`))
	f.Add([]byte("\n\n{}\n\x00\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		es, err := parseJournal(bytes.NewReader(b))
		if err != nil {
			t.Fatal(err)
		}
		for i, e := range es {
			if e.Seq != int64(i)+1 {
				t.Fatalf("entry %d has number %d", i+1, e.Seq)
			}
			e.Final()
		}
	})
}

// On a disk that is full for good, watchers get what cannot be written, and the writer is told.
func TestJournalOnAFullDisk(t *testing.T) {
	j := opened(t, t.TempDir())
	if err := note(j, "before"); err != nil {
		t.Fatal(err)
	}
	j.file.Close()
	var err error
	if j.file, err = os.OpenFile("/dev/full", os.O_WRONLY, 0); err != nil {
		t.Skip("no /dev/full: ", err)
	}
	for range 2 {
		if err := note(j, "after"); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("got %v, want that no space is left", err)
		}
	}
	if err := j.add(job.KindPartyState, job.PartyStateChange{To: job.PartyFailed}); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("got %v", err)
	}
	n := 0
	if err := j.watch(t.Context(), 0, func(Entry) error { n++; return nil }); err != nil || n != 4 {
		t.Errorf("a watcher got %d entries (%v), want 4", n, err)
	}
	if _, err := os.Stat(filepath.Join(j.path, ballastFile)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the reserve was not given up: %v", err)
	}
}

// On a disk that others have filled, the reserve carries the last words.
func TestReserve(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=512k"); err != nil {
		t.Skip("a small disk takes the right to mount one: ", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	j, err := openJournal(dir, job.NewID(time.Now()), "a")
	if err != nil {
		t.Fatal(err)
	}
	defer j.file.Close() // before the disk goes
	fill, err := os.Create(filepath.Join(dir, "fill"))
	if err != nil {
		t.Fatal(err)
	}
	defer fill.Close()
	for err == nil {
		_, err = fill.Write(make([]byte, 4096))
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	// More than what is left of a page, far less than the reserve.
	for n := range 100 {
		if err := note(j, strings.Repeat("x", 200)); err != nil {
			t.Fatalf("entry %d: %v", n+1, err)
		}
	}
	if err := j.add(job.KindPartyState, job.PartyStateChange{To: job.PartyFailed}); err != nil {
		t.Fatal(err)
	}
	es, err := readJournal(dir)
	if err != nil || len(es) != 101 {
		t.Errorf("%d entries were kept (%v), want all 101", len(es), err)
	} else if _, final := es[100].Final(); !final {
		t.Error("the last word is not the last")
	}
}
