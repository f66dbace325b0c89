package sqlstore

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"time"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/store"
)

const (
	identityColumns = "kind, name, enrolled, removed, drained, info, seen, version"
	tokenColumns    = "hash, kind, name, created, expires, used, made_by" //nolint:gosec // names of columns
	siteKind        = "site"
)

// putIdentity enrols a site or a user, or enrols it again: from i.Enrolled on it may come. One that was not removed in between
// stays drained if it was; what it declared last stays in any case.
const putIdentity = `INSERT INTO identity (` + identityColumns + `) VALUES (?, ?, ?, 0, ?, ?, ?, ?)
	ON CONFLICT (kind, name) DO UPDATE SET enrolled = excluded.enrolled, removed = 0,
	drained = CASE WHEN identity.removed = 0 THEN identity.drained ELSE excluded.drained END`

func identityArgs(i store.Identity) []any {
	return []any{i.Kind, i.Name, nanos(i.Enrolled), flag(i.Drained), string(i.Info), nanos(i.Seen), i.Version}
}

// PutIdentity enrols a site or a user without a token, or enrols it again; see Enrol.
func (db *DB) PutIdentity(ctx context.Context, i store.Identity) error {
	if len(i.Info) > 0 && !json.Valid(i.Info) {
		return problem.New(problem.Internal, "please report this", "what %s %s declares is not JSON", i.Kind, i.Name)
	}
	return db.knows(ctx, "enrol somebody", putIdentity, identityArgs(i)...)
}

// Introduce notes somebody of whom the store has not heard, as it is; of whom it has, nothing changes.
func (db *DB) Introduce(ctx context.Context, i store.Identity) error {
	return db.write(ctx, "note somebody", func(ctx context.Context, tx *txn) ([]job.ID, error) {
		_, err := tx.ExecContext(ctx, `INSERT INTO identity (`+identityColumns+`) VALUES (?, ?, ?, 0, ?, ?, ?, ?) ON CONFLICT DO NOTHING`, identityArgs(i)...)
		return nil, err
	})
}

// Identity gives what is known of a site or a user, also of a removed one; not-found if nothing is.
func (db *DB) Identity(ctx context.Context, kind, name string) (store.Identity, error) {
	i, err := one(ctx, db, "read who somebody is", scanIdentity, "SELECT "+identityColumns+" FROM identity WHERE kind = ? AND name = ?", kind, name)
	if errors.Is(err, sql.ErrNoRows) {
		return i, problem.New(problem.NotFound, "check the name", "the hub knows no %s %q", kind, name)
	}
	return i, err
}

// Identities gives all that are known of a kind, by name, also removed ones.
func (db *DB) Identities(ctx context.Context, kind string) ([]store.Identity, error) {
	rows, err := db.query(ctx, "SELECT "+identityColumns+" FROM identity WHERE kind = ? ORDER BY name", kind)
	return collect(db, rows, err, "list who is known", scanIdentity)
}

// RemoveIdentity keeps a site or a user away from now on, until it is enrolled again; also one that the store has not heard of,
// since a hub's configuration may name some. One that is removed already stays as it is. Tokens for it that were not used are gone
// with it.
func (db *DB) RemoveIdentity(ctx context.Context, kind, name string, now time.Time) error {
	return db.write(ctx, "remove somebody", func(ctx context.Context, tx *txn) ([]job.ID, error) {
		_, err := tx.ExecContext(ctx, `INSERT INTO identity (`+identityColumns+`) VALUES (?, ?, 0, ?, 0, '', 0, '')
			ON CONFLICT (kind, name) DO UPDATE SET removed = excluded.removed WHERE identity.removed = 0`, kind, name, nanos(now))
		if err == nil {
			_, err = tx.ExecContext(ctx, "DELETE FROM token WHERE kind = ? AND name = ? AND used = 0", kind, name)
		}
		return []job.ID{""}, err
	})
}

// SetDrained says whether a site takes new jobs, also of one that the store has not heard of.
func (db *DB) SetDrained(ctx context.Context, site string, drained bool) error {
	return db.knows(ctx, "drain a site", `INSERT INTO identity (`+identityColumns+`) VALUES (?, ?, 0, 0, ?, '', 0, '')
		ON CONFLICT (kind, name) DO UPDATE SET drained = excluded.drained`, siteKind, site, flag(drained))
}

// SawSite notes what a site's agent declares of itself. It wakes nobody.
func (db *DB) SawSite(ctx context.Context, site string, info json.RawMessage, version string, now time.Time) error {
	if len(info) > 0 && !json.Valid(info) {
		return problem.New(problem.Usage, "update the site's agent", "what site %s declares is not JSON", site)
	}
	return db.write(ctx, "note a site", func(ctx context.Context, tx *txn) ([]job.ID, error) {
		_, err := tx.ExecContext(ctx, `INSERT INTO identity (`+identityColumns+`) VALUES (?, ?, 0, 0, 0, ?, ?, ?)
			ON CONFLICT (kind, name) DO UPDATE SET info = excluded.info, seen = excluded.seen, version = excluded.version`,
			siteKind, site, string(info), nanos(now), version)
		return nil, err
	})
}

