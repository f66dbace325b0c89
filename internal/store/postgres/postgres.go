// Package postgres is the store in a Postgres database, for hubs whose store is to be kept, copied and watched as others of the
// house are: its tables, how it is reached, and how processes that share it wake one another. What is done with the tables
// stands in package sqlstore.
//
// The database is the hub's alone, though several processes may use it at a time. Start with [Open].
package postgres

import (
	"context"
	"crypto/rand"
	"database/sql"
	"database/sql/driver"
	"embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/pressly/goose/v3"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/store"
	"github.com/pergolafl/pergola/internal/store/sqlstore"
)

//go:embed migrations/*.sql
var migrations embed.FS

const (
	// readers is the number of connections that read at the same time. One more writes, and one listens.
	readers = 4

	// Advisory locks of the database: of whoever writes, and of whoever brings the tables up to date. The numbers mean nothing.
	writeLock   = 7161601
	migrateLock = 7161602

	// channel is where processes tell one another what they changed: "ORIGIN JOB", as one message of NOTIFY.
	channel = "pergola"

	connectTimeout = 5 * time.Second
	// stuckTimeout is when the server ends a transaction whose client does nothing more, such as one that was stopped: it would
	// hold up all others.
	stuckTimeout = 15 * time.Second
	// listenCheck is how often the listening connection is looked at: one that a firewall has forgotten brings nothing, silently.
	listenCheck = 15 * time.Second
	// relisten is the pause before listening is tried again.
	relisten = time.Second
)

// DB is an open store. Its methods may be called from many goroutines.
type DB struct {
	*sqlstore.DB
	name   string // of the database, for people: without the password
	origin string // of this process's messages
	conf   *pgx.ConnConfig
	w, r   *sql.DB
	stop   context.CancelFunc // of listen
	wg     sync.WaitGroup
}

var _ store.Store = (*DB)(nil)

// Open connects to the database at url, "postgres://USER[:PASSWORD]@HOST[:PORT]/DATABASE[?OPTION=VALUE…]" as libpq knows it, or
// as libpq's words (a unix socket's folder is a host, too), and brings its tables up to date. What the url does not say comes from
// libpq's environment and files, such as PGPASSFILE. Tables of a newer Pergola are refused with code version.
func Open(ctx context.Context, url string) (*DB, error) {
	conf, err := parse(url)
	if err != nil {
		return nil, err
	}
	if conf.ConnectTimeout == 0 {
		conf.ConnectTimeout = connectTimeout
	}
	for k, v := range map[string]string{
		"application_name":                    "pergola",
		"idle_in_transaction_session_timeout": strconv.FormatInt(stuckTimeout.Milliseconds(), 10),
	} {
		if _, ok := conf.RuntimeParams[k]; !ok {
			conf.RuntimeParams[k] = v
		}
	}
	db := &DB{name: name(conf), origin: rand.Text(), conf: conf}
	db.w, db.r = stdlib.OpenDB(*conf), stdlib.OpenDB(*conf)
	db.w.SetMaxOpenConns(1) // there is one writer at a time: a queue here beats one in the server
	db.r.SetMaxOpenConns(readers)
	db.r.SetMaxIdleConns(readers)
	db.DB = sqlstore.New(db.w, db.r, dialect{db})
	if err := db.migrate(ctx); err != nil {
		return nil, errors.Join(err, db.w.Close(), db.r.Close())
	}
	conn, err := db.listen(ctx)
	if err != nil {
		return nil, errors.Join(dialect{db}.Trouble(err, "listen for changes"), db.w.Close(), db.r.Close())
	}
	bg, stop := context.WithCancel(context.WithoutCancel(ctx))
	db.stop = stop
	db.wg.Go(func() { db.hear(bg, conn) })
	return db, nil
}

// Close ends the connections. Subscribers are not woken.
func (db *DB) Close() error {
	db.stop()
	db.wg.Wait()
	return errors.Join(db.r.Close(), db.w.Close())
}

// Backup is refused: the database's own tools do that.
func (db *DB) Backup(context.Context, string) error { return noBackup(db.conf) }

// NoBackup is Backup's refusal for the database at url, which need not be reached for that.
func NoBackup(url string) error {
	conf, err := parse(url)
	if err != nil {
		return err
	}
	return noBackup(conf)
}

func noBackup(conf *pgx.ConnConfig) error {
	return problem.New(problem.Usage, "copy it with: pg_dump --format=custom --file=FILE "+conf.Database,
		"the store is the Postgres database %s, and copied by Postgres's own tools", name(conf))
}

func parse(url string) (*pgx.ConnConfig, error) {
	conf, err := pgx.ParseConfig(url)
	if err != nil { // its text leaves the password out
		return nil, problem.Wrap(err, problem.Usage, "write it as postgres://USER@HOST/DATABASE", "the store's address cannot be read")
	}
	return conf, nil
}

// name names the database for people, without the password.
func name(conf *pgx.ConnConfig) string { return conf.Database + " at " + conf.Host }

func (db *DB) migrate(ctx context.Context) (err error) {
	d := dialect{db}
	files, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return err
	}
	// The lock is of the connection; the steps go over another one.
	conn, err := db.r.Conn(ctx)
	if err != nil {
		return d.Trouble(err, "open the store")
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	if _, err := conn.ExecContext(ctx, "SELECT pg_advisory_lock($1)", migrateLock); err != nil {
		return d.Trouble(err, "open the store")
	}
	err = sqlstore.Migrate(ctx, db.w, goose.DialectPostgres, files, db.name, d)
	// Where unlocking fails, the connection is broken, and the lock gone with it.
	if _, uerr := conn.ExecContext(context.WithoutCancel(ctx), "SELECT pg_advisory_unlock($1)", migrateLock); err == nil && uerr != nil {
		err = d.Trouble(uerr, "open the store")
	}
	return err
}

