package sqlite

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/store"
)

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
