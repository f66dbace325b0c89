package link

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pergolafl/pergola/internal/compat"
	"github.com/pergolafl/pergola/test/chaos"
)

// lanes gives both ends of a lane.
func lanes(t *testing.T, from, to *Session) (near, far Stream) {
	t.Helper()
	return opened(t, from.OpenLane, to)
}

// has waits until a session has so many lanes.
func (s *Session) has(t *testing.T, n int) {
	t.Helper()
	synctest.Wait()
	s.line.mu.Lock()
	defer s.line.mu.Unlock()
	if l := s.line; len(l.lanes) != n || len(l.asked) != 0 || l.ours+l.theirs != n {
		t.Errorf("%d lanes, %d that are waited for, and %d places taken; want %d", len(l.lanes), len(l.asked), l.ours+l.theirs, n)
	}
}

// A lane has a connection of its own, which goes with it; what it carries is counted.
func TestLanes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &chaos.Network{}
		site, hub := over(t, n, Options{})
		for i, d := range [][2]*Session{{site, hub}, {hub, site}} {
			near, far := lanes(t, d[0], d[1])
			if n.Count() != 2+i {
				t.Errorf("%d connections", n.Count())
			}
			site.has(t, 1)
			hub.has(t, 1)
			before, begun := d[0].Stats(), d[1].Stats()
			const size = 10 << 20
			var wg sync.WaitGroup
			wg.Go(func() {
				if _, err := near.Write(make([]byte, size)); err != nil {
					t.Error(err)
				}
				if err := near.CloseWrite(); err != nil {
					t.Error(err)
				}
			})
			if got, err := io.Copy(io.Discard, far); got != size || err != nil {
				t.Errorf("%d bytes came, %v", got, err)
			}
			wg.Wait()
			if sent, got := d[0].Stats().Sent-before.Sent, d[1].Stats().Received-begun.Received; sent != size || got != size {
				t.Errorf("counted %d bytes sent and %d received", sent, got)
			}
			far.Close()
			if _, err := near.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
				t.Errorf("the end was read as %v", err)
			}
			near.Close()
			site.has(t, 0)
			hub.has(t, 0)
		}
		echo(t, site, hub)
	})
}

// A connection that ends without the lane's own end is no end, however it ends: whoever reads must not take a part for the whole.
func TestCutLanesAreReset(t *testing.T) {
	for name, then := range map[string]chaos.Fate{"cut": chaos.Cut, "closed in order on the way": chaos.End} {
		for _, d := range []string{"of the site", "of the hub"} {
			t.Run(name+", "+d, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					n := &chaos.Network{Next: func(i int) chaos.Script {
						if i == 0 {
							return chaos.Script{}
						}
						way := chaos.Way{After: 1 << 20, Then: then}
						return chaos.Script{Up: way, Down: way}
					}}
					site, hub := over(t, n, Options{})
					from, to := site, hub
					if d == "of the hub" {
						from, to = hub, site
					}
					near, far := lanes(t, from, to)
					var wg sync.WaitGroup
					wg.Go(func() {
						_, err := near.Write(make([]byte, 4<<20))
						if err == nil {
							_, err = near.Read(make([]byte, 1)) // as who waits for an answer
						}
						if !errors.Is(err, ErrReset) {
							t.Errorf("the sender was told %v", err)
						}
					})
					if got, err := io.Copy(io.Discard, far); !errors.Is(err, ErrReset) || got >= 4<<20 {
						t.Errorf("%d bytes came, %v", got, err)
					}
					wg.Wait()
					near.Close()
					far.Close()
					site.has(t, 0)
					hub.has(t, 0)
					echo(t, from, to)
					if site.Stats().Cuts != 0 {
						t.Error("the link itself was cut")
					}
				})
			})
		}
	}
}

