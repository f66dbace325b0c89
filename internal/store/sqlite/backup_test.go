package sqlite

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/store"
)

// A backup of an older Pergola's store does not bring its tables up to date: the hub that uses it may still run.
func TestBackupChangesNothing(t *testing.T) {
	dir := t.TempDir()
	db := open(t, filepath.Join(dir, "jobs.db"))
	if _, err := db.w.ExecContext(t.Context(), "DELETE FROM goose_db_version WHERE version_id >= 3"); err != nil {
		t.Fatal(err)
	}
	defer closeDB(t, db)
	if err := db.Backup(t.Context(), filepath.Join(dir, "copy")); err != nil {
		t.Fatal(err)
	}
	var n int
	if err := db.r.QueryRowContext(t.Context(), "SELECT max(version_id) FROM goose_db_version").Scan(&n); err != nil || n != 2 {
		t.Errorf("version %d, %v", n, err)
	}
}

// A backup that is made while a writer writes is one moment's store, and opens as one.
func TestBackup(t *testing.T) {
	dir := t.TempDir()
	db := open(t, filepath.Join(dir, "jobs.db"))
	defer closeDB(t, db)
	j, err := db.CreateJob(t.Context(), job.Job{Created: t0}, []string{"s1"})
	if err != nil {
		t.Fatal(err)
	}
	stop, wrote := make(chan struct{}), make(chan int64)
	go func() {
		for n := int64(1); ; n++ {
			select {
			case <-stop:
				wrote <- n - 1
				return
			default:
			}
			if _, _, err := db.Append(t.Context(), job.Event{Job: j.ID, Party: "s1", Kind: job.KindNote, At: t0}, n); err != nil {
				t.Error(err)
				wrote <- n - 1
				return
			}
		}
	}()
	path := filepath.Join(t.TempDir(), "a 'quoted' name?.db")
	err = db.Backup(t.Context(), path)
	close(stop)
	last := <-wrote
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the backup: %v, %v; want mode 0600", st, err)
	}
	if err := db.Backup(t.Context(), path); problem.CodeOf(err) != problem.Exists {
		t.Errorf("a second backup to the same file: %v", err)
	}
	if err := db.Backup(t.Context(), filepath.Join(dir, "no", "folder")); problem.CodeOf(err) != problem.Usage {
		t.Errorf("a backup to nowhere: %v", err)
	}
	if err := Copy(t.Context(), filepath.Join(dir, "none.db"), filepath.Join(dir, "x")); problem.CodeOf(err) != problem.NotFound {
		t.Errorf("a backup of nothing: %v", err)
	}
	if fs, err := os.ReadDir(filepath.Dir(path)); err != nil || len(fs) != 1 {
		t.Errorf("beside the backup: %v, %v", fs, err)
	}
	copied := open(t, path)
	defer closeDB(t, copied)
	n, err := copied.PartySeq(t.Context(), j.ID, "s1")
	if err != nil || n > last {
		t.Fatalf("the backup has %d reports, %v; %d were written", n, err, last)
	}
	if es, err := copied.Events(t.Context(), j.ID, 0, 1<<20); err != nil || int64(len(es)) != n+1 {
		t.Errorf("the backup has %d events for %d reports, %v", len(es), n, err)
	}
	if js, err := copied.Jobs(t.Context(), store.Filter{}); err != nil || len(js) != 1 {
		t.Errorf("the backup has %d jobs, %v", len(js), err)
	}
}