// knows stores something about an identity and wakes whoever waits for anything.
func (db *DB) knows(ctx context.Context, doing, query string, args ...any) error {
	return db.write(ctx, doing, func(ctx context.Context, tx *txn) ([]job.ID, error) {
		_, err := tx.ExecContext(ctx, query, args...)
		return []job.ID{""}, err
	})
}

// PutToken stores a token; one that is there already is refused with code exists.
func (db *DB) PutToken(ctx context.Context, t store.Token) error {
	return db.write(ctx, "store a token", func(ctx context.Context, tx *txn) ([]job.ID, error) {
		res, err := tx.ExecContext(ctx, "INSERT INTO token ("+tokenColumns+") VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
			t.Hash, t.Kind, t.Name, nanos(t.Created), nanos(t.Expires), nanos(t.Used), t.By)
		if err != nil {
			return nil, err
		}
		if n, err := res.RowsAffected(); n > 0 || err != nil {
			return nil, err
		}
		return nil, problem.New(problem.Exists, "make another one", "the token exists already")
	})
}

// Enrol uses a token and enrols whom it is for, both or neither: sign is called with the token and the time of the enrolment, and if
// it fails the token stays as good as it was. Of many calls with one token at the same time one succeeds. A token that is
// unknown, was used or is over at now is refused with code denied. The time is now, or later if the clock was set back: each enrolment of a
// name is later than those before it, and than its removal. Sign may be called again if the store has to do so; the last call counts.
func (db *DB) Enrol(ctx context.Context, hash string, now time.Time, sign func(t store.Token, enrolled time.Time) error) (t store.Token, err error) {
	err = db.write(ctx, "enrol", func(ctx context.Context, tx *txn) ([]job.ID, error) {
		var err error
		t, err = scanToken(tx.QueryRowContext(ctx, "SELECT "+tokenColumns+" FROM token WHERE hash = ?", hash))
		const next = "ask whoever gave it to you for another one"
		switch {
		case errors.Is(err, sql.ErrNoRows):
			return nil, problem.New(problem.Denied, next, "the hub does not know this token")
		case err != nil:
			return nil, err
		case !t.Used.IsZero():
			return nil, problem.New(problem.Denied, next, "the token for %s %s was used already, at %s", t.Kind, t.Name, t.Used.Format(time.RFC3339))
		case !now.Before(t.Expires):
			return nil, problem.New(problem.Denied, next, "the token for %s %s was good until %s", t.Kind, t.Name, t.Expires.Format(time.RFC3339))
		}
		enrolled := now
		switch i, err := scanIdentity(tx.QueryRowContext(ctx, "SELECT "+identityColumns+" FROM identity WHERE kind = ? AND name = ?", t.Kind, t.Name)); {
		case errors.Is(err, sql.ErrNoRows):
		case err != nil:
			return nil, err
		default:
			for _, before := range []time.Time{i.Enrolled, i.Removed} {
				if !enrolled.After(before) {
					enrolled = before.Add(1)
				}
			}
		}
		if err := sign(t, enrolled); err != nil {
			return nil, err
		}
		t.Used = stamp(nanos(now))
		if _, err = tx.ExecContext(ctx, "UPDATE token SET used = ? WHERE hash = ?", nanos(now), hash); err != nil {
			return nil, err
		}
		_, err = tx.ExecContext(ctx, putIdentity, identityArgs(store.Identity{Kind: t.Kind, Name: t.Name, Enrolled: enrolled})...)
		return []job.ID{""}, err
	})
	if err != nil {
		return store.Token{}, err
	}
	return t, nil
}

// Tokens gives all tokens, oldest first, also those that were used or are over.
func (db *DB) Tokens(ctx context.Context) ([]store.Token, error) {
	rows, err := db.query(ctx, "SELECT "+tokenColumns+" FROM token ORDER BY created, hash")
	return collect(db, rows, err, "list the tokens", scanToken)
}

// RemoveToken forgets a token; not-found if there is none.
func (db *DB) RemoveToken(ctx context.Context, hash string) error {
	return db.write(ctx, "remove a token", func(ctx context.Context, tx *txn) ([]job.ID, error) {
		res, err := tx.ExecContext(ctx, "DELETE FROM token WHERE hash = ?", hash)
		if err != nil {
			return nil, err
		}
		if n, err := res.RowsAffected(); n > 0 || err != nil {
			return nil, err
		}
		return nil, problem.New(problem.NotFound, "see the tokens with: pergola hub token ls", "there is no such token")
	})
}

func scanIdentity(r row) (i store.Identity, err error) {
	var enrolled, removed, drained, seen int64
	var info string
	err = r.Scan(&i.Kind, &i.Name, &enrolled, &removed, &drained, &info, &seen, &i.Version)
	i.Enrolled, i.Removed, i.Drained, i.Seen = stamp(enrolled), stamp(removed), drained != 0, stamp(seen)
	if info != "" {
		i.Info = json.RawMessage(info)
	}
	return i, err
}

func scanToken(r row) (t store.Token, err error) {
	var created, expires, used int64
	err = r.Scan(&t.Hash, &t.Kind, &t.Name, &created, &expires, &used, &t.By)
	t.Created, t.Expires, t.Used = stamp(created), stamp(expires), stamp(used)
	return t, err
}
