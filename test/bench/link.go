package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/pergolafl/pergola/internal/link"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/relay"
	"github.com/pergolafl/pergola/internal/sock"
	"github.com/pergolafl/pergola/internal/uplink"
	"github.com/pergolafl/pergola/test/chaos"
)

// The goals of the link, on a machine that is otherwise idle.
const (
	goalBulk      = 0.80                  // of what crypto/tls alone carries, by one stream of a session
	goalLatency   = 10 * time.Millisecond // of a small request during a bulk transfer, 99 of 100
	goalIdle      = 64 << 10              // bytes that the hub takes for a site's idle link
	goalHerd      = 10 * time.Second      // until all sites are back after the hub's restart
	goalBack      = 2 * time.Second       // from the network's return until bytes flow
	benchJob      = "01JABCDEFGHJKMNPQRSTVWXYZ0"
	hubChildName  = "link-hub"
	listeningLine = "listening on "
)

// linkOptions are the flags of `bench link`.
type linkOptions struct {
	bytes int64
	sites int
	down  time.Duration
	runs  int
	check bool
}

// runLink measures the link beside what limits it. Everything is on loopback; both ends and the hub share the machine's cores, so
// ratios and not numbers are what it tells.
func runLink(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	var o linkOptions
	var mib int64
	f := flag.NewFlagSet("bench link", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.Int64Var(&mib, "mib", 512, "`MiB` of each bulk transfer")
	f.IntVar(&o.sites, "sites", 1000, "sites that are connected at once")
	f.DurationVar(&o.down, "down", 20*time.Second, "how long the network goes away")
	f.IntVar(&o.runs, "runs", 3, "runs of each bulk transfer, in turn; the median counts")
	f.BoolVar(&o.check, "check", false, "end with status 1 when a goal is missed")
	if err := f.Parse(args); err != nil {
		return err
	}
	if f.NArg() > 0 || mib < 1 || o.sites < 1 || o.runs < 1 {
		return errors.New("no further arguments, please, and at least one MiB, site and run")
	}
	o.bytes = mib << 20
	work, err := os.MkdirTemp("", "pergola-bench.")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work) //nolint:errcheck // scratch space
	h, err := newLinkHouse(work)
	if err != nil {
		return err
	}
	met := true
	for _, part := range []func(context.Context, linkOptions, io.Writer) (bool, error){h.bulk, h.mixed, h.many, h.back} {
		ok, err := part(ctx, o, stdout)
		if err != nil {
			return err
		}
		met = met && ok
	}
	if !met && o.check {
		return errors.New("a goal was missed")
	}
	return nil
}

// linkHouse is the authority and the files of the benchmark.
type linkHouse struct {
	dir  string
	sock string // of the runner of the part that runs
	n    int
	auth *pki.Authority
	hub  tls.Certificate
}

func newLinkHouse(dir string) (*linkHouse, error) {
	auth, err := pki.NewAuthority("bench")
	if err != nil {
		return nil, err
	}
	pair, err := auth.NewKeypair(pki.Identity{Kind: pki.KindHub, Name: pki.HubName}, nil, 24*time.Hour)
	if err != nil {
		return nil, err
	}
	if err := pki.SaveKeypair(dir, "hub", pair); err != nil {
		return nil, err
	}
	cert, err := pair.Certificate()
	return &linkHouse{dir: dir, auth: auth, hub: cert}, err
}

func (h *linkHouse) party(site string) (*tls.Config, error) {
	pair, err := h.auth.NewKeypair(pki.Identity{Kind: pki.KindParty, Name: site, Job: benchJob}, nil, 24*time.Hour)
	if err != nil {
		return nil, err
	}
	cert, err := pair.Certificate()
	if err != nil {
		return nil, err
	}
	return pki.ClientTLS(cert, h.auth.Roots(), pki.HubName, link.ALPN), nil
}

// hubChild is a process that is a hub as far as links go: TLS on one side, a runner's socket on the other.
type hubChild struct {
	cmd   *exec.Cmd
	leash io.Closer // its end, however this process ends, is the child's
	addr  string
}

