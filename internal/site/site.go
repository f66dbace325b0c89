// Package site is an organisation's agent: it dials the hub, learns what the site should be running, keeps a runner for
// each part that it has in a job, and reports what the runners write down. It listens nowhere.
//
// It runs none of Flower's programs itself (its runners do), and holds nothing that is not on disk as well. Start with
// [Open] and [Agent.Run].
package site

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/pergolafl/pergola/internal/api"
	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/config"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/keyed"
	"github.com/pergolafl/pergola/internal/logline"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/pyenv"
	"github.com/pergolafl/pergola/internal/uplink"
)

// ConfigFile is the configuration's name in the agent's directory.
const ConfigFile = "site.toml"

// Config is an agent's site.toml.
type Config struct {
	Name     string            `toml:"name"`      // the site's name
	Hub      any               `toml:"hub"`       // "host:port", or a list of such that are tried in turn
	Proxy    string            `toml:"proxy"`     // on the way to the hub: http://user:password@host:port, or "direct"; "" = as the environment says
	Python   string            `toml:"python"`    // interpreter for the site's side of jobs; "" = the best of PATH
	Existing bool              `toml:"existing"`  // use Python as it is, build no environments
	Cache    string            `toml:"cache"`     // environments; "" = the user's cache folder
	Apps     string            `toml:"apps"`      // folder with apps that lie ready, for a job's site.app-path; "" = none
	Env      map[string]string `toml:"env"`       // for every program at this site; wins over the job's
	LogQuota job.Size          `toml:"log-quota"` // the most that is kept here of the logs of a part in a job; default: as the job says
	Mark     string            `toml:"mark"`      // begins the marks of this agent's programs; default the site's name

	Retention Retention `toml:"retention"` // for how long what no job needs is kept

	// Resources are what the site has for jobs: cpus, memory ("64GiB"), gpus (a number, or ids), names of its own, and max-jobs.
	// Undeclared CPUs and memory are what the machine has.
	Resources map[string]any `toml:"resources,omitempty"`
}

// Agent is a running agent.
type Agent struct {
	dir    string
	conf   Config
	hubs   []string // its addresses
	offer  offer
	log    *slog.Logger
	client *api.Client
	cred   *pki.Credential   // the site's own
	shown  *x509.Certificate // of the connections that are made; Run's own
	conn   connection

	Status func(string) // is told in words how it stands with the hub; nil: nobody is. Set it before Run.

	locks keyed.Locks // of bundles, by digest

	mu    sync.Mutex          // guards the rest
	taken map[job.ID][]string // devices of parts, see takeDevices
	freed chan struct{}       // closed and replaced when a part's folder is gone
	parts map[job.ID]*part
	last  map[job.ID]*part // those that were forgotten and have not ended yet
	swept bool             // what jobs that ended while no agent ran have left is being taken away
}

// Open reads dir/site.toml and the site's key pair (site.crt, site.key, ca.crt).
func Open(dir string, log *slog.Logger) (*Agent, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	a := &Agent{dir: dir, log: log, parts: map[job.ID]*part{}, last: map[job.ID]*part{}, taken: map[job.ID][]string{}, freed: make(chan struct{})}
	if err := config.Read(filepath.Join(dir, ConfigFile), &a.conf); err != nil {
		return nil, err
	}
	if err := job.CheckName("site", a.conf.Name); err != nil {
		return nil, err
	}
	if a.hubs, err = a.conf.hubs(filepath.Join(dir, ConfigFile)); err != nil {
		return nil, err
	}
	if a.offer, err = a.conf.offer(filepath.Join(dir, ConfigFile)); err != nil {
		return nil, err
	}
	if a.conf.Cache == "" {
		a.conf.Cache = pyenv.DefaultCache()
	}
	if a.conf.LogQuota > 0 && a.conf.LogQuota < job.MinLogQuota {
		return nil, problem.New(problem.Usage, "give "+job.MinLogQuota.String()+" or more", "%s: log-quota is %s, which is too little", filepath.Join(dir, ConfigFile), a.conf.LogQuota)
	}
	if a.conf.Mark == "" {
		a.conf.Mark = a.conf.Name
	}
	if a.cred, err = pki.OpenCredential(dir, "site"); err != nil {
		return nil, err
	}
	conf, err := a.cred.ClientTLS(pki.HubName)
	if err != nil {
		return nil, err
	}
	if a.client, err = api.Dial(uplink.Config{Hubs: a.hubs, Proxy: a.conf.Proxy, TLS: conf}); err != nil {
		return nil, inFile(err, filepath.Join(dir, ConfigFile))
	}
	for _, d := range []string{"jobs", "bundles"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o700); err != nil {
			return nil, err
		}
	}
	return a, nil
}

// hubs gives the addresses of hub, a text or a list of texts.
func (c *Config) hubs(path string) ([]string, error) {
	const next = `write hub = "HOST:PORT", or hub = ["HOST:PORT", "HOST:PORT"] for addresses to be tried in turn`
	var out []string
	switch v := c.Hub.(type) {
	case nil:
	case string:
		out = []string{v}
	case []string:
		out = v
	case []any:
		for _, e := range v {
			s, ok := e.(string)
			if !ok {
				return nil, problem.New(problem.Usage, next, "%s: hub has something that is no text", path)
			}
			out = append(out, s)
		}
	default:
		return nil, problem.New(problem.Usage, next, "%s: hub is neither a text nor a list of texts", path)
	}
	if len(out) == 0 || len(out) == 1 && out[0] == "" {
		return nil, problem.New(problem.Usage, next, "%s names no hub", path)
	}
	return out, nil
}

