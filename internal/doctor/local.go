package doctor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pergolafl/pergola/internal/client"
	"github.com/pergolafl/pergola/internal/hub"
	"github.com/pergolafl/pergola/internal/monitor"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/proc"
	"github.com/pergolafl/pergola/internal/pyenv"
	"github.com/pergolafl/pergola/internal/site"
	"github.com/pergolafl/pergola/internal/store/postgres"
	"github.com/pergolafl/pergola/internal/store/sqlite"
	"github.com/pergolafl/pergola/internal/store/sqlstore"
)

var configFiles = map[string]string{KindHub: hub.ConfigFile, KindSite: site.ConfigFile, KindUser: client.File}

func configuration(_ context.Context, p *patient) []Finding {
	if p.confErr != nil {
		return told(Error, p.confErr)
	}
	if p.kind == KindHub && len(p.addrs) == 0 {
		return bad(Warning, `write addresses = ["HOST:PORT"] into hub.toml`, "%s can be read, but does not say at which address the hub is reached: no tokens can be made", filepath.Join(p.dir, hub.ConfigFile))
	}
	return good("%s can be read", filepath.Join(p.dir, configFiles[p.kind]))
}

// directory looks at owners and modes: keys are for their owner alone, and the service has to be able to write.
func directory(_ context.Context, p *patient) []Finding {
	if p.dir == "" {
		return nil
	}
	info, err := os.Stat(p.dir)
	if err != nil {
		return told(Error, problem.Wrap(err, problem.Usage, "give the right directory, or run this as its owner", "%s cannot be looked into", p.dir))
	}
	owner := ownerOf(info)
	var out []Finding
	if info.Mode().Perm()&0o077 != 0 {
		out = append(out, bad(Warning, "chmod 700 "+p.dir, "%s is open to other users of this machine (mode %04o)", p.dir, info.Mode().Perm())...)
	}
	if p.kind != KindUser && !writable(p.dir) {
		out = append(out, bad(Error, "run this as the user that the "+p.kind+" runs as; if that is this one: chown it to that user", "%s cannot be written to by this user", p.dir)...)
	}
	es, err := os.ReadDir(p.dir)
	if err != nil {
		return append(out, told(Error, problem.Wrap(err, problem.Denied, "run this as its owner, or as root", "%s cannot be read", p.dir))...)
	}
	var others []string
	for _, e := range es {
		info, err := e.Info()
		if err != nil {
			continue // it is gone
		}
		path := filepath.Join(p.dir, e.Name())
		if strings.HasSuffix(e.Name(), ".key") && info.Mode().Perm()&0o077 != 0 {
			out = append(out, bad(Error, "chmod 600 "+path+"; if others could have read it, enrol again, and of a hub's ca.key make a new hub",
				"%s, which is secret, can be read by others (mode %04o)", path, info.Mode().Perm())...)
		}
		if ownerOf(info) != owner {
			others = append(others, e.Name())
		}
	}
	if len(others) > 0 {
		out = append(out, bad(Error, fmt.Sprintf("chown -R --reference=%s %[1]s", p.dir), "files in %s are not of its owner, and may not be readable for the %s: %s", p.dir, p.kind, list(others))...)
	}
	if len(out) == 0 {
		return good("%s is its owner's alone", p.dir)
	}
	return out
}

// role is what runs for an installation.
func (p *patient) role() string {
	if p.kind == KindSite {
		return "agent"
	}
	return p.kind
}

func ownerOf(info os.FileInfo) uint32 {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return st.Uid
	}
	return 0
}

func writable(path string) bool { return unix.Access(path, unix.W_OK) == nil }

func certificate(_ context.Context, p *patient) []Finding {
	switch {
	case p.dir == "":
		return nil
	case p.pair.Leaf == nil:
		return told(Error, p.pairErr)
	}
	id, leaf, now := p.pair.Identity, p.pair.Leaf, time.Now()
	const renew = "renew it: pergola site join with a new token in the same directory, or pergola login with a new token"
	switch {
	case p.kind == KindSite && p.confErr == nil && id != (pki.Identity{Kind: pki.KindSite, Name: p.name}):
		return bad(Error, "correct name in site.toml, or join again with a token for it", "the certificate is that of %s, and site.toml is of site %s", id, p.name)
	case string(id.Kind) != p.kind:
		return bad(Error, "restore the right files, or enrol again", "the certificate is that of %s, where one of a %s should be", id, p.kind)
	case now.After(leaf.NotAfter):
		return bad(Error, renew+"; if the clock is wrong, set that first", "the certificate of %s ended %s ago, on %s", id, age(now.Sub(leaf.NotAfter)), day(leaf.NotAfter))
	case now.Before(leaf.NotBefore):
		return bad(Error, "set this machine's clock", "the certificate of %s begins only in %s, on %s: this machine's clock is wrong", id, age(leaf.NotBefore.Sub(now)), day(leaf.NotBefore))
	}
	left := leaf.NotAfter.Sub(now)
	if left < min(14*24*time.Hour, leaf.NotAfter.Sub(leaf.NotBefore)/5) {
		return bad(Warning, "see that the "+p.kind+" runs and reaches the hub, which renews it, or "+renew, "the certificate of %s ends in %s, on %s", id, age(left), day(leaf.NotAfter))
	}
	return good("%s, good for %s more, until %s", id, age(left), day(leaf.NotAfter))
}

