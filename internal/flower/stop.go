package flower

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/pergolafl/pergola/internal/proc"
)

// DefaultStopGrace is how long a run may take to stop once Flower was asked to stop it, before programs are ended: the
// reference's superlink_grace_period, 2 s.
const DefaultStopGrace = 2 * time.Second

// stopPause is the time between two looks at a run that is being stopped.
const stopPause = 100 * time.Millisecond

// stopRun is what `flwr stop` does: the run becomes finished:stopped, and the server app ends by itself when it notices. It
// waits for both within StopGrace, whatever the superlink does, and gives the server app's exit. It asks once; without a
// run that goes on it does nothing.
func (s *Server) stopRun(ctx context.Context) proc.Exit {
	lost := proc.Exit{Code: proc.ExitFatal}
	s.mu.Lock()
	run, finished := s.run, s.finished
	s.finished = true
	s.mu.Unlock()
	if run == 0 || finished || s.cfg.StopGrace < 0 || s.cfg.Install.Caps.Generation <= GenDriver { // there, it is a program to be stopped
		return lost
	}
	select {
	case <-s.done:
		return lost // there is nobody to ask
	default:
	}
	ctx, cancel := context.WithTimeout(ctx, s.cfg.StopGrace)
	defer cancel()
	err := s.control.stopRun(ctx, run)
	if refused, ok := errors.AsType[*callError](err); ok {
		s.note("run %d cannot be stopped by way of Flower: %s", run, refused.msg) // it has just finished, say
	} else if err != nil {
		s.note("the superlink did not stop run %d within %s: %v", run, s.cfg.StopGrace, err)
		return lost
	}
	tick := time.NewTicker(stopPause)
	defer tick.Stop()
	last := lost
	for told := false; ; {
		if !told {
			if st, err := s.control.state(ctx, run); err == nil && st.status == statusFinished {
				s.note("run %d is %s:%s", run, st.status, st.sub)
				last, told = exitOfRun(st), true
			}
		}
		if told && !s.appAlive() {
			return last
		}
		select {
		case <-tick.C:
		case <-s.done:
			return last
		case <-ctx.Done():
			return last
		}
	}
}

// runEnded says that there is no run to be stopped any more.
func (s *Server) runEnded() {
	s.mu.Lock()
	s.finished = true
	s.mu.Unlock()
}

func (s *Server) note(format string, args ...any) {
	s.party.events.emit(Event{Kind: Note, Program: ProgramSuperlink, Message: fmt.Sprintf(format, args...)})
}

// exitOfRun gives the code that stands for a finished run, see docs/exit-codes.md: its server app is not our child.
func exitOfRun(st runStatus) proc.Exit {
	switch st.sub {
	case subCompleted:
		return proc.Exit{}
	case subStopped:
		return proc.Exit{Code: -15}
	}
	return proc.Exit{Code: proc.ExitException}
}

// stopRun asks the superlink to stop a run.
func (c *control) stopRun(ctx context.Context, run uint64) error {
	req := protowire.AppendTag(nil, 1, protowire.VarintType)
	req = protowire.AppendVarint(req, run)
	reply, err := c.call(ctx, "StopRun", "stop-run", req)
	if err != nil {
		return err
	}
	stopped := false
	err = fields(reply, func(n protowire.Number, v uint64, _ []byte) error {
		if n == 1 {
			stopped = v != 0
		}
		return nil
	})
	if err == nil && !stopped {
		err = &callError{0, "the superlink did not do it"}
	}
	return err
}
