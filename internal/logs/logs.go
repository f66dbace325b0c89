// Package logs moves append-only logs from where a program writes them to where people read
// them, by byte offset: what a log holds before an offset never changes, so whoever copies it needs
// to remember one number to go on after any interruption with nothing lost and nothing doubled.
//
// A log that outgrows its share of a folder's quota loses bytes of its middle, in whole lines where
// that can be; offsets go on counting them, and every reader is told how many are left out where. When
// bytes were written is known to a second. No log is in memory beyond one chunk. A log that becomes
// shorter is an error, [ErrTruncated], never a reason to begin again.
//
// Start with [Dir] at the writers' side, [FollowDir] and [OpenWhole] at the readers'; segments.go draws the files.
package logs

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/pergolafl/pergola/internal/problem"
)

// ErrGap tells that Append was given bytes that begin after the end of the file. The sender goes on
// from the offset that Append returned with it.
var ErrGap = errors.New("the file ends before the offset of the new bytes")

// ErrTruncated tells that a followed file is shorter than what was already read of it, or than the
// offset that the caller wanted to begin at.
var ErrTruncated = errors.New("the log became shorter than what was already read of it")

// MaxName is the length in bytes that ValidName allows.
const MaxName = 128

// MetricsFile is the one log that is not text for people: a JSON object per line (package metrics).
const MetricsFile = "metrics.jsonl"

// ValidName tells whether name can be that of a log: a plain file name of letters, digits, '.', '_'
// and '-' which begins with a letter or digit and ends with ".txt" or ".log", or MetricsFile. Whoever takes names
// from a peer asks here before joining them to a directory.
func ValidName(name string) error {
	ok := len(name) <= MaxName && isLog(name)
	for i := 0; ok && i < len(name); i++ {
		switch c := name[i]; {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9':
		case c == '.', c == '_', c == '-':
			ok = i > 0
		default:
			ok = false
		}
	}
	if !ok {
		return problem.New(problem.Usage,
			fmt.Sprintf("use at most %d letters, digits, '.', '_' and '-', a letter or digit first, and end with .txt or .log", MaxName),
			"%q cannot be the name of a log", name)
	}
	return nil
}

// isLog tells which files of a directory FollowDir follows.
func isLog(name string) bool {
	return strings.HasSuffix(name, ".txt") || strings.HasSuffix(name, ".log") || name == MetricsFile
}

// Open opens a file for reading, for example a log's head; a link or anything else that is no regular file is refused.
func Open(path string) (*os.File, error) { return openRegular(path, os.O_RDONLY) }

// Append puts data at offset of the log at path, as [Dir.Append] does without a quota, times and gaps.
func Append(path string, offset int64, data []byte) (newOffset int64, err error) {
	return Dir{Path: filepath.Dir(path)}.Append(filepath.Base(path), offset, 0, data, nil)
}

