package chaos_test

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/pergolafl/pergola/internal/link"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/pki/pkitest"
	"github.com/pergolafl/pergola/test/chaos"
)

// A failure prints the seed of what it did; the same faults come again with -seed. How goroutines interleave between two
// faults is the scheduler's choice, so a rare one may need a few runs (-count).
var (
	seed = flag.Uint64("seed", 1, "what random faults are made from; 0: a new one each time")
	soak = flag.Duration("soak", 0, "for how long TestSoak goes on with a new seed each time")
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var anna = link.Peer{Job: "01JABCDEFGHJKMNPQRSTVWXYZ0", Site: "st-anna"}

// random gives the faults' source, and has a failure tell its seed.
func random(t *testing.T, s uint64) *rand.Rand {
	t.Helper()
	if s == 0 {
		s = rand.Uint64()
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("again with: go test ./test/chaos -run '^%s$' -seed %d", t.Name(), s)
		}
	})
	return rand.New(rand.NewPCG(s, s))
}

// dialer dials for anna, with the preface that a hub writes.
func dialer(dial func(context.Context) (net.Conn, error)) link.Dialer {
	return func(ctx context.Context) (net.Conn, error) {
		c, err := dial(ctx)
		if err != nil {
			return nil, err
		}
		if err := link.WritePreface(c, anna); err != nil {
			c.Close()
			return nil, err
		}
		return c, nil
	}
}

// pair gives both ends of a session.
func pair(t *testing.T, ln net.Listener, d link.Dialer, opts link.Options) (site, hub *link.Session) {
	t.Helper()
	opts.Retry = time.Hour
	a := link.NewAcceptor(opts)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := a.Serve(ctx, ln); err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	t.Cleanup(func() { cancel(); wg.Wait() })
	site, err := link.Dial(t.Context(), d, opts)
	if err != nil {
		t.Fatal(err)
	}
	if hub, err = a.Accept(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		var wg sync.WaitGroup
		wg.Go(func() { site.Close() })
		wg.Go(func() { hub.Close() })
		wg.Wait()
	})
	return site, hub
}

// flow is an endless stream of bytes that can be told from any other place of itself.
type flow struct{ rng *rand.ChaCha8 }

func newFlow(name byte) flow { return flow{rand.NewChaCha8([32]byte{name})} }

func (f flow) fill(b []byte) { _, _ = f.rng.Read(b) } // it never fails

// send writes size bytes of a flow in pieces and then the end.
func send(s link.Stream, name byte, size int, piece func() int) error {
	f := newFlow(name)
	for size > 0 {
		b := make([]byte, min(size, piece()))
		f.fill(b)
		if _, err := s.Write(b); err != nil {
			return fmt.Errorf("with %d bytes left to write: %w", size, err)
		}
		size -= len(b)
	}
	return s.CloseWrite()
}

// receive checks that exactly size bytes of a flow come, in order, and then the end.
func receive(s link.Stream, name byte, size int) error {
	f := newFlow(name)
	got, want := make([]byte, 32<<10), make([]byte, 32<<10)
	have := 0
	for {
		n, err := s.Read(got)
		f.fill(want[:n])
		if string(got[:n]) != string(want[:n]) {
			return fmt.Errorf("among the bytes %d to %d some are wrong", have, have+n)
		}
		have += n
		if errors.Is(err, io.EOF) {
			if have != size {
				return fmt.Errorf("%d bytes came of %d", have, size)
			}
			return nil
		}
		if err != nil {
			return fmt.Errorf("after %d bytes of %d: %w", have, size, err)
		}
	}
}

