package site

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/pergolafl/pergola/internal/api"
	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/runner"
)

// part is this site's side of one job.
type part struct {
	agent *Agent
	id    job.ID
	first *pb.DesiredParty
	last  atomic.Pointer[pb.DesiredParty] // as the hub said last; of the same attempt as first
	want  *runner.Want
	log   *slog.Logger

	before *part         // the same party's attempt before, or the same job's part before it was forgotten; nil: none
	ended  chan struct{} // closed when nothing of this one is left to do

	once sync.Once
	gone chan struct{} // closed when the hub wants nothing more of it
}

func newPart(a *Agent, id job.ID, w *pb.DesiredParty) *part {
	p := &part{agent: a, id: id, first: w, want: runner.NewWant(), log: a.log.With("job", id), gone: make(chan struct{}), ended: make(chan struct{})}
	p.last.Store(w)
	return p
}

func (p *part) partyDir() string { return filepath.Join(p.agent.jobDir(p.id), "party") }

func (p *part) attempt() int { return int(p.first.GetAttempt()) }

func (p *part) set(w *pb.DesiredParty) {
	p.last.Store(w)
	p.want.Set(w.GetDesired(), 0)
}

// forget ends what there still is of it: the hub considers the job over.
func (p *part) forget() {
	p.want.Set(pb.Desired_DESIRED_KILL, 0)
	p.once.Do(func() { close(p.gone) })
}

// forgotten tells whether the hub wants nothing more of it.
func (p *part) forgotten() bool {
	select {
	case <-p.gone:
		return true
	default:
		return false
	}
}

// run does the part until the hub has heard how it ended and wants it no more.
func (p *part) run(ctx context.Context) {
	defer close(p.ended)
	if p.before != nil {
		select {
		case <-p.before.ended: // the folder is the same
			p.before = nil
		case <-ctx.Done():
			return
		}
	}
	// An agent that was started again may find a runner of a job that is to end.
	if p.first.GetDesired() == pb.Desired_DESIRED_UP || runner.Begun(p.partyDir()) {
		if err := p.do(ctx); err != nil && ctx.Err() == nil && !p.forgotten() {
			p.log.Error("the part in the job failed", "err", err)
			cause := *problem.From(err)
			cause.Party = p.agent.conf.Name
			p.report(ctx, p.entry(job.PartyStateChange{To: job.PartyFailed, Cause: &cause}))
		}
	} else {
		// Only its end is wanted, and nothing of it is here: say so.
		p.report(ctx, p.entry(job.PartyStateChange{To: job.PartyDone, Reason: "was never started"}))
	}
	select {
	case <-p.gone:
		p.clear()
	case <-ctx.Done():
	}
}

// clear removes the part's folder. The hub has all of the programs' logs; what the app wrote stays only where the site's own
// settings say so.
func (p *part) clear() {
	if err := runner.Sweep(p.partyDir(), p.agent.mark(p.id)); err != nil {
		p.log.Error("what is left of the job's runner could not be ended", "err", err)
	}
	p.keepLog()
	if err := os.RemoveAll(p.agent.jobDir(p.id)); err != nil {
		p.log.Error("could not remove the job's folder", "err", err)
		return // what is still there still holds its devices
	}
	p.agent.giveBack(p.id)
}

// RunnerLogs is the folder in the agent's directory in which the runners' own logs are kept after their jobs, as JOB.log, and JOB-2.log and so on
// where the party has begun anew; keptLogs is of how many.
const (
	RunnerLogs = "runners"
	keptLogs   = 100
)

