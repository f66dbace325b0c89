package hub

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net"
	"net/http"
	"sync"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/store"
)

// Who was removed, or has enrolled again, is out within 5 s: what it has open is looked at whenever the store has changed, but not more
// often than looksPause apart, and at least every looksLongest in case nobody told. A connection lives on for farewell, so that
// its calls can say why they end.
const (
	looksPause   = 500 * time.Millisecond
	looksLongest = 3 * time.Second
	farewell     = time.Second
)

// guests are the calls, connections and links that sites and users have open, and who is no longer let in. The zero value is ready.
type guests struct {
	mu    sync.Mutex // guards the rest
	open  map[*guest]struct{}
	conns map[net.Conn]*guest
	gone  map[string]time.Time // sites that were removed, and when
}

// guest is something open.
type guest struct {
	who      pki.Identity // a site or a user
	enrolled time.Time    // by which enrolment it came
	end      func(*problem.Error)
}

func (g *guests) add(x *guest) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.open == nil {
		g.open = map[*guest]struct{}{}
	}
	g.open[x] = struct{}{}
}

func (g *guests) remove(x *guest) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.open, x)
}

// closed forgets a connection.
func (g *guests) closed(c net.Conn) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if x := g.conns[c]; x != nil {
		delete(g.open, x)
		delete(g.conns, c)
	}
}

// removed tells whether a site was removed.
func (g *guests) removed(site string) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return !g.gone[site].IsZero()
}

// behind gives the site or user for whom an identity stands: a party for its site.
func behind(id pki.Identity) (who pki.Identity, ok bool) {
	switch id.Kind {
	case pki.KindSite, pki.KindUser:
		return id, true
	case pki.KindParty:
		return pki.Identity{Kind: pki.KindSite, Name: id.Name}, true
	}
	return pki.Identity{}, false
}

// verdict refuses somebody who was removed, or whose certificate is of an older enrolment than its last; nil: it may come.
func verdict(i store.Identity, who pki.Identity, enrolled time.Time) *problem.Error {
	switch {
	case !i.Removed.IsZero():
		return problem.New(problem.Removed, pki.ComeBack(who), "%s was removed from the hub, at %s", who, i.Removed.UTC().Format(time.RFC3339))
	case enrolled.Before(i.Enrolled):
		return problem.New(problem.Superseded, pki.ComeBack(who), "%s has enrolled again, at %s, which ended the certificate that it had before", who, i.Enrolled.UTC().Format(time.RFC3339))
	}
	return nil
}

// admit registers something open, so that end is called, once or more, when whoever has it is no longer let in. The error says why it is
// not let in now; else leave is to be called when it is not open any more.
func (h *Hub) admit(ctx context.Context, leaf *x509.Certificate, who pki.Identity, end func(*problem.Error)) (i store.Identity, leave func(), err error) {
	if p := pki.Over(leaf, time.Now()); p != nil {
		return i, nil, p
	}
	// Registered first and looked at then, so that a removal in between is not missed.
	x := &guest{who: who, enrolled: pki.Enrolled(leaf), end: end}
	h.guests.add(x)
	i, err = h.db.Identity(ctx, string(who.Kind), who.Name)
	if problem.CodeOf(err) == problem.NotFound {
		i, err = store.Identity{Kind: string(who.Kind), Name: who.Name}, nil
		if who.Kind == pki.KindUser { // so that it is listed; whoever has the authority's key can make users without a token
			i.Enrolled = x.enrolled
			err = h.db.Introduce(ctx, i)
		}
	}
	if err == nil {
		if p := verdict(i, who, x.enrolled); p != nil {
			err = p
		}
	}
	if err != nil {
		h.guests.remove(x)
		return i, nil, err
	}
	return i, func() { h.guests.remove(x) }, nil
}

// callerKey is under which a call's context has who calls, as the store knows it.
type callerKey struct{}

// gate lets calls through of sites and users that are let in, and ends them when that changes, or when their certificate is over.
func (h *Hub) gate(next connect.ServerFunc) connect.ServerFunc {
	return func(ctx context.Context, spec connect.Spec, stream connect.ServerStream) error {
		info, ok := connecthttp.ServerInfoForContext(ctx)
		if !ok || info.TLS() == nil || len(info.TLS().PeerCertificates) == 0 {
			return next(ctx, spec, stream) // the method refuses it
		}
		leaf := info.TLS().PeerCertificates[0]
		id, err := pki.CertIdentity(leaf)
		if err != nil {
			return err
		}
		who, ok := behind(id)
		if !ok {
			return next(ctx, spec, stream) // a hub: the method refuses it
		}
		ctx, end := context.WithCancelCause(ctx)
		defer end(nil)
		ctx, cancel := context.WithDeadline(ctx, leaf.NotAfter)
		defer cancel()
		i, leave, err := h.admit(ctx, leaf, who, func(p *problem.Error) { end(p) })
		if err != nil {
			return err
		}
		defer leave()
		err = next(context.WithValue(ctx, callerKey{}, i), spec, stream)
		if err != nil {
			if p, ok := context.Cause(ctx).(*problem.Error); ok { //nolint:errorlint // it is what was given to end
				return p
			}
			if p := pki.Over(leaf, time.Now()); p != nil {
				return p
			}
		}
		return err
	}
}

