package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pergolafl/pergola/internal/api"
	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/bundle"
	"github.com/pergolafl/pergola/internal/config"
	"github.com/pergolafl/pergola/internal/flower"
	"github.com/pergolafl/pergola/internal/hub"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/pki/pkitest"
	"github.com/pergolafl/pergola/internal/prepare"
	"github.com/pergolafl/pergola/internal/proc"
	"github.com/pergolafl/pergola/internal/pyenv"
	"github.com/pergolafl/pergola/internal/site"
	"github.com/pergolafl/pergola/internal/uplink"
)

// A daemon is a hub or an agent that runs by itself, with a directory of its own.
type daemon struct {
	t    *testing.T
	role string // "hub" or "site"
	dir  string
	tmp  string
	exe  string   // "" = the built command
	wrap []string // a command that execs its arguments
	env  []string // in addition to the test's own
	cmd  *exec.Cmd
	mu   sync.Mutex // guards out
	out  bytes.Buffer
}

func (s *daemon) start() {
	s.t.Helper()
	exe := s.exe
	if exe == "" {
		exe = binary
	}
	args := append(slices.Clone(s.wrap), exe, s.role, "--dir", s.dir)
	s.cmd = exec.CommandContext(context.Background(), args[0], args[1:]...)
	s.cmd.Env = append(append(os.Environ(), "TMPDIR="+s.tmp), s.env...)
	w := lockedWriter{&s.mu, &s.out}
	s.cmd.Stdout, s.cmd.Stderr = w, w
	s.cmd.WaitDelay = 5 * time.Second // its runners outlive it
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
}

// sees gives the path by which the test sees a path of the daemon's, which may have file systems of its own.
func (s *daemon) sees(path string) string {
	if len(s.wrap) == 0 || s.cmd == nil {
		return path
	}
	return filepath.Join("/proc", strconv.Itoa(s.cmd.Process.Pid), "root", path)
}

func (s *daemon) kill() {
	if s.cmd != nil {
		_ = s.cmd.Process.Kill()
		_ = s.cmd.Wait() // it was killed
		s.cmd = nil
	}
}

// fleetOf is a hub with sites, as they would run on machines of their own.
type fleetOf struct {
	hub    *daemon
	sites  []*daemon
	client *api.Client
	addrs  []string // of the hub: where it is, and where it may be later
	mark   string
	auth   *pki.Authority

	mu   sync.Mutex // guards jobs
	jobs []job.ID
}

