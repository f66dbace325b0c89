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

// Backup writes the store, as it is at one moment, to a new file at path (mode 0600) that Open opens, while others go on
// writing. It is whole and on disk when nil is returned; a file that is there already is refused with code exists.
func (db *DB) Backup(ctx context.Context, path string) (err error) {
	const doing = "write the backup"
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		if err != nil {
			return problem.Wrap(err, problem.Usage, "check the folder and its owner", "cannot %s %s", doing, path)
		}
		return problem.New(problem.Exists, "name another file, or remove this one", "%s exists already, and is not overwritten", path)
	}
	// A file that is named as a backup is one: it gets its name when it is whole.
	part, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*.part") // mode 0600; SQLite fills an empty file
	if err != nil {
		return problem.Wrap(err, problem.Usage, "check the folder and its owner", "cannot %s %s", doing, path)
	}
	defer func() {
		err = errors.Join(err, part.Close())
		if rerr := os.Remove(part.Name()); !errors.Is(rerr, fs.ErrNotExist) {
			err = errors.Join(err, rerr)
		}
	}()
	// The readers' connections may write nothing, and the writer's would be held up.
	pool, err := sql.Open("sqlite", db.uri+"_pragma=busy_timeout(5000)")
	if err != nil {
		return db.trouble(err, doing)
	}
	_, err = pool.ExecContext(ctx, "VACUUM INTO ?", part.Name())
	if err = errors.Join(err, pool.Close()); err != nil {
		if target := (&DB{path: path}); target.isFull(err) {
			return target.trouble(err, doing)
		}
		return db.trouble(err, doing)
	}
	if err := part.Sync(); err != nil {
		return db.trouble(err, doing)
	}
	if err := os.Rename(part.Name(), path); err != nil {
		return db.trouble(err, doing)
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return db.trouble(err, doing)
	}
	return errors.Join(dir.Sync(), dir.Close())
}
