package monitor

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// Disk is what a file system has, as a user without privileges may use it.
type Disk struct {
	Size, Free         uint64 // bytes
	Inodes, FreeInodes uint64 // zero where the file system does not count them
}

// DiskOf gives what the file system of path has; of a path that is not there, that of the nearest folder above.
func DiskOf(path string) (Disk, error) {
	for {
		var st unix.Statfs_t
		err := unix.Statfs(path, &st)
		if err == nil {
			size := uint64(st.Bsize)
			return Disk{Size: st.Blocks * size, Free: st.Bavail * size, Inodes: st.Files, FreeInodes: st.Ffree}, nil
		}
		up := filepath.Dir(path)
		if !errors.Is(err, fs.ErrNotExist) || up == path {
			return Disk{}, &fs.PathError{Op: "statfs", Path: path, Err: err}
		}
		path = up
	}
}

// Usage sums up the disk space of the files below dir, in bytes, each under the name that class gives for its path below dir. Files that go meanwhile
// are none; a dir that is not there has none.
func Usage(ctx context.Context, dir string, class func(path string) string, into map[string]uint64) error {
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
				return nil
			}
			return err
		}
		info, err := d.Info()
		if err != nil {
			return nil //nolint:nilerr // it is gone
		}
		size := uint64(info.Size())
		if st, ok := info.Sys().(*syscall.Stat_t); ok {
			size = uint64(st.Blocks) * 512 // stat(2): whatever the block size is
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		into[class(filepath.ToSlash(rel))] += size
		return nil
	})
}

// OpenFiles gives how many descriptors this process has open, and how many it may have.
func OpenFiles() (open int, limit uint64, err error) {
	es, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return 0, 0, err
	}
	var l unix.Rlimit
	err = unix.Getrlimit(unix.RLIMIT_NOFILE, &l)
	return len(es) - 1, l.Cur, err
}
