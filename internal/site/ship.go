package site

import (
	"context"
	"maps"
	"slices"
	"time"

	"github.com/cenkalti/backoff/v5"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/logs"
	"github.com/pergolafl/pergola/internal/problem"
)

// maxFailures is how often the copying of logs that are complete may fail, other than by a hub that cannot be reached.
const maxFailures = 5

// lastWords is how long the hub may take to hear what of the logs it will never have.
const lastWords = 5 * time.Second

// ship copies the programs' logs to the hub until they have ended and all is there.
func (p *part) ship(ctx context.Context, dir string, ended <-chan struct{}) {
	wanted, cancel := p.whileWanted(ctx)
	defer cancel()
	bo := backoff.NewExponentialBackOff()
	bo.InitialInterval, bo.MaxInterval = 50*time.Millisecond, 5*time.Second
	for failures := 0; failures < maxFailures; {
		moved, err := p.shipOnce(wanted, dir, ended)
		if err == nil {
			return
		}
		if wanted.Err() != nil {
			break
		}
		switch problem.CodeOf(err) {
		case problem.Denied, problem.NotFound, problem.Usage:
			p.log.Error("the logs could not be copied to the hub", "err", err)
			return
		}
		if moved {
			bo.Reset()
			failures = 0
		}
		select {
		case <-ended:
			failures++ // nothing will become of it, and the party's last word waits
		default:
		}
		wait := bo.NextBackOff()
		p.log.Warn("the copy of the logs broke off and begins again where the hub's ends", "err", err, "retry", wait)
		select {
		case <-time.After(wait):
		case <-wanted.Done():
		}
	}
	if ctx.Err() == nil { // the job ended without waiting for all of them
		p.confess(ctx, dir)
	}
}

// shipOnce copies from where the hub's copies end. moved tells whether the hub has taken anything.
func (p *part) shipOnce(ctx context.Context, dir string, ended <-chan struct{}) (moved bool, err error) {
	have, err := p.offsets(ctx)
	if err != nil {
		return false, err
	}
	ends, err := logs.Sizes(dir)
	if err != nil {
		return false, err
	}
	for name := range have {
		// The end of a log was lost here, with the power.
		if n, ok := ends[name]; ok && n < have[name] {
			p.log.Warn("a log is shorter than the hub's copy; what is written up to there is not copied", "log", name, "bytes", n, "hub", have[name])
			have[name] = n
		}
	}
	return moved, logs.FollowDir(ctx, dir, ended, have, func(c logs.Chunk) error {
		err := p.pushLog(ctx, c)
		moved = moved || err == nil
		return err
	})
}

func (p *part) offsets(ctx context.Context) (map[string]int64, error) {
	res, err := retry(ctx, p.log, final, func() (*pb.GetLogOffsetsResponse, error) {
		return p.agent.client.Sites.GetLogOffsets(ctx, &pb.GetLogOffsetsRequest{JobId: string(p.id)})
	})
	return res.GetOffsets(), err
}

// pushLog sends a piece, as often as it takes. A hub whose disk is full may have room later.
func (p *part) pushLog(ctx context.Context, c logs.Chunk) error {
	out := &pb.LogChunk{JobId: string(p.id), Party: p.agent.conf.Name, File: c.Name, Offset: c.Offset, Skipped: c.Skipped, Data: c.Data}
	for _, t := range c.Times {
		out.Times = append(out.Times, &pb.LogTime{Offset: t.Offset, Time: timestamppb.New(t.At)})
	}
	_, err := retry(ctx, p.log, final, func() (*pb.PushLogsResponse, error) {
		return p.agent.client.Sites.PushLogs(ctx, &pb.PushLogsRequest{Chunks: []*pb.LogChunk{out}})
	})
	return err
}

// confess tells the hub how much of the logs it will never have, so that whoever reads them is told.
func (p *part) confess(ctx context.Context, dir string) {
	ctx, cancel := context.WithTimeout(ctx, lastWords)
	defer cancel()
	have, err := p.offsets(ctx)
	var ends map[string]int64
	if err == nil {
		ends, err = logs.Sizes(dir)
	}
	for _, name := range slices.Sorted(maps.Keys(ends)) {
		if lost := ends[name] - have[name]; err == nil && lost > 0 && name != logs.MetricsFile {
			p.log.Warn("the job has ended before all of a log was copied to the hub", "log", name, "bytes", lost)
			err = p.pushLog(ctx, logs.Chunk{Name: name, Offset: ends[name], Skipped: lost})
		}
	}
	if err != nil {
		p.log.Error("the hub was not told what it lacks of the logs", "err", err)
	}
}

// goOn lets the logs of a party that begins anew go on where the hub's copies end, also where the earlier ones are gone.
func (p *part) goOn(ctx context.Context, dir string) error {
	if p.attempt() == 0 {
		return nil
	}
	have, err := p.offsets(ctx)
	if err != nil {
		return err
	}
	for name, offset := range have {
		if err := (logs.Dir{Path: dir}).Begin(name, offset); err != nil {
			return err
		}
	}
	return nil
}
