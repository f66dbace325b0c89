package hub

import (
	"context"
	"crypto/rand"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/store"
	"github.com/pergolafl/pergola/internal/store/postgres"
	"github.com/pergolafl/pergola/internal/store/sqlite"
)

const (
	// leaseTime is how long a job is this hub's after each renewal. Another hub takes it over that much after this one's end.
	leaseTime = 30 * time.Second
	renewal   = leaseTime / 3

	idFile = "hub.id"
)

// openStore opens the store that hub.toml names: a Postgres database, or else the file in the hub's directory.
func openStore(ctx context.Context, dir, where string) (store.Store, error) {
	if where == "" {
		return sqlite.Open(ctx, filepath.Join(dir, DatabaseFile))
	}
	return postgres.Open(ctx, where)
}

var addresses = regexp.MustCompile(`^postgres(ql)?://`)

// checkStore tells what is wrong with a store of hub.toml, which may hold a password.
func checkStore(where string) error {
	if where != "" && !addresses.MatchString(where) {
		return problem.New(problem.Usage, `write it as store = "postgres://USER@HOST/DATABASE", or leave it out for a file in the hub's directory`,
			"store is no address of a Postgres database")
	}
	return nil
}

// loadID gives the name by which the hub of this directory holds leases, and makes it at the first start. It stays, so that a hub
// that is started again goes on with its jobs at once.
func loadID(dir string) (string, error) {
	path := filepath.Join(dir, idFile)
	b, err := os.ReadFile(path)
	if err == nil {
		if id := strings.TrimSpace(string(b)); id != "" {
			return id, nil
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return "", problem.Wrap(err, problem.Usage, "check its owner", "the hub's name in %s cannot be read", path)
	}
	id := strings.ToLower(rand.Text())
	part := path + ".part"
	if err := os.WriteFile(part, []byte(id+"\n"), 0o600); err != nil {
		return "", diskProblem(err)
	}
	return id, diskProblem(os.Rename(part, path))
}

// lease is a hub's hold on a job, or on a duty.
type lease struct {
	db      store.Store
	job     job.ID
	duty    string // in place of a job
	owner   string
	renewed time.Time // by this process's clock that nobody sets; zero: it is not held
	taken   bool      // of a duty: another one has seen to it until this one took it; whoever acts on that unsets it
}

// hold tells whether the job is this hub's, and renews the lease where that is due. While the store cannot be asked, nobody is
// told that it is.
func (l *lease) hold(ctx context.Context) (bool, error) {
	now := time.Now()
	if !l.renewed.IsZero() && now.Sub(l.renewed) < renewal {
		return true, nil
	}
	held, err := l.claim(ctx, now)
	if problem.CodeOf(err) == problem.NotFound {
		return false, nil // it was deleted
	}
	if err != nil {
		return false, err
	}
	l.renewed = time.Time{}
	if held {
		l.renewed = now
	}
	return held, nil
}

func (l *lease) claim(ctx context.Context, now time.Time) (bool, error) {
	if l.duty != "" {
		held, taken, err := l.db.ClaimDuty(ctx, l.duty, l.owner, now.Add(leaseTime), now)
		l.taken = l.taken || taken
		return held, err
	}
	return l.db.Claim(ctx, l.job, l.owner, now.Add(leaseTime), now)
}

// patiently calls fn until the store answers: a stream need not end because the store is away for a while.
func patiently(ctx context.Context, fn func() error) error {
	for {
		err := fn()
		if problem.CodeOf(err) != problem.Unavailable {
			return err
		}
		select {
		case <-time.After(500 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// release gives the lease back when the controller ends while the hub goes on, as when the job is over. A hub that ends keeps
// its leases: it may be back in a moment.
func (l *lease) release(ctx context.Context, log *slog.Logger) {
	if l.renewed.IsZero() || ctx.Err() != nil {
		return
	}
	if err := l.db.Release(ctx, l.job, l.owner); err != nil && ctx.Err() == nil {
		log.Warn("the lease of a job could not be given back", "job", l.job, "err", err)
	}
}
