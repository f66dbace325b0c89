package flower

import (
	"database/sql"
	"path/filepath"
	"testing"
	"time"
)

func TestTakeOffline(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state #1?.db")
	db, err := sql.Open("sqlite", "file:"+filepath.ToSlash(filepath.Dir(path))+"/state%20%231%3F.db")
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	now := time.Now().Unix()
	for _, q := range []string{
		"CREATE TABLE node (node_id INTEGER UNIQUE, online_until REAL, ping_interval REAL, public_key BLOB)", // as 1.12 makes it
		"PRAGMA journal_mode = wal",
	} {
		if _, err := db.ExecContext(t.Context(), q); err != nil {
			t.Fatal(err)
		}
	}
	for i, until := range []any{now + 3600, now - 50, nil} {
		if _, err := db.ExecContext(t.Context(), "INSERT INTO node (node_id, online_until) VALUES (?, ?)", i, until); err != nil {
			t.Fatal(err)
		}
	}
	if n, err := TakeOffline(t.Context(), path); n != 1 || err != nil {
		t.Errorf("%d nodes were taken offline, %v; want one", n, err)
	}
	var online, kept int
	if err := db.QueryRowContext(t.Context(), "SELECT count(*) FILTER (WHERE online_until > ?), count(*) FILTER (WHERE online_until = ?) FROM node",
		float64(time.Now().UnixMicro())/1e6, now-50).Scan(&online, &kept); err != nil || online != 0 || kept != 1 {
		t.Errorf("%d nodes are online and %d as they were, %v", online, kept, err)
	}
	if _, err := TakeOffline(t.Context(), filepath.Join(t.TempDir(), "none.db")); err == nil {
		t.Error("a database that does not exist was made")
	}
}