func (h *linkHouse) startHub(ctx context.Context, listen string) (*hubChild, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	c := &hubChild{cmd: exec.CommandContext(ctx, self, hubChildName, h.dir, listen, h.sock)}
	c.cmd.Stderr = os.Stderr
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if c.leash, err = c.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	if err := c.cmd.Start(); err != nil {
		return nil, err
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	addr, ok := strings.CutPrefix(strings.TrimSpace(line), listeningLine)
	if err != nil || !ok {
		c.stop()
		return nil, fmt.Errorf("the hub's process said %q: %w", line, err)
	}
	c.addr = addr
	return c, nil
}

func (c *hubChild) stop() {
	_ = c.leash.Close()
	_ = c.cmd.Process.Kill() // it may have ended
	_ = c.cmd.Wait()
}

// memory gives the child's resident bytes that are its own (RssAnon), so without the binary's pages.
func (c *hubChild) memory() (int64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", c.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "RssAnon:"); ok {
			kib, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			return kib << 10, err
		}
	}
	return 0, errors.New("the kernel tells no RssAnon")
}

// hubMain is the child's main.
func hubMain(ctx context.Context, args []string, stdout io.Writer) error {
	if len(args) != 3 {
		return errors.New("want a directory, an address and a socket")
	}
	pair, err := pki.LoadKeypair(args[0], "hub")
	if err != nil {
		return err
	}
	cert, err := pair.Certificate()
	if err != nil {
		return err
	}
	roots, err := pair.Roots()
	if err != nil {
		return err
	}
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, "tcp", args[1])
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { ln.Close() })()
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin) // until whoever started this is gone
		ln.Close()
	}()
	fmt.Fprintln(stdout, listeningLine+ln.Addr().String())
	conf := pki.ServerTLS(cert, roots, link.ALPN)
	for {
		c, err := ln.Accept()
		if err != nil {
			return nil // the end of the process
		}
		go func() {
			defer c.Close()
			tc := tls.Server(link.Coalesce(c), conf)
			if tc.HandshakeContext(ctx) != nil {
				return
			}
			id, err := pki.Expect(tc.ConnectionState(), pki.KindParty)
			if err != nil {
				return
			}
			up, err := sock.Dial(ctx, args[2])
			if err != nil {
				return
			}
			if link.WritePreface(up, link.Peer{Job: id.Job, Site: id.Name}) == nil {
				_ = link.Splice(ctx, tc, up)
			}
		}()
	}
}

// runnerEnd is the hub's runner: it takes sessions at link.sock.
type runnerEnd struct {
	a    *link.Acceptor
	stop func()
}

func (h *linkHouse) runner(ctx context.Context) (*runnerEnd, error) {
	h.n++
	h.sock = filepath.Join(h.dir, fmt.Sprintf("link-%d.sock", h.n))
	ln, err := sock.Listen(h.sock)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	r := &runnerEnd{a: link.NewAcceptor(link.Options{})}
	var wg sync.WaitGroup
	wg.Go(func() { _ = r.a.Serve(ctx, ln) })
	r.stop = func() { cancel(); wg.Wait() }
	return r, nil
}

func (h *linkHouse) dial(ctx context.Context, hub, proxy, site string) (*link.Session, error) {
	conf, err := h.party(site)
	if err != nil {
		return nil, err
	}
	if proxy == "" {
		proxy = uplink.Direct
	}
	up, err := uplink.New(uplink.Config{Hubs: []string{hub}, Proxy: proxy, TLS: conf})
	if err != nil {
		return nil, err
	}
	return link.Dial(ctx, func(ctx context.Context) (net.Conn, error) { return up.Dial(ctx) }, link.Options{Retry: time.Minute})
}

// pairOf gives both ends of a TCP connection, and of one with TLS over it; below is what TLS lies on.
func (h *linkHouse) pairOf(ctx context.Context, withTLS bool, below ...func(net.Conn) net.Conn) (near, far net.Conn, err error) {
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, nil, err
	}
	defer ln.Close()
	var d net.Dialer
	if near, err = d.DialContext(ctx, "tcp", ln.Addr().String()); err != nil {
		return nil, nil, err
	}
	if far, err = ln.Accept(); err != nil || !withTLS {
		return near, far, err
	}
	conf, err := h.party("tls")
	if err != nil {
		return nil, nil, err
	}
	for _, b := range below {
		near, far = b(near), b(far)
	}
	server := tls.Server(far, pki.ServerTLS(h.hub, h.auth.Roots(), link.ALPN))
	client := tls.Client(near, conf)
	shaken := make(chan error, 1)
	go func() { shaken <- server.HandshakeContext(ctx) }()
	if err := client.HandshakeContext(ctx); err != nil {
		return nil, nil, err
	}
	return client, server, <-shaken
}

