package cli

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/pergolafl/pergola/internal/api"
	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/client"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/localrun"
	"github.com/pergolafl/pergola/internal/problem"
)

// addContext gives a command that calls a hub the choice of it.
func addContext(c *cobra.Command, name *string) {
	c.Flags().StringVar(name, "context", "", "the hub to call, by the name of its context (default: the one in use)")
	must(c.RegisterFlagCompletionFunc("context", func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		names, err := client.Names()
		if err != nil {
			return nil, cobra.ShellCompDirectiveError
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	}))
}

// completeWait is how long the hub may take while somebody waits for the tab key.
const completeWait = time.Second

// fromHub asks the hub of a command's context for what a word may be.
func fromHub(cmd *cobra.Command, ask func(context.Context, *api.Client) ([]string, error)) ([]string, cobra.ShellCompDirective) {
	name := ""
	if f := cmd.Flags().Lookup("context"); f != nil {
		name = f.Value.String()
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), completeWait)
	defer cancel()
	c, _, err := client.Open(name)
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	defer c.Close()
	out, err := ask(ctx, c)
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	return out, cobra.ShellCompDirectiveNoFileComp
}

func completeJobs(cmd *cobra.Command, _ []string, typed string) ([]string, cobra.ShellCompDirective) {
	return fromHub(cmd, func(ctx context.Context, c *api.Client) ([]string, error) {
		res, err := c.Jobs.ListJobs(ctx, &pb.ListJobsRequest{Prefix: typed, Limit: 50})
		var out []string
		for _, j := range res.GetJobs() {
			out = append(out, cobra.CompletionWithDesc(j.GetId(), j.GetName()+", "+j.GetState()))
		}
		return out, err
	})
}

func completeSites(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	return fromHub(cmd, func(ctx context.Context, c *api.Client) ([]string, error) {
		res, err := c.Jobs.ListSites(ctx, &pb.ListSitesRequest{})
		var out []string
		for _, s := range res.GetSites() {
			out = append(out, s.GetName())
		}
		return out, err
	})
}

// hubCommand is a command about jobs of a hub.
type hubCommand struct {
	env
	context string
	json    bool
}

// with calls fn with the context's hub, until a signal.
func (h *hubCommand) with(ctx context.Context, fn func(context.Context, *api.Client) error) error {
	ctx, cancel := untilSignal(ctx)
	defer cancel()
	c, known, err := client.Open(h.context)
	if err != nil {
		return err
	}
	defer c.Close()
	defer renewing(ctx, h.env, known, c)()
	return fn(ctx, c)
}

func (h *hubCommand) add(c *cobra.Command, what string) *cobra.Command {
	c.Flags().SortFlags = false
	addContext(c, &h.context)
	if what != "" {
		c.Flags().BoolVar(&h.json, "json", false, what)
	}
	if c.ValidArgsFunction == nil && c.Args != nil {
		c.ValidArgsFunction = cobra.NoFileCompletions
	}
	return c
}

// again repeats a call that is harmless to repeat while the hub is not there, for as long as a restart takes.
func again(ctx context.Context, call func() error) error {
	_, err := backoff.Retry(ctx, func() (struct{}, error) {
		err := call()
		if err != nil && problem.CodeOf(err) != problem.HubUnreachable && problem.CodeOf(err) != problem.Unavailable {
			err = backoff.Permanent(err)
		}
		return struct{}{}, err
	}, backoff.WithMaxElapsedTime(30*time.Second), backoff.WithBackOff(&backoff.ExponentialBackOff{InitialInterval: 100 * time.Millisecond, Multiplier: 1.5, RandomizationFactor: 0.5, MaxInterval: 3 * time.Second}))
	return err
}

func printJSON(w io.Writer, m proto.Message) error {
	b, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(m)
	if err != nil {
		return err
	}
	var out bytes.Buffer
	if err := json.Compact(&out, b); err != nil { // protojson's own spaces differ from run to run
		return err
	}
	_, err = fmt.Fprintln(w, out.String())
	return err
}

// printList prints a JSON array, also of nothing.
func printList[M proto.Message](w io.Writer, list []M) error {
	raw := make([]json.RawMessage, 0, len(list))
	for _, m := range list {
		b, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(m)
		if err != nil {
			return err
		}
		raw = append(raw, b)
	}
	return json.NewEncoder(w).Encode(raw)
}

func when(t *timestamppb.Timestamp) string {
	if t == nil {
		return "-"
	}
	return t.AsTime().Local().Format("2006-01-02 15:04:05")
}

