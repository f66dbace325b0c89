package sqlstore

import (
	"context"
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
		res, err := tx.ExecContext(ctx, `INSERT INTO lease (job, owner, until) VALUES (?, ?, ?)
			ON CONFLICT (job) DO UPDATE SET owner = excluded.owner, until = excluded.until WHERE lease.owner = excluded.owner OR lease.until <= ?`,
			id, owner, nanos(until), nanos(now))
		if err != nil {
			return nil, err
		}
		n, err := res.RowsAffected()
		held = n > 0
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
