package native

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/pergolafl/pergola/internal/problem"
)

// Codes of messages to which no reply will come: those of Flower from 1.30 on (flwr.app.error.ErrorCode). The Python side turns them into
// what its generation has.
const (
	CodeExpired = 3 // MESSAGE_UNAVAILABLE: the message's time is over
	CodeNoReply = 4 // REPLY_MESSAGE_UNAVAILABLE: there is a reply that cannot be had
	CodeNoNode  = 5 // NODE_UNAVAILABLE
	CodeCrashed = 8 // CLIENT_APP_CRASHED
)

// maxClients is how many nodes one site may have: each costs little, but a number from elsewhere has to end somewhere.
const maxClients = 1 << 20

// HubOptions say what a Hub tells of. None of the functions may block.
type HubOptions struct {
	Log        *slog.Logger           // nil: nothing is logged
	OnBatch    func(Batch)            // what a site's replies of one round and type had in them
	OnProgress func(what string)      // a message came or went
	OnRefused  func(site, why string) // a reply was not what it must be, and is as good as none
	OnSites    func(sites, n int)     // the sites that are there, and their nodes; told at each change
}

// Hub is the hub's side of a job: it serves the ServerApp's Grid, and passes messages between it and the sites.
type Hub struct {
	opt   HubOptions
	run   uint64
	files memFiles
	same  func(a, b *os.File, size int64) bool // tests look at how it is called
	room  *room                                // for the messages to all sites

	mu      sync.Mutex // guards the rest
	server  *outbox    // to the ServerApp's process; nil before the start and after the end
	members []*Member  // with nodes, in the order of their coming
	nodes   map[uint64]*Member
	changed chan struct{} // closed and replaced when members come and go
	pending map[string]*pending
	packs   map[string]*outPack // by the server's names
	replies map[string]*os.File // by the names that the server was told
	names   int
	batches batches
}

// pending is a message that the ServerApp waits for the answer of.
type pending struct {
	id     string
	node   uint64
	dst    uint64 // as its protobuf says it, which is how the reply has to say it; 0: it does not
	to     *Member
	typ    string
	round  int
	at     time.Time
	bytes  int64
	expiry *time.Timer
}

// outPack is a pack of the ServerApp's process.
type outPack struct {
	name  string // towards the sites
	file  *os.File
	size  int64
	lens  []int64
	own   string   // the server's name of file; those of equal packs stand for files that nobody here has
	names []string // the server's that stand for it and were not dropped
	using int      // transfers under way
	had   map[*Member]bool
}

// NewHub makes a Hub. Sites may come at once; the ServerApp's process comes with [Hub.Run].
func NewHub(opt HubOptions) *Hub {
	if opt.Log == nil {
		opt.Log = slog.New(slog.DiscardHandler)
	}
	return &Hub{
		opt: opt, run: randomID(), same: same, room: newRoom(messagesRoom), nodes: map[uint64]*Member{}, changed: make(chan struct{}),
		pending: map[string]*pending{}, packs: map[string]*outPack{}, replies: map[string]*os.File{}, batches: newBatches(opt.OnBatch),
	}
}

// randomID gives an id as Flower makes them: apps seed generators with them, so they are never small or in a row. One bit less
// than Flower's, so that every generation's field holds it.
func randomID() uint64 {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	return max(binary.LittleEndian.Uint64(b[:])>>1, 1<<32)
}

// StartApp says what a process is to run.
type StartApp struct {
	Dir    string   // the app's folder
	Cwd    string   // of the process
	Config []string // overrides of the run config, "k=v"
}

// Result is how a ServerApp ended.
type Result struct {
	OK        bool
	Error     string // "ValueError: no such column"
	Exception string // its traceback, or its name
	Seconds   float64
}