// why gives what a job or party says about its state, in one line.
func why(reason string, c *pb.Problem) string {
	if c != nil {
		return c.GetCode() + ": " + c.GetMessage()
	}
	return reason
}

func clip(s string, n int) string {
	if r := []rune(s); len(r) > n {
		return string(r[:n-1]) + "…"
	}
	return s
}

func newJobs(e env) *cobra.Command {
	h := &hubCommand{env: e}
	var states []string
	var limit int
	var all bool
	var after string
	req := &pb.ListJobsRequest{}
	c := &cobra.Command{
		Use: "jobs", Short: "List the jobs of a hub, the newest first",
		Example: "  pergola jobs\n  pergola jobs --state running,queued\n  pergola jobs --submitter maria --all --json",
		Args:    exactArgs(0, "no argument"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			for _, s := range states {
				if !job.State(s).Known() {
					return problem.New(problem.Usage, "see docs/states.md", "--state %q is no state of a job%s", s, problem.DidYouMean(s, stateNames()))
				}
			}
			if limit < 1 {
				return problem.New(problem.Usage, "choose 1 or more, or --all", "--limit %d is too small", limit)
			}
			req.States, req.After = states, strings.ToLower(after)
			return h.with(cmd.Context(), func(ctx context.Context, c *api.Client) error {
				var js []*pb.Job
				more := false
				for all || len(js) < limit {
					req.Limit = 1000
					if !all {
						req.Limit = int32(min(limit-len(js)+1, 1000))
					}
					res, err := c.Jobs.ListJobs(ctx, req)
					if err != nil {
						return err
					}
					js = append(js, res.GetJobs()...)
					if len(res.GetJobs()) < int(req.GetLimit()) {
						break
					}
					req.After = js[len(js)-1].GetId()
				}
				if !all && len(js) > limit {
					js, more = js[:limit], true
				}
				if h.json {
					return printList(e.stdout, js)
				}
				if len(js) == 0 {
					fmt.Fprintln(e.stderr, "no jobs; submit one with: pergola submit APPDIR")
					return nil
				}
				tw := tabwriter.NewWriter(e.stdout, 0, 4, 2, ' ', 0)
				fmt.Fprintln(tw, "JOB\tNAME\tSTATE\tSUBMITTER\tSITES\tCREATED\tWHY")
				for _, j := range js {
					fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%d\t%s\t%s\n", j.GetId(), j.GetName(), j.GetState(), j.GetSubmitter(), max(0, len(j.GetParties())-1), when(j.GetCreateTime()), clip(why(j.GetReason(), j.GetCause()), 100))
				}
				if err := tw.Flush(); err != nil {
					return err
				}
				if more {
					fmt.Fprintf(e.stderr, "there are more: --after %s, or --all\n", js[len(js)-1].GetId())
				}
				return nil
			})
		},
	}
	c.Flags().StringSliceVar(&states, "state", nil, "only jobs in these states")
	c.Flags().StringVar(&req.Submitter, "submitter", "", "only jobs of this user")
	c.Flags().StringVar(&req.Name, "name", "", "only jobs of this name")
	c.Flags().IntVar(&limit, "limit", 20, "at most this many")
	c.Flags().StringVar(&after, "after", "", "only jobs that are older than this one, by its whole id")
	c.Flags().BoolVar(&all, "all", false, "all of them")
	must(c.RegisterFlagCompletionFunc("state", cobra.FixedCompletions(stateNames(), cobra.ShellCompDirectiveNoFileComp)))
	return h.add(c, "a JSON list")
}

func stateNames() []string {
	var out []string
	for _, s := range job.States() {
		out = append(out, string(s))
	}
	return out
}

func newShow(e env) *cobra.Command {
	h := &hubCommand{env: e}
	c := &cobra.Command{
		Use: "show JOB", Short: "Show a job and its parties", Example: "  pergola show 01k9\n  pergola show 01k9 --json",
		Args: exactArgs(1, "a job's id, or the beginning of it"), ValidArgsFunction: completeJobs,
		RunE: func(cmd *cobra.Command, args []string) error {
			return h.with(cmd.Context(), func(ctx context.Context, c *api.Client) error {
				res, err := c.Jobs.GetJob(ctx, &pb.GetJobRequest{Id: args[0]})
				if err != nil {
					return err
				}
				j := res.GetJob()
				if h.json {
					return printJSON(e.stdout, j)
				}
				return showJob(e.stdout, j)
			})
		},
	}
	return h.add(c, "the job as JSON")
}

