package native

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/cenkalti/backoff/v5"
	"golang.org/x/sync/errgroup"

	"github.com/pergolafl/pergola/internal/problem"
)

// Isolations are what one message's code may see of the code of the one before.
const (
	Warm       = "warm"    // a process serves many messages
	Fork       = "fork"    // a process forks a child for each message
	PerMessage = "process" // a process serves one message
)

// maxDeaths is how many times in a row a worker may die before it is ready, or soon after that without having had a message. maxStarts is
// the same where the machine had no process or memory for one: that is others' doing and passes. Tries are firstPause apart, then twice as
// long each time, all of maxStarts about 8 s.
const (
	maxDeaths  = 3
	maxStarts  = 6
	soon       = time.Minute
	firstPause = 250 * time.Millisecond
	lastPause  = 5 * time.Second
)

// SiteOptions say what a site runs. None of the functions may block.
type SiteOptions struct {
	Name       string
	Clients    int                             // nodes of this site, 1 at least
	NodeConfig func(client int) any            // of the site's nodes from 0, as JSON
	Workers    int                             // processes that work at the same time, 1 at least
	Isolation  string                          // Warm, Fork or PerMessage
	App        StartApp                        // what the workers run
	Start      func(slot int) (Process, error) // starts a worker's process; slots count from 0
	NoSpare    bool                            // slots have devices of their own: none is started ahead of its turn on those of another
	Link       Opener                          // to the hub's runner
	Log        *slog.Logger                    // nil: nothing is logged
	OnReady    func(Readiness)                 // once, when the first worker is ready
	OnDeath    func(how string, busy bool)
	OnProgress func(what string)
}

// Readiness is what the first worker says of itself.
type Readiness struct {
	Flwr       string
	Error      string // why the ClientApp could not be loaded; each message is answered with that
	UnsafeFork string // why the app's process cannot be forked; the site takes a process for each message then
}

// Site is a site's side of a job: workers with the ClientApp loaded, and its nodes' state.
type Site struct {
	opt      SiteOptions
	files    memFiles
	arrivals *arrivals
	prefix   string // of this site's packs, which no other attempt has used
	link     *conn
	welcomed chan struct{} // closed when run and nodes are known
	run      uint64
	room     *room         // for the messages that are not done
	limit    chan struct{} // as many tokens as messages may be worked on at a time
	spare    func()        // starts one slot more, once: its worker is started ahead where each serves one message
	packs    sync.WaitGroup
	broken   chan error // of capacity 1: a model did not come, so that its messages would never be answered

	mu       sync.Mutex // guards the rest
	isolate  string
	nodes    map[uint64]*node
	runnable []*node
	work     chan struct{} // closed and replaced when a node becomes runnable
	taken    int           // tasks, for their numbers
	ready    bool
	names    int
	refs     map[string]int  // by pack: messages that name it and are not done
	forgot   map[string]bool // packs that the hub will not name again
}

// node is one client.
type node struct {
	id     uint64
	config json.RawMessage
	state  []byte
	spack  *statePack
	queue  []*task
	busy   bool // a worker has its message
	listed bool // among the runnable
}

// statePack is a file with arrays of a node's state, and whose it is.
type statePack struct {
	file  *os.File
	lens  []int64
	name  string // the writer's
	owner *worker
}

// task is one message.
type task struct {
	frame
	node *node
	took int       // of the room
	due  time.Time // when its time is over
	here bool      // its pack has come
	file *os.File  // the pack's
}

// NewSite makes a Site.
func NewSite(opt SiteOptions) *Site {
	if opt.Log == nil {
		opt.Log = slog.New(slog.DiscardHandler)
	}
	s := &Site{
		opt: opt, prefix: rand.Text()[:8], welcomed: make(chan struct{}), broken: make(chan error, 1), isolate: opt.Isolation,
		room: newRoom(messagesRoom), limit: make(chan struct{}, opt.Workers), nodes: map[uint64]*node{}, work: make(chan struct{}), refs: map[string]int{}, forgot: map[string]bool{},
	}
	s.arrivals = newArrivals(&s.files)
	return s
}

