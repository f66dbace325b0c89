package hub

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/store"
)

// archive is a hub's directory with jobs that ended long ago.
type archive struct {
	*testing.T
	c   *Collector
	now time.Time
}

func newArchive(t *testing.T, keep Retention) *archive {
	t.Helper()
	dir := t.TempDir()
	for _, d := range []string{"jobs", "bundles"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	db, err := openStore(t.Context(), dir, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	})
	a := &archive{T: t, now: time.Date(2026, 11, 27, 12, 0, 0, 0, time.UTC)}
	a.c = newCollector(dir, keep, db, slog.New(slog.DiscardHandler), func() time.Time { return a.now })
	return a
}

func (a *archive) file(age time.Duration, size int, path ...string) {
	a.Helper()
	p := filepath.Join(append([]string{a.c.dir}, path...)...)
	if err := os.MkdirAll(filepath.Dir(p), 0o700); err != nil {
		a.Fatal(err)
	}
	if err := os.WriteFile(p, make([]byte, size), 0o600); err != nil {
		a.Fatal(err)
	}
	for ; p != a.c.dir; p = filepath.Dir(p) {
		if err := os.Chtimes(p, a.now.Add(-age), a.now.Add(-age)); err != nil {
			a.Fatal(err)
		}
	}
}

func digestOf(n int) string { return fmt.Sprintf("sha256:%064x", n) }

// bundle makes one that was used last so long ago.
func (a *archive) bundle(n int, age time.Duration) {
	a.Helper()
	hex := hexOf(digestOf(n))
	a.file(age, 40<<10, "bundles", hex+".tar.zst")
	a.file(age, 40<<10, "bundles", hex, "app", "app.py")
	if err := os.Chtimes(filepath.Join(a.c.dir, "bundles", hex), a.now.Add(-age), a.now.Add(-age)); err != nil {
		a.Fatal(err)
	}
	if err := a.c.db.PutBundle(a.Context(), digestOf(n), 40<<10, a.now.Add(-age)); err != nil {
		a.Fatal(err)
	}
}

// job makes one that ended so long ago; negative: it is not over.
func (a *archive) job(name string, bundle int, age time.Duration) job.ID {
	a.Helper()
	at := a.now.Add(-max(age, 0))
	j, err := a.c.db.CreateJob(a.Context(), job.Job{ID: job.NewID(at), Name: name, Submitter: "u", Bundle: digestOf(bundle), Created: at}, []string{"a"})
	if err != nil {
		a.Fatal(err)
	}
	a.file(0, 40<<10, "jobs", string(j.ID), "logs", "a", "client_app_log.txt")
	a.file(0, 40<<10, "jobs", string(j.ID), "results", "model.npz")
	if age >= 0 {
		cause := problem.New(problem.AbortedByUser, "", "enough")
		if err := a.c.db.Move(a.Context(), j.ID, job.Aborted, cause, "", at); err != nil {
			a.Fatal(err)
		}
	}
	return j.ID
}

func (a *archive) collect() {
	a.Helper()
	if err := a.c.collect(a.Context()); err != nil {
		a.Fatal(err)
	}
}

// left gives what lies there: jobs by name, with logs if they have them; bundles, with their folders.
func (a *archive) left() []string {
	a.Helper()
	js, err := allJobs(a.Context(), a.c.db, "")
	if err != nil {
		a.Fatal(err)
	}
	names := map[string]string{}
	var out []string
	for _, j := range js {
		names[string(j.ID)] = j.Name
		if !exists(filepath.Join(a.c.dir, "jobs", string(j.ID), "results")) {
			out = append(out, j.Name+" without files")
		}
	}
	es, err := os.ReadDir(filepath.Join(a.c.dir, "jobs"))
	if err != nil {
		a.Fatal(err)
	}
	for _, e := range es {
		n := names[e.Name()]
		if n == "" {
			n = "file " + e.Name()
		}
		if !exists(filepath.Join(a.c.dir, "jobs", e.Name(), "logs")) {
			n += " without logs"
		}
		out = append(out, n)
	}
	es, err = os.ReadDir(filepath.Join(a.c.dir, "bundles"))
	if err != nil {
		a.Fatal(err)
	}
	for _, e := range es {
		if e.Name() != ".lock" {
			out = append(out, strings.TrimLeft(e.Name(), "0"))
		}
	}
	slices.Sort(out)
	return out
}

const day = 24 * time.Hour

func days(n int) job.Duration { return job.Duration(time.Duration(n) * day) }

