package sqlite

import (
	"context"
	"database/sql"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/pergolafl/pergola/internal/problem"
)

// Backup writes the store, as it is at one moment, to a new file at path, as Copy does.
func (db *DB) Backup(ctx context.Context, path string) error { return Copy(ctx, db.path, path) }

// Copy writes the store in the file at from, as it is at one moment, to a new file at path (mode 0600) that Open opens. Other
// processes may go on writing to from; it is not changed in any way. The copy is whole and on disk when nil is returned; a file
// that is there already is refused with code exists, and a store that is not there with not-found.
func Copy(ctx context.Context, from, path string) (err error) {
	const doing = "write the backup"
	from, err = filepath.Abs(from)
	if err != nil {
		return problem.Wrap(err, problem.Usage, "give an absolute path", "the store's path %s cannot be used", from)
	}
	source, target := &DB{path: from}, &DB{path: path}
	if _, err := os.Stat(from); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return problem.Wrap(err, problem.NotFound, "check the path", "there is no store %s", from)
		}
		return source.trouble(err, "read the store")
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		if err != nil {
			return target.trouble(err, doing)
		}
		return problem.New(problem.Exists, "name another file, or remove this one", "%s exists already, and is not overwritten", path)
	}
	// A file that is named as a backup is one: it gets its name when it is whole.
	part, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*.part") // mode 0600; SQLite fills an empty file
	if err != nil {
		return target.trouble(err, doing)
	}
	defer func() {
		err = errors.Join(err, part.Close())
		if rerr := os.Remove(part.Name()); !errors.Is(rerr, fs.ErrNotExist) {
			err = errors.Join(err, rerr)
		}
	}()
	pool, err := sql.Open("sqlite", uri(from)+"mode=rw&"+busyDSN)
	if err != nil {
		return source.trouble(err, doing)
	}
	_, err = pool.ExecContext(ctx, "VACUUM INTO ?", part.Name())
	if err = errors.Join(err, pool.Close()); err != nil {
		if ctx.Err() == nil && target.isFull(err) {
			return target.trouble(err, doing)
		}
		return source.trouble(err, doing)
	}
	if err := part.Sync(); err != nil {
		return target.trouble(err, doing)
	}
	if err := os.Rename(part.Name(), path); err != nil {
		return target.trouble(err, doing)
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return target.trouble(err, doing)
	}
	return errors.Join(dir.Sync(), dir.Close())
}