// A lane that stands still is given up, at both ends.
func TestDeadLanesEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &chaos.Network{}
		site, hub := over(t, n, Options{})
		near, far := lanes(t, site, hub)
		n.Swallow(true, true)
		begun := time.Now()
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := near.Write(make([]byte, 10<<20)); !errors.Is(err, ErrReset) {
				t.Errorf("the sender was told %v", err)
			}
		})
		if _, err := far.Read(make([]byte, 1)); !errors.Is(err, ErrReset) {
			t.Errorf("the reader was told %v", err)
		}
		wg.Wait()
		if took := time.Since(begun); took > 2*laneStall+maxPiece*time.Second/slowest+2*time.Second {
			t.Errorf("after %v", took)
		}
		near.Close()
		far.Close()
		site.has(t, 0)
		hub.has(t, 0)
	})
}

// Where there are no lanes one hears so soon, and is not tried again and again; the session goes on.
func TestNoLanes(t *testing.T) {
	old := compat.Range{Min: 2, Max: 2}
	for name, c := range map[string]struct {
		site, hub Options
		later     bool // one can be had once the link was cut
	}{
		"an old site": {site: Options{speak: old}},
		"an old hub":  {hub: Options{speak: old}},
		"no way for a second connection": {later: true, site: Options{DialLane: func(context.Context) (net.Conn, error) {
			return nil, errors.New("no second connection")
		}}},
		"a second connection is not answered": {later: true, site: Options{DialLane: func(ctx context.Context) (net.Conn, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := &chaos.Network{}
				a, d := network(t, n, c.hub)
				opts := c.site
				var dialled atomic.Int32
				if lane := opts.DialLane; lane != nil {
					opts.DialLane = func(ctx context.Context) (net.Conn, error) {
						dialled.Add(1)
						return lane(ctx)
					}
				}
				site, hub := joined(t, a, d, opts)
				try := func() {
					for _, s := range []*Session{site, hub} {
						for range 3 {
							begun := time.Now()
							if _, err := s.OpenLane(t.Context()); !errors.Is(err, ErrNoLane) {
								t.Errorf("a lane: %v", err)
							}
							if took := time.Since(begun); took > laneWait {
								t.Errorf("it took %v to know", took)
							}
						}
					}
				}
				try()
				want := int32(0)
				if c.later {
					want = 2
				}
				if got := dialled.Load(); got != want {
					t.Errorf("dialled %d times, want %d", got, want)
				}
				time.Sleep(laneWait) // what the site still tries for the hub
				n.Cut()
				echo(t, site, hub)
				try()
				if got := dialled.Load(); got != 2*want {
					t.Errorf("dialled %d times with a cut between, want %d", got, 2*want)
				}
				site.has(t, 0)
				hub.has(t, 0)
			})
		})
	}
}

// slowly is a listener whose connections, but the first, take their time to write.
type slowly struct {
	net.Listener
	count int
}

func (l *slowly) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if l.count++; l.count == 1 || err != nil {
		return c, err
	}
	return slowConn{c}, nil
}

type slowConn struct{ net.Conn }

func (c slowConn) Write(b []byte) (int, error) {
	time.Sleep(laneWait - time.Second)
	return c.Conn.Write(b)
}

// A lane that comes when nobody waits for it any more is nobody's, and goes.
func TestLateLanes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := same(chaos.Script{Down: chaos.Way{Delay: 3 * time.Second}})
		a := accepting(t, &slowly{Listener: n.Listener()}, Options{})
		site, hub := joined(t, a, as(n, anna), Options{})
		// The hub asks, its ASK takes 3 s, and its answer to the lane 9 s.
		if _, err := hub.OpenLane(t.Context()); !errors.Is(err, ErrNoLane) {
			t.Errorf("a lane: %v", err)
		}
		time.Sleep(2 * laneWait)
		hub.has(t, 0)
		site.has(t, 0)
	})
}

// In an outage there is no lane, and nobody waits for one.
func TestNoLaneInAnOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &chaos.Network{}
		site, hub := over(t, n, Options{})
		n.SetDown(true)
		n.Cut()
		synctest.Wait()
		begun := time.Now()
		for _, s := range []*Session{site, hub} {
			if _, err := s.OpenLane(t.Context()); !errors.Is(err, ErrNoLane) {
				t.Errorf("a lane: %v", err)
			}
		}
		if took := time.Since(begun); took > 0 {
			t.Errorf("it took %v to know", took)
		}
		n.SetDown(false)
		echo(t, site, hub)
		near, far := lanes(t, hub, site)
		near.Close()
		far.Close()
	})
}

