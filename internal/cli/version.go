package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"

	"github.com/spf13/cobra"

	"github.com/pergolafl/pergola/internal/api"
	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/compat"
)

// versions is what a Pergola is, and what it speaks.
type versions struct {
	Version   string                  `json:"version"`
	Protocols map[string]compat.Range `json:"protocols"`
	Hub       *versions               `json:"hub,omitempty"`
	Spoken    int                     `json:"spoken,omitempty"` // of the control protocol, with the hub
}

func (v versions) show(w io.Writer, what string) error {
	if _, err := fmt.Fprintln(w, what, v.Version); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(v.Protocols)) {
		if _, err := fmt.Fprintf(w, "  %s protocol: %s\n", name, v.Protocols[name].Words()); err != nil {
			return err
		}
	}
	return nil
}

func newVersion(e env) *cobra.Command {
	h := &hubCommand{env: e}
	var all, ofHub bool
	c := &cobra.Command{
		Use: "version", Short: "Print the version, and which versions of its protocols this Pergola speaks", Args: exactArgs(0, "no argument"),
		Example: "  pergola version\n  pergola version --all\n  pergola version --hub --json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			own := versions{Version: version(), Protocols: api.Protocols()}
			if ofHub {
				if err := h.with(cmd.Context(), func(ctx context.Context, c *api.Client) error {
					res, err := c.Who.GetHub(ctx, &pb.GetHubRequest{})
					if err != nil {
						return err
					}
					own.Hub, own.Spoken = &versions{Version: res.GetVersion(), Protocols: map[string]compat.Range{}}, c.Spoken()
					for name, r := range res.GetProtocols() {
						own.Hub.Protocols[name] = compat.Range{Min: int(r.GetMin()), Max: int(r.GetMax())}
					}
					return nil
				}); err != nil {
					return err
				}
			}
			switch {
			case h.json:
				return json.NewEncoder(e.stdout).Encode(own)
			case !all && !ofHub:
				_, err := fmt.Fprintln(e.stdout, "pergola", own.Version)
				return err
			}
			if err := own.show(e.stdout, "pergola"); err != nil || own.Hub == nil {
				return err
			}
			if err := own.Hub.show(e.stdout, "hub"); err != nil {
				return err
			}
			_, err := fmt.Fprintf(e.stdout, "spoken with the hub: version %d of the control protocol\n", own.Spoken)
			return err
		},
	}
	c.Flags().BoolVar(&all, "all", false, "also which versions of its protocols it speaks")
	c.Flags().BoolVar(&ofHub, "hub", false, "also of the hub of the context")
	return h.add(c, "as JSON, with the protocols")
}
