package sqlite

import (
	"path/filepath"
	"testing"

	"github.com/pergolafl/pergola/internal/store/storetest"
)

func TestContract(t *testing.T) {
	storetest.Run(t, func(t *testing.T) storetest.Opener {
		path := filepath.Join(t.TempDir(), "jobs.db")
		return func() storetest.DB {
			db, err := Open(t.Context(), path)
			if err != nil {
				t.Fatal(err)
			}
			return db
		}
	})
}
