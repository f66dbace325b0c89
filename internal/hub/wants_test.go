package hub

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/store"
	"github.com/pergolafl/pergola/internal/store/sqlite"
)

// countedStore is a store whose calls are counted, and which can be away.
type countedStore struct {
	store.Store
	jobs, lists, parties atomic.Int64
	away                 atomic.Bool
}

var errAway = problem.New(problem.Unavailable, "", "the store is away")

func (c *countedStore) Job(ctx context.Context, id job.ID) (job.Job, error) {
	c.jobs.Add(1)
	if c.away.Load() {
		return job.Job{}, errAway
	}
	return c.Store.Job(ctx, id)
}

func (c *countedStore) Jobs(ctx context.Context, f store.Filter) ([]job.Job, error) {
	c.lists.Add(1)
	if c.away.Load() {
		return nil, errAway
	}
	return c.Store.Jobs(ctx, f)
}

func (c *countedStore) Parties(ctx context.Context, id job.ID) ([]job.Party, error) {
	c.parties.Add(1)
	if c.away.Load() {
		return nil, errAway
	}
	return c.Store.Parties(ctx, id)
}

func openCounted(t *testing.T) *countedStore {
	t.Helper()
	db, err := sqlite.Open(t.Context(), filepath.Join(t.TempDir(), DatabaseFile))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	})
	return &countedStore{Store: db}
}

func (c *countedStore) submit(t *testing.T, to job.State, sites ...string) job.ID {
	t.Helper()
	j, err := c.CreateJob(t.Context(), job.Job{Name: "app", Spec: job.Spec{Sites: sites}.WithDefaults()}, sites)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []job.State{job.Queued, job.Preparing, job.Running} {
		if j.State == to {
			break
		}
		if s == job.Preparing {
			if _, _, err := c.ClaimDuty(t.Context(), store.Scheduling, "test", time.Now().Add(time.Hour), time.Now()); err != nil {
				t.Fatal(err)
			}
			if err := c.Start(t.Context(), j.ID, sites, "test", time.Now()); err != nil {
				t.Fatal(err)
			}
		} else if err := c.Move(t.Context(), j.ID, s, nil, "", time.Now()); err != nil {
			t.Fatal(err)
		}
		j.State = s
	}
	return j.ID
}

// What an event costs does not grow with the sites that are connected, nor with the jobs that are queued, and it wakes only those
// whom it concerns.
func TestCostOfAnEvent(t *testing.T) {
	cost := func(t *testing.T, sites, queued, events int) (calls int64) {
		synctest.Test(t, func(t *testing.T) {
			db := openCounted(t)
			for range queued {
				db.submit(t, job.Queued, "s0", "s1")
			}
			id := db.submit(t, job.Running, "s0", "s1")
			w := newWants(db, func(job.ID) bool { return false }, slog.New(slog.DiscardHandler))
			ctx, cancel := context.WithCancel(t.Context())
			var wg sync.WaitGroup
			defer wg.Wait()
			defer cancel()
			wg.Go(func() { w.run(ctx, &store.Fanout{}) })
			heard := make([]atomic.Int64, sites)
			for i := range sites {
				s := w.watch(fmt.Sprintf("s%d", i))
				wg.Go(func() {
					defer s.close()
					for {
						select {
						case <-s.wake:
							w.of(s.site)
							heard[i].Add(1)
						case <-ctx.Done():
							return
						}
					}
				})
			}
			synctest.Wait()
			time.Sleep(time.Second) // of the bubble's clock: what there was to read was read
			synctest.Wait()
			before := db.jobs.Load() + db.parties.Load() + db.lists.Load()
			for i := range events {
				if _, _, err := db.Append(t.Context(), job.Event{Job: id, Party: "s0", Kind: job.KindNote, At: time.Now()}, int64(i+1)); err != nil {
					t.Fatal(err)
				}
				time.Sleep(time.Second)
			}
			if err := db.MoveParty(t.Context(), id, "s0", job.PartyFailed, nil, "", time.Now()); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
			synctest.Wait()
			calls = db.jobs.Load() + db.parties.Load() + db.lists.Load() - before
			for i := range heard {
				want := int64(1) // what it had to run when it came
				if i == 0 {
					want = 2
				}
				if n := heard[i].Load(); n != want {
					t.Errorf("s%d was woken %d times, want %d", i, n, want)
				}
			}
			// A burst is looked at few times.
			before = db.jobs.Load()
			for i := range 100 {
				if _, _, err := db.Append(t.Context(), job.Event{Job: id, Party: "s1", Kind: job.KindNote, At: time.Now()}, int64(i+1)); err != nil {
					t.Fatal(err)
				}
			}
			time.Sleep(time.Second)
			synctest.Wait()
			if n := db.jobs.Load() - before; n < 1 || n > 4 {
				t.Errorf("100 events at once were looked at %d times", n)
			}
		})
		return calls
	}
	few, many := cost(t, 3, 0, 10), cost(t, 300, 200, 10)
	if few == 0 || many != few || few > 2*11 {
		t.Errorf("11 events took %d calls of the store with 3 sites, %d with 300 sites and 200 jobs in the queue", few, many)
	}
}

