package cli

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/pergolafl/pergola/internal/metrics"
	"github.com/pergolafl/pergola/internal/problem"
)

func newShim(e env) *cobra.Command {
	var app string
	c := &cobra.Command{
		Use:   "shim nvflare -o APPDIR",
		Short: "Put a stand-in into an app for a library that is not there in a job",
		Long: `Shim puts into APPDIR a Python package in place of NVIDIA FLARE, for code that uses its tracking writers:
nvflare.client.init, nvflare.client.tracking.SummaryWriter, MLflowWriter and WandBWriter log to the job's results.
Where the real nvflare is installed, that one is used. Remove the folder to undo it.

Exit status: 0 done · 1 failed · 2 usage.`,
		Example:   "  pergola shim nvflare -o ./app",
		Args:      exactArgs(1, "the library (nvflare)"),
		ValidArgs: []string{"nvflare"},
		RunE: func(_ *cobra.Command, args []string) error {
			if args[0] != "nvflare" {
				return problem.New(problem.Usage, "use nvflare", "there is no stand-in for %q%s", args[0], problem.DidYouMean(args[0], []string{"nvflare"}))
			}
			if app == "" {
				return problem.New(problem.Usage, "give the app's directory with -o", "no directory was given")
			}
			dir, err := metrics.InstallShim(app)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(e.stdout, "wrote %s; take nvflare out of the app's dependencies\n", dir)
			return err
		},
	}
	c.Flags().StringVarP(&app, "app", "o", "", "the app's directory")
	must(c.MarkFlagDirname("app"))
	return c
}
