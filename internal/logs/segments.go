package logs

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A log is one file up to a size, its head, and then goes on in segments, each named by the offset at which it begins:
//
//	client_app_log.txt                      bytes 0 to 134217799: the head, which is kept
//	client_app_log.txt.0000000150995012     a segment; those before it were dropped
//	client_app_log.txt.0000000167772301     the last one, which grows
//	client_app_log.txt.times                when the bytes of the head were written; each segment has its own
//
// Offsets count all bytes that were ever written, so that whoever copies or follows a log needs not know what was dropped.

const (
	offsetDigits = 16
	timesSuffix  = ".times"
)

// segment is one file of a log.
type segment struct {
	file  string // its name
	start int64  // the offset of its first byte
}

func segmentFile(name string, start int64) string {
	if start == 0 {
		return name
	}
	return fmt.Sprintf("%s.%0*d", name, offsetDigits, start)
}

// parseSegment tells of which log a file is a segment, and where that begins.
func parseSegment(file string) (name string, start int64, ok bool) {
	if isLog(file) {
		return file, 0, true
	}
	i := strings.LastIndexByte(file, '.')
	if i < 0 || len(file)-i-1 != offsetDigits || !isLog(file[:i]) || file[:i] == MetricsFile {
		return "", 0, false
	}
	start, err := strconv.ParseInt(file[i+1:], 10, 64)
	if err != nil || start <= 0 || segmentFile(file[:i], start) != file {
		return "", 0, false
	}
	return file[:i], start, true
}

// Part tells whether a file of a log folder belongs to a log whose name is another: a segment, or a list of times.
func Part(file string) bool {
	name, _, ok := parseSegment(strings.TrimSuffix(file, timesSuffix))
	return ok && name != file
}

// list gives the segments of all logs in dir, each log's in order. A folder that does not exist has none.
func list(dir string) (map[string][]segment, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	out := map[string][]segment{}
	for _, e := range entries { // sorted by name, so each log's are in order
		if name, start, ok := parseSegment(e.Name()); ok && e.Type().IsRegular() {
			out[name] = append(out[name], segment{e.Name(), start})
		}
	}
	return out, nil
}

// segments gives those of one log, in order.
func segments(dir, name string) ([]segment, error) {
	all, err := list(dir)
	return all[name], err
}

// end gives the offset behind a log's last byte.
func end(dir string, segs []segment) (int64, error) {
	if len(segs) == 0 {
		return 0, nil
	}
	last := segs[len(segs)-1]
	n, err := fileSize(filepath.Join(dir, last.file))
	return last.start + n, err
}

// Gap is what a log lacks: bytes that were written and are not kept.
type Gap struct {
	From, To int64 // offsets: To is that of the first byte behind it
}

// Bytes is its size.
func (g Gap) Bytes() int64 { return g.To - g.From }

// Gaps gives what each log of dir lacks, by name; logs that lack nothing are left out.
func Gaps(dir string) (map[string][]Gap, error) {
	all, err := list(dir)
	if err != nil {
		return nil, err
	}
	out := map[string][]Gap{}
	for name, segs := range all {
		gaps, err := gapsOf(dir, segs)
		if err != nil {
			return nil, err
		}
		if len(gaps) > 0 {
			out[name] = gaps
		}
	}
	return out, nil
}

func gapsOf(dir string, segs []segment) (out []Gap, err error) {
	var at int64
	for _, s := range segs {
		if s.start > at {
			out = append(out, Gap{at, s.start})
		}
		n, err := fileSize(filepath.Join(dir, s.file))
		if err != nil {
			return nil, err
		}
		at = max(at, s.start+n)
	}
	return out, nil
}

// Usage gives the bytes that the logs of dir take, lists of times and metrics included.
func Usage(dir string) (int64, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, err
	}
	var n int64
	for _, e := range entries {
		if info, err := e.Info(); err == nil && e.Type().IsRegular() { // else it was just dropped
			n += info.Size()
		}
	}
	return n, nil
}

// Dir is a folder of logs together with how much of them is kept.
type Dir struct {
	Path string

	// Quota is how many bytes all logs of the folder may have together, MetricsFile not counted; 0 = any number. When
	// they would have more, the largest log loses its oldest bytes behind its head. The head, the first eighth of the
	// quota, and the newest bytes are kept.
	Quota int64

	// OnGap is told what is dropped, unless nil: after each time, by the goroutine that writes. First says that the log had
	// been whole before.
	OnGap func(name string, g Gap, first bool)
}

