package site

import (
	"cmp"
	"context"
	"encoding/json"
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

	"github.com/pergolafl/pergola/internal/config"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/keyed"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/pyenv"
)

// Retention says for how long a site keeps what no part in a job needs, in [retention] of site.toml.
type Retention struct {
	Bundles      job.Duration `toml:"bundles"`      // after their last use; default 30d
	Size         job.Size     `toml:"size"`         // of all bundles together: those that were used longest ago go first; default: no limit
	RunnerLogs   job.Duration `toml:"runner-logs"`  // runners' own logs after their jobs; default: the last 100
	Environments job.Duration `toml:"environments"` // after their last use, in the cache that all of this user share; default: for ever
}

const (
	defaultBundles = job.Duration(30 * 24 * time.Hour)
	collectEvery   = time.Hour
	justUsed       = time.Hour // nothing goes that a part may be about to use
	gonePrefix     = ".gone-"
)

// Removal is something that retention takes away: of kind bundle, runner-log or environment.
type Removal struct {
	Kind  string    `json:"kind"`
	ID    string    `json:"id"`
	Name  string    `json:"name,omitempty"`
	Bytes int64     `json:"bytes"`
	Since time.Time `json:"since"` // when it was used last
	Why   string    `json:"why"`
}

// keeper takes away what retention no longer keeps.
type keeper struct {
	dir, cache string
	keep       Retention
	log        *slog.Logger
	now        func() time.Time
	used       func() []string // digests that parts use beyond what their folders say; nil = none
}

// Collect does once what an agent in dir does all the time, for an administrator: it may run or not. With dry, nothing is removed.
// It gives what was, or would be, removed.
func Collect(ctx context.Context, dir string, dry bool, log *slog.Logger) ([]Removal, error) {
	var conf Config
	if err := config.Read(filepath.Join(dir, ConfigFile), &conf); err != nil {
		return nil, err
	}
	if _, err := os.Stat(filepath.Join(dir, "bundles")); errors.Is(err, fs.ErrNotExist) {
		return nil, problem.New(problem.NotFound, "give the agent's directory with --dir", "no agent has run in %s yet", dir)
	}
	c := &keeper{dir: dir, cache: cmp.Or(conf.Cache, pyenv.DefaultCache()), keep: conf.Retention, log: log, now: time.Now}
	todo, err := c.plan()
	if dry || err != nil {
		return todo, err
	}
	return c.removeAll(ctx, todo)
}

// collects removes in the background until ctx is done.
func (a *Agent) collects(ctx context.Context) {
	c := &keeper{dir: a.dir, cache: a.conf.Cache, keep: a.conf.Retention, log: a.log, now: time.Now, used: a.digests}
	tick := time.NewTicker(collectEvery)
	defer tick.Stop()
	for {
		todo, err := c.plan()
		if err == nil {
			_, err = c.removeAll(ctx, todo)
		}
		if err != nil && ctx.Err() == nil {
			a.log.Error("what is no longer kept could not all be removed; it is tried again", "err", err, "retry", collectEvery)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// digests gives the bundles of the parts that there are.
func (a *Agent) digests() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	var out []string
	for _, of := range []map[job.ID]*part{a.parts, a.last} {
		for _, p := range of {
			out = append(out, p.first.GetBundleDigest())
		}
	}
	return out
}

var bundleForm = regexp.MustCompile(`^([0-9a-f]{64})(\.part|\.partial)?$`)

// inUse gives the bundles that parts in jobs use, by their folders' names.
func (c *keeper) inUse() (map[string]bool, error) {
	out := map[string]bool{}
	if c.used != nil {
		for _, d := range c.used() {
			out[strings.TrimPrefix(d, "sha256:")] = true
		}
	}
	specs, err := filepath.Glob(filepath.Join(c.dir, "jobs", "*", "party", "spec.json"))
	if err != nil {
		return nil, err
	}
	for _, path := range specs {
		b, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue // it has just ended
		}
		var spec struct {
			Bundle string `json:"bundle"`
		}
		if err == nil {
			err = json.Unmarshal(b, &spec)
		}
		if err != nil {
			return nil, fmt.Errorf("which bundle a part uses cannot be found out: %w", err) // nothing goes then
		}
		out[filepath.Base(spec.Bundle)] = true
	}
	return out, nil
}

// plan gives what is due, in the order in which it is to go.
func (c *keeper) plan() ([]Removal, error) {
	now := c.now()
	used, err := c.inUse()
	if err != nil {
		return nil, err
	}
	es, err := os.ReadDir(filepath.Join(c.dir, "bundles"))
	if err != nil {
		return nil, err
	}
	var out, old []Removal
	var total int64
	for _, e := range es {
		m := bundleForm.FindStringSubmatch(e.Name())
		if m == nil && !strings.HasPrefix(e.Name(), gonePrefix) {
			continue
		}
		info, err := e.Info()
		var n int64
		if err == nil {
			n, err = usage(filepath.Join(c.dir, "bundles", e.Name()))
		}
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			return nil, err
		}
		total += n
		r := Removal{Kind: "bundle", ID: e.Name(), Bytes: n, Since: info.ModTime()}
		switch keep := c.keep.Bundles.Or(defaultBundles); {
		case m == nil:
			r.Why = "its removal was cut short"
		case used[m[1]] || now.Sub(r.Since) < justUsed:
			continue
		case keep > 0 && now.Sub(r.Since) > keep.Std():
			r.Why = "bundles that no part uses are kept for " + keep.String()
		case m[2] != "" && now.Sub(r.Since) > 24*time.Hour:
			r.Why = "nothing was added to it for a day"
		default:
			old = append(old, r)
			continue
		}
		out, total = append(out, r), total-n
	}
	byAge := func(a, b Removal) int { return cmp.Or(a.Since.Compare(b.Since), strings.Compare(a.ID, b.ID)) }
	slices.SortFunc(old, byAge)
	for _, r := range old {
		if c.keep.Size <= 0 || total <= c.keep.Size.Bytes() {
			break
		}
		r.Why = fmt.Sprintf("bundles may have %s together", human.IBytes(uint64(c.keep.Size.Bytes())))
		out, total = append(out, r), total-r.Bytes
	}
	if d := c.keep.RunnerLogs; d > 0 {
		ls, err := os.ReadDir(filepath.Join(c.dir, RunnerLogs))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		for _, e := range ls {
			if info, err := e.Info(); err == nil && now.Sub(info.ModTime()) > d.Std() { // else it is gone
				out = append(out, Removal{Kind: "runner-log", ID: e.Name(), Bytes: info.Size(), Since: info.ModTime(), Why: "runners' logs are kept for " + d.String()})
			}
		}
	}
	if d := c.keep.Environments; d > 0 {
		envs, err := pyenv.FindUnused(c.cache, now.Add(-d.Std()))
		if err != nil {
			return nil, err
		}
		for _, e := range envs {
			n, err := usage(e.Dir)
			if err != nil {
				return nil, err
			}
			out = append(out, Removal{Kind: "environment", ID: filepath.Base(e.Dir), Bytes: n, Since: e.Since, Why: "environments are kept for " + d.String() + " after their last use"})
		}
	}
	slices.SortStableFunc(out, byAge)
	return out, nil
}

