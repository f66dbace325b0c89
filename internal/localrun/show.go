package localrun

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/pergolafl/pergola/internal/api"
	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/hub"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/proc"
	"github.com/pergolafl/pergola/internal/store/sqlite"
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
	s := &r.summary
	switch e.Kind {
	case job.KindJobState:
		var c job.JobState
		if e.Decode(&c) == nil {
			s.State, s.ended = c.To, c.To.Terminal()
			if c.Cause != nil {
				s.Cause = c.Cause
			}
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
	case job.KindWarning:
		var t job.Text
		if e.Decode(&t) == nil && !slices.Contains(s.Warnings, t.Message) {
			s.Warnings = append(s.Warnings, t.Message)
		}
	}
	if r.opt.Event != nil {
		r.opt.Event(e)
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
var prefixes = map[string]string{"superlink_log.txt": "FLWR-SL", "server_app_log.txt": "FLWR-SA", "client_app_log.txt": "FLWR-CA"}

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
		key := ch.GetParty() + "/" + ch.GetFile()
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
	name := prefixes[file]
	if name == "" {
		name = file
	}
	if len(line) > maxLine {
		line = line[:maxLine]
	}
	r.line(party, name, strings.ToValidUTF8(strings.TrimRight(string(line), "\r"), "\uFFFD"))
}

// tidy ends what is left, settles the job if its hub could not, and keeps of the run's files what the user wants: logs,
// results and the store.
func (r *run) tidy(cause error) error {
	if _, err := proc.KillTree(os.Getpid()); err != nil {
		return err
	}
	hubDir := filepath.Join(r.state, "hub")
	if cause != nil && r.summary.Job != "" {
		if err := r.settle(filepath.Join(hubDir, hub.DatabaseFile), problem.From(cause)); err != nil && problem.CodeOf(cause) != problem.DiskFull {
			return err
		}
	}
	var errs []error
	if r.summary.Job != "" {
		jobDir := filepath.Join(hubDir, "jobs", string(r.summary.Job))
		errs = append(errs, moveInto(filepath.Join(jobDir, "logs"), filepath.Join(r.out, "logs")),
			moveInto(filepath.Join(jobDir, "results"), filepath.Join(r.out, "results")),
			rename(filepath.Join(jobDir, "party", "runner.log"), filepath.Join(r.out, "logs", "hub-runner.log")))
	}
	for _, n := range r.names {
		m, err := filepath.Glob(filepath.Join(r.state, n, "jobs", "*", "party", "runner.log"))
		errs = append(errs, err)
		for _, f := range m {
			errs = append(errs, rename(f, filepath.Join(r.out, "logs", n+"-runner.log")))
		}
	}
	for _, f := range []string{"", "-wal", "-shm"} {
		errs = append(errs, rename(filepath.Join(hubDir, hub.DatabaseFile+f), filepath.Join(r.out, hub.DatabaseFile+f)))
	}
	errs = append(errs, os.RemoveAll(r.state))
	if err := errors.Join(errs...); err != nil {
		return problem.Wrap(err, problem.Internal, "remove "+r.state+" by hand", "the run's files could not be tidied up")
	}
	return nil
}

// settle writes the end of a job whose hub is gone into its store.
func (r *run) settle(path string, cause *problem.Error) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	db, err := sqlite.Open(ctx, path)
	if err != nil {
		return err
	}
	defer db.Close()
	j, err := db.Job(ctx, r.summary.Job)
	if err != nil {
		return err
	}
	now := time.Now()
	if j.State.Active() {
		if err := db.Move(ctx, j.ID, job.Stopping, cause, "", now); err != nil {
			return err
		}
		j.State = job.Stopping
	}
	if j.State.Terminal() {
		return nil
	}
	ps, err := db.Parties(ctx, j.ID)
	if err != nil {
		return err
	}
	for _, p := range ps {
		if !p.State.Terminal() {
			if err := db.MoveParty(ctx, j.ID, p.Name, job.PartyDone, nil, "ended with the job", now); err != nil {
				return err
			}
		}
	}
	if err := db.Move(ctx, j.ID, j.State.Outcome(cause), cause, "", now); err != nil {
		return err
	}
	r.mu.Lock()
	r.summary.State = j.State.Outcome(cause)
	r.mu.Unlock()
	return nil
}

// moveInto renames the entries of a folder into another one.
func moveInto(from, to string) error {
	es, err := os.ReadDir(from)
	if os.IsNotExist(err) || len(es) == 0 {
		return nil
	}
	if err != nil {
		return err
	}
	if err := os.MkdirAll(to, 0o755); err != nil {
		return err
	}
	var errs []error
	for _, e := range es {
		if d := filepath.Join(from, e.Name()); e.IsDir() && isEmpty(d) {
			continue
		}
		errs = append(errs, rename(filepath.Join(from, e.Name()), filepath.Join(to, e.Name())))
	}
	return errors.Join(errs...)
}

func isEmpty(dir string) bool {
	es, err := os.ReadDir(dir)
	return err == nil && len(es) == 0
}

func rename(from, to string) error {
	if err := os.Rename(from, to); err != nil && !os.IsNotExist(err) {
		return err
	}
	return nil
}

// dialable makes an address that can be dialled of one that is listened on.
func dialable(addr string) string {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return addr
	}
	if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() {
		return net.JoinHostPort("127.0.0.1", port)
	}
	return addr
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
