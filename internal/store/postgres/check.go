package postgres

import (
	"context"
	"errors"
	"io/fs"

	"github.com/jackc/pgx/v5/stdlib"

	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/store/sqlstore"
)

// Check connects to the database at url, and tells what is wrong with it, or how it is. It writes nothing.
func Check(ctx context.Context, url string) (sqlstore.Facts, error) {
	var f sqlstore.Facts
	conf, err := parse(url)
	if err != nil {
		return f, err
	}
	if conf.ConnectTimeout == 0 {
		conf.ConnectTimeout = connectTimeout
	}
	db := &DB{name: name(conf)}
	pool := stdlib.OpenDB(*conf)
	defer pool.Close()
	pool.SetMaxOpenConns(1)
	trouble := func(err error) error { return dialect{db}.Trouble(err, "check the store") }
	if err := pool.QueryRowContext(ctx, "SELECT 'PostgreSQL ' || current_setting('server_version'), pg_database_size(current_database())").Scan(&f.Server, &f.Bytes); err != nil {
		return f, trouble(err)
	}
	var there bool
	if err := pool.QueryRowContext(ctx, "SELECT to_regclass('goose_db_version') IS NOT NULL").Scan(&there); err != nil {
		return f, trouble(err)
	}
	if !there {
		return f, problem.New(problem.NotFound, "start the hub, which makes them", "the Postgres database %s has no tables of a hub yet", db.name)
	}
	files, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return f, err
	}
	err = f.Read(ctx, pool, files)
	if _, ok := errors.AsType[*problem.Error](err); err != nil && !ok {
		err = trouble(err)
	}
	return f, err
}

// Look opens the database at url for reading alone: methods that write fail. Nothing is changed, not even the tables of an older Pergola.
func Look(ctx context.Context, url string) (*DB, error) {
	conf, err := parse(url)
	if err != nil {
		return nil, err
	}
	if conf.ConnectTimeout == 0 {
		conf.ConnectTimeout = connectTimeout
	}
	conf.RuntimeParams["default_transaction_read_only"] = "on"
	db := &DB{name: name(conf), conf: conf, stop: func() {}}
	pool := stdlib.OpenDB(*conf)
	if err := pool.PingContext(ctx); err != nil {
		return nil, errors.Join(dialect{db}.Trouble(err, "read the store"), pool.Close())
	}
	db.w, db.r = pool, pool
	db.DB = sqlstore.New(pool, pool, dialect{db})
	return db, nil
}
