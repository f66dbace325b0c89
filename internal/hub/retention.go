package hub

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	human "github.com/dustin/go-humanize"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/keyed"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/store"
)

// Retention says for how long the hub keeps what is over, in [retention] of hub.toml. What a job that is not over needs is
// never removed.
type Retention struct {
	Jobs    job.Duration `toml:"jobs"`    // after their end, with all that is left of them; default: for ever
	Logs    job.Duration `toml:"logs"`    // of jobs, after their end; default: as long as the job
	Bundles job.Duration `toml:"bundles"` // that no job has, after their last use; default 30d
	Size    job.Size     `toml:"size"`    // of all jobs and bundles together: the oldest go first; default: no limit
}

// DefaultBundles is how long a bundle is kept that no job has.
const DefaultBundles = job.Duration(30 * 24 * time.Hour)

const (
	collectEvery = 10 * time.Minute
	justUsed     = time.Hour      // nothing goes that somebody may be about to use
	staleUpload  = 24 * time.Hour // after which an upload that was cut short is given up
)

// What a Removal is of.
const (
	GoneJob      = "job"
	GoneLogs     = "logs"
	GoneBundle   = "bundle"
	GoneUnpacked = "unpacked" // a bundle's folder, which can be made again
	GoneUpload   = "upload"   // that was cut short
)

// Removal is something that retention takes away.
type Removal struct {
	Kind  string    `json:"kind"`
	ID    string    `json:"id"` // of the job or bundle
	Name  string    `json:"name,omitempty"`
	Bytes int64     `json:"bytes"`
	Since time.Time `json:"since"` // since when nobody needs it
	Why   string    `json:"why"`
}

// Collector takes away what retention no longer keeps.
type Collector struct {
	dir  string
	keep Retention
	db   store.Store
	log  *slog.Logger
	wall func() time.Time

	removed func(Removal) // is told of each, unless nil

	usage func(path string) (int64, error)
	erase func(path string) error
	sizes map[job.ID]int64 // of jobs that have been over for a while, as far as a limit asks for them: they change no more
}

func newCollector(dir string, keep Retention, db store.Store, log *slog.Logger, wall func() time.Time) *Collector {
	return &Collector{dir: dir, keep: keep, db: db, log: log, wall: wall, usage: usage, erase: os.RemoveAll, sizes: map[job.ID]int64{}}
}

// Collect does once what a hub in dir does all the time, for an operator: it may run or not. With dry, nothing is removed. It
// gives what was, or would be, removed.
func Collect(ctx context.Context, dir string, dry bool, log *slog.Logger) (_ []Removal, err error) {
	conf, err := ReadConfig(dir)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(filepath.Join(dir, "jobs")); errors.Is(err, fs.ErrNotExist) {
		return nil, problem.New(problem.NotFound, "give the hub's directory with --dir", "no hub has run in %s yet", dir)
	}
	db, err := openStore(ctx, dir, conf.Store)
	if err != nil {
		return nil, err
	}
	defer func() {
		if e := db.Close(); err == nil {
			err = e
		}
	}()
	c := newCollector(dir, conf.Retention, db, log, time.Now)
	if dry {
		return c.plan(ctx)
	}
	var out []Removal
	c.removed = func(r Removal) { out = append(out, r) }
	err = c.collect(ctx)
	return out, err
}

// removed counts what retention removes.
func (m *measures) removed(r Removal) {
	m.removals.WithLabelValues(r.Kind).Inc()
	m.removedBytes.WithLabelValues(r.Kind).Add(float64(max(r.Bytes, 0)))
}

