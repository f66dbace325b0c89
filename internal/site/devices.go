package site

import (
	"context"
	"os"
	"path/filepath"
	"slices"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/runner"
)

// takeDevices gives the devices that are a part's alone until its folder is gone: n that no other part has, nil where the site
// declares none. Which one has stands in its runner's spec, so that an agent that was started again knows; until that is written,
// it stands in taken. The hub starts nothing for which there are too few, but a part of an ended job may still be on its way out:
// that is waited for, until the hub wants this one no more.
func (p *part) takeDevices(ctx context.Context, n int64) ([]string, error) {
	a := p.agent
	if a.offer.devices == nil {
		if n > 0 {
			return nil, problem.New(problem.Internal, "declare them with gpus below [resources] in the agent's site.toml, and start it again",
				"the job wants %d GPUs of %s, which declares none", n, a.conf.Name)
		}
		return nil, nil
	}
	if n > int64(len(a.offer.devices)) {
		return nil, problem.New(problem.Internal, "declare more with gpus below [resources] in the agent's site.toml, or submit the job again",
			"the job wants %d GPUs of %s, which declares %d", n, a.conf.Name, len(a.offer.devices))
	}
	for {
		a.mu.Lock()
		freed := a.freed
		out, err := a.freeDevicesLocked(p.id, int(n))
		if err == nil && out != nil {
			a.taken[p.id] = out
		}
		a.mu.Unlock()
		if err != nil || out != nil {
			return out, err
		}
		p.log.Info("waiting for devices that an ended job still has", "devices", n)
		select {
		case <-freed:
		case <-p.gone:
			return nil, errGone
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// freeDevicesLocked gives n devices that no part but that of id has, the first in the order of the configuration; nil if there are
// fewer.
func (a *Agent) freeDevicesLocked(id job.ID, n int) ([]string, error) {
	es, err := os.ReadDir(filepath.Join(a.dir, "jobs"))
	if err != nil {
		return nil, err
	}
	var held []string
	for other, ids := range a.taken {
		if other != id {
			held = append(held, ids...)
		}
	}
	for _, e := range es {
		if e.Name() != string(id) {
			held = append(held, runner.GPUsIn(filepath.Join(a.dir, "jobs", e.Name(), "party"))...)
		}
	}
	out := []string{}
	for _, d := range a.offer.devices {
		if len(out) < n && !slices.Contains(held, d) {
			out = append(out, d)
		}
	}
	if len(out) < n {
		return nil, nil
	}
	return out, nil
}

// giveBack tells those that wait for devices that a part's folder is gone, and with it what was the part's.
func (a *Agent) giveBack(id job.ID) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.taken, id)
	close(a.freed)
	a.freed = make(chan struct{})
}
