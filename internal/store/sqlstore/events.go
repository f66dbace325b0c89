package sqlstore

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"time"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/problem"
)

// Append stores an event and gives its number. PartySeq is the party's own count of its reports,
// from 1: a report that is delivered again is not stored again, and gives the number that it has,
// with dup set. 0 is for events that nobody delivers twice. A zero time is now. The events of
// states are written by Move and MoveParty only, and refused here.
func (db *DB) Append(ctx context.Context, e job.Event, partySeq int64) (seq int64, dup bool, err error) {
	if e.Kind == job.KindJobState || e.Kind == job.KindPartyState {
		return 0, false, problem.New(problem.Internal, "please report this", "an event of kind %s was appended without its move", e.Kind)
	}
	if len(e.Body) > 0 && !json.Valid(e.Body) {
		return 0, false, problem.New(problem.Internal, "please report this", "the body of an event of kind %s is not JSON", e.Kind)
	}
	if e.At.IsZero() {
		e.At = time.Now()
	}
	err = db.change(ctx, "store an event", e.Job, func(ctx context.Context, tx *txn, _ job.Job) (bool, error) {
		if partySeq > 0 {
			err := tx.QueryRowContext(ctx, "SELECT seq FROM event WHERE job = ? AND party = ? AND party_seq = ?", e.Job, e.Party, partySeq).Scan(&seq)
			if !errors.Is(err, sql.ErrNoRows) {
				dup = err == nil
				return false, err
			}
		}
		seq, err = putEvent(ctx, tx, e, max(partySeq, 0))
		return true, err
	})
	if err != nil {
		return 0, false, err
	}
	return seq, dup, nil
}

// PartySeq gives the highest count of reports that was stored for a party, 0 for none: where a party
// that comes back goes on.
func (db *DB) PartySeq(ctx context.Context, id job.ID, party string) (int64, error) {
	return one(ctx, db, "read a party's count", func(r row) (n int64, err error) {
		err = r.Scan(&n)
		return n, err
	}, "SELECT coalesce(max(party_seq), 0) FROM event WHERE job = ? AND party = ? AND party_seq > 0", id, party)
}

// Events gives at most limit events (0 = store.DefaultLimit) of a job ("" = all jobs) after number
// after, in order. A job that does not exist has none.
func (db *DB) Events(ctx context.Context, id job.ID, after int64, n int) ([]job.Event, error) {
	q, args := "SELECT seq, job, at, party, kind, body FROM event WHERE seq > ?", []any{after}
	if id != "" {
		q += " AND job = ?"
		args = append(args, id)
	}
	rows, err := db.query(ctx, q+" ORDER BY seq LIMIT ?", append(args, limit(n))...)
	return collect(db, rows, err, "read events", scanEvent)
}

func scanEvent(r row) (job.Event, error) {
	var e job.Event
	var at int64
	var body string
	if err := r.Scan(&e.Seq, &e.Job, &at, &e.Party, &e.Kind, &body); err != nil {
		return job.Event{}, err
	}
	e.At = stamp(at)
	if body != "" {
		e.Body = json.RawMessage(body)
	}
	return e, nil
}

func insertEvent(ctx context.Context, tx *txn, id job.ID, party, kind string, body any, now time.Time) error {
	e, err := job.NewEvent(id, party, kind, body, now)
	if err != nil {
		return err
	}
	_, err = putEvent(ctx, tx, e, 0)
	return err
}

func putEvent(ctx context.Context, tx *txn, e job.Event, partySeq int64) (int64, error) {
	var seq int64
	err := tx.QueryRowContext(ctx, "INSERT INTO event (job, at, party, party_seq, kind, body) VALUES (?, ?, ?, ?, ?, ?) RETURNING seq",
		e.Job, nanos(e.At), e.Party, partySeq, e.Kind, string(e.Body)).Scan(&seq)
	if err == nil && tx.db.obs.Event != nil {
		e.Seq = seq
		tx.events = append(tx.events, e)
	}
	return seq, err
}
