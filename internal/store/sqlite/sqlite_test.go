package sqlite

import (
	"bufio"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/store"
	"github.com/pergolafl/pergola/internal/store/storetest"
)

// The test binary is also the process that gets killed, and the one whose disk is full.
const roleVar = "SQLITE_TEST_ROLE"

func TestMain(m *testing.M) {
	switch os.Getenv(roleVar) {
	case "writer":
		writer(os.Args[1])
	case "full":
		fullDisk(os.Args[1])
	default:
		goleak.VerifyTestMain(m)
	}
}

var t0 = time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)

func TestContract(t *testing.T) {
	storetest.Run(t, func(t *testing.T) storetest.Opener {
		path := filepath.Join(t.TempDir(), "jobs.db")
		return func() storetest.DB { return open(t, path) }
	})
}

func open(t *testing.T, path string) *DB {
	t.Helper()
	db, err := Open(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	return db
}

func closeDB(t *testing.T, db *DB) {
	t.Helper()
	if err := db.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
}

func TestPathsAreNotURIs(t *testing.T) {
	for _, name := range []string{"a?b=c.db", "a%41.db", "a#b.db", "ä b;c&d.db", "x:memory:.db"} {
		dir := t.TempDir()
		closeDB(t, open(t, filepath.Join(dir, name)))
		var got []string
		if err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
			if err == nil && !d.IsDir() {
				got = append(got, d.Name())
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		if len(got) != 1 || got[0] != name {
			t.Errorf("a store at %q left the files %q", name, got)
		}
	}
}

func TestFilesAreTheOwnersOnly(t *testing.T) {
	path := filepath.Join(t.TempDir(), "jobs.db")
	db := open(t, path)
	defer closeDB(t, db)
	if _, err := db.CreateJob(t.Context(), job.Job{Created: t0}, nil); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(path + "*")
	if err != nil || len(files) != 3 {
		t.Fatalf("files %v, %v; want the store, its log and the log's index", files, err)
	}
	for _, f := range files {
		if st, err := os.Stat(f); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v, %v; want 0600", f, st.Mode(), err)
		}
	}
}

// Every pooled connection has the pragmas, not just the first.
func TestPragmas(t *testing.T) {
	db := open(t, filepath.Join(t.TempDir(), "jobs.db"))
	defer closeDB(t, db)
	var held []*sql.Conn
	check := func(pool *sql.DB, want map[string]string) {
		t.Helper()
		c, err := pool.Conn(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, c)
		for pragma, want := range want {
			var got string
			if err := c.QueryRowContext(t.Context(), "PRAGMA "+pragma).Scan(&got); err != nil || got != want {
				t.Errorf("%s = %s, %v; want %s", pragma, got, err, want)
			}
		}
	}
	check(db.w, map[string]string{"journal_mode": "wal", "synchronous": "2", "foreign_keys": "1", "busy_timeout": "5000"})
	for range readers {
		check(db.r, map[string]string{"query_only": "1", "busy_timeout": "5000"})
	}
	for _, c := range held {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := db.r.ExecContext(t.Context(), "DELETE FROM job"); err == nil {
		t.Error("the reading pool can write")
	}
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	junk := filepath.Join(dir, "junk.db")
	if err := os.WriteFile(junk, []byte(strings.Repeat("this is not a store\n", 1000)), 0o600); err != nil {
		t.Fatal(err)
	}
	newer := filepath.Join(dir, "newer.db")
	db := open(t, newer)
	if _, err := db.w.ExecContext(t.Context(), "INSERT INTO goose_db_version (version_id, is_applied) VALUES (99999, 1)"); err != nil {
		t.Fatal(err)
	}
	closeDB(t, db)
	for _, c := range []struct {
		path string
		code problem.Code
		want string
	}{
		{filepath.Join(dir, "no", "such", "folder.db"), problem.Usage, "cannot open the store"},
		{dir, problem.Usage, "cannot open the store"},
		{junk, problem.Internal, "damaged, or not a store"},
		{newer, problem.Version, "has version 99999"},
	} {
		db, err := Open(t.Context(), c.path)
		if err == nil {
			closeDB(t, db)
		}
		if problem.CodeOf(err) != c.code || !strings.Contains(err.Error(), c.want) {
			t.Errorf("Open(%s) = %v, want code %s and %q", c.path, err, c.code, c.want)
		}
	}
}

// A store that is full says so, keeps what it has, and goes on when there is room again.
func TestFull(t *testing.T) {
	db := open(t, filepath.Join(t.TempDir(), "jobs.db"))
	defer closeDB(t, db)
	j, err := db.CreateJob(t.Context(), job.Job{Created: t0}, nil)
	if err != nil {
		t.Fatal(err)
	}
	var pages int
	if err := db.w.QueryRowContext(t.Context(), "PRAGMA page_count").Scan(&pages); err != nil {
		t.Fatal(err)
	}
	if _, err := db.w.ExecContext(t.Context(), fmt.Sprintf("PRAGMA max_page_count = %d", pages+5)); err != nil {
		t.Fatal(err)
	}
	stored, full := fill(t, db, j.ID)
	if problem.CodeOf(full) != problem.DiskFull {
		t.Fatalf("after %d events: %v, want disk-full", stored, full)
	}
	if _, err := db.w.ExecContext(t.Context(), "PRAGMA max_page_count = 100000"); err != nil {
		t.Fatal(err)
	}
	if err := db.Move(t.Context(), j.ID, job.Failed, problem.From(full), "", t0); err != nil {
		t.Errorf("with room again: %v", err)
	}
	if es, err := db.Events(t.Context(), j.ID, 0, 1<<20); err != nil || len(es) != stored+2 {
		t.Errorf("%d events, %v; want the %d that were stored and two moves", len(es), err, stored)
	}
}

func fill(t testing.TB, db *DB, id job.ID) (stored int, err error) {
	t.Helper()
	for ; stored < 100000; stored++ {
		e, err := job.NewEvent(id, "s1", job.KindNote, job.Text{Message: strings.Repeat("x", 2000)}, t0)
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := db.Append(t.Context(), e, int64(stored+1)); err != nil {
			return stored, err
		}
	}
	return stored, nil
}

// child starts this test binary in another role.
func child(t *testing.T, role string, args ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), self, args...)
	cmd.Env = append(os.Environ(), roleVar+"="+role)
	cmd.Stderr = os.Stderr
	return cmd
}

