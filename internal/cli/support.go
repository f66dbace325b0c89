package cli

import (
	"encoding/json"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/pergolafl/pergola/internal/doctor"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/support"
)

func newSupport(e env) *cobra.Command {
	var o support.Options
	var out string
	var asJSON bool
	c := &cobra.Command{
		Use: "support-bundle", Short: "Pack what whoever helps you needs to see, without secrets",
		Long: `Support-bundle writes one tar.gz with what pergola doctor finds, configuration, versions, status, measurements, the list of jobs, the last lines of logs, and
what the hub or agent is doing. Passwords, tokens, keys and the values of environment variables are taken out; MANIFEST.json in it says what is inside and what
was left out. With --job it also has that job's settings, events and the last lines of its programs' logs: look at those before you send them, for an app may
log what its data say. Nothing is sent anywhere.`,
		Example: "  pergola support-bundle -o help.tar.gz\n  pergola support-bundle --dir /srv/pergola --job 01kb2q -o help.tar.gz\n  pergola support-bundle --log /var/log/pergola.log --json",
		Args:    exactArgs(0, "no argument"), ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var err error
			if o.Dir, o.Kind, err = theService(o.Dir); err != nil {
				return err
			}
			for _, l := range o.Logs {
				if _, err := os.Stat(l); err != nil {
					return problem.Wrap(err, problem.Usage, "name a file that is there with --log", "the log cannot be read")
				}
			}
			o.Now = time.Now()
			if out == "" {
				out = fmt.Sprintf("pergola-support-%s-%s.tar.gz", o.Kind, o.Now.UTC().Format("20060102-150405"))
			}
			ctx, cancel := untilSignal(cmd.Context())
			defer cancel()
			b, err := support.Collect(ctx, o)
			if err != nil {
				return err
			}
			if err := b.Write(out); err != nil {
				return err
			}
			if asJSON {
				return json.NewEncoder(e.stdout).Encode(map[string]any{"file": out, "manifest": b.Manifest})
			}
			for _, l := range b.Manifest.LeftOut {
				fmt.Fprintf(e.stderr, "left out: %s: %s\n", l.What, l.Why)
			}
			_, err = fmt.Fprintf(e.stdout, "%s (%d files; MANIFEST.json in it says what they are)\n", out, len(b.Manifest.Files))
			return err
		},
	}
	fl := c.Flags()
	fl.SortFlags = false
	fl.StringVarP(&out, "output", "o", "", "the new file (default: pergola-support-…tar.gz in this folder)")
	fl.StringVar(&o.Dir, "dir", "", "directory of a hub or a site's agent (PERGOLA_DIR)")
	fl.StringVar(&o.Job, "job", "", "also this job's settings, events and logs")
	fl.StringArrayVar(&o.Logs, "log", nil, "also the last lines of this log (repeatable)")
	fl.BoolVar(&asJSON, "json", false, "one JSON object: the file and its manifest")
	must(c.MarkFlagDirname("dir"))
	return c
}

// theService gives the directory and kind of the one hub or site that is meant.
func theService(dir string) (where, kind string, err error) {
	if dir == "" {
		dir = os.Getenv("PERGOLA_DIR")
	}
	if dir != "" {
		kind, err = doctor.Kind(dir)
		return dir, kind, err
	}
	for _, k := range []string{"hub", "site"} {
		d := serviceDir("", k)
		if got, err := doctor.Kind(d); err != nil || got != k {
			continue
		}
		if where != "" {
			return "", "", problem.New(problem.Usage, "name one with --dir: "+where+" or "+d, "this machine has a hub and a site")
		}
		where, kind = d, k
	}
	if where == "" {
		return "", "", problem.New(problem.Usage, "name one with --dir", "there is no hub or site in the usual places")
	}
	return where, kind, nil
}
