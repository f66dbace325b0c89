// Package sqlite is the store in one SQLite file, for a hub on one machine: its tables, and how it is opened and copied. What
// is done with the tables stands in package sqlstore. A call that returned nil survives a power cut. One process writes;
// others may read the file.
//
// Start with [Open].
package sqlite

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/pressly/goose/v3"
	"golang.org/x/sys/unix"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/store"
	"github.com/pergolafl/pergola/internal/store/sqlstore"
)

//go:embed migrations/*.sql
var migrations embed.FS

// DB is an open store. Its methods may be called from many goroutines.
type DB struct {
	*sqlstore.DB
	path string
	w    *sql.DB // one connection: SQLite has one writer, and a queue in front of it beats SQLITE_BUSY
	r    *sql.DB
}

var _ store.Store = (*DB)(nil)

// dialect is what sqlstore has to know. The writers' transactions begin with SQLite's own lock.
type dialect struct{ db *DB }

func (dialect) Numbered() bool                                 { return false }
func (dialect) Begin(context.Context, *sql.Tx) error           { return nil }
func (dialect) Changed(context.Context, *sql.Tx, job.ID) error { return nil }
func (d dialect) Trouble(err error, doing string) error        { return d.db.trouble(err, doing) }

// Pragmas stand in the DSN because Exec would set them on one pooled connection only. WAL lets
// readers go on beside the writer; FULL syncs at each commit, as "written before it is acted upon"
// demands.
const (
	busyDSN   = "_pragma=busy_timeout(5000)"
	writerDSN = busyDSN + "&_pragma=journal_mode(wal)&_pragma=synchronous(full)&_pragma=foreign_keys(1)&_txlock=immediate"
	readerDSN = busyDSN + "&_pragma=query_only(1)"
)

// lockPatience is how long another process's lock is waited for, as in busy_timeout above.
const lockPatience = 5 * time.Second

// readers is the number of connections that read at the same time.
const readers = 4

// Open opens the file at path, makes it (mode 0600, since specs hold environment variables) if it is
// not there, and brings its tables up to date. The folder must exist. A file of a newer Pergola
// is refused with code version.
func Open(ctx context.Context, path string) (*DB, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, problem.Wrap(err, problem.Usage, "give an absolute path", "the store's path %s cannot be used", path)
	}
	db := &DB{path: abs}
	if err := create(abs); err != nil {
		return nil, db.trouble(err, "open the store")
	}
	if db.w, err = sql.Open("sqlite", uri(abs)+writerDSN); err != nil {
		return nil, db.trouble(err, "open the store")
	}
	db.w.SetMaxOpenConns(1)
	if err := db.migrate(ctx); err != nil {
		return nil, errors.Join(err, db.w.Close())
	}
	if db.r, err = sql.Open("sqlite", uri(abs)+readerDSN); err != nil {
		return nil, errors.Join(db.trouble(err, "open the store"), db.w.Close())
	}
	db.r.SetMaxOpenConns(readers)
	db.r.SetMaxIdleConns(readers)
	if err := db.r.PingContext(ctx); err != nil {
		return nil, errors.Join(db.trouble(err, "open the store"), db.Close())
	}
	db.DB = sqlstore.New(db.w, db.r, dialect{db})
	return db, nil
}

// uri gives the beginning of the URI of an absolute path, which is none itself: "?" and "%" in it are escaped.
func uri(path string) string { return "file:" + (&url.URL{Path: path}).EscapedPath() + "?" }

// create makes an empty file that only its owner may read; SQLite's own would follow the umask, and
// the files beside it take its mode. A file that is there is not opened: closing it again would drop the locks
// that SQLite holds on it elsewhere in this process, as POSIX wants it.
func create(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err == nil {
		return f.Close()
	}
	if !errors.Is(err, fs.ErrExist) {
		return err
	}
	st, err := os.Stat(path)
	if err == nil && st.IsDir() {
		err = &fs.PathError{Op: "open", Path: path, Err: syscall.EISDIR}
	}
	return err
}

func (db *DB) migrate(ctx context.Context) error {
	files, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return db.trouble(err, "read the migrations")
	}
	// Some of SQLite's locks are refused at once, whatever busy_timeout says, as when two processes make the same file.
	over := time.NewTimer(lockPatience)
	defer over.Stop()
	for {
		err := sqlstore.Migrate(ctx, db.w, goose.DialectSQLite3, files, db.path, dialect{db})
		if problem.CodeOf(err) != problem.Unavailable {
			return err
		}
		select {
		case <-over.C:
			return err
		case <-ctx.Done():
			return err
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Close waits for running calls and closes the file. Subscribers are not woken.
func (db *DB) Close() error {
	// The writer last: the last connection folds the log back into the file and removes it, which a
	// reader may not do.
	var err error
	if db.r != nil {
		err = db.r.Close()
	}
	return errors.Join(err, db.w.Close())
}

// trouble makes a problem of what SQLite or the system says; doing is the sentence's verb. Problems pass, and so does the end
// of a caller's context.
func (db *DB) trouble(err error, doing string) error {
	if err == nil {
		return nil
	}
	if _, ok := errors.AsType[*problem.Error](err); ok {
		return err
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("%s: %w", doing, err)
	}
	if db.isFull(err) {
		return problem.Wrap(err, problem.DiskFull, "make room on the disk that holds "+filepath.Dir(db.path),
			"no space to %s in %s", doing, db.path)
	}
	if e, ok := errors.AsType[*sqlite.Error](err); ok && (e.Code()&0xff == sqlite3.SQLITE_NOTADB || e.Code()&0xff == sqlite3.SQLITE_CORRUPT) {
		return problem.Wrap(err, problem.Internal, "restore a backup, or move the file away to begin anew",
			"%s is damaged, or not a store", db.path)
	}
	if e, ok := errors.AsType[*sqlite.Error](err); ok {
		switch e.Code() & 0xff {
		case sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED: // by another process, for longer than busy_timeout
			return sqlstore.Unavailable(err, doing)
		case sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM:
			return problem.Wrap(err, problem.Usage, "check the folder and its owner", "cannot %s in %s", doing, db.path)
		}
	}
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) || errors.Is(err, syscall.EISDIR) {
		return problem.Wrap(err, problem.Usage, "check the folder and its owner", "cannot %s in %s", doing, db.path)
	}
	return problem.Wrap(err, problem.Internal, "see the hub's log", "cannot %s in %s", doing, db.path)
}

// isFull tells whether want of space is behind err. SQLite says so itself when a write fails for it,
// but reports a failed sync or a failed growth of its index of the log as plain I/O errors, and a log
// that cannot be made as "cannot open": there the disk is asked.
func (db *DB) isFull(err error) bool {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return true
	}
	e, ok := errors.AsType[*sqlite.Error](err)
	if !ok {
		return false
	}
	switch e.Code() & 0xff {
	case sqlite3.SQLITE_FULL:
		return true
	case sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN:
		var st unix.Statfs_t
		if unix.Statfs(filepath.Dir(db.path), &st) != nil {
			return false
		}
		return st.Bavail*uint64(st.Bsize) < 1<<20 || st.Files > 0 && st.Ffree == 0
	}
	return false
}
