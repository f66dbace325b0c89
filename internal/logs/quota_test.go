package logs

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

// numbered gives lines 0 to n-1, which all differ.
func numbered(n int) []byte {
	var b bytes.Buffer
	for i := range n {
		fmt.Fprintf(&b, "line %d\n", i)
	}
	return b.Bytes()
}

func writeAll(t testing.TB, d Dir, name string, data []byte, step int) {
	t.Helper()
	w, err := d.Open(name)
	must(t, err)
	for len(data) > 0 {
		n := min(step, len(data))
		if k, err := w.Write(data[:n]); err != nil || k != n {
			t.Fatalf("wrote %d of %d: %v", k, n, err)
		}
		data = data[n:]
	}
	must(t, w.Close())
}

func wholeOf(t testing.TB, dir, name string) string {
	t.Helper()
	w, err := OpenWhole(dir, name)
	must(t, err)
	defer w.Close()
	b, err := io.ReadAll(io.NewSectionReader(w, 0, w.Size()))
	must(t, err)
	if int64(len(b)) != w.Size() {
		t.Errorf("%d bytes, and a size of %d", len(b), w.Size())
	}
	return string(b)
}

// What outgrows its quota keeps its head and its newest lines, whole ones, and says what is left out between them.
func TestQuota(t *testing.T) {
	data := numbered(100_000)
	var gaps []Gap
	var firsts int
	d := Dir{Path: t.TempDir(), Quota: 64 << 10, OnGap: func(name string, g Gap, first bool) {
		gaps = append(gaps, g)
		if first {
			firsts++
		}
		if name != "a.txt" {
			t.Errorf("a gap in %s", name)
		}
	}}
	must(t, os.WriteFile(filepath.Join(d.Path, MetricsFile), bytes.Repeat([]byte("{}\n"), 100_000), 0o600))
	writeAll(t, d, "b.txt", numbered(50), 100)
	writeAll(t, d, "a.txt", data, 1000)
	sizes, err := Sizes(d.Path)
	must(t, err)
	if sizes["a.txt"] != int64(len(data)) || sizes["b.txt"] != int64(len(numbered(50))) {
		t.Errorf("ends %v, want %d", sizes, len(data))
	}
	used, err := Usage(d.Path)
	must(t, err)
	if used -= 300_000; used > d.Quota {
		t.Errorf("%d bytes are kept of a quota of %d", used, d.Quota)
	}
	if used < d.Quota/2 {
		t.Errorf("only %d bytes are kept of a quota of %d", used, d.Quota)
	}
	has, err := Gaps(d.Path)
	must(t, err)
	g := has["a.txt"]
	if len(has) != 1 || len(g) != 1 || firsts != 1 || g[0].From != gaps[0].From || g[0].To != gaps[len(gaps)-1].To {
		t.Fatalf("gaps %v, told of %d, first %d times", has, len(gaps), firsts)
	}
	if g[0].From < d.headBytes()-10 || g[0].From > d.headBytes()+10 {
		t.Errorf("the head has %d bytes, want %d", g[0].From, d.headBytes())
	}
	want := string(data[:g[0].From]) + Marker(g[0].Bytes()) + "\n" + string(data[g[0].To:])
	if got := wholeOf(t, d.Path, "a.txt"); got != want {
		t.Errorf("the whole is %d bytes, want %d: %.100q…", len(got), len(want), got)
	}
	if data[g[0].From-1] != '\n' || data[g[0].To-1] != '\n' {
		t.Error("a line is cut")
	}
	for _, n := range []int{1, 7, 500} {
		at, err := Last(d.Path, "a.txt", n)
		if lines := bytes.Count(data[at:], []byte("\n")); err != nil || lines != n {
			t.Errorf("the last %d lines begin at %d, %v: that is %d", n, at, err, lines)
		}
	}
	if at, err := Last(d.Path, "a.txt", 1_000_000); at != g[0].To || err != nil {
		t.Errorf("the last million lines begin at %d, %v; want behind the gap, at %d", at, err, g[0].To)
	}
	if at, err := Last(d.Path, "b.txt", 1_000); at != 0 || err != nil {
		t.Errorf("the last thousand lines of few begin at %d, %v", at, err)
	}
	// A line without an end goes on; a log goes on after its writer has ended.
	writeAll(t, d, "a.txt", bytes.Repeat([]byte("x"), 100_000), 5000)
	if end, err := Size(filepath.Join(d.Path, "a.txt")); end != int64(len(data))+100_000 || err != nil {
		t.Errorf("the end is %d, %v", end, err)
	}
	if used, err := Usage(d.Path); err != nil || used-300_000 > d.Quota+4*d.segmentBytes() {
		t.Errorf("%d bytes are kept with an endless line, %v", used-300_000, err)
	}
}

