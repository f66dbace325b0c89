package link

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/test/chaos"
)

func TestOutagesUpToTheToleranceCostNothing(t *testing.T) {
	for _, down := range []time.Duration{0, time.Second, 20 * time.Second, 130 * time.Second, 59 * time.Minute} {
		t.Run(down.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				told := make(chan Outage, 9)
				n := &chaos.Network{}
				site, hub := over(t, n, Options{OnOutage: func(o Outage) { told <- o }})
				near, far := streams(t, site, hub)
				if _, err := near.Write([]byte("before")); err != nil {
					t.Fatal(err)
				}
				n.SetDown(true)
				n.Cut()
				cut := time.Now()
				synctest.Wait()
				if site.Stats().Down.IsZero() || hub.Stats().Down.IsZero() || site.Err() != nil || hub.Err() != nil {
					t.Errorf("in the outage: %+v, %+v", site.Stats(), hub.Stats())
				}
				var wg sync.WaitGroup
				wg.Go(func() { // goes on writing all the time
					if _, err := near.Write(bytes.Repeat([]byte("x"), 1<<20)); err != nil {
						t.Error(err)
					}
					if err := near.CloseWrite(); err != nil {
						t.Error(err)
					}
				})
				wg.Go(func() {
					got, err := io.ReadAll(far)
					if err != nil || len(got) != 6+1<<20 || string(got[:7]) != "beforex" {
						t.Errorf("read %d bytes, %v", len(got), err)
					}
				})
				time.Sleep(down)
				n.SetDown(false)
				wg.Wait()
				if late := time.Since(cut) - down; late > 6*time.Second {
					t.Errorf("went on %v after the network came back", late)
				}
				for range 2 {
					o := <-told
					if took := o.Resumed.Sub(o.Cut); took < down || took > down+6*time.Second || !o.Cut.Equal(cut) || o.Resent > DefaultBuffer {
						t.Errorf("told of %+v, cut at %v", o, cut)
					}
				}
				if s := hub.Stats(); s.Cuts != 1 || s.Resumes != 1 || !s.Down.IsZero() || s.Received < 1<<20 {
					t.Errorf("counted %+v", s)
				}
			})
		})
	}
}

func TestSessionEndsAfterItsTolerance(t *testing.T) {
	for _, c := range []struct{ tolerance, ends time.Duration }{{0, DefaultTolerance}, {time.Minute, time.Minute}} {
		synctest.Test(t, func(t *testing.T) {
			n := &chaos.Network{}
			site, hub := over(t, n, Options{Tolerance: c.tolerance})
			near, far := streams(t, site, hub)
			time.Sleep(time.Second)
			n.SetDown(true)
			n.Cut()
			start := time.Now()
			<-site.Done()
			<-hub.Done()
			if took := time.Since(start); took != c.ends {
				t.Errorf("ended after %v, want %v", took, c.ends)
			}
			for _, s := range []*Session{site, hub} {
				if problem.CodeOf(s.Err()) != problem.LinkLost || errors.Is(s.Err(), ErrClosed) {
					t.Errorf("ended with %v", s.Err())
				}
			}
			for _, s := range []Stream{near, far} {
				if _, err := s.Read(make([]byte, 1)); !errors.Is(err, ErrReset) {
					t.Errorf("a stream read %v", err)
				}
			}
			if tries := n.Count(); c.ends == time.Minute && (tries < 30 || tries > 70) {
				t.Errorf("%d attempts in a minute", tries)
			}
		})
	}
	synctest.Test(t, func(t *testing.T) {
		n := &chaos.Network{}
		site, hub := over(t, n, Options{Tolerance: -1})
		n.SetDown(true)
		n.Cut()
		time.Sleep(20 * time.Hour)
		n.SetDown(false)
		streams(t, site, hub)
	})
}

// A network that comes and goes at once each time is not dialled in a tight loop; one that works is dialled at once.
func TestPausesBetweenAttempts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var at []time.Time
		preface := int64(7 + len(anna.Job) + len(anna.Site))
		n := &chaos.Network{Next: func(i int) chaos.Script {
			at = append(at, time.Now())
			s := chaos.Script{}
			if i >= 1 && i < 21 { // WELCOME arrives, and nothing more
				s.Down = chaos.Way{After: 50, Then: chaos.Cut}
				s.Up = chaos.Way{After: preface + 10 + helloBody, Then: chaos.Cut}
			}
			return s
		}}
		site, hub := over(t, n, Options{})
		time.Sleep(time.Minute)
		n.Cut()
		cut := time.Now()
		near, far := streams(t, site, hub)
		defer near.Close()
		defer far.Close()
		synctest.Wait()
		if len(at) != 22 || !at[1].Equal(cut) {
			t.Fatalf("%d attempts, the first %v after the cut", len(at), at[1].Sub(cut))
		}
		for i, want := 2, firstPause; i < len(at); i, want = i+1, min(2*want, maxPause) {
			if p := at[i].Sub(at[i-1]); p < want/2 || p > want {
				t.Errorf("pause %d is %v, want up to %v", i, p, want)
			}
		}
	})
}