// keepLog keeps the runner's own log, for whoever looks after the site.
func (p *part) keepLog() {
	dir := filepath.Join(p.agent.dir, RunnerLogs)
	err := os.MkdirAll(dir, 0o700)
	if err == nil {
		name := string(p.id)
		if n := p.attempt(); n > 0 {
			name += fmt.Sprintf("-%d", n+1)
		}
		err = os.Rename(runner.OutputFile(p.partyDir()), filepath.Join(dir, name+".log"))
	}
	if err != nil {
		if !errors.Is(err, os.ErrNotExist) { // there was no runner
			p.log.Error("could not keep the runner's log", "err", err)
		}
		return
	}
	es, err := os.ReadDir(dir) // sorted by name, which is by age
	for i := 0; err == nil && i < len(es)-keptLogs; i++ {
		err = os.Remove(filepath.Join(dir, es[i].Name()))
	}
	if err != nil {
		p.log.Error("could not remove an old log", "err", err)
	}
}

// entry makes an entry that does not come from a runner.
func (p *part) entry(c job.PartyStateChange) runner.Entry {
	e, err := job.NewEvent(p.id, p.agent.conf.Name, job.KindPartyState, c, time.Now())
	if err != nil {
		panic(err) // only for what cannot be JSON
	}
	return runner.Entry{Event: e}
}

// do starts the runner, or finds it, and follows it to its end.
func (p *part) do(ctx context.Context) error {
	a := p.agent
	dir := p.partyDir()
	logDir := filepath.Join(a.jobDir(p.id), "logs")
	if err := os.MkdirAll(logDir, 0o700); err != nil {
		return p.disk(err)
	}
	if err := runner.Renew(dir, p.attempt(), a.mark(p.id)); err != nil {
		return p.disk(err)
	}
	h, err := runner.Attach(dir)
	if errors.Is(err, os.ErrNotExist) {
		starting, cancel := p.whileWanted(ctx)
		h, err = p.start(starting, dir, logDir)
		cancel()
	}
	if err != nil {
		return p.disk(err)
	}
	keeping, enough := context.WithCancel(ctx)
	var kept sync.WaitGroup
	kept.Go(func() { p.keepCertificate(keeping, dir) })
	defer kept.Wait()
	defer enough()
	// The logs go ahead of the last word: once the hub knows that the part is over, it has all of its lines.
	ended := make(chan struct{})
	shipped := make(chan struct{})
	go func() {
		defer close(shipped)
		p.ship(ctx, logDir, ended)
	}()
	err = h.Keep(ctx, 0, a.mark(p.id), p.want, func(e runner.Entry) error {
		if _, final := e.Final(); final {
			close(ended)
			<-shipped
		}
		p.report(ctx, e)
		return ctx.Err()
	})
	select {
	case <-ended:
	default:
		close(ended)
	}
	<-shipped
	if err != nil && ctx.Err() == nil {
		if full := p.disk(err); problem.CodeOf(full) == problem.DiskFull {
			return full
		}
		return problem.Wrap(err, problem.SiteRunnerDied, "submit the job again", "the runner at %s %s", a.conf.Name, runner.HowDied(err))
	}
	return nil
}

func (p *part) disk(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return problem.Wrap(err, problem.DiskFull, "make room on the site's disk", "no space is left where %s keeps its jobs (%s)", p.agent.conf.Name, p.agent.dir)
	}
	return err
}

// start fetches what the runner needs, and starts it.
func (p *part) start(ctx context.Context, dir, logDir string) (*runner.Handle, error) {
	a := p.agent
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	spec, err := p.settings()
	if err != nil {
		return nil, err
	}
	bundleDir, err := p.fetch(ctx, p.first.GetBundleDigest())
	if err != nil {
		return nil, err
	}
	if err := p.identity(ctx, dir); err != nil {
		return nil, err
	}
	if err := p.goOn(ctx, logDir); err != nil {
		return nil, err
	}
	gpus, err := p.takeDevices(ctx, spec.ResourcesFor(a.conf.Name)[job.GPUs])
	if err != nil {
		return nil, err
	}
	// A large bundle takes its time. Meanwhile the job may have changed its engine, of which one that has not begun is told no other way.
	if spec, err = p.settings(); err != nil {
		return nil, err
	}
	return runner.Start(dir, runner.Spec{
		GPUs: gpus,
		Job:  p.id, Party: a.conf.Name, Attempt: p.attempt(), Index: int(p.first.GetIndex()), Count: int(p.first.GetCount()), Spec: spec,
		Bundle: bundleDir, Logs: logDir, LogQuota: spec.LogQuota.Or(job.DefaultLogQuota).Least(a.conf.LogQuota).Bytes(), Cache: a.conf.Cache, Python: a.conf.Python, Existing: a.conf.Existing, Apps: a.conf.Apps,
		Hub: a.hubs, Proxy: a.conf.Proxy, Mark: a.mark(p.id),
	})
}