// listen gives a connection to which the messages of other processes come.
func (db *DB) listen(ctx context.Context) (*pgx.Conn, error) {
	conn, err := pgx.ConnectConfig(ctx, db.conf.Copy())
	if err != nil {
		return nil, err
	}
	if _, err := conn.Exec(ctx, "LISTEN "+channel); err != nil {
		return nil, errors.Join(err, conn.Close(ctx))
	}
	return conn, nil
}

// hear wakes this process's subscribers after the changes of others, until ctx is done. While the connection is broken,
// messages are lost, so all are woken when there is a new one.
func (db *DB) hear(ctx context.Context, conn *pgx.Conn) {
	for ctx.Err() == nil {
		if conn == nil {
			attempt, cancel := context.WithTimeout(ctx, connectTimeout)
			conn, _ = db.listen(attempt) // that it cannot be reached, whoever needs the store hears from their own calls
			cancel()
			if conn == nil {
				pause(ctx, relisten)
				continue
			}
			db.WakeAll()
		}
		if err := db.message(ctx, conn); err != nil {
			closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
			_ = conn.Close(closing) // it is given up, in whatever state it is
			cancel()
			conn = nil
		}
	}
	if conn != nil {
		closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		_ = conn.Close(closing)
	}
}

// message waits for one message, or asks whether the connection still lives.
func (db *DB) message(ctx context.Context, conn *pgx.Conn) error {
	wait, cancel := context.WithTimeout(ctx, listenCheck)
	m, err := conn.WaitForNotification(wait)
	cancel()
	if err == nil {
		if origin, id, ok := strings.Cut(m.Payload, " "); ok && origin != db.origin {
			db.Wake(job.ID(id))
		}
		return nil
	}
	if ctx.Err() != nil || !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	ping, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	return conn.Ping(ping)
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

type dialect struct{ db *DB }

// Numbered is for $1, $2, ….
func (dialect) Numbered() bool { return true }

// Begin waits until no other process writes. Locking the rows that are changed would do for each job by itself; but the numbers
// of events are given before the commit, and one that is lower than what a reader has seen already would never be read.
func (dialect) Begin(ctx context.Context, tx *sql.Tx) error {
	_, err := tx.ExecContext(ctx, "SELECT pg_advisory_xact_lock($1)", writeLock)
	return err
}

// Changed sends a message that goes out with the commit.
func (d dialect) Changed(ctx context.Context, tx *sql.Tx, id job.ID) error {
	_, err := tx.ExecContext(ctx, "SELECT pg_notify($1, $2)", channel, d.db.origin+" "+string(id))
	return err
}

// passing are SQLSTATEs, and classes of them, of what is better at another time:
// https://www.postgresql.org/docs/current/errcodes-appendix.html
var passing = []string{
	"08",    // the connection
	"57P",   // shut down, crashed, starting, connection ended by an administrator
	"57014", // cancelled, by a time limit
	"53300", // too many connections
	"55P03", // a lock cannot be had
	"25P03", // the transaction was idle for too long
	"25006", // a server that takes no writes, as after a switch to another one
	"40",    // rolled back, as after a deadlock
}

// refusing are SQLSTATEs, and classes of them, of what somebody has to set right.
var refusing = []string{
	"28",    // who one is
	"3D000", // no such database
	"42501", // no right to do that
}

// Trouble makes a problem of what the server, the driver or the system says.
func (d dialect) Trouble(err error, doing string) error {
	if err == nil {
		return nil
	}
	if _, ok := errors.AsType[*problem.Error](err); ok {
		return err
	}
	if e, ok := errors.AsType[*pgconn.PgError](err); ok {
		is := func(list []string) bool {
			return slices.ContainsFunc(list, func(s string) bool { return strings.HasPrefix(e.Code, s) })
		}
		switch {
		case is(passing):
			return sqlstore.Unavailable(err, doing)
		case is(refusing):
			return problem.Wrap(err, problem.Usage, "check store in hub.toml, and the rights of its user in Postgres",
				"cannot %s in the Postgres database %s: %s", doing, d.db.name, e.Message)
		case e.Code == "53100":
			return problem.Wrap(err, problem.DiskFull, "make room on the disk of the Postgres server", "no space to %s in the Postgres database %s", doing, d.db.name)
		}
		return problem.Wrap(err, problem.Internal, "see the hub's log", "cannot %s in the Postgres database %s", doing, d.db.name)
	}
	if errors.Is(err, context.Canceled) {
		return fmt.Errorf("%s: %w", doing, err)
	}
	_, dialling := errors.AsType[*pgconn.ConnectError](err)
	_, network := errors.AsType[net.Error](err)
	gone := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, driver.ErrBadConn) || errors.Is(err, sql.ErrConnDone) ||
		errors.Is(err, net.ErrClosed) || errors.Is(err, context.DeadlineExceeded)
	if dialling || network || gone || pgconn.SafeToRetry(err) || pgconn.Timeout(err) {
		return sqlstore.Unavailable(err, doing)
	}
	return problem.Wrap(err, problem.Internal, "see the hub's log", "cannot %s in the Postgres database %s", doing, d.db.name)
}