// collects removes in the background until ctx is done.
func (h *Hub) collects(ctx context.Context) error {
	c := newCollector(h.dir, h.conf.Retention, h.db, h.log, h.wall)
	c.removed = func(r Removal) {
		h.measures.removed(r)
		if r.Kind == GoneJob {
			h.sched.touch(job.ID(r.ID))
		}
	}
	tick := time.NewTicker(collectEvery)
	defer tick.Stop()
	for {
		if err := c.collect(ctx); err != nil && ctx.Err() == nil {
			h.log.Error("what is no longer kept could not all be removed; it is tried again", "err", err, "retry", collectEvery)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// collect removes what is due, one after the other, the oldest first. It goes on behind what cannot be removed.
func (c *Collector) collect(ctx context.Context) error {
	if err := finishRemovals(ctx, c.dir, c.db); err != nil {
		return err
	}
	todo, err := c.plan(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, r := range todo {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		gone, err := c.remove(ctx, r)
		if err != nil {
			errs = append(errs, fmt.Errorf("remove %s %s: %w", r.Kind, r.ID, err))
			continue
		}
		if !gone {
			continue // somebody needs it meanwhile
		}
		c.log.Info("removed what is no longer kept", "kind", r.Kind, "id", r.ID, "bytes", r.Bytes, "why", r.Why)
		if c.removed != nil {
			c.removed(r)
		}
	}
	return errors.Join(errs...)
}

var bundleForm = regexp.MustCompile(`^([0-9a-f]{64})(\.tar\.zst|\.partial)?$`)

// lying is a bundle's files.
type lying struct {
	packed, unpacked time.Time // when each was used last; zero: not there
	packedBytes      int64
	unpackedBytes    int64
}

// used notes a later use.
func (l *lying) used(at time.Time) {
	for _, t := range []*time.Time{&l.packed, &l.unpacked} {
		if !t.IsZero() {
			*t = latest(*t, at)
		}
	}
}

// plan gives what is due, in the order in which it is to go.
func (c *Collector) plan(ctx context.Context) ([]Removal, error) {
	now := c.wall()
	jobs, err := allJobs(ctx, c.db, "")
	if err != nil {
		return nil, err
	}
	var out []Removal
	bytes := map[job.ID]int64{}
	var total int64
	sizes := map[job.ID]int64{}
	for _, j := range jobs {
		n, known := c.sizes[j.ID]
		over := j.State.Terminal()
		due := over && c.keep.Jobs > 0 && now.Sub(j.Ended) > c.keep.Jobs.Std()
		if !known && (due || c.keep.Size > 0) { // all folders of years are not walked through for nothing
			if n, err = c.usage(filepath.Join(c.dir, "jobs", string(j.ID))); err != nil {
				return nil, err
			}
			known = over && now.Sub(j.Ended) > justUsed
		}
		if known {
			sizes[j.ID] = n
		}
		bytes[j.ID] = n
		total += n
	}
	c.sizes = sizes
	bundles, uploads, err := c.bundles(now)
	if err != nil {
		return nil, err
	}
	for _, b := range bundles {
		total += b.packedBytes + b.unpackedBytes
	}
	due := func(r Removal) {
		out = append(out, r)
		total -= r.Bytes
	}
	for _, u := range uploads {
		due(u)
	}
	// What can be made again goes as soon as no job that is not over uses it.
	open := map[string]bool{}
	for _, j := range jobs {
		hex := hexOf(j.Bundle)
		open[hex] = open[hex] || !j.State.Terminal()
		if b := bundles[hex]; b != nil && j.State.Terminal() { // it was in use until then
			b.used(j.Ended)
		}
	}
	for hex, b := range bundles {
		if !b.unpacked.IsZero() && !open[hex] && now.Sub(b.unpacked) > justUsed {
			due(Removal{Kind: GoneUnpacked, ID: "sha256:" + hex, Bytes: b.unpackedBytes, Since: b.unpacked, Why: "no job that is not over uses it"})
			b.unpackedBytes = 0
		}
	}
	gone := map[job.ID]bool{}
	for _, j := range jobs {
		if !j.State.Terminal() {
			continue
		}
		if d := c.keep.Jobs.Std(); d > 0 && now.Sub(j.Ended) > d {
			gone[j.ID] = true
			due(Removal{Kind: GoneJob, ID: string(j.ID), Name: j.Name, Bytes: bytes[j.ID], Since: j.Ended, Why: "jobs are kept for " + c.keep.Jobs.String()})
			continue
		}
		dir := filepath.Join(c.dir, "jobs", string(j.ID), "logs")
		if d := c.keep.Logs.Std(); d > 0 && now.Sub(j.Ended) > d && exists(dir) {
			n, err := c.usage(dir)
			if err != nil {
				return nil, err
			}
			bytes[j.ID] -= n
			due(Removal{Kind: GoneLogs, ID: string(j.ID), Name: j.Name, Bytes: n, Since: j.Ended, Why: "logs are kept for " + c.keep.Logs.String()})
		}
	}
	// Bundles that no job has, and jobs that are over, by age until the rest fits.
	of := map[string]int{} // jobs that stay
	for _, j := range jobs {
		if !gone[j.ID] {
			of[hexOf(j.Bundle)]++
		}
	}
	var old []Removal
	free := func(hex string) {
		b := bundles[hex]
		if b == nil || of[hex] > 0 || b.packed.IsZero() {
			return
		}
		if now.Sub(b.packed) < justUsed {
			return
		}
		r := Removal{Kind: GoneBundle, ID: "sha256:" + hex, Bytes: b.packedBytes + b.unpackedBytes, Since: b.packed}
		if d := c.keep.Bundles.Or(DefaultBundles); d > 0 && now.Sub(b.packed) > d.Std() {
			r.Why = "bundles that no job has are kept for " + d.String()
			due(r)
			return
		}
		old = append(old, r)
	}
	for hex := range bundles {
		free(hex)
	}
	for _, j := range jobs {
		if j.State.Terminal() && !gone[j.ID] {
			old = append(old, Removal{Kind: GoneJob, ID: string(j.ID), Name: j.Name, Bytes: bytes[j.ID], Since: j.Ended})
		}
	}
	byAge := func(a, b Removal) int { return cmp.Or(a.Since.Compare(b.Since), strings.Compare(a.ID, b.ID)) }
	hexes := map[string]string{}
	for _, j := range jobs {
		hexes[string(j.ID)] = hexOf(j.Bundle)
	}
	for limit := c.keep.Size; limit > 0 && total > limit.Bytes() && len(old) > 0; {
		slices.SortFunc(old, byAge)
		r := old[0]
		old = old[1:]
		r.Why = fmt.Sprintf("jobs and bundles may have %s together", human.IBytes(uint64(limit.Bytes())))
		due(r)
		if hex, ok := hexes[r.ID]; ok {
			of[hex]--
			free(hex)
		}
	}
	slices.SortStableFunc(out, func(a, b Removal) int { return cmp.Or(cmp.Compare(order(a), order(b)), byAge(a, b)) })
	return out, nil
}

// order has what nobody misses go first, and jobs before the bundles that they have.
func order(r Removal) int {
	return slices.Index([]string{GoneUpload, GoneUnpacked, GoneLogs, GoneJob, GoneBundle}, r.Kind)
}

// bundles gives what lies in the folder of bundles, and uploads that were given up.
func (c *Collector) bundles(now time.Time) (map[string]*lying, []Removal, error) {
	dir := filepath.Join(c.dir, "bundles")
	es, err := os.ReadDir(dir)
	if err != nil {
		return nil, nil, err
	}
	out := map[string]*lying{}
	var stale []Removal
	for _, e := range es {
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, nil, err
		}
		m := bundleForm.FindStringSubmatch(e.Name())
		if upload := strings.HasPrefix(e.Name(), uploadPrefix); upload || m != nil && m[2] == ".partial" {
			if now.Sub(info.ModTime()) > staleUpload {
				n, err := c.usage(filepath.Join(dir, e.Name()))
				if err != nil {
					return nil, nil, err
				}
				stale = append(stale, Removal{Kind: GoneUpload, ID: e.Name(), Bytes: n, Since: info.ModTime(), Why: "nothing was added to it for " + job.Duration(staleUpload).String()})
			}
			continue
		}
		if m == nil {
			continue
		}
		b := out[m[1]]
		if b == nil {
			b = &lying{}
			out[m[1]] = b
		}
		n, err := c.usage(filepath.Join(dir, e.Name()))
		if err != nil {
			return nil, nil, err
		}
		if m[2] == "" {
			b.unpacked, b.unpackedBytes = info.ModTime(), n
		} else {
			b.packed, b.packedBytes = info.ModTime(), n
		}
	}
	return out, stale, nil
}

// remove takes one thing away, unless somebody needs it by now.
func (c *Collector) remove(ctx context.Context, r Removal) (gone bool, err error) {
	switch r.Kind {
	case GoneJob:
		err := removeJob(ctx, c.dir, c.db, job.ID(r.ID))
		if problem.CodeOf(err) == problem.NotFound {
			return false, nil
		}
		return err == nil, err
	case GoneLogs:
		delete(c.sizes, job.ID(r.ID))
		dir := filepath.Join(c.dir, "jobs", r.ID)
		if err := c.away(filepath.Join(dir, "logs"), filepath.Join(dir, goneLogs)); err != nil {
			return false, err
		}
		e, err := job.NewEvent(job.ID(r.ID), "", job.KindNote, job.Text{Message: fmt.Sprintf("the job's logs (%s) were removed: %s", human.IBytes(uint64(r.Bytes)), r.Why)}, c.wall())
		if err == nil {
			_, _, err = c.db.Append(ctx, e, 0)
		}
		return true, err
	case GoneUpload:
		return true, c.erase(filepath.Join(c.dir, "bundles", r.ID))
	}
	hex := hexOf(r.ID)
	names := []string{hex}
	if r.Kind == GoneBundle {
		names = append(names, hex+".tar.zst")
	}
	if err := c.eraseBundle(names); err != nil { // what a removal that was cut short has left
		return false, err
	}
	if gone, err = c.setAside(ctx, r, names); err != nil {
		return gone, err
	}
	return gone, c.eraseBundle(names)
}

// eraseBundle removes what was set aside.
func (c *Collector) eraseBundle(names []string) error {
	var errs []error
	for _, n := range names {
		errs = append(errs, c.erase(filepath.Join(c.dir, "bundles", gonePrefix+n)))
	}
	return errors.Join(errs...)
}

// setAside gives what there is of a bundle another name, unless somebody needs it. Nobody can submit a job meanwhile, so this takes no
// longer than it has to.
func (c *Collector) setAside(ctx context.Context, r Removal, names []string) (gone bool, err error) {
	release, err := keyed.File(bundleLock(c.dir), false)
	if err != nil {
		return false, err
	}
	defer release()
	// What there is of jobs now is all that counts.
	jobs, err := allJobs(ctx, c.db, r.ID)
	if err != nil {
		return false, err
	}
	for _, j := range jobs {
		if r.Kind == GoneBundle || !j.State.Terminal() {
			return false, nil
		}
	}
	if r.Kind == GoneBundle {
		if info, err := os.Stat(filepath.Join(c.dir, "bundles", hexOf(r.ID)+".tar.zst")); err == nil && c.wall().Sub(info.ModTime()) < justUsed {
			return false, nil
		}
		// The hub forgets it first: files that nobody knows are found again, a bundle without files would be promised in vain.
		if err := c.db.DeleteBundle(ctx, r.ID); err != nil {
			return false, err
		}
	}
	var errs []error
	for _, n := range names {
		errs = append(errs, rename(filepath.Join(c.dir, "bundles", n), filepath.Join(c.dir, "bundles", gonePrefix+n)))
	}
	return true, errors.Join(errs...)
}

// What is to be removed has another name from the first moment on, so that nobody finds half of it. Whatever has such a name is
// removed to the end by the next collection, also after the hub was killed.
const (
	gonePrefix = ".gone-"
	goneLogs   = gonePrefix + "logs"
)

// away removes what is at path, by another name. Nothing there is no error.
func (c *Collector) away(path, as string) error {
	err := c.erase(as) // of a removal that was cut short
	if err == nil {
		err = rename(path, as)
	}
	if err != nil {
		return err
	}
	return c.erase(as)
}

// rename is os.Rename; nothing there is no error.
func rename(path, as string) error {
	if err := os.Rename(path, as); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// removeJob removes a job that is over, with all that is left of it. Its files go first, by another name: a hub that is killed
// between goes on with that when it starts.
func removeJob(ctx context.Context, dir string, db store.Store, id job.ID) error {
	j, err := db.Job(ctx, id)
	if err != nil {
		return err
	}
	if !j.State.Terminal() {
		return problem.New(problem.Usage, "end it first with: pergola abort "+string(id), "job %s is %s", id, j.State)
	}
	if err := noteUse(dir, j); err != nil {
		return diskProblem(err)
	}
	from, as := filepath.Join(dir, "jobs", string(id)), filepath.Join(dir, "jobs", gonePrefix+string(id))
	if err := rename(from, as); err != nil {
		return diskProblem(err)
	}
	if err := db.DeleteJob(ctx, id); err != nil {
		return err
	}
	return errors.Join(os.RemoveAll(as), os.RemoveAll(from)) // a site may have brought log lines between
}

// noteUse has a job's bundle know that it was in use until the job's end, of which nothing tells once the job is gone.
func noteUse(dir string, j job.Job) error {
	release, err := keyed.File(bundleLock(dir), false) // who submits a job of it notes that use
	if err != nil {
		return err
	}
	defer release()
	path := filepath.Join(dir, "bundles", hexOf(j.Bundle)+".tar.zst")
	info, err := os.Stat(path)
	if err == nil && info.ModTime().Before(j.Ended) {
		err = os.Chtimes(path, j.Ended, j.Ended)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// finishRemovals goes on with what was cut short.
func finishRemovals(ctx context.Context, dir string, db store.Store) error {
	var errs []error
	for _, in := range []string{"jobs", "bundles"} {
		es, err := os.ReadDir(filepath.Join(dir, in))
		if err != nil {
			return err
		}
		for _, e := range es {
			path := filepath.Join(dir, in, e.Name())
			name, ok := strings.CutPrefix(e.Name(), gonePrefix)
			if !ok {
				if in == "jobs" && e.IsDir() {
					errs = append(errs, os.RemoveAll(filepath.Join(path, goneLogs)))
				}
				continue
			}
			if id, err := job.ParseID(name); err == nil && in == "jobs" {
				if err := db.DeleteJob(ctx, id); err != nil && problem.CodeOf(err) != problem.NotFound {
					errs = append(errs, err)
					continue
				}
			}
			errs = append(errs, os.RemoveAll(path))
		}
	}
	return errors.Join(errs...)
}

// allJobs gives the jobs of a bundle, or all.
func allJobs(ctx context.Context, db store.Store, digest string) (out []job.Job, err error) {
	f := store.Filter{Bundle: digest, Limit: 500}
	for {
		js, err := db.Jobs(ctx, f)
		if err != nil {
			return nil, err
		}
		out = append(out, js...)
		if len(js) < f.Limit {
			return out, nil
		}
		f.After = js[len(js)-1].ID
	}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// usage gives the bytes that a file or folder takes on its disk. What vanishes meanwhile takes none.
func usage(path string) (int64, error) {
	var n int64
	err := filepath.WalkDir(path, func(_ string, d fs.DirEntry, err error) error {
		if err == nil {
			var info fs.FileInfo
			if info, err = d.Info(); err == nil {
				if st, ok := info.Sys().(*syscall.Stat_t); ok {
					n += st.Blocks * 512 // of 512 bytes each, whatever the file system has: stat(2)
				}
			}
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	})
	return n, err
}
