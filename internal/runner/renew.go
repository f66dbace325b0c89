package runner

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/pergolafl/pergola/internal/flower"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/proc"
)

// Renew makes room in a party's directory for the given attempt: a runner that an older attempt has left is ended, with all
// of its programs and their temporary files, and all files but the runner's log are removed. Nothing is done where the
// directory is the attempt's own or empty. The mark is the party's; it is the same in every attempt.
func Renew(dir string, attempt int, mark string) error {
	old, err := readSpec(dir)
	if errors.Is(err, fs.ErrNotExist) || err == nil && old.Attempt >= attempt {
		return nil
	}
	if err != nil {
		return err
	}
	return Sweep(dir, mark)
}

// Begun tells whether a runner was started in dir, by whomever, and has said who it is.
func Begun(dir string) bool {
	_, err := os.Stat(filepath.Join(dir, runnerFile))
	return err == nil
}

// Sweep ends what there may be of a party whose work is over or not wanted any more: its runner, all of its programs and
// their temporary files; of its directory only the runner's log stays. The mark is the party's.
func Sweep(dir, mark string) error {
	if _, err := os.Stat(filepath.Join(dir, specFile)); errors.Is(err, fs.ErrNotExist) {
		return nil // swept, or never used
	}
	switch h, err := Attach(dir); {
	case errors.Is(err, fs.ErrNotExist): // it was never started, or never came to say who it is
		if err := forsake(dir, mark); err != nil {
			return err
		}
	case err != nil:
		return err
	default:
		defer h.Release()
		h.Kill()
		select {
		case <-h.Gone():
		case <-time.After(killPatience): // killed, and the kernel cannot end it: a disk that hangs
			return errors.New("the party's earlier runner does not end")
		}
		if err := h.Clean(mark); err != nil {
			return err
		}
	}
	es, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range es {
		if e.Name() != outputFile {
			err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
		}
	}
	return err
}

// forsake ends a runner whose starter ended before anybody noted which process it is, and removes its temporary files.
func forsake(dir, mark string) error {
	if _, err := proc.KillCommand("runner", "--dir", dir); err != nil {
		return err
	}
	_, err := proc.KillMarked(mark)
	if tmp := TempDir(dir); tmp != "" {
		err = errors.Join(err, os.RemoveAll(tmp))
	}
	return err
}

// renewDatabase makes the database that an attempt before has left fit for this one.
func (r *runner) renewDatabase(ctx context.Context) error {
	path := r.spec.Spec.Server.Database
	if r.spec.Attempt == 0 || path == "" || path == ":memory:" {
		return nil
	}
	if !filepath.IsAbs(path) {
		path = filepath.Join(r.spec.Results, path)
	}
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return nil // that attempt did not come so far
	}
	n, err := flower.TakeOffline(ctx, path)
	if err != nil {
		return problem.Wrap(err, problem.ProgramFailed, "see what is in the file; without it the job can be submitted again", "the superlink's database of the attempt before cannot be used")
	}
	if n > 0 {
		r.log.Info("nodes of the attempt before were taken offline", "count", n)
	}
	return nil
}
