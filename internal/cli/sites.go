package cli

import (
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/pergolafl/pergola/internal/api"
	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/job"
)

func newSites(e env) *cobra.Command {
	h := &hubCommand{env: e}
	var all bool
	c := &cobra.Command{
		Use: "sites", Short: "List the sites of a hub, how they are, and what they have for jobs", Example: "  pergola sites\n  pergola sites --all --json",
		Long: `Sites lists the hub's sites: whether their agents are connected and since when, or since when they are away; whether they are
drained; the version of their Pergola; of each resource how much jobs have of how much there is; and those jobs.`,
		Args: exactArgs(0, "no argument"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return h.with(cmd.Context(), func(ctx context.Context, c *api.Client) error {
				res, err := c.Jobs.ListSites(ctx, &pb.ListSitesRequest{All: all})
				if err != nil {
					return err
				}
				if h.json {
					return printList(e.stdout, res.GetSites())
				}
				return showSites(e.stdout, res.GetSites())
			})
		},
	}
	c.Flags().BoolVar(&all, "all", false, "also those that were removed")
	return h.add(c, "a JSON list")
}

func showSites(w io.Writer, sites []*pb.Site) error {
	tw := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintln(tw, "SITE\tSTATE\tSINCE\tVERSION\tRESOURCES (USED/OF)\tJOBS")
	for _, s := range sites {
		version, res, jobs := s.GetVersion(), resourcesText(s), jobsText(s)
		if version == "" {
			version = "-"
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t%s\n", s.GetName(), siteState(s), when(s.GetSince()), version, res, jobs)
	}
	return tw.Flush()
}

func siteState(s *pb.Site) string {
	state := "away"
	switch {
	case s.GetRemovedTime() != nil:
		state = "removed"
	case s.GetConnected():
		state = "connected"
	case s.GetSince() == nil:
		state = "never came"
	}
	if s.GetDrained() {
		state += ", drained"
	}
	return state
}

func resourcesText(s *pb.Site) string {
	var out []string
	for _, k := range slices.Sorted(maps.Keys(s.GetOffer().GetResources())) {
		used := "0" // without a unit, as in 0/64GiB
		if n := s.GetUsed()[k]; n > 0 {
			used = job.Format(k, n)
		}
		out = append(out, k+" "+used+"/"+job.Format(k, s.GetOffer().GetResources()[k]))
	}
	if len(out) == 0 {
		return "-"
	}
	return strings.Join(out, ", ")
}

// jobsShown is how many jobs of a site are named.
const jobsShown = 3

func jobsText(s *pb.Site) string {
	js := s.GetJobs()
	text := fmt.Sprint(len(js))
	if most := s.GetOffer().GetMaxJobs(); most > 0 {
		text += fmt.Sprintf("/%d", most)
	}
	if len(js) > 0 {
		text += ": " + strings.Join(js[:min(len(js), jobsShown)], ", ")
	}
	if len(js) > jobsShown {
		text += ", …"
	}
	return text
}

func newSiteDrain(e env) *cobra.Command {
	return drainCommand(e, true, "drain NAME", "Have a site of the hub take no new jobs",
		`Drain has a site finish the jobs that it has and get no new ones, for example before its machine is maintained. Jobs that cannot do
without it wait, and say so. It is a command for users of the hub, from anywhere; pergola site resume undoes it.`)
}

func newSiteResume(e env) *cobra.Command {
	return drainCommand(e, false, "resume NAME", "Have a drained site take jobs again", "Resume has a site that was drained take new jobs again.")
}

func drainCommand(e env, drained bool, use, short, long string) *cobra.Command {
	h := &hubCommand{env: e}
	word, _, _ := strings.Cut(use, " ")
	c := &cobra.Command{
		Use: use, Short: short, Long: long, Example: "  pergola site " + word + " st-anna\n  pergola site " + word + " st-anna --json",
		Args: exactArgs(1, "a site's name"), ValidArgsFunction: completeSites,
		RunE: func(cmd *cobra.Command, args []string) error {
			return h.with(cmd.Context(), func(ctx context.Context, c *api.Client) error {
				var s *pb.Site
				err := again(ctx, func() error {
					res, err := c.Jobs.DrainSite(ctx, &pb.DrainSiteRequest{Name: args[0], Drained: drained})
					s = res.GetSite()
					return err
				})
				if err != nil {
					return err
				}
				if h.json {
					return printJSON(e.stdout, s)
				}
				switch n := len(s.GetJobs()); {
				case drained && n > 0:
					fmt.Fprintf(e.stderr, "it still has a part in %d jobs; see when they are over with: pergola sites\n", n)
				case drained:
					fmt.Fprintln(e.stderr, "no job has a part there")
				}
				_, err = fmt.Fprintf(e.stdout, "%s: %s\n", s.GetName(), siteState(s))
				return err
			})
		},
	}
	return h.add(c, "the site as JSON")
}

// lackText says in a few words why a site cannot take a job now.
func lackText(l *pb.Lack) string {
	amount := func(n int64) string { return job.Format(l.GetResource(), n) }
	by := ""
	if js := l.GetJobs(); len(js) > 0 {
		by = ": " + strings.Join(js[:min(len(js), jobsShown)], ", ")
		if len(js) > jobsShown {
			by += ", …"
		}
	}
	switch l.GetKind() {
	case "away":
		return "not connected"
	case "undeclared":
		return "its agent does not say what it has"
	case "too-small":
		return fmt.Sprintf("has %s %s, and %s asked for", amount(l.GetDeclared()), l.GetResource(), amount(l.GetAsked()))
	case "busy":
		return fmt.Sprintf("%s: %s of %s free, %s asked for, in use by%s", l.GetResource(), amount(l.GetFree()), amount(l.GetDeclared()), amount(l.GetAsked()), strings.TrimPrefix(by, ":"))
	case "max-jobs":
		return fmt.Sprintf("has %d jobs, which is all it takes%s", l.GetDeclared(), by)
	case "held":
		return "kept for jobs before this one" + by
	}
	return l.GetKind()
}
