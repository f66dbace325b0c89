package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"text/tabwriter"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pergolafl/pergola/internal/api"
	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/bundle"
	"github.com/pergolafl/pergola/internal/enrol"
	"github.com/pergolafl/pergola/internal/flower"
	"github.com/pergolafl/pergola/internal/hub"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/prepare"
	"github.com/pergolafl/pergola/internal/store"
	"github.com/pergolafl/pergola/internal/store/sqlite"
	"github.com/pergolafl/pergola/internal/uplink"
)

// The goals of a hub on SQLite, with 1,000 sites, on a machine of two cores that does nothing else.
const (
	goalSites     = 1000
	goalPage      = 100 * time.Millisecond // of 100 jobs, among 10,000 queued, 99 of 100 pages
	goalRate      = 200                    // submissions in a second
	goalHubMemory = 150 << 10              // bytes for each site that is connected and idle
	goalHubIdle   = 5.0                    // percent of a core, with 1,000 idle sites
	goalAllBack   = 10 * time.Second       // until all sites are back after the hub was killed and started again
)

// hubOptions are the flags of `bench hub`.
type hubOptions struct {
	pergola, app string
	sizes        []int
	jobs, users  int
	idle         time.Duration
	check        bool
}

// runHub measures a hub process with so many sites: simulated in this process, each with its own certificate, TLS connection and
// stream, over the protocol of real agents. They run nothing.
func runHub(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	var o hubOptions
	var sizes string
	f := flag.NewFlagSet("bench hub", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.StringVar(&o.pergola, "pergola", "bin/pergola", "the `binary` to measure")
	f.StringVar(&o.app, "app", "test/apps/tiny", "the app's `folder` of which jobs are made; none gets to run")
	f.StringVar(&sizes, "sites", "10,100,1000", "`numbers` of sites, separated by commas, each with a hub of its own")
	f.IntVar(&o.jobs, "jobs", 10000, "jobs that are queued at the hub with the most sites")
	f.IntVar(&o.users, "users", 8, "users who submit them at the same time")
	f.DurationVar(&o.idle, "idle", 30*time.Second, "how long the idle hub is looked at")
	f.BoolVar(&o.check, "check", false, "end with status 1 when a goal is missed")
	if err := f.Parse(args); err != nil {
		return err
	}
	for s := range strings.SplitSeq(sizes, ",") {
		n, err := strconv.Atoi(s)
		if err != nil || n < 3 {
			return fmt.Errorf("--sites %q: numbers from 3 on, please", sizes)
		}
		o.sizes = append(o.sizes, n)
	}
	if f.NArg() > 0 || o.jobs < 100 || o.users < 1 {
		return errors.New("no further arguments, please, at least 100 jobs and a user")
	}
	slices.Sort(o.sizes)
	most := o.sizes[len(o.sizes)-1]
	var lim syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &lim); err != nil {
		return err
	}
	if need := uint64(most + 200); lim.Max < need { // Go takes what it may have
		return fmt.Errorf("%d sites take %d open files, and this machine allows %d: raise it with ulimit -Hn", most, need, lim.Max)
	}
	work, err := os.MkdirTemp("", "pergola-bench.")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work) //nolint:errcheck // scratch space
	var all []hubFigures
	for _, n := range o.sizes {
		fmt.Fprintf(stderr, "a hub with %d sites\n", n)
		fig, err := measureHub(ctx, o, filepath.Join(work, strconv.Itoa(n)), n, n == most, stderr)
		if err != nil {
			return fmt.Errorf("with %d sites: %w", n, err)
		}
		all = append(all, fig)
	}
	if !reportHub(stdout, o, all) && o.check {
		return errors.New("a goal was missed")
	}
	return nil
}