// gatePage is gate for what is no call of the API. Pages are short: they are not ended in the middle.
func (h *Hub) gatePage(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.TLS != nil && len(r.TLS.PeerCertificates) > 0 {
			leaf := r.TLS.PeerCertificates[0]
			id, err := pki.CertIdentity(leaf)
			if who, ok := behind(id); err == nil && ok {
				var leave func()
				switch _, leave, err = h.admit(r.Context(), leaf, who, func(*problem.Error) {}); {
				case err == nil:
					defer leave()
				case problem.CodeOf(err) == problem.Unavailable:
					err = nil // the pages are there to tell just that
				}
			}
			if err != nil {
				p := problem.From(err)
				http.Error(w, p.Msg, problem.Codes[p.Code].HTTP)
				return
			}
		}
		next.ServeHTTP(w, r)
	})
}

// greet registers a connection for the API. Who is not let in may stay for a moment, to be told so by its calls.
func (h *Hub) greet(ctx context.Context, c *tls.Conn) {
	leaf := c.ConnectionState().PeerCertificates[0]
	id, err := pki.CertIdentity(leaf)
	if err != nil {
		return // the handshake does not let that through
	}
	who, ok := behind(id)
	if !ok {
		return
	}
	cut := func() { time.AfterFunc(farewell, func() { _ = c.NetConn().Close() }) } // the connection is not needed any more
	x := &guest{who: who, enrolled: pki.Enrolled(leaf)}
	x.end = func(*problem.Error) { cut() }
	h.guests.mu.Lock()
	if h.guests.conns == nil {
		h.guests.conns = map[net.Conn]*guest{}
	}
	h.guests.conns[c] = x
	h.guests.mu.Unlock()
	h.guests.add(x)
	i, err := h.db.Identity(ctx, string(who.Kind), who.Name)
	if err != nil {
		return // nothing is known of it, or the store is away: its calls are looked at one by one
	}
	if p := verdict(i, who, x.enrolled); p != nil {
		h.log.Info("somebody is not let in", "identity", who.String(), "from", c.RemoteAddr().String(), "err", p)
		cut()
	}
}

// seeOut ends what is open of those who are no longer let in, until ctx is done.
func (h *Hub) seeOut(ctx context.Context) error {
	wake, cancel := h.db.Subscribe("")
	defer cancel()
	for {
		if err := h.look(ctx); err != nil && ctx.Err() == nil {
			h.log.Warn("who is let in could not be looked up", "err", err)
		}
		t := time.NewTimer(looksPause)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return nil
		}
		t.Reset(looksLongest)
		select {
		case <-wake:
		case <-t.C:
		case <-ctx.Done():
		}
		t.Stop()
	}
}

// look ends what is open of those who are not let in as the store has it now.
func (h *Hub) look(ctx context.Context) error {
	type person struct{ kind, name string }
	known := map[person]store.Identity{}
	gone := map[string]time.Time{}
	for _, kind := range []pki.Kind{pki.KindSite, pki.KindUser} {
		ids, err := h.db.Identities(ctx, string(kind))
		if err != nil {
			return err
		}
		for _, i := range ids {
			known[person{i.Kind, i.Name}] = i
			if kind == pki.KindSite && !i.Removed.IsZero() {
				gone[i.Name] = i.Removed
			}
		}
	}
	type ending struct {
		guest *guest
		why   *problem.Error
	}
	var out []ending
	h.guests.mu.Lock()
	news := len(gone) != len(h.guests.gone)
	for n, at := range gone {
		news = news || !h.guests.gone[n].Equal(at)
	}
	h.guests.gone = gone
	for g := range h.guests.open {
		if p := verdict(known[person{string(g.who.Kind), g.who.Name}], g.who, g.enrolled); p != nil {
			out = append(out, ending{g, p})
			delete(h.guests.open, g)
		}
	}
	h.guests.mu.Unlock()
	told := map[pki.Identity]bool{}
	for _, e := range out {
		if !told[e.guest.who] {
			told[e.guest.who] = true
			h.log.Info("somebody is out: its connections end", "identity", e.guest.who.String(), "err", e.why)
		}
		e.guest.end(e.why)
	}
	if news {
		h.changed.Wake("") // the jobs' controllers
	}
	return nil
}

// expel ends the parts in a job of sites that were removed. It gives the parties as they are then. Of jobs in the queue the
// scheduler ends those that cannot do without them.
func (c *control) expel(ctx context.Context, j job.Job, ps []job.Party, now time.Time) ([]job.Party, error) {
	var out []job.Party
	for _, p := range ps {
		if p.Name != job.HubParty && c.hub.guests.removed(p.Name) {
			out = append(out, p)
		}
	}
	if len(out) == 0 {
		return ps, nil
	}
	changed := false
	for _, p := range out {
		if p.State.Terminal() {
			continue
		}
		if err := ignoreMoved(c.hub.db.MoveParty(ctx, j.ID, p.Name, job.PartyFailed, wasRemoved(p.Name), "", now)); err != nil {
			return ps, err
		}
		changed = true
	}
	if !changed {
		return ps, nil
	}
	return c.hub.db.Parties(ctx, j.ID)
}

// wasRemoved is the cause of the end of what cannot do without a site.
func wasRemoved(site string) *job.Cause {
	e := problem.New(problem.Removed, "submit the job again with other sites, or enrol the site again", "%s was removed from the hub", site)
	e.Party = site
	return e
}
