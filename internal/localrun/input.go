package localrun

import (
	"errors"
	"os"
	"path/filepath"
	"strings"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/problem"
)

// Input is an app that is not a directory yet: a FAB, a job folder of another system.
type Input struct {
	Name     string                 // of the directory to be; Flower sees it where an app has no name
	Shown    string                 // what messages name in place of that directory
	Write    func(dir string) error // fills the directory, which is there and empty
	Warnings []string
}

// inputName is the folder below the run's state in which the app's directory is made.
const inputName = "input"

// unpack makes the app's directory below the run's state, where it goes away with it, also if this command is killed.
func (r *run) unpack() error {
	r.emptyOut = r.opt.Out != "" && exists(r.opt.Out)
	if err := r.makeOut(); err != nil {
		return diskProblem(err, r.opt.Out)
	}
	r.dir = filepath.Join(r.state, inputName, r.opt.Input.Name)
	if err := os.MkdirAll(r.dir, 0o755); err != nil {
		return diskProblem(err, r.out)
	}
	return r.opt.Input.Write(r.dir)
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// forget removes the run's directory when nothing was started after all: as if it had never been.
func (r *run) forget() error {
	if r.out == "" || r.opt.Input == nil {
		return nil
	}
	var errs []error
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.events != nil {
		errs = append(errs, r.events.Close(), os.Remove(filepath.Join(r.out, "events.jsonl")))
		r.events = nil
	}
	errs = append(errs, os.RemoveAll(r.state))
	if !r.emptyOut {
		errs = append(errs, os.Remove(r.out))
		if r.opt.Out == "" {
			// The folder of all runs may have others in it.
			_ = os.Remove(filepath.Dir(r.out))
		}
	}
	r.out, r.summary.Out = "", ""
	return errors.Join(errs...)
}

// rename has messages name what the user gave, not the directory that was made of it.
func (r *run) rename(err error) error {
	p, ok := errors.AsType[*problem.Error](err)
	if !ok || r.dir == "" {
		return err
	}
	c := r.renamed(p)
	if s := r.summary.Cause; s != nil {
		r.summary.Cause = r.renamed(s)
	}
	return c
}

func (r *run) renamed(p *job.Cause) *job.Cause {
	c := *p.Told()
	c.Msg = strings.ReplaceAll(c.Msg, r.dir, r.opt.Input.Shown)
	c.Next = strings.ReplaceAll(c.Next, r.dir, r.opt.Input.Shown)
	return &c
}
