package sqlstore

import (
	"context"
	"database/sql"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/problem"
)

// Facts are what whoever looks after a store wants to know of it.
type Facts struct {
	Server  string            `json:"server,omitempty"` // the database server's own version; "" for a file
	Bytes   int64             `json:"bytes,omitempty"`
	Tables  int64             `json:"tables"` // the version of the tables
	Newest  int64             `json:"newest"` // the one that this Pergola knows
	Jobs    map[job.State]int `json:"jobs"`
	Events  int64             `json:"events"`
	Bundles int64             `json:"bundles"`
	Sites   int64             `json:"sites"` // that came by a token and were not removed

	Unfinished []job.ID `json:"-"` // jobs that are not over, at most maxFacts
	Digests    []string `json:"-"` // of bundles that are needed by those
}

// maxFacts bounds each list of facts.
const maxFacts = 10_000

// Read takes them from the tables; migrations are those of this Pergola. Tables of a newer one are a problem with the code version.
func (f *Facts) Read(ctx context.Context, db *sql.DB, migrations fs.FS) error {
	names, err := fs.Glob(migrations, "*.sql")
	if err != nil {
		return err
	}
	for _, n := range names {
		digits, _, _ := strings.Cut(n, "_")
		if v, err := strconv.ParseInt(digits, 10, 64); err == nil {
			f.Newest = max(f.Newest, v)
		}
	}
	if err := db.QueryRowContext(ctx, "SELECT coalesce(max(version_id), 0) FROM goose_db_version").Scan(&f.Tables); err != nil {
		return err
	}
	if f.Tables > f.Newest {
		return problem.New(problem.Version, "install the Pergola that wrote it, or a newer one", "the store has version %d, and this Pergola knows %d at most", f.Tables, f.Newest)
	}
	f.Jobs = map[job.State]int{}
	rs, err := db.QueryContext(ctx, "SELECT state, count(*) FROM job GROUP BY state")
	if err != nil {
		return err
	}
	defer rs.Close()
	for rs.Next() {
		var s string
		var n int
		if err := rs.Scan(&s, &n); err != nil {
			return err
		}
		f.Jobs[job.State(s)] = n
	}
	if err := rs.Err(); err != nil {
		return err
	}
	var over []string
	for _, st := range job.States() {
		if st.Terminal() {
			over = append(over, "'"+string(st)+"'")
		}
	}
	ids, err := db.QueryContext(ctx, fmt.Sprintf("SELECT id, bundle FROM job WHERE state NOT IN (%s) ORDER BY id LIMIT %d",
		strings.Join(over, ", "), maxFacts))
	if err != nil {
		return err
	}
	defer ids.Close()
	for ids.Next() {
		var id, digest string
		if err := ids.Scan(&id, &digest); err != nil {
			return err
		}
		f.Unfinished = append(f.Unfinished, job.ID(id))
		if !slices.Contains(f.Digests, digest) && digest != "" {
			f.Digests = append(f.Digests, digest)
		}
	}
	if err := ids.Err(); err != nil {
		return err
	}
	for q, to := range map[string]*int64{
		"SELECT coalesce(max(seq), 0) FROM event": &f.Events, "SELECT count(*) FROM bundle": &f.Bundles,
		"SELECT count(*) FROM identity WHERE kind = 'site' AND removed = 0": &f.Sites,
	} {
		if err := db.QueryRowContext(ctx, q).Scan(to); err != nil {
			return err
		}
	}
	return nil
}