// exchange sends size bytes both ways on one stream.
func exchange(t *testing.T, site, hub *link.Session, size int, piece func() int) {
	t.Helper()
	near, err := site.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	report := func(what string, err error) {
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	wg.Go(func() { report("site sends", send(near, 1, size, piece)) })
	far, err := hub.Accept(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	wg.Go(func() { report("hub sends", send(far, 2, size, piece)) })
	wg.Go(func() { report("site receives", receive(near, 2, size)) })
	report("hub receives", receive(far, 1, size))
	wg.Wait()
	report("site closes", near.Close())
	report("hub closes", far.Close())
}

func whole() int { return 1 << 20 }

// boundedResends checks that no cut cost more than the replay buffer.
func boundedResends(t *testing.T, buffer int64, ends ...*link.Session) {
	t.Helper()
	for _, s := range ends {
		if st := s.Stats(); st.Resent > st.Cuts*buffer {
			t.Errorf("%d bytes were sent again after %d cuts, with a buffer of %d", st.Resent, st.Cuts, buffer)
		}
	}
}

// Whatever the byte at which a connection fails, and however it does, all bytes arrive once. First it is the one that begins the
// session, then the one that resumes it.
func TestFailuresAtEveryByte(t *testing.T) {
	fates := map[string]chaos.Fate{"cut": chaos.Cut, "end": chaos.End, "swallow": chaos.Swallow, "half-cut": chaos.HalfCut}
	// Up to here go preface, HELLO, START and the first frames of each kind, with a few hundred bytes to spare.
	const upTo, size = 330, 150
	step := int64(1)
	if testing.Short() {
		step = 7
	}
	for name, fate := range fates {
		for _, up := range []bool{true, false} {
			for victim := range 2 {
				direction := map[bool]string{true: "up", false: "down"}[up]
				t.Run(fmt.Sprintf("%s %s, connection %d", name, direction, victim), func(t *testing.T) {
					t.Parallel()
					for after := int64(0); after <= upTo; after += step {
						bubble(t, fmt.Sprintf("after %d bytes", after), func(t *testing.T) {
							n := &chaos.Network{Next: func(i int) chaos.Script {
								var s chaos.Script
								switch {
								case i == victim && up:
									s.Up = chaos.Way{After: after, Then: fate}
								case i == victim:
									s.Down = chaos.Way{After: after, Then: fate}
								case i < victim:
									s.Up = chaos.Way{After: 250, Then: chaos.Cut} // in the middle of the data
								}
								return s
							}}
							site, hub := pair(t, n.Listener(), dialer(n.Dial), link.Options{})
							exchange(t, site, hub, size, whole)
							exchange(t, site, hub, size, whole)
							if c := n.Count(); c > 4 {
								t.Errorf("it took %d connections", c)
							}
						})
					}
				})
			}
		}
	}
}

// bubble runs f in a bubble, and says which one it was if it fails.
func bubble(t *testing.T, name string, f func(t *testing.T)) {
	t.Helper()
	was := t.Failed()
	synctest.Test(t, f)
	if t.Failed() && !was {
		t.Fatalf("that was %s", name)
	}
}

// 100 MB arrive over connections of which 1,000 fail, each in some way at some byte.
func TestThousandCuts(t *testing.T) {
	const size, cuts, buffer = 50 << 20, 1000, 1 << 20
	synctest.Test(t, func(t *testing.T) {
		rng := random(t, *seed)
		n := &chaos.Network{Next: func(i int) chaos.Script {
			if i >= cuts {
				return chaos.Script{}
			}
			return anyScript(rng, 3*size/cuts)
		}}
		site, hub := pair(t, n.Listener(), dialer(n.Dial), link.Options{Buffer: buffer, Tolerance: 24 * time.Hour})
		began := time.Now()
		for n.Count() < cuts {
			exchange(t, site, hub, size/8, func() int { return 1 << 18 })
			if t.Failed() {
				return
			}
		}
		exchange(t, site, hub, size/8, func() int { return 1 << 18 })
		boundedResends(t, buffer, site, hub)
		s := site.Stats()
		t.Logf("%d connections in %v: %d MB up, %d MB down, of which %d MB came twice; %d cuts seen at the site, %d at the hub",
			n.Count(), time.Since(began).Round(time.Second), s.Sent>>20, s.Received>>20, (s.Resent+hub.Stats().Resent)>>20, s.Cuts, hub.Stats().Cuts)
		if s.Sent+s.Received < 2*size {
			t.Errorf("only %d bytes were carried", s.Sent+s.Received)
		}
	})
}

// anyScript makes a connection that fails after up to most bytes in one direction or both, may be slow, or may not come about.
func anyScript(rng *rand.Rand, most int64) chaos.Script {
	if rng.IntN(20) == 0 {
		return chaos.Script{Refused: true}
	}
	way := func() chaos.Way {
		w := chaos.Way{After: rng.Int64N(most)}
		if rng.IntN(4) == 0 {
			w.After = rng.Int64N(300) // in the handshake
		}
		// The quick ones more often, as the silent ones take 15 s each.
		w.Then = []chaos.Fate{chaos.Whole, chaos.Whole, chaos.Cut, chaos.Cut, chaos.Cut, chaos.End, chaos.Swallow, chaos.HalfCut}[rng.IntN(8)]
		w.Delay = []time.Duration{0, 0, time.Millisecond, 100 * time.Millisecond}[rng.IntN(4)]
		if rng.IntN(8) == 0 {
			w.Rate = 1e6
		}
		return w
	}
	s := chaos.Script{Up: way(), Down: way()}
	if s.Up.Then == chaos.Whole && s.Down.Then == chaos.Whole {
		s.Up.Then = chaos.Cut
	}
	return s
}

// TestSoak makes new faults again and again, with -soak for hours; by default for one round.
func TestSoak(t *testing.T) {
	began := time.Now()
	for round := uint64(0); round == 0 || time.Since(began) < *soak; round++ {
		s := *seed
		if *soak > 0 {
			s = rand.Uint64()
		}
		synctest.Test(t, func(t *testing.T) {
			rng := random(t, s)
			buffer := []int{1, 100, 10 << 10, 256 << 10, 0}[rng.IntN(5)]
			most := []int64{400, 10 << 10, 1 << 20}[rng.IntN(3)]
			bad := 1 + rng.IntN(60)
			size := 1 + rng.IntN(1<<20)
			if buffer == 1 {
				size %= 4 << 10
			}
			lock := sync.Mutex{} // pieces are drawn by two senders
			piece := func() int { lock.Lock(); defer lock.Unlock(); return 1 + rng.IntN(100<<10) }
			scripts := make([]chaos.Script, bad)
			for i := range scripts {
				scripts[i] = anyScript(rng, most)
			}
			n := &chaos.Network{Next: func(i int) chaos.Script {
				if i < bad {
					return scripts[i]
				}
				return chaos.Script{}
			}}
			site, hub := pair(t, n.Listener(), dialer(n.Dial), link.Options{Buffer: buffer, Tolerance: 24 * time.Hour})
			for range 3 {
				exchange(t, site, hub, size, piece)
			}
			if buffer > 0 {
				boundedResends(t, int64(buffer), site, hub)
			}
		})
		if t.Failed() {
			return
		}
	}
}

// A reconnect that was held up on its way and arrives after a later one changes nothing.
func TestReorderedReconnects(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &chaos.Network{Next: func(i int) chaos.Script {
			if i >= 1 && i <= 3 {
				return chaos.Script{Up: chaos.Way{Delay: time.Duration(60-10*i) * time.Second}}
			}
			return chaos.Script{}
		}}
		site, hub := pair(t, n.Listener(), dialer(n.Dial), link.Options{})
		n.Cut()
		for range 100 {
			exchange(t, site, hub, 10<<10, whole)
			time.Sleep(time.Second)
		}
		if c, s := n.Count(), hub.Stats(); c != 5 || s.Cuts != 1 || s.Resumes != 1 {
			t.Errorf("%d connections, %+v", c, s)
		}
	})
}

