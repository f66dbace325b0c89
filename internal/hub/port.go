package hub

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/link"
	"github.com/pergolafl/pergola/internal/logline"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/runner"
	"github.com/pergolafl/pergola/internal/sock"
)

// Limits on connections that have not said who they are, and on the links of one that has. A handshake holds 256 KiB at most,
// what crypto/tls takes for a client's certificates.
const (
	maxHandshakes    = 512
	handshakeTimeout = 10 * time.Second
	// maxPerSource is how many handshakes may be under way from one address, an IPv6 network of 64 bits counting as one: nobody can fill the
	// house alone. Further ones are closed at once; who means well comes again.
	maxPerSource = 128
	// maxLinks is how many links of one party there may be: one is in use, others may be dead and not yet known to be.
	maxLinks = 32
)

// port is the one listener: it does the handshakes and tells links from the API by what ALPN agreed on.
type port struct {
	ln   net.Listener
	conf *tls.Config
	log  *slog.Logger
	http *connListener
	join *connListener // of newcomers without a certificate
	busy chan struct{} // one token for each handshake under way
	wait time.Duration // how long one may take

	greet func(context.Context, *tls.Conn) // is told of each connection for the API; nil: nobody is

	mu      sync.Mutex
	sources map[netip.Addr]int // guarded by mu: handshakes under way
}

func newPort(ln net.Listener, conf *tls.Config, log *slog.Logger) *port {
	return &port{
		ln: ln, conf: conf, log: log, busy: make(chan struct{}, maxHandshakes), wait: handshakeTimeout, sources: map[netip.Addr]int{},
		http: &connListener{addr: ln.Addr(), conns: make(chan net.Conn), closed: make(chan struct{})},
		join: &connListener{addr: ln.Addr(), conns: make(chan net.Conn), closed: make(chan struct{})},
	}
}

// run accepts until ctx is done, and returns when all links have ended.
func (p *port) run(ctx context.Context, onLink func(*tls.Conn)) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	stop := context.AfterFunc(ctx, func() { p.ln.Close() })
	defer stop()
	for {
		// A full house makes newcomers wait in the kernel's queue.
		select {
		case p.busy <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		c, err := p.ln.Accept()
		if err != nil {
			<-p.busy
			if ctx.Err() != nil {
				return nil
			}
			if ne, ok := errors.AsType[net.Error](err); ok && ne.Timeout() {
				continue
			}
			if isShortage(err) {
				p.log.Error("no more connections can be taken", "err", err)
				select {
				case <-time.After(100 * time.Millisecond): // descriptors come back when others close
				case <-ctx.Done():
				}
				continue
			}
			return err
		}
		source := sourceOf(c)
		if !p.enter(source) {
			<-p.busy
			p.log.Debug("too many handshakes from one address", "from", c.RemoteAddr().String())
			c.Close()
			continue
		}
		wg.Go(func() {
			tc := tls.Server(link.Coalesce(c), p.conf)
			hs, cancel := context.WithTimeout(ctx, p.wait)
			err := tc.HandshakeContext(hs)
			joins := err == nil && tc.ConnectionState().NegotiatedProtocol == pki.JoinALPN
			if joins {
				// It has not said who it is, either: it counts until it is served, and waits no longer than a handshake may take.
				p.join.give(hs, tc)
			}
			cancel()
			p.leave(source)
			<-p.busy
			if err != nil {
				p.log.Debug("a handshake failed", "from", c.RemoteAddr().String(), "err", err)
				c.Close()
				return
			}
			if joins {
				return
			}
			switch tc.ConnectionState().NegotiatedProtocol {
			case link.ALPN:
				onLink(tc)
			default:
				if p.greet != nil {
					p.greet(ctx, tc)
				}
				p.http.give(ctx, tc)
			}
		})
	}
}

// sourceOf gives the address that a connection comes from, of IPv6 the network.
func sourceOf(c net.Conn) netip.Addr {
	ap, err := netip.ParseAddrPort(c.RemoteAddr().String())
	if err != nil {
		return netip.Addr{}
	}
	a := ap.Addr().Unmap().WithZone("")
	if a.Is6() {
		if n, err := a.Prefix(64); err == nil {
			return n.Addr()
		}
	}
	return a
}

func (p *port) enter(a netip.Addr) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.sources[a] >= maxPerSource {
		return false
	}
	p.sources[a]++
	return true
}

func (p *port) leave(a netip.Addr) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.sources[a]--; p.sources[a] == 0 {
		delete(p.sources, a)
	}
}

// connListener hands connections that are accepted elsewhere to an http.Server.
type connListener struct {
	addr   net.Addr
	conns  chan net.Conn
	once   sync.Once
	closed chan struct{}
}

func (l *connListener) give(ctx context.Context, c net.Conn) {
	select {
	case l.conns <- c:
	case <-l.closed:
		c.Close()
	case <-ctx.Done():
		c.Close()
	}
}

func (l *connListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *connListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *connListener) Addr() net.Addr { return l.addr }

// splice joins a site runner's link with the job's runner on this side.
func (h *Hub) splice(ctx context.Context, c *tls.Conn) {
	defer c.Close()
	id, err := pki.Expect(c.ConnectionState(), pki.KindParty)
	if err != nil {
		h.log.Warn("a link was refused", "from", c.RemoteAddr().String(), "err", err)
		return
	}
	log := h.log.With(logline.Identity, id.String(), logline.Job, id.Job, logline.Site, id.Name)
	leaf := c.ConnectionState().PeerCertificates[0]
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	// A link does not outlive its certificate: the other end comes back with the one that its agent has had renewed, and loses nothing.
	ctx, cancel := context.WithDeadline(ctx, leaf.NotAfter)
	defer cancel()
	site, _ := behind(id)
	i, leave, err := h.admit(ctx, leaf, site, func(p *problem.Error) { end(p) })
	if err != nil {
		log.Warn("a link was refused", "err", err)
		if problem.CodeOf(err) == problem.Removed { // for good, and its runner is to know
			if err := link.Refuse(c); err != nil {
				log.Info("a link's end could not be told", "err", err)
			}
		}
		return
	}
	defer leave()
	jid, err := job.ParseID(id.Job)
	if err == nil {
		err = h.isEnrolled(i, id.Name)
	}
	if err == nil {
		err = h.mayLink(ctx, jid, id.Name)
	}
	if err != nil {
		log.Warn("a link was refused", "err", err)
		return
	}
	if !h.linkUp(id) {
		log.Warn("a link was refused", "err", "it has too many")
		return
	}
	defer h.linkDown(id)
	up, err := sock.Dial(ctx, runner.LinkSocket(h.partyDir(jid)))
	if err != nil {
		log.Info("a link came before the job's runner was there", "err", err)
		return
	}
	if err := link.HandOn(up, link.Peer{Job: id.Job, Site: id.Name}, c); err != nil {
		up.Close()
		log.Warn("a link could not be handed on", "err", err)
		return
	}
	if err := link.Splice(ctx, h.measures.counted(c), up); err != nil && ctx.Err() == nil {
		log.Info("a link broke", "err", err)
	}
}

func (h *Hub) linkUp(id pki.Identity) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.links[id] >= maxLinks {
		return false
	}
	h.links[id]++
	return true
}

func (h *Hub) linkDown(id pki.Identity) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.links[id]--; h.links[id] == 0 {
		delete(h.links, id)
	}
}

// mayLink tells whether a site has a living part in a job.
func (h *Hub) mayLink(ctx context.Context, id job.ID, site string) error {
	j, err := h.db.Job(ctx, id)
	if err != nil {
		return err
	}
	return h.hasPart(ctx, j, site)
}