// Whatever happens in whatever order, each site is to run what the stored jobs say.
func TestWantsFollowTheStore(t *testing.T) {
	db := openCounted(t)
	killed := map[job.ID]bool{}
	w := newWants(db, func(id job.ID) bool { return killed[id] }, slog.New(slog.DiscardHandler))
	news := db.Gather()
	defer news.Close()
	news.Put(nil, true)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	names := []string{"a", "b", "c", "d"}
	streams := map[string]*wish{}
	sent := map[string]string{}
	show := func(ps []*pb.DesiredParty) string { return fmt.Sprint(ps) }
	for _, n := range names {
		streams[n] = w.watch(n)
	}
	defer func() {
		for _, s := range streams {
			s.close()
		}
	}()
	var ids []job.ID
	for step := range 400 {
		switch r.IntN(4) {
		case 0:
			sites := names[:1+r.IntN(len(names))]
			ids = append(ids, db.submit(t, []job.State{job.Submitted, job.Queued, job.Running}[r.IntN(3)], sites...))
		default:
			if len(ids) == 0 {
				continue
			}
			id := ids[r.IntN(len(ids))]
			states := job.States()
			parties := []job.PartyState{job.PartyPreparing, job.PartyReady, job.PartyRunning, job.PartyDone, job.PartyFailed}
			var err error
			switch r.IntN(7) {
			case 6:
				err = db.SetEngine(t.Context(), id, job.EngineChoice{Engine: job.Engines[1+r.IntN(2)]}, time.Now())
			case 5:
				err = db.Allocate(t.Context(), id, names[r.IntN(len(names))], "test")
			case 0, 1:
				err = db.Move(t.Context(), id, states[r.IntN(len(states))], nil, "", time.Now())
			case 2:
				err = db.MoveParty(t.Context(), id, names[r.IntN(len(names))], parties[r.IntN(len(parties))], nil, "", time.Now())
			case 3:
				err = db.Again(t.Context(), id, names[r.IntN(len(names))], "", time.Now())
			case 4:
				killed[id] = r.IntN(2) == 0
				err = db.DeleteJob(t.Context(), id)
			}
			if code := problem.CodeOf(err); err != nil && code != problem.Usage && code != problem.Internal && code != problem.NotFound && code != problem.Denied {
				t.Fatal(err) // a move that is not allowed is nothing
			}
		}
		ids2, all := news.Take()
		if r.IntN(10) == 0 { // a store that is away costs nothing but time
			db.away.Store(true)
			if err := w.refresh(t.Context(), ids2, all); err == nil && (all || len(ids2) > 0) {
				t.Fatal("what could not be read was taken for nothing")
			}
			db.away.Store(false)
		}
		if err := w.refresh(t.Context(), ids2, all); err != nil {
			t.Fatal(err)
		}
		for _, n := range names {
			select {
			case <-streams[n].wake:
				sent[n] = show(w.of(n))
			default:
			}
			if want := show(db.desired(t, n, killed)); sent[n] != want {
				t.Fatalf("step %d: site %s was told\n%s\nwant\n%s", step, n, sent[n], want)
			}
		}
	}
	if len(w.sites) > len(names) {
		t.Errorf("%d sites are remembered", len(w.sites))
	}
}

