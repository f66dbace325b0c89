package cli

import (
	"cmp"
	"crypto/sha256"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/pergolafl/pergola/internal/client"
	"github.com/pergolafl/pergola/internal/config"
	"github.com/pergolafl/pergola/internal/enrol"
	"github.com/pergolafl/pergola/internal/hub"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/prepare"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/site"
)

func newHubInit(e env) *cobra.Command {
	var dir, listen, name, who string
	var addresses []string
	c := &cobra.Command{
		Use: "init --address HOST:PORT", Short: "Make a new hub: its directory, authority and configuration",
		Long: `Init makes the directory of a new hub, with an authority of its own, and a context by which you are its first user.
Start the hub then with: pergola hub`,
		Example: "  pergola hub init --address hub.example.org:8443\n  pergola hub init --address hub.example.org:8443 --address 192.0.2.7:8443 --dir /srv/hub",
		Args:    exactArgs(0, "no argument"), ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(*cobra.Command, []string) error {
			dir = serviceDir(dir, "hub")
			if err := checkListen(listen); err != nil {
				return err
			}
			who = cmp.Or(who, "admin")
			if err := pki.ValidName(who); err != nil {
				return err
			}
			if name == "" {
				name = contextName(addresses)
			}
			if err := checkNewContext(name); err != nil {
				return err
			}
			auth, err := hub.Init(dir, addresses, listen)
			if err != nil {
				return err
			}
			k, err := auth.NewKeypair(pki.Identity{Kind: pki.KindUser, Name: who}, nil, hub.DefaultCertTTL)
			if err != nil {
				return err
			}
			if err := client.Save(client.Context{Name: name, Hubs: addresses, User: who}, k); err != nil {
				return err
			}
			fmt.Fprintf(e.stderr, "you are user %s of this hub, in context %s\nstart it:      pergola hub --dir %s\ninvite a site: pergola hub token site NAME --dir %s\n", who, name, dir, dir)
			_, err = fmt.Fprintln(e.stdout, dir)
			return err
		},
	}
	fl := c.Flags()
	fl.SortFlags = false
	fl.StringArrayVar(&addresses, "address", nil, "HOST:PORT at which sites and users reach the hub (repeatable: tried in turn)")
	fl.StringVar(&listen, "listen", "", "address to listen at (default: the port of the first --address, on all addresses of this machine)")
	fl.StringVar(&dir, "dir", "", "the hub's directory (PERGOLA_DIR)")
	fl.StringVar(&who, "user", "", "your name at the hub (default admin)")
	fl.StringVar(&name, "context", "", "name of your context for it (default: the first part of its address)")
	must(c.MarkFlagDirname("dir"))
	return c
}

// contextName makes a context's name of a hub's address.
func contextName(addresses []string) string {
	if len(addresses) == 0 {
		return "hub"
	}
	host, _, err := net.SplitHostPort(addresses[0])
	if err != nil || net.ParseIP(host) != nil {
		return prepare.JobName(addresses[0])
	}
	first, _, _ := strings.Cut(host, ".")
	return prepare.JobName(first)
}

// checkNewContext refuses a context's name that is taken, before anything is made for it.
func checkNewContext(name string) error {
	if err := pki.ValidName(name); err != nil {
		return err
	}
	names, err := client.Names()
	if err != nil {
		return err
	}
	if contains(names, name) {
		return problem.New(problem.Usage, "choose another name with --context", "you have a context %s already", name)
	}
	return nil
}

