package hub

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"time"

	human "github.com/dustin/go-humanize"

	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/logs"
	"github.com/pergolafl/pergola/internal/problem"
)

// logQuota is how much of each party's logs is kept of a job.
func (h *Hub) logQuota(j job.Job) job.Size {
	return j.Spec.LogQuota.Or(job.DefaultLogQuota).Least(h.conf.LogQuota)
}

// GetLogOffsets implements the API.
func (s siteService) GetLogOffsets(ctx context.Context, req *pb.GetLogOffsetsRequest) (*pb.GetLogOffsetsResponse, error) {
	j, name, err := s.part(ctx, req.GetJobId())
	if err != nil {
		return nil, err
	}
	m, err := logs.Sizes(s.logDir(j.ID, name))
	return &pb.GetLogOffsetsResponse{Offsets: m}, err
}

// PushLogs implements the API.
func (s siteService) PushLogs(ctx context.Context, req *pb.PushLogsRequest) (*pb.PushLogsResponse, error) {
	for _, c := range req.GetChunks() {
		j, name, err := s.part(ctx, c.GetJobId())
		if err != nil {
			return nil, err
		}
		if err := logs.ValidName(c.GetFile()); err != nil {
			return nil, problem.New(problem.Usage, "", "%v", err)
		}
		if c.GetOffset() < 0 || c.GetSkipped() < 0 || c.GetSkipped() > c.GetOffset() {
			return nil, problem.New(problem.Usage, "", "%s cannot go on at byte %d behind %d skipped ones", c.GetFile(), c.GetOffset(), c.GetSkipped())
		}
		if err := s.takeLog(ctx, j, name, c); err != nil {
			return nil, s.endIfFull(j.ID, diskProblem(err))
		}
	}
	return &pb.PushLogsResponse{}, nil
}

// takeLog adds a piece to the hub's copy of a log.
func (h *Hub) takeLog(ctx context.Context, j job.Job, party string, c *pb.LogChunk) error {
	d := logs.Dir{Path: h.logDir(j.ID, party), Quota: h.logQuota(j).Bytes()}
	fresh := !exists(d.Path)
	if err := os.MkdirAll(d.Path, 0o700); err != nil {
		return err
	}
	if fresh {
		// A job that was removed since it was looked up has a folder again by this. Whoever removes it later removes that, too.
		if _, err := h.db.Job(ctx, j.ID); problem.CodeOf(err) == problem.NotFound {
			return errors.Join(err, os.RemoveAll(h.jobDir(j.ID)))
		} else if err != nil {
			return err
		}
	}
	var said []string // what is new, told when the folder is free again
	d.OnGap = func(name string, g logs.Gap, first bool) {
		if first { // here, or there, where the quota is the same
			said = append(said, logs.QuotaReached(party, name, d.Quota))
		}
		if c.GetSkipped() > 0 && g.To == c.GetOffset() {
			said = append(said, fmt.Sprintf("%d bytes (%s) of %s of %s were dropped there before they could be copied", g.Bytes(), human.IBytes(uint64(g.Bytes())), name, party))
		}
	}
	var times []logs.Time
	at, end := c.GetOffset(), c.GetOffset()+int64(len(c.GetData()))
	for _, t := range c.GetTimes() {
		if t.GetOffset() < at || t.GetOffset() >= end || !t.GetTime().IsValid() {
			return problem.New(problem.Usage, "", "a time of byte %d of %s came with bytes %d to %d", t.GetOffset(), c.GetFile(), at, end)
		}
		times = append(times, logs.Time{Offset: t.GetOffset(), At: t.GetTime().AsTime()})
	}
	_, err := d.Append(c.GetFile(), c.GetOffset(), c.GetSkipped(), c.GetData(), times)
	if errors.Is(err, logs.ErrGap) {
		// What was acknowledged may have been lost with the power: the agent asks where to go on.
		return problem.Wrap(err, problem.Exists, "ask for the offsets again", "%s of %s goes on before byte %d", c.GetFile(), party, c.GetOffset())
	}
	for _, text := range said {
		h.log.Warn(text, "job", j.ID)
		e, e2 := job.NewEvent(j.ID, party, job.KindWarning, job.Text{Message: text}, time.Now())
		if e2 == nil {
			_, _, e2 = h.db.Append(ctx, e, 0)
		}
		if e2 != nil { // the sum comes at the job's end
			h.log.Error("a warning could not be stored", "job", j.ID, "err", e2)
		}
	}
	return err
}

// tellGaps says at a job's end what the hub's copies of the parties' logs lack.
func (c *control) tellGaps(ctx context.Context, j job.Job, ps []job.Party) {
	for _, p := range ps {
		gaps, err := logs.Gaps(c.hub.logDir(j.ID, p.Name))
		if err != nil {
			c.warn(ctx, "the logs of %s cannot be looked at: %v", p.Name, err)
			continue
		}
		for _, name := range slices.Sorted(maps.Keys(gaps)) {
			var n int64
			for _, g := range gaps[name] {
				n += g.Bytes()
			}
			first, last := gaps[name][0], gaps[name][len(gaps[name])-1]
			c.warn(ctx, "of %s of %s, %d bytes (%s) are left out between byte %d and byte %d", name, p.Name, n, human.IBytes(uint64(n)), first.From, last.To)
		}
	}
}