// settings gives the job's settings as the hub has them now; the site's own win.
func (p *part) settings() (spec job.Spec, err error) {
	if err := json.Unmarshal([]byte(p.last.Load().GetSpecJson()), &spec); err != nil {
		return spec, problem.New(problem.BundleInvalid, "", "the job's settings cannot be read: %v", err)
	}
	if conf := p.agent.conf; len(conf.Env) > 0 {
		if spec.Site.Named == nil {
			spec.Site.Named = map[string]job.Site{}
		}
		own := spec.Site.Named[conf.Name]
		own.Env = merge(own.Env, conf.Env)
		spec.Site.Named[conf.Name] = own
	}
	return spec, nil
}

func merge(a, b map[string]string) map[string]string {
	out := map[string]string{}
	for _, m := range []map[string]string{a, b} {
		for k, v := range m {
			out[k] = v
		}
	}
	return out
}

// final tells whether trying again cannot help.
func final(err error) bool {
	p, ok := errors.AsType[*problem.Error](err)
	// A site that has enrolled again has a new certificate in a moment; if not, the agent ends.
	return ok && !problem.IsUnreachable(p) && p.Code != problem.Superseded
}

// refused tells whether the hub will never take what it was told. A hub without space may have some later.
func refused(err error) bool {
	switch p, ok := errors.AsType[*problem.Error](err); {
	case !ok:
		return false
	case p.Code == problem.DiskFull, p.Code == problem.Internal:
		return false
	}
	return final(err)
}

// retry calls f until the hub answers, or says that it is of no use.
func retry[T any](ctx context.Context, log *slog.Logger, final func(error) bool, f func() (T, error)) (T, error) {
	bo := backoff.NewExponentialBackOff()
	bo.InitialInterval, bo.MaxInterval = 50*time.Millisecond, 5*time.Second
	return backoff.Retry(ctx, func() (T, error) {
		v, err := f()
		if err != nil && final(err) {
			return v, backoff.Permanent(err)
		}
		return v, err
	}, backoff.WithBackOff(bo), backoff.WithMaxElapsedTime(0),
		backoff.WithNotify(func(err error, wait time.Duration) { log.Warn("a call to the hub failed", "err", err, "retry", wait) }))
}

// report delivers an entry, however long the hub is away; a hub that refuses it, or wants the part no more, ends that.
func (p *part) report(ctx context.Context, e runner.Entry) {
	ev, err := api.Event(e.Event)
	if err != nil {
		p.log.Error("an entry cannot be sent", "err", err)
		return
	}
	ctx, cancel := p.whileWanted(ctx)
	defer cancel()
	if _, err := retry(ctx, p.log, refused, func() (*pb.ReportResponse, error) {
		return p.agent.client.Sites.Report(ctx, &pb.ReportRequest{JobId: string(p.id), Attempt: int32(p.attempt()), Entries: []*pb.JournalEntry{{Seq: e.Seq, Event: ev}}})
	}); err != nil && ctx.Err() == nil {
		p.log.Error("the hub refused an entry", "kind", e.Event.Kind, "err", err)
	}
}

// whileWanted ends with the part.
func (p *part) whileWanted(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	go func() {
		select {
		case <-p.gone:
			cancel(errGone)
		case <-ctx.Done():
		}
	}()
	return ctx, func() { cancel(nil) }
}
