// Package fleet is the hub's end of what sites may reach of a superlink: its Fleet API, and nothing else.
//
// A [Gate] stands between the sites' links and the superlink. It passes the calls of the Fleet API on, over gRPC,
// grpc-adapter and HTTP as the Flower generation has it, and
//
//   - refuses every other call: from flwr 1.40 on the superlink serves its Control and Runtime APIs on the same port, with
//     which a site could start and stop runs;
//   - refuses a call in the name of another site's node, where the generation does not sign its calls;
//   - keeps the node of a site that is cut off alive towards the superlink for as long as its link may come back, by
//     announcing longer intervals than the supernode does, and lets it die at once when the supernode is known to be dead;
//   - hands a message out again if its answer got lost because the supernode gave up waiting during an outage, and has calls
//     that were signed too long ago repeated instead of refused for good.
//
// It carries no connections: internal/relay and internal/link do. Start with [New].
package fleet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Intervals that Flower's generations know, in seconds. See flwr/common/constant.py of 1.12, 1.21, 1.30 and 1.41.
const (
	ownInterval = 30   // what a supernode announces by itself
	maxInterval = 1800 // the most that a superlink of 1.30 or later takes with a heartbeat
	minInterval = 10   // the least
	patience    = 2    // heartbeats carry a node for this many intervals; pings for one
	forever     = 1e9  // for pings there is no upper bound
)

// A superlink takes a signed call for 10 s (1.15, 1.18) or 300 s (1.30, 1.41; TIMESTAMP_TOLERANCE), and for 5 s more in both
// directions (SYSTEM_TIME_TOLERANCE).
const (
	onTime   = 8 * time.Second  // no superlink refuses a call of this age for its age
	early    = 4 * time.Second  // as far in the future as any superlink takes, less a margin
	maxEarly = 24 * time.Second // a call that has to wait for longer is given up by its caller (30 s)
)

// Options of a gate.
type Options struct {
	// Tolerance is for how long a link may be cut; negative: without limit.
	Tolerance time.Duration
	// Warn is told, in one sentence, what somebody should know of a site.
	Warn func(site, text string)
	Log  *slog.Logger
}

// Gate passes sites' calls on to one superlink.
type Gate struct {
	opts  Options
	srv   *http.Server
	ln    *listener
	ready chan struct{} // closed when addr is known

	mu    sync.Mutex // guards the rest
	addr  string
	sites map[string]*site
	owner map[uint64]string // node → site, where nodes do not sign
}

// site is what the gate knows of one site.
type site struct {
	name   string
	h1, h2 *http.Transport

	pulling sync.Mutex // one pull at a time
	mu      sync.Mutex // guards the rest
	beat    *beat
	signed  http.Header // of the latest signed call
	held    *held
	warned  map[string]bool
}

// beat is the latest sign of life of a site's supernode, as it was sent.
type beat struct {
	path    string
	header  http.Header
	op      string
	message []byte
	wrap    func([]byte) []byte
}

// held is an answer with a message whose arrival is not certain yet.
type held struct {
	node   uint64
	conn   net.Conn // that carried it last
	header http.Header
	body   []byte
}

type connKey struct{}

// New makes a gate. Its superlink is named later, with Open; calls wait until then. End it with Close.
func New(opts Options) *Gate {
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	if opts.Warn == nil {
		opts.Warn = func(string, string) {}
	}
	g := &Gate{opts: opts, ready: make(chan struct{}), ln: newListener(), sites: map[string]*site{}, owner: map[uint64]string{}}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	g.srv = &http.Server{
		Handler:           http.HandlerFunc(g.serve),
		Protocols:         protocols,
		ReadHeaderTimeout: 0, // a link may be cut for hours between two bytes
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          slog.NewLogLogger(opts.Log.Handler(), slog.LevelDebug),
		ConnContext:       func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, connKey{}, c) },
		HTTP2: &http.HTTP2Config{
			MaxConcurrentStreams:          250,
			MaxReceiveBufferPerStream:     4 << 20,
			MaxReceiveBufferPerConnection: 8 << 20,
		},
	}
	return g
}

// Serve handles connections until Close.
func (g *Gate) Serve() error {
	if err := g.srv.Serve(g.ln); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("the gate to the Fleet API cannot serve: %w", err)
	}
	return nil
}

// Open names the superlink's Fleet API, "host:port". It is called once.
func (g *Gate) Open(addr string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.addr = addr
	close(g.ready)
}

