package keyed

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
)

// Of each name one at a time, of many names at once, and nothing is left of them.
func TestLocks(t *testing.T) {
	var l Locks
	var wg sync.WaitGroup
	counts := map[string]*int{"a": new(int), "b": new(int)}
	for name, n := range counts {
		for range 100 {
			wg.Go(func() {
				unlock, err := l.Lock(t.Context(), name)
				if err != nil {
					t.Error(err)
					return
				}
				*n++
				unlock()
			})
		}
	}
	wg.Wait()
	if *counts["a"] != 100 || *counts["b"] != 100 || len(l.locks) != 0 {
		t.Errorf("%d and %d of 100, %d locks left", *counts["a"], *counts["b"], len(l.locks))
	}
	a, err := l.Lock(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	b, err := l.Lock(t.Context(), "b") // not held up by the other
	if err != nil {
		t.Fatal(err)
	}
	enough := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(enough)
	if _, err := l.Lock(ctx, "a"); !errors.Is(err, enough) {
		t.Errorf("a wait that was ended gave %v", err)
	}
	a()
	b()
	if len(l.locks) != 0 {
		t.Errorf("%d locks are left", len(l.locks))
	}
}

// A lock that root makes in the folder of a service is the service's, which is to have it later.
func TestFileOfTheFoldersOwner(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root gives files away")
	}
	const uid = 54321
	dir := t.TempDir()
	if err := os.Chown(dir, uid, uid); err != nil {
		t.Fatal(err)
	}
	elsewhere := filepath.Join(t.TempDir(), "root's")
	link := filepath.Join(dir, "link")
	if err := os.Symlink(elsewhere, link); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, ".lock")
	for range 2 {
		unlock, err := File(path, true)
		if err != nil {
			t.Fatal(err)
		}
		unlock()
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if st, ok := info.Sys().(*syscall.Stat_t); !ok || st.Uid != uid || st.Gid != uid || info.Mode().Perm() != 0o600 {
			t.Errorf("the lock is %v of %+v", info.Mode(), info.Sys())
		}
	}
	if _, err := File(link, true); err == nil {
		t.Error("a link of the folder leads out of it")
	}
	if _, err := os.Lstat(elsewhere); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("where the link leads: %v", err)
	}
}