// What is old goes, what a job needs stays; a bundle goes when the last job that has it is gone.
func TestRetentionByAge(t *testing.T) {
	a := newArchive(t, Retention{Jobs: days(90), Logs: days(30), Bundles: days(7)})
	a.bundle(1, 100*day) // of an old job and of a living one
	a.bundle(2, 100*day) // of an old job alone
	a.bundle(3, 3*day)   // of none
	a.bundle(4, 8*day)   // of none
	a.bundle(5, 50*day)  // of a job that is kept
	a.job("old", 1, 91*day)
	a.job("older", 2, 100*day)
	a.job("middle", 5, 50*day)
	a.job("new", 5, day)
	a.job("living", 1, -1)
	a.file(2*day, 10, "bundles", uploadPrefix+"x")
	a.file(time.Hour, 10, "bundles", uploadPrefix+"y")
	dry, err := a.c.plan(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	before := a.left()
	var said []Removal
	a.c.removed = func(r Removal) { said = append(said, r) }
	a.collect()
	want := []string{
		"1", "1.tar.zst", // the living job uses its folder
		"3.tar.zst",
		"5.tar.zst",
		"living", "middle without logs", "new", uploadPrefix + "y",
	}
	slices.Sort(want)
	if d := cmp.Diff(want, a.left()); d != "" {
		t.Errorf("left (-want +got):\n%s", d)
	}
	if d := cmp.Diff(dry, said); d != "" {
		t.Errorf("what was removed is not what was said (-said +removed):\n%s", d)
	}
	if len(before) == len(a.left()) {
		t.Error("nothing was there before")
	}
	es := events(t, a, "middle")
	if !slices.ContainsFunc(es, func(e job.Event) bool {
		var x job.Text
		return e.Kind == job.KindNote && e.Decode(&x) == nil && strings.Contains(x.Message, "logs are kept for 720h")
	}) {
		t.Errorf("no event says that logs are gone: %v", es)
	}
	a.collect()
	if len(said) != len(dry) {
		t.Errorf("a second look removes %v", said[len(dry):])
	}
}

func events(t *testing.T, a *archive, name string) []job.Event {
	t.Helper()
	js, err := a.c.db.Jobs(t.Context(), store.Filter{Name: name})
	if err != nil || len(js) != 1 {
		t.Fatal(js, err)
	}
	es, err := a.c.db.Events(t.Context(), js[0].ID, 0, 100)
	if err != nil {
		t.Fatal(err)
	}
	return es
}

// Over the limit the oldest goes first, jobs and bundles alike, and what a living job needs never.
func TestRetentionBySize(t *testing.T) {
	a := newArchive(t, Retention{Bundles: job.NoLimit})
	for i := range 4 {
		a.bundle(i+1, time.Duration(10-i)*day)
		if i < 3 {
			a.job(fmt.Sprintf("job-%d", i+1), i+1, time.Duration(10-i)*day)
		}
	}
	a.bundle(9, 50*day)
	a.job("living", 9, -1)
	a.collect() // nothing but folders that can be made again
	if got := a.left(); !slices.Contains(got, "job-1") || slices.Contains(got, "1") || !slices.Contains(got, "9") {
		t.Fatalf("without a limit there is %v", got)
	}
	// Of job-1 to job-3 with their bundles, bundle 4, the living job and its bundle: 4 × 80 + 4 × 40 + 80 KiB and folders.
	a.c.keep.Size = 400 << 10
	a.collect()
	got := a.left()
	if slices.Contains(got, "job-1") || slices.Contains(got, "1.tar.zst") || !slices.Contains(got, "job-3") || !slices.Contains(got, "living") {
		t.Errorf("with 400 KiB there is %v", got)
	}
	a.c.keep.Size = 1
	a.collect()
	if d := cmp.Diff([]string{"9", "9.tar.zst", "living"}, a.left()); d != "" {
		t.Errorf("with a limit of 1 byte (-want +got):\n%s", d)
	}
}

// A hub that is killed while it removes something goes on with that, and nobody finds half of it.
func TestRemovalsAreFinished(t *testing.T) {
	a := newArchive(t, Retention{})
	first, second := a.job("first", 1, day), a.job("second", 1, day)
	third := a.job("third", 1, day)
	jobs := filepath.Join(a.c.dir, "jobs")
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.Rename(filepath.Join(jobs, string(first)), filepath.Join(jobs, gonePrefix+string(first)))) // killed before the store was told
	must(os.Rename(filepath.Join(jobs, string(second)), filepath.Join(jobs, gonePrefix+string(second))))
	must(a.c.db.DeleteJob(t.Context(), second)) // killed after it
	must(os.Rename(filepath.Join(jobs, string(third), "logs"), filepath.Join(jobs, string(third), goneLogs)))
	a.file(0, 10, "bundles", gonePrefix+"x", "app", "y")
	a.collect()
	if d := cmp.Diff([]string{"third without logs"}, a.left()); d != "" {
		t.Errorf("left (-want +got):\n%s", d)
	}
	if es, err := os.ReadDir(filepath.Join(jobs, string(third))); err != nil || len(es) != 1 {
		t.Errorf("%v, %v", es, err)
	}
	// What somebody needs meanwhile stays, whatever was planned.
	a.bundle(7, 100*day)
	living := a.job("living", 7, -1)
	for _, r := range []Removal{{Kind: GoneBundle, ID: digestOf(7)}, {Kind: GoneUnpacked, ID: digestOf(7)}} {
		if gone, err := a.c.remove(t.Context(), r); gone || err != nil {
			t.Errorf("%s of a living job: %v, %v", r.Kind, gone, err)
		}
	}
	if err := removeJob(t.Context(), a.c.dir, a.c.db, living); problem.CodeOf(err) != problem.Usage {
		t.Errorf("a living job's removal: %v", err)
	}
	if gone, err := a.c.remove(t.Context(), Removal{Kind: GoneJob, ID: string(second)}); gone || err != nil {
		t.Errorf("a job that is gone already: %v, %v", gone, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := a.c.collect(ctx); !errors.Is(err, context.Canceled) && err == nil {
		t.Error("a collector that was ended says nothing")
	}
}

// asked is a store that notes which jobs were asked for.
type asked struct {
	store.Store
	bundles []string
}

func (a *asked) Jobs(ctx context.Context, f store.Filter) ([]job.Job, error) {
	a.bundles = append(a.bundles, f.Bundle)
	return a.Store.Jobs(ctx, f)
}

// While bundles are removed nobody can submit a job: then only their own jobs are read, not all that a hub has had in years.
func TestRemovingABundleReadsItsJobs(t *testing.T) {
	a := newArchive(t, Retention{Bundles: days(7)})
	a.bundle(1, 8*day)
	a.bundle(2, 9*day)
	a.job("other", 3, day)
	db := &asked{Store: a.c.db}
	a.c.db = db
	a.collect()
	want := []string{"", digestOf(1), digestOf(1), digestOf(2), digestOf(2)} // the plan; each one's folder, and the bundle
	slices.Sort(db.bundles)
	if d := cmp.Diff(want, db.bundles); d != "" {
		t.Errorf("jobs were read of these bundles (-want +got):\n%s", d)
	}
	if d := cmp.Diff([]string{"other"}, a.left()); d != "" {
		t.Errorf("left (-want +got):\n%s", d)
	}
}

// While files are deleted, which may take long, jobs can be submitted.
func TestSubmissionsDoNotWaitForDeleting(t *testing.T) {
	a := newArchive(t, Retention{Bundles: days(7)})
	a.bundle(1, 8*day)
	a.bundle(2, 8*day)
	a.job("living", 2, -1)
	var erased []string
	a.c.erase = func(path string) error {
		f, err := os.OpenFile(bundleLock(a.c.dir), os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return err
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB); err != nil {
			t.Errorf("while %s is deleted, who submits a job has to wait: %v", path, err)
		}
		if exists(path) {
			erased = append(erased, strings.TrimLeft(strings.TrimPrefix(filepath.Base(path), gonePrefix), "0"))
		}
		return errors.Join(f.Close(), os.RemoveAll(path))
	}
	a.collect()
	slices.Sort(erased)
	if d := cmp.Diff([]string{"1", "1.tar.zst"}, erased); d != "" {
		t.Errorf("deleted (-want +got):\n%s", d)
	}
	if d := cmp.Diff([]string{"2", "2.tar.zst", "living"}, a.left()); d != "" {
		t.Errorf("left (-want +got):\n%s", d)
	}
}

// The folders of jobs are walked through when a limit asks for their sizes or they go, and those of jobs that are over once.
func TestWhatIsWalkedThrough(t *testing.T) {
	a := newArchive(t, Retention{Jobs: days(90)})
	a.bundle(1, day)
	a.job("old", 1, 91*day)
	a.job("new", 1, day)
	a.job("newest", 1, time.Minute)
	a.job("living", 1, -1)
	names := func() (out []string) {
		js, err := allJobs(t.Context(), a.c.db, "")
		if err != nil {
			t.Fatal(err)
		}
		of := map[string]string{}
		for _, j := range js {
			of[string(j.ID)] = j.Name
		}
		a.c.usage = func(path string) (int64, error) {
			if n := of[filepath.Base(path)]; n != "" {
				out = append(out, n)
			}
			return usage(path)
		}
		a.collect()
		return out
	}
	for _, c := range []struct {
		limit job.Size
		want  []string
	}{{0, []string{"old"}}, {0, nil}, {1 << 40, []string{"new", "newest", "living"}}, {1 << 40, []string{"newest", "living"}}} {
		a.c.keep.Size = c.limit
		got := names()
		slices.Sort(c.want)
		slices.Sort(got)
		if !slices.Equal(got, c.want) {
			t.Errorf("with a limit of %d these are walked through: %v, want %v", c.limit, got, c.want)
		}
	}
}

// A bundle was in use until the end of the last job of it, also once that job was removed.
func TestLastUseOfABundle(t *testing.T) {
	a := newArchive(t, Retention{Bundles: days(7)})
	a.bundle(1, 30*day) // a job of three weeks
	a.bundle(2, 30*day)
	a.bundle(3, 30*day) // of a job that ended half an hour ago
	long, short := a.job("long", 1, 6*day), a.job("short", 2, 29*day)
	a.job("last", 3, 30*time.Minute)
	for _, id := range []job.ID{long, short} {
		if err := removeJob(t.Context(), a.c.dir, a.c.db, id); err != nil {
			t.Fatal(err)
		}
	}
	a.collect()
	if d := cmp.Diff([]string{"1.tar.zst", "3", "3.tar.zst", "last"}, a.left()); d != "" {
		t.Errorf("left (-want +got):\n%s", d)
	}
	a.now = a.now.Add(day + time.Minute)
	a.collect()
	if d := cmp.Diff([]string{"3.tar.zst", "last"}, a.left()); d != "" {
		t.Errorf("a day later (-want +got):\n%s", d)
	}
}

// quicker is a store in which something else happens just before a job is deleted.
type quicker struct {
	store.Store
	before func(job.ID)
}

func (q *quicker) DeleteJob(ctx context.Context, id job.ID) error {
	q.before(id)
	return q.Store.DeleteJob(ctx, id)
}

// Log lines of a site that come while its job is removed, or later, leave nothing behind.
func TestLateLogLinesOfARemovedJob(t *testing.T) {
	a := newArchive(t, Retention{})
	h := &Hub{dir: a.c.dir, db: a.c.db, log: a.c.log}
	push := func(j job.Job) error {
		return h.takeLog(t.Context(), j, "a", &pb.LogChunk{JobId: string(j.ID), File: "client_app_log.txt", Data: []byte("late\n")})
	}
	j, err := a.c.db.Job(t.Context(), a.job("over", 1, day))
	if err != nil {
		t.Fatal(err)
	}
	between := &quicker{Store: a.c.db, before: func(job.ID) {
		if err := push(j); err != nil {
			t.Error(err)
		}
	}}
	if err := removeJob(t.Context(), a.c.dir, between, j.ID); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string(nil), a.left()); d != "" {
		t.Errorf("left by lines that came between (-want +got):\n%s", d)
	}
	if err := push(j); problem.CodeOf(err) != problem.NotFound {
		t.Errorf("lines of a job that is gone: %v", err)
	}
	if d := cmp.Diff([]string(nil), a.left()); d != "" {
		t.Errorf("left by lines that came later (-want +got):\n%s", d)
	}
}

// Who has a job removed that the collector removes in the same moment has what they want.
func TestRemovingWhatTheCollectorRemoves(t *testing.T) {
	now := time.Now()
	id := job.NewID(now)
	s := serveWith(t, Config{}, func(h *Hub) {
		if _, err := h.db.CreateJob(t.Context(), job.Job{ID: id, Name: "app", Spec: job.Spec{Sites: []string{"a"}}.WithDefaults(), Created: now}, []string{"a"}); err != nil {
			t.Fatal(err)
		}
		if err := h.db.Move(t.Context(), id, job.Aborted, problem.New(problem.AbortedByUser, "", "enough"), "", now); err != nil {
			t.Fatal(err)
		}
		db := h.db
		h.db = &quicker{Store: db, before: func(id job.ID) {
			if err := db.DeleteJob(context.Background(), id); err != nil {
				t.Error(err)
			}
		}}
	})
	if _, err := s.as(user).Jobs.DeleteJob(t.Context(), &pb.DeleteJobRequest{Id: string(id)}); err != nil {
		t.Error(err)
	}
	if _, err := s.as(user).Jobs.DeleteJob(t.Context(), &pb.DeleteJobRequest{Id: string(id)}); problem.CodeOf(err) != problem.NotFound {
		t.Errorf("a job that was gone before: %v", err)
	}
}
