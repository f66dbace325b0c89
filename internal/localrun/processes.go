package localrun

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/pergolafl/pergola/internal/api"
	"github.com/pergolafl/pergola/internal/bundle"
	"github.com/pergolafl/pergola/internal/config"
	"github.com/pergolafl/pergola/internal/hub"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/prepare"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/proc"
	"github.com/pergolafl/pergola/internal/runner"
	"github.com/pergolafl/pergola/internal/site"
)

// certTTL is far longer than a run should take; the keys are gone with it.
const certTTL = 30 * 24 * time.Hour

// service starts hub and sites, has the job run, and ends them, whatever happens.
func (r *run) service(ctx, early context.Context, packed *bundle.Bundle, submitted chan<- struct{}) (err error) {
	// What loses its parent becomes ours, so that nothing can be left.
	if err := proc.Subreaper(); err != nil {
		return err
	}
	lease, err := runner.NewLeash()
	if err != nil {
		return err
	}
	env := append(os.Environ(), runner.LeashVar+"="+lease)
	auth, err := pki.NewAuthority("pergola run " + prepare.JobName(r.app.Name))
	if err != nil {
		return err
	}
	defer func() {
		if e := r.tidy(err); e != nil && err == nil {
			err = e
		}
	}()
	hp, addr, err := r.startHub(early, auth, env)
	if err != nil {
		return err
	}
	defer hp.Stop(5 * time.Second)
	sites, err := r.startSites(auth, addr, env)
	defer func() {
		var wg sync.WaitGroup
		for _, s := range sites {
			wg.Go(func() { s.Stop(5 * time.Second) })
		}
		wg.Wait()
	}()
	if err != nil {
		return err
	}
	client, err := r.connect(auth, addr)
	if err != nil {
		return err
	}
	defer client.Close()
	id, err := r.submit(early, client, packed)
	if err != nil {
		if problem.CodeOf(err) == problem.HubUnreachable {
			if lost := r.ended(hp); lost != nil {
				return lost
			}
		}
		return err
	}
	close(submitted)
	r.mu.Lock()
	r.summary.Job = id
	r.mu.Unlock()
	return r.follow(ctx, client, id, hp, sites)
}

func (r *run) keypair(auth *pki.Authority, dir, name string, id pki.Identity, hosts ...string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	pair, err := auth.NewKeypair(id, hosts, certTTL)
	if err != nil {
		return err
	}
	return pki.SaveKeypair(dir, name, pair)
}

// siteGrace is how long an agent may be away. It is short, since nobody restarts an agent of a local run; but what lies
// between a site and the hub if there is a network between them is an outage.
func (r *run) siteGrace() job.Duration {
	if len(r.opt.Dials) > 0 {
		return 0 // the job's outage-tolerance
	}
	return job.Duration(5 * time.Second)
}

func (r *run) startHub(ctx context.Context, auth *pki.Authority, env []string) (*proc.Process, string, error) {
	dir := filepath.Join(r.state, "hub")
	if err := r.keypair(auth, dir, "hub", pki.Identity{Kind: pki.KindHub, Name: pki.HubName}); err != nil {
		return nil, "", diskProblem(err, r.out)
	}
	if err := auth.Save(dir); err != nil {
		return nil, "", err
	}
	listen := r.opt.Listen
	if listen == "" {
		listen = "127.0.0.1:0"
	}
	mark := fmt.Sprintf("run-%d-%d", os.Getpid(), r.began.UnixNano())
	if err := config.Write(filepath.Join(dir, hub.ConfigFile), hub.Config{
		Listen: listen, Sites: r.names, Python: r.opt.Python, Existing: r.opt.Python != "", Cache: r.cache, Apps: r.opt.Apps, SiteGrace: r.siteGrace(), Mark: mark,
	}); err != nil {
		return nil, "", diskProblem(err, r.out)
	}
	ready := make(chan string, 1)
	p, err := r.start("hub", dir, env, func(line string) {
		if a, ok := strings.CutPrefix(line, hub.ListeningPrefix); ok {
			ready <- a
		}
	})
	if err != nil {
		return nil, "", err
	}
	select {
	case addr := <-ready:
		return p, dialable(addr), nil
	case <-p.Done():
		for _, l := range p.Tail(10) {
			if _, why, ok := strings.Cut(l, hub.CannotListen); ok { // the one thing that is the user's to change
				return nil, "", problem.New(problem.Usage, "choose another address with --listen, for example 127.0.0.1:0", "the hub cannot listen on %s", why)
			}
		}
		return nil, "", r.lost(p)
	case <-ctx.Done():
		p.Stop(0)
		return nil, "", context.Cause(ctx)
	}
}

