package pki

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/pergolafl/pergola/internal/problem"
)

// Lifetime gives for how long a certificate was issued.
func Lifetime(c *x509.Certificate) time.Duration {
	return max(c.NotAfter.Sub(c.NotBefore)-skew, time.Second)
}

// Due gives from when on a certificate is to be renewed: when a third of its lifetime is left.
func Due(c *x509.Certificate) time.Time { return c.NotAfter.Add(-Lifetime(c) / 3) }

// Credential is a key pair in a folder that may be replaced at any time, by this process or another: each handshake uses what is there by
// then. Its methods may be called concurrently.
type Credential struct {
	dir, name string

	mu      sync.Mutex // guards the rest
	pair    Keypair
	cert    *tls.Certificate
	seen    [2]fileID
	changed chan struct{} // closed and replaced when the pair is another one
}

// fileID tells whether a file was replaced.
type fileID struct {
	at    time.Time
	size  int64
	there bool
}

func stat(path string) fileID {
	i, err := os.Stat(path)
	if err != nil {
		return fileID{}
	}
	return fileID{i.ModTime(), i.Size(), true}
}

// OpenCredential reads the pair name of dir, as [LoadKeypair] does, after it has ended a replacement that a crash had cut short.
func OpenCredential(dir, name string) (*Credential, error) {
	if err := finish(dir, name); err != nil {
		return nil, err
	}
	c := &Credential{dir: dir, name: name, changed: make(chan struct{})}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c, c.readLocked()
}

func (c *Credential) idsLocked() [2]fileID {
	return [2]fileID{stat(filepath.Join(c.dir, c.name+".crt")), stat(filepath.Join(c.dir, c.name+".next"))}
}

func (c *Credential) readLocked() error {
	seen := c.idsLocked() // before the reading: what is replaced during it is read again
	k, err := LoadKeypair(c.dir, c.name)
	if err != nil {
		return err
	}
	cert, err := leafOf(k)
	if err != nil {
		return err
	}
	other := c.cert == nil || !c.cert.Leaf.Equal(cert.Leaf)
	c.pair, c.cert, c.seen = k, cert, seen
	if other {
		close(c.changed)
		c.changed = make(chan struct{})
	}
	return nil
}

// lookLocked reads the pair again if somebody has replaced it. While it cannot be read, the one that is known goes on.
func (c *Credential) lookLocked() error {
	if c.idsLocked() == c.seen {
		return nil
	}
	return c.readLocked()
}

// Pair gives the pair as it is now.
func (c *Credential) Pair() Keypair {
	c.mu.Lock()
	defer c.mu.Unlock()
	_ = c.lookLocked() // a pair that cannot be read leaves the old one
	return c.pair
}

// Certificate gives the pair as it is now, as crypto/tls wants it.
func (c *Credential) Certificate() *tls.Certificate {
	c.mu.Lock()
	defer c.mu.Unlock()
	_ = c.lookLocked() // see Pair
	return c.cert
}

// Changed gives a channel that is closed when the pair has been found to be another one than now.
func (c *Credential) Changed() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.changed
}

// Replace saves another pair, which counts from then on.
func (c *Credential) Replace(k Keypair) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := SaveKeypair(c.dir, c.name, k); err != nil {
		return err
	}
	return c.readLocked()
}

// ClientTLS is [ClientTLS] with whatever the pair is at the time of each handshake. The authority is the one of now.
func (c *Credential) ClientTLS(hubName string, alpn ...string) (*tls.Config, error) {
	roots, err := c.Pair().Roots()
	if err != nil {
		return nil, err
	}
	conf := ClientTLS(tls.Certificate{}, roots, hubName, alpn...)
	conf.Certificates = nil
	conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		cert := c.Certificate()
		if p := Over(cert.Leaf, time.Now()); p != nil {
			return nil, p // said here, since the other end's refusal comes when the handshake is over for this end, and may get lost
		}
		return cert, nil
	}
	return conf, nil
}