// A party writes with a quota, a copy of it has another one, and is cut off at any time; a reader of the copy gets each byte
// once or is told that it is left out, and the copy is within its quota.
func TestCopiesWithQuotas(t *testing.T) {
	// Each makes hundreds of files many times.
	was := flag.Lookup("rapid.checks").Value.String()
	must(t, flag.Set("rapid.checks", "20"))
	defer func() { must(t, flag.Set("rapid.checks", was)) }()
	rapid.Check(t, func(t *rapid.T) {
		base, err := os.MkdirTemp("", "logs")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(base)
		from := Dir{Path: filepath.Join(base, "from"), Quota: rapid.Int64Range(8<<10, 32<<10).Draw(t, "quota")}
		to := Dir{Path: filepath.Join(base, "to"), Quota: rapid.Int64Range(8<<10, 32<<10).Draw(t, "quota of the copy")}
		for _, d := range []Dir{from, to} {
			if err := os.Mkdir(d.Path, 0o700); err != nil {
				t.Fatal(err)
			}
		}
		data := numbered(rapid.IntRange(1, 6000).Draw(t, "lines"))
		chunk := rapid.IntRange(50, 4000).Draw(t, "chunk")
		w, err := from.Open("a.txt")
		if err != nil {
			t.Fatal(err)
		}
		closed := make(chan struct{})
		close(closed)
		cut := errors.New("cut")
		copied := func(budget int) {
			start, err := Sizes(to.Path)
			if err != nil {
				t.Fatal(err)
			}
			f := &follower{dir: from.Path, chunk: chunk, offsets: start, fn: func(c Chunk) error {
				if budget--; budget == 0 {
					return cut
				}
				for range 2 {
					if end, err := to.Append(c.Name, c.Offset, c.Skipped, c.Data, c.Times); err != nil || end != c.Offset+int64(len(c.Data)) {
						return fmt.Errorf("append %d bytes at %d: %d, %w", len(c.Data), c.Offset, end, err)
					}
				}
				return nil
			}}
			if err := f.run(context.Background(), closed); err != nil && !errors.Is(err, cut) {
				t.Fatal(err)
			}
		}
		for at := 0; at < len(data); {
			n := min(rapid.IntRange(4_000, 20_000).Draw(t, "written"), len(data)-at)
			if _, err := w.Write(data[at : at+n]); err != nil {
				t.Fatal(err)
			}
			at += n
			copied(rapid.IntRange(1, 10).Draw(t, "pieces"))
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		copied(-1)
		var next int64
		f := &follower{dir: to.Path, chunk: chunk, offsets: map[string]int64{}, fn: func(c Chunk) error {
			if c.Offset != next+c.Skipped {
				return fmt.Errorf("at %d with %d skipped, after %d", c.Offset, c.Skipped, next)
			}
			next = c.Offset + int64(len(c.Data))
			if !bytes.Equal(c.Data, data[c.Offset:next]) {
				return fmt.Errorf("at %d: %.60q", c.Offset, c.Data)
			}
			return nil
		}}
		if err := f.run(context.Background(), closed); err != nil {
			t.Fatal(err)
		}
		if next != int64(len(data)) {
			t.Fatalf("the copy ends at %d of %d", next, len(data))
		}
		for _, d := range []Dir{from, to} {
			// A segment ends behind the line that fills it, and has a list of times.
			if used, err := Usage(d.Path); err != nil || used > d.Quota+2*d.segmentBytes()+300 {
				t.Fatalf("%d bytes in %s of a quota of %d, %v", used, d.Path, d.Quota, err)
			}
		}
	})
}

// When lines were written is known to a second, also of those that were copied, and also after the oldest are gone.
func TestSince(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		from, to := Dir{Path: t.TempDir(), Quota: 4 << 10}, Dir{Path: t.TempDir(), Quota: 2 << 10}
		start := time.Now()
		w, err := from.Open("a.txt")
		must(t, err)
		for i := range 1000 {
			_, err := fmt.Fprintf(w, "%d\n", i)
			must(t, err)
			time.Sleep(250 * time.Millisecond)
		}
		must(t, w.Close())
		closed := make(chan struct{})
		close(closed)
		must(t, (&follower{dir: from.Path, offsets: map[string]int64{}, chunk: 300, fn: func(c Chunk) error {
			_, err := to.Append(c.Name, c.Offset, c.Skipped, c.Data, c.Times)
			return err
		}}).run(t.Context(), closed))
		for _, d := range []Dir{from, to} {
			for _, second := range []int{-5, 0, 17, 100, 200, 249} {
				at, err := Since(d.Path, "a.txt", start.Add(time.Duration(second)*time.Second))
				must(t, err)
				gaps, err := Gaps(d.Path)
				must(t, err)
				var line string
				must(t, Follow(t.Context(), filepath.Join(d.Path, "a.txt"), closed, at, 0, func(c Chunk) error {
					if line == "" && c.Skipped == 0 {
						line, _, _ = strings.Cut(string(c.Data), "\n")
					}
					return nil
				}))
				var got int
				if _, err := fmt.Sscanf(line, "%d", &got); err != nil {
					t.Fatalf("%s, since second %d: %q at %d", d.Path, second, line, at)
				}
				inGap := len(gaps["a.txt"]) == 1 && at >= gaps["a.txt"][0].To
				if want := 4 * max(second, 0); got > want && !inGap || got < want-4 {
					t.Errorf("since second %d begins with line %d, want %d or at most four before (gaps %v)", second, got, want, gaps)
				}
			}
			if at, err := Since(d.Path, "a.txt", start.Add(time.Hour)); err != nil {
				t.Error(err)
			} else if end, _ := Size(filepath.Join(d.Path, "a.txt")); at != end {
				t.Errorf("since the future begins at %d of %d", at, end)
			}
		}
	})
	d := Dir{Path: t.TempDir()}
	must(t, os.WriteFile(filepath.Join(d.Path, "old.txt"), []byte("no times\n"), 0o600))
	if at, err := Since(d.Path, "old.txt", time.Now()); at != 0 || err != nil {
		t.Errorf("a log without times is shown from %d, %v", at, err)
	}
}

