package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"time"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/store"
)

// ClaimDuty takes or renews a duty, which one hub of several does at a time, for owner, until until. It tells whether owner has it
// now; if not, another one does whose time is not over at now. Taken tells that another one had it before.
func (db *DB) ClaimDuty(ctx context.Context, duty, owner string, until, now time.Time) (held, taken bool, err error) {
	err = db.write(ctx, "claim a duty", func(ctx context.Context, tx *txn) ([]job.ID, error) {
		before, err := holder(ctx, tx, duty)
		if err != nil {
			return nil, err
		}
		held, err = claim(ctx, tx, "duty", "name", duty, owner, until, now)
		taken = held && before != "" && before != owner
		return nil, err
	})
	if err != nil {
		return false, false, err
	}
	return held, taken, nil
}

// holder gives who has a duty, or had it last; "" if nobody has.
func holder(ctx context.Context, tx *txn, duty string) (owner string, err error) {
	err = tx.QueryRowContext(ctx, "SELECT owner FROM duty WHERE name = ?", duty).Scan(&owner)
	if errors.Is(err, sql.ErrNoRows) {
		err = nil
	}
	return owner, err
}

// onDuty refuses, with code denied, what owner has not the duty for. That another one took it over is what counts, not the clock.
func onDuty(ctx context.Context, tx *txn, duty, owner string) error {
	has, err := holder(ctx, tx, duty)
	if err != nil {
		return err
	}
	if has != owner {
		return problem.New(problem.Denied, "it has lost it to another hub", "hub %s does not have the duty %s", owner, duty)
	}
	return nil
}

// Start takes a queued job to preparing and gives it what it asks for at sites, in one transaction. Owner has to have the
// store.Scheduling duty, else it is refused with code denied. A job that is not queued is a *store.MoveError within a problem.
func (db *DB) Start(ctx context.Context, id job.ID, sites []string, owner string, now time.Time) error {
	return db.change(ctx, "start a job", id, func(ctx context.Context, tx *txn, j job.Job) (bool, error) {
		if err := onDuty(ctx, tx, store.Scheduling, owner); err != nil {
			return false, err
		}
		if j.State != job.Queued { // one that is preparing already was started by another one
			return false, (&store.MoveError{Job: id, From: string(j.State), To: string(job.Preparing)}).Problem()
		}
		for _, s := range sites {
			if err := allocate(ctx, tx, id, s); err != nil {
				return false, err
			}
		}
		return move(ctx, tx, j, job.Preparing, nil, "", now)
	})
}

// Allocate gives a job that prepares or runs what it asks for at a site whose party is absent, so that this may begin. It is
// refused as Start is. One that has it already stays as it is.
func (db *DB) Allocate(ctx context.Context, id job.ID, site, owner string) error {
	return db.change(ctx, "give a job a site", id, func(ctx context.Context, tx *txn, j job.Job) (bool, error) {
		if err := onDuty(ctx, tx, store.Scheduling, owner); err != nil {
			return false, err
		}
		p, err := db.party(ctx, tx, id, site)
		if err != nil || p.Allocated {
			return false, err
		}
		if p.State != job.PartyAbsent || j.State != job.Preparing && j.State != job.Running {
			return false, (&store.MoveError{Job: id, Party: site, From: string(p.State), To: string(job.PartyPreparing)}).Problem()
		}
		return true, allocate(ctx, tx, id, site)
	})
}

func allocate(ctx context.Context, tx *txn, id job.ID, site string) error {
	res, err := tx.ExecContext(ctx, "UPDATE party SET allocated = 1 WHERE job = ? AND name = ? AND pos > 0", id, site)
	if err != nil {
		return err
	}
	if n, err := res.RowsAffected(); n > 0 || err != nil {
		return err
	}
	return problem.New(problem.NotFound, "see its parties with: pergola show "+string(id), "job %s has no site %q", id, site)
}

// Changes gives the jobs of which, after event number after, the state or a party's was moved, each once, and the number up to
// which that is so. A job that was deleted since is not among them. With after below 0 it gives the number alone.
func (db *DB) Changes(ctx context.Context, after int64) (ids []job.ID, upTo int64, err error) {
	upTo, err = one(ctx, db, "read the newest event's number", func(r row) (n int64, err error) {
		err = r.Scan(&n)
		return n, err
	}, "SELECT coalesce(max(seq), 0) FROM event")
	if err != nil || upTo <= after {
		return nil, after, err
	}
	if after < 0 {
		return nil, upTo, nil
	}
	rows, err := db.query(ctx, "SELECT DISTINCT job FROM event WHERE seq > ? AND seq <= ? AND kind IN (?, ?) ORDER BY job", after, upTo, job.KindJobState, job.KindPartyState)
	ids, err = collect(db, rows, err, "list what has changed", func(r row) (id job.ID, err error) {
		err = r.Scan(&id)
		return id, err
	})
	if err != nil {
		return nil, after, err
	}
	return ids, upTo, nil
}
