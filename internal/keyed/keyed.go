// Package keyed has locks by name, for what is done to one thing at a time and to many things at once. It is no lock between
// processes; [File] is one. Start with [Locks].
package keyed

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// File waits for the lock of a file, which it makes if there is none: with shared, together with others who share it. The lock
// goes with the process, whatever ends it.
func File(path string, shared bool) (unlock func(), err error) {
	f, err := open(path)
	if err != nil {
		return nil, err
	}
	how := unix.LOCK_EX
	if shared {
		how = unix.LOCK_SH
	}
	for {
		err := unix.Flock(int(f.Fd()), how)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, errors.Join(err, f.Close())
		}
		return func() { _ = f.Close() }, nil // which unlocks
	}
}

// open opens a lock's file, or makes it. What root makes in the folder of another user, for whom a service works there, is that user's.
func open(path string) (*os.File, error) {
	for {
		f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW, 0)
		if !errors.Is(err, fs.ErrNotExist) {
			return f, err
		}
		f, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600) // nothing else than a new file is given away
		if errors.Is(err, fs.ErrExist) {
			continue
		}
		if err != nil || os.Geteuid() != 0 {
			return f, err
		}
		var dir unix.Stat_t
		if err := unix.Stat(filepath.Dir(path), &dir); err != nil {
			return nil, errors.Join(err, f.Close())
		}
		if err := f.Chown(int(dir.Uid), int(dir.Gid)); err != nil {
			return nil, errors.Join(err, f.Close())
		}
		return f, nil
	}
}

// Locks has a lock for each name. The zero value is ready.
type Locks struct {
	mu    sync.Mutex // guards the rest
	locks map[string]*lock
}

type lock struct {
	held  chan struct{} // has room for one: who holds the lock has filled it
	users int           // those who hold it or wait for it
}

// Lock waits until nobody else has the lock of that name, or ctx ends, whose cause it gives then. Who has it calls unlock, once.
func (l *Locks) Lock(ctx context.Context, name string) (unlock func(), err error) {
	l.mu.Lock()
	if l.locks == nil {
		l.locks = map[string]*lock{}
	}
	k := l.locks[name]
	if k == nil {
		k = &lock{held: make(chan struct{}, 1)}
		l.locks[name] = k
	}
	k.users++
	l.mu.Unlock()
	leave := func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if k.users--; k.users == 0 {
			delete(l.locks, name)
		}
	}
	select {
	case k.held <- struct{}{}:
		return func() { <-k.held; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, context.Cause(ctx)
	}
}
