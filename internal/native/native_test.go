package native

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pergolafl/pergola/internal/problem"
)

func fileConn(t testing.TB, f *os.File) *conn {
	t.Helper()
	c, err := net.FileConn(f)
	if err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
	return newConn(c)
}

func memory(t testing.TB, text string) *os.File {
	t.Helper()
	f, err := memFile("test")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(text); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func content(t testing.TB, f *os.File) string {
	t.Helper()
	b, err := io.ReadAll(io.NewSectionReader(f, 0, 1<<40))
	if err != nil {
		t.Error(err)
	}
	return string(b)
}

// stream is a link's stream made of a socket.
type stream struct {
	*net.UnixConn
	reset *atomic.Bool // by either end
}

var errReset = errors.New("reset")

func (s stream) Reset() error {
	s.reset.Store(true)
	return s.Close()
}

func (s stream) Read(b []byte) (int, error) {
	n, err := s.UnixConn.Read(b)
	if err != nil && s.reset.Load() {
		err = errReset
	}
	return n, err
}

// cutStream gives some bytes, and then an error.
type cutStream struct {
	Stream
	left int
}

func (s *cutStream) Read(b []byte) (int, error) {
	if s.left == 0 {
		return 0, io.ErrNoProgress
	}
	n, err := s.Stream.Read(b[:min(len(b), s.left)])
	s.left -= n
	return n, err
}

// flaw is what is wrong with a stream of a pack.
type flaw int

const (
	sound    flaw = iota
	unopened      // it is not even opened
	cut           // its reader gets a part of it
)

// flaws is what is wrong with the first streams.
type flaws struct {
	flaw
	count int32
}

func (f flaws) of(n int32) flaw {
	if n > f.count {
		return sound
	}
	return f.flaw
}

// apply gives the reader's end of a stream.
func (f flaw) apply(s Stream) Stream {
	if f == cut {
		return &cutStream{s, 100}
	}
	return s
}

// fakeLink joins a site to a hub by sockets.
type fakeLink struct {
	t      testing.TB
	hub    *Hub
	member *Member
	site   *Site
	packs  atomic.Int32 // streams of packs to the site
	back   atomic.Int32 // and from it
	wrong  faults
	ctx    context.Context
	cut    context.CancelFunc
	wg     sync.WaitGroup
}

func (l *fakeLink) pair() (a, b Stream) {
	ours, theirs, err := SocketPair()
	if err != nil {
		l.t.Error(err)
	}
	c, err := net.FileConn(theirs)
	if err != nil {
		l.t.Error(err)
	}
	_ = theirs.Close()
	u, ok := c.(*net.UnixConn)
	if !ok {
		l.t.Errorf("a socket pair has a %T", c)
	}
	reset := new(atomic.Bool)
	return stream{ours, reset}, stream{u, reset}
}

func (l *fakeLink) openToHub(_ context.Context, target string) (Stream, error) {
	bad := sound
	if target == PackTarget {
		bad = l.wrong.back.of(l.back.Add(1))
	}
	if bad == unopened {
		return nil, io.ErrClosedPipe
	}
	a, b := l.pair()
	l.wg.Go(func() { _ = l.member.Serve(target, bad.apply(b)) })
	return a, nil
}

func (l *fakeLink) openToSite(_ context.Context, target string) (Stream, error) {
	bad := l.wrong.to.of(l.packs.Add(1))
	if bad == unopened {
		return nil, io.ErrClosedPipe
	}
	a, b := l.pair()
	l.wg.Go(func() { _ = l.site.Accept(l.ctx, target, bad.apply(b)) })
	return a, nil
}

// fakeWorker is what a worker does with a message, in the place of Python. It may write to c itself; ok false: it is gone.
type fakeWorker func(c *conn, f *frame, packs map[string]string) (answer *frame, ok bool)

// world is a hub, sites and a ServerApp's end.
type world struct {
	t       testing.TB
	hub     *Hub
	links   []*fakeLink
	server  *conn
	nodes   []uint64
	result  chan error
	deaths  chan string
	refused chan string // sites
	starts  atomic.Int32
	unread  atomic.Bool // workers do not look into packs
	mu      sync.Mutex
	batch   []Batch
}

func (w *world) process(run func(*conn)) Process {
	ours, theirs, err := SocketPair()
	if err != nil {
		w.t.Fatal(err)
	}
	c, done := fileConn(w.t, theirs), make(chan struct{})
	go func() {
		defer close(done)
		defer c.close()
		run(c)
	}()
	return Process{Conn: ours, Done: done, Exit: func() string { <-done; return "exit code 3" }, Stop: func(time.Duration) {
		_ = ours.Close()
		_ = c.c.SetDeadline(time.Now())
		<-done
	}}
}

// client is the loop of a fake worker.
func (w *world) client(isolation string, f fakeWorker) func(*conn) {
	return func(c *conn) {
		if c.write(frame{head: head{T: tHello, Protocol: Protocol, Flwr: "1.30.0"}}) != nil {
			return
		}
		start, err := c.read()
		if err != nil {
			return
		}
		if start.T != tStart || start.Run == 0 {
			w.t.Errorf("a worker was started with %+v", start.head)
		}
		yes := true
		if c.write(frame{head: head{T: tReady, Fork: &yes}}) != nil {
			return
		}
		packs := map[string]string{}
		for {
			m, err := c.read()
			if err != nil {
				return
			}
			if m.T == tFree {
				continue
			}
			for i, name := range m.Fds {
				packs[name] = ""
				if !w.unread.Load() {
					packs[name] = content(w.t, m.files[i])
				}
			}
			m.close()
			if _, ok := packs[m.Pack]; !ok && m.Pack != "" {
				w.t.Errorf("the worker lacks the pack %s", m.Pack)
			}
			answer, ok := f(c, &m, packs)
			if !ok {
				return
			}
			if answer != nil {
				answer.T, answer.ID, answer.Node = tReply, m.ID, m.Node
				err := c.write(*answer)
				closeFiles(answer.files)
				if err != nil {
					return
				}
			}
			if isolation == PerMessage {
				return
			}
		}
	}
}

func newWorld(t testing.TB, sites, clients, workers int, isolation string, f fakeWorker) *world {
	return newFaultyWorld(t, sites, clients, workers, isolation, f, faults{})
}

// faults is what goes wrong in a world; nil: nothing.
type faults struct {
	same     func(h *Hub, a, b *os.File, size int64) bool // nothing by itself: it is called in the place of same
	start    func(n int32) error                          // with the start of the n-th worker, from 1
	to, back flaws                                        // with streams of packs to a site, and from it
}

func newFaultyWorld(t testing.TB, sites, clients, workers int, isolation string, f fakeWorker, wrong faults) *world {
	w := &world{t: t, result: make(chan error, 1), deaths: make(chan string, 100), refused: make(chan string, 100)}
	ctx, cancel := context.WithCancel(t.Context())
	w.hub = NewHub(HubOptions{OnRefused: func(site, _ string) { w.refused <- site }, OnBatch: func(b Batch) {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.batch = append(w.batch, b)
	}})
	if wrong.same != nil {
		w.hub.same = func(a, b *os.File, size int64) bool { return wrong.same(w.hub, a, b, size) }
	}
	var wg sync.WaitGroup
	for i := range sites {
		l := &fakeLink{t: t, hub: w.hub, wrong: wrong}
		l.ctx, l.cut = context.WithCancel(ctx)
		l.member = w.hub.Join(l.ctx, fmt.Sprintf("site-%d", i+1), Opener{Open: l.openToSite})
		l.site = NewSite(SiteOptions{
			Name: fmt.Sprintf("site-%d", i+1), Clients: clients, Workers: workers, Isolation: isolation, Link: Opener{Open: l.openToHub},
			NodeConfig: func(c int) any { return map[string]any{"partition-id": i*clients + c} },
			Start: func(int) (Process, error) {
				n := w.starts.Add(1)
				if wrong.start != nil {
					if err := wrong.start(n); err != nil {
						return Process{}, err
					}
				}
				return w.process(w.client(isolation, f)), nil
			},
			OnReady: func(Readiness) {}, OnDeath: func(how string, busy bool) { w.deaths <- fmt.Sprint(how, " ", busy) },
		})
		linked := make(chan struct{})
		close(linked)
		wg.Go(func() { _ = l.site.Run(l.ctx, linked) })
		w.links = append(w.links, l)
	}
	if err := w.hub.Wait(ctx, sites); err != nil {
		t.Fatal(err)
	}
	got := make(chan *conn, 1)
	p := w.process(func(c *conn) {
		if err := c.write(frame{head: head{T: tHello, Protocol: Protocol}}); err != nil {
			t.Error(err)
		}
		got <- c
		<-ctx.Done()
	})
	peer, err := Greet(ctx, p)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		res, err := w.hub.Run(ctx, peer, StartApp{Dir: "app"})
		if err == nil && !res.OK {
			err = errors.New(res.Error)
		}
		w.result <- err
	}()
	w.server = <-got
	start := w.next(tStart)
	w.nodes = start.Nodes
	if len(w.nodes) != sites*clients {
		t.Fatalf("the ServerApp starts with %d nodes", len(w.nodes))
	}
	t.Cleanup(func() {
		cancel()
		for _, l := range w.links {
			l.member.Leave()
		}
		wg.Wait()
		for _, l := range w.links {
			l.wg.Wait()
		}
		<-p.Done
	})
	return w
}

