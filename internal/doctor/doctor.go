// Package doctor looks at a hub's, a site's or a user's installation and tells what is wrong with it, and what to do: configuration, files, certificates,
// clock, the way to the hub, Python, disks, the store. It reads only, works while the hub or agent runs and while it does not, and every step has a
// time limit. What a reading of the interpreters finds goes into the user's cache, as with every other command.
//
// It mends nothing. Start with [Hub], [Site] or [User]; docs/doctor.md has a section for each check.
package doctor

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/pergolafl/pergola/internal/api"
	"github.com/pergolafl/pergola/internal/client"
	"github.com/pergolafl/pergola/internal/hub"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/pyenv"
	"github.com/pergolafl/pergola/internal/redact"
	"github.com/pergolafl/pergola/internal/site"
	"github.com/pergolafl/pergola/internal/store/sqlstore"
)

// Status is how bad a finding is.
type Status string

// From good to bad. An error keeps the installation from working, a warning may.
const (
	OK      Status = "ok"
	Warning Status = "warning"
	Error   Status = "error"
)

// Finding is what one check found.
type Finding struct {
	Check  string `json:"check"` // its id, as in docs/doctor.md
	Status Status `json:"status"`
	Seen   string `json:"seen"`
	Next   string `json:"next,omitempty"` // what to do; of warnings and errors
}

// Kinds of what is looked at.
const (
	KindHub  = "hub"
	KindSite = "site"
	KindUser = "user"
)

// Report is all that was found of one installation.
type Report struct {
	Kind     string    `json:"kind"` // "hub", "site" or "user"
	Name     string    `json:"name"` // the site's name, the context's name; "hub"
	Dir      string    `json:"dir"`
	Version  string    `json:"version"`
	Time     time.Time `json:"time"`
	Findings []Finding `json:"findings"`
}

// Worst gives the worst status that there is.
func (r Report) Worst() Status {
	worst := OK
	for _, f := range r.Findings {
		if f.Status == Error || f.Status == Warning && worst == OK {
			worst = f.Status
		}
	}
	return worst
}

// Options say how thoroughly to look.
type Options struct {
	Deep bool // build an environment with flwr, too
}

// limit is how long a check may take; one that builds an environment has more.
const (
	limit     = 40 * time.Second
	deepLimit = 15 * time.Minute
)

// check is one look. It gives one finding or several; none where it does not apply.
type check struct {
	id   string
	of   []string // kinds
	look func(context.Context, *patient) []Finding
}

// checks are all there are, in the order in which they are made and shown: what others depend on first.
var checks = []check{
	{"configuration", []string{KindHub, KindSite, KindUser}, configuration},
	{"directory", []string{KindHub, KindSite, KindUser}, directory},
	{"certificate", []string{KindHub, KindSite, KindUser}, certificate},
	{"authority", []string{KindHub, KindSite, KindUser}, authority},
	{"service", []string{KindHub, KindSite}, service},
	{"port", []string{KindHub}, port},
	{"store", []string{KindHub}, storeCheck},
	{"bundles", []string{KindHub}, bundles},
	{"resolution", []string{KindHub, KindSite, KindUser}, resolution},
	{"proxy", []string{KindSite, KindUser}, proxy},
	{"path", []string{KindSite, KindUser}, path},
	{"hub", []string{KindSite, KindUser}, reaches},
	{"clock", []string{KindHub, KindSite, KindUser}, clockCheck},
	{"python", []string{KindHub, KindSite, KindUser}, python},
	{"installer", []string{KindHub, KindSite, KindUser}, installer},
	{"environment", []string{KindHub, KindSite, KindUser}, environment},
	{"disk", []string{KindHub, KindSite, KindUser}, disk},
	{"files", []string{KindHub, KindSite}, files},
	{"memory", []string{KindHub, KindSite}, memory},
	{"leftovers", []string{KindHub, KindSite}, leftovers},
}

// IDs gives the ids of all checks.
func IDs() []string {
	var out []string
	for _, c := range checks {
		out = append(out, c.id)
	}
	return out
}

// patient is what is looked at. What could not be read is empty, and checks that need it are left out: the one that read it has said so.
type patient struct {
	kind, name, dir string
	opt             Options
	redact          redact.Redactor

	confErr  error
	hub      hub.Config
	addrs    []string // of the hub
	proxy    string
	python   string
	existing bool
	cache    string

	pair    pki.Pair
	pairErr error

	runs    bool            // the service does
	status  []byte          // what it says of itself; nil: it does not
	facts   *sqlstore.Facts // of the hub's store; nil: not known
	ways    []way
	interp  pyenv.Interpreter
	interOK bool
}

