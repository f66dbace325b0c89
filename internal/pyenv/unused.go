package pyenv

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// usedName is the file beside an environment that those hold who use it, and that tells when one last began to. It is not the builders'
// lock: whoever waits for a build must not wait for those who use what was built.
func usedName(dir string) string { return dir + ".used" }

// Hold keeps an environment from being removed as unused until release is called, or this process ends. It tells whether the
// environment is still there: if not, it is to be ensured again.
func Hold(ctx context.Context, env Env) (release func(), ok bool, err error) {
	if env.Existing || env.Key == "" {
		return func() {}, true, nil
	}
	release, err = lockFile(ctx, usedName(env.Dir), unix.LOCK_SH, func() {})
	if err != nil {
		return nil, false, err
	}
	now := time.Now()
	if !complete(env.Dir, env.Key) || !executable(env.Python) {
		release()
		return nil, false, nil
	}
	if err := os.Chtimes(usedName(env.Dir), now, now); err != nil {
		release()
		return nil, false, err
	}
	return release, true, nil
}

// Unused is an environment that nobody holds.
type Unused struct {
	Dir   string
	Since time.Time // when it was held or built last
}

var envForm = regexp.MustCompile(`^[0-9a-f]{24}$`)

// FindUnused gives the environments of a cache that were used last before a time, and that nobody holds.
func FindUnused(cacheDir string, before time.Time) ([]Unused, error) {
	envs := filepath.Join(cacheDir, "envs")
	es, err := os.ReadDir(envs)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var out []Unused
	for _, e := range es {
		if !envForm.MatchString(e.Name()) || !e.IsDir() {
			continue
		}
		u := Unused{Dir: filepath.Join(envs, e.Name())}
		if err := u.alone(before, func() error {
			out = append(out, u)
			return nil
		}); err != nil {
			return out, err
		}
	}
	return out, nil
}

// Remove removes it, unless it was used after before, or is held now; it tells whether it did. What is left of a removal that was
// cut short does not count as an environment, and is removed by the next builder or collector.
func (u Unused) Remove(before time.Time) (removed bool, err error) {
	err = u.alone(before, func() error {
		if err := os.Remove(filepath.Join(u.Dir, markerName)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		removed = true
		return os.RemoveAll(u.Dir)
	})
	return removed, err
}

// alone calls fn if nobody holds or builds the environment and it was used last before that time, which it notes.
func (u *Unused) alone(before time.Time, fn func() error) error {
	_, unheld := os.Stat(usedName(u.Dir)) // taking the lock makes one, of which the time says nothing
	for _, name := range []string{u.Dir + ".lock", usedName(u.Dir)} {
		f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR|syscall.O_CLOEXEC, 0o644)
		if err != nil {
			return err
		}
		defer f.Close() //nolint:revive // two of them, held until fn is done
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			if errors.Is(err, unix.EWOULDBLOCK) {
				return nil
			}
			return err
		}
	}
	info, err := os.Stat(filepath.Join(u.Dir, markerName))
	if errors.Is(err, fs.ErrNotExist) {
		info, err = os.Stat(u.Dir) // of a build or removal that was cut short
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	u.Since = info.ModTime()
	if unheld != nil {
		if err := os.Chtimes(usedName(u.Dir), u.Since, u.Since); err != nil {
			return err
		}
	} else if used, err := os.Stat(usedName(u.Dir)); err != nil {
		return err
	} else if used.ModTime().After(u.Since) {
		u.Since = used.ModTime()
	}
	if !u.Since.Before(before) {
		return nil
	}
	return fn()
}
