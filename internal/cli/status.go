package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/pergolafl/pergola/internal/hub"
	"github.com/pergolafl/pergola/internal/monitor"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/site"
)

// ask gets a page from the hub or agent in dir, which has to run.
func ask(ctx context.Context, kind, dir, page string) ([]byte, error) {
	socket := map[string]string{"hub": hub.MonitorSocket, "site": site.MonitorSocket}[kind]
	status, body, err := monitor.Ask(ctx, filepath.Join(dir, socket), page)
	switch {
	case errors.Is(err, fs.ErrPermission):
		return nil, problem.Wrap(err, problem.Denied, "run this as the user that the "+kind+" runs as", "the %s in %s is another user's", kind, dir)
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return nil, problem.New(problem.NotFound, "start it, or give its directory with --dir; pergola doctor --dir "+dir+" tells more", "no %s runs in %s", kind, dir)
	case err != nil:
		return nil, problem.Wrap(err, problem.Unavailable, "look at its log, or start it again", "the %s in %s does not answer", kind, dir)
	case status != 200 && page != "/readyz":
		return nil, problem.New(problem.Internal, "see its log", "the %s in %s answers with status %d", kind, dir, status)
	}
	return body, nil
}

// newStatus is the status command of a hub or an agent; show prints it for people.
func newStatus(e env, kind, long string, show func(body []byte) error) *cobra.Command {
	var dir string
	var asJSON, metrics bool
	c := &cobra.Command{
		Use: "status", Short: "Show how the " + map[string]string{"hub": "hub", "site": "site's agent"}[kind] + " of this machine is, while it runs",
		Long:    long,
		Example: fmt.Sprintf("  pergola %s status\n  pergola %[1]s status --json\n  pergola %[1]s status --metrics > /var/lib/node_exporter/pergola.prom", kind),
		Args:    exactArgs(0, "no argument"), ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if asJSON && metrics {
				return problem.New(problem.Usage, "leave one out", "--json and --metrics are two different forms")
			}
			page := "/status"
			if metrics {
				page = "/metrics"
			}
			body, err := ask(cmd.Context(), kind, serviceDir(dir, kind), page)
			if err != nil {
				return err
			}
			if asJSON || metrics {
				_, err = e.stdout.Write(body)
				return err
			}
			return show(body)
		},
	}
	c.Flags().StringVar(&dir, "dir", "", "its directory (PERGOLA_DIR)")
	c.Flags().BoolVar(&asJSON, "json", false, "one JSON object")
	c.Flags().BoolVar(&metrics, "metrics", false, "its measurements, in the text format of Prometheus")
	must(c.MarkFlagDirname("dir"))
	return c
}

func newSiteStatus(e env) *cobra.Command {
	return newStatus(e, "site", "Show whether the site's agent is connected with the hub, since when, and in which jobs the site has a part. It asks the agent\n"+
		"by the socket monitor.sock in the agent's directory, and fails with status 1 where none runs.", func(body []byte) error {
		var s site.Status
		if err := json.Unmarshal(body, &s); err != nil {
			return err
		}
		tw := tabwriter.NewWriter(e.stdout, 0, 4, 2, ' ', 0)
		fmt.Fprintf(tw, "site\t%s\nversion\t%s\nhub\t%s\n", s.Site, s.Version, strings.Join(s.Hubs, ", "))
		if s.Connected {
			fmt.Fprintf(tw, "connected\tyes, since %s\n", s.Since.Local().Format(time.DateTime))
		} else {
			fmt.Fprintf(tw, "connected\tno, since %s\n", s.Since.Local().Format(time.DateTime))
			if s.Problem != "" {
				fmt.Fprintf(tw, "why\t%s\nnext\t%s\n", s.Problem, s.Next)
			}
		}
		if !s.Certificate.IsZero() {
			fmt.Fprintf(tw, "certificate\tuntil %s\n", s.Certificate.Local().Format(time.DateTime))
		}
		for _, p := range s.Parts {
			fmt.Fprintf(tw, "job\t%s (wanted: %s)\n", p.Job, p.Wanted)
		}
		return tw.Flush()
	})
}

func newHubStatus(e env) *cobra.Command {
	return newStatus(e, "hub", "Show the hub's jobs by state, its sites and links. It asks the hub by the socket monitor.sock in the hub's directory, and fails\n"+
		"with status 1 where none runs.", func(body []byte) error {
		var s hub.Status
		if err := json.Unmarshal(body, &s); err != nil {
			return err
		}
		tw := tabwriter.NewWriter(e.stdout, 0, 4, 2, ' ', 0)
		fmt.Fprintf(tw, "version\t%s\nlistens\t%s\nsince\t%s\nlinks\t%d\n", s.Version, s.Listen, s.Since.Local().Format(time.DateTime), s.Links)
		if s.Error != "" {
			fmt.Fprintf(tw, "store\t%s\n", s.Error)
		}
		for _, st := range slices.Sorted(maps.Keys(s.Jobs)) {
			fmt.Fprintf(tw, "jobs %s\t%d\n", st, s.Jobs[st])
		}
		for _, x := range s.Sites {
			fmt.Fprintf(tw, "site %s\t%s\n", x.Name, map[bool]string{true: "connected", false: "away"}[x.Connected])
		}
		return tw.Flush()
	})
}
