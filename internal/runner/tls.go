package runner

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"sync"
	"time"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/link"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/uplink"
)

// blockedPatience is how long a link that was never up may be kept from the hub by a proxy or a middle box: those do not go away
// by themselves, while a hub that is not there may just be starting.
const blockedPatience = 2 * time.Minute

// dial opens the link, trying again until the job's start-timeout is over.
func (r *runner) dial(ctx context.Context) (*link.Session, error) {
	cred, err := pki.OpenCredential(r.dir, certName) // the agent has it renewed
	if err != nil {
		return nil, err
	}
	conf, err := cred.ClientTLS(pki.HubName, link.ALPN)
	if err != nil {
		return nil, err
	}
	config := uplink.Config{Hubs: r.spec.Hub, Proxy: r.spec.Proxy, TLS: conf}
	up, err := uplink.New(config)
	if err != nil {
		return nil, err
	}
	// A dialler of their own: what lanes find out about the hub's addresses does not move the link's.
	lanes, err := uplink.New(config)
	if err != nil {
		return nil, err
	}
	beginning, giveUp := context.WithCancelCause(ctx)
	defer giveUp(nil)
	w := &way{site: r.spec.Party, dial: up.Dial, giveUp: giveUp, patience: blockedPatience, warn: func(text string) {
		r.note(job.KindWarning, job.Text{Message: text})
	}}
	s, err := link.Dial(beginning, w.connect, link.Options{Log: r.log, Retry: r.spec.Spec.StartTimeout.Or(job.DefaultStartTimeout).Std(), Tolerance: r.tolerance(), DialLane: func(ctx context.Context) (net.Conn, error) {
		c, err := lanes.Dial(ctx)
		if err != nil {
			return nil, err // and no connection, which a nil *tls.Conn would be
		}
		return c, nil
	}})
	if err != nil {
		if c := context.Cause(ctx); errors.Is(c, errStop) || errors.Is(c, errKill) {
			return nil, c
		}
		if c := context.Cause(beginning); c != nil && ctx.Err() == nil {
			err = c
		}
		return nil, noLink(r.spec.Party, err)
	}
	return s, nil
}

// noLink is the problem of a site whose link never came about, with the reason in its sentence.
func noLink(party string, err error) error {
	if p, ok := errors.AsType[*problem.Error](err); ok {
		code := problem.LinkLost
		if p.Code == problem.ProxyFailed || p.Code == problem.TLSIntercepted {
			code = p.Code
		}
		return problem.Wrap(p.Err, code, p.Next, "%s could not open its link to the hub: %s", party, p.Msg)
	}
	return problem.Wrap(err, problem.LinkLost, "check that the site reaches the hub's port", "%s could not open its link to the hub", party)
}

// way dials for the link, and has people told what keeps it from the hub: a proxy, a middle box, a certificate. An outage alone is
// told by the hub's side.
type way struct {
	site     string
	dial     func(context.Context) (*tls.Conn, error)
	warn     func(text string)
	giveUp   context.CancelCauseFunc // of the link's beginning
	patience time.Duration

	mu    sync.Mutex // guards the rest
	told  string     // the last warning
	since time.Time  // when the way was found to be blocked; zero while it is not
	was   bool       // it has been open
}

func (w *way) connect(ctx context.Context) (net.Conn, error) {
	c, err := w.dial(ctx)
	w.mu.Lock()
	defer w.mu.Unlock()
	if err == nil {
		w.told, w.since, w.was = "", time.Time{}, true
		return c, nil
	}
	p, ok := errors.AsType[*problem.Error](err)
	if !ok || p.Code == problem.HubUnreachable || ctx.Err() != nil {
		return nil, err
	}
	if text := "the link of " + w.site + " does not get through: " + p.Msg + "; " + p.Next; text != w.told {
		w.told = text
		w.warn(text)
	}
	if w.since.IsZero() {
		w.since = time.Now()
	}
	if !w.was && time.Since(w.since) >= w.patience {
		w.giveUp(p)
	}
	return nil, err
}