func day(t time.Time) string { return t.UTC().Format("2006-01-02 15:04 UTC") }

func age(d time.Duration) string {
	switch {
	case d >= 48*time.Hour:
		return fmt.Sprintf("%d days", int(d.Hours()/24))
	case d >= time.Hour:
		return fmt.Sprintf("%d h", int(d.Hours()))
	case d >= time.Minute:
		return fmt.Sprintf("%d min", int(d.Minutes()))
	}
	return d.Round(time.Second).String()
}

// service asks the hub or agent itself, if it runs.
func service(ctx context.Context, p *patient) []Finding {
	socket := map[string]string{KindHub: hub.MonitorSocket, KindSite: site.MonitorSocket}[p.kind]
	short, cancel := context.WithTimeout(ctx, 2*monitor.CheckLimit) // within which one that is well answers
	defer cancel()
	_, body, err := monitor.Ask(short, filepath.Join(p.dir, socket), "/readyz")
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return bad(Warning, "start it with: pergola "+p.kind+" --dir "+p.dir, "the %s does not run", p.role())
	}
	if errors.Is(err, fs.ErrPermission) {
		return bad(Warning, "run this as its user, or as root", "the %s seems to run as another user, and cannot be asked", p.role())
	}
	p.runs = true
	var r monitor.Report
	if err == nil {
		err = json.Unmarshal(body, &r)
	}
	if err != nil {
		return bad(Error, "look at its log, and start it again; pergola support-bundle keeps what it is doing", "the %s runs, but does not answer: %v", p.role(), err)
	}
	if _, body, err := monitor.Ask(ctx, filepath.Join(p.dir, socket), "/status"); err == nil {
		p.status = body
	}
	var out []Finding
	for _, c := range r.Checks {
		if !c.OK {
			out = append(out, bad(Error, "see docs/monitoring.md for what "+c.Name+" means, and the other findings", "the running %s says of its %s: %s", p.role(), c.Name, c.Message)...)
		}
	}
	if out == nil {
		return good("the %s runs, version %s, and is ready", p.role(), r.Version)
	}
	return out
}

// port tells whether the hub can have its port, or has it.
func port(ctx context.Context, p *patient) []Finding {
	if p.confErr != nil {
		return nil
	}
	if p.runs {
		return good("the running hub has %s", p.hub.Listen)
	}
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, "tcp", p.hub.Listen)
	if err == nil {
		ln.Close()
		return good("%s can be listened at", p.hub.Listen)
	}
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return bad(Error, "end that program, or choose another port with listen in hub.toml; which it is: ss -ltnp", "another program has %s", p.hub.Listen)
	case errors.Is(err, syscall.EACCES):
		return bad(Error, "choose a port from 1024 on with listen in hub.toml, or give the service the capability CAP_NET_BIND_SERVICE", "this user may not listen at %s", p.hub.Listen)
	}
	return bad(Error, "correct listen in hub.toml: an address of this machine", "%s cannot be listened at: %v", p.hub.Listen, err)
}

func storeFacts(ctx context.Context, p *patient) (sqlstore.Facts, error) {
	if p.hub.Store != "" {
		return postgres.Check(ctx, p.hub.Store)
	}
	return sqlite.Check(ctx, filepath.Join(p.dir, hub.DatabaseFile))
}

func storeCheck(ctx context.Context, p *patient) []Finding {
	if p.confErr != nil {
		return nil
	}
	f, err := storeFacts(ctx, p)
	if problem.CodeOf(err) == problem.NotFound {
		return told(Warning, err)
	}
	if err != nil {
		return told(Error, err)
	}
	p.facts = &f
	n := 0
	for _, c := range f.Jobs {
		n += c
	}
	where := f.Server
	if where == "" {
		where = "a whole SQLite file"
	}
	return good("%s, %d MiB, tables of version %d, %d jobs, %d sites", where, f.Bytes>>20, f.Tables, n, f.Sites)
}

