package metrics

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"github.com/pergolafl/pergola/internal/logs"
)

// errFull tells that a party has logged as much as is kept of it.
var errFull = errors.New("no more metrics are kept")

// file is the party's metrics file, made with the first record. Each call of add is one write to the end, so a record is with
// the kernel before its sender is answered: it outlives the process, though not the loss of power within some seconds.
type file struct {
	path string
	max  int64 // bytes

	mu     sync.Mutex // guards the rest
	f      *os.File   // nil before the first record and after close
	closed bool
	size   int64
	torn   bool // the last write was cut short
}

func newFile(dir string, maxBytes int64) *file {
	return &file{path: filepath.Join(dir, logs.MetricsFile), max: maxBytes}
}

// openLocked opens the file at the end of what is there.
func (l *file) openLocked() error {
	if l.closed {
		return os.ErrClosed
	}
	if l.f != nil {
		return nil
	}
	f, err := os.OpenFile(l.path, os.O_CREATE|os.O_RDWR|os.O_APPEND|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0o600)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", l.path)
	}
	if err == nil && info.Size() > 0 {
		l.size = info.Size()
		last := make([]byte, 1)
		_, err = f.ReadAt(last, l.size-1)
		l.torn = last[0] != '\n'
	}
	if err != nil {
		return errors.Join(err, f.Close())
	}
	l.f = f
	return nil
}

// add appends records, all or, if the disk is full, none or some of them with an error.
func (l *file) add(recs []Record) error {
	var b bytes.Buffer
	b.WriteByte('\n') // used only to end a torn line
	for _, r := range recs {
		line, err := json.Marshal(r)
		if err != nil {
			return err
		}
		b.Write(line)
		b.WriteByte('\n')
	}
	data := b.Bytes()
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.openLocked(); err != nil {
		return err
	}
	if !l.torn {
		data = data[1:]
	}
	if l.size+int64(len(data)) > l.max {
		return errFull
	}
	n, err := l.f.Write(data)
	l.size += int64(n)
	if n > 0 {
		l.torn = data[n-1] != '\n'
	}
	return err
}

// close has everything on disk.
func (l *file) close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	f := l.f
	l.f, l.closed = nil, true
	if f == nil {
		return nil
	}
	return errors.Join(f.Sync(), f.Close())
}