// Close ends all connections.
func (g *Gate) Close() {
	_ = g.srv.Close()
	_ = g.ln.Close()
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, s := range g.sites {
		s.h1.CloseIdleConnections()
		s.h2.CloseIdleConnections()
	}
}

// Dial gives a connection on which the site's supernode may call.
func (g *Gate) Dial(site string) (net.Conn, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("a connection to the gate: %w", err)
	}
	ours, err := fileConn(fds[0])
	if err != nil {
		_ = unix.Close(fds[1])
		return nil, err
	}
	theirs, err := fileConn(fds[1])
	if err != nil {
		_ = ours.Close()
		return nil, err
	}
	if !g.ln.give(&conn{Conn: ours, site: site}) {
		_ = ours.Close()
		_ = theirs.Close()
		return nil, net.ErrClosed
	}
	return theirs, nil
}

func fileConn(fd int) (net.Conn, error) {
	f := os.NewFile(uintptr(fd), "gate")
	defer f.Close() // FileConn has a copy
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("a connection to the gate: %w", err)
	}
	return c, nil
}

// conn is a site's connection.
type conn struct {
	net.Conn
	site string
}

// listener gives the server its connections.
type listener struct {
	conns chan net.Conn
	once  sync.Once
	done  chan struct{}
}

func newListener() *listener {
	return &listener{conns: make(chan net.Conn), done: make(chan struct{})}
}

func (l *listener) give(c net.Conn) bool {
	select {
	case l.conns <- c:
		return true
	case <-l.done:
		return false
	}
}

// Accept implements net.Listener.
func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (l *listener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

// Addr implements net.Listener.
func (l *listener) Addr() net.Addr { return &net.UnixAddr{Name: "gate", Net: "unix"} }

func (g *Gate) site(name string) *site {
	g.mu.Lock()
	defer g.mu.Unlock()
	s := g.sites[name]
	if s == nil {
		h1, h2 := new(http.Protocols), new(http.Protocols)
		h1.SetHTTP1(true)
		h2.SetUnencryptedHTTP2(true)
		// No proxy: this is loopback whatever the environment says. A transport of its own for each site: no site waits for
		// another one's window.
		s = &site{
			name:   name,
			h1:     &http.Transport{Protocols: h1, DisableCompression: true, IdleConnTimeout: time.Minute},
			h2:     &http.Transport{Protocols: h2, DisableCompression: true, HTTP2: &http.HTTP2Config{MaxReceiveBufferPerStream: 4 << 20}},
			warned: map[string]bool{},
		}
		g.sites[name] = s
	}
	return s
}

// warn tells something about a site once.
func (g *Gate) warn(s *site, key, format string, args ...any) {
	s.mu.Lock()
	told := s.warned[key] || len(s.warned) > 50
	s.warned[key] = true
	s.mu.Unlock()
	if !told {
		g.opts.Warn(s.name, fmt.Sprintf(format, args...))
	}
}

// interval is what is announced to the superlink instead of the supernode's own interval, so that a node outlives an outage
// of the tolerated length but not a longer one.
func (g *Gate) interval(op string, own float64) float64 {
	t := g.opts.Tolerance.Seconds()
	if g.opts.Tolerance < 0 {
		t = forever
	}
	want := t
	if op == opHeartbeat || op == opActivate {
		want = math.Min(t/patience, maxInterval)
	}
	return math.Max(own, math.Ceil(want))
}

// Expire lets the superlink know that a site's supernode is dead: its node is offline at once where the generation has pings,
// and within patience × minInterval (20 s) where it has heartbeats. Without it the node would be taken for alive for as long
// as an outage is tolerated. It is no error if the superlink cannot be told: nobody waits for that node for longer than the
// tolerance.
func (g *Gate) Expire(ctx context.Context, name string) error {
	s := g.site(name)
	s.mu.Lock()
	b, signed := s.beat, s.signed
	s.beat, s.held = nil, nil
	s.mu.Unlock()
	if b == nil {
		return nil // no node of this site lives
	}
	seconds := 0.001
	if b.op == opHeartbeat {
		seconds = minInterval
	}
	header := b.header.Clone()
	for k, v := range signed {
		header[k] = v
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if err := g.call(ctx, s, b.path, header, b.wrap(withInterval(b.message, seconds))); err != nil {
		return fmt.Errorf("tell the superlink that the supernode of %s is gone: %w", name, err)
	}
	return nil
}
