package cli

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/pergolafl/pergola/internal/hub"
)

// serviceDir gives the directory of this machine's hub or site: the flag's, else PERGOLA_DIR's, else the usual place.
func serviceDir(flag, kind string) string {
	if flag != "" {
		return flag
	}
	if d := os.Getenv("PERGOLA_DIR"); d != "" {
		return d
	}
	if os.Getuid() == 0 {
		return filepath.Join("/var/lib/pergola", kind)
	}
	state := os.Getenv("XDG_STATE_HOME")
	if !filepath.IsAbs(state) { // as the XDG specification wants it
		home, err := os.UserHomeDir()
		if err != nil {
			home = "/" // whoever has no home has no hub there either, and hears that the directory is missing
		}
		state = filepath.Join(home, ".local", "state")
	}
	return filepath.Join(state, "pergola", kind)
}

func newHubBackup(e env) *cobra.Command {
	var dir string
	var asJSON bool
	c := &cobra.Command{
		Use: "backup FILE", Short: "Copy the hub's store to a new file, while the hub runs",
		Long: "Copy the hub's store, as it is at one moment, to a new file. The hub may run or not.\n" +
			"Keys, bundles, logs and results are files in the hub's directory, and are not in the copy:\ndocs/store.md says what else to keep, and how to restore.",
		Example: "  pergola hub backup /backup/pergola-$(date +%F).db\n  pergola hub backup --dir /srv/hub store.db --json",
		Args:    exactArgs(1, "the new file"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := hub.Backup(cmd.Context(), serviceDir(dir, "hub"), args[0]); err != nil {
				return err
			}
			st, err := os.Stat(args[0])
			if err != nil {
				return err
			}
			if asJSON {
				return json.NewEncoder(e.stdout).Encode(map[string]any{"file": args[0], "bytes": st.Size()})
			}
			_, err = fmt.Fprintf(e.stdout, "%s (%d bytes)\n", args[0], st.Size())
			return err
		},
	}
	c.Flags().StringVar(&dir, "dir", "", "the hub's directory (PERGOLA_DIR)")
	c.Flags().BoolVar(&asJSON, "json", false, "one JSON object: the file and its size in bytes")
	return c
}
