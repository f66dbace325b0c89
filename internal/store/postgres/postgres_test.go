package postgres

import (
	"testing"

	"github.com/pergolafl/pergola/internal/store/pgtest"
	"github.com/pergolafl/pergola/internal/store/storetest"
)

func open(t *testing.T, url string) *DB {
	t.Helper()
	db, err := Open(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	return db
}

func TestContract(t *testing.T) {
	server := pgtest.Start(t)
	storetest.Run(t, func(t *testing.T) storetest.Opener {
		url := server.Fresh(t)
		return func() storetest.DB { return open(t, url) }
	})
}
