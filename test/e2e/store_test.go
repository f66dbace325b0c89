package e2e

import (
	"path/filepath"
	"testing"
	"time"

	"github.com/pergolafl/pergola/internal/config"
	"github.com/pergolafl/pergola/internal/hub"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/store/pgtest"
)

// A hub whose store is in Postgres: the server is stopped in the middle of a round and goes on half a minute later, and is then
// started anew while the hub is killed and started again. The job ends with the numbers of an undisturbed one.
func TestPostgresGoesAway(t *testing.T) {
	t.Parallel()
	idle <- struct{}{}
	defer func() { <-idle }()
	server := pgtest.Start(t)
	f := daemons(t, "site-1", "site-2")
	conf := hub.Config{Listen: f.addrs[0], Sites: []string{"site-1", "site-2"}, Mark: f.mark, Store: server.Fresh(t)}
	if err := config.Write(filepath.Join(f.hub.dir, hub.ConfigFile), conf); err != nil {
		t.Fatal(err)
	}
	f.hub.start()
	for _, s := range f.sites {
		s.start()
	}
	rounds := 4
	id := f.submit(t, "tiny", job.Spec{Sites: []string{"site-1", "site-2"}, Flwr: "1.30.0", RunConfig: []string{"num-server-rounds=4"}})
	var got []job.Event
	last := job.State("")
	until := func(after int64, round int) int64 {
		return f.watch(t, id, after, func(e job.Event) bool {
			got = append(got, e)
			var s job.JobState
			if e.Kind == job.KindJobState && e.Decode(&s) == nil {
				last = s.To
			}
			var r job.Round
			return e.Kind == job.KindRound && e.Decode(&r) == nil && r.Round == round || last.Terminal()
		})
	}
	after := until(0, 1)
	server.Freeze(t)
	time.Sleep(30 * time.Second) // the outage
	server.Thaw(t)
	after = until(after, 2)
	server.Restart(t, f.hub.kill)
	f.hub.start()
	until(after, 0)
	if last != job.Succeeded {
		t.Errorf("the job %s", last)
	}
	checkNumbers(t, got, rounds)
}