// inFile has a usage problem name the file.
func inFile(err error, path string) error {
	if p, ok := errors.AsType[*problem.Error](err); ok && p.Code == problem.Usage {
		return problem.Wrap(p.Err, p.Code, p.Next, "%s: %s", path, p.Msg)
	}
	return err
}

// Run keeps what the hub wants until ctx is done. Runners go on without the agent.
func (a *Agent) Run(ctx context.Context) error {
	defer a.client.Close()
	a.log = a.log.With(logline.Site, a.conf.Name)
	var wg, parts sync.WaitGroup
	defer wg.Wait()
	defer parts.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // before the waiting: the agent also ends by itself
	wg.Go(func() { a.serveMonitor(ctx) })
	wg.Go(func() { a.keepCertificate(ctx) })
	wg.Go(func() { a.collects(ctx) })
	bo := backoff.NewExponentialBackOff()
	bo.InitialInterval, bo.MaxInterval = 50*time.Millisecond, 5*time.Second
	for {
		began := time.Now()
		used := a.cred.Certificate()
		err := a.watch(ctx, &parts)
		if ctx.Err() != nil {
			return nil
		}
		if errors.Is(err, errRenewed) {
			continue
		}
		a.conn.set(false, err)
		switch problem.CodeOf(err) {
		case problem.Denied, problem.Version:
			return err // trying again changes nothing
		case problem.Expired, problem.Superseded, problem.Removed:
			if a.rejoined(ctx, err, used) {
				continue
			}
			if ctx.Err() != nil {
				return nil
			}
			return a.leave(ctx, &parts, err, used)
		}
		if time.Since(began) > bo.MaxInterval {
			bo.Reset()
		}
		wait := bo.NextBackOff()
		a.tell("no hub: " + problem.From(err).Msg)
		a.log.Warn("the hub is not there", "hub", strings.Join(a.hubs, ", "), "err", err, "retry", wait)
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return nil
		}
	}
}

func (a *Agent) tell(status string) {
	if a.Status != nil {
		a.Status(status)
	}
}

// Alive returns when the agent's state can be looked at, which takes no time unless something is stuck.
func (a *Agent) Alive() {
	a.mu.Lock()
	defer a.mu.Unlock()
}

// watch follows one stream of wishes to its end, or until there is another certificate (errRenewed).
func (a *Agent) watch(ctx context.Context, parts *sync.WaitGroup) error {
	call, end := context.WithCancelCause(ctx)
	defer end(nil)
	stop := a.untilRenewed(end)
	defer stop()
	err := a.follow(call, func(want []*pb.DesiredParty) { a.reconcile(ctx, parts, want) })
	if errors.Is(context.Cause(call), errRenewed) {
		return errRenewed
	}
	return err
}

// follow gives wishes to fn until the stream ends.
func (a *Agent) follow(ctx context.Context, fn func([]*pb.DesiredParty)) error {
	s, err := a.client.Sites.WatchDesired(ctx, &pb.WatchDesiredRequest{AgentVersion: api.BuildVersion(), Protocol: api.Protocol, Offer: a.offer.proto()})
	if err != nil {
		if p := pki.Explain(err); p != nil {
			return p
		}
		return err
	}
	defer s.Close()
	for first := true; ; first = false {
		m, err := s.Receive()
		if err != nil {
			if p := pki.Explain(err); p != nil {
				return p
			}
			return err
		}
		if first {
			a.conn.set(true, nil)
			a.log.Info("connected", "hub", strings.Join(a.hubs, ", "))
			a.tell("connected to " + strings.Join(a.hubs, ", "))
		}
		fn(m.GetParties())
	}
}

// reconcile starts, steers and ends parts so that they are what is wanted.
func (a *Agent) reconcile(ctx context.Context, wg *sync.WaitGroup, want []*pb.DesiredParty) {
	a.mu.Lock()
	defer a.mu.Unlock()
	wanted := map[job.ID]bool{}
	for _, w := range want {
		id, err := job.ParseID(w.GetJobId())
		if err != nil {
			a.log.Error("the hub wants a job that has no id", "err", err)
			continue
		}
		wanted[id] = true
		p := a.parts[id]
		if p != nil && p.attempt() != int(w.GetAttempt()) {
			a.forgetLocked(p)
			p = nil
		}
		if p == nil {
			p = newPart(a, id, w)
			p.before = a.last[id]
			a.parts[id] = p
			wg.Go(func() {
				p.run(ctx)
				a.mu.Lock()
				defer a.mu.Unlock()
				if a.last[id] == p {
					delete(a.last, id)
				}
			})
		}
		p.set(w)
	}
	for id, p := range a.parts {
		if !wanted[id] {
			a.forgetLocked(p)
		}
	}
	if !a.swept {
		a.swept = true
		a.sweepLocked(wg)
	}
}

// forgetLocked ends a part. Another one of the same job begins when it has ended.
func (a *Agent) forgetLocked(p *part) {
	p.forget()
	delete(a.parts, p.id)
	a.last[p.id] = p
}

// jobDir is the folder of the site's part in a job.
func (a *Agent) jobDir(id job.ID) string { return filepath.Join(a.dir, "jobs", string(id)) }

// errGone says that the hub wants nothing more of a part.
var errGone = errors.New("the hub has ended the job")

// mark is in the environment of the part's programs.
func (a *Agent) mark(id job.ID) string { return fmt.Sprintf("%s-%s-%s", a.conf.Mark, id, a.conf.Name) }