// stranger speaks the protocol by hand.
type stranger struct {
	net.Conn
	t *testing.T
}

func call(t *testing.T, d Dialer) stranger {
	t.Helper()
	c, err := d(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return stranger{c, t}
}

func (s stranger) say(f frame) {
	s.t.Helper()
	if _, err := s.Write(appendFrame(nil, f)); err != nil {
		s.t.Fatal(err)
	}
}

func (s stranger) hear() frame {
	s.t.Helper()
	f, err := readFrame(s)
	if err != nil {
		s.t.Fatalf("no frame: %v", err)
	}
	return f
}

func TestWhoMayResume(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &chaos.Network{}
		a, d := network(t, n, Options{})
		g := greeting{id: sessionID{1}, secret: [keySize]byte{2}, attempt: 3, at: position{limit: 1 << 20}}
		first := call(t, d)
		first.say(helloFrame(g))
		if at, err := first.hear().welcome(g.id); err != nil || at != (position{limit: DefaultBuffer}) {
			t.Fatalf("welcomed at %+v, %v", at, err)
		}
		first.say(startFrame(g.id))
		if err := readStart(first, g.id); err != nil {
			t.Fatal(err)
		}
		hub, err := a.Accept(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer hub.Close()
		if _, err := first.Write(appendUnit(nil, unit{kind: framePing})); err != nil {
			t.Fatal(err)
		}
		head := new([unitHead + ackBody]byte)
		synctest.Wait()

		with := func(change func(*greeting)) greeting {
			h := g
			h.resume, h.attempt = true, 4
			change(&h)
			return h
		}
		other := as(n, Peer{anna.Job, "charite"})
		for _, c := range []struct {
			name   string
			by     Dialer
			g      greeting
			reason byte
		}{
			{"another identity", other, with(func(*greeting) {}), refuseGone},
			{"another job", as(n, Peer{"other", anna.Site}), with(func(*greeting) {}), refuseGone},
			{"a wrong secret", d, with(func(g *greeting) { g.secret[31]++ }), refuseGone},
			{"a wrong secret, as if for the first time", d, with(func(g *greeting) { g.secret[0]++; g.resume = false }), refuseGone},
			{"another session", d, with(func(g *greeting) { g.id[0]++ }), refuseGone},
			{"the same attempt again", d, with(func(g *greeting) { g.attempt = 3 }), refuseStale},
			{"an older attempt that was held up", d, with(func(g *greeting) { g.attempt = 2 }), refuseStale},
		} {
			s := call(t, c.by)
			s.say(helloFrame(c.g))
			if f := s.hear(); f.kind != frameRefuse || f.body[0] != c.reason {
				t.Errorf("%s: answered %+v", c.name, f)
			}
			if _, err := s.Read(head[:]); !errors.Is(err, io.EOF) {
				t.Errorf("%s: then %v", c.name, err)
			}
		}
		// None of them has harmed the session.
		if s := hub.Stats(); s.Cuts != 0 || hub.Err() != nil {
			t.Errorf("after all that: %+v, %v", s, hub.Err())
		}

		// The multiplexer measured a round trip: 12 bytes that were never acknowledged.
		if u, err := readUnit(first, head); err != nil || u != (unit{kind: frameData, length: 12}) {
			t.Fatalf("got %+v, %v", u, err)
		}

		// A newer connection takes over while the old one lives.
		newer := call(t, d)
		newer.say(helloFrame(with(func(*greeting) {})))
		if at, err := newer.hear().welcome(g.id); err != nil || at.received != 0 || at.sent != 12 {
			t.Fatalf("welcomed at %+v, %v", at, err)
		}
		if u, err := readUnit(newer, head); err != nil || u != (unit{kind: frameData, length: 12}) {
			t.Errorf("not sent again: %+v, %v", u, err)
		}
		_, _ = io.Copy(io.Discard, first) // the old connection ends
		if s := hub.Stats(); s.Cuts != 1 || s.Resumes != 1 || s.Resent != 12 {
			t.Errorf("counted %+v", s)
		}

		// What cannot be true ends the session.
		liar := call(t, d)
		liar.say(helloFrame(with(func(g *greeting) { g.attempt, g.at.received = 5, 13 })))
		if f := liar.hear(); f.kind != frameRefuse || f.body[0] != refuseGone {
			t.Errorf("answered %+v", f)
		}
		<-hub.Done()
		if problem.CodeOf(hub.Err()) != problem.LinkLost || !errors.Is(hub.Err(), errViolation) {
			t.Errorf("ended with %v", hub.Err())
		}
	})
}