// carry sends n bytes from one end to the other and gives the bytes in a second.
func carry(from, to net.Conn, n int64) (float64, error) {
	failed := make(chan error, 1)
	began := time.Now()
	go func() {
		b := make([]byte, 256<<10)
		var err error
		for left := n; left > 0 && err == nil; left -= int64(len(b)) {
			_, err = from.Write(b[:min(left, int64(len(b)))])
		}
		failed <- err
	}()
	b := make([]byte, 256<<10)
	for left := n; left > 0; {
		k, err := to.Read(b)
		left -= int64(k)
		if err != nil && left > 0 {
			return 0, errors.Join(err, <-failed)
		}
	}
	return float64(n) / time.Since(began).Seconds(), <-failed
}

// bulk compares one connection each way of carrying it.
func (h *linkHouse) bulk(ctx context.Context, o linkOptions, w io.Writer) (bool, error) {
	r, err := h.runner(ctx)
	if err != nil {
		return false, err
	}
	defer r.stop()
	hub, err := h.startHub(ctx, "127.0.0.1:0")
	if err != nil {
		return false, err
	}
	defer hub.stop()
	direct, end, err := h.direct(ctx)
	if err != nil {
		return false, err
	}
	defer end()
	whole, err := h.chain(ctx, r, hub.addr, "", "bulk")
	if err != nil {
		return false, err
	}
	defer whole.stop()
	site, err := h.dial(ctx, hub.addr, "", "lane")
	if err != nil {
		return false, err
	}
	far, err := r.a.Accept(ctx)
	if err != nil {
		return false, err
	}
	through := &ends{site, far}
	defer through.close()
	ways := []struct {
		name string
		pair func() (net.Conn, net.Conn, error)
	}{
		{"TCP alone", func() (net.Conn, net.Conn, error) { return h.pairOf(ctx, false) }},
		{"TLS alone", func() (net.Conn, net.Conn, error) { return h.pairOf(ctx, true) }},
		{"TLS, one stream of a session", func() (net.Conn, net.Conn, error) { return direct.stream(ctx) }},
		{"TLS, a lane", func() (net.Conn, net.Conn, error) { return direct.lane(ctx) }},
		{"TLS, hub, one stream of a session", func() (net.Conn, net.Conn, error) { return through.stream(ctx) }},
		{"TLS, hub, a lane", func() (net.Conn, net.Conn, error) { return through.lane(ctx) }},
		{"program, relay, TLS, hub, relay, program", func() (net.Conn, net.Conn, error) { return whole.connect(ctx) }},
	}
	speeds, costs := make([][]float64, len(ways)), make([][]float64, len(ways))
	for range o.runs {
		for i, way := range ways {
			near, far, err := way.pair()
			if err != nil {
				return false, fmt.Errorf("%s: %w", way.name, err)
			}
			before := cpu()
			s, err := carry(near, far, o.bytes)
			costs[i] = append(costs[i], (cpu()-before).Seconds()/float64(o.bytes)*1e9)
			near.Close()
			far.Close()
			if err != nil {
				return false, fmt.Errorf("%s: %w", way.name, err)
			}
			speeds[i] = append(speeds[i], s)
		}
	}
	middle := func(all []float64) float64 { s := slices.Sorted(slices.Values(all)); return s[len(s)/2] }
	mid := func(i int) float64 { return middle(speeds[i]) }
	fmt.Fprintf(w, "bulk, %d MiB one way, medians of %d runs\n", o.bytes>>20, o.runs)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "way\tMB/s\tof TCP\tof TLS\tCPU s/GB\t")
	for i, way := range ways {
		fmt.Fprintf(t, "%s\t%.0f\t%.2f\t%.2f\t%.2f\t\n", way.name, mid(i)/1e6, mid(i)/mid(0), mid(i)/mid(1), middle(costs[i]))
	}
	t.Flush()
	fmt.Fprintln(w, "CPU is that of both ends, without the hub's process; it says more than the speed where the machine is busy")
	ratio := mid(2) / mid(1)
	verdict(w, ratio >= goalBulk, "a session's stream carries at least %.0f %% of TLS alone: %.0f %%", 100*goalBulk, 100*ratio)
	return ratio >= goalBulk, nil
}

