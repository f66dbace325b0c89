package cli

import (
	"fmt"
	"log/slog"
	"net"
	"sync"

	"github.com/spf13/cobra"

	"github.com/pergolafl/pergola/internal/hub"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/runner"
	"github.com/pergolafl/pergola/internal/site"
)

// serviceFlags are those of every long-running process.
type serviceFlags struct {
	dir   string
	level string
}

func (f *serviceFlags) add(c *cobra.Command, what string) {
	c.Flags().StringVar(&f.dir, "dir", "", what)
	c.Flags().StringVar(&f.level, "log-level", "info", "debug, info, warn or error")
}

func (f *serviceFlags) log(e env) (*slog.Logger, error) {
	if f.dir == "" {
		return nil, problem.New(problem.Usage, "give the directory with --dir", "no directory was given")
	}
	var l slog.Level
	if err := l.UnmarshalText([]byte(f.level)); err != nil {
		return nil, problem.New(problem.Usage, "use debug, info, warn or error", "--log-level %q is unknown%s", f.level, problem.DidYouMean(f.level, []string{"debug", "info", "warn", "error"}))
	}
	return logger(e.stderr, l), nil
}

func newHub(e env) *cobra.Command {
	var f serviceFlags
	c := &cobra.Command{
		Use: "hub", Short: "Run the hub of this machine; make one with: pergola hub init",
		Args: exactArgs(0, "no argument"), Example: "  pergola hub init --address hub.example.org:8443\n  pergola hub\n  pergola hub --dir /srv/hub --log-level debug",
		RunE: func(cmd *cobra.Command, _ []string) error {
			f.dir = serviceDir(f.dir, "hub")
			log, err := f.log(e)
			if err != nil {
				return err
			}
			ctx, cancel := untilSignal(cmd.Context())
			defer cancel()
			h, err := hub.Open(ctx, f.dir, log)
			if err != nil {
				return err
			}
			var said error
			var wg sync.WaitGroup
			err = h.Run(ctx, func(a net.Addr) {
				_, said = fmt.Fprintln(e.stdout, hub.ListeningPrefix+a.String())
				m := newManager(log)
				m.status(hub.ListeningPrefix + a.String())
				wg.Go(func() { m.run(ctx, h.Alive) })
			})
			cancel()
			wg.Wait()
			if err != nil {
				return err
			}
			return said
		},
	}
	f.add(c, "the hub's directory (PERGOLA_DIR)")
	c.AddCommand(newHubInit(e), newHubToken(e), newHubBackup(e))
	return c
}

func newSite(e env) *cobra.Command {
	var f serviceFlags
	c := &cobra.Command{
		Use: "site", Short: "Run the site's agent of this machine; make one with: pergola site join TOKEN",
		Args: exactArgs(0, "no argument"), Example: "  pergola site join TOKEN\n  pergola site\n  pergola site --dir /srv/pergola --log-level debug",
		RunE: func(cmd *cobra.Command, _ []string) error {
			f.dir = serviceDir(f.dir, "site")
			log, err := f.log(e)
			if err != nil {
				return err
			}
			ctx, cancel := untilSignal(cmd.Context())
			defer cancel()
			a, err := site.Open(f.dir, log)
			if err != nil {
				return err
			}
			// Ready without the hub: what the agent has to do it does from now on, and a hub that is away is no fault of its unit.
			m := newManager(log)
			a.Status = m.status
			var wg sync.WaitGroup
			defer wg.Wait()
			wg.Go(func() { m.run(ctx, a.Alive) })
			defer cancel()
			return a.Run(ctx)
		},
	}
	f.add(c, "the agent's directory (PERGOLA_DIR)")
	c.AddCommand(newSiteJoin(e))
	return c
}

func newRunner(e env) *cobra.Command {
	var f serviceFlags
	c := &cobra.Command{
		Use: "runner --dir DIR", Short: "Run one party of one job; hubs and agents start it", Hidden: true,
		Args: exactArgs(0, "no argument"), Example: "  pergola runner --dir DIR",
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := f.log(e)
			if err != nil {
				return err
			}
			ctx, cancel := untilSignal(cmd.Context())
			defer cancel()
			return runner.Main(ctx, f.dir, log)
		},
	}
	f.add(c, "the party's directory")
	return c
}
