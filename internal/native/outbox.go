package native

import (
	"context"
	"sync"
)

// What may wait in this process before whoever brings more does.
const (
	repliesRoom  = 4 << 20  // bytes of replies that the ServerApp's process has not taken
	messagesRoom = 64 << 20 // bytes of messages, at the hub for all sites, and at each site for its workers; packs are not counted
	frameRoom    = 512      // bytes of a frame beside its protobuf and state, about
)

// room bounds the bytes that wait somewhere.
type room struct {
	most int

	mu    sync.Mutex // guards the rest
	used  int
	freed chan struct{} // closed and replaced when some have gone
}

func newRoom(most int) *room { return &room{most: most, freed: make(chan struct{})} }

// take takes room for a frame once there is any, and tells how much. It does not wait longer than ctx: nobody is left then who could be
// made to wait.
func (r *room) take(ctx context.Context, f *frame) int {
	n := len(f.proto) + len(f.state) + frameRoom
	for {
		r.mu.Lock()
		if r.used < r.most || ctx.Err() != nil { // a frame that is larger than all of it goes, too
			r.used += n
			r.mu.Unlock()
			return n
		}
		freed := r.freed
		r.mu.Unlock()
		select {
		case <-freed:
		case <-ctx.Done():
		}
	}
}

// give gives room back.
func (r *room) give(n int) {
	if n == 0 {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.used -= n
	close(r.freed)
	r.freed = make(chan struct{})
}

// outbox writes frames in order from a goroutine of its own, so that whoever has one to send goes on reading: two ends that both
// write before they read would wait for each other.
type outbox struct {
	room *room // where what waits here is counted

	mu     sync.Mutex // guards the rest
	queue  []queued
	closed bool
	wake   chan struct{} // of capacity 1
}

type queued struct {
	frame
	took int // of the room
}

func newOutbox(r *room) *outbox {
	return &outbox{room: r, wake: make(chan struct{}, 1)}
}

// put queues a frame that is small or that nobody can wait with. Once the box is closed it goes nowhere.
func (o *outbox) put(f frame) { o.putTaken(f, 0) }

// putWait queues a frame when there is room for it.
func (o *outbox) putWait(ctx context.Context, f frame) { o.putTaken(f, o.room.take(ctx, &f)) }

// putTaken queues a frame for which room was taken.
func (o *outbox) putTaken(f frame, took int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed {
		o.room.give(took)
		return
	}
	o.queue = append(o.queue, queued{f, took})
	select {
	case o.wake <- struct{}{}:
	default:
	}
}

// push writes what is queued until ctx is done, the box is closed, or a write fails; it gives that error.
func (o *outbox) push(ctx context.Context, c *conn) error {
	defer o.close()
	for {
		o.mu.Lock()
		queue := o.queue
		o.queue = nil
		closed := o.closed
		o.mu.Unlock()
		for i, f := range queue {
			if err := c.write(f.frame); err != nil {
				o.forget(queue[i:])
				return err
			}
			queue[i] = queued{} // its bytes are on their way
			o.room.give(f.took)
		}
		if len(queue) > 0 {
			continue
		}
		if closed {
			return nil
		}
		select {
		case <-o.wake:
		case <-ctx.Done():
			return nil
		}
	}
}

func (o *outbox) forget(queue []queued) {
	for _, f := range queue {
		o.room.give(f.took)
	}
}

func (o *outbox) close() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed {
		return
	}
	o.closed = true
	o.forget(o.queue)
	o.queue = nil
	select {
	case o.wake <- struct{}{}:
	default:
	}
}
