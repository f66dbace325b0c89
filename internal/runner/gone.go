package runner

import (
	"context"
	"strings"
	"sync"

	"github.com/pergolafl/pergola/internal/link"
)

// sessions are the links of the hub's party that are up. The zero value has none.
type sessions struct {
	mu   sync.Mutex               // guards the rest
	open map[string]*link.Session // by site
}

func (l *sessions) add(s *link.Session) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.open == nil {
		l.open = map[string]*link.Session{}
	}
	l.open[s.Peer().Site] = s
}

func (l *sessions) remove(s *link.Session) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.open[s.Peer().Site] == s { // there may be a newer one already
		delete(l.open, s.Peer().Site)
	}
}

// endGone ends the links of sites that are gone, each once, until ctx is done. What is left of a site that is not there any
// more would otherwise count as cut off for as long as the job tolerates that, and Flower would wait for its answers.
func (l *sessions) endGone(ctx context.Context, c *cell) {
	for done := 0; ; {
		_, _, changed := c.get()
		gone := c.dropped()
		for _, key := range gone[done:] {
			site, _, _ := strings.Cut(key, "/")
			l.mu.Lock()
			s := l.open[site]
			l.mu.Unlock()
			if s != nil {
				_ = s.Close() // nobody is at the other end, or is to hear just that
			}
		}
		done = len(gone)
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}
