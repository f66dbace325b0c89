// Package logs moves append-only log files from where a program writes them to where people read
// them, by byte offset: what a file holds before an offset never changes, so whoever copies it needs
// to remember one number to go on after any interruption with nothing lost and nothing doubled.
//
// It does not look at lines, does not rotate, and keeps no log in memory beyond one chunk. A file
// that becomes shorter is an error, [ErrTruncated], never a reason to begin again.
//
// Start with [FollowDir] at the writer's side and [Append] at the reader's.
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

	"golang.org/x/sys/unix"

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

// Open opens the log at path for reading; a link or anything else that is no regular file is refused.
func Open(path string) (*os.File, error) { return openRegular(path, os.O_RDONLY) }

// Append puts data at offset of the file at path, which it creates (mode 0600) if there is none; the
// folder must exist. Bytes that the file has already are skipped, so a repeated call changes nothing.
// It returns the file's length afterwards, also together with an error as far as it is known: with
// ErrGap it is where the sender must go on from, after a write that failed (ENOSPC, recognisable by
// errors.Is) it includes what was still written. Concurrent calls for one file, from any process, wait for
// one another.
func Append(path string, offset int64, data []byte) (newOffset int64, err error) {
	if offset < 0 {
		return 0, fmt.Errorf("append to %s: negative offset %d", path, offset)
	}
	f, err := openRegular(path, os.O_WRONLY|os.O_CREATE)
	if err != nil {
		return 0, fmt.Errorf("append to log: %w", err)
	}
	defer func() {
		// Close gives late write errors on network file systems.
		if e := f.Close(); e != nil && err == nil {
			err = fmt.Errorf("append to log: %w", e)
		}
	}()
	if err := lock(f); err != nil {
		return 0, fmt.Errorf("lock log %s: %w", path, err)
	}
	info, err := f.Stat()
	if err != nil {
		return 0, fmt.Errorf("append to log: %w", err)
	}
	size := info.Size()
	if offset > size {
		return size, fmt.Errorf("append to %s at %d, which is %d bytes long: %w", path, offset, size, ErrGap)
	}
	have := size - offset
	if have >= int64(len(data)) {
		return size, nil
	}
	if _, err := f.WriteAt(data[have:], size); err != nil {
		err = fmt.Errorf("append to log: %w", err)
		// WriteAt leaves out of its count what the kernel still took before the error.
		info, e := f.Stat()
		if e != nil {
			return size, errors.Join(err, e)
		}
		return info.Size(), err
	}
	return offset + int64(len(data)), nil
}

// Size gives the length of the log at path in bytes, 0 if there is none.
func Size(path string) (int64, error) {
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

// Sizes gives the lengths of the logs in dir by name, as FollowDir and a sender that was restarted
// want them. A directory that does not exist has none.
func Sizes(dir string) (map[string]int64, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	sizes := map[string]int64{}
	for _, e := range entries {
		if !isLog(e.Name()) || !e.Type().IsRegular() {
			continue
		}
		if sizes[e.Name()], err = Size(filepath.Join(dir, e.Name())); err != nil {
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

// lock waits for an exclusive lock on f, which closing f gives back.
func lock(f *os.File) error {
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX)
		if !errors.Is(err, syscall.EINTR) {
			return err
		}
	}
}

// readAt fills buf from f at offset and gives what there was, nil at the end of the file.
func readAt(f *os.File, buf []byte, offset int64) ([]byte, error) {
	n, err := f.ReadAt(buf, offset)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return buf[:n], err
}