// Accept handles one stream that the hub's runner has opened.
func (s *Site) Accept(ctx context.Context, target string, st Stream) error {
	defer st.Close()
	defer context.AfterFunc(ctx, func() { _ = st.Reset() })()
	if target != PackTarget {
		return problem.New(problem.Internal, "", "no target is called %q", target)
	}
	return s.arrivals.accept(st)
}

// Run starts the workers, joins the hub and works until ctx is done, the control stream ends, or workers cannot be had. No process is
// left when it returns. linked is closed when streams can be opened: workers start before that.
func (s *Site) Run(ctx context.Context, linked <-chan struct{}) error {
	g, gctx := errgroup.WithContext(ctx)
	s.spare = sync.OnceFunc(func() {
		if !s.opt.NoSpare {
			g.Go(func() error { return s.slot(gctx, s.opt.Workers) })
		}
	})
	for i := range s.opt.Workers {
		g.Go(func() error { return s.slot(gctx, i) })
	}
	if s.opt.Isolation == PerMessage {
		s.spare()
	}
	g.Go(func() error {
		select {
		case <-linked:
		case <-gctx.Done():
			return context.Cause(gctx)
		}
		return s.control(gctx)
	})
	g.Go(func() error {
		select {
		case err := <-s.broken:
			return err
		case <-gctx.Done():
			return context.Cause(gctx)
		}
	})
	err := g.Wait()
	s.packs.Wait()
	s.arrivals.close()
	s.files.close()
	for _, n := range s.nodes {
		if n.spack != nil {
			_ = n.spack.file.Close()
		}
	}
	return err
}

// control joins the hub, and takes its messages.
func (s *Site) control(ctx context.Context) error {
	st, err := s.opt.Link.Open(ctx, Target)
	if err != nil {
		return err
	}
	defer st.Close()
	defer context.AfterFunc(ctx, func() { _ = st.Reset() })()
	c := newConn(st)
	err = c.write(frame{head: head{T: tHello, Protocol: Protocol, Site: s.opt.Name, Clients: s.opt.Clients, Isolation: s.opt.Isolation}})
	if err == nil {
		err = s.welcome(c)
	}
	for err == nil {
		var f frame
		if f, err = c.read(); err != nil {
			break
		}
		switch f.T {
		case tMsg:
			err = s.message(ctx, f, s.room.take(ctx, &f))
		case tForgot:
			s.mu.Lock()
			s.forgot[f.Pack] = true
			s.releaseLocked(f.Pack)
			s.mu.Unlock()
		default:
			err = errFrame("the hub sent %q", f.T)
		}
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return fmt.Errorf("the control stream to the hub: %w", ended(err))
}

func (s *Site) welcome(c *conn) error {
	f, err := c.read()
	if err != nil {
		return err
	}
	if f.T != tWelcome || len(f.Nodes) != s.opt.Clients {
		return errFrame("the hub answered %q with %d nodes", f.T, len(f.Nodes))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, id := range f.Nodes {
		config, err := json.Marshal(s.opt.NodeConfig(i))
		if err != nil {
			return err
		}
		s.nodes[id] = &node{id: id, config: config}
	}
	s.link, s.run = c, f.Run
	close(s.welcomed)
	return nil
}

// message queues a message of the hub, for which room was taken, for its node.
func (s *Site) message(ctx context.Context, f frame, took int) error {
	s.mu.Lock()
	n := s.nodes[f.Node]
	if n == nil {
		s.mu.Unlock()
		return errFrame("a message for the node %d, which is not here", f.Node)
	}
	t := &task{frame: f, node: n, took: took, due: time.Now().Add(seconds(f.TTL)), here: f.Pack == ""}
	n.queue = append(n.queue, t)
	if t.here {
		s.listLocked(n)
		s.mu.Unlock()
		return nil
	}
	s.refs[f.Pack]++
	s.mu.Unlock()
	pack := s.arrivals.of(f.Pack)
	// How many wait here is how many messages are under way to this site.
	s.packs.Go(func() {
		if _, err := pack.wait(ctx, f.Pack); err != nil {
			if ctx.Err() == nil { // or else the link's end
				select {
				case s.broken <- err:
				default: // it is told already
				}
			}
			return
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		t.file, t.here = pack.file, true
		s.listLocked(n)
	})
	return nil
}

// listLocked makes a node runnable if it is.
func (s *Site) listLocked(n *node) {
	if n.busy || n.listed || len(n.queue) == 0 || !n.queue[0].here {
		return
	}
	n.listed = true
	s.runnable = append(s.runnable, n)
	close(s.work)
	s.work = make(chan struct{})
}

// next takes the message that has waited longest, of a node of which no other is worked on.
func (s *Site) next() (*task, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.runnable) > 0 {
		n := s.runnable[0]
		s.runnable = s.runnable[1:]
		n.listed = false
		t := n.queue[0]
		n.queue[0] = nil
		n.queue = n.queue[1:]
		if !time.Now().Before(t.due) { // the hub has said so
			s.doneLocked(t)
			continue
		}
		n.busy = true
		s.taken++
		t.Task = uint64(s.taken) + 1
		return t, nil
	}
	return nil, s.work
}

// done makes way for the node's next message.
func (s *Site) done(t *task) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t.node.busy = false
	s.doneLocked(t)
}

func (s *Site) doneLocked(t *task) {
	if t.Pack != "" {
		s.refs[t.Pack]--
		s.releaseLocked(t.Pack)
	}
	t.proto = nil
	s.room.give(t.took)
	s.listLocked(t.node)
}

// releaseLocked lets go of a pack that no message names any more.
func (s *Site) releaseLocked(name string) {
	if s.refs[name] > 0 || !s.forgot[name] {
		return
	}
	delete(s.refs, name)
	delete(s.forgot, name)
	s.files.put(s.arrivals.drop(name))
}

// isolation gives what is done between messages.
func (s *Site) isolation() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.isolate
}