// Sizes of a log's files. A quota of 1 GiB has a head of 128 MiB and segments of 16 MiB. Without a quota nothing is ever
// dropped, and a log is one file.
func (d Dir) headBytes() int64    { return max(d.Quota/8, 1) }
func (d Dir) segmentBytes() int64 { return min(max(d.Quota/64, 1), 16<<20) }

func (d Dir) room(s segment) int64 {
	switch {
	case d.Quota <= 0:
		return 1<<63 - 1
	case s.start == 0:
		return d.headBytes()
	}
	return d.segmentBytes()
}

// lock keeps other writers of the folder out until the file that it gives is closed.
func (d Dir) lock() (*os.File, error) {
	f, err := os.Open(d.Path)
	if err != nil {
		return nil, err
	}
	if err := flock(f); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// enforce drops segments until there is room for another one. The folder is locked.
func (d Dir) enforce() error {
	if d.Quota <= 0 {
		return nil
	}
	all, err := list(d.Path)
	if err != nil {
		return err
	}
	sizes := map[string]int64{}
	var total int64
	for name, segs := range all {
		if name == MetricsFile {
			continue
		}
		for _, s := range segs {
			for _, file := range []string{s.file, s.file + timesSuffix} {
				n, err := fileSize(filepath.Join(d.Path, file))
				if err != nil {
					return err
				}
				sizes[name] += n
				total += n
			}
		}
	}
	for total > d.Quota-d.segmentBytes() {
		largest := ""
		for name, n := range sizes {
			if droppable(all[name]) >= 0 && (largest == "" || n > sizes[largest] || n == sizes[largest] && name < largest) {
				largest = name
			}
		}
		if largest == "" {
			return nil // heads and newest segments only: at most a little too much
		}
		segs := all[largest]
		at := droppable(segs)
		s := segs[at]
		gaps, err := gapsOf(d.Path, segs)
		if err != nil {
			return err
		}
		n, err := fileSize(filepath.Join(d.Path, s.file))
		if err != nil {
			return err
		}
		// The list of times goes last: without its segment nobody looks at it, and it is dropped with the next one.
		for _, file := range []string{s.file, s.file + timesSuffix} {
			k, err := fileSize(filepath.Join(d.Path, file))
			if err == nil {
				err = os.Remove(filepath.Join(d.Path, file))
			}
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("drop the oldest lines of a log: %w", err)
			}
			sizes[largest] -= k
			total -= k
		}
		all[largest] = slices.Delete(segs, at, at+1)
		if d.OnGap != nil {
			d.OnGap(largest, Gap{s.start, s.start + n}, len(gaps) == 0)
		}
	}
	return nil
}

// droppable gives the place of the oldest segment that is neither the head nor the last one; -1 for none.
func droppable(segs []segment) int {
	for i, s := range segs[:max(0, len(segs)-1)] {
		if s.start > 0 {
			return i
		}
	}
	return -1
}

// writer is the last segment of a log, open for writing.
type writer struct {
	dir   Dir
	name  string
	seg   segment
	f     *os.File
	size  int64
	times *os.File // opened with the first one that is written
	last  int64    // the offset of the last time; -1 = none
}

// open opens a log's last segment, or its head if there is none.
func (d Dir) open(name string, segs []segment) (*writer, error) {
	s := segment{file: name}
	if len(segs) > 0 {
		s = segs[len(segs)-1]
	}
	return d.openSegment(name, s)
}

func (d Dir) openSegment(name string, s segment) (*writer, error) {
	f, err := openRegular(filepath.Join(d.Path, s.file), os.O_WRONLY|os.O_CREATE)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &writer{dir: d, name: name, seg: s, f: f, size: info.Size(), last: -2}, nil
}

func (w *writer) end() int64 { return w.seg.start + w.size }

func (w *writer) close() error {
	err := w.f.Close() // it gives late write errors on network file systems
	if w.times != nil {
		err = errors.Join(err, w.times.Close())
	}
	return err
}

// write appends data with its times, going on in new segments where one is full. What it returns as written is what a
// reader will find, also with an error.
func (w *writer) write(data []byte, times []Time) error {
	for len(data) > 0 {
		n := w.fits(data)
		if n == 0 {
			if err := w.rotate(); err != nil {
				return err
			}
			continue
		}
		// Times first: those of bytes that do not follow are harmless, bytes without theirs would stay so.
		var here int
		for here < len(times) && times[here].Offset < w.end()+int64(n) {
			here++
		}
		if err := w.note(times[:here]); err != nil {
			return err
		}
		times = times[here:]
		if _, err := w.f.WriteAt(data[:n], w.size); err != nil {
			// WriteAt leaves out of its count what the kernel still took before the error.
			if info, e := w.f.Stat(); e == nil {
				w.size = info.Size()
			}
			return err
		}
		w.size += int64(n)
		data = data[n:]
	}
	return nil
}