// tlsPair gives a session over mutual TLS over the network.
func tlsPair(t *testing.T, n *chaos.Network, opts link.Options) (site, hub *link.Session) {
	t.Helper()
	ca := pkitest.Authority(t, "test")
	client := pki.ClientTLS(pkitest.Cert(t, ca, pki.Identity{Kind: pki.KindParty, Name: anna.Site, Job: anna.Job}), ca.Roots(), pki.HubName, link.ALPN)
	server := pki.ServerTLS(pkitest.Cert(t, ca, pki.Identity{Kind: pki.KindHub, Name: pki.HubName}), ca.Roots(), link.ALPN)
	d := dialer(func(ctx context.Context) (net.Conn, error) {
		c, err := n.Dial(ctx)
		if err != nil {
			return nil, err
		}
		tc := tls.Client(c, client)
		ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		if err := tc.HandshakeContext(ctx); err != nil {
			c.Close()
			return nil, err
		}
		return tc, nil
	})
	return pair(t, tls.NewListener(n.Listener(), server), d, opts)
}

// A bit that is turned on the way ends a connection, and never arrives.
func TestDamage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rng := random(t, *seed)
		const bad = 60
		n := &chaos.Network{Next: func(i int) chaos.Script {
			if i >= bad {
				return chaos.Script{}
			}
			way := func() chaos.Way { return chaos.Way{After: rng.Int64N(40 << 10), Then: chaos.Damage} }
			return chaos.Script{Up: way(), Down: way()}
		}}
		site, hub := tlsPair(t, n, link.Options{Buffer: 64 << 10})
		for n.Count() <= bad {
			exchange(t, site, hub, 256<<10, whole)
			if t.Failed() {
				return
			}
		}
		boundedResends(t, 64<<10, site, hub)
	})
}