// Kind tells what is in dir.
func Kind(dir string) (string, error) {
	for kind, file := range map[string]string{KindHub: hub.ConfigFile, KindSite: site.ConfigFile} {
		if _, err := os.Stat(filepath.Join(dir, file)); err == nil {
			return kind, nil
		} else if !errors.Is(err, fs.ErrNotExist) {
			return "", problem.Wrap(err, problem.Denied, "run this as the user that owns it, or as root", "%s cannot be looked into", dir)
		}
	}
	return "", problem.New(problem.Usage, "give the directory of a hub or site with --dir", "%s has neither %s nor %s", dir, hub.ConfigFile, site.ConfigFile)
}

// Hub looks at the hub in dir.
func Hub(ctx context.Context, dir string, opt Options) Report {
	p := &patient{kind: KindHub, name: "hub", dir: dir, opt: opt}
	p.hub, p.confErr = hub.ReadConfig(dir)
	p.addrs, p.python, p.existing, p.cache = p.hub.Addresses, p.hub.Python, p.hub.Existing, p.hub.Cache
	p.redact.LearnURL(p.hub.Store)
	return p.examine(ctx)
}

// Site looks at the site's agent in dir.
func Site(ctx context.Context, dir string, opt Options) Report {
	p := &patient{kind: KindSite, name: "site", dir: dir, opt: opt}
	var c site.Config
	c, p.addrs, p.confErr = site.ReadConfig(dir)
	p.name, p.proxy, p.python, p.existing, p.cache = cmp.Or(c.Name, "site"), c.Proxy, c.Python, c.Existing, cmp.Or(c.Cache, pyenv.DefaultCache())
	p.redact.LearnURL(c.Proxy)
	return p.examine(ctx)
}

// User looks at a context of this user; "" is the one in use.
func User(ctx context.Context, name string, opt Options) Report {
	p := &patient{kind: KindUser, name: cmp.Or(name, "user"), opt: opt, cache: pyenv.DefaultCache()}
	c, err := client.Load(name)
	p.confErr = err
	p.name, p.dir, p.addrs, p.proxy = cmp.Or(c.Name, p.name), c.Dir, c.Hubs, c.Proxy
	p.redact.LearnURL(c.Proxy)
	return p.examine(ctx)
}

func (p *patient) examine(ctx context.Context) Report {
	for _, v := range []string{"HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HTTP_PROXY", "http_proxy"} {
		p.redact.LearnURL(os.Getenv(v))
	}
	if abs, err := filepath.Abs(p.dir); err == nil && p.dir != "" {
		p.dir = abs
	}
	if p.cache == "" {
		p.cache = pyenv.DefaultCache()
	}
	r := Report{Kind: p.kind, Name: p.name, Dir: p.dir, Version: api.BuildVersion(), Time: time.Now().UTC(), Findings: []Finding{}}
	if p.dir != "" {
		p.pair, p.pairErr = pki.LookAt(p.dir, p.kind)
	}
	for _, c := range checks {
		if !slices.Contains(c.of, p.kind) || ctx.Err() != nil {
			continue
		}
		d := limit
		if p.opt.Deep && c.id == "environment" {
			d = deepLimit
		}
		bounded, cancel := context.WithTimeout(ctx, d)
		for _, f := range c.look(bounded, p) {
			f.Check, f.Seen, f.Next = c.id, p.redact.Text(f.Seen), p.redact.Text(f.Next)
			r.Findings = append(r.Findings, f)
		}
		cancel()
	}
	return r
}

func good(format string, args ...any) []Finding {
	return []Finding{{Status: OK, Seen: fmt.Sprintf(format, args...)}}
}

func bad(s Status, next, format string, args ...any) []Finding {
	return []Finding{{Status: s, Next: next, Seen: fmt.Sprintf(format, args...)}}
}

// told makes a finding of an error.
func told(s Status, err error) []Finding {
	e := problem.From(err)
	if e.Code == problem.Internal && e.Err != nil && e.Msg == problem.From(errors.New("")).Msg { // no problem of ours
		return bad(s, "", "%v", err)
	}
	return bad(s, e.Next, "%s", e.What())
}

// list joins what is not too long.
func list(all []string) string {
	if len(all) > 8 {
		return strings.Join(all[:8], ", ") + fmt.Sprintf(" and %d more", len(all)-8)
	}
	return strings.Join(all, ", ")
}
