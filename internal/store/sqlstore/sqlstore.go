// Package sqlstore is the store in SQL, for every database: what is written, in which transaction, and who is woken. What
// databases differ in is a [Dialect], which the packages sqlite and postgres give, with the tables and how they are opened.
//
// Statements are written with ? for arguments and in the SQL that both databases understand. A writing transaction is alone:
// SQLite has one writer, and the Postgres dialect takes a lock. So the numbers of events are in the order of their commits,
// and who reads on from a number misses none. Start with [DB] and [DB.Move].
package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/store"
)

// Dialect is what databases differ in.
type Dialect interface {
	// Numbered tells that arguments are written $1, $2, … and not ?.
	Numbered() bool
	// Begin is the first to act in each writing transaction, and sees to it that there is no other one.
	Begin(ctx context.Context, tx *sql.Tx) error
	// Changed is the last to act in a transaction that changed something about a job ("" = something else), for other processes.
	Changed(ctx context.Context, tx *sql.Tx, id job.ID) error
	// Trouble makes a problem of what the driver or the system says; doing is the sentence's verb and object.
	Trouble(err error, doing string) error
}

// DB is an open store, but for Backup. Its methods may be called from many goroutines.
type DB struct {
	store.Fanout
	w, r *sql.DB
	d    Dialect
	obs  store.Observer
}

// Patience is the longest time that a call waits for the database; then it is unavailable. It is longer than SQLite's waiting
// for another process's lock, and short enough for whoever waits for the answer.
const Patience = 10 * time.Second

var errPatience = errors.New("no answer within " + Patience.String())

// New gives the store over two pools, which may be the same: writers take their connections from w, readers from r.
func New(w, r *sql.DB, d Dialect) *DB { return &DB{w: w, r: r, d: d} }

// patient bounds a call.
func patient(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, Patience, errPatience)
}

// trouble makes a problem of what the database or the system says; doing is the sentence's verb and object. Problems pass.
// Where the caller's context is over, that is the reason, in whatever words it came.
func (db *DB) trouble(ctx context.Context, err error, doing string) error {
	if err == nil {
		return nil
	}
	if _, ok := errors.AsType[*problem.Error](err); ok {
		return err
	}
	if ctx.Err() != nil {
		if cause := context.Cause(ctx); !errors.Is(cause, errPatience) {
			return fmt.Errorf("%s: %w", doing, cause)
		}
		return Unavailable(errPatience, doing)
	}
	return db.d.Trouble(err, doing)
}

// Unavailable is the problem of a database that does not answer for now.
func Unavailable(err error, doing string) error {
	return problem.Wrap(err, problem.Unavailable, "try again; if it stays so, look at the hub's store, as docs/store.md says",
		"the hub cannot %s for now: its store does not answer", doing)
}

// rows are the results of a query, and end its bound when they are closed.
type rows struct {
	*sql.Rows
	ctx   context.Context
	done  context.CancelFunc
	since time.Time
}

// query reads without a transaction. Whoever gets rows hands them to collect.
func (db *DB) query(ctx context.Context, q string, args ...any) (rows, error) {
	since := time.Now()
	ctx, done := patient(ctx)
	rs, err := db.r.QueryContext(ctx, db.stmt(q), clean(args)...) //nolint:rowserrcheck // collect does
	return rows{rs, ctx, done, since}, err
}

// one reads a single row without a transaction. It gives sql.ErrNoRows where there is none, any other error as a problem.
func one[T any](ctx context.Context, db *DB, doing string, scan func(row) (T, error), q string, args ...any) (T, error) {
	since := time.Now()
	ctx, done := patient(ctx)
	defer done()
	v, err := scan(db.r.QueryRowContext(ctx, db.stmt(q), clean(args)...))
	if errors.Is(err, sql.ErrNoRows) {
		db.called(doing, false, since, nil)
		return v, sql.ErrNoRows
	}
	err = db.trouble(ctx, err, doing)
	db.called(doing, false, since, err)
	return v, err
}

func collect[T any](db *DB, rs rows, err error, doing string, scan func(row) (T, error)) (out []T, problem error) {
	defer rs.done()
	defer func() { db.called(doing, false, rs.since, problem) }()
	if err != nil {
		return nil, db.trouble(rs.ctx, err, doing)
	}
	for rs.Next() {
		v, err := scan(rs)
		if err != nil {
			return nil, db.trouble(rs.ctx, errors.Join(err, rs.Close()), doing)
		}
		out = append(out, v)
	}
	return out, db.trouble(rs.ctx, errors.Join(rs.Err(), rs.Close()), doing)
}