// site gives the name of the site that has a node.
func (w *world) site(node int) string {
	w.hub.mu.Lock()
	defer w.hub.mu.Unlock()
	return w.hub.nodes[w.nodes[node]].site
}

// next reads the ServerApp's next frame, which must be of one of the types.
func (w *world) next(types ...string) frame {
	w.t.Helper()
	f, err := w.server.read()
	if err != nil {
		w.t.Fatal(err)
	}
	if !slices.Contains(types, f.T) {
		w.t.Fatalf("got %q (%+v), want %v", f.T, f.head, types)
	}
	return f
}

func (w *world) send(f frame) {
	w.t.Helper()
	if err := w.server.write(f); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) done() {
	w.t.Helper()
	w.send(frame{head: head{T: tDone, OK: true}})
	if err := <-w.result; err != nil {
		w.t.Errorf("the run ended with %v", err)
	}
}

// echo answers with what it was sent, and counts messages in the node's state.
func echo(_ *conn, f *frame, packs map[string]string) (*frame, bool) {
	var config map[string]int
	if json.Unmarshal(f.NodeConfig, &config) != nil {
		return nil, false
	}
	text := fmt.Sprintf("%s at %d after %q", f.proto, config["partition-id"], f.state)
	answer := frame{head: head{Numbers: Values{"loss": float64(config["partition-id"])}, Round: 1}, proto: []byte(text), state: append(f.state, '.')}
	if f.Pack != "" {
		file, err := memFile("answer")
		if err != nil {
			return nil, false
		}
		if _, err := file.WriteString(strings.ToUpper(packs[f.Pack])); err != nil {
			return nil, false
		}
		answer.Pack, answer.Lens, answer.Fds, answer.files = "c.1", f.Lens, []string{"c.1"}, []*os.File{file}
	}
	return &answer, true
}

