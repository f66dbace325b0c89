package pki

import (
	"context"
	"crypto/x509"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

var stAnna = Identity{Kind: KindSite, Name: "st-anna"}

// held is a credential whose certificate was issued for ttl.
func held(t *testing.T, a *Authority, ttl time.Duration) (*Credential, string) {
	t.Helper()
	k, err := a.NewKeypair(stAnna, nil, ttl)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := SaveKeypair(dir, "site", k); err != nil {
		t.Fatal(err)
	}
	c, err := OpenCredential(dir, "site")
	if err != nil {
		t.Fatal(err)
	}
	return c, dir
}

// Certificates are renewed by themselves when a third of their time is left, each a little early by chance, for as long as it
// takes; a new key each time.
func TestKeep(t *testing.T) {
	a := authority(t)
	synctest.Test(t, func(t *testing.T) {
		const life = 30 * 24 * time.Hour
		a := authority(t) // by the bubble's clock
		c, _ := held(t, a, life)
		ctx, cancel := context.WithCancel(t.Context())
		began := time.Now()
		var mu sync.Mutex // guards the rest
		var at []time.Duration
		var fails int
		var waits []time.Duration
		done := make(chan struct{})
		go func() {
			defer close(done)
			c.Keep(ctx, Renewal{
				Renew: func(context.Context) (Keypair, error) {
					mu.Lock()
					defer mu.Unlock()
					if fails > 0 {
						fails--
						return Keypair{}, errors.New("the hub is away")
					}
					at = append(at, time.Since(began))
					return a.NewKeypair(stAnna, nil, life)
				},
				Failed: func(_ error, next time.Duration) {
					mu.Lock()
					defer mu.Unlock()
					waits = append(waits, next)
				},
			})
		}()
		old := c.Certificate()
		time.Sleep(life/3*2 - life/30)
		mu.Lock()
		if len(at) != 0 {
			t.Errorf("renewed already after %v", at)
		}
		mu.Unlock()
		changed := c.Changed()
		time.Sleep(life / 30)
		mu.Lock()
		if len(at) != 1 || c.Certificate().Leaf.Equal(old.Leaf) || c.Certificate().Leaf.PublicKey == old.Leaf.PublicKey {
			t.Errorf("renewed after %v", at)
		}
		select {
		case <-changed:
		default:
			t.Error("nobody was told of the new one")
		}
		// A hub that is away for days of the last third costs nothing but attempts, and not many.
		fails = 60
		mu.Unlock()
		time.Sleep(life)
		mu.Lock()
		if len(at) != 2 || len(waits) != 60 {
			t.Errorf("renewed after %v, with pauses %v", at, waits)
		}
		for i, w := range waits {
			if w > 90*time.Minute || i == 0 && w > 2*time.Second {
				t.Errorf("pause %d is %v", i, w)
			}
		}
		mu.Unlock()
		cancel()
		<-done
	})
	if Due(a.cert).After(a.cert.NotAfter) {
		t.Error("due after its end")
	}
}

// What another process puts in place, such as `site join`, is used from the next handshake on, and kept from its time on.
func TestReplacedByAnother(t *testing.T) {
	a := authority(t)
	c, dir := held(t, a, time.Hour)
	old := c.Certificate()
	conf, err := c.ClientTLS("hub", "x/1")
	if err != nil {
		t.Fatal(err)
	}
	changed := c.Changed()
	k, err := a.Keypair(stAnna, Grant{TTL: 2 * time.Hour, Enrolled: time.Unix(0, 12345)})
	if err != nil {
		t.Fatal(err)
	}
	if err := SaveKeypair(dir, "site", k); err != nil {
		t.Fatal(err)
	}
	got, err := conf.GetClientCertificate(nil)
	if err != nil || got.Leaf.Equal(old.Leaf) || !Enrolled(got.Leaf).Equal(time.Unix(0, 12345)) || !Enrolled(old.Leaf).IsZero() {
		t.Errorf("the handshake has the certificate of enrolment %v, %v", Enrolled(got.Leaf), err)
	}
	<-changed
	if !c.Await(t.Context(), old) {
		t.Error("the new one was not seen")
	}
	// Half of a pair, as somebody may leave it who copies files: the last good one goes on.
	if err := os.WriteFile(filepath.Join(dir, "site.crt"), old.Leaf.Raw, 0o600); err != nil {
		t.Fatal(err)
	}
	if !c.Certificate().Leaf.Equal(got.Leaf) {
		t.Error("a broken pair was taken")
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if c.Await(gone, got) {
		t.Error("there was nothing new")
	}
}

// Where the clock is so far ahead that a new certificate is due at once, it is not renewed without end.
func TestKeepByAClockThatIsAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := authority(t)
		c, _ := held(t, a, time.Hour)
		var issued []Keypair // by the hub, whose clock stands still meanwhile
		for range 20 {
			k, err := a.NewKeypair(stAnna, nil, time.Hour)
			if err != nil {
				t.Fatal(err)
			}
			issued = append(issued, k)
		}
		time.Sleep(44 * time.Minute)
		ctx, cancel := context.WithCancel(t.Context())
		var mu sync.Mutex // guards the rest
		calls, told := 0, []time.Duration{}
		done := make(chan struct{})
		go func() {
			defer close(done)
			c.Keep(ctx, Renewal{
				Renew: func(context.Context) (Keypair, error) {
					mu.Lock()
					defer mu.Unlock()
					if calls++; calls > len(issued) {
						return Keypair{}, errors.New("there are no more")
					}
					return issued[calls-1], nil
				},
				Failed: func(_ error, next time.Duration) {
					mu.Lock()
					defer mu.Unlock()
					told = append(told, next)
				},
			})
		}()
		time.Sleep(13 * time.Minute)
		synctest.Wait()
		mu.Lock()
		if want := []time.Duration{8 * time.Minute, 4 * time.Minute, 2 * time.Minute}; calls != 3 || !slices.Equal(told, want) {
			t.Errorf("renewed %d times in 13 of the 16 minutes that are left by this clock; pauses %v, want %v", calls, told, want)
		}
		mu.Unlock()
		cancel()
		<-done
	})
}