// slot keeps one worker after the other.
func (s *Site) slot(ctx context.Context, i int) error {
	pauses := backoff.NewExponentialBackOff()
	pauses.InitialInterval, pauses.MaxInterval, pauses.Multiplier = firstPause, lastPause, 2
	for deaths := 0; ; {
		w, err := s.hire(ctx, i)
		worked := false
		if err == nil {
			hired := time.Now()
			err = s.employ(ctx, w)
			worked = w.worked || time.Since(hired) > soon
			// The next one need not wait for that. One that has served its message has things to do at its exit, as under Flower.
			patience := endPatience
			if err == nil && ctx.Err() == nil {
				patience = exitPatience
			}
			s.packs.Go(func() { w.fire(ctx, patience) })
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		var d *death
		if err != nil && !errors.As(err, &d) && !errors.Is(err, errAgain) {
			return err
		}
		if d == nil || d.busy || worked {
			deaths = 0
		} else {
			deaths++
		}
		if d != nil && deaths >= d.most() {
			return s.given(d, deaths)
		}
		if d != nil {
			s.opt.OnDeath(d.how, d.busy)
		}
		if errors.Is(err, errAgain) {
			s.spare()
		}
		if deaths == 0 {
			pauses.Reset()
			continue
		}
		t := time.NewTimer(pauses.NextBackOff())
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return context.Cause(ctx)
		}
	}
}

// given is the problem of a slot that is given up.
func (s *Site) given(d *death, deaths int) error {
	if d.start != nil {
		next := "see what takes the machine's memory or processes, or use fewer workers"
		if p, ok := errors.AsType[*problem.Error](d.start); ok {
			next = p.Next
		}
		return problem.Wrap(d.start, problem.ProgramFailed, next, "a worker of %s could not be started, %d times in a row (%s)", s.opt.Name, deaths, told(d.start))
	}
	when := "before it was ready"
	if d.ready {
		when = "before it had a message"
	}
	return problem.New(problem.ProgramFailed, "look into client_app_log.txt", "a worker of %s ended %d times %s, the last time with: %s", s.opt.Name, deaths, when, d.how)
}

// death is the error of a worker that is gone, or was ended for what it did.
type death struct {
	how         string
	busy, ready bool
	start       error // it was never there: why not
}

// told gives of an error what may be told to others.
func told(err error) string {
	if p, ok := errors.AsType[*problem.Error](err); ok {
		return p.Msg
	}
	return err.Error()
}