// A hub between the ends that is killed and started again is one more outage.
func TestHubRestarts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rng := random(t, *seed)
		way := chaos.Way{Delay: 5 * time.Millisecond, Rate: 2e6}
		outer := &chaos.Network{Next: func(int) chaos.Script { return chaos.Script{Up: way, Down: way} }}
		inner := &chaos.Network{}
		port := outer.Listener()
		var mu sync.Mutex // guards life and outages
		var life context.Context
		kill := func() {}
		start := func() {
			ctx, cancel := context.WithCancel(context.Background())
			mu.Lock()
			defer mu.Unlock()
			life, kill = ctx, cancel
		}
		start()
		var hub sync.WaitGroup
		hub.Go(func() {
			for {
				c, err := port.Accept()
				if err != nil {
					return
				}
				mu.Lock()
				ctx := life
				mu.Unlock()
				hub.Go(func() {
					up, err := inner.Dial(ctx)
					if err == nil {
						err = link.WritePreface(up, anna)
					}
					if err != nil {
						c.Close()
						return
					}
					_ = link.Splice(ctx, c, up) // it ends with either end, or with the hub
				})
			}
		})
		t.Cleanup(func() { kill(); port.Close(); hub.Wait() })
		var outages []link.Outage
		site, far := pair(t, inner.Listener(), outer.Dial, link.Options{OnOutage: func(o link.Outage) {
			mu.Lock()
			defer mu.Unlock()
			outages = append(outages, o)
		}})
		var work sync.WaitGroup
		work.Go(func() { exchange(t, site, far, 64<<20, whole) })
		for range 5 {
			time.Sleep(time.Duration(6000+rng.IntN(500)) * time.Millisecond) // an attempt is made at least every 2 s
			outer.SetDown(true)
			kill() // every connection of the hub is gone
			time.Sleep(30 * time.Second)
			start()
			outer.SetDown(false)
		}
		work.Wait()
		boundedResends(t, link.DefaultBuffer, site, far)
		mu.Lock()
		if len(outages) != 10 {
			t.Errorf("%d outages were told", len(outages))
		}
		for _, o := range outages {
			// A cut is noticed a moment after it was made, as the network takes its time.
			if d := o.Resumed.Sub(o.Cut); d < 29*time.Second || d > 36*time.Second {
				t.Errorf("told of %+v", o)
			}
		}
		mu.Unlock()
	})
}
