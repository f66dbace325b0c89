package sqlstore

import (
	"context"
	"time"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/store"
)

// Observe has o hear of all calls from now on. It is to be called before any other method.
func (db *DB) Observe(o store.Observer) { db.obs = o }

// called tells the observer of a call that began at since.
func (db *DB) called(doing string, write bool, since time.Time, err error) {
	if db.obs.Call != nil {
		db.obs.Call(doing, write, time.Since(since), err)
	}
}

// Ready tells whether the store can be written to: it makes a transaction that changes nothing.
func (db *DB) Ready(ctx context.Context) error {
	return db.write(ctx, "write to the store", func(ctx context.Context, tx *txn) ([]job.ID, error) {
		_, err := tx.ExecContext(ctx, "UPDATE job SET name = name WHERE id = ?", "")
		return nil, err
	})
}