func daemons(t *testing.T, names ...string) *fleetOf {
	t.Helper()
	auth := pkitest.Authority(t, "test")
	root := t.TempDir()
	addrs := []string{freeAddress(t), freeAddress(t)}
	f := &fleetOf{mark: "restart", auth: auth}
	keys := func(dir, name string, id pki.Identity) {
		t.Helper()
		pair, err := auth.NewKeypair(id, nil, time.Hour)
		if err == nil {
			err = os.MkdirAll(dir, 0o700)
		}
		if err == nil {
			err = pki.SaveKeypair(dir, name, pair)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	write := func(path string, conf any) {
		t.Helper()
		if err := config.Write(path, conf); err != nil {
			t.Fatal(err)
		}
	}
	f.hub = &daemon{t: t, role: "hub", dir: filepath.Join(root, "hub"), tmp: root}
	keys(f.hub.dir, "hub", pki.Identity{Kind: pki.KindHub, Name: pki.HubName})
	if err := auth.Save(f.hub.dir); err != nil {
		t.Fatal(err)
	}
	write(filepath.Join(f.hub.dir, hub.ConfigFile), hub.Config{Listen: addrs[0], Sites: names, Mark: f.mark})
	for _, n := range names {
		s := &daemon{t: t, role: "site", dir: filepath.Join(root, n), tmp: root}
		keys(s.dir, "site", pki.Identity{Kind: pki.KindSite, Name: n})
		write(filepath.Join(s.dir, site.ConfigFile), site.Config{Name: n, Hub: addrs, Mark: f.mark})
		f.sites = append(f.sites, s)
	}
	f.addrs = addrs
	f.client = f.clientAs(t, pki.Identity{Kind: pki.KindUser, Name: "anna"})
	t.Cleanup(func() {
		for _, s := range append(f.sites, f.hub) {
			s.kill()
			if t.Failed() {
				t.Logf("%s:\n%s", s.dir, s.out.String())
			}
		}
		for _, id := range f.jobs {
			for _, party := range append(slices.Clone(names), job.HubParty) {
				if n, err := proc.KillMarked(fmt.Sprintf("%s-%s-%s", f.mark, id, party)); err != nil || n > 0 {
					t.Errorf("%d programs of %s were left; %v", n, party, err)
				}
			}
		}
	})
	return f
}

// clientAs gives a client of the hub's that is whoever it says.
func (f *fleetOf) clientAs(t *testing.T, id pki.Identity) *api.Client {
	t.Helper()
	pair, err := f.auth.NewKeypair(id, nil, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := pair.Certificate()
	if err != nil {
		t.Fatal(err)
	}
	c, err := api.Dial(uplink.Config{Hubs: f.addrs, TLS: pki.ClientTLS(cert, f.auth.Roots(), pki.HubName)})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// submit packs an app as `pergola run` does, and submits it.
func (f *fleetOf) submit(t *testing.T, app string, spec job.Spec) job.ID {
	t.Helper()
	ctx := t.Context()
	a, err := flower.LoadApp(filepath.Join(apps, app))
	if err != nil {
		t.Fatal(err)
	}
	in, err := pyenv.Find(ctx, "")
	if err != nil {
		t.Fatal(err)
	}
	lock, err := pyenv.MakeLock(ctx, pyenv.DefaultCache(), in, pyenv.Requirements{Names: a.Dependencies, Flwr: spec.Flwr, RequiresPython: a.RequiresPython}, pyenv.Options{})
	if err != nil {
		t.Fatal(err)
	}
	spec.FlwrVersion, spec.PythonVersion, spec.App = lock.Flwr, lock.Python, job.App{Name: a.Name, Version: a.Version}
	spec = spec.WithDefaults()
	text, err := json.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	packed, err := bundle.Build(filepath.Join(apps, app), bundle.Input{App: bundle.Meta{Name: a.Name, Version: a.Version}, Lock: []byte(lock.Text), Job: text})
	if err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Minute); ; { // until the hub listens
		if err = prepare.Upload(ctx, f.client, packed, nil); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(100 * time.Millisecond)
	}
	res, err := f.client.Jobs.SubmitJob(ctx, &pb.SubmitJobRequest{Name: app, BundleDigest: packed.Digest, SpecJson: string(text)})
	if err != nil {
		t.Fatal(err)
	}
	id := job.ID(res.GetJob().GetId())
	f.mu.Lock()
	defer f.mu.Unlock()
	f.jobs = append(f.jobs, id)
	return id
}

// watch gives the job's events from the one after the given until fn is content, whatever becomes of the hub meanwhile.
func (f *fleetOf) watch(t *testing.T, id job.ID, after int64, fn func(job.Event) bool) int64 {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	for ctx.Err() == nil {
		s, err := f.client.Jobs.WatchJob(ctx, &pb.WatchJobRequest{Id: string(id), After: after})
		for err == nil {
			var m *pb.WatchJobResponse
			if m, err = s.Receive(); err != nil {
				break
			}
			var e job.Event
			if e, err = api.FromEvent(m.GetEvent()); err != nil {
				t.Fatal(err)
			}
			after = e.Seq
			if fn(e) {
				_ = s.Close() // enough
				return after
			}
		}
		time.Sleep(100 * time.Millisecond) // the hub is away
	}
	t.Fatal("what was waited for did not come")
	return 0
}

// The hub and a site's agent are killed in the middle of a round and started again half a minute later: the runners and the link
// between them go on, and the job ends with the numbers of an undisturbed one.
func TestHubAndAgentAreKilled(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name  string
		which func(*fleetOf) []*daemon
	}{
		{"hub", func(f *fleetOf) []*daemon { return []*daemon{f.hub} }},
		{"agent", func(f *fleetOf) []*daemon { return f.sites[:1] }},
		{"both", func(f *fleetOf) []*daemon { return []*daemon{f.hub, f.sites[0]} }},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			idle <- struct{}{}
			defer func() { <-idle }()
			f := daemons(t, "site-1", "site-2")
			f.hub.start()
			for _, s := range f.sites {
				s.start()
			}
			rounds := 4
			id := f.submit(t, "tiny", job.Spec{Sites: []string{"site-1", "site-2"}, Flwr: "1.30.0", RunConfig: []string{fmt.Sprintf("num-server-rounds=%d", rounds)}})
			var got []job.Event
			last := job.State("")
			take := func(e job.Event) {
				got = append(got, e)
				var s job.JobState
				if e.Kind == job.KindJobState && e.Decode(&s) == nil {
					last = s.To
				}
			}
			after := f.watch(t, id, 0, func(e job.Event) bool {
				take(e)
				var r job.Round
				return e.Kind == job.KindRound && e.Decode(&r) == nil && r.Round == 2 || last.Terminal()
			})
			for _, s := range c.which(f) {
				s.kill()
			}
			time.Sleep(30 * time.Second) // the outage
			for _, s := range c.which(f) {
				s.start()
			}
			f.watch(t, id, after, func(e job.Event) bool {
				take(e)
				return last.Terminal()
			})
			if last != job.Succeeded {
				t.Errorf("the job %s", last)
			}
			checkNumbers(t, got, rounds)
			if !strings.Contains(f.hub.text(), hub.ListeningPrefix) {
				t.Error("the hub never said where it listens")
			}
		})
	}
}

