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
	dsn := uri(path) + "mode=ro&" + busyDSN
	_, wal := os.Stat(path + "-wal")
	_, shm := os.Stat(path + "-shm")
	if wal != nil || shm != nil {
		// Nobody has it open. SQLite would make the files beside it, as whoever this is: the hub could not use them then.
		dsn = uri(path) + "mode=ro&immutable=1"
	}
	pool, err := sql.Open("sqlite", dsn)
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