func TestCloseAndOutagesTogether(t *testing.T) {
	t.Run("the other end learns of it when it comes back", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n := &chaos.Network{}
			site, hub := over(t, n, Options{})
			n.SetDown(true)
			n.Cut()
			start := time.Now()
			hub.Close()
			if took := time.Since(start); took > 2*closeWait {
				t.Errorf("Close took %v", took)
			}
			if !errors.Is(hub.Err(), ErrClosed) {
				t.Errorf("hub: %v", hub.Err())
			}
			n.SetDown(false)
			<-site.Done()
			if !errors.Is(site.Err(), ErrPeerClosed) {
				t.Errorf("site: %v", site.Err())
			}
		})
	})
	t.Run("a short outage in the middle of it is bridged", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n := &chaos.Network{}
			site, hub := over(t, n, Options{})
			near, far := streams(t, site, hub)
			if _, err := near.Write(make([]byte, 100<<10)); err != nil {
				t.Fatal(err)
			}
			if err := near.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			n.SetDown(true)
			n.Cut()
			time.AfterFunc(2*time.Second, func() { n.SetDown(false) })
			site.Close()
			<-hub.Done()
			if !errors.Is(hub.Err(), ErrPeerClosed) || !errors.Is(site.Err(), ErrClosed) {
				t.Errorf("%v, %v", hub.Err(), site.Err())
			}
			if got, err := io.ReadAll(far); err != nil || len(got) != 100<<10 {
				t.Errorf("%d bytes were delivered, %v", len(got), err)
			}
		})
	})
	t.Run("a hub's runner that does not know the session ends it", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n := &chaos.Network{}
			a, d := network(t, n, Options{})
			site, err := Dial(t.Context(), d, Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer site.Close()
			a.mu.Lock()
			clear(a.last) // as if it had been started anew
			a.mu.Unlock()
			n.Cut()
			<-site.Done()
			if !errors.Is(site.Err(), errGone) || problem.CodeOf(site.Err()) != problem.LinkLost {
				t.Errorf("site: %v", site.Err())
			}
			if hub, err := a.Accept(t.Context()); err == nil {
				hub.abandon()
				hub.Close()
			}
		})
	})
}

// lineTo gives a line without streams, and the other end of its connection.
func lineTo(t *testing.T, buffer int) (*line, net.Conn) {
	t.Helper()
	l := newLine(sessionID{1}, [keySize]byte{}, anna, Options{Buffer: buffer})
	l.attempt = 1
	near, far := chaos.Pipe(chaos.Script{Up: chaos.Way{Queue: 64 << 20}})
	l.mu.Lock()
	mine := l.tellLocked()
	l.mu.Unlock()
	if _, err := l.attach(far, 1, mine, position{limit: 1 << 30}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		l.finish(nil)
		near.Close()
		l.running.Wait()
	})
	return l, near
}

// Whatever an other end says after the greeting, it gets nothing by it, and the session bears some of it.
func TestViolations(t *testing.T) {
	data := func(at uint64, n int) []byte {
		return append(appendUnit(nil, unit{kind: frameData, length: n, number: at}), make([]byte, n)...)
	}
	for name, b := range map[string][]byte{
		"a type that does not exist":            {9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0},
		"a frame of 16 MiB":                     {frameData, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0},
		"DATA without any":                      {frameData, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0},
		"DATA from the future":                  data(1, 10),
		"DATA twice":                            append(data(0, 10), data(0, 10)...),
		"more DATA than allowed":                append(data(0, 60<<10), data(60<<10, 6<<10)...),
		"an ACK of what was never sent":         appendUnit(nil, ackUnit(1, 1<<30)),
		"an ACK that takes back":                appendUnit(nil, ackUnit(0, 1<<29)),
		"a PING with a body":                    {framePing, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0},
		"a CLOSE before everything has arrived": appendUnit(nil, unit{kind: frameClose, number: 1}),
		"a NO for no reason":                    appendUnit(nil, unit{kind: frameNo, length: noBody, number: 1, limit: 9}),
		"an ASK of the end that dials":          appendUnit(nil, unit{kind: frameAsk, number: 1}),
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l, conn := lineTo(t, 64<<10)
				_, _ = conn.Write(b)             // it may be dropped before all of it is there
				_, _ = io.Copy(io.Discard, conn) // until it is
				synctest.Wait()
				s := l.snapshot()
				if s.Cuts != 1 || l.violations != 1 || l.failure() != nil {
					t.Errorf("counted %+v, %d violations, %v", s, l.violations, l.failure())
				}
				if len(l.in.buf) > 128<<10 {
					t.Errorf("holds %d bytes", len(l.in.buf))
				}
			})
		})
	}
	synctest.Test(t, func(t *testing.T) {
		l, conn := lineTo(t, 0)
		for i := range maxViolations {
			if i > 0 {
				near, far := chaos.Pipe(chaos.Script{})
				g := greeting{attempt: uint32(i + 1), at: position{limit: 1 << 30}}
				mine, err := l.takeOver(g)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := l.attach(far, g.attempt, mine, g.at); err != nil {
					t.Fatal(err)
				}
				conn = near
			}
			if _, err := conn.Write(make([]byte, unitHead)); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			conn.Close()
		}
		if !errors.Is(l.failure(), errViolation) {
			t.Errorf("after %d violations: %v", maxViolations, l.failure())
		}
	})
}