// Early renewals are those of an enrolment that has changed.
func TestRenewedEarly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := authority(t)
		c, _ := held(t, a, time.Hour)
		ctx, cancel := context.WithCancel(t.Context())
		wake := make(chan struct{}, 1)
		var mu sync.Mutex
		want := time.Time{}
		go c.Keep(ctx, Renewal{
			Renew: func(context.Context) (Keypair, error) {
				mu.Lock()
				defer mu.Unlock()
				return a.Keypair(stAnna, Grant{TTL: time.Hour, Enrolled: want})
			},
			Early: func(l *x509.Certificate) bool {
				mu.Lock()
				defer mu.Unlock()
				return Enrolled(l).Before(want)
			},
			Wake: func() <-chan struct{} { return wake },
		})
		synctest.Wait()
		mu.Lock()
		want = time.Unix(0, 77)
		mu.Unlock()
		wake <- struct{}{}
		synctest.Wait()
		if !Enrolled(c.Certificate().Leaf).Equal(time.Unix(0, 77)) {
			t.Error("it was not renewed at once")
		}
		cancel()
		synctest.Wait()
	})
}

// However a replacement is cut short, there is one whole pair, the old one or the new one.
func TestReplacementIsCutShort(t *testing.T) {
	a := authority(t)
	olds, err := a.NewKeypair(stAnna, nil, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	news, err := a.NewKeypair(stAnna, nil, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	whole := append(append(append([]byte(nil), news.KeyPEM...), news.CertPEM...), news.CAPEM...)
	for name, c := range map[string]struct {
		files map[string][]byte // in place of the old ones
		want  Keypair
	}{
		"before anything":       {nil, olds},
		"after the whole":       {map[string][]byte{"site.next": whole}, news},
		"after the key":         {map[string][]byte{"site.next": whole, "site.key": news.KeyPEM}, news},
		"after all but the end": {map[string][]byte{"site.next": whole, "site.key": news.KeyPEM, "site.crt": news.CertPEM}, news},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := SaveKeypair(dir, "site", olds); err != nil {
				t.Fatal(err)
			}
			for f, b := range c.files {
				if err := os.WriteFile(filepath.Join(dir, f), b, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if k, err := LoadKeypair(dir, "site"); err != nil || string(k.CertPEM) != string(c.want.CertPEM) {
				t.Errorf("who only reads: %v", err)
			}
			cred, err := OpenCredential(dir, "site")
			if err != nil || string(cred.Pair().CertPEM) != string(c.want.CertPEM) {
				t.Errorf("%v", err)
			}
			if _, err := os.Stat(filepath.Join(dir, "site.next")); !os.IsNotExist(err) {
				t.Errorf("the replacement was not ended: %v", err)
			}
			if k, err := LoadKeypair(dir, "site"); err != nil || string(k.KeyPEM) != string(c.want.KeyPEM) {
				t.Errorf("afterwards: %v", err)
			}
		})
	}
}

// Many who write and read at the same time never make a pair that does not fit.
func TestReplacementsAtOnce(t *testing.T) {
	a := authority(t)
	_, dir := held(t, a, time.Hour)
	var wg sync.WaitGroup
	for range 3 {
		k, err := a.NewKeypair(stAnna, nil, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			for range 20 {
				if err := SaveKeypair(dir, "site", k); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for range 200 {
		if _, err := LoadKeypair(dir, "site"); err != nil {
			t.Errorf("in the middle of it: %v", err)
		}
	}
	wg.Wait()
	if _, err := LoadKeypair(dir, "site"); err != nil {
		t.Error(err)
	}
}

func TestEnrolledForm(t *testing.T) {
	for text, want := range map[string]int64{"": 0, "x": 0, "-5": 0, "0": 0, "17": 17, "99999999999999999999": 0, "1764219175123456789": 1764219175123456789} {
		c := &x509.Certificate{}
		c.Subject.SerialNumber = text
		if got := Enrolled(c); got.IsZero() != (want == 0) || want != 0 && got.UnixNano() != want {
			t.Errorf("%q: %v", text, got)
		}
	}
}