func newHubToken(e env) *cobra.Command {
	var dir string
	var ttl string
	var asJSON bool
	c := &cobra.Command{
		Use: "token site|user NAME", Short: "Make a token by which a site or user enrols, once",
		Long: `Token makes a text that a site's administrator gives to "pergola site join", or a user to "pergola login". It works once and until
its time is over, carries the hub's addresses and the fingerprint of its authority, and needs no other file. Whoever has it
can be that site or user: send it by a way that you trust. Run this on the hub's machine; the hub may run or not.`,
		Example: "  pergola hub token site st-anna\n  pergola hub token user maria --ttl 2h",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 2 || args[0] != "site" && args[0] != "user" {
				return problem.New(problem.Usage, "usage: "+cmd.UseLine(), "%s needs site or user, and a name", cmd.CommandPath())
			}
			return nil
		},
		ValidArgsFunction: func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			if len(args) == 0 {
				return []string{"site", "user"}, cobra.ShellCompDirectiveNoFileComp
			}
			return nil, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			d, err := job.ParseDuration(ttl)
			if err != nil {
				return problem.New(problem.Usage, "write it like 2h or 7d", "--ttl %q is not a duration", ttl)
			}
			if args[0] == "site" {
				if err := job.CheckName("site", args[1]); err != nil {
					return err
				}
			}
			by := "unknown"
			if u, err := user.Current(); err == nil {
				by = u.Username
			}
			t, err := hub.NewToken(cmd.Context(), serviceDir(dir, "hub"), pki.Kind(args[0]), args[1], d.Std(), by)
			if err != nil {
				return err
			}
			if asJSON {
				return json.NewEncoder(e.stdout).Encode(map[string]any{"token": t.String(), "kind": t.Kind, "name": t.Name, "hubs": t.Hubs, "expires": t.Expires.UTC().Format(time.RFC3339)})
			}
			do := "pergola site join TOKEN"
			if t.Kind == pki.KindUser {
				do = "pergola login TOKEN"
			}
			fmt.Fprintf(e.stderr, "for %s %s, once, until %s: %s\n", t.Kind, t.Name, t.Expires.Local().Format(time.DateTime), do)
			_, err = fmt.Fprintln(e.stdout, t)
			return err
		},
	}
	c.Flags().StringVar(&ttl, "ttl", "24h", "how long it is good")
	c.Flags().StringVar(&dir, "dir", "", "the hub's directory (PERGOLA_DIR)")
	c.Flags().BoolVar(&asJSON, "json", false, "one JSON object")
	must(c.MarkFlagDirname("dir"))
	return c
}

func newSiteJoin(e env) *cobra.Command {
	var dir, proxy, python string
	c := &cobra.Command{
		Use: "join TOKEN", Short: "Make this machine a site of the hub that made the token",
		Long: `Join makes a key, has the hub sign its certificate, and writes the agent's directory. The key never leaves this machine.
Start the agent then with: pergola site
A directory that is there already and is of the same site keeps its site.toml, and gets a new key and certificate.`,
		Example: "  pergola site join pergola-site-eyJrIjoi…\n  pergola site join TOKEN --proxy http://proxy.example.org:3128 --dir /srv/pergola",
		Args:    exactArgs(1, "a token"), ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			dir = serviceDir(dir, "site")
			file := filepath.Join(dir, site.ConfigFile)
			t, err := enrol.Parse(args[0], pki.KindSite)
			if err != nil {
				return err
			}
			_, err = os.Stat(file)
			there := !errors.Is(err, fs.ErrNotExist)
			if there {
				conf, hubs, err := site.ReadConfig(dir)
				if err != nil {
					return err
				}
				if proxy == "" {
					proxy = conf.Proxy
				}
				if conf.Name != t.Name {
					return problem.New(problem.Usage, "choose another directory with --dir", "%s is of site %s, and the token is for site %s", dir, conf.Name, t.Name)
				}
				if leadsElsewhere(dir, hubs, t) {
					return problem.New(problem.Usage, fmt.Sprintf("choose another directory with --dir; or, if this one is to be of the other hub, write hub = %s in %s and join again", quoted(t.Hubs), file),
						"%s is of a site of the hub at %s, and the token is of another one, at %s", dir, strings.Join(hubs, ", "), strings.Join(t.Hubs, ", "))
				}
			}
			if err := os.MkdirAll(dir, 0o700); err != nil { // before the token is used up
				return problem.Wrap(err, problem.Usage, "choose another with --dir", "the agent's directory cannot be made")
			}
			ctx, cancel := untilSignal(cmd.Context())
			defer cancel()
			k, err := enrol.Join(ctx, t, proxy)
			if err != nil {
				return err
			}
			if err := pki.SaveKeypair(dir, "site", k); err != nil {
				return err
			}
			if !there {
				if err := config.Write(file, struct {
					Name   string   `toml:"name"`
					Hub    []string `toml:"hub"`
					Proxy  string   `toml:"proxy,omitempty"`
					Python string   `toml:"python,omitempty"`
				}{t.Name, t.Hubs, proxy, python}); err != nil {
					return err
				}
			}
			if err := keepOwner(dir); err != nil {
				return err
			}
			fmt.Fprintf(e.stderr, "this is site %s of %s now\nstart its agent: pergola site --dir %s\n", t.Name, strings.Join(t.Hubs, ", "), dir)
			_, err = fmt.Fprintln(e.stdout, dir)
			return err
		},
	}
	fl := c.Flags()
	fl.SortFlags = false
	fl.StringVar(&dir, "dir", "", "the agent's directory (PERGOLA_DIR)")
	fl.StringVar(&proxy, "proxy", "", "on the way to the hub: http://user:password@host:port, or direct (default: as the environment says)")
	fl.StringVar(&python, "python", "", "interpreter for the site's side of jobs (default: the best of PATH)")
	must(c.MarkFlagDirname("dir"))
	return c
}

