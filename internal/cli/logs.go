package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/pergolafl/pergola/internal/api"
	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/localrun"
	"github.com/pergolafl/pergola/internal/logs"
	"github.com/pergolafl/pergola/internal/problem"
)

// logged is one line of a program.
type logged struct {
	Party   string     `json:"party"`
	Program string     `json:"program"`
	Time    *time.Time `json:"time,omitempty"` // written at this time or less than a second later, by the party's clock
	Line    string     `json:"line"`
	LeftOut int64      `json:"left_out,omitempty"` // bytes that are not kept; Line says so
}

// lines cuts pieces of logs into lines.
type lines struct {
	logs map[string]*logState // by party/file
	fn   func(logged) error
}

type logState struct {
	party, file string
	rest        []byte    // a line whose end is to come
	at          time.Time // of the rest, or of the last line; zero: not known
}

func newLines(fn func(logged) error) *lines { return &lines{map[string]*logState{}, fn} }

// maxPending bounds a line that does not end.
const maxPending = 1 << 20

func (l *lines) add(c *pb.LogChunk) error {
	if c.GetFile() == logs.MetricsFile {
		return nil
	}
	key := c.GetParty() + "/" + c.GetFile()
	s := l.logs[key]
	if s == nil {
		s = &logState{party: c.GetParty(), file: c.GetFile()}
		l.logs[key] = s
	}
	if c.GetSkipped() > 0 {
		if err := l.flush(s); err != nil {
			return err
		}
		out := s.line([]byte(logs.Marker(c.GetSkipped())))
		out.LeftOut, out.Time = c.GetSkipped(), nil
		if err := l.fn(out); err != nil {
			return err
		}
	}
	times, at := c.GetTimes(), c.GetOffset()
	data := c.GetData()
	for len(data) > 0 {
		if len(s.rest) == 0 { // a line begins here
			for len(times) > 0 && times[0].GetOffset() <= at {
				s.at, times = times[0].GetTime().AsTime(), times[1:]
			}
		}
		i := bytes.IndexByte(data, '\n')
		if i < 0 {
			s.rest = append(s.rest, data[:min(len(data), max(0, maxPending-len(s.rest)))]...)
			break
		}
		line := data[:i]
		if len(s.rest) > 0 {
			line = append(s.rest, line...)
			s.rest = s.rest[:0]
		}
		if err := l.fn(s.line(line)); err != nil {
			return err
		}
		data, at = data[i+1:], at+int64(i)+1
	}
	for _, t := range times { // of the line that goes on
		s.at = t.GetTime().AsTime()
	}
	return nil
}

func (s *logState) line(text []byte) logged {
	program, shown := localrun.Shown(s.file, text)
	out := logged{Party: s.party, Program: program, Line: shown}
	if !s.at.IsZero() {
		at := s.at
		out.Time = &at
	}
	return out
}

func (l *lines) flush(s *logState) error {
	if len(s.rest) == 0 {
		return nil
	}
	line := s.line(s.rest)
	s.rest = s.rest[:0]
	return l.fn(line)
}

// end gives the last lines that have no end.
func (l *lines) end() error {
	for _, s := range l.logs {
		if err := l.flush(s); err != nil {
			return err
		}
	}
	return nil
}

type logsFlags struct {
	follow, stamps bool
	parties        []string
	programs       []string
	since          string
	tail           int
}

// request makes of the flags what the hub is asked for.
func (f *logsFlags) request(id string, tailed bool) (*pb.TailLogsRequest, error) {
	req := &pb.TailLogsRequest{Id: id, Parties: f.parties, Once: !f.follow}
	for _, p := range f.programs {
		file := localrun.LogOf(p)
		if file == "" {
			return nil, problem.New(problem.Usage, "name some of: "+strings.Join(localrun.Programs(), ", ")+"; or a file, such as client_app_log.txt", "--program %q is none%s", p, problem.DidYouMean(p, localrun.Programs()))
		}
		req.Files = append(req.Files, file)
	}
	if f.since != "" {
		at, ago, err := parseSince(f.since)
		switch {
		case err != nil:
			return nil, err
		case ago > 0:
			req.Ago = durationpb.New(ago) // from the hub's clock: this machine's may be wrong
		default:
			req.Since = timestamppb.New(at)
		}
	}
	if tailed {
		if f.tail < 0 || f.tail > 1<<30 {
			return nil, problem.New(problem.Usage, "give 0 or more", "--tail %d is no number of lines", f.tail)
		}
		n := int32(f.tail)
		req.Lines = &n
	}
	return req, nil
}