// ended gives the problem of a hub that has ended, nil if it runs. Its end shows first as broken calls: it has a moment to
// be known as what it is.
func (r *run) ended(p *proc.Process) error {
	select {
	case <-p.Done():
		return r.lost(p)
	case <-time.After(2 * time.Second):
		return nil
	}
}

// lost is the problem of a hub that ended by itself, with what it printed last. Its log lines are for the log.
func (r *run) lost(p *proc.Process) *problem.Error {
	exit := p.Exit()
	said := slices.DeleteFunc(p.Tail(10), func(l string) bool {
		return strings.HasPrefix(l, "{") || strings.HasPrefix(l, hub.ListeningPrefix)
	})
	tail := strings.Join(said, " / ")
	e := problem.New(problem.HubLost, "look into logs/hub.log below "+r.out+", and run it again", "the hub ended by itself (%s)", exit)
	if tail != "" {
		e.Msg += ": " + tail
	}
	e.Party = job.HubParty
	if strings.Contains(tail, "no space") || strings.Contains(tail, "disk is full") {
		e.Code, e.Msg, e.Next = problem.DiskFull, "no space is left in "+r.out, "make room on that disk, or choose another with --out"
	}
	return e
}

func (r *run) startSites(auth *pki.Authority, addr string, env []string) ([]*proc.Process, error) {
	var out []*proc.Process
	devices := 0
	for _, n := range r.names {
		dir := filepath.Join(r.state, n)
		if err := r.keypair(auth, dir, "site", pki.Identity{Kind: pki.KindSite, Name: n}); err != nil {
			return out, diskProblem(err, r.out)
		}
		mark := fmt.Sprintf("run-%d-%d", os.Getpid(), r.began.UnixNano())
		dial := addr
		if other, ok := r.opt.Dials[n]; ok {
			dial = other
		}
		if err := config.Write(filepath.Join(dir, site.ConfigFile), site.Config{
			Resources: resources(r.app.Spec.ResourcesFor(n), &devices),
			Name:      n, Hub: dial, Proxy: r.opt.SiteProxy, Python: r.opt.Python, Existing: r.opt.Python != "", Cache: r.cache, Apps: r.opt.Apps, Mark: mark,
		}); err != nil {
			return out, diskProblem(err, r.out)
		}
		p, err := r.start("site", dir, env, nil)
		if err != nil {
			return out, err
		}
		out = append(out, p)
	}
	return out, nil
}

// resources gives what a site here declares: what the job asks of it, whatever this machine has, so that an app that is meant for
// larger ones can be tried out. Devices are numbered through, so that no two sites have the same.
func resources(ask job.Resources, devices *int) map[string]any {
	out := map[string]any{}
	for k, n := range ask {
		switch k {
		case job.Memory:
			out[k] = job.FormatSize(n)
		case job.GPUs:
			ids := []string{}
			for range n {
				ids = append(ids, strconv.Itoa(*devices))
				*devices++
			}
			out[k] = ids
		default:
			out[k] = n
		}
	}
	return out
}

// start starts this executable as a hub or an agent.
func (r *run) start(role, dir string, env []string, line func(string)) (*proc.Process, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	logs := filepath.Join(r.out, "logs")
	if err := os.MkdirAll(logs, 0o755); err != nil {
		return nil, diskProblem(err, r.out)
	}
	return proc.Start(proc.Spec{
		Name: "pergola " + filepath.Base(dir), Args: []string{self, role, "--dir", dir, "--log-level", r.opt.Level.String()},
		Dir: dir, Env: env, Log: filepath.Join(logs, filepath.Base(dir)+".log"),
		OnLine: func(l string) {
			if line != nil {
				line(l)
			}
			if r.opt.Level <= slog.LevelDebug {
				r.line(filepath.Base(dir), "pergola", l)
			}
		},
		OnLogError: func(err error) {
			r.mu.Lock()
			defer r.mu.Unlock()
			if r.logErr == nil {
				r.logErr = err
			}
		},
	})
}

func (r *run) connect(auth *pki.Authority, addr string) (*api.Client, error) {
	pair, err := auth.NewKeypair(pki.Identity{Kind: pki.KindUser, Name: userName()}, nil, certTTL)
	if err != nil {
		return nil, err
	}
	cert, err := pair.Certificate()
	if err != nil {
		return nil, err
	}
	return api.NewClient(addr, pki.ClientTLS(cert, auth.Roots(), pki.HubName)), nil
}

// userName is the submitter's name: that of the account, as far as it is one.
func userName() string {
	if n := prepare.JobName(os.Getenv("USER")); os.Getenv("USER") != "" {
		return n
	}
	return "user"
}

// dialable makes an address that can be dialled of one that is listened on.
func dialable(addr string) string {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return addr
	}
	if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() {
		return net.JoinHostPort("127.0.0.1", port)
	}
	return addr
}