// Messages reach their nodes, replies come back, and each node's state grows by its own messages alone, on every kind of worker.
func TestMessages(t *testing.T) {
	for _, isolation := range []string{Warm, PerMessage} {
		w := newWorld(t, 2, 3, 2, isolation, echo)
		for round := range 3 {
			for i, n := range w.nodes {
				w.send(frame{head: head{T: tMsg, ID: fmt.Sprintf("%d.%d", round, i), Node: n, TTL: 100, Type: "train"}, proto: []byte("hello")})
			}
			for range w.nodes {
				f := w.next(tReply)
				i := slices.Index(w.nodes, f.Node)
				if w.links[0].member.nodes[0] != w.nodes[0] { // the other site came first
					i = (i + 3) % 6
				}
				if want := fmt.Sprintf("hello at %d after %q", i, strings.Repeat(".", round)); string(f.proto) != want || f.ID != fmt.Sprintf("%d.%d", round, slices.Index(w.nodes, f.Node)) {
					t.Errorf("%s: round %d: %s answers %q, want %q", isolation, round, f.ID, f.proto, want)
				}
			}
		}
		w.done()
		if n := w.starts.Load(); isolation == Warm && n > 4 || isolation == PerMessage && n < 18 {
			t.Errorf("%s: %d processes were started", isolation, n)
		}
		w.mu.Lock()
		if len(w.batch) != 2 || w.batch[0].Replies != 9 || w.batch[0].Values["loss"] != (Stat{Mean: 1, Min: 0, Max: 2, Count: 9, sum: 9}) || w.batch[1].Values["loss"].Mean != 4 {
			t.Errorf("%s: the replies came to %+v", isolation, w.batch)
		}
		w.mu.Unlock()
	}
}

