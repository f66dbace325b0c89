package sqlstore

import (
	"context"
	"database/sql"
	"io/fs"

	"github.com/pressly/goose/v3"

	"github.com/pergolafl/pergola/internal/problem"
)

// Migrate brings the tables up to date by the steps in files. What is called where, for people, has tables of a newer Pergola:
// that is refused with code version.
func Migrate(ctx context.Context, db *sql.DB, kind goose.Dialect, files fs.FS, where string, d Dialect) error {
	p, err := goose.NewProvider(kind, db, files)
	if err != nil {
		return d.Trouble(err, "prepare the migrations")
	}
	// Closing the provider would close the pool with it; that is its owner's affair.
	for {
		have, newest, err := p.GetVersions(ctx)
		if err != nil {
			return d.Trouble(err, "read the version of the store")
		}
		if have > newest {
			return problem.New(problem.Version, "install the Pergola that wrote it, or a newer one",
				"the store %s has version %d, and this Pergola knows %d at most", where, have, newest)
		}
		_, err = p.Up(ctx)
		if err == nil {
			return nil
		}
		// goose has no lock for SQLite. Whoever loses the race finds the step done already, its own
		// rolled back, and goes on from there; without progress it is a failure.
		if now, _, verr := p.GetVersions(ctx); verr != nil || now <= have {
			return d.Trouble(err, "bring the tables up to date")
		}
	}
}
