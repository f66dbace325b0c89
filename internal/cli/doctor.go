package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/pergolafl/pergola/internal/client"
	"github.com/pergolafl/pergola/internal/doctor"
	"github.com/pergolafl/pergola/internal/problem"
)

func newDoctor(e env) *cobra.Command {
	var dir, name string
	var opt doctor.Options
	var asJSON bool
	c := &cobra.Command{
		Use: "doctor", Short: "Find out what is wrong with a hub, a site or your context, and what to do",
		Long: `Doctor looks at configuration, files, certificates, clock, the way to the hub, Python, disks and the store, and says of each what it has seen and what
to do. It changes nothing; the hub or agent may run or not. Without flags it looks at all that is found on this machine: a hub and a site in the usual
places, and the context in use. The exit status is 1 if there is an error, 0 if there are warnings at most. docs/doctor.md has each check.`,
		Example: "  pergola doctor\n  pergola doctor --dir /srv/pergola --deep\n  pergola doctor --context clinic --json",
		Args:    exactArgs(0, "no argument"), ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := untilSignal(cmd.Context())
			defer cancel()
			reports, err := examine(ctx, dir, name, opt)
			if err != nil {
				return err
			}
			failed := 0
			for _, r := range reports {
				for _, f := range r.Findings {
					if f.Status == doctor.Error {
						failed++
					}
				}
			}
			if asJSON {
				err = json.NewEncoder(e.stdout).Encode(reports)
			} else {
				err = printReports(e.stdout, reports)
			}
			if err == nil && failed > 0 {
				err = silent{problem.New(problem.Internal, "", "%d checks failed", failed)}
			}
			return err
		},
	}
	fl := c.Flags()
	fl.SortFlags = false
	fl.StringVar(&dir, "dir", "", "directory of a hub or a site's agent (PERGOLA_DIR)")
	fl.StringVar(&name, "context", "", "look at this context of yours")
	fl.BoolVar(&opt.Deep, "deep", false, "also build a Python environment with flwr, which may take minutes the first time")
	fl.BoolVar(&asJSON, "json", false, "a JSON list of reports")
	must(c.MarkFlagDirname("dir"))
	must(c.RegisterFlagCompletionFunc("context", func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		names, err := client.Names()
		if err != nil {
			return nil, cobra.ShellCompDirectiveError
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	}))
	return c
}

// examine looks at what the flags name, or else at all that is there.
func examine(ctx context.Context, dir, name string, opt doctor.Options) ([]doctor.Report, error) {
	var out []doctor.Report
	look := func(dir string) error {
		kind, err := doctor.Kind(dir)
		if err != nil {
			return err
		}
		if kind == doctor.KindHub {
			out = append(out, doctor.Hub(ctx, dir, opt))
		} else {
			out = append(out, doctor.Site(ctx, dir, opt))
		}
		return nil
	}
	if dir == "" && name == "" {
		dir = os.Getenv("PERGOLA_DIR")
	}
	if dir != "" {
		if err := look(dir); err != nil {
			return nil, err
		}
	}
	if name != "" {
		if _, err := client.Load(name); problem.CodeOf(err) == problem.Usage && !contextThere(name) {
			return nil, err // there is no such context: nothing to look at
		}
		out = append(out, doctor.User(ctx, name, opt))
	}
	if dir != "" || name != "" {
		return out, nil
	}
	for _, kind := range []string{"hub", "site"} {
		d := serviceDir("", kind)
		if k, err := doctor.Kind(d); err == nil && k == kind {
			if err := look(d); err != nil {
				return nil, err
			}
		}
	}
	if now, err := client.Current(); err == nil && now != "" {
		out = append(out, doctor.User(ctx, now, opt))
	}
	if len(out) == 0 {
		return nil, problem.New(problem.Usage, "name one with --dir or --context", "there is no hub or site in the usual places, and you have no context")
	}
	return out, nil
}

func contextThere(name string) bool {
	names, err := client.Names()
	return err == nil && contains(names, name)
}

// printReports shows what was found to people: a line for each finding, and below it what to do.
func printReports(w io.Writer, reports []doctor.Report) error {
	var errs []error
	say := func(format string, args ...any) {
		_, err := fmt.Fprintf(w, format, args...)
		errs = append(errs, err)
	}
	for i, r := range reports {
		if i > 0 {
			say("\n")
		}
		what := map[string]string{doctor.KindHub: "the hub", doctor.KindSite: "site " + r.Name, doctor.KindUser: "context " + r.Name}[r.Kind]
		say("%s, in %s (pergola %s)\n", what, filepath.Clean(r.Dir), r.Version)
		n := map[doctor.Status]int{}
		for _, f := range r.Findings {
			n[f.Status]++
			say("  %-8s %-14s %s\n", f.Status, f.Check, strings.ReplaceAll(f.Seen, "\n", " "))
			if f.Next != "" {
				say("  %-8s %-14s next: %s\n", "", "", f.Next)
			}
		}
		say("  %d errors, %d warnings\n", n[doctor.Error], n[doctor.Warning])
	}
	return errors.Join(errs...)
}
