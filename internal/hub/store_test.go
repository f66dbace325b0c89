package hub

import (
	"context"
	"database/sql"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/pergolafl/pergola/internal/api"
	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/store/pgtest"
	"github.com/pergolafl/pergola/internal/store/sqlite"
)

// While the store does not answer, calls say so, streams stay, and all goes on afterwards.
func TestStoreIsUnavailable(t *testing.T) {
	t.Run("postgres is stopped", func(t *testing.T) {
		server := pgtest.Start(t)
		s := serveAs(t, Config{Store: server.Fresh(t)})
		s.outage(func() { server.Freeze(t) }, func() { server.Thaw(t) }, true)
		if _, err := os.Stat(filepath.Join(s.dir, DatabaseFile)); err == nil {
			t.Error("there is a file for a store in Postgres")
		}
	})
	t.Run("postgres is down", func(t *testing.T) {
		server := pgtest.Start(t)
		s := serveAs(t, Config{Store: server.Fresh(t)})
		up, down := make(chan struct{}), make(chan struct{})
		back := make(chan struct{})
		s.outage(func() {
			go func() {
				defer close(back)
				server.Restart(t, func() { close(down); <-up })
			}()
			<-down
		}, func() { close(up); <-back }, true)
	})
	t.Run("sqlite is locked", func(t *testing.T) {
		s := serve(t)
		var other *sql.Conn
		s.outage(func() {
			pool, err := sql.Open("sqlite", "file:"+filepath.Join(s.dir, DatabaseFile)+"?_pragma=busy_timeout(5000)")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { pool.Close() })
			if other, err = pool.Conn(t.Context()); err == nil {
				_, err = other.ExecContext(t.Context(), "BEGIN EXCLUSIVE")
			}
			if err != nil {
				t.Fatal(err)
			}
		}, func() {
			if _, err := other.ExecContext(t.Context(), "ROLLBACK"); err != nil {
				t.Fatal(err)
			}
			if err := other.Close(); err != nil {
				t.Fatal(err)
			}
		}, false) // WAL lets readers go on
	})
}

// outage has a job that waits for another site, and an agent that is connected, while the store is away. Reads tells that it cannot be read either.
func (s *served) outage(begin, end func(), reads bool) {
	s.Helper()
	ctx, cancel := context.WithTimeout(s.Context(), 5*time.Minute)
	defer cancel()
	c := s.as(user)
	id, digest := s.submit()
	desired, err := s.as(siteB).Sites.WatchDesired(ctx, &pb.WatchDesiredRequest{Protocol: api.Protocol})
	if err != nil {
		s.Fatal(err)
	}
	defer desired.Close()
	if _, err := desired.Receive(); err != nil {
		s.Fatal(err)
	}
	watch, err := c.Jobs.WatchJob(ctx, &pb.WatchJobRequest{Id: string(id)})
	if err != nil {
		s.Fatal(err)
	}
	defer watch.Close()
	told := make(chan string, 100)
	go func() {
		defer close(told)
		for {
			m, err := watch.Receive()
			if err != nil {
				told <- fmt.Sprint("the stream's end: ", err)
				return
			}
			e, err := api.FromEvent(m.GetEvent())
			var b job.Text
			if err == nil && e.Kind == job.KindNote && e.Decode(&b) == nil && b.Message == "after the outage" {
				told <- ""
				return
			}
		}
	}()

	begin()
	submit := &pb.SubmitJobRequest{Name: "app", Key: "once", BundleDigest: digest, SpecJson: `{"sites":["a"]}`}
	if _, err := c.Jobs.SubmitJob(ctx, submit); problem.CodeOf(err) != problem.Unavailable {
		s.Errorf("SubmitJob during the outage: %v, want unavailable", err)
	}
	_, err = c.Jobs.GetJob(ctx, &pb.GetJobRequest{Id: string(id)})
	if reads && problem.CodeOf(err) != problem.Unavailable || !reads && err != nil {
		s.Errorf("GetJob during the outage: %v", err)
	}
	end()

	// Whoever tries again gets what they asked for, and one job of it.
	again := func() (string, error) {
		for {
			res, err := c.Jobs.SubmitJob(ctx, submit)
			if problem.CodeOf(err) != problem.Unavailable {
				return res.GetJob().GetId(), err
			}
		}
	}
	first, err1 := again()
	second, err2 := again()
	if err1 != nil || err2 != nil || first != second {
		s.Errorf("after the outage: %s, %v and %s, %v", first, err1, second, err2)
	}
	e, err := job.NewEvent(id, "a", job.KindNote, job.Text{Message: "after the outage"}, time.Now())
	if err != nil {
		s.Fatal(err)
	}
	if _, _, err := s.hub.db.Append(ctx, e, 0); err != nil {
		s.Errorf("after the outage: %v", err)
	}
	if what := <-told; what != "" {
		s.Errorf("who watched the job got %s", what)
	}
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	if n := s.hub.sites["b"].conns; n != 1 {
		s.Errorf("the agent that was there all the time has %d connections", n)
	}
}