// One session has so many lanes and no more; those that it has end with it.
func TestLanesAreFewAndEndWithTheSession(t *testing.T) {
	for _, closes := range []string{"site", "hub"} {
		synctest.Test(t, func(t *testing.T) {
			site, hub := over(t, &chaos.Network{}, Options{})
			var all []Stream
			for i := range 2 * maxLanes {
				from, to := site, hub
				if i%2 == 1 {
					from, to = hub, site
				}
				near, far := lanes(t, from, to)
				all = append(all, near, far)
			}
			for _, s := range []*Session{site, hub} {
				if _, err := s.OpenLane(t.Context()); !errors.Is(err, ErrNoLane) {
					t.Errorf("one too many: %v", err)
				}
			}
			ends := map[string]*Session{"site": site, "hub": hub}
			ends[closes].Close()
			<-site.Done()
			<-hub.Done()
			for _, s := range all {
				if _, err := s.Read(make([]byte, 1)); !errors.Is(err, ErrReset) {
					t.Errorf("a lane of a session that has ended reads %v", err)
				}
				s.Close()
			}
			for _, s := range []*Session{site, hub} {
				if _, err := s.OpenLane(t.Context()); !errors.Is(err, ErrClosed) {
					t.Errorf("a lane of a session that has ended: %v", err)
				}
			}
		})
	}
}

// Of many that are wanted at once there are as many as there may be; the others hear so at once, and those that come later have theirs.
func TestManyLanesAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := same(chaos.Script{Up: chaos.Way{Delay: 50 * time.Millisecond}, Down: chaos.Way{Delay: 50 * time.Millisecond}})
		site, hub := over(t, n, Options{})
		ctx, cancel := context.WithCancel(t.Context())
		var taking sync.WaitGroup
		for _, s := range []*Session{site, hub} {
			taking.Go(func() {
				for {
					far, err := s.Accept(ctx)
					if err != nil {
						return
					}
					far.Close()
				}
			})
		}
		for range 3 {
			var all sync.WaitGroup
			var got, full atomic.Int32
			begun, dialled := time.Now(), n.Count()
			for i := range 64 {
				all.Go(func() {
					st, err := []*Session{site, hub}[i%2].OpenLane(t.Context())
					switch {
					case err == nil:
						got.Add(1)
						st.Close()
					case errors.Is(err, errFull):
						full.Add(1)
					default:
						t.Error(err)
					}
				})
			}
			all.Wait()
			if took := time.Since(begun); took > time.Second {
				t.Errorf("it took %v", took)
			}
			if got.Load() != 2*maxLanes || got.Load()+full.Load() != 64 || n.Count()-dialled != 2*maxLanes {
				t.Errorf("%d lanes, %d too many, %d connections", got.Load(), full.Load(), n.Count()-dialled)
			}
			time.Sleep(time.Second)
			site.has(t, 0)
			hub.has(t, 0)
		}
		cancel()
		taking.Wait()
	})
}

// An end says that it has no more, and not that there are none.
func TestFullLanes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		site, hub := over(t, &chaos.Network{}, Options{})
		full := func(s *Session, n int) {
			s.line.mu.Lock()
			defer s.line.mu.Unlock()
			s.line.theirs += n // it has not heard of the end of so many
		}
		begun := time.Now()
		for _, d := range [][2]*Session{{site, hub}, {hub, site}} {
			full(d[1], 2*maxLanes)
			for range 2 {
				if _, err := d[0].OpenLane(t.Context()); !errors.Is(err, errFull) {
					t.Errorf("one too many: %v", err)
				}
			}
			full(d[1], -2*maxLanes)
			near, far := lanes(t, d[0], d[1])
			near.Close()
			far.Close()
			site.has(t, 0)
			hub.has(t, 0)
		}
		if took := time.Since(begun); took > 0 {
			t.Errorf("it took %v to know", took)
		}
	})
}

