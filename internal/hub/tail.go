package hub

import (
	"context"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/logs"
	"github.com/pergolafl/pergola/internal/problem"
)

// tail follows the logs of parties until the job is over and all was sent.
func (h *Hub) tail(ctx context.Context, j job.Job, ps []job.Party, req *pb.TailLogsRequest, send func(*pb.LogChunk) error) error {
	done := make(chan struct{})
	var mu sync.Mutex // held while sending: chunks of several parties share the stream
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer close(done)
		if req.GetOnce() {
			return nil
		}
		return h.untilOver(ctx, j.ID)
	})
	for _, p := range ps {
		dir := h.logDir(j.ID, p.Name)
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return diskProblem(err)
		}
		start := map[string]int64{}
		for k, n := range req.GetOffsets() {
			if party, file, _ := strings.Cut(k, "/"); party == p.Name {
				if n < 0 {
					return problem.New(problem.Usage, "begin at 0", "%s cannot be sent from byte %d on", k, n)
				}
				start[file] = n
			}
		}
		g.Go(func() error {
			return logs.FollowDir(ctx, dir, done, start, func(name string, offset int64, data []byte) error {
				mu.Lock()
				defer mu.Unlock()
				return send(&pb.LogChunk{JobId: string(j.ID), Party: p.Name, File: name, Offset: offset, Data: data})
			})
		})
	}
	return g.Wait()
}

// untilOver waits for a job's end.
func (h *Hub) untilOver(ctx context.Context, id job.ID) error {
	wake, cancel := h.db.Subscribe(id)
	defer cancel()
	for {
		j, err := h.db.Job(ctx, id)
		if err != nil {
			return err
		}
		if j.State.Terminal() {
			return nil
		}
		if c := h.controller(id); c != nil && c.unstorable() != nil {
			return nil
		}
		select {
		case <-wake:
		case <-time.After(2 * time.Second): // for an end that cannot be stored
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