// hubFigures are what was measured of one hub.
type hubFigures struct {
	sites   int
	connect time.Duration // until all sites have heard what they should run
	bare    int64         // the hub's own bytes before anybody was connected
	memory  int64         // with all sites idle
	idle    float64       // percent of a core, with all sites idle
	start   time.Duration // median, from a submission until its three sites have heard of the job
	cost    time.Duration // CPU of the hub for a job's whole life
	heard   float64       // messages to other sites for each such job
	back    time.Duration // until all sites were back after the hub was killed and started again

	jobs      int           // the rest only with the most sites
	rate      float64       // submissions in a second
	each      time.Duration // CPU of the hub for one of them
	page      []time.Duration
	filtered  []time.Duration // pages by state
	busy      float64         // percent of a core, idle with the queue
	busyBytes int64
}

// simulated is a site's agent that runs nothing.
type simulated struct {
	name   string
	client *api.Client
	house  *hubHouse

	heard atomic.Int64 // messages
	first chan struct{}
	news  func() // is called when it hears of a job for the first time; nil: not
}

// hubHouse is one hub and who is connected.
type hubHouse struct {
	dir    string
	binary string
	cmd    *exec.Cmd
	addr   string
	sites  []*simulated
	users  []*api.Client
	digest string

	connected atomic.Int64
}

func measureHub(ctx context.Context, o hubOptions, dir string, n int, queue bool, stderr io.Writer) (fig hubFigures, err error) {
	fig.sites = n
	h := &hubHouse{dir: dir, binary: o.pergola}
	tokens, err := h.init(ctx, n, o.users)
	if err != nil {
		return fig, err
	}
	if err := h.start(ctx); err != nil {
		return fig, err
	}
	defer func() { h.stop() }()
	ctx, cancel := context.WithCancel(ctx)
	g, ctx := errgroup.WithContext(ctx)
	defer func() {
		cancel()
		if e := g.Wait(); err == nil && !errors.Is(e, context.Canceled) {
			err = e
		}
	}()
	if err := h.enrol(ctx, tokens); err != nil {
		return fig, err
	}
	if err := h.upload(ctx, o.app); err != nil {
		return fig, err
	}
	h.quiet(ctx)
	if fig.bare, err = h.memory(); err != nil {
		return fig, err
	}
	began := time.Now()
	for _, s := range h.sites {
		g.Go(func() error { return s.run(ctx) })
	}
	for _, s := range h.sites {
		select {
		case <-s.first:
		case <-ctx.Done():
			return fig, ctx.Err()
		}
	}
	fig.connect = time.Since(began)
	fmt.Fprintf(stderr, "  all connected after %.2f s\n", fig.connect.Seconds())
	h.quiet(ctx)
	if fig.idle, fig.memory, err = h.idle(ctx, o.idle); err != nil {
		return fig, err
	}
	fmt.Fprintf(stderr, "  idle: %.1f MiB, %.2f %% CPU\n", float64(fig.memory)/(1<<20), fig.idle)
	if err := h.starts(ctx, &fig); err != nil {
		return fig, err
	}
	if queue {
		if err := h.queue(ctx, o, &fig, stderr); err != nil {
			return fig, err
		}
	}
	h.kill()
	for began := time.Now(); h.connected.Load() > 0; time.Sleep(time.Millisecond) { // it is looked at
		if time.Since(began) > time.Minute {
			return fig, errors.New("sites stay connected to a hub that is dead")
		}
	}
	if err := h.start(ctx); err != nil {
		return fig, err
	}
	began = time.Now()
	for h.connected.Load() < int64(n) && time.Since(began) < time.Minute {
		time.Sleep(5 * time.Millisecond)
	}
	fig.back = time.Since(began)
	return fig, nil
}

// away are the sites that are enrolled and never come: jobs for them stay in the queue.
var away = []string{"away-1", "away-2", "away-3"}