// A pack goes to each site once, whatever the number of its clients and messages; another with the same bytes is the same one; and when
// the ServerApp's process drops it, it is told that nobody holds it any more.
func TestPacks(t *testing.T) {
	w := newWorld(t, 2, 3, 2, Warm, echo)
	model := strings.Repeat("model ", 100_000)
	lens := []int64{6, -1, int64(len(model)) - 6}
	for round := range 2 {
		for i, n := range w.nodes {
			f := frame{head: head{T: tMsg, ID: fmt.Sprintf("%d.%d", round, i), Node: n, TTL: 100, Pack: "s.1", Lens: lens}}
			switch {
			case round == 0 && i == 0:
				f.Fds, f.files = []string{"s.1"}, []*os.File{memory(t, model)}
			case round == 1 && i == 5: // the same anew, in a file that has been longer before
				f.Pack, f.Fds, f.files = "s.2", []string{"s.2"}, []*os.File{memory(t, model+"old")}
			}
			w.send(f)
		}
		for range w.nodes {
			f := w.next(tReply)
			file := f.file(f.Pack)
			if file == nil || !slices.Equal(f.Lens, lens) {
				t.Fatalf("a reply came without its pack: %+v", f.head)
			}
			if got := content(t, file); got[:len(model)] != strings.ToUpper(model) {
				t.Errorf("%s answers with other bytes", f.ID)
			}
			closeFiles([]*os.File{file})
			w.send(frame{head: head{T: tFree, Pack: f.Pack}})
		}
	}
	for _, l := range w.links {
		if n := l.packs.Load(); n != 1 {
			t.Errorf("the model went to %s %d times", l.member.site, n)
		}
	}
	// The file of the second was never kept: an app that makes its model anew for each client would otherwise have them all at once.
	for _, name := range []string{"s.2", "s.1"} {
		w.send(frame{head: head{T: tMsg, ID: "without." + name, Node: w.nodes[0], TTL: 100, Drop: []string{name}}, proto: []byte("x")})
		if f := w.next(tForgot); f.Pack != name {
			t.Errorf("%s is forgotten when %s is dropped", f.Pack, name)
		}
		w.next(tReply)
	}
	for _, n := range w.nodes { // what comes behind the word to the sites has been answered
		w.send(frame{head: head{T: tMsg, ID: fmt.Sprint("last.", n), Node: n, TTL: 100}, proto: []byte("x")})
		w.next(tReply)
	}
	w.done()
	for _, l := range w.links {
		l.site.mu.Lock()
		if len(l.site.refs) > 0 {
			t.Errorf("the site holds on to %v", l.site.refs)
		}
		l.site.mu.Unlock()
	}
}

// Others have their messages while two models are compared.
func TestPacksAreComparedAside(t *testing.T) {
	compared := 0
	w := newFaultyWorld(t, 1, 1, 1, Warm, echo, faults{same: func(h *Hub, a, b *os.File, size int64) bool {
		compared++
		if !h.mu.TryLock() {
			t.Error("the hub is locked meanwhile")
			return true
		}
		h.mu.Unlock()
		return same(a, b, size)
	}})
	for _, name := range []string{"s.1", "s.2", "s.3"} {
		model := "a model"
		if name == "s.2" {
			model = "another"
		}
		w.send(frame{
			head:  head{T: tMsg, ID: name, Node: w.nodes[0], TTL: 100, Pack: name, Lens: []int64{7}, Fds: []string{name}},
			files: []*os.File{memory(t, model)},
		})
		f := w.next(tReply)
		file := f.file(f.Pack)
		if got := content(t, file); got != strings.ToUpper(model) {
			t.Errorf("%s is answered with %q", name, got)
		}
		closeFiles([]*os.File{file})
	}
	if n := w.links[0].packs.Load(); n != 2 {
		t.Errorf("%d models went to the site, want 2", n)
	}
	w.done()
	if compared < 2 {
		t.Errorf("models were compared %d times", compared)
	}
}

// A stream of a pack that fails while the link lives is made again. A reply that cannot be had all the same is answered for, and the site
// goes on.
func TestPacksAreSentAgain(t *testing.T) {
	model := strings.Repeat("model ", 100_000)
	for _, c := range []struct {
		name           string
		wrong          faults
		lost           bool
		packs, replies int32 // streams
	}{
		{"a model's stream is not opened", faults{to: flaws{unopened, 2}}, false, 3, 1},
		{"a model's stream is cut", faults{to: flaws{cut, 2}}, false, 3, 1},
		{"a reply's stream is not opened", faults{back: flaws{unopened, 2}}, false, 1, 3},
		{"a reply's stream is cut", faults{back: flaws{cut, 2}}, false, 1, 3},
		{"no stream of a reply is opened", faults{back: flaws{unopened, 100}}, true, 1, packTries},
		{"all streams of a reply are cut", faults{back: flaws{cut, 100}}, true, 1, packTries},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			w := newFaultyWorld(t, 1, 1, 1, Warm, echo, c.wrong)
			l := w.links[0]
			w.send(frame{
				head:  head{T: tMsg, ID: "a", Node: w.nodes[0], TTL: 1000, Pack: "s.1", Lens: []int64{int64(len(model))}, Fds: []string{"s.1"}},
				files: []*os.File{memory(t, model)},
			})
			f := w.next(tReply, tLost)
			switch file := f.file(f.Pack); {
			case c.lost:
				if f.T != tLost || f.ID != "a" || f.Code != CodeNoReply || f.Node != w.nodes[0] {
					t.Errorf("the ServerApp is told %+v", f.head)
				}
			case file == nil:
				t.Errorf("a reply came without its pack: %+v", f.head)
			default:
				if got := content(t, file); got[:len(model)] != strings.ToUpper(model) {
					t.Error("it answers with other bytes")
				}
				closeFiles([]*os.File{file})
				w.send(frame{head: head{T: tFree, Pack: f.Pack}})
			}
			w.send(frame{head: head{T: tMsg, ID: "b", Node: w.nodes[0], TTL: 1000}, proto: []byte("x")})
			if f := w.next(tReply); f.ID != "b" {
				t.Errorf("the ServerApp is told %+v", f.head)
			}
			if p, r := l.packs.Load(), l.back.Load(); p != c.packs || r != c.replies {
				t.Errorf("%d streams to the site and %d from it, want %d and %d", p, r, c.packs, c.replies)
			}
			w.done()
		})
	}
}

