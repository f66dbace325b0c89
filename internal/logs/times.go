package logs

import (
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// TimeEvery is how often the time is noted of a log that grows: lines are placed in time as precisely as that.
const TimeEvery = time.Second

// Time says when the byte at an offset was written, by the clock of the machine that wrote it. What follows, up to the
// next Time, was written less than TimeEvery later.
type Time struct {
	Offset int64
	At     time.Time
}

// timeBytes is the size of one Time on disk: offset and Unix nanoseconds, big-endian.
const timeBytes = 16

// note appends times of bytes that come now. Those that are there already are left out.
func (w *writer) note(times []Time) error {
	if len(times) == 0 || w.name == MetricsFile {
		return nil
	}
	if w.times == nil {
		f, err := openRegular(filepath.Join(w.dir.Path, w.seg.file+timesSuffix), os.O_RDWR|os.O_CREATE)
		if err != nil {
			return err
		}
		w.times = f
	}
	info, err := w.times.Stat()
	if err != nil {
		return err
	}
	at := info.Size() / timeBytes * timeBytes // a torn one is written over
	if w.last < -1 {
		w.last = -1
		if at > 0 {
			var b [timeBytes]byte
			if _, err := w.times.ReadAt(b[:], at-timeBytes); err != nil {
				return err
			}
			w.last = parseTime(b[:]).Offset
		}
	}
	var b []byte
	for _, t := range times {
		if t.Offset > w.last {
			b = binary.BigEndian.AppendUint64(b, uint64(t.Offset))
			b = binary.BigEndian.AppendUint64(b, uint64(t.At.UnixNano()))
			w.last = t.Offset
		}
	}
	if len(b) == 0 {
		return nil
	}
	_, err = w.times.WriteAt(b, at)
	return err
}

func parseTime(b []byte) Time {
	return Time{int64(binary.BigEndian.Uint64(b)), time.Unix(0, int64(binary.BigEndian.Uint64(b[8:])))}
}

// scanTimes gives the times of a segment to fn, in order, until that returns false.
func scanTimes(dir, file string, fn func(Time) bool) error {
	f, err := openRegular(filepath.Join(dir, file+timesSuffix), os.O_RDONLY)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // written without, or just dropped
	}
	if err != nil {
		return err
	}
	defer f.Close()
	return readTimes(f, fn)
}

func readTimes(r io.Reader, fn func(Time) bool) error {
	buf := make([]byte, 256*timeBytes)
	for {
		n, err := io.ReadFull(r, buf)
		for b := buf[:n]; len(b) >= timeBytes; b = b[timeBytes:] {
			if !fn(parseTime(b)) {
				return nil
			}
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// timesIn gives the times of a segment's bytes from an offset up to another. The list is in order of offsets.
func timesIn(dir, file string, from, to int64) ([]Time, error) {
	f, err := openRegular(filepath.Join(dir, file+timesSuffix), os.O_RDONLY)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	var b [timeBytes]byte
	lo, hi := int64(0), info.Size()/timeBytes
	for lo < hi {
		mid := (lo + hi) / 2
		if _, err := f.ReadAt(b[:], mid*timeBytes); err != nil {
			return nil, err
		}
		if parseTime(b[:]).Offset < from {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	var out []Time
	err = readTimes(io.NewSectionReader(f, lo*timeBytes, info.Size()-lo*timeBytes), func(t Time) bool {
		if t.Offset < to {
			out = append(out, t)
		}
		return t.Offset < to
	})
	return out, err
}

// Since gives the offset of a log's first byte that may have been written at t or later: everything from there on was
// written at t - TimeEvery or later, unless the clock was set back. Without any note of the time it is the log's beginning.
func Since(dir, name string, t time.Time) (int64, error) {
	segs, err := segments(dir, name)
	if err != nil {
		return 0, err
	}
	noted := false
	for _, s := range segs {
		at := int64(-1)
		if err := scanTimes(dir, s.file, func(n Time) bool {
			noted = true
			if n.At.Add(TimeEvery).After(t) {
				at = n.Offset
			}
			return at < 0
		}); err != nil {
			return 0, err
		}
		if at >= 0 {
			return at, nil
		}
	}
	if !noted {
		return 0, nil
	}
	return end(dir, segs)
}
