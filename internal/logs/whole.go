package logs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sort"

	human "github.com/dustin/go-humanize"
)

// Marker is the line that stands for bytes of a log which are not kept.
func Marker(n int64) string {
	return fmt.Sprintf("[pergola: %d bytes (%s) of this log are left out here]", n, human.IBytes(uint64(max(n, 0))))
}

// QuotaReached says, once, that a party's logs begin to be dropped.
func QuotaReached(party, name string, quota int64) string {
	return fmt.Sprintf("the logs of %s have reached their quota of %s: from here on the middle of %s is left out; its beginning and its newest lines are kept",
		party, human.IBytes(uint64(max(quota, 0))), name)
}

// Whole is a log as one text: its segments in order, and a Marker for each gap. It is what there was when it was opened.
type Whole struct {
	parts []wholePart
	size  int64
}

type wholePart struct {
	at     int64 // in the text
	size   int64
	file   *os.File
	marker string
}

// OpenWhole opens a log as one text. fs.ErrNotExist (errors.Is) if there is none.
func OpenWhole(dir, name string) (_ *Whole, err error) {
	w := &Whole{}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.Close())
		}
	}()
	segs, err := segments(dir, name)
	if err != nil {
		return nil, err
	}
	if len(segs) == 0 {
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, name), fs.ErrNotExist)
	}
	var logical int64
	broken := false // the text so far ends within a line
	for _, s := range segs {
		f, err := openRegular(filepath.Join(dir, s.file), os.O_RDONLY)
		if errors.Is(err, fs.ErrNotExist) {
			continue // just dropped: a gap
		}
		if err != nil {
			return nil, err
		}
		info, err := f.Stat()
		if err != nil {
			return nil, errors.Join(err, f.Close())
		}
		if s.start > logical {
			text := Marker(s.start-logical) + "\n"
			if broken {
				text = "\n" + text
			}
			w.parts = append(w.parts, wholePart{at: w.size, size: int64(len(text)), marker: text})
			w.size += int64(len(text))
		}
		w.parts = append(w.parts, wholePart{at: w.size, size: info.Size(), file: f})
		w.size += info.Size()
		logical = s.start + info.Size()
		if info.Size() > 0 {
			var last [1]byte
			if _, err := f.ReadAt(last[:], info.Size()-1); err != nil {
				return nil, err
			}
			broken = last[0] != '\n'
		}
	}
	return w, nil
}

// Size is the text's length in bytes.
func (w *Whole) Size() int64 { return w.size }

// ReadAt implements io.ReaderAt.
func (w *Whole) ReadAt(p []byte, off int64) (n int, err error) {
	if off < 0 {
		return 0, fmt.Errorf("read a log at %d", off)
	}
	i := sort.Search(len(w.parts), func(i int) bool { return w.parts[i].at+w.parts[i].size > off })
	for ; i < len(w.parts) && n < len(p); i++ {
		part := w.parts[i]
		var r io.ReaderAt = bytes.NewReader([]byte(part.marker))
		if part.file != nil {
			r = part.file
		}
		want := p[n:min(int64(len(p)), int64(n)+part.at+part.size-off)]
		k, err := r.ReadAt(want, off-part.at)
		n, off = n+k, off+int64(k)
		if k < len(want) {
			if err == nil || errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return n, err
		}
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// Close closes its files.
func (w *Whole) Close() error {
	var errs []error
	for _, p := range w.parts {
		if p.file != nil {
			errs = append(errs, p.file.Close())
		}
	}
	return errors.Join(errs...)
}

// Last gives the offset at which a log's last n lines begin; that of its first byte if it has fewer. Lines in front of a gap
// do not count: nobody can tell how many were there.
func Last(dir, name string, n int) (int64, error) {
	segs, err := segments(dir, name)
	if err != nil || len(segs) == 0 {
		return 0, err
	}
	last, err := end(dir, segs)
	if err != nil || n <= 0 {
		return last, err
	}
	buf := make([]byte, 64<<10)
	at := last
	for i := len(segs) - 1; i >= 0; i-- {
		s := segs[i]
		f, err := openRegular(filepath.Join(dir, s.file), os.O_RDONLY)
		if errors.Is(err, fs.ErrNotExist) {
			return at, nil
		}
		if err != nil {
			return 0, err
		}
		size := last - s.start
		if i < len(segs)-1 {
			if size, err = fileSize(filepath.Join(dir, s.file)); err != nil || s.start+size != at {
				return at, errors.Join(err, f.Close())
			}
		}
		for size > 0 {
			b := buf[:min(int64(len(buf)), size)]
			k, err := f.ReadAt(b, size-int64(len(b)))
			if k < len(b) {
				return 0, errors.Join(err, f.Close())
			}
			for j := len(b) - 1; j >= 0; j-- {
				pos := s.start + size - int64(len(b)) + int64(j)
				if b[j] == '\n' && pos != last-1 {
					if n--; n == 0 {
						return pos + 1, f.Close()
					}
				}
			}
			size -= int64(len(b))
		}
		if err := f.Close(); err != nil {
			return 0, err
		}
		at = s.start
	}
	return at, nil
}
