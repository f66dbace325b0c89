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
	DefaultChunk = 64 << 10

	// pollEvery is the longest a change stays unseen where the kernel does not tell of it: network file
	// systems, a directory that does not exist yet, and users whose inotify instances are used up.
	pollEvery = 500 * time.Millisecond

	// turn is how many chunks of one file are read before the next file has its turn, so that a file
	// that grows without end does not hold back the others.
	turn = 16
)

// Follow gives the bytes of the file at path to fn, from offset on, in order, in pieces of at most
// chunk bytes (0 = DefaultChunk), as the file grows; it waits for a file, or folder, that is not there yet. It ends
// with nil once done is closed and fn has had everything that was in the file at that time, with
// ctx's cause when ctx ends, and with fn's error. done may be nil. data is valid during the call only.
// ErrTruncated (errors.Is) if the file is or becomes shorter than what was read.
func Follow(ctx context.Context, path string, done <-chan struct{}, offset int64, chunk int, fn func(offset int64, data []byte) error) error {
	base := filepath.Base(path)
	f := &follower{
		dir: filepath.Dir(path), chunk: chunk, only: base, notify: true,
		offsets: map[string]int64{base: offset},
		fn:      func(_ string, offset int64, data []byte) error { return fn(offset, data) },
	}
	return f.run(ctx, done)
}

// FollowDir follows all files *.txt and *.log, and MetricsFile, of dir (not of folders below it; no links), those that
// are there and those that appear, as Follow does. start has the offsets to begin at by name, 0 for a
// file that it lacks; it is not changed. fn is called by one goroutine only, the caller's. A file that cannot
// be read any more, or became shorter (ErrTruncated), does not hold back the others: it is left alone, and its
// error comes with the end, joined to that of the end itself.
func FollowDir(ctx context.Context, dir string, done <-chan struct{}, start map[string]int64, fn func(name string, offset int64, data []byte) error) error {
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
	fn      func(name string, offset int64, data []byte) error

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
			if name := filepath.Base(e.Name); f.follows(name) && !slices.Contains(dirty, name) {
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
	entries, err := os.ReadDir(f.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("follow logs: %w", err)
	}
	var names []string
	for _, e := range entries {
		if f.follows(e.Name()) && e.Type().IsRegular() {
			names = append(names, e.Name())
		}
	}
	return names, nil
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
func (f *follower) pieces(ctx context.Context, name string, chunks int, end int64) (more bool, own, err error) {
	path := filepath.Join(f.dir, name)
	file, own := openRegular(path, os.O_RDONLY)
	switch {
	case errors.Is(own, fs.ErrNotExist), errors.Is(own, errNotRegular) && f.only == "":
		return false, nil, nil
	case own != nil:
		return false, fmt.Errorf("follow log: %w", own), nil
	}
	defer file.Close()
	info, own := file.Stat()
	if own != nil {
		return false, fmt.Errorf("follow log: %w", own), nil
	}
	if at := f.offsets[name]; info.Size() < at {
		return false, fmt.Errorf("follow %s from %d, which has %d bytes: %w", path, at, info.Size(), ErrTruncated), nil
	}
	for ; chunks != 0; chunks-- {
		if ctx.Err() != nil {
			return false, nil, context.Cause(ctx)
		}
		at, buf := f.offsets[name], f.buf
		if end >= 0 {
			buf = buf[:min(int64(len(buf)), max(end-at, 0))]
		}
		data, own := readAt(file, buf, at)
		if own != nil {
			return false, fmt.Errorf("follow log: %w", own), nil
		}
		if len(data) == 0 {
			return false, nil, nil
		}
		if err := f.fn(name, at, data); err != nil {
			return false, nil, err
		}
		f.offsets[name] = at + int64(len(data))
	}
	return true, nil, nil
}