// Whatever a worker does in the place of an answer: the ServerApp is told, the worker is replaced, and the node's state is as it was.
func TestWorkersThatFail(t *testing.T) {
	for _, c := range []struct {
		name string
		f    fakeWorker
		ttl  float64
		code []int
		how  string
	}{
		{"ends", func(*conn, *frame, map[string]string) (*frame, bool) { return nil, false }, 100, []int{CodeCrashed}, "exit code 3 true"},
		{"writes what is no frame", func(c *conn, _ *frame, _ map[string]string) (*frame, bool) {
			_, err := c.c.Write([]byte("Segmentation fault"))
			return nil, err == nil
		}, 100, []int{CodeCrashed}, "does not speak"},
		{"answers another message", func(c *conn, _ *frame, _ map[string]string) (*frame, bool) {
			return nil, c.write(frame{head: head{T: tReply, ID: "other"}}) == nil
		}, 100, []int{CodeCrashed}, `answered a message with "reply"`},
		{"says ready again", func(c *conn, _ *frame, _ map[string]string) (*frame, bool) {
			return nil, c.write(frame{head: head{T: tReady}}) == nil
		}, 100, []int{CodeCrashed}, `answered a message with "ready"`},
		{"names a pack that it does not send", func(*conn, *frame, map[string]string) (*frame, bool) {
			return &frame{head: head{Pack: "c.9", Lens: []int64{1}}}, true
		}, 100, []int{CodeCrashed}, "has not come"},
		{"claims more than its pack has", func(*conn, *frame, map[string]string) (*frame, bool) {
			return &frame{head: head{Pack: "c.9", Lens: []int64{1 << 40}, Fds: []string{"c.9"}}, files: []*os.File{memory(t, "short")}}, true
		}, 100, []int{CodeCrashed}, "in a pack of 5"},
		{"does not answer", func(*conn, *frame, map[string]string) (*frame, bool) { return nil, true }, 0.2, []int{CodeExpired, CodeCrashed}, "within the message's time"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var bad atomic.Bool
			w := newWorld(t, 1, 1, 1, Warm, func(conn *conn, f *frame, packs map[string]string) (*frame, bool) {
				if string(f.proto) == "bad" {
					bad.Store(true)
					return c.f(conn, f, packs)
				}
				return echo(conn, f, packs)
			})
			for i, text := range []string{"good", "bad", "good"} {
				ttl := 100.0
				if text == "bad" {
					ttl = c.ttl
				}
				w.send(frame{head: head{T: tMsg, ID: fmt.Sprint(i), Node: w.nodes[0], TTL: ttl}, proto: []byte(text)})
				f := w.next(tReply, tLost)
				if text == "bad" {
					if f.T != tLost || !slices.Contains(c.code, f.Code) || f.ID != "1" {
						t.Errorf("the answer is %+v", f.head)
					}
					if how := <-w.deaths; !strings.Contains(how, c.how) {
						t.Errorf("it is said to be gone for %q, want %q", how, c.how)
					}
				} else if want := fmt.Sprintf("good at 0 after %q", strings.Repeat(".", i/2)); string(f.proto) != want {
					t.Errorf("message %d is answered %q, want %q", i, f.proto, want)
				}
			}
			if !bad.Load() || w.starts.Load() != 2 {
				t.Errorf("%d workers were started", w.starts.Load())
			}
			w.done()
		})
	}
}

// A reply that has no state, for the process that had it is gone, leaves the node's as it was; how a forked child ended is told.
func TestStateIsKept(t *testing.T) {
	w := newWorld(t, 1, 1, 1, Fork, func(conn *conn, f *frame, packs map[string]string) (*frame, bool) {
		if string(f.proto) == "dies" {
			return &frame{head: head{Kept: true, Died: "it was ended by SIGSEGV"}, proto: []byte("error")}, true
		}
		return echo(conn, f, packs)
	})
	for i, c := range []struct{ text, want string }{{"first", `first at 0 after ""`}, {"dies", "error"}, {"second", `second at 0 after "."`}} {
		w.send(frame{head: head{T: tMsg, ID: fmt.Sprint(i), Node: w.nodes[0], TTL: 100}, proto: []byte(c.text)})
		if f := w.next(tReply); string(f.proto) != c.want || f.Kept || f.Died != "" {
			t.Errorf("%s is answered %+v, %q, want %q", c.text, f.head, f.proto, c.want)
		}
	}
	if how := <-w.deaths; how != "it was ended by SIGSEGV true" {
		t.Errorf("the child is said to be gone for %q", how)
	}
	if n := w.starts.Load(); n != 1 {
		t.Errorf("%d workers were started", n)
	}
	w.done()
}