// fits gives how much of data goes into this segment: up to the end of a line where that can be.
func (w *writer) fits(data []byte) int {
	room := w.dir.room(w.seg)
	if left := room - w.size; int64(len(data)) <= left {
		return len(data)
	} else if left > 0 {
		if i := bytes.LastIndexByte(data[:left], '\n'); i >= 0 {
			return i + 1
		}
	}
	// The line that has begun here ends here, unless it is endless.
	if w.size > 0 && w.atLineStart() {
		return 0
	}
	if w.size >= 2*room {
		return 0
	}
	if i := bytes.IndexByte(data, '\n'); i >= 0 {
		return i + 1
	}
	return len(data)
}

func (w *writer) atLineStart() bool {
	// Write-only descriptors cannot be read; the file's own name can.
	f, err := openRegular(filepath.Join(w.dir.Path, w.seg.file), os.O_RDONLY)
	if err != nil {
		return true
	}
	defer f.Close()
	var b [1]byte
	_, err = f.ReadAt(b[:], w.size-1)
	return err != nil || b[0] == '\n'
}

// rotate goes on in a new segment, for which others may have to go. The folder is locked if it has a quota.
func (w *writer) rotate() error {
	if err := w.dir.enforce(); err != nil {
		return err
	}
	next, err := w.dir.openSegment(w.name, segment{segmentFile(w.name, w.end()), w.end()})
	if err != nil {
		return err
	}
	err = w.close()
	*w = *next
	return err
}

// Writer is a log of a program that runs here: what is written is appended, with the time.
type Writer struct {
	w      *writer
	record time.Time // when the last time was noted
}

// Open opens a log for a program's output. It goes on where the log ends; there must be one Writer of a log at a time.
// Calls of Write must not be concurrent.
func (d Dir) Open(name string) (*Writer, error) {
	segs, err := segments(d.Path, name)
	if err != nil {
		return nil, err
	}
	w, err := d.open(name, segs)
	if err != nil {
		return nil, err
	}
	return &Writer{w: w}, nil
}

// Write appends b.
func (w *Writer) Write(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	before := w.w.end()
	var times []Time
	if now := time.Now(); w.record.IsZero() || now.Sub(w.record) >= TimeEvery {
		times, w.record = []Time{{before, now}}, now
	}
	seg := w.w.seg
	var err error
	if w.w.dir.Quota > 0 && int64(len(b)) > w.w.dir.room(seg)-w.w.size {
		err = w.locked(b, times)
	} else {
		err = w.w.write(b, times)
	}
	if w.w.seg != seg {
		w.record = time.Time{} // each segment can be read by itself
	}
	return int(w.w.end() - before), err
}

// locked writes what needs a new segment.
func (w *Writer) locked(b []byte, times []Time) (err error) {
	l, err := w.w.dir.lock()
	if err != nil {
		return err
	}
	defer l.Close()
	return w.w.write(b, times)
}

// Close ends the writing.
func (w *Writer) Close() error { return w.w.close() }

// Begin has a log of dir that is shorter than offset go on there: what lies before is somewhere else. The next Writer
// continues at offset.
func (d Dir) Begin(name string, offset int64) error {
	if err := ValidName(name); err != nil {
		return err
	}
	if name == MetricsFile { // one file, whose beginning is a hole
		return beginWhole(filepath.Join(d.Path, name), offset)
	}
	segs, err := segments(d.Path, name)
	if err != nil {
		return err
	}
	if have, err := end(d.Path, segs); err != nil || have >= offset {
		return err
	}
	w, err := d.openSegment(name, segment{segmentFile(name, offset), offset})
	if err != nil {
		return err
	}
	return w.close()
}

func beginWhole(path string, offset int64) error {
	f, err := openRegular(path, os.O_WRONLY|os.O_CREATE)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err == nil && info.Size() < offset {
		err = f.Truncate(offset)
	}
	return errors.Join(err, f.Close())
}

// flock waits for an exclusive lock on f, which closing f gives back.
func flock(f *os.File) error {
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