// txn is a writing transaction.
type txn struct {
	tx     *sql.Tx
	db     *DB
	events []job.Event // that are stored with it
}

func (t *txn) ExecContext(ctx context.Context, q string, args ...any) (sql.Result, error) {
	return t.tx.ExecContext(ctx, t.db.stmt(q), clean(args)...)
}

func (t *txn) QueryRowContext(ctx context.Context, q string, args ...any) *sql.Row {
	return t.tx.QueryRowContext(ctx, t.db.stmt(q), clean(args)...)
}

// write runs fn in one transaction, beside which there is no other writer. fn says about which jobs it changed something;
// "" stands for what is no job's.
func (db *DB) write(ctx context.Context, doing string, fn func(context.Context, *txn) (changed []job.ID, err error)) (err error) {
	since := time.Now()
	defer func() { db.called(doing, true, since, err) }()
	ctx, done := patient(ctx)
	defer done()
	tx, err := db.w.BeginTx(ctx, nil)
	if err != nil {
		return db.trouble(ctx, err, doing)
	}
	var changed []job.ID
	t := &txn{tx: tx, db: db}
	err = db.d.Begin(ctx, tx)
	if err == nil {
		changed, err = fn(ctx, t)
	}
	for _, id := range changed {
		if err == nil {
			err = db.d.Changed(ctx, tx, id)
		}
	}
	if err != nil {
		// A failed write may have ended the transaction by itself, and fn's error is the one that counts.
		if rerr := tx.Rollback(); rerr != nil && !errors.Is(rerr, sql.ErrTxDone) {
			err = errors.Join(err, rerr)
		}
		return db.trouble(ctx, err, doing)
	}
	err = tx.Commit()
	for _, id := range changed { // also if the commit failed: its answer may be lost and the change stored all the same
		db.Wake(id)
	}
	if err == nil && db.obs.Event != nil {
		for _, e := range t.events {
			db.obs.Event(e)
		}
	}
	return db.trouble(ctx, err, doing)
}

// change runs fn with the job as it is, in one transaction. It says whether it changed something.
func (db *DB) change(ctx context.Context, doing string, id job.ID, fn func(context.Context, *txn, job.Job) (bool, error)) error {
	return db.write(ctx, doing, func(ctx context.Context, tx *txn) ([]job.ID, error) {
		j, err := scanJob(tx.QueryRowContext(ctx, "SELECT "+jobColumns+" FROM job WHERE id = ?", id))
		if errors.Is(err, sql.ErrNoRows) {
			return nil, noJob(id)
		}
		if err != nil {
			return nil, err
		}
		if changed, err := fn(ctx, tx, j); !changed || err != nil {
			return nil, err
		}
		return []job.ID{id}, nil
	})
}

// stmt writes a statement as the dialect has it. No statement has a ? that is not an argument.
func (db *DB) stmt(q string) string {
	if !db.d.Numbered() {
		return q
	}
	var b strings.Builder
	for n := 1; ; n++ {
		before, after, more := strings.Cut(q, "?")
		b.WriteString(before)
		if !more {
			return b.String()
		}
		b.WriteString("$" + strconv.Itoa(n))
		q = after
	}
}

// clean makes texts of arguments that every database takes: Postgres refuses NUL, and what is not UTF-8.
func clean(args []any) []any {
	for i, a := range args {
		switch v := a.(type) {
		case string:
			args[i] = text(v)
		case job.ID:
			args[i] = text(string(v))
		case job.State:
			args[i] = text(string(v))
		case job.PartyState:
			args[i] = text(string(v))
		}
	}
	return args
}

func text(s string) string {
	return strings.ReplaceAll(strings.ToValidUTF8(s, "\ufffd"), "\x00", "\ufffd")
}

type row interface{ Scan(...any) error }

func nanos(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

func stamp(ns int64) time.Time {
	if ns == 0 {
		return time.Time{}
	}
	return time.Unix(0, ns).UTC()
}

func flag(b bool) int64 {
	if b {
		return 1
	}
	return 0
}

func limit(n int) int {
	if n <= 0 {
		return store.DefaultLimit
	}
	return n
}