// fails has a site start workers by start, in a time that stands still; it gives what the site ended with, how the workers are said to
// have ended, and how long that took.
func fails(t *testing.T, start func(n int) (Process, error)) (deaths []string, starts int, took time.Duration, err error) {
	synctest.Test(t, func(t *testing.T) {
		s := NewSite(SiteOptions{
			Name: "a", Clients: 1, Workers: 1, Isolation: Warm, OnReady: func(Readiness) {}, OnDeath: func(how string, busy bool) { deaths = append(deaths, fmt.Sprint(how, " ", busy)) },
			Start: func(int) (Process, error) {
				starts++
				return start(starts)
			},
		})
		begun := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		err = s.Run(ctx, make(chan struct{}))
		took = time.Since(begun)
	})
	return deaths, starts, took, err
}

// stillborn is a process that is gone before it has said anything.
func stillborn() (Process, error) {
	ours, theirs := net.Pipe()
	done := make(chan struct{})
	close(done)
	return Process{Conn: ours, Done: done, Exit: func() string { return "exit code 3" }, Stop: func(time.Duration) {}}, theirs.Close()
}

// A worker that ends before it is ready is replaced, with a pause and a word about it; but not for ever.
func TestWorkersThatNeverStart(t *testing.T) {
	deaths, starts, took, err := fails(t, func(int) (Process, error) { return stillborn() })
	if err == nil || !strings.Contains(err.Error(), "ended 3 times before it was ready, the last time with: exit code 3") || starts != maxDeaths {
		t.Errorf("%v after %d starts", err, starts)
	}
	if !slices.Equal(deaths, []string{"exit code 3 false", "exit code 3 false"}) {
		t.Errorf("the workers that were replaced: %q", deaths)
	}
	if took < 3*firstPause/2 {
		t.Errorf("%d starts within %s", starts, took)
	}
}

// A machine that has no room for a process at this moment may have it at the next; other reasons stay what they are.
func TestMachineWithoutRoomForWorkers(t *testing.T) {
	full := problem.Wrap(fmt.Errorf("fork: %w", syscall.EAGAIN), problem.ProgramFailed, "raise the limit", "python could not start; too many processes")
	deaths, starts, took, err := fails(t, func(int) (Process, error) { return Process{}, full })
	if err == nil || !strings.Contains(err.Error(), "could not be started, 6 times in a row (python could not start; too many processes)") || problem.CodeOf(err) != problem.ProgramFailed || starts != maxStarts {
		t.Errorf("%v after %d starts", err, starts)
	}
	if len(deaths) != maxStarts-1 || deaths[0] != "it could not be started: python could not start; too many processes false" {
		t.Errorf("the tries: %q", deaths)
	}
	if took < 3*time.Second || took > time.Minute {
		t.Errorf("%d starts within %s", starts, took)
	}
	missing := problem.Wrap(syscall.ENOENT, problem.ProgramFailed, "install it", "python could not start")
	if _, starts, _, err := fails(t, func(int) (Process, error) { return Process{}, missing }); !errors.Is(err, missing) || starts != 1 {
		t.Errorf("%v after %d starts", err, starts)
	}
	// Once is no harm: the site works on.
	w := newFaultyWorld(t, 1, 1, 1, Warm, echo, faults{start: func(n int32) error {
		if n == 1 {
			return full
		}
		return nil
	}})
	w.send(frame{head: head{T: tMsg, ID: "a", Node: w.nodes[0], TTL: 100}, proto: []byte("x")})
	if f := w.next(tReply); f.ID != "a" {
		t.Errorf("%+v", f.head)
	}
	if how := <-w.deaths; !strings.Contains(how, "could not be started") {
		t.Errorf("it is said: %s", how)
	}
	w.done()
}

// Nor is one that ends as soon as it is ready and has nothing to do.
func TestWorkersThatEndIdle(t *testing.T) {
	w := &world{t: t}
	s := NewSite(SiteOptions{
		Name: "a", Clients: 1, Workers: 1, Isolation: Warm, OnReady: func(Readiness) {}, OnDeath: func(string, bool) {},
		Start: func(int) (Process, error) {
			w.starts.Add(1)
			return w.process(func(c *conn) { w.ready(c, true) }), nil
		},
	})
	close(s.welcomed)
	if err := s.Run(t.Context(), make(chan struct{})); err == nil || !strings.Contains(err.Error(), "ended 3 times before it had a message") || w.starts.Load() != maxDeaths {
		t.Errorf("%v after %d starts", err, w.starts.Load())
	}
}