// desired is what a site should be running, worked out from all that is stored.
func (c *countedStore) desired(t *testing.T, site string, killed map[job.ID]bool) []*pb.DesiredParty {
	t.Helper()
	js, err := c.Jobs(t.Context(), store.Filter{Limit: 10000})
	if err != nil {
		t.Fatal(err)
	}
	out := []*pb.DesiredParty{}
	for _, j := range js {
		i := slices.Index(j.Spec.Sites, site)
		if i < 0 || j.State != job.Preparing && j.State != job.Running && j.State != job.Stopping {
			continue
		}
		p, err := c.Party(t.Context(), j.ID, site)
		if err != nil {
			t.Fatal(err)
		}
		if p.State.Terminal() || !p.Allocated {
			continue
		}
		d := pb.Desired_DESIRED_UP
		switch {
		case j.State == job.Stopping && killed[j.ID]:
			d = pb.Desired_DESIRED_KILL
		case j.State == job.Stopping:
			d = pb.Desired_DESIRED_STOP
		}
		spec := newWants(c, nil, nil)
		spec.killing = func(job.ID) bool { return false }
		spec.set(j, []job.Party{p})
		out = append(out, &pb.DesiredParty{
			JobId: string(j.ID), Desired: d, BundleDigest: j.Bundle, Index: int32(i), Count: int32(len(j.Spec.Sites)), SpecJson: spec.jobs[j.ID].spec, Attempt: int32(p.Attempt),
		})
	}
	return out
}

// Before the jobs were read nobody is told to run nothing: agents would end what runs.
func TestWantsAreWhole(t *testing.T) {
	db := openCounted(t)
	db.away.Store(true)
	id := db.submit(t, job.Running, "a")
	w := newWants(db, func(job.ID) bool { return false }, slog.New(slog.DiscardHandler))
	s := w.watch("a")
	defer s.close()
	if err := w.refresh(t.Context(), nil, true); !errors.Is(err, errAway) {
		t.Fatalf("a store that is away: %v", err)
	}
	select {
	case <-s.wake:
		t.Fatal("the site was told something while nothing was known")
	default:
	}
	db.away.Store(false)
	j, err := db.Job(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	ps, err := db.Parties(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	w.set(j, ps) // the first of several
	select {
	case <-s.wake:
		t.Fatal("the site was told of one job while the others were not known")
	default:
	}
	if err := w.refresh(t.Context(), nil, true); err != nil {
		t.Fatal(err)
	}
	<-s.wake
	if got := w.of("a"); len(got) != 1 || got[0].GetJobId() != string(id) {
		t.Errorf("the site is told %v", got)
	}
}

// A site's calls read what they are about, and never all sites.
func TestCallsReadNoLists(t *testing.T) {
	var mu sync.Mutex
	var did []string
	s := serveWith(t, Config{Sites: []string{"a", "b", "c"}}, func(h *Hub) {
		h.db.Observe(store.Observer{Call: func(doing string, _ bool, _ time.Duration, _ error) {
			mu.Lock()
			defer mu.Unlock()
			did = append(did, doing)
		}})
	})
	id, _ := s.submit()
	site := s.as(pki.Identity{Kind: pki.KindSite, Name: "a"})
	for _, c := range []struct {
		name string
		call func() error
	}{
		{"GetLogOffsets", func() error {
			_, err := site.Sites.GetLogOffsets(t.Context(), &pb.GetLogOffsetsRequest{JobId: string(id)})
			return err
		}},
		{"PushLogs", func() error {
			_, err := site.Sites.PushLogs(t.Context(), &pb.PushLogsRequest{Chunks: []*pb.LogChunk{{JobId: string(id), Party: "a", File: "x.log", Data: []byte("line\n")}}})
			return err
		}},
		{"Report", func() error {
			_, err := site.Sites.Report(t.Context(), &pb.ReportRequest{JobId: string(id)})
			return err
		}},
	} {
		mu.Lock()
		did = nil
		mu.Unlock()
		if err := c.call(); err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		mu.Lock()
		if slices.ContainsFunc(did, func(d string) bool { return strings.Contains(d, "who is known") }) {
			t.Errorf("%s reads all sites: %q", c.name, did)
		}
		mu.Unlock()
	}
}
