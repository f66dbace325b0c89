package native

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pergolafl/pergola/internal/proc"
)

// Shim is the Python side, written to a folder.
type Shim struct {
	Boot   string // boot.py
	Digest string // of all of its files
}

// Install writes the Python side to a folder below cache that is named by its content, unless it is there. Python keeps its bytecode beside
// it, so that only the first process compiles it.
func Install(cache string, files fs.FS) (Shim, error) {
	sum := sha256.New()
	content := map[string][]byte{}
	err := fs.WalkDir(files, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := fs.ReadFile(files, name)
		content[name] = b
		fmt.Fprintf(sum, "%s %d\n%s", name, len(b), b)
		return err
	})
	if err != nil {
		return Shim{}, err
	}
	digest := hex.EncodeToString(sum.Sum(nil))[:24]
	root := filepath.Join(cache, "native")
	dir := filepath.Join(root, digest)
	shim := Shim{Boot: filepath.Join(dir, "boot.py"), Digest: digest}
	if _, err := os.Stat(dir); err == nil {
		return shim, nil
	}
	if err := os.MkdirAll(root, 0o700); err != nil {
		return shim, err
	}
	// Made beside its place and moved there as a whole: several runners may do so at once, and whoever is second has lost nothing.
	tmp, err := os.MkdirTemp(root, ".new-")
	if err != nil {
		return shim, err
	}
	defer func() { _ = os.RemoveAll(tmp) }() // it was renamed if all went well
	for name, b := range content {
		at := filepath.Join(tmp, filepath.FromSlash(path.Clean(name)))
		if err := os.MkdirAll(filepath.Dir(at), 0o700); err != nil {
			return shim, err
		}
		if err := os.WriteFile(at, b, 0o600); err != nil {
			return shim, err
		}
	}
	if err := os.Rename(tmp, dir); err != nil {
		if _, e := os.Stat(dir); e != nil {
			return shim, err
		}
	}
	return shim, nil
}

// checkPatience is for an import from a cold disk; normally a second.
const checkPatience = 2 * time.Minute

// Verdict is what the Python side says of an environment.
type Verdict struct {
	OK   bool   `json:"ok"`
	Flwr string `json:"flwr,omitempty"`
	Why  string `json:"why,omitempty"` // not OK: what is not as it should be
}

// Check has the Python side try itself out in an environment. The answer is kept in cacheFile, "" keeps nothing; the name should tell the
// environment and the digest. The error is that of ctx, or that the interpreter could not be started.
func (s Shim) Check(ctx context.Context, python string, env []string, cacheFile string) (Verdict, error) {
	var v Verdict
	if cacheFile != "" {
		if kept(cacheFile, &v) {
			return v, nil
		}
		// Of several parties on one machine, one asks.
		unlock, err := lock(ctx, cacheFile)
		if err != nil {
			return v, err
		}
		defer unlock()
		if kept(cacheFile, &v) {
			return v, nil
		}
	}
	timed, cancel := context.WithTimeout(ctx, checkPatience)
	defer cancel()
	out, err := proc.Run(timed, proc.Spec{Name: "python", Args: []string{python, s.Boot, "check"}, Env: env})
	if err != nil {
		if ctx.Err() == nil && timed.Err() != nil {
			return Verdict{Why: "it did not answer in time"}, nil
		}
		return v, err
	}
	lines := strings.Split(strings.TrimSpace(out.Stdout), "\n")
	last := lines[len(lines)-1] // libraries greet at their import
	if err := json.Unmarshal([]byte(last), &v); err != nil || !out.Exit.OK() {
		said := strings.Split(strings.TrimSpace(out.Stderr), "\n")
		return Verdict{Why: strings.TrimSpace(fmt.Sprintf("%s: %s", out.Exit, said[len(said)-1]))}, nil
	}
	if v.OK && cacheFile != "" {
		// Written to the side first: it is read without the lock. What cannot be kept is asked again.
		tmp := fmt.Sprintf("%s.%d", cacheFile, os.Getpid())
		if err := os.WriteFile(tmp, []byte(last+"\n"), 0o600); err == nil {
			_ = os.Rename(tmp, cacheFile)
		}
	}
	return v, nil
}

// kept reads a verdict that was kept: a good one. What did not work may work the next time.
func kept(cacheFile string, v *Verdict) bool {
	b, err := os.ReadFile(cacheFile)
	return err == nil && json.Unmarshal(b, v) == nil && v.OK
}

// lock holds the lock of a cache file until unlock.
func lock(ctx context.Context, cacheFile string) (unlock func(), err error) {
	if err := os.MkdirAll(filepath.Dir(cacheFile), 0o700); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(cacheFile+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	got := make(chan error, 1)
	go func() { // ends with the holder, who has checkPatience
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX)
		for errors.Is(err, unix.EINTR) {
			err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
		}
		got <- err
		if ctx.Err() != nil {
			_ = f.Close()
		}
	}()
	select {
	case err := <-got:
		if err != nil {
			return nil, errors.Join(err, f.Close())
		}
		return func() { _ = f.Close() }, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}