// cpu is what this process has used.
func cpu() time.Duration {
	var u syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func verdict(w io.Writer, ok bool, format string, args ...any) {
	fmt.Fprintf(w, "goal %s: %s\n\n", map[bool]string{true: "met", false: "MISSED"}[ok], fmt.Sprintf(format, args...))
}

// ends are both ends of a session.
type ends struct{ site, hub *link.Session }

func (e *ends) close() {
	var wg sync.WaitGroup
	wg.Go(func() { _ = e.site.Close() })
	wg.Go(func() { _ = e.hub.Close() })
	wg.Wait()
}

func (e *ends) stream(ctx context.Context) (near, far net.Conn, err error) {
	return e.opened(ctx, e.site.Open)
}

func (e *ends) lane(ctx context.Context) (near, far net.Conn, err error) {
	return e.opened(ctx, e.site.OpenLane)
}

func (e *ends) opened(ctx context.Context, open func(context.Context) (link.Stream, error)) (near, far net.Conn, err error) {
	s, err := open(ctx)
	if err != nil {
		return nil, nil, err
	}
	f, err := e.hub.Accept(ctx)
	return s, f, err
}

// direct gives a session over TLS with no hub between.
func (h *linkHouse) direct(ctx context.Context) (*ends, func(), error) {
	ctx, cancel := context.WithCancel(ctx)
	ln := &oneByOne{conns: make(chan net.Conn, 1), closed: make(chan struct{})}
	a := link.NewAcceptor(link.Options{})
	var wg sync.WaitGroup
	wg.Go(func() { _ = a.Serve(ctx, ln) })
	end := func() { cancel(); wg.Wait() }
	site, err := link.Dial(ctx, func(ctx context.Context) (net.Conn, error) {
		near, far, err := h.pairOf(ctx, true, link.Coalesce)
		if err == nil {
			var preface bytes.Buffer
			err = link.WritePreface(&preface, link.Peer{Job: benchJob, Site: "direct"})
			ln.conns <- &prefaced{Conn: far, r: io.MultiReader(&preface, far), left: preface.Len()}
		}
		return near, err
	}, link.Options{})
	if err != nil {
		end()
		return nil, nil, err
	}
	hub, err := a.Accept(ctx)
	e := &ends{site, hub}
	return e, func() { e.close(); end() }, err
}

// oneByOne is a listener of connections that are made elsewhere.
type oneByOne struct {
	conns  chan net.Conn
	once   sync.Once
	closed chan struct{}
}

func (l *oneByOne) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *oneByOne) Close() error   { l.once.Do(func() { close(l.closed) }); return nil }
func (l *oneByOne) Addr() net.Addr { return &net.UnixAddr{} }

// prefaced is a connection on which a hub's preface comes first.
type prefaced struct {
	net.Conn
	r    io.Reader
	left int
}

// NetConn gives the connection below, as tls.Conn's does.
func (p *prefaced) NetConn() net.Conn { return p.Conn }

func (p *prefaced) Read(b []byte) (int, error) {
	if p.left == 0 {
		return p.Conn.Read(b)
	}
	n, err := p.r.Read(b[:min(len(b), p.left)])
	p.left -= n
	return n, err
}

// chain is the whole way between two programs.
type chain struct {
	*ends
	near    string       // the relay's port at the site
	program net.Listener // at the hub's side
	cancel  context.CancelFunc
	wg      sync.WaitGroup
}

func (h *linkHouse) chain(ctx context.Context, r *runnerEnd, hub, proxy, site string) (*chain, error) {
	s, err := h.dial(ctx, hub, proxy, site)
	if err != nil {
		return nil, err
	}
	far, err := r.a.Accept(ctx)
	if err != nil {
		return nil, err
	}
	var lc net.ListenConfig
	program, err := lc.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	ln, err := lc.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	c := &chain{ends: &ends{s, far}, near: ln.Addr().String(), program: program, cancel: cancel}
	c.wg.Go(func() { _ = relay.Listen(ctx, ln, "fleet", s.Open) })
	c.wg.Go(func() {
		_ = relay.Serve(ctx, far.Accept, func(ctx context.Context, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", program.Addr().String())
		})
	})
	return c, nil
}