// A cut in the middle of an opening is why there is no lane, and none is missed later.
func TestLaneOpeningIsCut(t *testing.T) {
	for name, dial := range map[string]Dialer{
		"while it is asked for": nil,
		"while it is dialled": func(ctx context.Context) (net.Conn, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := same(chaos.Script{Up: chaos.Way{Delay: 100 * time.Millisecond}, Down: chaos.Way{Delay: 100 * time.Millisecond}})
				a, d := network(t, n, Options{})
				var once atomic.Bool
				site, hub := joined(t, a, d, Options{DialLane: func(ctx context.Context) (net.Conn, error) {
					if dial != nil && once.CompareAndSwap(false, true) {
						return dial(ctx)
					}
					return d(ctx)
				}})
				time.Sleep(time.Second)
				begun := time.Now()
				time.AfterFunc(50*time.Millisecond, n.Cut)
				opener := hub
				if dial != nil {
					opener = site
				}
				if _, err := opener.OpenLane(t.Context()); !errors.Is(err, ErrNoLane) {
					t.Errorf("a lane: %v", err)
				}
				if took := time.Since(begun); dial == nil && took > time.Second {
					t.Errorf("it took %v to know", took)
				}
				echo(t, site, hub)
				for _, d := range [][2]*Session{{site, hub}, {hub, site}} {
					near, far := lanes(t, d[0], d[1])
					near.Close()
					far.Close()
				}
			})
		})
	}
}

// Lanes that break again and again while the link does not are not for this way.
func TestLanesThatBreak(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &chaos.Network{Next: func(i int) chaos.Script {
			if i == 0 {
				return chaos.Script{}
			}
			return chaos.Script{Up: chaos.Way{After: 1 << 10, Then: chaos.Cut}}
		}}
		site, hub := over(t, n, Options{})
		for range maxBroken {
			near, far := lanes(t, site, hub)
			if _, err := io.Copy(near, bytes.NewReader(make([]byte, 4<<20))); !errors.Is(err, ErrReset) {
				t.Errorf("the lane carries on: %v", err)
			}
			if _, err := io.Copy(io.Discard, far); !errors.Is(err, ErrReset) {
				t.Errorf("the lane came to its end: %v", err)
			}
			near.Close()
			far.Close()
		}
		for _, s := range []*Session{site, hub} {
			if _, err := s.OpenLane(t.Context()); !errors.Is(err, ErrNoLane) {
				t.Errorf("one more: %v", err)
			}
		}
		time.Sleep(laneRest)
		near, far := lanes(t, hub, site)
		near.Close()
		far.Close()
	})
}

// What is slow, or far behind what was written, does not stand still.
func TestSlowLanes(t *testing.T) {
	const size = 1 << 20
	for name, ways := range map[string][2]chaos.Way{
		"slow":                             {{Rate: 2 << 10, Queue: 64 << 10}},
		"with much between its ends":       {{Rate: 8 << 10, Queue: 4 << 20}},
		"slow, and much between its ends":  {{Rate: 3 << 10, Queue: 700 << 10}},
		"with little room on the way back": {{Rate: 1 << 10, Queue: 16 << 10}, {Queue: 80}},
	} {
		for _, d := range []string{"of the site", "of the hub"} {
			t.Run(name+", "+d, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					n := &chaos.Network{Next: func(i int) chaos.Script {
						if i == 0 {
							return chaos.Script{}
						}
						if d == "of the hub" {
							return chaos.Script{Up: ways[1], Down: ways[0]}
						}
						return chaos.Script{Up: ways[0], Down: ways[1]}
					}}
					site, hub := over(t, n, Options{})
					from, to := site, hub
					if d == "of the hub" {
						from, to = hub, site
					}
					near, far := lanes(t, from, to)
					var wg sync.WaitGroup
					wg.Go(func() {
						_, err := near.Write(make([]byte, size))
						if err == nil {
							err = near.CloseWrite()
						}
						if err == nil {
							_, err = near.Read(make([]byte, 1))
						}
						if !errors.Is(err, io.EOF) {
							t.Errorf("the sender heard %v", err)
						}
						near.Close()
					})
					if _, err := io.CopyN(io.Discard, far, size); err != nil {
						t.Errorf("the receiver: %v", err)
					}
					far.Close()
					wg.Wait()
				})
			})
		}
	}
}

