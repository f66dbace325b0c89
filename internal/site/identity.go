package site

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/pergolafl/pergola/internal/api"
	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/runner"
)

const (
	// renewWait is how long the hub may take to renew a certificate.
	renewWait = 30 * time.Second
	// joinWait is how long the agent waits for the new certificate of its own site's: `pergola site join` writes it a moment after
	// the hub has ended the old one.
	joinWait = 30 * time.Second
)

// errRenewed says that the site has another certificate: what is open with the one before is made anew.
var errRenewed = errors.New("there is another certificate")

// keepCertificate has the site's own certificate renewed whenever that is due, until ctx is done.
func (a *Agent) keepCertificate(ctx context.Context) {
	a.cred.Keep(ctx, pki.Renewal{
		Renew: func(ctx context.Context) (pki.Keypair, error) {
			if v := a.client.Spoken(); v != 0 && v < api.Renewing {
				return pki.Keypair{}, problem.New(problem.Version, "update the hub", "the hub speaks version %d of the control protocol, and renews no certificates", v)
			}
			ctx, cancel := context.WithTimeout(ctx, renewWait)
			defer cancel()
			k, err := pki.NewSigned(pki.Identity{Kind: pki.KindSite, Name: a.conf.Name}, a.cred.Pair().CAPEM, func(csr string) (string, string, error) {
				res, err := a.client.Who.Renew(ctx, &pb.RenewRequest{CsrPem: csr})
				return res.GetCertificatePem(), "", err
			})
			if err == nil {
				a.log.Info("the site's certificate is renewed")
			}
			return k, err
		},
		Final: final,
		Failed: func(err error, next time.Duration) {
			a.log.Warn("the site's certificate could not be renewed", "err", err, "good until", a.cred.Certificate().Leaf.NotAfter.UTC().Format(time.RFC3339), "retry", next)
		},
	})
}

// untilRenewed calls end once the site has another certificate, and has calls from then on use it. Stop ends the waiting.
func (a *Agent) untilRenewed(end context.CancelCauseFunc) (stop func()) {
	changed := a.cred.Changed()
	if now := a.cred.Certificate().Leaf; a.shown == nil || !a.shown.Equal(now) {
		if a.shown != nil {
			a.client.Fresh()
		}
		a.shown = now
	}
	over := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		select {
		case <-changed:
			end(errRenewed)
		case <-over:
		}
	})
	return func() {
		close(over)
		wg.Wait()
	}
}

// rejoined tells whether the hub's refusal is about a certificate that was replaced on this machine meanwhile.
func (a *Agent) rejoined(ctx context.Context, refusal error, used *tls.Certificate) bool {
	wait := joinWait
	if problem.CodeOf(refusal) != problem.Superseded {
		wait = 0 // one look: the token that it needs is not there yet
	}
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	if !a.cred.Await(ctx, used) {
		return false
	}
	a.log.Info("the site has enrolled again: its new certificate is used")
	return true
}

// leave ends the agent that the hub will not have any more, and gives the error that says so. What runs for jobs ends before, unless only the
// certificate is over: then the runners go on as long as they can, and are found again when the site has a new one.
func (a *Agent) leave(ctx context.Context, parts *sync.WaitGroup, refusal error, used *tls.Certificate) error {
	p := problem.From(refusal)
	do := fmt.Sprintf("ask the hub's operator for a new token (pergola hub token site %s), and use it on this machine: pergola site join TOKEN --dir %s", a.conf.Name, a.dir)
	if p.Code == problem.Expired {
		return problem.New(problem.Expired, do+"; what the site has stays. Check this machine's clock before", "the certificate of site %s was good until %s, and this machine's clock shows %s",
			a.conf.Name, used.Leaf.NotAfter.UTC().Format(time.RFC3339), time.Now().UTC().Format(time.RFC3339))
	}
	a.log.Error("the hub does not let this site in any more: what runs here for jobs is ended", "err", p)
	a.tell("out: " + p.Msg)
	a.reconcile(ctx, parts, nil)
	parts.Wait()
	return problem.Wrap(p.Err, p.Code, "what ran here for jobs was ended; if the site is to come back, "+do, "%s", p.Msg)
}

// certificate has the hub sign a new key for the part's job alone.
func (p *part) certificate(ctx context.Context) (pki.Keypair, error) {
	a := p.agent
	return pki.NewSigned(pki.Identity{Kind: pki.KindParty, Name: a.conf.Name, Job: string(p.id)}, a.cred.Pair().CAPEM, func(csr string) (string, string, error) {
		res, err := a.client.Sites.IssueCertificate(ctx, &pb.IssueCertificateRequest{JobId: string(p.id), CsrPem: csr})
		return res.GetCertificatePem(), "", err
	})
}

// identity has the hub sign the key with which the part's runner opens its link.
func (p *part) identity(ctx context.Context, dir string) error {
	k, err := retry(ctx, p.log, final, func() (pki.Keypair, error) { return p.certificate(ctx) })
	if err != nil {
		return err
	}
	return pki.SaveKeypair(dir, runner.CertName, k)
}

// keepCertificate has the certificate of the part's runner renewed until ctx is done: when it is due, and at once when the site has
// enrolled again, which ended it.
func (p *part) keepCertificate(ctx context.Context, dir string) {
	cred, err := pki.OpenCredential(dir, runner.CertName)
	if err != nil {
		p.log.Warn("the certificate of the job's link cannot be read, and is not renewed", "err", err)
		return
	}
	cred.Keep(ctx, pki.Renewal{
		Renew: func(ctx context.Context) (pki.Keypair, error) {
			ctx, cancel := context.WithTimeout(ctx, renewWait)
			defer cancel()
			return p.certificate(ctx)
		},
		Early: func(leaf *x509.Certificate) bool {
			return pki.Enrolled(leaf).Before(pki.Enrolled(p.agent.cred.Certificate().Leaf))
		},
		Wake:  p.agent.cred.Changed,
		Final: final,
		Failed: func(err error, next time.Duration) {
			if ctx.Err() == nil {
				p.log.Warn("the certificate of the job's link could not be renewed", "err", err, "retry", next)
			}
		},
	})
}
