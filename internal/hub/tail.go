package hub

import (
	"context"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/logs"
	"github.com/pergolafl/pergola/internal/problem"
)

// tail follows the logs of parties until the job is over and all was sent.
func (h *Hub) tail(ctx context.Context, j job.Job, ps []job.Party, req *pb.TailLogsRequest, send func(*pb.TailLogsResponse) error) error {
	for _, f := range req.GetFiles() {
		if err := logs.ValidName(f); err != nil {
			return problem.New(problem.Usage, "name a log, such as client_app_log.txt", "%v", err)
		}
	}
	begins := map[string]int64{}
	starts := map[string]map[string]int64{}
	for _, p := range ps {
		dir := h.logDir(j.ID, p.Name)
		if !j.State.Terminal() { // else they may have been removed, and stay so
			if err := os.MkdirAll(dir, 0o700); err != nil {
				return diskProblem(err)
			}
		}
		start, err := h.begin(dir, p.Name, req)
		if err != nil {
			return err
		}
		starts[p.Name] = start
		for file, n := range start {
			begins[p.Name+"/"+file] = n
		}
	}
	if err := send(&pb.TailLogsResponse{Begins: begins}); err != nil {
		return err
	}
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
		g.Go(func() error {
			return logs.FollowDir(ctx, h.logDir(j.ID, p.Name), done, starts[p.Name], func(c logs.Chunk) error {
				if len(req.GetFiles()) > 0 && !slices.Contains(req.GetFiles(), c.Name) {
					return nil
				}
				out := &pb.LogChunk{JobId: string(j.ID), Party: p.Name, File: c.Name, Offset: c.Offset, Skipped: c.Skipped, Data: c.Data}
				for _, t := range c.Times {
					out.Times = append(out.Times, &pb.LogTime{Offset: t.Offset, Time: timestamppb.New(t.At)})
				}
				mu.Lock()
				defer mu.Unlock()
				return send(&pb.TailLogsResponse{Chunk: out})
			})
		})
	}
	return g.Wait()
}

// begin gives where each of a party's logs begins, as the request has it.
func (h *Hub) begin(dir, party string, req *pb.TailLogsRequest) (map[string]int64, error) {
	start := map[string]int64{}
	ends, err := logs.Sizes(dir)
	if err != nil {
		return nil, err
	}
	var since time.Time
	if req.GetSince() != nil {
		since = req.GetSince().AsTime()
	}
	if req.GetAgo() != nil {
		since = h.wall().Add(-req.GetAgo().AsDuration())
	}
	for file := range ends {
		if len(req.GetFiles()) > 0 && !slices.Contains(req.GetFiles(), file) {
			continue
		}
		at := int64(0)
		if !since.IsZero() {
			if at, err = logs.Since(dir, file, since); err != nil {
				return nil, err
			}
		}
		if req.Lines != nil {
			if req.GetLines() < 0 {
				return nil, problem.New(problem.Usage, "give 0 or more", "%d is no number of lines", req.GetLines())
			}
			last, err := logs.Last(dir, file, int(req.GetLines()))
			if err != nil {
				return nil, err
			}
			at = max(at, last)
		}
		start[file] = at
	}
	for k, n := range req.GetOffsets() {
		if p, file, _ := strings.Cut(k, "/"); p == party {
			if n < 0 {
				return nil, problem.New(problem.Usage, "begin at 0", "%s cannot be sent from byte %d on", k, n)
			}
			start[file] = n
		}
	}
	return start, nil
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