// sinceForms are those of a time; one without a zone is of this machine's.
var sinceForms = []string{time.RFC3339Nano, "2006-01-02T15:04:05", "2006-01-02 15:04:05", "2006-01-02T15:04", "2006-01-02 15:04", "2006-01-02"}

// parseSince reads a time, or how long ago it was.
func parseSince(s string) (at time.Time, ago time.Duration, err error) {
	if d, err := job.ParseDuration(s); err == nil && d > 0 {
		return time.Time{}, d.Std(), nil
	}
	for _, form := range sinceForms {
		if at, err := time.ParseInLocation(form, s, time.Local); err == nil {
			return at, 0, nil
		}
	}
	return time.Time{}, 0, problem.New(problem.Usage, `write it like "10m", "2d", "2026-11-27 14:00" or "2026-11-27T14:00:00Z"`, "--since %q is neither a duration nor a time", s)
}

func newLogs(e env) *cobra.Command {
	h := &hubCommand{env: e}
	var f logsFlags
	c := &cobra.Command{
		Use: "logs JOB", Short: "Show the log lines of a job's programs",
		Long: `Logs shows what the programs of a job have written, at the hub (party hub) and at the sites, each line with the program and
the party that it is of. With --follow it goes on until the job is over, also when the hub is away for a while.
When a line was written is known to a second, by the clock of its party; --since 10m counts back from the hub's clock.
A line in brackets says how many bytes are left out where a party's logs have outgrown their quota.`,
		Example: "  pergola logs 01k9 --follow\n  pergola logs 01k9 --party st-anna --since 10m\n  pergola logs 01k9 --program FLWR-SA --tail 20\n  pergola logs 01k9 --since '2026-11-27 14:00' --timestamps\n  pergola logs 01k9 --party hub --json",
		Args:    exactArgs(1, "a job's id, or the beginning of it"), ValidArgsFunction: completeJobs,
		RunE: func(cmd *cobra.Command, args []string) error {
			req, err := f.request(args[0], cmd.Flags().Changed("tail"))
			if err != nil {
				return err
			}
			return h.with(cmd.Context(), func(ctx context.Context, c *api.Client) error {
				res, err := c.Jobs.GetJob(ctx, &pb.GetJobRequest{Id: args[0]})
				if err != nil {
					return err
				}
				req.Id = res.GetJob().GetId()
				enc := json.NewEncoder(e.stdout)
				enc.SetEscapeHTML(false)
				l := newLines(func(l logged) error {
					if h.json {
						return enc.Encode(l)
					}
					stamp := ""
					if f.stamps {
						stamp = fmt.Sprintf("%-19s  ", "")
						if l.Time != nil {
							stamp = l.Time.Local().Format("2006-01-02 15:04:05") + "  "
						}
					}
					_, err := fmt.Fprintf(e.stdout, "%s[%s@%s] %s\n", stamp, l.Program, l.Party, l.Line)
					return err
				})
				if err := h.telling().Tail(ctx, c, req, l.add); err != nil {
					return unlessInterrupted(ctx, err)
				}
				return l.end()
			})
		},
	}
	fl := c.Flags()
	fl.BoolVarP(&f.follow, "follow", "f", false, "go on until the job is over")
	fl.StringSliceVar(&f.parties, "party", nil, "only these parties: hub, or sites' names")
	fl.StringSliceVar(&f.programs, "program", nil, "only these programs: "+strings.Join(localrun.Programs(), ", "))
	fl.StringVar(&f.since, "since", "", "only lines written so long ago at most (10m, 2d), or at this time or later")
	fl.IntVarP(&f.tail, "tail", "n", 0, "only so many of each program's last lines at first")
	fl.BoolVarP(&f.stamps, "timestamps", "t", false, "when each line was written, to a second")
	must(c.RegisterFlagCompletionFunc("party", func(cmd *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
		names, d := completeSites(cmd, args, typed)
		return append(names, job.HubParty), d
	}))
	must(c.RegisterFlagCompletionFunc("program", cobra.FixedCompletions(slices.Clone(localrun.Programs()), cobra.ShellCompDirectiveNoFileComp)))
	return h.add(c, "one JSON object a line")
}