// Where each message has a process of its own, be it since the app cannot be forked, one more is started ahead; not if slots have devices.
func TestSpareWorker(t *testing.T) {
	for _, c := range []struct {
		isolation string
		noSpare   bool
		want      []int
	}{{PerMessage, false, []int{0, 1, 2}}, {Fork, false, []int{0, 1, 2}}, {PerMessage, true, []int{0, 1}}, {Fork, true, []int{0, 1}}} {
		w := &world{t: t}
		ctx, cancel := context.WithCancel(t.Context())
		started := make(chan int, 100)
		s := NewSite(SiteOptions{
			Name: "a", Clients: 2, Workers: 2, Isolation: c.isolation, NoSpare: c.noSpare, OnReady: func(Readiness) {}, OnDeath: func(string, bool) {},
			Start: func(slot int) (Process, error) {
				started <- slot
				return w.process(func(c *conn) {
					if w.ready(c, false) {
						_, _ = c.read() // the end
					}
				}), nil
			},
		})
		close(s.welcomed)
		over := make(chan struct{})
		go func() {
			defer close(over)
			_ = s.Run(ctx, make(chan struct{}))
		}()
		seen := map[int]bool{}
		for len(seen) < len(c.want) {
			seen[<-started] = true
		}
		cancel()
		<-over
		close(started)
		for slot := range started {
			seen[slot] = true
		}
		if got := slices.Sorted(maps.Keys(seen)); !slices.Equal(got, c.want) {
			t.Errorf("%+v: the slots %v had workers", c, got)
		}
	}
}

// ready is what a fake worker says until it has the app.
func (w *world) ready(c *conn, fork bool) bool {
	if c.write(frame{head: head{T: tHello, Protocol: Protocol}}) != nil {
		return false
	}
	if _, err := c.read(); err != nil {
		return false
	}
	return c.write(frame{head: head{T: tReady, Fork: &fork}}) == nil
}

// A message for a node that is gone, or goes before it has answered, is answered for; the ServerApp is told who is there.
func TestSiteLeaves(t *testing.T) {
	held := make(chan struct{})
	w := newWorld(t, 2, 1, 1, Warm, func(c *conn, f *frame, packs map[string]string) (*frame, bool) {
		if string(f.proto) == "hold" {
			close(held)
			return nil, true
		}
		return echo(c, f, packs)
	})
	w.send(frame{head: head{T: tMsg, ID: "a", Node: w.nodes[0], TTL: 100}, proto: []byte("hold")})
	<-held
	first := w.links[0]
	if first.member.nodes[0] != w.nodes[0] {
		first = w.links[1]
	}
	first.cut()
	first.member.Leave()
	var lost, nodes bool
	for !lost || !nodes {
		switch f := w.next(tLost, tNodes); {
		case f.T == tLost && f.ID == "a" && f.Code == CodeNoNode:
			lost = true
		case f.T == tNodes && slices.Equal(f.Nodes, w.nodes[1:]):
			nodes = true
		default:
			t.Fatalf("the ServerApp is told %+v", f.head)
		}
	}
	w.send(frame{head: head{T: tMsg, ID: "b", Node: w.nodes[0], TTL: 100}})
	if f := w.next(tLost); f.ID != "b" || f.Code != CodeNoNode {
		t.Errorf("a message for a node that is gone: %+v", f.head)
	}
	w.send(frame{head: head{T: tMsg, ID: "c", Node: w.nodes[1], TTL: 100}, proto: []byte("x")})
	if f := w.next(tReply); f.ID != "c" {
		t.Errorf("%+v", f.head)
	}
	w.done()
}

// One node's messages are worked on one after the other, in their order, though there are workers for all.
func TestOneMessageOfANodeAtATime(t *testing.T) {
	var now, most atomic.Int32
	w := newWorld(t, 1, 1, 3, Warm, func(c *conn, f *frame, packs map[string]string) (*frame, bool) {
		if n := now.Add(1); n > most.Load() {
			most.Store(n)
		}
		defer now.Add(-1)
		return echo(c, f, packs)
	})
	const count = 50
	for i := range count {
		w.send(frame{head: head{T: tMsg, ID: fmt.Sprint(i), Node: w.nodes[0], TTL: 100}, proto: []byte("x")})
	}
	for i := range count {
		if f := w.next(tReply); f.ID != fmt.Sprint(i) || !strings.HasSuffix(string(f.proto), fmt.Sprintf("%q", strings.Repeat(".", i))) {
			t.Fatalf("answer %d: %s %s", i, f.ID, f.proto)
		}
	}
	if most.Load() != 1 {
		t.Errorf("%d messages of one node were worked on at a time", most.Load())
	}
	w.done()
}