// Append puts data at offset of a log, whose head it creates (mode 0600) if there is none; the folder must exist. Bytes that
// the log has already are skipped, so a repeated call changes nothing. skipped says how many bytes in front of data will never
// come: the log has a gap there. times are of bytes of data.
//
// It returns the log's end afterwards, also together with an error as far as it is known: with ErrGap it is where the sender
// must go on from, after a write that failed (ENOSPC, recognisable by errors.Is) it includes what was still written.
// Concurrent calls for one folder, from any process, wait for one another.
func (d Dir) Append(name string, offset, skipped int64, data []byte, times []Time) (newOffset int64, err error) {
	path := filepath.Join(d.Path, name)
	if offset < 0 || skipped < 0 || skipped > offset {
		return 0, fmt.Errorf("append to %s: impossible offset %d, %d skipped", path, offset, skipped)
	}
	l, err := d.lock()
	if err != nil {
		return 0, fmt.Errorf("lock log %s: %w", path, err)
	}
	defer l.Close()
	segs, err := segments(d.Path, name)
	if err != nil {
		return 0, fmt.Errorf("append to log: %w", err)
	}
	have, err := end(d.Path, segs)
	if err != nil {
		return 0, fmt.Errorf("append to log: %w", err)
	}
	var w *writer
	switch {
	case offset > have && offset-skipped > have:
		return have, fmt.Errorf("append to %s at %d, which is %d bytes long: %w", path, offset, have, ErrGap)
	case offset > have:
		if name == MetricsFile {
			return have, fmt.Errorf("append to %s: it has no gaps: %w", path, ErrGap)
		}
		var first bool
		if w, first, err = d.after(name, offset); err == nil && d.OnGap != nil {
			d.OnGap(name, Gap{have, offset}, first)
		}
	case have-offset >= int64(len(data)) && len(segs) > 0:
		return have, nil
	default:
		w, err = d.open(name, segs)
	}
	if err != nil {
		return have, fmt.Errorf("append to log: %w", err)
	}
	var fresh []Time
	for _, t := range times {
		if t.Offset >= w.end() {
			fresh = append(fresh, t)
		}
	}
	err = w.write(data[min(max(w.end()-offset, 0), int64(len(data))):], fresh)
	newOffset = w.end()
	if e := w.close(); err == nil {
		err = e
	}
	if err != nil {
		err = fmt.Errorf("append to log: %w", err)
	}
	return newOffset, err
}

// after goes on behind a gap, in a new segment, for which others may have to go. First tells that the log has been whole. The folder is locked.
func (d Dir) after(name string, offset int64) (w *writer, first bool, err error) {
	if err := d.enforce(); err != nil {
		return nil, false, err
	}
	segs, err := segments(d.Path, name)
	if err != nil {
		return nil, false, err
	}
	gaps, err := gapsOf(d.Path, segs)
	if err != nil {
		return nil, false, err
	}
	w, err = d.openSegment(name, segment{segmentFile(name, offset), offset})
	return w, len(gaps) == 0, err
}

// Size gives the offset at which the log at path ends, 0 if there is none.
func Size(path string) (int64, error) {
	dir, name := filepath.Split(path)
	segs, err := segments(dir, name)
	if err != nil {
		return 0, err
	}
	if len(segs) == 0 { // a link or folder of that name is none
		return fileSize(path)
	}
	return end(dir, segs)
}

// fileSize gives the length of a file, 0 if there is none.
func fileSize(path string) (int64, error) {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return 0, nil
	case err != nil:
		return 0, err
	case !info.Mode().IsRegular():
		return 0, fmt.Errorf("%s: %w", path, errNotRegular)
	}
	return info.Size(), nil
}

// Sizes gives the ends of the logs in dir by name, as FollowDir and a sender that was restarted want them. A directory that
// does not exist has none.
func Sizes(dir string) (map[string]int64, error) {
	all, err := list(dir)
	if err != nil {
		return nil, err
	}
	sizes := map[string]int64{}
	for name, segs := range all {
		if sizes[name], err = end(dir, segs); err != nil {
			return nil, err
		}
	}
	return sizes, nil
}

var errNotRegular = errors.New("not a regular file")

// openRegular opens a log without following a link in its last component and without waiting for
// the other end of a fifo: an app can write to its party's directory, and its links must not make us
// read or change files that are none of its business.
func openRegular(path string, flag int) (*os.File, error) {
	f, err := os.OpenFile(path, flag|syscall.O_NOFOLLOW|syscall.O_NONBLOCK|syscall.O_CLOEXEC, 0o600)
	if errors.Is(err, syscall.ELOOP) || errors.Is(err, syscall.ENXIO) || errors.Is(err, syscall.EISDIR) {
		return nil, fmt.Errorf("%s: %w", path, errNotRegular)
	}
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s: %w", path, errNotRegular)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// readAt fills buf from f at offset and gives what there was, nil at the end of the file.
func readAt(f *os.File, buf []byte, offset int64) ([]byte, error) {
	n, err := f.ReadAt(buf, offset)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return buf[:n], err
}
