package cli

import (
	"encoding/json"
	"fmt"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/pergolafl/pergola/internal/client"
)

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