// checkNumbers checks that a job has the numbers that the app tiny has in so many undisturbed rounds, and no failure.
func checkNumbers(t *testing.T, events []job.Event, rounds int) {
	t.Helper()
	values := map[string]float64{}
	for _, e := range events {
		switch e.Kind {
		case job.KindMetrics:
			var m job.Metrics
			if err := e.Decode(&m); err != nil {
				t.Fatal(err)
			}
			for k, v := range m.Values {
				values[fmt.Sprintf("%d %s %s", m.Round, m.Phase, k)] = v
			}
		case job.KindClientFailure:
			t.Errorf("a client failed: %+v", e)
		}
	}
	want := map[string]float64{}
	for _, r := range tinyRoundsOf(rounds) {
		for phase, vs := range r.Phases {
			for k, v := range vs {
				want[fmt.Sprintf("%d %s %s", r.Round, phase, k)] = v
			}
		}
	}
	for k, w := range want {
		if v, ok := values[k]; !ok || v-w > 1e-6 || w-v > 1e-6 {
			t.Errorf("%s is %v, want %v", k, v, w)
		}
	}
	if len(values) != len(want) {
		t.Errorf("got %v, want %v", values, want)
	}
}

// One hub and the same two sites run two jobs with different versions of Flower at the same time.
func TestTwoVersionsAtOneSite(t *testing.T) {
	t.Parallel()
	slots <- struct{}{}
	defer func() { <-slots }()
	f := daemons(t, "site-1", "site-2")
	f.hub.start()
	for _, s := range f.sites {
		s.start()
	}
	var began, ended int // how often a job began to run, and how often one had ended before both ran
	var wg sync.WaitGroup
	var mu sync.Mutex // guards began and ended
	for _, v := range []string{oldest, newest} {
		id := f.submit(t, "tiny", job.Spec{Sites: []string{"site-1", "site-2"}, Flwr: v})
		wg.Go(func() {
			rounds := 0
			f.watch(t, id, 0, func(e job.Event) bool {
				mu.Lock()
				defer mu.Unlock()
				var s job.JobState
				switch {
				case e.Kind == job.KindRound:
					rounds++
				case e.Kind != job.KindJobState || e.Decode(&s) != nil:
				case s.To == job.Preparing:
					began++
				case s.To.Terminal():
					if s.To != job.Succeeded || rounds != 2 {
						t.Errorf("with %s the job %s after %d rounds: %s", v, s.To, rounds, e.Body)
					}
					if began < 2 {
						ended++
					}
					return true
				}
				return false
			})
		})
	}
	wg.Wait()
	if began != 2 || ended > 0 {
		t.Errorf("%d jobs began, %d of them ended before the other began: they did not run at the same time", began, ended)
	}
}

func (s *daemon) text() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.out.String()
}