// Over refuses a certificate whose time is over by this machine's clock; nil: it is good.
func Over(leaf *x509.Certificate, now time.Time) *problem.Error {
	if !now.After(leaf.NotAfter) {
		return nil
	}
	id, err := CertIdentity(leaf)
	if err != nil {
		return problem.From(err)
	}
	next := ComeBack(id)
	if id.Kind == KindParty {
		next = "see why the site's agent could not have it renewed"
	}
	return problem.New(problem.Expired, next+"; check the clocks of both machines before", "the certificate of %s was good until %s, and this machine's clock shows %s",
		id, leaf.NotAfter.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
}

// ComeBack says how a site or user gets in that is out.
func ComeBack(who Identity) string {
	do := "pergola site join TOKEN"
	if who.Kind == KindUser {
		do = "pergola login TOKEN"
	}
	return fmt.Sprintf("to get in again ask the hub's operator for a new token (pergola hub token %s %s), and use it with: %s", who.Kind, who.Name, do)
}

// Renewal says how a credential is renewed.
type Renewal struct {
	// Renew has a new pair issued.
	Renew func(context.Context) (Keypair, error)
	// Early tells that the pair is to be renewed although it is not due by its time; nil: never. It is asked again when Wake gives
	// a value.
	Early func(*x509.Certificate) bool
	Wake  func() <-chan struct{}
	// Final tells that trying again cannot help until the pair or the time is another one; nil: none is.
	Final func(error) bool
	// Failed hears of an attempt that failed, and when the next one is.
	Failed func(err error, next time.Duration)
}

const (
	// lookEvery is how often a pair is looked at that is not due: somebody may have replaced it, or set the clock.
	lookEvery = 10 * time.Minute
	// Attempts to renew are retried after pauses that grow from the first to the longest, but no longer than a hundredth of the lifetime.
	firstRetry, longestRetry = time.Second, time.Hour
)

// Keep renews the pair whenever it is due, until ctx is done. Machines that were set up at the same time do not renew at
// the same time: each is early by up to a tenth of what is left at that time. What is due as soon as it was issued, since the clocks of both ends
// differ or the authority ends, is renewed again when half of what is left is over, and not at once.
func (c *Credential) Keep(ctx context.Context, r Renewal) {
	bo := backoff.NewExponentialBackOff()
	bo.InitialInterval, bo.Multiplier = firstRetry, 2
	var last *x509.Certificate
	var due time.Time
	var fresh bool // the pair was issued a moment ago
	for {
		leaf := c.Certificate().Leaf
		if leaf != last {
			last = leaf
			bo.MaxInterval = min(max(Lifetime(leaf)/100, firstRetry), longestRetry)
			bo.Reset()
			due = Due(leaf).Add(-rand.N(max(Lifetime(leaf)/30, 1))) //nolint:gosec // no secret
			if left := time.Until(leaf.NotAfter); fresh && time.Until(due) <= 0 {
				pause := lookEvery
				if left > 0 {
					pause = max(left/2, firstRetry)
				}
				due = time.Now().Add(pause)
				if r.Failed != nil {
					r.Failed(problem.New(problem.Expired, "check the clocks of both machines", "what was issued just now is good until %s only, and this machine's clock shows %s",
						leaf.NotAfter.UTC().Format(time.RFC3339), time.Now().UTC().Format(time.RFC3339)), pause)
				}
			}
		}
		fresh = false
		changed := c.Changed()
		var wake <-chan struct{}
		if r.Wake != nil {
			wake = r.Wake()
		}
		wait := min(time.Until(due), lookEvery)
		if wait <= 0 || r.Early != nil && r.Early(leaf) {
			k, err := r.Renew(ctx)
			if err == nil {
				err = c.Replace(k)
			}
			if err == nil {
				fresh = true
				continue
			}
			if ctx.Err() != nil {
				return
			}
			wait = bo.NextBackOff()
			if r.Final != nil && r.Final(err) {
				wait = lookEvery
			}
			if r.Failed != nil {
				r.Failed(err, wait)
			}
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-changed:
		case <-wake:
		case <-ctx.Done():
			t.Stop()
			return
		}
		t.Stop()
	}
}

// Await waits until the pair is another one than old, replaced by this process or another one, or until ctx is done; it tells which.
func (c *Credential) Await(ctx context.Context, old *tls.Certificate) bool {
	const look = 100 * time.Millisecond
	for {
		if !c.Certificate().Leaf.Equal(old.Leaf) {
			return true
		}
		select {
		case <-time.After(look):
		case <-ctx.Done():
			return false
		}
	}
}