// A log that has begun somewhere else goes on where it ends there.
func TestBegin(t *testing.T) {
	d := Dir{Path: t.TempDir(), Quota: 1 << 20}
	must(t, d.Begin("a.txt", 1000))
	must(t, d.Begin("a.txt", 10))
	writeAll(t, d, "a.txt", []byte("on\n"), 10)
	closed := make(chan struct{})
	close(closed)
	var got string
	must(t, FollowDir(t.Context(), d.Path, closed, map[string]int64{"a.txt": 1000}, func(c Chunk) error {
		got += fmt.Sprintf("%d %d %s", c.Offset, c.Skipped, c.Data)
		return nil
	}))
	if got != "1000 0 on\n" {
		t.Errorf("got %q", got)
	}
	if err := d.Begin("../a.txt", 1); err == nil {
		t.Error("a log outside of the folder was begun")
	}
}

func TestParts(t *testing.T) {
	for file, want := range map[string]bool{
		"a.txt": false, "a.txt.times": true, "a.txt.0000000000000010": true, "a.txt.0000000000000010.times": true, "metrics.jsonl": false,
		"metrics.jsonl.0000000000000010": false, "a.txt.10": false, "a.txt.-000000000000010": false, "model.times": false, "a.txt.0000000000000000": false,
	} {
		if got := Part(file); got != want {
			t.Errorf("%s: %v", file, got)
		}
	}
}

// Whatever a file's name is: what is taken for a segment has one name only, which is that of a log.
func FuzzParseSegment(f *testing.F) {
	for _, s := range []string{"a.txt", "a.txt.0000000000000010", "a.log.9999999999999999", "metrics.jsonl", "a.txt.00000000000000+1", ".txt"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, file string) {
		name, start, ok := parseSegment(file)
		if ok && (segmentFile(name, start) != file || start < 0 || !isLog(name)) {
			t.Errorf("%q is %q from %d", file, name, start)
		}
	})
}