func (c *chain) connect(ctx context.Context) (near, far net.Conn, err error) {
	var d net.Dialer
	if near, err = d.DialContext(ctx, "tcp", c.near); err != nil {
		return nil, nil, err
	}
	far, err = c.program.Accept()
	return near, far, err
}

func (c *chain) stop() {
	c.cancel()
	c.program.Close()
	c.wg.Wait()
	c.close()
}

// ask sends a request of a KiB and waits for the answer, which is the same.
func ask(c net.Conn, b []byte) (time.Duration, error) {
	began := time.Now()
	if _, err := c.Write(b); err != nil {
		return 0, err
	}
	_, err := io.ReadFull(c, b)
	return time.Since(began), err
}

// mixed measures small requests while another stream of the same session is full.
func (h *linkHouse) mixed(ctx context.Context, o linkOptions, w io.Writer) (bool, error) {
	r, err := h.runner(ctx)
	if err != nil {
		return false, err
	}
	defer r.stop()
	hub, err := h.startHub(ctx, "127.0.0.1:0")
	if err != nil {
		return false, err
	}
	defer hub.stop()
	c, err := h.chain(ctx, r, hub.addr, "", "mixed")
	if err != nil {
		return false, err
	}
	defer c.stop()
	small, answer, err := c.connect(ctx)
	if err != nil {
		return false, err
	}
	defer small.Close()
	go func() { _, _ = io.Copy(answer, answer); answer.Close() }()
	fmt.Fprintln(w, "requests of 1 KiB and their answers, by the whole way")
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "beside\trequests\tp50 ms\tp99 ms\tmax ms\t")
	worst := time.Duration(0)
	for _, load := range []string{"nothing", "a transfer up", "a transfer down"} {
		var bulk sync.WaitGroup
		stop := func() {}
		if load != "nothing" {
			near, far, err := c.connect(ctx)
			if err != nil {
				return false, err
			}
			stop = func() { near.Close(); far.Close() }
			if load == "a transfer down" {
				near, far = far, near
			}
			bulk.Go(func() { _, _ = io.Copy(near, endless{}) })
			bulk.Go(func() { _, _ = io.Copy(io.Discard, far) })
		}
		var took []time.Duration
		b := make([]byte, 1<<10)
		for began := time.Now(); time.Since(began) < 4*time.Second; {
			d, err := ask(small, b)
			if err != nil {
				return false, err
			}
			took = append(took, d)
			time.Sleep(time.Millisecond) // requests come now and then
		}
		stop()
		bulk.Wait()
		slices.Sort(took)
		p := func(q float64) time.Duration { return took[int(q*float64(len(took)-1))] }
		ms := func(d time.Duration) float64 { return float64(d) / 1e6 }
		fmt.Fprintf(t, "%s\t%d\t%.2f\t%.2f\t%.2f\t\n", load, len(took), ms(p(.5)), ms(p(.99)), ms(p(1)))
		worst = max(worst, p(.99))
	}
	t.Flush()
	verdict(w, worst <= goalLatency, "99 of 100 requests beside a bulk transfer take at most %v: %v", goalLatency, worst.Round(10*time.Microsecond))
	return worst <= goalLatency, nil
}

type endless struct{}

func (endless) Read(b []byte) (int, error) { return len(b), nil }