// init makes the hub's directory, with a token for everybody.
func (h *hubHouse) init(ctx context.Context, sites, users int) ([]enrol.Token, error) {
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	h.addr = ln.Addr().String()
	if err := ln.Close(); err != nil {
		return nil, err
	}
	auth, err := hub.Init(h.dir, []string{h.addr}, h.addr)
	if err != nil {
		return nil, err
	}
	db, err := sqlite.Open(ctx, filepath.Join(h.dir, hub.DatabaseFile))
	if err != nil {
		return nil, err
	}
	defer db.Close()
	now := time.Now()
	var out []enrol.Token
	add := func(kind pki.Kind, name string) error {
		t := enrol.Token{Kind: kind, Name: name, Hubs: []string{h.addr}, CA: auth.Fingerprint(), Secret: enrol.NewSecret(), Expires: now.Add(time.Hour).Truncate(time.Second)}
		out = append(out, t)
		return db.PutToken(ctx, store.Token{Hash: enrol.Hash(t.Secret), Kind: string(kind), Name: name, Created: now, Expires: t.Expires, By: "bench"})
	}
	for i := range users {
		err = errors.Join(err, add(pki.KindUser, fmt.Sprintf("user-%d", i)))
	}
	for i := range sites {
		err = errors.Join(err, add(pki.KindSite, fmt.Sprintf("site-%04d", i)))
	}
	for _, n := range away {
		err = errors.Join(err, add(pki.KindSite, n))
	}
	return out, err
}

