package native

import (
	"context"
	"sync"
)

// outbox writes frames in order from a goroutine of its own, so that whoever has one to send goes on reading: two ends that both
// write before they read would wait for each other.
type outbox struct {
	mu     sync.Mutex // guards the rest
	queue  []frame
	bytes  int // of protobufs in the queue
	closed bool
	wake   chan struct{} // of capacity 1
	room   chan struct{} // closed and replaced when the queue has been taken
}

// outboxRoom is how many bytes of replies wait here before their senders do.
const outboxRoom = 4 << 20

func newOutbox() *outbox {
	return &outbox{wake: make(chan struct{}, 1), room: make(chan struct{})}
}

// put queues a frame. Once the box is closed it goes nowhere.
func (o *outbox) put(f frame) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.putLocked(f)
}

func (o *outbox) putLocked(f frame) {
	if o.closed {
		return
	}
	o.queue = append(o.queue, f)
	o.bytes += len(f.proto) + len(f.state)
	select {
	case o.wake <- struct{}{}:
	default:
	}
}

// putWait queues a frame when there is room for it, or nobody is left who could be made to wait.
func (o *outbox) putWait(ctx context.Context, f frame) {
	for {
		o.mu.Lock()
		if o.closed || o.bytes < outboxRoom {
			o.putLocked(f)
			o.mu.Unlock()
			return
		}
		room := o.room
		o.mu.Unlock()
		select {
		case <-room:
		case <-ctx.Done():
			o.put(f)
			return
		}
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
			if err := c.write(f); err != nil {
				return err
			}
			queue[i] = frame{} // its bytes are on their way
			o.mu.Lock()
			o.bytes -= len(f.proto) + len(f.state)
			if !o.closed {
				close(o.room)
				o.room = make(chan struct{})
			}
			o.mu.Unlock()
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

func (o *outbox) close() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed {
		return
	}
	o.closed = true
	o.queue = nil
	close(o.room)
	select {
	case o.wake <- struct{}{}:
	default:
	}
}