// What an old connection had read before it was replaced is not delivered: the new one brings it again.
func TestReplacedConnectionsDeliverNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, _ := lineTo(t, 0)
		old := l.tr
		if err := l.deliver(old, []byte("abc")); err != nil {
			t.Fatal(err)
		}
		at, err := l.takeOver(greeting{attempt: 2, at: position{sent: 3, limit: 1 << 30}})
		if err != nil || at.received != 3 {
			t.Fatalf("taken over at %+v, %v", at, err)
		}
		for what, err := range map[string]error{
			"a piece":  l.deliver(old, []byte("def")),
			"DATA":     l.expect(old, unit{kind: frameData, length: 1, number: 3}),
			"an ACK":   l.onAck(old, ackUnit(0, 1<<30)),
			"a CLOSE":  l.onClose(old, unit{kind: frameClose, number: 3}),
			"a frame":  func() error { _, _, _, err := l.frames(old, nil); return err }(),
			"its loss": func() error { l.detach(old, io.EOF); return errReplaced }(),
		} {
			if !errors.Is(err, errReplaced) {
				t.Errorf("%s: %v", what, err)
			}
		}
		if s := l.snapshot(); s.Received != 3 || s.Cuts != 1 {
			t.Errorf("counted %+v", s)
		}
	})
}

// A sender waits when its buffer is full, and the buffer is what it sends again at most.
func TestBackPressure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const buffer = 1 << 20
		l, conn := lineTo(t, buffer)
		wrote := make(chan int, 1)
		go func() { // ends when the line does
			n, _ := l.Write(make([]byte, 10<<20))
			wrote <- n
		}()
		go func() { _, _ = io.Copy(io.Discard, conn) }()
		time.Sleep(5 * time.Second)
		if s := l.snapshot(); s.Sent != buffer || l.out.n != buffer || len(wrote) != 0 {
			t.Errorf("%+v, %d kept", s, l.out.n)
		}
		// The other end reads and acknowledges half, then only takes more.
		if _, err := conn.Write(appendUnit(nil, ackUnit(buffer/2, 1<<30))); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if s := l.snapshot(); s.Sent != buffer+buffer/2 {
			t.Errorf("after half was acknowledged: %+v", s)
		}
		l.finish(errGone)
		if n := <-wrote; n < buffer || n > 2*buffer {
			t.Errorf("Write took %d", n)
		}
	})
}

// 10,000 strangers that begin a handshake and never end it hold neither memory nor the way for others.
func TestManyHalfOpenConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &chaos.Network{}
		a, d := network(t, n, Options{})
		heap := func() uint64 {
			var m runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&m)
			return m.HeapAlloc
		}
		before, most := heap(), uint64(0)
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		g := helloFrame(greeting{id: sessionID{9}, attempt: 1})
		whole := appendFrame(nil, g)
		for i := range 10_000 {
			c, err := d(ctx)
			if err != nil {
				t.Fatal(err)
			}
			wg.Go(func() {
				defer c.Close()
				_, _ = c.Write(whole[:i%(len(whole)+1)])
				_, _ = io.Copy(io.Discard, c)
			})
			if i%2000 == 1999 {
				most = max(most, heap())
			}
		}
		if grown := int64(most) - int64(before); grown > 16<<20 {
			t.Errorf("%d bytes for connections that say nothing", grown)
		}
		t.Logf("%d KiB at most", (int64(most)-int64(before))>>10)
		site, err := Dial(ctx, as(n, Peer{anna.Job, "honest"}), Options{Retry: time.Minute})
		if err != nil {
			t.Fatal(err)
		}
		hub, err := a.Accept(ctx)
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() { site.Close() })
		hub.Close()
		cancel()
		wg.Wait()
	})
}
