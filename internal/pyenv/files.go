package pyenv

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pergolafl/pergola/internal/problem"
)

// writeFile replaces path by a file with b, so that a reader sees the old or the new one. durable has it survive a power
// cut once writeFile has returned.
func writeFile(path string, b []byte, durable bool) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	_, err = f.Write(b)
	if err == nil && durable {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err = os.Rename(f.Name(), path); err != nil || !durable {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// syncDir makes a rename in dir durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// lockPoll is how often a held lock is tried again: flock cannot be waited for together with a context.
const lockPoll = 100 * time.Millisecond

// flock takes the exclusive lock on path and gives what releases it. The lock dies with its process, whatever kills it.
// waiting is called once if somebody else holds it, and then every second.
func flock(ctx context.Context, path string, waiting func()) (unlock func(), err error) {
	return lockFile(ctx, path, unix.LOCK_EX, waiting)
}

func lockFile(ctx context.Context, path string, how int, waiting func()) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|syscall.O_CLOEXEC, 0o644)
	if err != nil {
		return nil, err
	}
	tick := time.NewTicker(lockPoll)
	defer tick.Stop()
	for n := 0; ; n++ {
		err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
		switch {
		case err == nil:
			return func() { _ = f.Close() }, nil
		case errors.Is(err, unix.EINTR):
			continue
		case !errors.Is(err, unix.EWOULDBLOCK):
			return nil, errors.Join(&os.PathError{Op: "flock", Path: path, Err: err}, f.Close())
		}
		if n%int(time.Second/lockPoll) == 0 {
			waiting()
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(context.Cause(ctx), f.Close())
		case <-tick.C:
		}
	}
}

// cacheProblem says what went wrong with the cache's own files.
func cacheProblem(err error, dir string) error {
	if full(err, "") {
		return diskFull(err, dir)
	}
	return problem.Wrap(err, problem.EnvBuildFailed, "make it writable, or name another folder with PERGOLA_CACHE", "the cache in %s cannot be used", dir)
}

func diskFull(err error, dir string) error {
	return problem.Wrap(err, problem.DiskFull, "make room there, or name a folder on another disk with PERGOLA_CACHE (environments take 0.2 to 6 GB)",
		"no space is left for a Python environment in %s", dir)
}

// full tells whether an error, or what a program said, means that a disk or a quota is full.
func full(err error, said string) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) ||
		strings.Contains(said, "No space left on device") || strings.Contains(said, "Disk quota exceeded") ||
		strings.Contains(said, "os error 28") || strings.Contains(said, "os error 122")
}

// scratch makes a folder that the caller removes. Folders that killed processes left are removed after a day.
func scratch(cacheDir string) (string, error) {
	top := filepath.Join(cacheDir, "tmp")
	if err := os.MkdirAll(top, 0o755); err != nil {
		return "", err
	}
	if old, err := os.ReadDir(top); err == nil {
		for _, e := range old {
			if info, err := e.Info(); err == nil && time.Since(info.ModTime()) > 24*time.Hour {
				_ = os.RemoveAll(filepath.Join(top, e.Name())) // another process may be at it too
			}
		}
	}
	return os.MkdirTemp(top, "w")
}

// lastLines gives the last n lines of text that are not blank, on one line.
func lastLines(text string, n int) string {
	var keep []string
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); line != "" {
			keep = append(keep, line)
		}
	}
	if len(keep) > n {
		keep = keep[len(keep)-n:]
	}
	return strings.Join(keep, " / ")
}

// syncAll has the file system that dir is on write out everything: an environment has thousands of files, and one such
// call is quicker than as many fsyncs.
func syncAll(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(unix.Syncfs(int(d.Fd())), d.Close())
}