// A disk that is really full: a small one is mounted in a namespace of the child's own.
func TestFullDisk(t *testing.T) {
	dir := t.TempDir()
	cmd := child(t, "full", dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
	}
	out, err := cmd.Output()
	if ee, is := errors.AsType[*exec.ExitError](err); is && ee.ExitCode() == 77 || errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.ENOSPC) {
		t.Skipf("no file system can be mounted here: %v %s", err, out)
	}
	if err != nil || string(out) != "ok\n" {
		t.Errorf("%v\n%s", err, out)
	}
}

func fullDisk(dir string) {
	if err := syscall.Mount("none", dir, "tmpfs", 0, "size=2m"); err != nil {
		fmt.Println(err)
		os.Exit(77)
	}
	fail := func(format string, args ...any) {
		fmt.Printf(format+"\n", args...)
		os.Exit(1)
	}
	// Full before the store is there at all, …
	ballast := filepath.Join(dir, "ballast")
	err := os.WriteFile(ballast, make([]byte, 4<<20), 0o600)
	if !errors.Is(err, syscall.ENOSPC) {
		fail("the ballast: %v", err)
	}
	if _, err := Open(context.Background(), filepath.Join(dir, "jobs.db")); problem.CodeOf(err) != problem.DiskFull {
		fail("Open on a full disk: %v", err)
	}
	if err := os.Remove(ballast); err != nil {
		fail("%v", err)
	}
	// … and while it is written.
	db, err := Open(context.Background(), filepath.Join(dir, "jobs.db"))
	if err != nil {
		fail("Open with room again: %v", err)
	}
	j, err := db.CreateJob(context.Background(), job.Job{Created: t0}, nil)
	if err != nil {
		fail("%v", err)
	}
	n := 0
	for err == nil {
		e, _ := job.NewEvent(j.ID, "s1", job.KindNote, job.Text{Message: strings.Repeat("x", 3000)}, t0)
		if _, _, err = db.Append(context.Background(), e, 0); err == nil {
			n++
		}
	}
	if problem.CodeOf(err) != problem.DiskFull {
		fail("after %d events: %v, want disk-full", n, err)
	}
	if es, err := db.Events(context.Background(), j.ID, 0, 1<<20); err != nil || len(es) != n+1 {
		fail("%d events can be read, %v; want %d", len(es), err, n+1)
	}
	if err := db.Close(); err != nil {
		fail("Close: %v", err)
	}
	fmt.Println("ok")
}

