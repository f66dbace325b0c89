// Package cli is the command line: it parses, calls, and prints. Results go to stdout, everything else to stderr.
//
// It decides nothing about jobs; localrun, hub, site and runner do. Start with [Main].
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/pergolafl/pergola/internal/api"
	"github.com/pergolafl/pergola/internal/problem"
)

// env is what a command has of the world.
type env struct {
	stdout, stderr io.Writer
}

// Main runs the command line and gives the exit status.
func Main() int {
	e := env{os.Stdout, os.Stderr}
	root := newRoot(e)
	if cmd, err := root.ExecuteContextC(context.Background()); err != nil {
		if _, said := errors.AsType[silent](err); !said && cmd.Name() == "run" && slices.Contains(os.Args, "--json") {
			err = failJSON(e, "", err) // the flags themselves are wrong: f.json may not have been read
		}
		if s, ok := errors.AsType[silent](err); ok {
			return problem.Exit(s.error)
		}
		p := problem.From(err)
		fmt.Fprintf(e.stderr, "pergola: %s\n", text(p))
		return problem.Exit(p)
	}
	return 0
}

// silent is an error that was printed already.
type silent struct{ error }

// text gives a problem as a person reads it: what happened, and below it what to do.
func text(p *problem.Error) string {
	var b strings.Builder
	if p.Party != "" && !strings.Contains(p.Msg, p.Party) {
		fmt.Fprintf(&b, "%s: ", p.Party)
	}
	b.WriteString(p.What())
	if p.Log != "" {
		fmt.Fprintf(&b, "\n  log:  %s", p.Log)
	}
	if p.Next != "" {
		fmt.Fprintf(&b, "\n  next: %s", p.Next)
	}
	return b.String()
}

func newRoot(e env) *cobra.Command {
	root := &cobra.Command{
		Use:           "pergola",
		Short:         "Run unmodified Flower apps as managed jobs across organisations",
		Long:          "Pergola runs unmodified Flower (flwr) apps across organisations that share no network:\none hub with one TLS port, sites that only dial out, and a cause for every ending.",
		Example:       "  pergola run ./my-flower-app\n  pergola run examples/quickstart --sites 3 --run-config num-server-rounds=5",
		SilenceErrors: true, SilenceUsage: true, Version: version(),
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return cmd.Help()
			}
			return unknownCommand(cmd, args[0])
		},
	}
	root.SetOut(e.stdout)
	root.SetErr(e.stderr)
	root.SetVersionTemplate("pergola {{.Version}}\n")
	root.SetFlagErrorFunc(flagError)
	root.AddCommand(newRun(e), newSubmit(e), newJobs(e), newShow(e), newLogs(e), newEvents(e), newAbort(e), newResubmit(e), newDownload(e), newRm(e), newSites(e), newUser(e), newContext(e), newLogin(e), newImport(e), newHub(e), newSite(e), newDoctor(e), newSupport(e), newRunner(e), newShim(e), newVersion(e))
	root.SetHelpCommand(newHelp())
	root.InitDefaultCompletionCmd()
	for _, c := range root.Commands() {
		if c.Name() == "completion" { // cobra's own shows its help, and succeeds, whatever shell is named
			c.Args = cobra.ArbitraryArgs
			c.RunE = func(cmd *cobra.Command, args []string) error {
				if len(args) == 0 {
					return cmd.Help()
				}
				return unknownCommand(cmd, args[0])
			}
		}
	}
	return root
}

// unknownCommand names the nearest of cmd's commands.
func unknownCommand(cmd *cobra.Command, name string) error {
	names := commandNames(cmd)
	return problem.New(problem.Usage, "see the commands with: "+cmd.CommandPath()+" --help", "no command is called %q%s", strings.TrimSpace(strings.TrimPrefix(cmd.CommandPath()+" "+name, "pergola")), problem.DidYouMean(name, names))
}

func commandNames(cmd *cobra.Command) []string {
	var names []string
	for _, c := range cmd.Commands() {
		if !c.Hidden {
			names = append(names, c.Name())
		}
	}
	return names
}

func newHelp() *cobra.Command {
	return &cobra.Command{
		Use: "help [COMMAND]", Short: "Show the help of a command", Example: "  pergola help run",
		RunE: func(cmd *cobra.Command, args []string) error {
			c, rest, err := cmd.Root().Find(args)
			if err != nil {
				return err
			}
			if len(rest) > 0 {
				return unknownCommand(c, rest[0])
			}
			c.InitDefaultHelpFlag() // as --help shows it
			return c.Help()
		},
		ValidArgsFunction: func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			c, _, err := cmd.Root().Find(args)
			if err != nil {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			return commandNames(c), cobra.ShellCompDirectiveNoFileComp
		},
	}
}

// flagError names the nearest flag to one that does not exist.
func flagError(cmd *cobra.Command, err error) error {
	next := "see the flags with: " + cmd.CommandPath() + " --help"
	if ne, ok := errors.AsType[*pflag.NotExistError](err); ok {
		var names []string
		cmd.Flags().VisitAll(func(f *pflag.Flag) {
			if !f.Hidden {
				names = append(names, f.Name)
			}
		})
		hint := ""
		if n := problem.Nearest(ne.GetSpecifiedName(), names); n != "" {
			hint = fmt.Sprintf("; did you mean --%s?", n)
		}
		dash := "--"
		if ne.GetSpecifiedShortnames() != "" {
			dash = "-"
		}
		return problem.New(problem.Usage, next, "unknown flag %s%s%s", dash, ne.GetSpecifiedName(), hint)
	}
	if ve, ok := errors.AsType[*pflag.InvalidValueError](err); ok {
		kind := "a " + ve.GetFlag().Value.Type()
		switch ve.GetFlag().Value.Type() {
		case "int", "int64":
			kind = "a whole number"
		case "bool":
			kind = "true or false"
		}
		return problem.New(problem.Usage, next, "--%s %q is not %s", ve.GetFlag().Name, ve.GetValue(), kind)
	}
	if ve, ok := errors.AsType[*pflag.ValueRequiredError](err); ok {
		return problem.New(problem.Usage, next, "--%s needs a value", ve.GetSpecifiedName())
	}
	return problem.New(problem.Usage, next, "%s", strings.TrimPrefix(err.Error(), "pflag: "))
}

// exactArgs wants n arguments and says which.
func exactArgs(n int, what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) == n {
			return nil
		}
		return problem.New(problem.Usage, "usage: "+cmd.UseLine(), "%s needs %s, and got %d arguments", cmd.CommandPath(), what, len(args))
	}
}

func version() string { return api.BuildVersion() }

// untilSignal gives a context that ends with SIGINT or SIGTERM.
func untilSignal(ctx context.Context) (context.Context, context.CancelFunc) {
	return signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
}