// Run has the process run the ServerApp, and serves it until it says that it is done. The error is that of ctx, or io.EOF where the process
// is gone or no longer speaks to us. It may be called once.
func (h *Hub) Run(ctx context.Context, p *Peer, app StartApp) (Result, error) {
	c := p.conn
	defer context.AfterFunc(ctx, c.close)()
	out := newOutbox(newRoom(repliesRoom))
	pushing, stop := context.WithCancel(ctx)
	var writer sync.WaitGroup
	writer.Go(func() {
		if out.push(pushing, c) != nil {
			c.close() // the reader below is to notice
		}
	})
	// Until when its messages can be made to wait. What it has left in the socket at its end is little.
	there, gone := context.WithCancel(ctx)
	writer.Go(func() {
		defer gone()
		select {
		case <-p.Done:
		case <-there.Done():
		}
	})
	defer h.end() // after the writer: what it passes on is not to be closed, and its descriptor another's, meanwhile
	defer writer.Wait()
	defer gone()
	defer stop()
	h.mu.Lock()
	// Within the lock, so that no change of the nodes comes before it.
	out.put(frame{head: head{T: tStart, Run: h.run, Task: 1, App: app.Dir, Cwd: app.Cwd, Config: app.Config, Nodes: h.nodesLocked()}})
	h.server = out
	h.mu.Unlock()
	var err error
	for err == nil {
		var f frame
		if f, err = c.read(); err != nil {
			break
		}
		switch f.T {
		case tMsg:
			// Messages alone wait, and not what makes room: the ServerApp's process takes replies whatever it sends meanwhile, so that
			// sites can answer, and take more.
			err = h.message(&f, h.room.take(there, &f))
		case tFree:
			h.mu.Lock()
			file := h.replies[f.Pack]
			delete(h.replies, f.Pack)
			h.mu.Unlock()
			h.files.put(file)
		case tDone:
			f.close()
			return Result{OK: f.OK, Error: f.Error, Exception: f.Exception, Seconds: f.Seconds}, nil
		default:
			err = errFrame("the ServerApp's process sent %q", f.T)
		}
		f.close()
	}
	if ctx.Err() != nil {
		return Result{}, context.Cause(ctx)
	}
	return Result{}, ended(err)
}

// end gives up what the ServerApp's process had.
func (h *Hub) end() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.server = nil
	for _, p := range h.pending {
		p.expiry.Stop()
	}
	clear(h.pending)
	h.batches.flush("")
	for _, p := range h.packs {
		p.names = nil
		if p.using == 0 && p.file != nil {
			_ = p.file.Close()
			p.file = nil
		}
	}
	clear(h.packs)
	for _, f := range h.replies {
		_ = f.Close()
	}
	clear(h.replies)
	h.files.close()
}

func (h *Hub) nodesLocked() []uint64 {
	out := []uint64{}
	for _, m := range h.members {
		out = append(out, m.nodes...)
	}
	return out
}

