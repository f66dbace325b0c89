package localrun

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/pergolafl/pergola/internal/hub"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/proc"
	"github.com/pergolafl/pergola/internal/runner"
	"github.com/pergolafl/pergola/internal/site"
	"github.com/pergolafl/pergola/internal/store/sqlite"
)

// maxAttempts is of how many attempts of a site the runner's log is kept.
const maxAttempts = 20

// tidy ends what is left, settles the job if its hub could not, and keeps of the run's files what the user wants: logs,
// results and the store.
func (r *run) tidy(cause error) error {
	if _, err := proc.KillTree(os.Getpid()); err != nil {
		return err
	}
	hubDir := filepath.Join(r.state, "hub")
	var errs []error
	// Runners that were not left the time have not removed their temporary files.
	for _, n := range append([]string{"hub"}, r.names...) {
		if tmp := runner.TempDir(filepath.Join(r.state, n, "jobs", string(r.summary.Job), "party")); r.summary.Job != "" && tmp != "" {
			errs = append(errs, os.RemoveAll(tmp))
		}
	}
	if r.summary.Job != "" {
		jobDir := filepath.Join(hubDir, "jobs", string(r.summary.Job))
		errs = append(errs, moveInto(filepath.Join(jobDir, "logs"), filepath.Join(r.out, "logs")),
			moveInto(filepath.Join(jobDir, "results"), filepath.Join(r.out, "results")),
			rename(runner.OutputFile(filepath.Join(jobDir, "party")), filepath.Join(r.out, "logs", "hub-runner.log")))
	}
	for _, n := range r.names {
		dir, to := filepath.Join(r.state, n), filepath.Join(r.out, "logs", n+"-runner.log")
		// With the part if the agent was ended before it could tidy up, else where the agent keeps it.
		errs = append(errs, rename(runner.OutputFile(filepath.Join(dir, "jobs", string(r.summary.Job), "party")), to),
			rename(filepath.Join(dir, site.RunnerLogs, string(r.summary.Job)+".log"), to))
		for i := 2; i <= maxAttempts; i++ { // of a part that began anew
			from := filepath.Join(dir, site.RunnerLogs, fmt.Sprintf("%s-%d.log", r.summary.Job, i))
			errs = append(errs, rename(from, filepath.Join(r.out, "logs", fmt.Sprintf("%s-runner-%d.log", n, i))))
		}
	}
	// Last, so that a full disk has the room of what is gone by then.
	for _, n := range append(slices.Clone(r.names), filepath.Join("hub", "bundles"), filepath.Join("hub", "jobs"), filepath.Join("hub", "reserve")) {
		errs = append(errs, os.RemoveAll(filepath.Join(r.state, n)))
	}
	if cause != nil && r.summary.Job != "" {
		if err := r.settle(filepath.Join(hubDir, hub.DatabaseFile), problem.From(cause)); err != nil && problem.CodeOf(cause) != problem.DiskFull {
			errs = append(errs, err)
		}
	}
	for _, f := range []string{"", "-wal", "-shm"} {
		errs = append(errs, rename(filepath.Join(hubDir, hub.DatabaseFile+f), filepath.Join(r.out, hub.DatabaseFile+f)))
	}
	errs = append(errs, os.RemoveAll(r.state))
	if err := errors.Join(errs...); err != nil {
		return problem.Wrap(err, problem.Internal, "remove "+r.state+" by hand", "the run's files could not be tidied up")
	}
	return nil
}

// settle writes the end of a job whose hub is gone into its store. What the store has already counts: the summary takes it
// from there.
func (r *run) settle(path string, cause *problem.Error) (err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	db, err := sqlite.Open(ctx, path)
	if err != nil {
		return err
	}
	defer db.Close()
	j, err := db.Job(ctx, r.summary.Job)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			return
		}
		if j, err = db.Job(ctx, r.summary.Job); err == nil {
			r.mu.Lock()
			r.summary.State, r.summary.Cause, r.settled = j.State, j.Cause, true
			r.mu.Unlock()
		}
	}()
	now := time.Now()
	if j.State.Active() {
		if err := db.Move(ctx, j.ID, job.Stopping, cause, "", now); err != nil {
			return err
		}
		j.State = job.Stopping
	}
	if j.State.Terminal() {
		return nil
	}
	ps, err := db.Parties(ctx, j.ID)
	if err != nil {
		return err
	}
	for _, p := range ps {
		if !p.State.Terminal() {
			if err := db.MoveParty(ctx, j.ID, p.Name, job.PartyDone, nil, "ended with the job", now); err != nil {
				return err
			}
		}
	}
	if j.Cause != nil {
		cause = j.Cause
	}
	return db.Move(ctx, j.ID, j.State.Outcome(cause), cause, "", now)
}

// moveInto renames the entries of a folder into another one.
func moveInto(from, to string) error {
	es, err := os.ReadDir(from)
	if os.IsNotExist(err) || len(es) == 0 {
		return nil
	}
	if err != nil {
		return err
	}
	if err := os.MkdirAll(to, 0o755); err != nil {
		return err
	}
	var errs []error
	for _, e := range es {
		if d := filepath.Join(from, e.Name()); e.IsDir() && isEmpty(d) {
			continue
		}
		errs = append(errs, rename(filepath.Join(from, e.Name()), filepath.Join(to, e.Name())))
	}
	return errors.Join(errs...)
}

func isEmpty(dir string) bool {
	es, err := os.ReadDir(dir)
	return err == nil && len(es) == 0
}

func rename(from, to string) error {
	if err := os.Rename(from, to); err != nil && !os.IsNotExist(err) {
		return err
	}
	return nil
}

// locate gives the path of the log that a cause names, where the run keeps it; or what the cause says.
func locate(out string, c job.Cause) string {
	if c.Log == "" || c.Party == "" {
		return c.Log
	}
	for _, p := range []string{filepath.Join(out, "logs", c.Party, c.Log), filepath.Join(out, "logs", c.Party+"-"+c.Log)} {
		if _, err := os.Stat(p); err == nil {
			return p
		}
	}
	return c.Log
}
