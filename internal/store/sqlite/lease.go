package sqlite

import (
	"context"
	"database/sql"
	"time"

	"github.com/pergolafl/pergola/internal/job"
)

// Claim takes or renews the lease of a job for owner, until until. It tells whether owner holds it now; if not, another one
// does whose time is not over at now. A job that does not exist is not found. A lease is what lets one hub of several see
// to a job: whoever acts on a job holds its lease, and stops in time when it cannot be renewed.
func (db *DB) Claim(ctx context.Context, id job.ID, owner string, until, now time.Time) (held bool, err error) {
	err = db.write(ctx, "claim a job", func(tx *sql.Tx) error {
		var there bool
		if err := tx.QueryRowContext(ctx, "SELECT EXISTS (SELECT 1 FROM job WHERE id = ?)", id).Scan(&there); err != nil {
			return err
		}
		if !there {
			return noJob(id)
		}
		res, err := tx.ExecContext(ctx, `INSERT INTO lease (job, owner, until) VALUES (?, ?, ?)
			ON CONFLICT (job) DO UPDATE SET owner = excluded.owner, until = excluded.until WHERE lease.owner = excluded.owner OR lease.until <= ?`,
			id, owner, nanos(until), nanos(now))
		if err != nil {
			return err
		}
		n, err := res.RowsAffected()
		held = n > 0
		return err
	})
	return held && err == nil, err
}

// Release gives the lease of a job back, if owner holds it, and wakes the job's subscribers.
func (db *DB) Release(ctx context.Context, id job.ID, owner string) error {
	gone := false
	err := db.write(ctx, "release a job", func(tx *sql.Tx) error {
		res, err := tx.ExecContext(ctx, "DELETE FROM lease WHERE job = ? AND owner = ?", id, owner)
		if err != nil {
			return err
		}
		n, err := res.RowsAffected()
		gone = n > 0
		return err
	})
	if gone {
		db.Wake(id)
	}
	return err
}
