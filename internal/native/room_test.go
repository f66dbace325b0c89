package native

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// pipeStream is a link's stream made of a pipe, which holds nothing.
type pipeStream struct{ net.Conn }

func (s pipeStream) CloseWrite() error { return s.Close() }
func (s pipeStream) Reset() error      { return s.Close() }

// crowd is a hub and one site with many messages in a bubble, whose workers answer once gate is closed.
type crowd struct {
	*testing.T
	member *Member
	hub    *Hub
	server *conn // the ServerApp's end
	nodes  []uint64
	gate   chan struct{}
	over   chan struct{} // the ServerApp's process has ended
	sent   atomic.Int32
	ran    chan error
	end    func()
}

const (
	crowded = 100 // messages
	each    = 1 << 10
	few     = 8 << 10 // bytes of room at the hub and at the site
)

func newCrowd(t *testing.T) *crowd {
	ctx, cancel := context.WithCancel(t.Context())
	c := &crowd{T: t, hub: NewHub(HubOptions{}), gate: make(chan struct{}), over: make(chan struct{}), ran: make(chan error, 1)}
	c.hub.room = newRoom(few)
	c.member = c.hub.Join(ctx, "a", Opener{})
	var wg sync.WaitGroup
	pipe := func() (net.Conn, *conn) {
		ours, theirs := net.Pipe()
		return ours, newConn(theirs)
	}
	w := &world{t: t}
	worker := w.client(Warm, func(_ *conn, f *frame, _ map[string]string) (*frame, bool) {
		select {
		case <-c.gate:
		case <-ctx.Done():
		}
		return &frame{proto: f.proto[:3]}, ctx.Err() == nil
	})
	site := NewSite(SiteOptions{
		Name: "a", Clients: 2, Workers: 2, Isolation: Warm, NodeConfig: func(int) any { return nil }, OnReady: func(Readiness) {}, OnDeath: func(string, bool) {},
		Start: func(int) (Process, error) {
			ours, theirs := pipe()
			done := make(chan struct{})
			wg.Go(func() {
				defer close(done)
				defer theirs.close()
				worker(theirs)
			})
			return Process{Conn: ours, Done: done, Exit: func() string { return "exit code 0" }, Stop: func(time.Duration) { theirs.close() }}, nil
		},
		Link: Opener{Open: func(context.Context, string) (Stream, error) {
			a, b := net.Pipe()
			wg.Go(func() { _ = c.member.Serve(Target, pipeStream{b}) })
			return pipeStream{a}, nil
		}},
	})
	site.room = newRoom(few)
	linked := make(chan struct{})
	close(linked)
	wg.Go(func() { _ = site.Run(ctx, linked) })
	if err := c.hub.Wait(ctx, 1); err != nil {
		t.Fatal(err)
	}
	ours, theirs := pipe()
	c.server = theirs
	wg.Go(func() {
		_, err := c.hub.Run(ctx, &Peer{Process: Process{Conn: ours, Done: c.over}, conn: newConn(ours)}, StartApp{})
		c.ran <- err
	})
	start, err := c.server.read()
	if err != nil {
		t.Fatal(err)
	}
	c.nodes = start.Nodes
	wg.Go(func() {
		for i := range crowded {
			proto := make([]byte, each)
			copy(proto, fmt.Sprintf("%3d", i))
			if c.server.write(frame{head: head{T: tMsg, ID: fmt.Sprint(i), Node: c.nodes[i%2], TTL: 1000}, proto: proto}) != nil {
				return
			}
			c.sent.Add(1)
		}
	})
	c.end = func() {
		cancel()
		c.server.close()
		c.member.Leave()
		wg.Wait()
	}
	return c
}

// full waits until nothing moves, and wants most of the messages to wait with the ServerApp.
func (c *crowd) full() {
	c.Helper()
	synctest.Wait()
	// What fits at the hub and at the site, what each may have beyond, two that are worked on, and one that is being written.
	if n, most := c.sent.Load(), int32(2*(few/each+1)+3); n > most || n < 2 {
		c.Errorf("%d messages of %d bytes were taken, with room for %d twice", n, each, few)
	}
}

// However many messages there are, few of their bytes wait at the hub and at the site; all are answered, those of a node in their order.
func TestManyMessagesWaitWithTheApp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCrowd(t)
		defer c.end()
		c.full()
		close(c.gate)
		last := map[uint64]int{c.nodes[0]: -2, c.nodes[1]: -1}
		for range crowded {
			f, err := c.server.read()
			if err != nil || f.T != tReply {
				t.Fatalf("%+v, %v", f.head, err)
			}
			if want := last[f.Node] + 2; f.ID != fmt.Sprint(want) || string(f.proto) != fmt.Sprintf("%3d", want) {
				t.Errorf("%s (%q) comes behind %d", f.ID, f.proto, last[f.Node])
			}
			last[f.Node] += 2
		}
		synctest.Wait()
		if used := c.hub.room.used; used != 0 {
			t.Errorf("%d bytes of room were not given back", used)
		}
	})
}

// A site that leaves makes room: what it was to have is answered for.
func TestSiteWithManyMessagesLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCrowd(t)
		defer c.end()
		c.full()
		var left sync.WaitGroup
		left.Go(c.member.Leave)
		for lost := 0; lost < crowded; {
			f, err := c.server.read()
			if err != nil || f.T != tLost && f.T != tNodes {
				t.Fatalf("%+v, %v", f.head, err)
			}
			if f.T == tLost {
				lost++
			}
		}
		left.Wait()
		synctest.Wait()
		if used := c.hub.room.used; used != 0 {
			t.Errorf("%d bytes of room were not given back", used)
		}
	})
}

// The end of a ServerApp's process is noticed though its messages wait.
func TestAppWithManyMessagesEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCrowd(t)
		defer c.end()
		c.full()
		c.server.close()
		close(c.over)
		if err := <-c.ran; !errors.Is(err, io.EOF) {
			t.Errorf("the run ended with %v", err)
		}
	})
}