// Wait waits until the nodes of n sites are there.
func (h *Hub) Wait(ctx context.Context, n int) error {
	for {
		h.mu.Lock()
		have, changed := len(h.members), h.changed
		h.mu.Unlock()
		if have >= n {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// Sites gives how many sites' nodes are there.
func (h *Hub) Sites() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.members)
}

// message takes a message of the ServerApp, for which room was taken.
func (h *Hub) message(f *frame, took int) error {
	defer func() { h.room.give(took) }() // what of it is not passed on
	var pack *outPack
	if slices.Contains(f.Drop, f.Pack) {
		return errFrame("a message drops the pack %q that it names", f.Pack)
	}
	if f.Pack != "" {
		var err error
		if pack, err = h.pack(f); err != nil {
			return err
		}
	}
	// After the message's own pack, which may be one of them by another name, and before it goes to a site, which may take it into their files.
	for _, name := range f.Drop {
		if err := h.drop(name); err != nil {
			return err
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	to := h.nodes[f.Node]
	if to == nil {
		h.server.put(frame{head: head{T: tLost, ID: f.ID, Node: f.Node, Code: CodeNoNode}})
		return nil
	}
	if h.pending[f.ID] != nil || f.ID == "" {
		return errFrame("two messages of the ServerApp are called %q", f.ID)
	}
	h.batches.flush(f.Type)
	p := &pending{id: f.ID, node: f.Node, to: to, typ: f.Type, at: time.Now(), bytes: int64(len(f.proto))}
	_, p.dst, _ = ends(f.proto)        // what a ServerApp's process sends that is no protobuf is its own affair
	p.round, _ = strconv.Atoi(f.Group) // Flower's strategies put the round there; others, what they like
	msg := frame{head: head{T: tMsg, ID: f.ID, Node: f.Node, TTL: f.TTL, Type: f.Type, Group: f.Group}, proto: f.proto}
	if pack != nil {
		msg.Pack, msg.Lens = pack.name, f.Lens
		p.bytes += pack.size
		h.carryLocked(to, pack)
	}
	h.pending[f.ID] = p
	// From here on time counts by this machine's monotonic clock: the clocks of several have no part in it.
	p.expiry = time.AfterFunc(seconds(f.TTL), func() { h.lost(nil, f.ID, CodeExpired, "") })
	to.out.putTaken(msg, took)
	took = 0
	h.opt.progress("a message went to " + to.site)
	return nil
}

// seconds gives a duration; what is no sensible time is as good as none.
func seconds(s float64) time.Duration {
	const longest = 100 * 365 * 24 * 3600
	if !(s > 0) {
		return 0
	}
	return time.Duration(min(s, longest) * float64(time.Second))
}

// pack gives the pack that a message of the ServerApp names. One with the same bytes as another that is still held is that other: an app
// that makes its arrays anew for each client sends each site one model all the same.
func (h *Hub) pack(f *frame) (*outPack, error) {
	file := f.file(f.Pack)
	h.mu.Lock()
	held := h.packs[f.Pack]
	var alike []*outPack
	for _, p := range h.packs {
		if file != nil && slices.Equal(p.lens, f.Lens) && !slices.Contains(alike, p) {
			alike = append(alike, p)
		}
	}
	h.mu.Unlock()
	if file == nil {
		if held == nil {
			return nil, errFrame("a message names the pack %q, which nobody has sent", f.Pack)
		}
		return held, nil
	}
	size, err := sizeOf(file, f.Lens)
	if err == nil && held != nil {
		err = errFrame("two packs are called %q", f.Pack)
	}
	if err != nil {
		_ = file.Close()
		return nil, err
	}
	// Not under the lock: models are large, and others have messages. A pack that is named goes only when the ServerApp's process drops it,
	// which is heard on this very goroutine.
	equal := slices.IndexFunc(alike, func(p *outPack) bool { return h.same(p.file, file, size) })
	h.mu.Lock()
	defer h.mu.Unlock()
	if equal >= 0 {
		_ = file.Close()
		p := alike[equal]
		p.names = append(p.names, f.Pack)
		h.packs[f.Pack] = p
		return p, nil
	}
	h.names++
	p := &outPack{name: fmt.Sprintf("h.%d", h.names), file: file, size: size, lens: f.Lens, own: f.Pack, names: []string{f.Pack}, had: map[*Member]bool{}}
	h.packs[f.Pack] = p
	return p, nil
}

// carryLocked sees to it that a site has, or will have, a pack.
func (h *Hub) carryLocked(to *Member, p *outPack) {
	if p.had[to] {
		return
	}
	p.had[to] = true
	p.using++
	to.wg.Go(func() {
		if err := sendPack(to.ctx, to.link, p.name, p.file, p.size, func() {}); err != nil && to.ctx.Err() == nil {
			h.opt.Log.Warn("a model did not reach a site", "site", to.site, "err", err)
			to.leave(err)
		}
		h.mu.Lock()
		defer h.mu.Unlock()
		p.using--
		h.releaseLocked(p)
	})
}

// drop is told that the ServerApp's process will not name a pack again.
func (h *Hub) drop(name string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	p := h.packs[name]
	if p == nil {
		return errFrame("the ServerApp's process drops the pack %q, which it has not sent", name)
	}
	delete(h.packs, name)
	p.names = slices.DeleteFunc(p.names, func(n string) bool { return n == name })
	if name != p.own { // its file was closed at once
		h.server.put(frame{head: head{T: tForgot, Pack: name}})
	}
	h.releaseLocked(p)
	return nil
}

// releaseLocked lets go of a pack that nobody names or reads any more.
func (h *Hub) releaseLocked(p *outPack) {
	if len(p.names) > 0 || p.using > 0 || p.file == nil {
		return
	}
	_ = p.file.Close()
	p.file = nil
	for m := range p.had {
		m.out.put(frame{head: head{T: tForgot, Pack: p.name}})
	}
	if h.server != nil {
		h.server.put(frame{head: head{T: tForgot, Pack: p.own}})
	}
}

// take gives the message that id waits for, if it is a node's of that site; nil stands for any. It is no longer pending then.
func (h *Hub) take(from *Member, id string) *pending {
	h.mu.Lock()
	defer h.mu.Unlock()
	p := h.pending[id]
	if p == nil || from != nil && p.to != from {
		return nil
	}
	delete(h.pending, id)
	p.expiry.Stop()
	return p
}

// tell writes to the ServerApp's process, if it is there.
func (h *Hub) tell(f frame) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.server != nil {
		h.server.put(f)
	}
}

// lost answers for a message to which no reply will come.
func (h *Hub) lost(from *Member, id string, code int, reason string) {
	if p := h.take(from, id); p != nil {
		h.answer(p, code, reason)
	}
}

// answer answers for a message that was taken.
func (h *Hub) answer(p *pending, code int, reason string) {
	h.mu.Lock()
	h.batches.add(p, head{Err: &errorReply{Code: code}}, 0)
	h.mu.Unlock()
	h.tell(frame{head: head{T: tLost, ID: p.id, Node: p.node, Code: code, Reason: reason}})
}

// refuses tells why a site's reply is none to this message, "" if it is one: who answers for a node is its site alone, and an app goes by
// what the protobuf says.
func (p *pending) refuses(f *frame) string {
	if f.Node != p.node {
		return fmt.Sprintf("it is of node %d, and the message was for node %d", f.Node, p.node)
	}
	if p.dst == 0 {
		return ""
	}
	src, _, err := ends(f.proto)
	if err != nil {
		return fmt.Sprintf("it is no protobuf (%v)", err)
	}
	if src != p.dst {
		return fmt.Sprintf("it names node %d as its source, and the message was for node %d", src, p.node)
	}
	return ""
}

// reply passes a reply on once its pack, nil if it has none, is there. Until then its message waits as before, so that whatever happens
// to the pack it is answered: by its time's end, the site's, or the site's word that the pack will not come.
func (h *Hub) reply(ctx context.Context, m *Member, f *frame, pack *arrival) {
	var file *os.File
	bytes := int64(len(f.proto))
	if pack != nil {
		size, err := pack.wait(ctx, f.Pack)
		if err != nil {
			if ctx.Err() == nil {
				h.opt.Log.Warn("a reply did not come", "site", m.site, "err", err)
				h.lost(m, f.ID, CodeNoReply, "")
			}
			m.arrivals.drop(f.Pack)
			return
		}
		if file = m.arrivals.drop(f.Pack); file == nil {
			return // its site has given it up in this moment
		}
		sum, err := sizeOf(file, f.Lens)
		if err == nil && sum != size {
			err = errFrame("a pack of %d bytes is said to have %d", size, sum)
		}
		if err != nil {
			h.files.put(file)
			m.leave(err)
			return
		}
		bytes += size
	}
	p := h.take(m, f.ID)
	if p == nil { // it came too late
		h.files.put(file)
		return
	}
	if why := p.refuses(f); why != "" {
		h.files.put(file)
		h.answer(p, CodeNoReply, "")
		if h.opt.OnRefused != nil {
			h.opt.OnRefused(m.site, why)
		}
		return
	}
	h.opt.progress("a message came from " + m.site)
	out := frame{head: head{T: tReply, ID: f.ID, Node: p.node}, proto: f.proto}
	h.mu.Lock()
	h.batches.add(p, f.head, bytes)
	if file != nil {
		h.names++
		out.Pack, out.Lens = fmt.Sprintf("r.%d", h.names), f.Lens
		out.Fds, out.files = []string{out.Pack}, []*os.File{file}
		if h.server == nil {
			_ = file.Close()
		} else {
			h.replies[out.Pack] = file
		}
	}
	server := h.server
	h.mu.Unlock()
	if server != nil {
		server.putWait(ctx, out) // the site waits if the ServerApp is slow to take replies
	}
}

func (o HubOptions) progress(what string) {
	if o.OnProgress != nil {
		o.OnProgress(what)
	}
}

// Member is one site's link.
type Member struct {
	hub      *Hub
	site     string
	link     Opener
	arrivals *arrivals
	ctx      context.Context //nolint:containedctx // that of the link, which this is
	end      context.CancelCauseFunc
	wg       sync.WaitGroup
	out      *outbox // to the control stream: a slow site holds up nobody else while there is room for what waits

	// The hub's lock guards the rest.
	nodes []uint64
	gone  bool
}

// Join makes a Member of a site's link. Call Leave at its end.
func (h *Hub) Join(ctx context.Context, site string, link Opener) *Member {
	ctx, end := context.WithCancelCause(ctx)
	return &Member{hub: h, site: site, link: link, arrivals: newArrivals(&h.files), ctx: ctx, end: end, out: newOutbox(h.room)}
}

var errLeft = errors.New("the site's link has ended")

// Leave gives up the site's nodes: what they were to answer is answered as lost. It waits for what is under way.
func (m *Member) Leave() {
	m.leave(errLeft)
	m.wg.Wait()
	m.arrivals.close()
}

func (m *Member) leave(err error) {
	h := m.hub
	h.mu.Lock()
	if m.gone {
		h.mu.Unlock()
		return
	}
	m.gone = true
	m.end(err)
	var lost []string
	for id, p := range h.pending {
		if p.to == m {
			lost = append(lost, id)
		}
	}
	had := len(m.nodes) > 0
	for _, n := range m.nodes {
		delete(h.nodes, n)
	}
	m.out.close()
	h.members = slices.DeleteFunc(h.members, func(o *Member) bool { return o == m })
	for _, p := range h.packs {
		delete(p.had, m)
	}
	if had {
		h.changedLocked()
	}
	h.mu.Unlock()
	for _, id := range lost {
		h.lost(m, id, CodeNoNode, "")
	}
}

// changedLocked tells everybody that the nodes are others now.
func (h *Hub) changedLocked() {
	close(h.changed)
	h.changed = make(chan struct{})
	nodes := h.nodesLocked()
	if h.server != nil {
		h.server.put(frame{head: head{T: tNodes, Nodes: nodes}})
	}
	if h.opt.OnSites != nil {
		h.opt.OnSites(len(h.members), len(nodes))
	}
}

// Serve handles one stream that the site has opened, until it ends.
func (m *Member) Serve(target string, s Stream) error {
	defer s.Close()
	defer context.AfterFunc(m.ctx, func() { _ = s.Reset() })()
	switch target {
	case PackTarget:
		return m.arrivals.accept(s)
	case Target:
		return m.control(newConn(s))
	}
	return problem.New(problem.Internal, "", "no target is called %q", target)
}

// control serves the control stream.
func (m *Member) control(c *conn) error {
	f, err := c.read()
	if err != nil {
		return err
	}
	if f.T != tHello {
		return errFrame("a site begins with %q", f.T)
	}
	if f.Protocol != Protocol {
		return problem.New(problem.Version, "install the same version of pergola at both ends", "the site speaks version %d of the native engine's protocol, the hub version %d", f.Protocol, Protocol)
	}
	if f.Clients < 1 || f.Clients > maxClients {
		return errFrame("a site with %d nodes", f.Clients)
	}
	h := m.hub
	h.mu.Lock()
	if m.gone || m.nodes != nil {
		h.mu.Unlock()
		return errFrame("a second beginning of one site")
	}
	for range f.Clients {
		id := randomID()
		for h.nodes[id] != nil {
			id = randomID()
		}
		m.nodes = append(m.nodes, id)
		h.nodes[id] = m
	}
	m.out.put(frame{head: head{T: tWelcome, Run: h.run, Nodes: m.nodes}})
	h.members = append(h.members, m)
	h.changedLocked()
	h.mu.Unlock()
	m.wg.Go(func() {
		if err := m.out.push(m.ctx, c); err != nil {
			m.leave(err)
		}
	})
	for {
		f, err := c.read()
		if err != nil {
			m.leave(err)
			return err
		}
		switch f.T {
		case tReply:
			if f.Pack == "" {
				h.reply(m.ctx, m, &f, nil)
				continue
			}
			pack := m.arrivals.of(f.Pack) // now: the word that it will not come may be next
			m.wg.Go(func() { h.reply(m.ctx, m, &f, pack) })
		case tLost:
			if f.Pack != "" {
				h.files.put(m.arrivals.drop(f.Pack))
			}
			h.lost(m, f.ID, f.Code, f.Reason)
		default:
			err := errFrame("a site sent %q", f.T)
			m.leave(err)
			return err
		}
	}
}