// What the ServerApp's process must not say ends the run with a word about it, and not the hub.
func TestServerThatSaysNonsense(t *testing.T) {
	for _, f := range []frame{
		{head: head{T: tReply, ID: "a"}},
		{head: head{T: tMsg, ID: "", Node: 1}},
		{head: head{T: tMsg, ID: "a", Pack: "s.7"}},
		{head: head{T: tMsg, ID: "a", Drop: []string{"s.7"}}},
		{head: head{T: tMsg, ID: "a", Pack: "s.1", Lens: []int64{1}, Fds: []string{"s.1"}, Drop: []string{"s.1"}}, files: []*os.File{memory(t, "x")}},
		{head: head{T: tMsg, ID: "a", Pack: "s.1", Lens: []int64{100}, Fds: []string{"s.1"}}, files: []*os.File{memory(t, "x")}},
	} {
		w := newWorld(t, 1, 1, 1, Warm, echo)
		if f.T == tMsg {
			f.Node = w.nodes[0]
		}
		w.send(f)
		if err := <-w.result; err == nil || !strings.Contains(err.Error(), "native engine's protocol") {
			t.Errorf("%+v: %v", f.head, err)
		}
	}
}

// However many sites a large pack goes to, what this process holds of it is pieces.
func TestMemoryOfLargePacks(t *testing.T) {
	const size, sites = 96 << 20, 4
	file, err := memFile("model")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	block := make([]byte, 1<<20)
	for i := range size / len(block) {
		for j := range block {
			block[j] = byte(i + j)
		}
		if _, err := file.WriteAt(block, int64(i*len(block))); err != nil {
			t.Fatal(err)
		}
	}
	fd := int(file.Fd()) // workers are other goroutines
	back := func(_ *conn, f *frame, _ map[string]string) (*frame, bool) {
		dup, err := unix.Dup(fd)
		if err != nil {
			return nil, false
		}
		return &frame{head: head{Pack: "c.1", Lens: f.Lens, Fds: []string{"c.1"}}, files: []*os.File{os.NewFile(uintptr(dup), "c.1")}}, true
	}
	w := newWorld(t, sites, 2, 1, Warm, back)
	w.unread.Store(true)
	runtime.GC()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for i, n := range w.nodes {
		f := frame{head: head{T: tMsg, ID: fmt.Sprint(i), Node: n, TTL: 1000, Pack: "s.1", Lens: []int64{size}}}
		if i == 0 {
			f.Fds, f.files = []string{"s.1"}, []*os.File{file}
		}
		w.send(f)
	}
	for range w.nodes {
		f := w.next(tReply)
		got := f.file(f.Pack)
		if got == nil || !same(got, file, size) {
			t.Fatalf("the model came back as another: %+v", f.head)
		}
		closeFiles([]*os.File{got})
		w.send(frame{head: head{T: tFree, Pack: f.Pack}})
	}
	runtime.ReadMemStats(&after)
	grown := int64(after.HeapSys) - int64(before.HeapSys)
	t.Logf("%d sites, a pack of %d MiB: %d MiB of heap, %d MiB allocated in all", sites, size>>20, grown>>20, (after.TotalAlloc-before.TotalAlloc)>>20)
	if grown > 32<<20 {
		t.Errorf("the heap has grown by %d MiB", grown>>20)
	}
	w.done()
}

// A model of which only a part comes ends the site's side: its messages would never be answered.
func TestModelThatDoesNotCome(t *testing.T) {
	s := NewSite(SiteOptions{Name: "a", Clients: 1, Workers: 1})
	defer s.arrivals.close()
	s.nodes[1] = &node{id: 1}
	if err := s.message(t.Context(), frame{head: head{T: tMsg, ID: "m", Node: 1, TTL: 100, Pack: "h.1", Lens: []int64{10}}}, 0); err != nil {
		t.Fatal(err)
	}
	b := encoded(t, frame{head: head{T: tPack, Name: "h.1", Size: 10}})
	for range packTries {
		select {
		case err := <-s.broken:
			t.Errorf("the site ends before its hub has tried often enough: %v", err)
		default:
		}
		if err := s.arrivals.take(strings.NewReader(string(b) + "half")); err == nil {
			t.Error("half a pack was taken")
		}
	}
	if err := <-s.broken; !strings.Contains(err.Error(), "take in the pack h.1 of 10 bytes: unexpected EOF") {
		t.Errorf("%v", err)
	}
	s.packs.Wait()
}
