package doctor

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pergolafl/pergola/internal/api"
	"github.com/pergolafl/pergola/internal/monitor"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/uplink"
)

// way is what was found on the way to one of the hub's addresses.
type way struct {
	addr  string
	proxy string         // by which it goes; "" = by none
	err   *problem.Error // with this end's certificate
	skew  time.Duration  // how far this machine's clock is ahead of the hub's
	timed bool           // skew is known
	page  monitor.Report // of /healthz, where the hub has that
	code  int            // HTTP's, of it; 0 = none
	said  string         // with a code that is not 200
}

// maxSkew is how far clocks may differ before it is said.
const maxSkew = 30 * time.Second

// walk goes each of the ways, once.
func (p *patient) walk(ctx context.Context) []way {
	if p.ways != nil || p.confErr != nil || p.pair.Leaf == nil {
		return p.ways
	}
	k, err := pki.LoadKeypair(p.dir, p.kind)
	if err != nil {
		return nil
	}
	cert, err := k.Certificate()
	if err != nil {
		return nil
	}
	roots, err := k.Roots()
	if err != nil {
		return nil
	}
	for _, a := range p.addrs {
		w := way{addr: a}
		conf := pki.ClientTLS(cert, roots, pki.HubName, "h2", "http/1.1")
		d, err := uplink.New(uplink.Config{Hubs: []string{a}, Proxy: p.proxy, TLS: conf})
		if err != nil {
			w.err = problem.From(err)
			p.ways = append(p.ways, w)
			continue
		}
		w.proxy = d.Proxy()
		c, err := d.Dial(ctx)
		w.err = problem.From(err)
		if err == nil {
			_ = c.Close()
			// By HTTP/1.1: HTTP/2's client hides why the hub has refused a certificate.
			if d, err = uplink.New(uplink.Config{Hubs: []string{a}, Proxy: p.proxy, TLS: pki.ClientTLS(cert, roots, pki.HubName, "http/1.1")}); err == nil {
				w.visit(ctx, d)
			}
		}
		w.look(ctx, p, sha256.Sum256(p.pair.Authority.Raw))
		p.ways = append(p.ways, w)
	}
	return p.ways
}

// visit asks the hub how it is. A certificate that the hub refuses is told only by what is read.
func (w *way) visit(ctx context.Context, d *uplink.Dialer) {
	t := &http.Transport{DialTLSContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return d.Dial(ctx) }}
	defer t.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+pki.HubName+"/healthz", nil)
	if err != nil {
		w.err = problem.From(err)
		return
	}
	res, err := (&http.Client{Transport: t}).Do(req)
	if err != nil {
		if e := pki.Explain(err); e != nil {
			w.err = e
		} else {
			w.err = problem.Wrap(err, problem.HubUnreachable, "look at the hub's log", "%s takes connections, but does not answer", w.addr)
		}
		return
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, 64<<10))
	w.code, w.said = res.StatusCode, strings.TrimSpace(string(b))
	if err == nil && json.Unmarshal(b, &w.page) != nil {
		w.page = monitor.Report{}
	}
}

// look reads the hub's clock, by the protocol of newcomers: it needs no certificate that is valid now, at neither end.
func (w *way) look(ctx context.Context, p *patient, authority [sha256.Size]byte) {
	d, err := uplink.New(uplink.Config{Hubs: []string{w.addr}, Proxy: p.proxy, TLS: pki.LookClientTLS(authority)})
	if err != nil {
		return
	}
	t := &http.Transport{DialTLSContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return d.Dial(ctx) }, DisableKeepAlives: true}
	defer t.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+pki.HubName+"/", nil)
	if err != nil {
		return
	}
	began := time.Now()
	res, err := (&http.Client{Transport: t}).Do(req)
	if err != nil {
		return // the other way has told why
	}
	_ = res.Body.Close()
	if date, err := http.ParseTime(res.Header.Get("Date")); err == nil {
		took := time.Since(began)
		w.skew, w.timed = began.Add(took/2).Sub(date.Add(500*time.Millisecond)), true // it has whole seconds
	}
}

func authority(ctx context.Context, p *patient) []Finding {
	if p.pair.Leaf == nil {
		return nil
	}
	if p.pairErr != nil {
		return told(Error, p.pairErr)
	}
	ca, now := p.pair.Authority, time.Now()
	finger := sha256.Sum256(ca.Raw)
	name := fmt.Sprintf("%q, fingerprint %x…", ca.Subject.CommonName, finger[:6])
	if now.After(ca.NotAfter) || now.Before(ca.NotBefore) {
		return bad(Error, "set the clock if it is wrong, else make a new hub", "the authority %s is good from %s to %s only", name, day(ca.NotBefore), day(ca.NotAfter))
	}
	if p.kind == KindHub {
		if _, err := pki.LoadAuthority(p.dir); err != nil {
			return told(Error, err)
		}
		return good("%s, until %s", name, day(ca.NotAfter))
	}
	for _, w := range p.walk(ctx) {
		if w.timed {
			return good("%s, is that of the hub at %s", name, w.addr)
		}
	}
	for _, w := range p.walk(ctx) {
		if w.err != nil && w.err.Code == problem.Denied && strings.Contains(w.err.Msg, "another authority") {
			return bad(Error, w.err.Next+"; if the hub was made anew, enrol again with a new token", "%s", w.err.What())
		}
	}
	return good("%s, until %s; whether the hub has the same is not known, for it was not reached", name, day(ca.NotAfter))
}

