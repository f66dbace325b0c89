package localrun

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/pergolafl/pergola/internal/api"
	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/logs"
	"github.com/pergolafl/pergola/internal/problem"
)

// show hands an event on, keeps it in events.jsonl, and takes from it what the summary needs.
func (r *run) show(e Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.events != nil && e.Kind != KindLog && r.logErr == nil {
		if b, err := json.Marshal(e.Event); err == nil {
			if _, err := r.events.Write(append(b, '\n')); err != nil {
				r.logErr = err // told by the hub's own full disk; the run's end is not held up by this copy
			}
		}
	}
	r.summary.Take(e.Event)
	if r.opt.Event != nil {
		r.opt.Event(e)
	}
}

// Take takes from an event of the job what the summary needs.
func (s *Summary) Take(e job.Event) {
	switch e.Kind {
	case job.KindJobState:
		var c job.JobState
		if e.Decode(&c) == nil {
			s.State, s.ended = c.To, c.To.Terminal()
			if c.Cause != nil {
				s.Cause = c.Cause
			}
		}
	case job.KindEngine:
		var c job.EngineChoice
		if e.Decode(&c) == nil {
			s.Engine, s.Why = c.Engine, c.Why
		}
	case job.KindClientMetrics:
		var m job.ClientMetrics
		if e.Decode(&m) == nil {
			s.Clients = append(s.Clients, m)
		}
	case job.KindMetrics:
		var m job.Metrics
		if e.Decode(&m) == nil {
			s.add(m)
		}
	case job.KindClientFailure:
		var f job.ClientFailure
		if e.Decode(&f) == nil {
			s.Failures = append(s.Failures, f)
			s.FailedAt = append(s.FailedAt, e.Party)
		}
	case job.KindLink:
		var l job.Link
		if e.Decode(&l) == nil && l.Site != "" {
			if s.Link == nil {
				s.Link = map[string]job.Link{}
			}
			s.Link[l.Site] = l
		}
	case job.KindWarning:
		var t job.Text
		if e.Decode(&t) == nil && !slices.Contains(s.Warnings, t.Message) {
			s.Warnings = append(s.Warnings, t.Message)
		}
	}
}

// add puts metrics into their round; a later report of the same name counts.
func (s *Summary) add(m job.Metrics) {
	i, ok := slices.BinarySearchFunc(s.Rounds, m.Round, func(a RoundMetrics, n int) int { return a.Round - n })
	if !ok {
		s.Rounds = slices.Insert(s.Rounds, i, RoundMetrics{Round: m.Round, Phases: map[string]job.Values{}})
	}
	v := s.Rounds[i].Phases[m.Phase]
	if v == nil {
		v = job.Values{}
		s.Rounds[i].Phases[m.Phase] = v
	}
	for k, x := range m.Values {
		v[k] = x
	}
}

// sawEnd tells whether the job's last event was shown.
func (r *run) sawEnd() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.summary.Job != "" && r.summary.State.Terminal() && r.summary.ended
}

func (r *run) emit(kind string, body any) {
	e, err := job.NewEvent(r.summary.Job, "", kind, body, time.Now())
	if err != nil {
		return // only for what cannot be JSON
	}
	r.show(Event{Event: e})
}

func (r *run) note(format string, args ...any) {
	r.emit(job.KindNote, job.Text{Message: fmt.Sprintf(format, args...)})
}

func (r *run) line(party, program, text string) {
	b, err := json.Marshal(struct {
		Program string `json:"program"`
		Line    string `json:"line"`
	}{program, text})
	if err != nil {
		return // a string and a string are JSON
	}
	r.show(Event{Event: job.Event{Job: r.summary.Job, At: time.Now(), Party: party, Kind: KindLog, Body: b}, Program: program, Line: text})
}

// prefixes are those of the reference system.
var prefixes = map[string]string{"superlink_log.txt": "FLWR-SL", "server_app_log.txt": "FLWR-SA", "client_app_log.txt": "FLWR-CA", "environment_log.txt": ProgramInstaller}

// Programs gives the names of the programs that have logs, sorted.
func Programs() []string { return slices.Sorted(maps.Values(prefixes)) }

// LogOf gives the log of a program, by the name that Shown gives or by that of the log itself; "" if there is none.
func LogOf(program string) string {
	for file, name := range prefixes {
		if strings.EqualFold(name, program) {
			return file
		}
	}
	if logs.ValidName(program) == nil {
		return program
	}
	return ""
}

// ProgramInstaller is the program of lines that come from the building of an environment.
const ProgramInstaller = "ENV"

// maxLine is how much of one line is shown; the log has all of it.
const maxLine = 64 << 10

// tail shows the programs' lines.
func (r *run) tail(ctx context.Context, c *api.Client, id job.ID) error {
	s, err := c.Jobs.TailLogs(ctx, &pb.TailLogsRequest{Id: string(id)})
	if err != nil {
		return err
	}
	defer s.Close()
	rest := map[string][]byte{}
	var live liveMetrics
	for {
		m, err := s.Receive()
		if err != nil {
			for k, b := range rest { // last lines without an end
				if len(b) > 0 {
					party, file, _ := strings.Cut(k, "/")
					r.lineOf(party, file, b)
				}
			}
			if isProblem(err) {
				return err
			}
			return nil
		}
		ch := m.GetChunk()
		if ch.GetFile() == logs.MetricsFile {
			if r.opt.Level <= slog.LevelDebug {
				live.show(ch, r.line)
			}
			continue
		}
		if ch == nil {
			continue // where the logs begin
		}
		key := ch.GetParty() + "/" + ch.GetFile()
		if n := ch.GetSkipped(); n > 0 {
			if len(rest[key]) > 0 {
				r.lineOf(ch.GetParty(), ch.GetFile(), rest[key])
				rest[key] = nil
			}
			r.lineOf(ch.GetParty(), ch.GetFile(), []byte(logs.Marker(n)))
		}
		b := append(rest[key], ch.GetData()...)
		for {
			l, after, ok := bytes.Cut(b, []byte{'\n'})
			if !ok {
				break
			}
			r.lineOf(ch.GetParty(), ch.GetFile(), l)
			b = after
		}
		if len(b) > maxLine {
			b = b[:maxLine]
		}
		rest[key] = slices.Clone(b)
	}
}

func (r *run) lineOf(party, file string, line []byte) {
	name, text := Shown(file, line)
	r.line(party, name, text)
}

// Shown gives the program that a log file is of, and one of its lines as people read it.
func Shown(file string, line []byte) (program, text string) {
	program = prefixes[file]
	if program == "" {
		program = file
	}
	if len(line) > maxLine {
		line = line[:maxLine]
	}
	return program, strings.ToValidUTF8(strings.TrimRight(string(line), "\r"), "\uFFFD")
}

// isProblem tells whether the hub has said what is wrong, so that asking again is of no use.
func isProblem(err error) bool {
	p, ok := errors.AsType[*problem.Error](err)
	return ok && p.Code != problem.HubUnreachable
}

func diskProblem(err error, where string) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return problem.Wrap(err, problem.DiskFull, "make room on that disk, or choose another with --out", "no space is left in %s", where)
	}
	return err
}