// What a closing end has said arrives, though the other has something left to say.
func TestClosedLanesLinger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		site, hub := over(t, &chaos.Network{}, Options{})
		near, far := lanes(t, site, hub)
		if _, err := near.Write([]byte("all of it")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(far, make([]byte, 9)); err != nil {
			t.Fatal(err)
		}
		far.Close()
		time.Sleep(2 * time.Second)
		if err := near.CloseWrite(); err != nil {
			t.Errorf("the sender's own end: %v", err)
		}
		if _, err := near.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			t.Errorf("the sender heard %v", err)
		}
		near.Close()
		site.has(t, 0)
		hub.has(t, 0)
		// Not for ever.
		near, far = lanes(t, site, hub)
		far.Close()
		hub.has(t, 1)
		time.Sleep(2 * closeWait)
		hub.has(t, 0)
		near.Close()
	})
}

// A lane is for whoever has the session's secret, and its certificate's name.
func TestWhoMayHaveALane(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &chaos.Network{}
		site, hub := over(t, n, Options{})
		l := site.line
		other := Peer{anna.Job, "st-bertha"}
		for name, c := range map[string]struct {
			peer  Peer
			frame frame
		}{
			"another secret":              {anna, laneFrame(l.id, [keySize]byte{1}, 0)},
			"another session":             {anna, laneFrame(sessionID{1}, l.secret, 0)},
			"another peer":                {other, laneFrame(l.id, l.secret, 0)},
			"another version":             {anna, laneFrame(l.id, l.secret, 0).in(2)},
			"a lane that nobody asks for": {anna, laneFrame(l.id, l.secret, 1)},
			"a greeting cut short":        {anna, frame{kind: frameLane, version: Version, body: l.id[:]}},
		} {
			c2 := call(t, as(n, c.peer))
			c2.say(c.frame)
			if f, err := readFrame(c2); err == nil && (f.kind != frameRefuse || f.body[0] != refuseGone) {
				t.Errorf("%s: answered %+v", name, f)
			}
		}
		site.has(t, 0)
		hub.has(t, 0)
		echo(t, site, hub)
	})
}

// Whatever comes over a lane's connection, no more is read of it than its pieces have, and only the end of a half is one.
func FuzzLane(f *testing.F) {
	piece := func(n uint32, b string) []byte { return append(binary.BigEndian.AppendUint32(nil, n), b...) }
	f.Add(append(piece(5, "hello"), piece(0, "")...))
	f.Add(append(piece(5, "hello"), piece(9, "short")...))
	f.Add(piece(maxPiece+1, "x"))
	f.Add(append(piece(stillHere, ""), piece(1, "x")...))
	f.Add([]byte{0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		near, far := net.Pipe()
		l := newLine(sessionID{1}, [keySize]byte{}, anna, Options{})
		la, err := l.adopt(far, true, nil)
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		wg.Go(func() {
			_, _ = near.Write(b) // which the reader may not want to the end
			near.Close()
		})
		got, err := io.ReadAll(la)
		la.destroy()
		wg.Wait()
		var want []byte
		whole := false
		for r := b; len(r) >= pieceHead; {
			n := binary.BigEndian.Uint32(r)
			r = r[pieceHead:]
			if n == stillHere {
				continue
			}
			if whole = n == 0; whole || n > maxPiece {
				break
			}
			k := min(int(n), len(r))
			want, r = append(want, r[:k]...), r[k:]
		}
		if !bytes.Equal(got, want) || whole != (err == nil) || err != nil && !errors.Is(err, ErrReset) {
			t.Errorf("%q gave %q, %v; want %q, whole: %v", b, got, err, want, whole)
		}
		if len(l.lanes) != 0 {
			t.Error("the line still has it")
		}
	})
}
