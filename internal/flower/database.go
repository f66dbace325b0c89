package flower

import (
	"context"
	"database/sql"
	"fmt"
	"net/url"
	"time"

	_ "modernc.org/sqlite" // the driver of the database
)

// TakeOffline makes every node in a superlink's database offline from now on. A superlink that died has left its nodes
// online for as long as their supernodes had announced, and a server app of the next superlink on the same file would be
// given nodes that nobody answers for. It is what the superlink itself does when a node takes its leave: all generations
// (1.12 – 1.41, server/superlink/state, later linkstate) have it as seconds since 1970 in node.online_until. No superlink may
// run on the file meanwhile. It gives how many nodes there were.
func TakeOffline(ctx context.Context, path string) (n int64, err error) {
	db, err := sql.Open("sqlite", (&url.URL{Scheme: "file", Opaque: (&url.URL{Path: path}).EscapedPath(), RawQuery: "mode=rw&_pragma=busy_timeout(5000)"}).String())
	if err != nil {
		return 0, err
	}
	defer func() {
		if e := db.Close(); err == nil {
			err = e
		}
	}()
	now := float64(time.Now().UnixMicro()) / 1e6
	res, err := db.ExecContext(ctx, "UPDATE node SET online_until = ? WHERE online_until > ?", now, now)
	if err != nil {
		return 0, fmt.Errorf("take the nodes in %s offline: %w", path, err)
	}
	return res.RowsAffected()
}