// many connects many sites, weighs the hub, and restarts it.
func (h *linkHouse) many(ctx context.Context, o linkOptions, w io.Writer) (bool, error) {
	r, err := h.runner(ctx)
	if err != nil {
		return false, err
	}
	defer r.stop()
	hub, err := h.startHub(ctx, "127.0.0.1:0")
	if err != nil {
		return false, err
	}
	defer func() { hub.stop() }()
	all := make([]ends, o.sites)
	defer func() {
		var wg sync.WaitGroup
		for _, e := range all {
			if e.site != nil && e.hub != nil {
				wg.Go(e.close)
			}
		}
		wg.Wait()
	}()
	warm, err := h.dial(ctx, hub.addr, "", "warm") // what the first one costs alone is not counted
	if err != nil {
		return false, err
	}
	if _, err := r.a.Accept(ctx); err != nil {
		return false, err
	}
	before, err := hub.memory()
	if err != nil {
		return false, err
	}
	defer warm.Close()
	far := map[string]*link.Session{}
	for i := range all {
		if all[i].site, err = h.dial(ctx, hub.addr, "", fmt.Sprintf("site-%d", i)); err != nil {
			return false, err
		}
		s, err := r.a.Accept(ctx)
		if err != nil {
			return false, err
		}
		far[s.Peer().Site] = s
	}
	for i := range all {
		all[i].hub = far[fmt.Sprintf("site-%d", i)]
	}
	select {
	case <-time.After(10 * time.Second): // idle: only pings
	case <-ctx.Done():
		return false, ctx.Err()
	}
	after, err := hub.memory()
	if err != nil {
		return false, err
	}
	each := (after - before) / int64(o.sites)
	fmt.Fprintf(w, "%d sites, each with an idle link: the hub takes %.1f MiB, %.1f KiB each\n", o.sites, float64(after-before)/(1<<20), float64(each)/(1<<10))
	small := each <= goalIdle
	verdict(w, small, "at most %d KiB for an idle link: %.1f KiB", goalIdle>>10, float64(each)/(1<<10))

	addr := hub.addr
	hub.stop()
	select {
	case <-time.After(5 * time.Second): // the pauses between attempts have grown
	case <-ctx.Done():
		return false, ctx.Err()
	}
	next, err := h.startHub(ctx, addr)
	if err != nil {
		return false, err
	}
	hub = next
	began := time.Now()
	took := make([]time.Duration, 0, o.sites)
	for len(took) < o.sites && time.Since(began) < time.Minute {
		n := 0
		for i := range all {
			if st := all[i].site.Stats(); st.Resumes > 0 && st.Down.IsZero() {
				n++
			}
		}
		for len(took) < n {
			took = append(took, time.Since(began))
		}
		time.Sleep(20 * time.Millisecond) // it is looked at, not waited for
	}
	if len(took) < o.sites {
		fmt.Fprintf(w, "only %d of %d sites came back within a minute\n", len(took), o.sites)
		return false, nil
	}
	last := took[len(took)-1]
	fmt.Fprintf(w, "the hub was killed and 5 s later started again: half of %d sites were back after %.2f s, all after %.2f s\n", o.sites, took[len(took)/2].Seconds(), last.Seconds())
	verdict(w, last <= goalHerd, "all sites are back within %v: %.2f s", goalHerd, last.Seconds())
	return small && last <= goalHerd, nil
}

// back takes the network away and measures how long bytes wait when it is there again.
func (h *linkHouse) back(ctx context.Context, o linkOptions, w io.Writer) (bool, error) {
	r, err := h.runner(ctx)
	if err != nil {
		return false, err
	}
	defer r.stop()
	hub, err := h.startHub(ctx, "127.0.0.1:0")
	if err != nil {
		return false, err
	}
	defer hub.stop()
	p := &chaos.Proxy{}
	addr, err := p.Start(ctx, "127.0.0.1:0")
	if err != nil {
		return false, err
	}
	defer p.Stop()
	c, err := h.chain(ctx, r, hub.addr, "http://"+addr, "back")
	if err != nil {
		return false, err
	}
	defer c.stop()
	near, far, err := c.connect(ctx)
	if err != nil {
		return false, err
	}
	defer near.Close()
	go func() { _, _ = io.Copy(far, far); far.Close() }()
	b := make([]byte, 1<<10)
	if _, err := ask(near, b); err != nil {
		return false, err
	}
	worst := time.Duration(0)
	for range o.runs {
		p.Stop()
		waiting := make(chan error, 1)
		go func() { _, err := ask(near, b); waiting <- err }()
		select {
		case <-time.After(o.down):
		case <-ctx.Done():
			return false, ctx.Err()
		}
		if _, err := p.Start(ctx, addr); err != nil {
			return false, err
		}
		began := time.Now()
		if err := <-waiting; err != nil {
			return false, err
		}
		worst = max(worst, time.Since(began))
	}
	fmt.Fprintf(w, "the network was away for %v, %d times: bytes flowed again %.2f s after its return at the latest\n", o.down, o.runs, worst.Seconds())
	verdict(w, worst <= goalBack, "bytes flow within %v: %.2f s", goalBack, worst.Seconds())
	return worst <= goalBack, nil
}
