package sqlstore

import (
	"context"
	"fmt"
	"time"

	"github.com/pergolafl/pergola/internal/job"
)

// Claim takes or renews the lease of a job for owner, until until. It tells whether owner holds it now; if not, another one
// does whose time is not over at now. A job that does not exist is not found. A lease is what lets one hub of several see
// to a job: whoever acts on a job holds its lease, and stops in time when it cannot be renewed.
func (db *DB) Claim(ctx context.Context, id job.ID, owner string, until, now time.Time) (held bool, err error) {
	err = db.write(ctx, "claim a job", func(ctx context.Context, tx *txn) ([]job.ID, error) {
		var there bool
		if err := tx.QueryRowContext(ctx, "SELECT EXISTS (SELECT 1 FROM job WHERE id = ?)", id).Scan(&there); err != nil {
			return nil, err
		}
		if !there {
			return nil, noJob(id)
		}
		held, err = claim(ctx, tx, "lease", "job", string(id), owner, until, now)
		return nil, err
	})
	return held && err == nil, err
}

// Release gives the lease of a job back, if owner holds it, and wakes the job's subscribers.
func (db *DB) Release(ctx context.Context, id job.ID, owner string) error {
	return db.write(ctx, "release a job", func(ctx context.Context, tx *txn) ([]job.ID, error) {
		res, err := tx.ExecContext(ctx, "DELETE FROM lease WHERE job = ? AND owner = ?", id, owner)
		if err != nil {
			return nil, err
		}
		if n, err := res.RowsAffected(); n == 0 || err != nil {
			return nil, err
		}
		return []job.ID{id}, nil
	})
}

// claim writes owner into a table of leases, unless another one holds what key names. The names of the table and of its key are
// parts of the statement.
func claim(ctx context.Context, tx *txn, table, column, key, owner string, until, now time.Time) (held bool, err error) {
	res, err := tx.ExecContext(ctx, fmt.Sprintf(`INSERT INTO %[1]s (%[2]s, owner, until) VALUES (?, ?, ?)
		ON CONFLICT (%[2]s) DO UPDATE SET owner = excluded.owner, until = excluded.until WHERE %[1]s.owner = excluded.owner OR %[1]s.until <= ?`, table, column),
		key, owner, nanos(until), nanos(now))
	if err != nil {
		return false, err
	}
	n, err := res.RowsAffected()
	return n > 0, err
}