func resolution(ctx context.Context, p *patient) []Finding {
	var out []Finding
	for _, a := range p.addrs {
		addr, err := uplink.ParseAddress(a)
		if err != nil {
			out = append(out, told(Error, err)...)
			continue
		}
		host, _, err := net.SplitHostPort(addr)
		if err != nil || net.ParseIP(host) != nil {
			continue
		}
		short, cancel := context.WithTimeout(ctx, 8*time.Second)
		ips, err := net.DefaultResolver.LookupHost(short, host)
		cancel()
		if err == nil {
			out = append(out, good("%s is %s", host, list(ips))...)
			continue
		}
		why := err.Error()
		if de, ok := errors.AsType[*net.DNSError](err); ok {
			why = de.Err
		}
		status, next := Error, "check the name, and this machine's DNS (/etc/resolv.conf)"
		if p.kind == KindHub || proxied(ctx, p, a) {
			status, next = Warning, "nothing has to be done where it is others that resolve it: the sites, or the proxy"
		}
		out = append(out, bad(status, next, "%s cannot be resolved here (%s)", host, why)...)
	}
	return out
}

func proxied(ctx context.Context, p *patient, addr string) bool {
	for _, w := range p.walk(ctx) {
		if w.addr == addr && w.proxy != "" {
			return true
		}
	}
	return false
}

func proxy(ctx context.Context, p *patient) []Finding {
	if p.confErr != nil {
		return nil
	}
	d, err := uplink.New(uplink.Config{Hubs: p.addrs[:1], Proxy: p.proxy, TLS: &tls.Config{MinVersion: tls.VersionTLS13}})
	if err != nil {
		return told(Error, err)
	}
	for _, w := range p.walk(ctx) {
		if w.err != nil && w.err.Code == problem.ProxyFailed {
			return told(Error, w.err)
		}
	}
	name := d.Proxy()
	switch {
	case name != "":
		return good("%s is asked, and gives connections", name)
	case p.proxy == uplink.Direct:
		return good("none, as the configuration says")
	}
	return good("none is set, in the configuration or in this environment")
}

func path(ctx context.Context, p *patient) []Finding {
	var out []Finding
	for _, w := range p.walk(ctx) {
		switch {
		case w.err != nil && w.err.Code == problem.TLSIntercepted:
			out = append(out, told(Error, w.err)...)
		case w.err == nil:
			out = append(out, good("nothing between here and %s opens TLS", w.addr)...)
		}
	}
	return out
}

func reaches(ctx context.Context, p *patient) []Finding {
	ways := p.walk(ctx)
	reached := 0
	for _, w := range ways {
		if w.err == nil {
			reached++
		}
	}
	var out []Finding
	for _, w := range ways {
		status := Error
		if reached > 0 {
			status = Warning // another address does
		}
		own := api.BuildVersion()
		switch {
		case w.err != nil:
			out = append(out, told(status, w.err)...)
		case w.code == http.StatusForbidden:
			out = append(out, bad(Error, "ask the hub's operator for a new token", "the hub at %s knows this %s no more: %s", w.addr, p.kind, w.said)...)
		case w.code == http.StatusServiceUnavailable:
			out = append(out, bad(Warning, "tell the hub's operator: pergola doctor at the hub says more", "the hub at %s answers, and is not well: %s", w.addr, w.said)...)
		case w.page.Version == "":
			out = append(out, good("the hub answers at %s; it is of an older version, or does not say", w.addr)...)
		case w.page.Version != own:
			out = append(out, good("the hub answers at %s; it is of version %s, and this is %s", w.addr, w.page.Version, own)...)
		default:
			out = append(out, good("the hub answers at %s, version %s", w.addr, own)...)
		}
	}
	return out
}

func clockCheck(ctx context.Context, p *patient) []Finding {
	if p.kind == KindHub {
		return kept()
	}
	ways := p.walk(ctx)
	for _, w := range ways {
		if !w.timed {
			continue
		}
		off := w.skew.Abs()
		if off <= maxSkew {
			return good("%s off the hub's", off.Round(time.Second))
		}
		which := "ahead of"
		if w.skew < 0 {
			which = "behind"
		}
		const next = "set it, and keep it right with NTP: timedatectl set-ntp true, here or at the hub"
		now := time.Now().Add(-w.skew) // as the hub has it
		if leaf := p.pair.Leaf; now.After(leaf.NotAfter) != time.Now().After(leaf.NotAfter) || now.Before(leaf.NotBefore) != time.Now().Before(leaf.NotBefore) {
			return bad(Error, next, "this machine's clock is %s %s the hub's, so far that certificates are not valid at both", age(off), which)
		}
		return bad(Warning, next, "this machine's clock is %s %s the hub's", age(off), which)
	}
	return kept()
}

// kept tells whether the kernel says that somebody keeps the clock right.
func kept() []Finding {
	var tx unix.Timex
	state, err := unix.Adjtimex(&tx)
	if err != nil {
		return good("%s; whether somebody keeps it right cannot be told here", day(time.Now()))
	}
	if state == unix.TIME_ERROR || tx.Status&unix.STA_UNSYNC != 0 {
		return bad(Warning, "keep it right with NTP: timedatectl set-ntp true", "%s; the kernel says that nothing keeps this clock right", day(time.Now()))
	}
	return good("%s, and something keeps it right", day(time.Now()))
}