// bundles looks whether what jobs will need is there.
func bundles(_ context.Context, p *patient) []Finding {
	dir := filepath.Join(p.dir, "bundles")
	if _, err := os.ReadDir(dir); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return good("the hub has no bundles yet")
		}
		return told(Error, problem.Wrap(err, problem.Denied, "run this as the hub's user; if that is this one: chown the folder to it", "the bundles' folder cannot be read"))
	}
	if p.facts == nil {
		return nil
	}
	var lost []string
	for _, d := range p.facts.Digests {
		name := strings.TrimPrefix(d, "sha256:")
		if _, err := os.Stat(filepath.Join(dir, name+".tar.zst")); err != nil {
			lost = append(lost, name[:min(12, len(name))]+"…")
		}
	}
	if len(lost) > 0 {
		return bad(Error, "restore the folder from a backup, or submit those jobs' apps again", "of jobs that are not over, bundles are missing or cannot be read in %s: %s", dir, list(lost))
	}
	return good("%d bundles, and those of the %d jobs that are not over are among them", p.facts.Bundles, len(p.facts.Unfinished))
}

func python(ctx context.Context, p *patient) []Finding {
	in, err := pyenv.Find(ctx, p.python)
	if err != nil {
		return told(Error, err)
	}
	p.interp, p.interOK = in, true
	return good("%s, version %s", in.Path, in.Version)
}

func installer(ctx context.Context, p *patient) []Finding {
	if !p.interOK || p.existing {
		return nil
	}
	var have, lack []string
	for _, i := range pyenv.Installers(ctx, p.cache, p.interp) {
		if i.Err == nil {
			have = append(have, i.Name+" ("+i.Path+")")
		} else {
			lack = append(lack, fmt.Sprintf("%s: %v", i.Name, i.Err))
		}
	}
	if len(have) == 0 {
		return bad(Error, "install uv, or Python's venv and pip (on Debian: apt install python3-venv)", "nothing can build Python environments here: %s", strings.Join(lack, "; "))
	}
	return good("environments can be built with %s", strings.Join(have, " and "))
}

func environment(ctx context.Context, p *patient) []Finding {
	if !p.interOK {
		return nil
	}
	req := pyenv.Requirements{Names: []string{"flwr"}}
	if p.existing {
		e, err := pyenv.Existing(ctx, p.python, req)
		if err != nil {
			return told(Error, err)
		}
		return good("%s has flwr %s", e.Python, e.Flwr)
	}
	if p.opt.Deep {
		lock, err := pyenv.MakeLock(ctx, p.cache, p.interp, req, pyenv.Options{})
		if err == nil {
			var e pyenv.Env
			if e, err = pyenv.Ensure(ctx, p.cache, p.interp, lock, pyenv.Options{}, nil); err == nil {
				return good("an environment with flwr %s was built, or was there: %s", e.Flwr, e.Dir)
			}
		}
		return told(Error, err)
	}
	versions, err := pyenv.Built(p.cache)
	if err != nil {
		return told(Warning, problem.Wrap(err, problem.Usage, "see that it may be read", "the cache %s cannot be read", p.cache))
	}
	if len(versions) == 0 {
		return good("no environment is built yet in %s; whether one can be: pergola doctor --deep", p.cache)
	}
	slices.Sort(versions)
	return good("%d environments are built in %s, with flwr %s", len(versions), p.cache, list(slices.Compact(versions)))
}

// What a disk should have left, in bytes and inodes: fewer than the first is an error, than the second a warning.
const (
	diskError, diskWarning   = 64 << 20, 2 << 30
	inodeError, inodeWarning = 100, 20_000 // an environment with flwr has 15,000 files
)

func disk(_ context.Context, p *patient) []Finding {
	var out []Finding
	seen := map[string]string{}
	for _, d := range []struct{ what, path string }{{"the directory", p.dir}, {"the environments' cache", p.cache}, {"the temporary folder", os.TempDir()}} {
		if d.path == "" || seen[d.path] != "" {
			continue
		}
		seen[d.path] = d.what
		u, err := monitor.DiskOf(d.path)
		next := "make room on the disk that holds " + d.path
		switch {
		case err != nil:
			out = append(out, told(Error, problem.Wrap(err, problem.Usage, "see that it is mounted, and may be read", "nothing can be said of the disk of %s", d.path))...)
		case u.Free < diskError:
			out = append(out, bad(Error, next, "%s has %d MiB left for %s", d.path, u.Free>>20, d.what)...)
		case u.Inodes > 0 && u.FreeInodes < inodeError:
			out = append(out, bad(Error, next+": remove files, however small", "%s has %d inodes left for %s", d.path, u.FreeInodes, d.what)...)
		case u.Free < diskWarning:
			out = append(out, bad(Warning, next, "%s has %d MiB left for %s", d.path, u.Free>>20, d.what)...)
		case u.Inodes > 0 && u.FreeInodes < inodeWarning:
			out = append(out, bad(Warning, next+": remove files, however small", "%s has %d inodes left for %s", d.path, u.FreeInodes, d.what)...)
		default:
			out = append(out, good("%s has %d GiB left for %s", d.path, u.Free>>30, d.what)...)
		}
	}
	return out
}