// removeAll removes one after the other, and goes on behind what cannot be removed. It gives what is gone.
func (c *keeper) removeAll(ctx context.Context, todo []Removal) (done []Removal, _ error) {
	var errs []error
	for _, r := range todo {
		if ctx.Err() != nil {
			return done, context.Cause(ctx)
		}
		gone, err := c.remove(r)
		if err != nil {
			errs = append(errs, fmt.Errorf("remove %s %s: %w", r.Kind, r.ID, err))
		} else if gone {
			c.log.Info("removed what is no longer kept", "kind", r.Kind, "id", r.ID, "bytes", r.Bytes, "why", r.Why)
			done = append(done, r)
		}
	}
	return done, errors.Join(errs...)
}

func (c *keeper) remove(r Removal) (gone bool, err error) {
	switch r.Kind {
	case "runner-log":
		return true, os.Remove(filepath.Join(c.dir, RunnerLogs, r.ID))
	case "environment":
		return pyenv.Unused{Dir: filepath.Join(c.cache, "envs", r.ID)}.Remove(c.now().Add(-c.keep.Environments.Std()))
	}
	unlock, err := keyed.File(bundleLock(c.dir), false)
	if err != nil {
		return false, err
	}
	path := filepath.Join(c.dir, "bundles", r.ID)
	as := path
	if !strings.HasPrefix(r.ID, gonePrefix) {
		// A part that has come meanwhile has noted its use, under the same lock.
		info, err := os.Stat(path)
		if err != nil || c.now().Sub(info.ModTime()) < justUsed {
			unlock()
			return false, err
		}
		// By another name first, so that nobody uses half of it.
		as = filepath.Join(c.dir, "bundles", gonePrefix+r.ID)
		if err = errors.Join(os.RemoveAll(as), os.Rename(path, as)); err != nil {
			unlock()
			return false, err
		}
	}
	unlock()
	return true, os.RemoveAll(as)
}

func bundleLock(dir string) string { return filepath.Join(dir, "bundles", ".lock") }

// usage gives the bytes that a file or folder takes on its disk.
func usage(path string) (int64, error) {
	var n int64
	err := filepath.WalkDir(path, func(_ string, d fs.DirEntry, err error) error {
		if err == nil {
			var info fs.FileInfo
			if info, err = d.Info(); err == nil {
				if st, ok := info.Sys().(*syscall.Stat_t); ok {
					n += st.Blocks * 512 // of 512 bytes each: stat(2)
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