// enrol uses the tokens up, as `pergola site join` and `pergola login` do.
func (h *hubHouse) enrol(ctx context.Context, tokens []enrol.Token) error {
	clients := make([]*api.Client, len(tokens))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(16)
	for i, t := range tokens {
		g.Go(func() error {
			k, err := enrol.Join(gctx, t, uplink.Direct)
			if err != nil {
				return err
			}
			cert, err := k.Certificate()
			if err != nil {
				return err
			}
			roots, err := k.Roots()
			if err != nil {
				return err
			}
			clients[i], err = api.Dial(uplink.Config{Hubs: []string{h.addr}, Proxy: uplink.Direct, TLS: pki.ClientTLS(cert, roots, pki.HubName)})
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for i, t := range tokens {
		switch {
		case t.Kind == pki.KindUser:
			h.users = append(h.users, clients[i])
		case !slices.Contains(away, t.Name):
			h.sites = append(h.sites, &simulated{name: t.Name, client: clients[i], house: h, first: make(chan struct{})})
		}
	}
	return nil
}

// upload brings the app's bundle. Its lock is none, so that no environment is ever built of it.
func (h *hubHouse) upload(ctx context.Context, app string) error {
	a, err := flower.LoadApp(app)
	if err != nil {
		return err
	}
	b, err := bundle.Build(app, bundle.Input{App: bundle.Meta{Name: a.Name, Version: a.Version}, Lock: []byte("this is no lock\n"), Job: []byte("{}")})
	if err != nil {
		return err
	}
	h.digest = b.Digest
	return prepare.Upload(ctx, h.users[0], b, nil)
}

func (h *hubHouse) start(ctx context.Context) error {
	log, err := os.OpenFile(filepath.Join(h.dir, "bench.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	h.cmd = exec.CommandContext(ctx, h.binary, "hub", "--dir", h.dir)
	h.cmd.Stderr = log
	h.cmd.WaitDelay = 5 * time.Second
	out, err := h.cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := h.cmd.Start(); err != nil {
		return err
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || !strings.HasPrefix(line, hub.ListeningPrefix) {
		h.kill()
		b, _ := os.ReadFile(log.Name()) // what it says is all there is to tell
		return fmt.Errorf("the hub does not listen: %w\n%s", err, b)
	}
	return nil
}

func (h *hubHouse) kill() {
	_ = h.cmd.Process.Kill() // it may have ended
	_ = h.cmd.Wait()
}

func (h *hubHouse) stop() {
	h.kill()
	for _, s := range h.sites {
		s.client.Close()
	}
	for _, u := range h.users {
		u.Close()
	}
}

func (h *hubHouse) memory() (int64, error) { return (&hubChild{cmd: h.cmd}).memory() }

// cpu is what the hub has used so far.
func (h *hubHouse) cpu() (time.Duration, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", h.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	f := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	var ticks int64
	for _, i := range []int{11, 12} { // utime and stime, see proc(5)
		n, err := strconv.ParseInt(string(f[i]), 10, 64)
		if err != nil {
			return 0, err
		}
		ticks += n
	}
	return time.Duration(ticks) * time.Second / 100, nil // USER_HZ is 100 everywhere
}

// quiet waits until the hub has done what it had to do: until it used less than a tenth of a core for two seconds.
func (h *hubHouse) quiet(ctx context.Context) {
	for range 30 {
		before, err := h.cpu()
		if err != nil {
			return // the next to ask says so
		}
		select {
		case <-time.After(2 * time.Second):
		case <-ctx.Done():
			return
		}
		if after, err := h.cpu(); err != nil || after-before < 200*time.Millisecond {
			return
		}
	}
}

// idle gives percents of a core and the bytes of the hub while nothing happens.
func (h *hubHouse) idle(ctx context.Context, d time.Duration) (percent float64, memory int64, err error) {
	before, err := h.cpu()
	if err != nil {
		return 0, 0, err
	}
	began := time.Now()
	select {
	case <-time.After(d):
	case <-ctx.Done():
		return 0, 0, ctx.Err()
	}
	after, err := h.cpu()
	if err != nil {
		return 0, 0, err
	}
	memory, err = h.memory()
	return 100 * (after - before).Seconds() / time.Since(began).Seconds(), memory, err
}

// run is what an agent does: it keeps a stream of wishes open, whatever becomes of the hub, and says of parties that are to end that
// they have.
func (s *simulated) run(ctx context.Context) error {
	first := sync.OnceFunc(func() { close(s.first) })
	wait := 50 * time.Millisecond
	for ctx.Err() == nil {
		began := time.Now()
		s.follow(ctx, first)
		if time.Since(began) > 5*time.Second {
			wait = 50 * time.Millisecond
		}
		select {
		case <-time.After(wait/2 + time.Duration(float64(wait)*rand.Float64())): //nolint:gosec // no secret
		case <-ctx.Done():
		}
		wait = min(wait*3/2, 5*time.Second)
	}
	return nil
}

// follow ends with the stream.
func (s *simulated) follow(ctx context.Context, first func()) {
	st, err := s.client.Sites.WatchDesired(ctx, &pb.WatchDesiredRequest{Protocol: api.Protocol})
	if err != nil {
		return
	}
	defer st.Close()
	known := map[string]pb.Desired{}
	there := false
	for {
		m, err := st.Receive()
		if err != nil {
			if there {
				s.house.connected.Add(-1)
			}
			return
		}
		if !there {
			there = true
			s.house.connected.Add(1)
			first()
		}
		s.heard.Add(1)
		for _, p := range m.GetParties() {
			before, heard := known[p.GetJobId()]
			if heard && before == p.GetDesired() {
				continue
			}
			if !heard && s.news != nil {
				s.news()
			}
			known[p.GetJobId()] = p.GetDesired()
			if p.GetDesired() == pb.Desired_DESIRED_UP {
				continue
			}
			if err := s.done(ctx, p); err != nil {
				delete(known, p.GetJobId()) // the next message brings it again
			}
		}
	}
}

// done reports the end of a party.
func (s *simulated) done(ctx context.Context, p *pb.DesiredParty) error {
	e, err := job.NewEvent(job.ID(p.GetJobId()), s.name, job.KindPartyState, job.PartyStateChange{To: job.PartyDone}, time.Now())
	if err != nil {
		return err
	}
	ev, err := api.Event(e)
	if err != nil {
		return err
	}
	_, err = s.client.Sites.Report(ctx, &pb.ReportRequest{JobId: p.GetJobId(), Attempt: p.GetAttempt(), Entries: []*pb.JournalEntry{{Seq: 1, Event: ev}}})
	return err
}

// submit makes a job for sites.
func (h *hubHouse) submit(ctx context.Context, u *api.Client, sites []string) (string, error) {
	spec, err := json.Marshal(job.Spec{Sites: sites, Flwr: "1.30.0", StartTimeout: job.Duration(24 * time.Hour)})
	if err != nil {
		return "", err
	}
	res, err := u.Jobs.SubmitJob(ctx, &pb.SubmitJobRequest{Name: "bench", BundleDigest: h.digest, SpecJson: string(spec)})
	return res.GetJob().GetId(), err
}

// startsMeasured is how many jobs are started, one after the other.
const startsMeasured = 10

// starts has jobs of three sites begin and end. The hub's side of them fails for want of a lock.
func (h *hubHouse) starts(ctx context.Context, fig *hubFigures) error {
	heard := make(chan time.Time, 3*startsMeasured)
	var want []string
	for _, s := range h.sites[:3] {
		want = append(want, s.name)
		s.news = func() { heard <- time.Now() }
	}
	others := func() (n int64) {
		for _, s := range h.sites[3:] {
			n += s.heard.Load()
		}
		return n
	}
	beforeHeard := others()
	before, err := h.cpu()
	if err != nil {
		return err
	}
	var took []time.Duration
	for range startsMeasured {
		began := time.Now()
		id, err := h.submit(ctx, h.users[0], want)
		if err != nil {
			return err
		}
		var last time.Time
		for range want {
			select {
			case last = <-heard:
			case <-time.After(time.Minute):
				j, err := h.users[0].Jobs.GetJob(ctx, &pb.GetJobRequest{Id: id})
				return fmt.Errorf("a job's sites never heard of it: it is %s, %s (%w)", j.GetJob().GetState(), j.GetJob().GetReason(), err)
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		took = append(took, last.Sub(began))
		if _, err := h.users[0].Jobs.AbortJob(ctx, &pb.AbortJobRequest{Id: id}); err != nil && ctx.Err() != nil {
			return err // it may be over already
		}
		w, err := h.users[0].Jobs.WatchJob(ctx, &pb.WatchJobRequest{Id: id})
		for err == nil {
			_, err = w.Receive()
		}
		if !errors.Is(err, io.EOF) {
			return err
		}
	}
	after, err := h.cpu()
	if err != nil {
		return err
	}
	slices.Sort(took)
	fig.start, fig.cost = took[len(took)/2], (after-before)/startsMeasured
	fig.heard = float64(others()-beforeHeard) / startsMeasured
	return nil
}

// queue submits jobs that stay in the queue, and lists them.
func (h *hubHouse) queue(ctx context.Context, o hubOptions, fig *hubFigures, stderr io.Writer) error {
	fig.jobs = o.jobs
	before, err := h.cpu()
	if err != nil {
		return err
	}
	began := time.Now()
	g, gctx := errgroup.WithContext(ctx)
	var next atomic.Int64
	for _, u := range h.users {
		g.Go(func() error {
			for next.Add(1) <= int64(o.jobs) {
				if _, err := h.submit(gctx, u, away); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	fig.rate = float64(o.jobs) / time.Since(began).Seconds()
	after, err := h.cpu()
	if err != nil {
		return err
	}
	fig.each = (after - before) / time.Duration(o.jobs)
	fmt.Fprintf(stderr, "  %d jobs submitted, %.0f a second\n", o.jobs, fig.rate)
	list := func(req *pb.ListJobsRequest) (all []time.Duration, err error) {
		n := 0
		for {
			began := time.Now()
			res, err := h.users[0].Jobs.ListJobs(ctx, req)
			if err != nil {
				return nil, err
			}
			all = append(all, time.Since(began))
			n += len(res.GetJobs())
			if len(res.GetJobs()) < int(req.GetLimit()) {
				break
			}
			req.After = res.GetJobs()[len(res.GetJobs())-1].GetId()
		}
		if n < o.jobs {
			return nil, fmt.Errorf("%d jobs are listed, want %d", n, o.jobs)
		}
		slices.Sort(all)
		return all, nil
	}
	h.quiet(ctx)
	if fig.page, err = list(&pb.ListJobsRequest{Limit: 100}); err != nil {
		return err
	}
	if fig.filtered, err = list(&pb.ListJobsRequest{Limit: 100, States: []string{string(job.Submitted), string(job.Queued), string(job.Preparing), string(job.Running)}}); err != nil {
		return err
	}
	h.quiet(ctx)
	fig.busy, fig.busyBytes, err = h.idle(ctx, o.idle)
	return err
}

// reportHub prints the figures beside the goals, and tells whether all were met.
func reportHub(w io.Writer, o hubOptions, all []hubFigures) bool {
	mib := func(n int64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	row := func(what string, of func(hubFigures) string) {
		fmt.Fprint(tw, what)
		for _, f := range all {
			fmt.Fprint(tw, "\t"+of(f))
		}
		fmt.Fprintln(tw)
	}
	row("sites", func(f hubFigures) string { return strconv.Itoa(f.sites) })
	row("until all are connected", func(f hubFigures) string { return fmt.Sprintf("%.2f s", f.connect.Seconds()) })
	row("hub's memory without sites", func(f hubFigures) string { return mib(f.bare) })
	row("with all of them idle", func(f hubFigures) string { return mib(f.memory) })
	row("for each site", func(f hubFigures) string { return fmt.Sprintf("%.1f KiB", f.perSite()/(1<<10)) })
	row("CPU of the idle hub", func(f hubFigures) string { return fmt.Sprintf("%.2f %%", f.idle) })
	row("a job's three sites hear of it after", func(f hubFigures) string { return fmt.Sprintf("%.1f ms", f.start.Seconds()*1e3) })
	row("the hub's CPU for a job", func(f hubFigures) string { return fmt.Sprintf("%.0f ms", f.cost.Seconds()*1e3) })
	row("messages to other sites for a job", func(f hubFigures) string { return fmt.Sprintf("%.1f", f.heard) })
	row("all back after the hub's restart", func(f hubFigures) string { return fmt.Sprintf("%.2f s", f.back.Seconds()) })
	_ = tw.Flush() // to a terminal or a file; nobody could be told
	last := all[len(all)-1]
	at := func(ds []time.Duration, q float64) time.Duration { return ds[int(math.Ceil(q*float64(len(ds))))-1] }
	fmt.Fprintf(w, "\nthe queue, with %d sites connected: %d jobs, %.0f submissions a second by %d users at once, %.1f ms of the hub's CPU each\n", last.sites, last.jobs, last.rate, o.users, last.each.Seconds()*1e3)
	for _, l := range []struct {
		what string
		ds   []time.Duration
	}{{"a page of 100 jobs", last.page}, {"a page of 100 jobs by four states", last.filtered}} {
		fmt.Fprintf(w, "%s: median %.1f ms, 99 of 100 %.1f ms\n", l.what, at(l.ds, 0.5).Seconds()*1e3, at(l.ds, 0.99).Seconds()*1e3)
	}
	fmt.Fprintf(w, "the idle hub with this queue: %s, %.2f %% CPU\n\n", mib(last.busyBytes), last.busy)
	ok := true
	goal := func(met bool, format string, args ...any) {
		verdict(w, met, format, args...)
		ok = ok && met
	}
	goal(last.sites >= goalSites, "%d sites connected: %d", goalSites, last.sites)
	goal(at(last.page, 0.99) <= goalPage && at(last.filtered, 0.99) <= goalPage, "a page within %v: %.1f ms, by states %.1f ms", goalPage, at(last.page, 0.99).Seconds()*1e3, at(last.filtered, 0.99).Seconds()*1e3)
	goal(last.rate >= goalRate, "%d submissions a second: %.0f", goalRate, last.rate)
	goal(last.perSite() <= goalHubMemory, "at most %d KiB for a site: %.1f KiB", goalHubMemory>>10, last.perSite()/(1<<10))
	goal(last.idle <= goalHubIdle, "at most %.0f %% of a core idle: %.2f %%", goalHubIdle, last.idle)
	goal(last.heard == 0, "a job's start wakes its own sites alone: %.1f messages to others", last.heard)
	goal(last.back <= goalAllBack, "all sites are back within %v: %.2f s", goalAllBack, last.back.Seconds())
	return ok
}

func (f hubFigures) perSite() float64 { return float64(f.memory-f.bare) / float64(f.sites) }
