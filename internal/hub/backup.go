package hub

import (
	"context"
	"errors"
	"path/filepath"

	"github.com/pergolafl/pergola/internal/config"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/store/postgres"
	"github.com/pergolafl/pergola/internal/store/sqlite"
)

// Backup writes a copy of the store of the hub in dir to a new file at path. The hub may run; what it keeps in files stays out:
// its keys, the bundles, logs and results. A store in Postgres is refused with what to do there.
func Backup(ctx context.Context, dir, path string) error {
	var conf Config
	if err := config.Read(filepath.Join(dir, ConfigFile), &conf); err != nil {
		return err
	}
	if err := checkStore(conf.Store); err != nil {
		return err
	}
	if conf.Store != "" {
		return postgres.NoBackup(conf.Store)
	}
	err := sqlite.Copy(ctx, filepath.Join(dir, DatabaseFile), path)
	if p, ok := errors.AsType[*problem.Error](err); ok && p.Code == problem.NotFound {
		return problem.Wrap(err, problem.NotFound, "give the hub's directory with --dir", "no hub has run in %s yet: it has no %s", dir, DatabaseFile)
	}
	return err
}
