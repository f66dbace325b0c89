package postgres

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/store"
	"github.com/pergolafl/pergola/internal/store/pgtest"
	"github.com/pergolafl/pergola/internal/store/storetest"
)

// A call that was given up leaves its connection to the driver, which ends it in the background and says when.
func TestMain(m *testing.M) {
	code := m.Run()
	if code == 0 {
		if err := goleak.Find(goleak.IgnoreAnyFunction("github.com/jackc/pgx/v5/pgconn.(*PgConn).asyncClose.func1")); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

var t0 = time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)

func open(t *testing.T, url string) *DB {
	t.Helper()
	db, err := Open(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	return db
}

func closed(t *testing.T, db *DB) {
	t.Helper()
	if err := db.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
}

func newJob(t *testing.T, db *DB) job.Job {
	t.Helper()
	j, err := db.CreateJob(t.Context(), job.Job{Created: t0}, []string{"s1"})
	if err != nil {
		t.Fatal(err)
	}
	return j
}

func TestPostgres(t *testing.T) {
	server := pgtest.Start(t)
	t.Run("contract", func(t *testing.T) {
		storetest.Run(t, func(t *testing.T) storetest.Opener {
			url := server.Fresh(t)
			return func() storetest.DB { return open(t, url) }
		})
	})
	t.Run("other processes hear of changes", func(t *testing.T) { testNotify(t, server) })
	t.Run("many open an empty database", func(t *testing.T) { testOpenTogether(t, server) })
	t.Run("opening is refused", func(t *testing.T) { testRefuses(t, server) })
	t.Run("errors hide the password", func(t *testing.T) { testPassword(t, server) })
	t.Run("a client that stops holds nobody up for ever", func(t *testing.T) { testStuck(t, server) })
	t.Run("no backup", func(t *testing.T) {
		db := open(t, server.Fresh(t))
		defer closed(t, db)
		if err := db.Backup(t.Context(), "x"); problem.CodeOf(err) != problem.Usage || !strings.Contains(err.Error(), "pg_dump") {
			t.Errorf("Backup: %v", err)
		}
	})
	// These cut everybody off.
	t.Run("frozen", func(t *testing.T) { testFrozen(t, server) })
	t.Run("restarted", func(t *testing.T) { testRestarted(t, server) })
}

func heard(t *testing.T, wake <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-wake:
	case <-t.Context().Done():
		t.Fatalf("nobody heard of %s", what)
	}
}

func testNotify(t *testing.T, server *pgtest.Server) {
	url := server.Fresh(t)
	a, b := open(t, url), open(t, url)
	defer closed(t, a)
	defer closed(t, b)
	j, other := newJob(t, a), newJob(t, a)
	// Messages come in order: after that of a third job, those of the first two are past.
	third := job.NewID(t0)
	past, cancelPast := b.Subscribe(third)
	defer cancelPast()
	if _, err := a.CreateJob(t.Context(), job.Job{ID: third, Created: t0}, nil); err != nil {
		t.Fatal(err)
	}
	heard(t, past, "a third job")
	wake, cancel := b.Subscribe(j.ID)
	defer cancel()
	wakeOther, cancelOther := b.Subscribe(other.ID)
	defer cancelOther()
	all, cancelAll := b.Subscribe("")
	defer cancelAll()
	if err := a.Move(t.Context(), j.ID, job.Queued, nil, "", t0); err != nil {
		t.Fatal(err)
	}
	heard(t, wake, "a move")
	if err := a.SetDrained(t.Context(), "s1", true); err != nil {
		t.Fatal(err)
	}
	for { // those of the jobs above come here too
		heard(t, all, "a drained site")
		if i, err := b.Identity(t.Context(), "site", "s1"); err == nil && i.Drained {
			break
		}
	}
	if err := a.Move(t.Context(), other.ID, job.Queued, nil, "", t0); err != nil {
		t.Fatal(err)
	}
	heard(t, wakeOther, "the other job's move")
	if len(wake) != 0 {
		t.Error("the subscribers of one job wake for another")
	}
}

func testOpenTogether(t *testing.T, server *pgtest.Server) {
	url := server.Fresh(t)
	const n = 3
	errs := make(chan error, n)
	for range n {
		go func() {
			db, err := Open(t.Context(), url)
			if err == nil {
				err = db.Close()
			}
			errs <- err
		}()
	}
	for range n {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
}

func testRefuses(t *testing.T, server *pgtest.Server) {
	newer := server.Fresh(t)
	db := open(t, newer)
	if _, err := db.w.ExecContext(t.Context(), "INSERT INTO goose_db_version (version_id, is_applied) VALUES (99999, true)"); err != nil {
		t.Fatal(err)
	}
	closed(t, db)
	mine := server.Fresh(t)
	server.SQL(t, "CREATE ROLE stranger LOGIN")
	for name, c := range map[string]struct {
		url  string
		code problem.Code
		want string
	}{
		"tables of a newer Pergola": {newer, problem.Version, "has version 99999"},
		"no such database":          {strings.Replace(mine, "///", "///no-", 1), problem.Usage, "does not exist"},
		"no such user":              {strings.Replace(mine, "user=pergola", "user=nobody-here", 1), problem.Usage, "does not exist"},
		"no right":                  {strings.Replace(mine, "user=pergola", "user=stranger", 1), problem.Usage, "permission denied"},
		"no server":                 {"postgres://x@127.0.0.1:1/x", problem.Unavailable, "does not answer"},
		"no address":                {"postgres://x@h:port/", problem.Usage, "cannot be read"},
	} {
		db, err := Open(t.Context(), c.url)
		if err == nil {
			closed(t, db)
		}
		if problem.CodeOf(err) != c.code || err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want code %s and %q", name, err, c.code, c.want)
		}
	}
}

func testPassword(t *testing.T, server *pgtest.Server) {
	for _, url := range []string{
		"postgres://x:geheim@127.0.0.1:1/x", "postgres://x:geheim:y@/", "postgres://x:geheim@127.0.0.1:notaport/x",
		strings.Replace(server.Fresh(t), "///", "///no-", 1) + "&password=geheim",
	} {
		_, err := Open(t.Context(), url)
		if err == nil || strings.Contains(err.Error(), "geheim") {
			t.Errorf("%v", err)
		}
	}
}

// A process that is stopped in the middle of a write is cut off by the server.
func testStuck(t *testing.T, server *pgtest.Server) {
	url := server.Fresh(t)
	stuck := open(t, url+"&idle_in_transaction_session_timeout=100")
	defer closed(t, stuck)
	db := open(t, url)
	defer closed(t, db)
	tx, err := stuck.w.BeginTx(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := (dialect{stuck}).Begin(t.Context(), tx); err != nil {
		t.Fatal(err)
	}
	newJob(t, db) // waits for the other's lock
	if err := tx.Commit(); err == nil {
		t.Error("the transaction was still there")
	}
}

// A server that does not answer makes calls fail in time, and they are served again when it goes on.
func testFrozen(t *testing.T, server *pgtest.Server) {
	db := open(t, server.Fresh(t))
	defer closed(t, db)
	j := newJob(t, db)
	server.Freeze(t)
	calls := map[string]func(context.Context) error{
		"a write": func(ctx context.Context) error { return db.Move(ctx, j.ID, job.Queued, nil, "", t0) },
		"a read":  func(ctx context.Context) error { _, err := db.Job(ctx, j.ID); return err },
		"a page":  func(ctx context.Context) error { _, err := db.Jobs(ctx, store.Filter{}); return err },
	}
	answers := make(chan string, len(calls))
	for name, call := range calls {
		go func() {
			if err := call(t.Context()); problem.CodeOf(err) != problem.Unavailable {
				answers <- fmt.Sprintf("%s: %v, want unavailable", name, err)
				return
			}
			answers <- ""
		}()
	}
	for range calls {
		if s := <-answers; s != "" {
			t.Error(s)
		}
	}
	server.Thaw(t)
	again(t, func() error { return db.Move(t.Context(), j.ID, job.Queued, nil, "", t0) })
	if j, err := db.Job(t.Context(), j.ID); err != nil || j.State != job.Queued {
		t.Errorf("the job is %s, %v", j.State, err)
	}
}

// again repeats a call until the store is there.
func again(t *testing.T, call func() error) {
	t.Helper()
	for {
		err := call()
		if err == nil {
			return
		}
		if problem.CodeOf(err) != problem.Unavailable {
			t.Fatal(err)
		}
		pause(t.Context(), 50*time.Millisecond)
	}
}

// A server that was restarted is found again, by the calls and by those that wait for changes.
func testRestarted(t *testing.T, server *pgtest.Server) {
	url := server.Fresh(t)
	a, b := open(t, url), open(t, url)
	defer closed(t, a)
	defer closed(t, b)
	j := newJob(t, a)
	wake, cancel := b.Subscribe(j.ID)
	defer cancel()
	server.Restart(t, func() {
		if _, err := a.Job(t.Context(), j.ID); problem.CodeOf(err) != problem.Unavailable {
			t.Errorf("while the server is down: %v", err)
		}
		if err := a.SetReason(t.Context(), j.ID, "x"); problem.CodeOf(err) != problem.Unavailable {
			t.Errorf("while the server is down: %v", err)
		}
		if _, err := Open(t.Context(), url); problem.CodeOf(err) != problem.Unavailable {
			t.Errorf("Open while the server is down: %v", err)
		}
	})
	again(t, func() error { return a.Move(t.Context(), j.ID, job.Queued, nil, "", t0) })
	heard(t, wake, "a connection that was made anew, or a move")
	if err := a.Move(t.Context(), j.ID, job.Preparing, nil, "", t0); err != nil {
		t.Fatal(err)
	}
	heard(t, wake, "a move after the restart")
}
