package logs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/fsnotify/fsnotify"
)

const (
	// DefaultChunk is how many bytes Follow gives to its function at most, unless told otherwise.
	DefaultChunk = 256 << 10

	// pollEvery is the longest a change stays unseen where the kernel does not tell of it: network file
	// systems, a directory that does not exist yet, and users whose inotify instances are used up.
	pollEvery = 500 * time.Millisecond

	// turn is how many chunks of one file are read before the next file has its turn, so that a file
	// that grows without end does not hold back the others.
	turn = 16
)

// Chunk is a piece of a log, with the times that were noted of its bytes. Skipped says how many bytes in front of it, which
// were not given either, are no more.
type Chunk struct {
	Name    string
	Offset  int64
	Skipped int64
	Data    []byte // valid during the call only
	Times   []Time
}

// Follow gives the bytes of the log at path to fn, from offset on, in order, in pieces of at most
// chunk bytes (0 = DefaultChunk), as the log grows; it waits for a log, or folder, that is not there yet. It ends
// with nil once done is closed and fn has had everything that was in the log at that time, with
// ctx's cause when ctx ends, and with fn's error. done may be nil.
// ErrTruncated (errors.Is) if the log is or becomes shorter than what was read.
func Follow(ctx context.Context, path string, done <-chan struct{}, offset int64, chunk int, fn func(Chunk) error) error {
	base := filepath.Base(path)
	f := &follower{
		dir: filepath.Dir(path), chunk: chunk, only: base, notify: true,
		offsets: map[string]int64{base: offset}, fn: fn,
	}
	return f.run(ctx, done)
}

// FollowDir follows all files *.txt and *.log, and MetricsFile, of dir (not of folders below it; no links), those that
// are there and those that appear, as Follow does. start has the offsets to begin at by name, 0 for a
// file that it lacks; it is not changed. fn is called by one goroutine only, the caller's. A file that cannot
// be read any more, or became shorter (ErrTruncated), does not hold back the others: it is left alone, and its
// error comes with the end, joined to that of the end itself.
func FollowDir(ctx context.Context, dir string, done <-chan struct{}, start map[string]int64, fn func(Chunk) error) error {
	f := &follower{dir: dir, notify: true, offsets: maps.Clone(start), fn: fn}
	if f.offsets == nil {
		f.offsets = map[string]int64{}
	}
	err := f.run(ctx, done)
	if len(f.broken) == 0 {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(f.broken)) {
		err = errors.Join(err, f.broken[name])
	}
	return err
}

type follower struct {
	dir     string
	only    string // the one file to follow; empty for all logs
	chunk   int
	notify  bool // false: poll only, for tests
	offsets map[string]int64
	fn      func(Chunk) error

	buf     []byte
	watch   *fsnotify.Watcher // nil where there is none to be had
	watched bool              // dir is being watched
	broken  map[string]error  // files that are left alone
}

func (f *follower) run(ctx context.Context, done <-chan struct{}) (err error) {
	if f.chunk <= 0 {
		f.chunk = DefaultChunk
	}
	f.buf = make([]byte, f.chunk)
	for name, offset := range f.offsets {
		if offset < 0 {
			return fmt.Errorf("follow %s: negative offset %d", filepath.Join(f.dir, name), offset)
		}
	}
	var events <-chan fsnotify.Event
	var lost <-chan error
	if f.notify {
		// Without a watcher (a user has 128 of them by default) the poll still finds everything.
		if w, err := fsnotify.NewWatcher(); err == nil {
			f.watch, events, lost = w, w.Events, w.Errors
			defer func() { err = errors.Join(err, w.Close()) }()
		}
	}
	poll := time.NewTicker(pollEvery)
	defer poll.Stop()

	// The watch comes before the first look, so that nothing falls between the two.
	f.tryWatch()
	dirty, err := f.all()
	if err != nil {
		return err
	}
	closed := make(chan struct{})
	close(closed)
	for {
		if dirty, err = f.read(ctx, dirty); err != nil {
			return err
		}
		// With more to read the select does not wait, but still learns of the end and of other files.
		var again <-chan struct{}
		if len(dirty) > 0 {
			again = closed
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-done:
			return f.finish(ctx)
		case <-again:
		case e := <-events:
			if name, _, ok := parseSegment(filepath.Base(e.Name)); ok && f.follows(name) && !slices.Contains(dirty, name) {
				dirty = append(dirty, name)
			}
			if e.Has(fsnotify.Remove|fsnotify.Rename) && filepath.Clean(e.Name) == filepath.Clean(f.dir) {
				f.watched = false
			}
		case e := <-lost: // the kernel's queue ran over, or the watch broke: look at everything
			f.watched = f.watched && errors.Is(e, fsnotify.ErrEventOverflow)
			dirty, err = f.all()
		case <-poll.C:
			f.tryWatch()
			dirty, err = f.all()
		}
		if err != nil {
			return err
		}
	}
}

// tryWatch has dir watched if it is not yet; a directory that is still missing is tried again at the next poll.
func (f *follower) tryWatch() {
	if f.watch != nil && !f.watched {
		f.watched = f.watch.Add(f.dir) == nil
	}
}

func (f *follower) follows(name string) bool {
	if f.only != "" {
		return name == f.only
	}
	return isLog(name)
}

// all gives the names of the files to look at, sorted.
func (f *follower) all() ([]string, error) {
	if f.only != "" {
		return []string{f.only}, nil
	}
	all, err := list(f.dir)
	if err != nil {
		return nil, fmt.Errorf("follow logs: %w", err)
	}
	return slices.Sorted(maps.Keys(all)), nil
}