// What was acknowledged before kill -9 is there after it, and the store opens again.
func TestKilledWriterLosesNothing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "jobs.db")
	acked := 0
	for round := range 3 {
		cmd := child(t, "writer", path)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		for n := 0; n < 40+17*round && lines.Scan(); n++ {
			acked++
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		for lines.Scan() { // what it had acknowledged when the signal came
			acked++
		}
		if err := cmd.Wait(); err == nil {
			t.Fatal("the writer ended by itself")
		}
	}
	db := open(t, path)
	defer closeDB(t, db)
	js, err := db.Jobs(t.Context(), store.Filter{})
	if err != nil || len(js) != 1 {
		t.Fatalf("%d jobs, %v; want the one that all writers share by its key", len(js), err)
	}
	n, err := db.PartySeq(t.Context(), js[0].ID, "s1")
	if err != nil || n < int64(acked) {
		t.Errorf("%d reports are stored, %v; %d were acknowledged", n, err, acked)
	}
	es, err := db.Events(t.Context(), js[0].ID, 0, 1<<20)
	if err != nil || int64(len(es)) != n+1 {
		t.Errorf("%d events for %d reports, %v", len(es), n, err)
	}
	var verdict string
	if err := db.r.QueryRowContext(t.Context(), "PRAGMA integrity_check").Scan(&verdict); err != nil || verdict != "ok" {
		t.Errorf("integrity: %s, %v", verdict, err)
	}
}

func writer(path string) {
	db, err := Open(context.Background(), path)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	j, err := db.CreateJob(context.Background(), job.Job{Created: t0, Key: "k"}, []string{"s1"})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	n, err := db.PartySeq(context.Background(), j.ID, "s1")
	for err == nil {
		n++
		if _, _, err = db.Append(context.Background(), job.Event{Job: j.ID, Party: "s1", Kind: job.KindNote, At: t0}, n); err == nil {
			fmt.Println(n)
		}
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

// Two processes that open a new store at the same time both get it.
func TestOpenAtTheSameTime(t *testing.T) {
	path := filepath.Join(t.TempDir(), "jobs.db")
	const n = 4
	errs := make(chan error, n)
	for range n {
		go func() {
			db, err := Open(t.Context(), path)
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

// BenchmarkAppend is what an event costs, its sync included.
func BenchmarkAppend(b *testing.B) {
	db, err := Open(b.Context(), filepath.Join(b.TempDir(), "jobs.db"))
	if err != nil {
		b.Fatal(err)
	}
	defer func() {
		if err := db.Close(); err != nil {
			b.Error(err)
		}
	}()
	j, err := db.CreateJob(b.Context(), job.Job{Created: t0}, []string{"s1"})
	if err != nil {
		b.Fatal(err)
	}
	for n := int64(1); b.Loop(); n++ {
		if _, _, err := db.Append(b.Context(), job.Event{Job: j.ID, Party: "s1", Kind: job.KindNote, At: t0}, n); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkCreateJob is what a submission costs, by as many at a time as there are submitters.
func BenchmarkCreateJob(b *testing.B) {
	db, err := Open(b.Context(), filepath.Join(b.TempDir(), "jobs.db"))
	if err != nil {
		b.Fatal(err)
	}
	defer func() {
		if err := db.Close(); err != nil {
			b.Error(err)
		}
	}()
	b.RunParallel(func(p *testing.PB) {
		for p.Next() {
			if _, err := db.CreateJob(b.Context(), job.Job{Name: "x", Submitter: "ada", Created: time.Now()}, []string{"s1", "s2", "s3"}); err != nil {
				b.Error(err)
				return
			}
		}
	})
}

// A store that another process holds is unavailable to writers, not to readers, and good again afterwards.
func TestLocked(t *testing.T) {
	path := filepath.Join(t.TempDir(), "jobs.db")
	db := open(t, path)
	defer closeDB(t, db)
	j, err := db.CreateJob(t.Context(), job.Job{Created: t0}, nil)
	if err != nil {
		t.Fatal(err)
	}
	holder := open(t, path)
	defer closeDB(t, holder)
	tx, err := holder.w.BeginTx(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	const n = 4 // more than one waits for the other's lock, the rest for the first
	errs := make(chan error, n)
	for range n {
		go func() { errs <- db.Move(t.Context(), j.ID, job.Queued, nil, "", t0) }()
	}
	if _, err := db.Job(t.Context(), j.ID); err != nil {
		t.Errorf("reading: %v", err)
	}
	for range n {
		if err := <-errs; problem.CodeOf(err) != problem.Unavailable {
			t.Errorf("writing: %v, want unavailable", err)
		}
	}
	if err := tx.Rollback(); err != nil {
		t.Fatal(err)
	}
	if err := db.Move(t.Context(), j.ID, job.Queued, nil, "", t0); err != nil {
		t.Errorf("after the lock: %v", err)
	}
}
