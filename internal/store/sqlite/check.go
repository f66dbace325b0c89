package sqlite

import (
	"context"
	"database/sql"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/store/sqlstore"
)

// Check reads the whole file at path, and tells what is wrong with it, or how it is. It writes nothing, and a hub may use the file meanwhile.
// A file that is not there is not-found, one that is damaged internal, one of a newer Pergola version.
func Check(ctx context.Context, path string) (sqlstore.Facts, error) {
	var f sqlstore.Facts
	path, err := filepath.Abs(path)
	if err != nil {
		return f, err
	}
	db := &DB{path: path}
	info, err := os.Stat(path)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return f, problem.Wrap(err, problem.NotFound, "start the hub, or give its directory", "there is no store %s", path)
		}
		return f, db.trouble(err, "read the store")
	}
	f.Bytes = info.Size()
	pool, err := sql.Open("sqlite", lookDSN(path))
	if err != nil {
		return f, db.trouble(err, "read the store")
	}
	defer pool.Close()
	pool.SetMaxOpenConns(1)
	rs, err := pool.QueryContext(ctx, "PRAGMA quick_check(3)")
	if err != nil {
		return f, db.trouble(err, "check the store")
	}
	defer rs.Close()
	var found []string
	for rs.Next() {
		var s string
		if err := rs.Scan(&s); err != nil {
			return f, db.trouble(err, "check the store")
		}
		if s != "ok" {
			found = append(found, strings.Join(strings.Fields(s), " "))
		}
	}
	if err := errors.Join(rs.Err(), rs.Close()); err != nil {
		return f, db.trouble(err, "check the store")
	}
	if len(found) > 0 {
		return f, problem.New(problem.Internal, "stop the hub, and restore a backup as docs/store.md says", "%s is damaged: %s", path, strings.Join(found, "; "))
	}
	files, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return f, err
	}
	err = f.Read(ctx, pool, files)
	if _, ok := errors.AsType[*problem.Error](err); err != nil && !ok {
		err = db.trouble(err, "check the store")
	}
	return f, err
}

// Look opens the file at path for reading alone: methods that write fail. Nothing is made or changed, not even the tables of an older Pergola.
func Look(ctx context.Context, path string) (*DB, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	db := &DB{path: path}
	if _, err := os.Stat(path); err != nil {
		return nil, db.trouble(err, "read the store")
	}
	pool, err := sql.Open("sqlite", lookDSN(path))
	if err != nil {
		return nil, db.trouble(err, "read the store")
	}
	if err := pool.PingContext(ctx); err != nil {
		return nil, errors.Join(db.trouble(err, "read the store"), pool.Close())
	}
	db.w, db.r = pool, pool
	db.DB = sqlstore.New(pool, pool, dialect{db})
	return db, nil
}

// lookDSN is for reading alone. Where nobody has the file open, SQLite would make the files beside it, as whoever this is: the hub could not
// use them then.
func lookDSN(path string) string {
	_, wal := os.Stat(path + "-wal")
	_, shm := os.Stat(path + "-shm")
	if wal != nil || shm != nil {
		return uri(path) + "mode=ro&immutable=1"
	}
	return uri(path) + "mode=ro&" + busyDSN
}