// Whatever a list of times holds: it is read in whole entries, and nothing else.
func FuzzReadTimes(f *testing.F) {
	f.Add([]byte{})
	f.Add(binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, 7), 8))
	f.Add(bytes.Repeat([]byte{0xff}, 33))
	f.Fuzz(func(t *testing.T, b []byte) {
		n := 0
		if err := readTimes(bytes.NewReader(b), func(Time) bool { n++; return true }); err != nil || n != len(b)/timeBytes {
			t.Errorf("%d of %d bytes, %v", n, len(b), err)
		}
	})
}

// Programs that share a log do not write over one another, whoever ends first.
func TestSet(t *testing.T) {
	s := &Set{Dir: Dir{Path: t.TempDir(), Quota: 1 << 20}}
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			w, err := s.Open("a.txt")
			if err != nil {
				t.Error(err)
				return
			}
			for n := range 500 {
				if _, err := fmt.Fprintf(w, "%d of %d\n", n, i); err != nil {
					t.Error(err)
				}
			}
			if err := errors.Join(w.Close(), w.Close()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	next := map[int]int{}
	for line := range strings.Lines(wholeOf(t, s.Dir.Path, "a.txt")) {
		var n, i int
		if _, err := fmt.Sscanf(line, "%d of %d\n", &n, &i); err != nil || next[i] != n {
			t.Fatalf("%q, %v, where %d of %d should be", line, err, next[i], i)
		}
		next[i]++
	}
	if len(next) != 4 || len(s.open) != 0 {
		t.Errorf("lines of %d programs, %d logs are open", len(next), len(s.open))
	}
}

// A log that is copied with gaps, each copy less than a segment, stays within the quota too.
func TestQuotaOverGaps(t *testing.T) {
	data := numbered(100_000)
	var firsts int
	d := Dir{Path: t.TempDir(), Quota: 64 << 10, OnGap: func(_ string, _ Gap, first bool) {
		if first {
			firsts++
		}
	}}
	at := d.headBytes()
	_, err := d.Append("a.txt", 0, 0, data[:at], nil)
	must(t, err)
	for range 200 {
		at += 2000
		end, err := d.Append("a.txt", at, 2000, data[at:at+1000], nil)
		must(t, err)
		if at += 1000; end != at {
			t.Fatalf("it ends at %d, want %d", end, at)
		}
		used, err := Usage(d.Path)
		must(t, err)
		if used > d.Quota {
			t.Fatalf("%d bytes are kept of a quota of %d", used, d.Quota)
		}
	}
	used, err := Usage(d.Path)
	must(t, err)
	if used < d.Quota/2 || firsts != 1 {
		t.Errorf("%d bytes are kept of a quota of %d; the first gap was told of %d times", used, d.Quota, firsts)
	}
	if got := wholeOf(t, d.Path, "a.txt"); !strings.HasPrefix(got, string(data[:d.headBytes()])) || !strings.HasSuffix(got, string(data[at-1000:at])) {
		t.Errorf("neither its beginning nor its newest bytes are kept: %d bytes", len(got))
	}
}

// A piece of many segments goes in without more than the quota on the disk at any time.
func TestQuotaWithinOneWrite(t *testing.T) {
	data := numbered(100_000)
	for _, copied := range []bool{false, true} {
		var most int64
		var gaps int
		d := Dir{Path: t.TempDir(), Quota: 64 << 10}
		d.OnGap = func(string, Gap, bool) {
			gaps++
			used, err := Usage(d.Path)
			must(t, err)
			most = max(most, used)
		}
		if copied {
			_, err := d.Append("a.txt", 0, 0, data, nil)
			must(t, err)
		} else {
			writeAll(t, d, "a.txt", data, len(data))
		}
		used, err := Usage(d.Path)
		must(t, err)
		if most = max(most, used); most > d.Quota || gaps == 0 {
			t.Errorf("%d bytes were on the disk, of a quota of %d, in %d gaps", most, d.Quota, gaps)
		}
	}
}
