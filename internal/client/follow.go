package client

import (
	"context"
	"errors"
	"io"
	"time"

	"github.com/cenkalti/backoff/v5"
	"google.golang.org/protobuf/proto"

	"github.com/pergolafl/pergola/internal/api"
	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/problem"
)

// Patience is how long a hub may be away while a job is followed: an upgrade, a restart, a network that changes. Who waits for a job for
// hours does not want to begin anew for that.
const Patience = 10 * time.Minute

// Following says what is told while something is followed.
type Following struct {
	// Away, if there is one, hears that the hub is not there, once for each time; Back that it is again.
	Away func(error)
	Back func()
}

// follow opens streams one after another until one ends well. Each is to begin where the one before broke off. One says whether anything came.
func (f Following) follow(ctx context.Context, one func() (came bool, err error)) error {
	bo := backoff.NewExponentialBackOff()
	bo.InitialInterval, bo.MaxInterval = 100*time.Millisecond, 3*time.Second
	var broken time.Time // since when the hub is away
	back := func() {
		if !broken.IsZero() && f.Back != nil {
			f.Back()
		}
		broken = time.Time{}
		bo.Reset()
	}
	for {
		came, err := one()
		if came {
			back()
		}
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case refused(err):
			return err
		}
		if e, ok := errors.AsType[ended](err); ok {
			return e.error
		}
		if broken.IsZero() {
			broken = time.Now()
			if f.Away != nil {
				f.Away(err)
			}
		}
		if time.Since(broken) > Patience {
			return &problem.Error{Code: problem.HubUnreachable, Msg: "the hub has not answered for " + Patience.String(), Err: err, Next: "check that it runs; the job goes on without this command"}
		}
		select {
		case <-time.After(bo.NextBackOff()):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// refused tells whether the hub has answered, so that asking again is of no use.
func refused(err error) bool {
	p, ok := errors.AsType[*problem.Error](err)
	return ok && p.Code != problem.HubUnreachable && p.Code != problem.Unavailable && p.Code != problem.ProxyFailed
}

// Watch gives each event of a job behind after to fn, once and in order, until the job is over; with once, only those that there are. It
// goes on behind the last one when the connection breaks. An error of fn ends it.
func (f Following) Watch(ctx context.Context, c *api.Client, id string, after int64, once bool, fn func(job.Event) error) error {
	over := false
	return f.follow(ctx, func() (came bool, err error) {
		s, err := c.Jobs.WatchJob(ctx, &pb.WatchJobRequest{Id: id, After: after, Once: once})
		if err != nil {
			return false, err
		}
		defer s.Close()
		for {
			m, err := s.Receive()
			if errors.Is(err, io.EOF) && (over || once) {
				return true, nil
			}
			if err != nil {
				return came, err
			}
			came = true
			e, err := api.FromEvent(m.GetEvent())
			if err != nil {
				return came, &problem.Error{Code: problem.Version, Msg: "an event of the hub cannot be read", Err: err, Next: "install the hub's version here"}
			}
			after = e.Seq
			if e.Kind == job.KindJobState {
				var st job.JobState
				if e.Decode(&st) == nil && st.To.Terminal() {
					over = true
				}
			}
			if err := fn(e); err != nil {
				return came, ended{err}
			}
		}
	})
}

// ended is the caller's own end of what it follows.
type ended struct{ error }

// Tail gives each piece of the logs that req asks for to fn, each byte once and each log in order, until the job is over; with
// once, only what there is. Where bytes are not kept, a piece says so. It goes on where it was when the connection breaks. An error
// of fn ends it.
func (f Following) Tail(ctx context.Context, c *api.Client, req *pb.TailLogsRequest, fn func(*pb.LogChunk) error) error {
	req = proto.CloneOf(req)
	have := map[string]int64{}
	return f.follow(ctx, func() (came bool, err error) {
		req.Offsets = have
		s, err := c.Jobs.TailLogs(ctx, req)
		if err != nil {
			return false, err
		}
		defer s.Close()
		for {
			m, err := s.Receive()
			if errors.Is(err, io.EOF) {
				return true, nil
			}
			if err != nil {
				return came, err
			}
			came = true
			for key, n := range m.GetBegins() {
				have[key] = n
			}
			ch := m.GetChunk()
			if ch == nil {
				// Where to begin was found out once: logs that appear from now on are wanted whole.
				req.Since, req.Ago, req.Lines = nil, nil, nil
				continue
			}
			key := ch.GetParty() + "/" + ch.GetFile()
			end := ch.GetOffset() + int64(len(ch.GetData()))
			if skip := have[key] - ch.GetOffset(); skip > 0 {
				skip = min(skip, int64(len(ch.GetData())))
				ch.Data, ch.Offset = ch.GetData()[skip:], ch.GetOffset()+skip
			}
			ch.Skipped = max(ch.GetOffset()-have[key], 0)
			have[key] = max(have[key], end)
			if len(ch.GetData()) == 0 && ch.GetSkipped() == 0 {
				continue
			}
			if err := fn(ch); err != nil {
				return came, ended{err}
			}
		}
	})
}