// read gives each of the named files a turn and returns those that have more.
func (f *follower) read(ctx context.Context, names []string) (more []string, err error) {
	for _, name := range names {
		unfinished, err := f.file(ctx, name, turn, -1)
		if err != nil {
			return nil, err
		}
		if unfinished {
			more = append(more, name)
		}
	}
	return more, nil
}

// finish reads what every file holds now. What is written later is not waited for: a writer that
// never stops must not keep the follower from ending.
func (f *follower) finish(ctx context.Context) error {
	names, err := f.all()
	if err != nil {
		return err
	}
	ends := map[string]int64{}
	for _, name := range names {
		switch end, err := Size(filepath.Join(f.dir, name)); {
		case errors.Is(err, errNotRegular):
		case err != nil:
			return fmt.Errorf("follow log: %w", err)
		default:
			ends[name] = end
		}
	}
	for _, name := range slices.Sorted(maps.Keys(ends)) {
		if _, err := f.file(ctx, name, -1, ends[name]); err != nil {
			return err
		}
	}
	return nil
}

// file gives what one file has after its offset to fn: at most chunks pieces (-1 = no limit) and not
// beyond the offset end (-1 = the file's). It tells whether there may be more. An error of the file itself is kept where
// there are others to go on with.
func (f *follower) file(ctx context.Context, name string, chunks int, end int64) (more bool, err error) {
	if _, broken := f.broken[name]; broken {
		return false, nil
	}
	more, own, err := f.pieces(ctx, name, chunks, end)
	if own == nil {
		return more, err
	}
	if f.only != "" {
		return false, own
	}
	if f.broken == nil {
		f.broken = map[string]error{}
	}
	f.broken[name] = own
	return false, err
}

// pieces does what file says; own is an error of the file, err one of fn or the context.
func (f *follower) pieces(ctx context.Context, name string, chunks int, last int64) (more bool, own, err error) {
	for chunks != 0 {
		at := f.offsets[name]
		segs, own := segments(f.dir, name)
		if own != nil {
			return false, fmt.Errorf("follow log: %w", own), nil
		}
		if len(segs) == 0 {
			if f.only != "" { // a link or fifo in its place is to be told of
				if _, own := fileSize(filepath.Join(f.dir, name)); own != nil {
					return false, fmt.Errorf("follow log: %w", own), nil
				}
			}
			if at > 0 {
				return false, truncated(f.dir, name, at, 0), nil
			}
			return false, nil, nil
		}
		// The segment that has the byte, or is to have it; or else the first one behind the gap.
		i := 0
		for i+1 < len(segs) && segs[i+1].start <= at {
			i++
		}
		n, moved, own, err := f.segment(ctx, name, segs, i, chunks, last)
		if own != nil || err != nil {
			return false, own, err
		}
		if chunks > 0 {
			chunks -= n
		}
		if !moved {
			return false, nil, nil
		}
	}
	return true, nil, nil
}

// segment gives what the i-th segment has after the log's offset, or what comes behind it. It tells how many pieces it gave,
// and whether there may be more in the log.
func (f *follower) segment(ctx context.Context, name string, segs []segment, i, chunks int, last int64) (n int, more bool, own, err error) {
	s, at := segs[i], f.offsets[name]
	var skipped int64
	file, own := openRegular(filepath.Join(f.dir, s.file), os.O_RDONLY)
	switch {
	case errors.Is(own, fs.ErrNotExist) && i+1 < len(segs):
		return 0, true, nil, nil // just dropped: look again
	case errors.Is(own, fs.ErrNotExist), errors.Is(own, errNotRegular) && f.only == "":
		return 0, false, nil, nil
	case own != nil:
		return 0, false, fmt.Errorf("follow log: %w", own), nil
	}
	defer file.Close()
	info, own := file.Stat()
	if own != nil {
		return 0, false, fmt.Errorf("follow log: %w", own), nil
	}
	if s.start > at { // the bytes in front of it are no more
		skipped, at = s.start-at, s.start
	} else if end := s.start + info.Size(); at > end && i+1 == len(segs) {
		return 0, false, truncated(f.dir, name, at, end), nil
	} else if at >= end && i+1 < len(segs) {
		// It is at its end, and the log goes on.
		next := segs[i+1].start
		if last >= 0 && next >= last {
			return 0, false, nil, nil
		}
		return f.segment(ctx, name, segs, i+1, chunks, last)
	}
	for ; n < chunks || chunks < 0; n++ {
		if ctx.Err() != nil {
			return n, false, nil, context.Cause(ctx)
		}
		buf := f.buf
		if last >= 0 {
			buf = buf[:min(int64(len(buf)), max(last-at, 0))]
		}
		data, own := readAt(file, buf, at-s.start)
		if own != nil {
			return n, false, fmt.Errorf("follow log: %w", own), nil
		}
		if len(data) == 0 && skipped == 0 {
			return n, i+1 < len(segs) && (last < 0 || at < last), nil, nil
		}
		times, own := timesIn(f.dir, s.file, at, at+int64(len(data)))
		if own != nil {
			return n, false, fmt.Errorf("follow log: %w", own), nil
		}
		if err := f.fn(Chunk{Name: name, Offset: at, Skipped: skipped, Data: data, Times: times}); err != nil {
			return n, false, nil, err
		}
		at, skipped = at+int64(len(data)), 0
		f.offsets[name] = at
	}
	return n, true, nil, nil
}

func truncated(dir, name string, at, size int64) error {
	return fmt.Errorf("follow %s from %d, which has %d bytes: %w", filepath.Join(dir, name), at, size, ErrTruncated)
}
