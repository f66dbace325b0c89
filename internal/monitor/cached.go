package monitor

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// Group owns what is loaded in the background. Wait ends it.
type Group struct {
	ctx    context.Context
	cancel context.CancelFunc
	mu     sync.Mutex // guards the rest
	over   bool
	wg     sync.WaitGroup
}

// NewGroup makes a group that ends with ctx at the latest.
func NewGroup(ctx context.Context) *Group {
	g := &Group{}
	g.ctx, g.cancel = context.WithCancel(ctx)
	return g
}

// Wait ends what is under way and waits for it; nothing begins afterwards.
func (g *Group) Wait() {
	g.cancel()
	g.mu.Lock()
	g.over = true
	g.mu.Unlock()
	g.wg.Wait()
}

// begin starts f, or tells that the group is over.
func (g *Group) begin(f func(context.Context)) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.over || g.ctx.Err() != nil {
		return false
	}
	g.wg.Go(func() { f(g.ctx) })
	return true
}

// Cached is a value that takes time to get: it is loaded when somebody asks, by one at a time, and given again for a while.
type Cached[T any] struct {
	group *Group
	fresh time.Duration
	limit time.Duration
	load  func(context.Context) (T, error)

	mu      sync.Mutex // guards the rest
	value   T
	err     error
	at      time.Time     // when it was loaded, or that failed
	have    bool          // value is of some load that did not fail
	loading chan struct{} // closed when the load that is under way ends; nil: none is
}

// NewCached gives what load does. It is given again for as long as fresh; limit is how long who asks waits, and how long load has.
func NewCached[T any](g *Group, fresh, limit time.Duration, load func(context.Context) (T, error)) *Cached[T] {
	return &Cached[T]{group: g, fresh: fresh, limit: limit, load: load}
}

// Get gives the value, at the latest after the limit. With an error comes the last value that could be loaded, the zero value if there is none.
func (c *Cached[T]) Get(ctx context.Context) (T, error) {
	c.mu.Lock()
	wait := c.refreshLocked()
	c.mu.Unlock()
	var late error
	if wait != nil {
		t := time.NewTimer(c.limit)
		defer t.Stop()
		select {
		case <-wait:
		case <-t.C:
			late = fmt.Errorf("no answer within %s", c.limit)
		case <-ctx.Done():
			late = context.Cause(ctx)
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if late != nil {
		return c.value, late
	}
	return c.value, c.err
}

// Peek gives the last value that could be loaded, and has a stale one loaded in the background; ok tells whether there is any.
func (c *Cached[T]) Peek() (v T, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.refreshLocked()
	return c.value, c.have
}

// refreshLocked has the value be loaded if it is stale; it gives the channel of the load that is under way.
func (c *Cached[T]) refreshLocked() <-chan struct{} {
	if c.loading != nil {
		return c.loading
	}
	if !c.at.IsZero() && time.Since(c.at) < c.fresh {
		return nil
	}
	done := make(chan struct{})
	began := c.group.begin(func(ctx context.Context) {
		ctx, cancel := context.WithTimeout(ctx, c.limit)
		defer cancel()
		v, err := c.load(ctx)
		c.mu.Lock()
		defer c.mu.Unlock()
		c.err, c.at, c.loading = err, time.Now(), nil
		if err == nil {
			c.value, c.have = v, true
		}
		close(done)
	})
	if !began {
		c.err = context.Canceled
		return nil
	}
	c.loading = done
	return done
}
