package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/pergolafl/pergola/internal/api"
	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/client"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/problem"
)

// renewing has the certificate of a command's context renewed meanwhile, if that is due. The command does not fail over it: done waits
// for it, for a few seconds at most, and says what was in the way.
func renewing(ctx context.Context, e env, known client.Context, c *api.Client) (done func()) {
	result := make(chan error, 1)
	go func() { result <- known.Renew(ctx, c) }()
	return func() {
		if err := <-result; err != nil && ctx.Err() == nil {
			fmt.Fprintf(e.stderr, "note: your certificate in context %s is good until %s and could not be renewed: %s\n", known.Name, known.Ends().Local().Format(time.DateTime), problem.From(err).What())
		}
	}
}

// removal is what is said of one who was removed.
type removal struct {
	Kind    string   `json:"kind"`
	Name    string   `json:"name"`
	Removed string   `json:"removed"`
	Jobs    []string `json:"jobs,omitempty"`
}

// newRemove makes `site rm` or `user rm`.
func newRemove(e env, kind pki.Kind, long, example string, complete cobra.CompletionFunc) *cobra.Command {
	h := &hubCommand{env: e}
	c := &cobra.Command{
		Use: "rm NAME...", Short: fmt.Sprintf("Remove %ss from the hub: their connections end, and they are let in no more", kind), Long: long, Example: example,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return problem.New(problem.Usage, "usage: "+cmd.UseLine(), "%s needs the name of a %s", cmd.CommandPath(), kind)
			}
			return nil
		}, ValidArgsFunction: complete,
		RunE: func(cmd *cobra.Command, args []string) error {
			return h.with(cmd.Context(), func(ctx context.Context, c *api.Client) error {
				for _, name := range args {
					res, err := c.Who.Remove(ctx, &pb.RemoveRequest{Kind: string(kind), Name: name})
					if err != nil {
						return err
					}
					if h.json {
						if err := json.NewEncoder(e.stdout).Encode(removal{string(kind), name, res.GetRemovedTime().AsTime().Format(time.RFC3339), res.GetJobIds()}); err != nil {
							return err
						}
						continue
					}
					for _, id := range res.GetJobIds() {
						fmt.Fprintf(e.stderr, "%s had a part in job %s, which goes on without it or ends\n", name, id)
					}
					if _, err := fmt.Fprintln(e.stdout, name); err != nil {
						return err
					}
				}
				return nil
			})
		},
	}
	return h.add(c, "one JSON object each")
}

func newSiteRm(e env) *cobra.Command {
	return newRemove(e, pki.KindSite, `Rm keeps sites away from now on: within 5 seconds their connections and links end, their parts in jobs fail with the cause "removed", and
nothing of theirs is let in, whatever certificate they have. Their agents end what runs there when they hear of it. Jobs go on without
them or end, as their own settings say. A site that was removed can be enrolled again, with a new token.`,
		"  pergola site rm st-anna\n  pergola site rm st-anna charite --json", completeSites)
}

func newUser(e env) *cobra.Command {
	c := &cobra.Command{
		Use: "user", Short: "The users of a hub: list them, remove some",
		Long:    "Users come by tokens that the hub's operator makes (pergola hub token user NAME) and that they use with pergola login.",
		Example: "  pergola user ls\n  pergola user rm maria",
		Args:    cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return cmd.Help()
			}
			return unknownCommand(cmd, args[0])
		},
	}
	h := &hubCommand{env: e}
	var all bool
	ls := &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List the users of a hub", Example: "  pergola user ls\n  pergola user ls --all --json",
		Args: exactArgs(0, "no argument"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return h.with(cmd.Context(), func(ctx context.Context, c *api.Client) error {
				res, err := c.Who.ListUsers(ctx, &pb.ListUsersRequest{All: all})
				if err != nil {
					return err
				}
				if h.json {
					return printList(e.stdout, res.GetUsers())
				}
				tw := tabwriter.NewWriter(e.stdout, 0, 4, 2, ' ', 0)
				fmt.Fprintln(tw, "USER\tENROLLED\tREMOVED")
				for _, u := range res.GetUsers() {
					fmt.Fprintf(tw, "%s\t%s\t%s\n", u.GetName(), when(u.GetEnrolledTime()), when(u.GetRemovedTime()))
				}
				return tw.Flush()
			})
		},
	}
	ls.Flags().BoolVar(&all, "all", false, "also those that were removed")
	h.add(ls, "a JSON list")
	c.AddCommand(ls, newRemove(e, pki.KindUser, `Rm keeps users away from now on: within 5 seconds what they have open ends, also logs --follow and the like, and nothing of theirs is
let in, whatever certificate they have. Their jobs stay as they are. A user who was removed can log in again, with a new token.`,
		"  pergola user rm maria", completeUsers))
	return c
}

func completeUsers(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	return fromHub(cmd, func(ctx context.Context, c *api.Client) ([]string, error) {
		res, err := c.Who.ListUsers(ctx, &pb.ListUsersRequest{})
		var out []string
		for _, u := range res.GetUsers() {
			out = append(out, u.GetName())
		}
		return out, err
	})
}
