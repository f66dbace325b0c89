package cli

import (
	"cmp"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"

	"github.com/spf13/cobra"

	"github.com/pergolafl/pergola/internal/hub"
	"github.com/pergolafl/pergola/internal/logline"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/runner"
	"github.com/pergolafl/pergola/internal/site"
)

// serviceFlags are those of every long-running process.
type serviceFlags struct {
	dir    string
	level  string
	format string
}

func (f *serviceFlags) add(c *cobra.Command, what string) {
	c.Flags().StringVar(&f.dir, "dir", "", what)
	c.Flags().StringVar(&f.level, "log-level", cmp.Or(os.Getenv(logline.LevelVar), "info"), "debug, info, warn or error ("+logline.LevelVar+")")
	c.Flags().StringVar(&f.format, "log-format", cmp.Or(os.Getenv(logline.FormatVar), string(logline.Auto)), "auto (text on a terminal, else JSON), json or text ("+logline.FormatVar+")")
	must(c.RegisterFlagCompletionFunc("log-level", cobra.FixedCompletions(logline.Levels, cobra.ShellCompDirectiveNoFileComp)))
	must(c.RegisterFlagCompletionFunc("log-format", cobra.FixedCompletions(logline.Formats, cobra.ShellCompDirectiveNoFileComp)))
	must(c.MarkFlagDirname("dir"))
}

func (f *serviceFlags) log(e env) (*slog.Logger, error) {
	if f.dir == "" {
		return nil, problem.New(problem.Usage, "give the directory with --dir", "no directory was given")
	}
	format, level, err := logline.Parse(f.format, f.level)
	if err != nil {
		return nil, err
	}
	// Runners log as who starts them does.
	if err := os.Setenv(logline.LevelVar, f.level); err != nil {
		return nil, err
	}
	if err := os.Setenv(logline.FormatVar, f.format); err != nil {
		return nil, err
	}
	return logline.New(e.stderr, format, level), nil
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
	c.AddCommand(newHubInit(e), newHubToken(e), newHubBackup(e), newHubGC(e), newHubStatus(e))
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
	c.AddCommand(newSiteJoin(e), newSiteGC(e), newSiteDrain(e), newSiteResume(e), newSiteRm(e), newSiteStatus(e))
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
