package runner

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/pergolafl/pergola/internal/job"
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
	switch h, err := Attach(dir); {
	case errors.Is(err, fs.ErrNotExist): // it was never started, or never came to say who it is
	case err != nil:
		return err
	default:
		defer h.Release()
		h.Kill()
		select {
		case <-h.Gone():
		case <-time.After(killPatience): // killed, and the kernel cannot end it: a disk that hangs
			return errors.New("the runner of the attempt before does not end")
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

// waitForNodes waits until the nodes of an attempt before are no longer online for the superlink, whose database knows them.
func (r *runner) waitForNodes(ctx context.Context) error {
	wait := time.Until(r.spec.NotBefore)
	if wait <= 0 {
		return nil
	}
	r.note(job.KindNote, job.Text{Message: fmt.Sprintf("the app starts in %s, when Flower has forgotten the nodes of the attempt before", wait.Round(time.Second))})
	select {
	case <-time.After(wait):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