// files looks at how many files the service may have open: of the running one, else of this process.
func files(ctx context.Context, p *patient) []Finding {
	open, most, err := monitor.OpenFiles()
	whose := "this command"
	if err != nil {
		return told(Warning, err)
	}
	if p.status != nil {
		_, body, err := monitor.Ask(ctx, filepath.Join(p.dir, hub.MonitorSocket), "/metrics")
		if err == nil {
			o, m := metric(body, "process_open_fds"), metric(body, "process_max_fds")
			if m > 0 {
				open, most, whose = int(o), uint64(m), "the running "+p.role()
			}
		}
	}
	const next = "raise it: LimitNOFILE= in the systemd unit, ulimit -n in a shell"
	if most < 1024 {
		return bad(Warning, next, "%s may have %d files open, which is few", whose, most)
	}
	if uint64(open)*10 > most*8 {
		return bad(Error, next, "%s has %d files open, and may have %d", whose, open, most)
	}
	return good("%s has %d files open, and may have %d", whose, open, most)
}

// metric finds a number in Prometheus's text format.
func metric(text []byte, name string) float64 {
	for line := range strings.Lines(string(text)) {
		if v, ok := strings.CutPrefix(line, name+" "); ok {
			f, err := strconv.ParseFloat(strings.TrimSpace(v), 64)
			if err == nil {
				return f
			}
		}
	}
	return 0
}

func memory(context.Context, *patient) []Finding {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return told(Warning, err)
	}
	free := uint64(0)
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "MemAvailable:" {
			free, _ = strconv.ParseUint(f[1], 10, 64) // 0: not known
		}
	}
	if free > 0 && free < 512<<10 {
		return bad(Warning, "end what is not needed, or add memory: a job's programs need 300 MiB and more each", "%d MiB of memory are available", free>>10)
	}
	if !proc.OOMVisible() {
		return bad(Warning, "nothing has to be done; to have it counted, run the service in a cgroup of its own, as systemd does", "%d MiB of memory are available; what the kernel ends for want of memory cannot be counted here, and such an end will read as a kill", free>>10)
	}
	return good("%d MiB of memory are available, and what the kernel ends for want of it is counted", free>>10)
}

// leftovers looks for runners of jobs that are over, which nobody will end any more.
func leftovers(_ context.Context, p *patient) []Finding {
	running := runners(filepath.Join(p.dir, "jobs"))
	if len(running) == 0 {
		return good("no runner of a job runs")
	}
	live := map[string]bool{}
	switch p.kind {
	case KindHub:
		if p.facts == nil {
			return nil
		}
		for _, id := range p.facts.Unfinished {
			live[string(id)] = true
		}
	case KindSite:
		var s site.Status
		if p.status == nil || json.Unmarshal(p.status, &s) != nil {
			return good("%d runners go on without the agent: %s", len(running), list(slices.Sorted(maps.Keys(running))))
		}
		for _, x := range s.Parts {
			live[string(x.Job)] = true
		}
	}
	var over []string
	for id, pid := range running {
		if !live[id] {
			over = append(over, fmt.Sprintf("%s (process %d)", id, pid))
		}
	}
	if len(over) > 0 {
		slices.Sort(over)
		return bad(Warning, "start the "+p.role()+", which ends them; if it runs, wait a minute, and end those processes by hand then", "runners of jobs that are over still run: %s", list(over))
	}
	return good("%d runners run, all of jobs that go on", len(running))
}

// runners gives the processes that are runners of parties below dir, by job.
func runners(dir string) map[string]int {
	out := map[string]int{}
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return out
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			continue // it has ended
		}
		args := strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00")
		if len(args) < 4 || args[len(args)-3] != "runner" || args[len(args)-2] != "--dir" {
			continue
		}
		rest, ok := strings.CutPrefix(args[len(args)-1], dir+string(filepath.Separator))
		id, tail, _ := strings.Cut(rest, string(filepath.Separator))
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(f))); ok && tail == "party" && err == nil {
			out[id] = pid
		}
	}
	return out
}