// most is how many such in a row a slot is given up for.
func (d *death) most() int {
	if d.start != nil {
		return maxStarts
	}
	return maxDeaths
}

// passes tells whether what kept a process from being started may be over in a moment: the machine has no room for it.
func passes(err error) bool {
	for _, e := range []error{syscall.EAGAIN, syscall.ENOMEM, syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.EINTR, syscall.ETXTBSY} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

func (d *death) Error() string { return "the worker ended: " + d.how }

// worker is one process that has greeted.
type worker struct {
	*Peer
	isolation string
	out       *outbox
	frames    chan frame    // what it says
	gone      chan struct{} // closed when it says no more; err is set then
	err       error
	ended     context.CancelFunc
	wg        sync.WaitGroup
	has       map[string]bool // packs that it holds
	sent      chan struct{}   // of capacity 1: one reply's pack is on its way at a time
	worked    bool            // it was given a message
}

// hire starts a worker and has it load the app.
func (s *Site) hire(ctx context.Context, slot int) (*worker, error) {
	p, err := s.opt.Start(slot)
	if err != nil {
		if passes(err) {
			err = &death{how: "it could not be started: " + told(err), start: err}
		}
		return nil, err
	}
	peer, err := Greet(ctx, p)
	if err != nil {
		_ = p.Conn.Close()
		if _, told := errors.AsType[*problem.Error](err); told || ctx.Err() != nil {
			p.Stop(0)
			return nil, err
		}
		awaitEnd(p)
		return nil, &death{how: p.Exit()}
	}
	living, end := context.WithCancel(context.WithoutCancel(ctx))
	w := &worker{
		Peer: peer, isolation: s.isolation(), out: newOutbox(nil), frames: make(chan frame), gone: make(chan struct{}), ended: end,
		has: map[string]bool{}, sent: make(chan struct{}, 1),
	}
	w.wg.Go(func() { w.read(living) })
	w.wg.Go(func() {
		if w.out.push(living, w.conn) != nil {
			w.conn.close() // the reader is to notice
		}
	})
	if err := s.prepare(ctx, w); err != nil {
		w.fire(ctx, endPatience)
		return nil, err
	}
	return w, nil
}

// errAgain is that a worker is to be replaced by one with another isolation.
var errAgain = errors.New("again")

// prepare has a worker load the app once the run is known.
func (s *Site) prepare(ctx context.Context, w *worker) error {
	select {
	case <-s.welcomed:
	case <-w.gone:
		return &death{how: w.how()}
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	app := s.opt.App
	w.out.put(frame{head: head{T: tStart, Run: s.run, App: app.Dir, Cwd: app.Cwd, Config: app.Config, Isolation: w.isolation}})
	select {
	case f := <-w.frames:
		f.close()
		if f.T != tReady {
			return &death{how: w.kill(fmt.Sprintf("it said %q before it was ready", f.T))}
		}
		return s.readied(w, f.head)
	case <-w.gone:
		return &death{how: w.how()}
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// readied takes what the worker says of itself.
func (s *Site) readied(w *worker, h head) error {
	s.mu.Lock()
	first := !s.ready
	s.ready = true
	unsafe := w.isolation == Fork && h.Fork != nil && !*h.Fork
	if unsafe {
		s.isolate = PerMessage
	}
	s.mu.Unlock()
	if first {
		r := Readiness{Flwr: w.Flwr, Error: h.Error}
		if unsafe {
			r.UnsafeFork = h.Why
			if r.UnsafeFork == "" {
				r.UnsafeFork = "it does not say why"
			}
		}
		s.opt.OnReady(r)
	}
	if unsafe {
		return errAgain
	}
	return nil
}

// employ gives the worker messages until it is gone. Nil: it has done what a worker does that serves one message.
func (s *Site) employ(ctx context.Context, w *worker) error {
	for {
		select {
		case s.limit <- struct{}{}:
		case f := <-w.frames:
			if err := w.idle(f); err != nil {
				return err
			}
			continue
		case <-w.gone:
			return &death{how: w.how(), ready: true}
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		t, err := s.await(ctx, w)
		if err == nil {
			w.worked = true
			err = s.serve(ctx, w, t)
			s.done(t)
		}
		<-s.limit
		if err != nil {
			return err
		}
		if w.isolation == PerMessage {
			return nil
		}
	}
}

// await waits for a message.
func (s *Site) await(ctx context.Context, w *worker) (*task, error) {
	for {
		t, more := s.next()
		if t != nil {
			return t, nil
		}
		select {
		case <-more:
		case f := <-w.frames:
			if err := w.idle(f); err != nil {
				return nil, err
			}
		case <-w.gone:
			return nil, &death{how: w.how(), ready: true}
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// idle takes what a worker says while it has no message.
func (w *worker) idle(f frame) error {
	defer f.close()
	if f.T != tForgot {
		return &death{how: w.kill(fmt.Sprintf("it sent %q while it had no message", f.T)), ready: true}
	}
	delete(w.has, f.Pack)
	return nil
}

// serve has the worker answer a message, or answers for it if it does not.
func (s *Site) serve(ctx context.Context, w *worker, t *task) error {
	f, a, err := w.answer(ctx, t)
	if err != nil {
		var d *death
		if errors.As(err, &d) {
			s.opt.Log.Warn("a worker is gone", "how", d.how)
			if e := s.link.write(frame{head: head{T: tLost, ID: t.ID, Node: t.node.id, Code: CodeCrashed}}); e != nil && ctx.Err() == nil {
				return e
			}
		}
		return err
	}
	if !f.Kept {
		t.node.keep(f.state, a.state)
	}
	if f.Died != "" {
		s.opt.OnDeath(f.Died, true)
	}
	if s.opt.OnProgress != nil {
		s.opt.OnProgress("a message was answered")
	}
	out := frame{head: f.head, proto: f.proto}
	out.SPack, out.SLens, out.Slen, out.Fds, out.Kept, out.Died, out.Node = "", nil, 0, nil, false, "", t.node.id
	if a.file == nil {
		return s.link.write(out)
	}
	s.mu.Lock()
	s.names++
	out.Pack = fmt.Sprintf("%s.%d", s.prefix, s.names)
	s.mu.Unlock()
	// The worker takes the next message meanwhile; before its next pack goes, this one is gone.
	select {
	case w.sent <- struct{}{}:
	case <-ctx.Done():
		_ = a.file.Close()
		return context.Cause(ctx)
	}
	if err := s.link.write(out); err != nil {
		<-w.sent
		_ = a.file.Close()
		return err
	}
	s.packs.Go(func() {
		sent := sync.OnceFunc(func() { <-w.sent })
		defer sent()
		defer a.file.Close()
		if err := sendPack(ctx, s.opt.Link, out.Pack, a.file, a.size, sent); err != nil {
			if ctx.Err() != nil { // or else the link lives, and somebody waits for this
				return
			}
			s.opt.Log.Warn("a reply did not reach the hub", "err", err)
			// A write that fails is the control stream's end, of which its reader tells.
			_ = s.link.write(frame{head: head{T: tLost, ID: t.ID, Node: t.node.id, Code: CodeNoReply, Pack: out.Pack}})
		}
		w.out.put(frame{head: head{T: tFree, Pack: f.Pack}})
	})
	return nil
}

// attached is what came beside a reply.
type attached struct {
	file  *os.File // of its pack; nil if it has none
	size  int64
	state *statePack // nil if the state has none
}

// answer has the worker answer a message, and takes what comes beside the reply; a reply that is not right is as bad as none.
func (w *worker) answer(ctx context.Context, t *task) (f frame, a attached, err error) {
	if f, err = w.reply(ctx, t); err != nil {
		return f, a, err
	}
	defer f.close()
	take := func(name string, lens []int64) (*os.File, int64) {
		file := f.file(name)
		if name == "" || err != nil {
			return nil, 0
		}
		if file == nil {
			err = errFrame("a reply names the pack %q, which has not come", name)
			return nil, 0
		}
		size, e := sizeOf(file, lens)
		if err = e; e != nil {
			_ = file.Close()
			return nil, 0
		}
		return file, size
	}
	a.file, a.size = take(f.Pack, f.Lens)
	if file, _ := take(f.SPack, f.SLens); file != nil {
		a.state = &statePack{file: file, lens: f.SLens, name: f.SPack, owner: w}
	}
	if err != nil {
		closeFiles([]*os.File{a.file})
		return f, attached{}, &death{how: w.kill(problem.From(err).Msg), ready: true, busy: true}
	}
	return f, a, nil
}

// reply has the worker answer a message.
func (w *worker) reply(ctx context.Context, t *task) (frame, error) {
	n := t.node
	msg := frame{head: head{
		T: tMsg, ID: t.ID, Node: n.id, Task: t.Task, TTL: t.TTL, Type: t.Type, Group: t.Group, NodeConfig: n.config, Pack: t.Pack, Lens: t.Lens,
	}, proto: t.proto, state: n.state}
	if t.Pack != "" {
		if _, err := sizeOf(t.file, t.Lens); err != nil {
			return frame{}, err
		}
		if !w.has[t.Pack] {
			w.has[t.Pack] = true
			msg.Fds, msg.files = append(msg.Fds, t.Pack), append(msg.files, t.file)
		}
	}
	if p := n.spack; p != nil {
		msg.SPack, msg.SLens = "state."+p.name, p.lens
		msg.Fds, msg.files = append(msg.Fds, msg.SPack), append(msg.files, p.file)
	}
	die := func(how string) (frame, error) { return frame{}, &death{how: how, busy: true, ready: true} }
	over := time.NewTimer(time.Until(t.due))
	defer over.Stop()
	w.out.put(msg)
	for {
		select {
		case f := <-w.frames:
			switch {
			case f.T == tForgot:
				f.close()
				delete(w.has, f.Pack)
				continue
			case f.T == tReply && f.ID == t.ID:
				return f, nil
			}
			f.close()
			return die(w.kill(fmt.Sprintf("it answered a message with %q", f.T)))
		case <-w.gone:
			return die(w.how())
		case <-over.C:
			return die(w.kill("it did not answer within the message's time and was ended"))
		case <-ctx.Done():
			return frame{}, context.Cause(ctx)
		}
	}
}

// keep takes a node's new state. Whoever wrote the old one may write over it.
func (n *node) keep(state []byte, pack *statePack) {
	if old := n.spack; old != nil {
		_ = old.file.Close()
		old.owner.out.put(frame{head: head{T: tFree, Pack: old.name}})
	}
	n.state, n.spack = state, pack
}

// read hands on what the worker says.
func (w *worker) read(ctx context.Context) {
	defer close(w.gone)
	for {
		f, err := w.conn.read()
		if err != nil {
			w.err = err
			return
		}
		select {
		case w.frames <- f:
		case <-ctx.Done():
			f.close()
			return
		}
	}
}

// how ends what is left of a worker that says no more, and tells how it ended.
func (w *worker) how() string {
	if p, ok := errors.AsType[*problem.Error](w.err); ok { // garbage
		return w.kill(p.Msg)
	}
	awaitEnd(w.Process)
	return w.Exit()
}

// awaitEnd lets a process that has closed its socket end by itself, so that it is known how it did.
func awaitEnd(p Process) {
	t := time.NewTimer(endPatience)
	defer t.Stop()
	select {
	case <-p.Done:
	case <-t.C:
		p.Stop(0)
	}
}

// endPatience is how long a process has between the end of its socket and the kill.
const endPatience = 2 * time.Second

// exitPatience is how long one has that has served its one message.
const exitPatience = time.Minute

// kill ends a worker for a reason, which it gives back.
func (w *worker) kill(why string) string {
	w.Stop(0)
	return why
}

// fire ends a worker in order: it sees the end of its socket.
func (w *worker) fire(ctx context.Context, patience time.Duration) {
	w.ended()
	w.conn.close()
	t := time.NewTimer(patience)
	defer t.Stop()
	select {
	case <-w.Done:
	case <-t.C:
		w.Stop(endPatience)
	case <-ctx.Done():
		select {
		case <-w.Done:
		case <-time.After(min(patience, endPatience)):
			w.Stop(endPatience)
		}
	}
	w.wg.Wait()
}