func showJob(w io.Writer, j *pb.Job) error {
	tw := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintf(tw, "job\t%s\nname\t%s\nstate\t%s\n", j.GetId(), j.GetName(), j.GetState())
	if j.GetReason() != "" {
		fmt.Fprintf(tw, "why\t%s\n", j.GetReason())
	}
	if j.GetPriority() != 0 {
		fmt.Fprintf(tw, "priority\t%d\n", j.GetPriority())
	}
	if j.GetEngine() != "" {
		fmt.Fprintf(tw, "engine\t%s\n", j.GetEngine())
		if j.GetEngineWhy() != "" {
			fmt.Fprintf(tw, "\t%s\n", j.GetEngineWhy())
		}
	}
	fmt.Fprintf(tw, "submitter\t%s\ncreated\t%s\nstarted\t%s\nended\t%s\nbundle\t%s\n", j.GetSubmitter(), when(j.GetCreateTime()), when(j.GetStartTime()), when(j.GetEndTime()), j.GetBundleDigest())
	if c := api.FromProblem(j.GetCause()); c != nil {
		fmt.Fprintf(tw, "cause\t%s\n\t%s\n", c.Code, strings.ReplaceAll(text(c), "\n", "\n\t"))
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	tw = tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintln(tw, "\nPARTY\tSTATE\tSINCE\tWHY")
	lacks := map[string]string{}
	for _, l := range j.GetWait().GetLacks() {
		lacks[l.GetSite()] = lackText(l)
	}
	for _, p := range j.GetParties() {
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\n", p.GetName(), p.GetState(), when(p.GetUpdateTime()), cmp.Or(why(p.GetReason(), p.GetCause()), lacks[p.GetName()]))
	}
	return tw.Flush()
}

func newEvents(e env) *cobra.Command {
	h := &hubCommand{env: e}
	var follow bool
	var after int64
	c := &cobra.Command{
		Use: "events JOB", Short: "Show what has happened in a job", Example: "  pergola events 01k9\n  pergola events 01k9 --follow --json",
		Args: exactArgs(1, "a job's id, or the beginning of it"), ValidArgsFunction: completeJobs,
		RunE: func(cmd *cobra.Command, args []string) error {
			return h.with(cmd.Context(), func(ctx context.Context, c *api.Client) error {
				res, err := c.Jobs.GetJob(ctx, &pb.GetJobRequest{Id: args[0]})
				if err != nil {
					return err
				}
				enc := json.NewEncoder(e.stdout)
				err = h.telling().Watch(ctx, c, res.GetJob().GetId(), after, !follow, func(ev job.Event) error {
					if h.json {
						return enc.Encode(ev)
					}
					who := cmp.Or(ev.Party, "-")
					_, err := fmt.Fprintf(e.stdout, "%s  %-12s %-16s %s\n", ev.At.Local().Format("2006-01-02 15:04:05.000"), who, ev.Kind, ev.Body)
					return err
				})
				return unlessInterrupted(ctx, err)
			})
		},
	}
	c.Flags().BoolVarP(&follow, "follow", "f", false, "go on until the job is over")
	c.Flags().Int64Var(&after, "after", 0, "only events behind this position (seq in --json)")
	return h.add(c, "one JSON object a line")
}

// unlessInterrupted gives err, but where the user has ended the watching: that is no failure.
func unlessInterrupted(ctx context.Context, err error) error {
	if errors.Is(ctx.Err(), context.Canceled) {
		err = nil
	}
	return err
}

// telling says on stderr when the hub goes away and comes back.
func (h *hubCommand) telling() client.Following {
	return client.Following{
		Away: func(err error) {
			fmt.Fprintf(h.stderr, "the hub is not there (%s); trying again\n", problem.From(err).Msg)
		},
		Back: func() { fmt.Fprintln(h.stderr, "the hub is there again") },
	}
}

func logLine(id job.ID, party, program, text string) localrun.Event {
	b, err := json.Marshal(struct {
		Program string `json:"program"`
		Line    string `json:"line"`
	}{program, text})
	if err != nil {
		b = nil // two strings are JSON
	}
	return localrun.Event{Event: job.Event{Job: id, At: time.Now(), Party: party, Kind: localrun.KindLog, Body: b}, Program: program, Line: text}
}

// followJob gives events and log lines of a job, one at a time, until it is over.
func followJob(ctx context.Context, c *api.Client, id string, event func(job.Event), line func(party, program, text string), note func(string)) error {
	type item struct {
		event *job.Event
		log   [3]string
		note  string
	}
	items := make(chan item)
	g, gctx := errgroup.WithContext(ctx)
	put := func(i item) error {
		select {
		case items <- i:
			return nil
		case <-gctx.Done():
			return context.Cause(gctx)
		}
	}
	f := client.Following{
		Away: func(err error) {
			_ = put(item{note: "the hub is not there (" + problem.From(err).Msg + "); trying again"})
		},
		Back: func() { _ = put(item{note: "the hub is there again"}) },
	}
	g.Go(func() error {
		return f.Watch(gctx, c, id, 0, false, func(e job.Event) error { return put(item{event: &e}) })
	})
	g.Go(func() error {
		l := newLines(func(l logged) error { return put(item{log: [3]string{l.Party, l.Program, l.Line}}) })
		// The events' follower tells when the hub is away.
		if err := (client.Following{}).Tail(gctx, c, &pb.TailLogsRequest{Id: id}, l.add); err != nil {
			return err
		}
		return l.end()
	})
	done := make(chan error, 1)
	go func() {
		done <- g.Wait()
		close(items)
	}()
	for i := range items {
		switch {
		case i.event != nil:
			event(*i.event)
		case i.note != "":
			note(i.note)
		default:
			line(i.log[0], i.log[1], i.log[2])
		}
	}
	return <-done
}

func newAbort(e env) *cobra.Command {
	h := &hubCommand{env: e}
	var now bool
	c := &cobra.Command{
		Use: "abort JOB", Short: "End a job", Example: "  pergola abort 01k9\n  pergola abort 01k9 --now",
		Long: "Abort asks for an orderly end: Flower's run is stopped, then the programs. Aborting a job that is over changes nothing.",
		Args: exactArgs(1, "a job's id, or the beginning of it"), ValidArgsFunction: completeJobs,
		RunE: func(cmd *cobra.Command, args []string) error {
			return h.with(cmd.Context(), func(ctx context.Context, c *api.Client) error {
				var res *pb.AbortJobResponse
				err := again(ctx, func() (err error) {
					res, err = c.Jobs.AbortJob(ctx, &pb.AbortJobRequest{Id: args[0], Now: now})
					return err
				})
				if err != nil {
					return err
				}
				if h.json {
					return printJSON(e.stdout, res.GetJob())
				}
				_, err = fmt.Fprintf(e.stdout, "job %s is %s\n", res.GetJob().GetId(), res.GetJob().GetState())
				return err
			})
		},
	}
	c.Flags().BoolVar(&now, "now", false, "kill its programs instead of the orderly end")
	return h.add(c, "the job as JSON")
}

func newResubmit(e env) *cobra.Command {
	h := &hubCommand{env: e}
	var key string
	c := &cobra.Command{
		Use: "resubmit JOB", Short: "Submit a job's bundle again, with the same settings", Example: "  pergola resubmit 01k9",
		Args: exactArgs(1, "a job's id, or the beginning of it"), ValidArgsFunction: completeJobs,
		RunE: func(cmd *cobra.Command, args []string) error {
			return h.with(cmd.Context(), func(ctx context.Context, c *api.Client) error {
				if key == "" {
					key = rand.Text() // so that a retried call is one job
				}
				var res *pb.ResubmitJobResponse
				err := again(ctx, func() (err error) {
					res, err = c.Jobs.ResubmitJob(ctx, &pb.ResubmitJobRequest{Id: args[0], Key: key})
					return err
				})
				if err != nil {
					return err
				}
				if h.json {
					return printJSON(e.stdout, res.GetJob())
				}
				_, err = fmt.Fprintln(e.stdout, res.GetJob().GetId())
				return err
			})
		},
	}
	c.Flags().StringVar(&key, "key", "", "a submission with a key that you have used before gives that job again")
	return h.add(c, "the job as JSON")
}

func newRm(e env) *cobra.Command {
	h := &hubCommand{env: e}
	c := &cobra.Command{
		Use: "rm JOB...", Short: "Remove jobs that are over, with their logs and results", Example: "  pergola rm 01k9aaaa 01k9bbbb",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return problem.New(problem.Usage, "usage: "+cmd.UseLine(), "%s needs a job's id", cmd.CommandPath())
			}
			return nil
		}, ValidArgsFunction: completeJobs,
		RunE: func(cmd *cobra.Command, args []string) error {
			return h.with(cmd.Context(), func(ctx context.Context, c *api.Client) error {
				for _, id := range args {
					res, err := c.Jobs.GetJob(ctx, &pb.GetJobRequest{Id: id})
					if err != nil {
						return err
					}
					id = res.GetJob().GetId()
					if _, err := c.Jobs.DeleteJob(ctx, &pb.DeleteJobRequest{Id: id}); err != nil {
						return err
					}
					if _, err := fmt.Fprintln(e.stdout, id); err != nil {
						return err
					}
				}
				return nil
			})
		},
	}
	return h.add(c, "")
}