// A copy of the store that is put in its place, as docs/store.md has it, is what the hub goes on from.
func TestBackupIsRestored(t *testing.T) {
	var s *served
	var id, later job.ID
	copied, dir := filepath.Join(t.TempDir(), "copy.db"), t.TempDir()
	t.Run("before", func(t *testing.T) {
		s = serve(t)
		id, _ = s.submit()
		if err := Backup(t.Context(), s.dir, copied); err != nil {
			t.Fatal(err)
		}
		later, _ = s.submit()
		if out, err := exec.CommandContext(t.Context(), "cp", "-a", s.dir+"/.", dir).CombinedOutput(); err != nil { // sockets, too
			t.Fatalf("%v: %s", err, out)
		}
		s.dir = dir // the other is removed with the test
	})
	for _, f := range []string{"-wal", "-shm"} {
		if err := os.Remove(filepath.Join(s.dir, DatabaseFile+f)); err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
	}
	if err := os.Rename(copied, filepath.Join(s.dir, DatabaseFile)); err != nil {
		t.Fatal(err)
	}
	h, err := Open(t.Context(), s.dir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer h.db.Close()
	if _, err := h.db.Job(t.Context(), id); err != nil {
		t.Errorf("the job of the copy: %v", err)
	}
	if _, err := h.db.Job(t.Context(), later); problem.CodeOf(err) != problem.NotFound {
		t.Errorf("a job after the copy: %v", err)
	}
}

// A job is one hub's at a time; another one takes it over when the first has been gone for the time of a lease. A hub that is
// started again has the same name, and so its jobs.
func TestLease(t *testing.T) {
	dir := t.TempDir()
	db, err := sqlite.Open(t.Context(), filepath.Join(dir, DatabaseFile))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	j, err := db.CreateJob(t.Context(), job.Job{}, []string{"a"})
	if err != nil {
		t.Fatal(err)
	}
	name := func(dir string) string {
		t.Helper()
		id, err := loadID(dir)
		if err != nil || id == "" {
			t.Fatalf("%q, %v", id, err)
		}
		return id
	}
	first, second := name(dir), name(t.TempDir())
	if first != name(dir) || first == second {
		t.Errorf("hubs are called %s, %s and %s", first, name(dir), second)
	}
	holds := func(l *lease, want bool) {
		t.Helper()
		if held, err := l.hold(t.Context()); held != want || err != nil {
			t.Errorf("%s holds the job: %v, %v; want %v", l.owner, held, err, want)
		}
	}
	a := &lease{db: db, job: j.ID, owner: first}
	b := &lease{db: db, job: j.ID, owner: second}
	holds(a, true)
	holds(b, false)
	holds(&lease{db: db, job: j.ID, owner: first}, true) // started again
	a.release(t.Context(), slog.New(slog.DiscardHandler))
	holds(b, true)
	holds(a, true) // by its own clock; it does not ask each time
	a.renewed = a.renewed.Add(-renewal)
	holds(a, false)
	holds(a, false)
	now := time.Now()
	if held, err := db.Claim(t.Context(), j.ID, first, now.Add(2*leaseTime), now.Add(leaseTime)); !held || err != nil {
		t.Errorf("the lease of a hub that is gone: %v, %v", held, err)
	}
	gone := &lease{db: db, job: job.NewID(now), owner: first}
	holds(gone, false)
}
