package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/pergolafl/pergola/internal/api"
	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/client"
)

func newSites(e env) *cobra.Command {
	h := &hubCommand{env: e}
	var all bool
	c := &cobra.Command{
		Use: "sites", Short: "List the sites of a hub, and which are connected", Example: "  pergola sites\n  pergola sites --all --json",
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
				tw := tabwriter.NewWriter(e.stdout, 0, 4, 2, ' ', 0)
				fmt.Fprintln(tw, "SITE\tCONNECTED")
				for _, s := range res.GetSites() {
					is := map[bool]string{true: "yes", false: "no"}[s.GetConnected()]
					if s.GetRemovedTime() != nil {
						is = "removed"
					}
					fmt.Fprintf(tw, "%s\t%s\n", s.GetName(), is)
				}
				return tw.Flush()
			})
		},
	}
	c.Flags().BoolVar(&all, "all", false, "also those that were removed")
	return h.add(c, "a JSON list")
}

// known is what is shown of a context.
type known struct {
	Name    string   `json:"name"`
	Current bool     `json:"current"`
	Hubs    []string `json:"hubs"`
	User    string   `json:"user,omitempty"`
	Dir     string   `json:"dir"`
}

func newContext(e env) *cobra.Command {
	c := &cobra.Command{
		Use: "context", Short: "The hubs that you know: list them, choose one",
		Long: `A context is a hub as you know it: its addresses, and your certificate for it, in a folder of their own below
~/.config/pergola/contexts. Commands that call a hub use the one that --context names, else the one that PERGOLA_CONTEXT names,
else the one that was chosen with pergola context use.`,
		Example: "  pergola context ls\n  pergola context use clinic",
		Args:    cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return cmd.Help()
			}
			return unknownCommand(cmd, args[0])
		},
	}
	var asJSON bool
	ls := &cobra.Command{
		Use: "ls", Short: "List the hubs that you know", Example: "  pergola context ls --json", Args: exactArgs(0, "no argument"),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(*cobra.Command, []string) error {
			names, err := client.Names()
			if err != nil {
				return err
			}
			now, err := client.Current()
			if err != nil {
				return err
			}
			list := []known{}
			for _, n := range names {
				x, err := client.Load(n)
				if err != nil {
					return err
				}
				list = append(list, known{n, n == now, x.Hubs, x.User, x.Dir})
			}
			if asJSON {
				return json.NewEncoder(e.stdout).Encode(list)
			}
			tw := tabwriter.NewWriter(e.stdout, 0, 4, 2, ' ', 0)
			fmt.Fprintln(tw, "\tCONTEXT\tHUB\tUSER")
			for _, k := range list {
				fmt.Fprintf(tw, "%s\t%s\t%s\t%s\n", map[bool]string{true: "*", false: ""}[k.Current], k.Name, strings.Join(k.Hubs, ", "), k.User)
			}
			return tw.Flush()
		},
	}
	ls.Flags().BoolVar(&asJSON, "json", false, "a JSON list")
	use := &cobra.Command{
		Use: "use NAME", Short: "Choose the hub that commands call", Example: "  pergola context use clinic", Args: exactArgs(1, "a context's name"),
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			names, err := client.Names()
			if err != nil {
				return nil, cobra.ShellCompDirectiveError
			}
			return names, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(_ *cobra.Command, args []string) error { return client.Use(args[0]) },
	}
	c.AddCommand(ls, use)
	return c
}
