package cli

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"text/tabwriter"
	"time"

	human "github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/pergolafl/pergola/internal/hub"
	"github.com/pergolafl/pergola/internal/site"
)

type gcFlags struct {
	dir       string
	dry, json bool
}

func (f *gcFlags) add(c *cobra.Command, what string) *cobra.Command {
	c.Flags().StringVar(&f.dir, "dir", "", "the "+what+"'s directory (PERGOLA_DIR)")
	c.Flags().BoolVar(&f.dry, "dry-run", false, "only say what would be removed")
	c.Flags().BoolVar(&f.json, "json", false, "a JSON list")
	return c
}

// collected is what hub and site tell of.
type collected struct {
	Kind  string    `json:"kind"`
	ID    string    `json:"id"`
	Name  string    `json:"name,omitempty"`
	Bytes int64     `json:"bytes"`
	Since time.Time `json:"since"`
	Why   string    `json:"why"`
}

// told shows what was done, also where the rest of it has failed. Where nothing could even be looked at there is nothing to show.
func (f *gcFlags) told(e env, list []collected, failure error) error {
	if failure != nil && len(list) == 0 {
		return failure
	}
	return cmp.Or(f.show(e, list), failure)
}

func (f *gcFlags) show(e env, list []collected) error {
	if f.json {
		if list == nil {
			list = []collected{}
		}
		return json.NewEncoder(e.stdout).Encode(list)
	}
	if len(list) == 0 {
		_, err := fmt.Fprintln(e.stderr, "there is nothing to remove")
		return err
	}
	var sum int64
	tw := tabwriter.NewWriter(e.stdout, 0, 4, 2, ' ', 0)
	fmt.Fprintln(tw, "KIND\tID\tNAME\tSIZE\tSINCE\tWHY")
	for _, r := range list {
		sum += r.Bytes
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t%s\n", r.Kind, clip(r.ID, 40), r.Name, human.IBytes(uint64(max(r.Bytes, 0))), r.Since.Local().Format("2006-01-02 15:04"), r.Why)
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	done := "removed"
	if f.dry {
		done = "would be removed"
	}
	_, err := fmt.Fprintf(e.stderr, "%d, %s: %s\n", len(list), human.IBytes(uint64(max(sum, 0))), done)
	return err
}

// quiet logs only what goes wrong: what is removed is listed.
func (f *gcFlags) quiet(w io.Writer) *slog.Logger {
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: slog.LevelWarn}))
}

func newHubGC(e env) *cobra.Command {
	return newGC(e, "hub", "/srv/hub", "Remove what [retention] of hub.toml no longer keeps: jobs that are over, logs, bundles that no job has, uploads that were given up.\n"+
		"A hub does so by itself every ten minutes, and may run meanwhile. docs/retention.md has the rules.", hub.Collect)
}

func newSiteGC(e env) *cobra.Command {
	return newGC(e, "site", "/srv/pergola", "Remove what [retention] of site.toml no longer keeps: bundles that no job uses, the logs of runners, environments.\n"+
		"An agent does so by itself every hour, and may run meanwhile. docs/retention.md has the rules.", site.Collect)
}

// newGC is the command of hub or site, as what says, by what collects there. Its help has an example of a directory.
func newGC[R hub.Removal | site.Removal](e env, what, example, long string, collect func(ctx context.Context, dir string, dry bool, log *slog.Logger) ([]R, error)) *cobra.Command {
	var f gcFlags
	c := &cobra.Command{
		Use: "gc", Short: "Remove now what the " + what + " no longer keeps", Long: long,
		Example: fmt.Sprintf("  pergola %s gc --dry-run\n  pergola %s gc --dir %s --json", what, what, example),
		Args:    exactArgs(0, "no argument"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := untilSignal(cmd.Context())
			defer cancel()
			list, failure := collect(ctx, serviceDir(f.dir, what), f.dry, f.quiet(e.stderr))
			var out []collected
			for _, r := range list {
				out = append(out, collected(r))
			}
			return f.told(e, out, failure)
		},
	}
	return f.add(c, what)
}