// leadsElsewhere tells whether the agent in dir, which goes to hubs, would not come to the hub that made the token. One that was made
// anew is at the same addresses, and the same one may have others by now, or others on the way of this site.
func leadsElsewhere(dir string, hubs []string, t enrol.Token) bool {
	k, err := pki.LoadKeypair(dir, "site")
	if err != nil {
		return false // it has no hub yet
	}
	authority, _ := pem.Decode(k.CAPEM)
	if authority != nil && sha256.Sum256(authority.Bytes) == t.CA {
		return false
	}
	return !slices.ContainsFunc(t.Hubs, func(h string) bool { return slices.Contains(hubs, h) })
}

// quoted is a list of texts as TOML has it.
func quoted(list []string) string {
	var out []string
	for _, s := range list {
		out = append(out, strconv.Quote(s))
	}
	return "[" + strings.Join(out, ", ") + "]"
}

// keepOwner gives the files that root has written into a directory of another user to that user, as whom its service runs.
func keepOwner(dir string) error {
	if os.Geteuid() != 0 {
		return nil
	}
	info, err := os.Stat(dir)
	if err != nil {
		return err
	}
	owner, ok := info.Sys().(*syscall.Stat_t)
	if !ok || owner.Uid == 0 {
		return nil
	}
	es, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range es {
		info, err := e.Info()
		if err != nil {
			return err
		}
		// A file with another name elsewhere may not be one of this directory's.
		if st, ok := info.Sys().(*syscall.Stat_t); ok && info.Mode().IsRegular() && st.Uid == 0 && st.Nlink == 1 {
			if err := os.Lchown(filepath.Join(dir, e.Name()), int(owner.Uid), int(owner.Gid)); err != nil {
				return err
			}
		}
	}
	return nil
}

func newLogin(e env) *cobra.Command {
	var name, proxy string
	c := &cobra.Command{
		Use: "login TOKEN", Short: "Become a user of the hub that made the token",
		Long: `Login makes a key, has the hub sign its certificate, and keeps both as a context (see pergola context). The key never leaves this
machine. The first context you have is the one in use. A context that is there already and is of the same user at the same hub stays, and
gets a new key and certificate; the one it had before ends.`,
		Example: "  pergola login pergola-user-eyJrIjoi…\n  pergola login TOKEN --context clinic",
		Args:    exactArgs(1, "a token"), ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			t, err := enrol.Parse(args[0], pki.KindUser)
			if err != nil {
				return err
			}
			if name == "" {
				name = contextName(t.Hubs)
			}
			known, err := client.Load(name)
			again := err == nil && known.Again(t.Name, t.CA)
			if !again {
				if err := checkNewContext(name); err != nil {
					return err
				}
			}
			ctx, cancel := untilSignal(cmd.Context())
			defer cancel()
			if again && proxy == "" {
				proxy = known.Proxy
			}
			k, err := enrol.Join(ctx, t, proxy)
			if err != nil {
				return err
			}
			if again {
				if err := known.Rejoin(k); err != nil {
					return err
				}
				_, err = fmt.Fprintf(e.stdout, "you are user %s of %s again, in context %s\n", t.Name, strings.Join(t.Hubs, ", "), name)
				return err
			}
			if err := client.Save(client.Context{Name: name, Hubs: t.Hubs, Proxy: proxy, User: t.Name}, k); err != nil {
				return err
			}
			_, err = fmt.Fprintf(e.stdout, "you are user %s of %s, in context %s\n", t.Name, strings.Join(t.Hubs, ", "), name)
			return err
		},
	}
	fl := c.Flags()
	fl.SortFlags = false
	fl.StringVar(&name, "context", "", "name of the context (default: the first part of the hub's address)")
	fl.StringVar(&proxy, "proxy", "", "on the way to the hub: http://user:password@host:port, or direct (default: as the environment says)")
	return c
}
