package keyed

import (
	"context"
	"errors"
	"sync"
	"testing"
)

// Of each name one at a time, of many names at once, and nothing is left of them.
func TestLocks(t *testing.T) {
	var l Locks
	var wg sync.WaitGroup
	counts := map[string]*int{"a": new(int), "b": new(int)}
	for name, n := range counts {
		for range 100 {
			wg.Go(func() {
				unlock, err := l.Lock(t.Context(), name)
				if err != nil {
					t.Error(err)
					return
				}
				*n++
				unlock()
			})
		}
	}
	wg.Wait()
	if *counts["a"] != 100 || *counts["b"] != 100 || len(l.locks) != 0 {
		t.Errorf("%d and %d of 100, %d locks left", *counts["a"], *counts["b"], len(l.locks))
	}
	a, err := l.Lock(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	b, err := l.Lock(t.Context(), "b") // not held up by the other
	if err != nil {
		t.Fatal(err)
	}
	enough := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(enough)
	if _, err := l.Lock(ctx, "a"); !errors.Is(err, enough) {
		t.Errorf("a wait that was ended gave %v", err)
	}
	a()
	b()
	if len(l.locks) != 0 {
		t.Errorf("%d locks are left", len(l.locks))
	}
}
