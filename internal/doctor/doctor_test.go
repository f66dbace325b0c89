package doctor

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pergolafl/pergola/internal/client"
	"github.com/pergolafl/pergola/internal/config"
	"github.com/pergolafl/pergola/internal/hub"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/site"
	"github.com/pergolafl/pergola/internal/sock"
	"github.com/pergolafl/pergola/internal/store/pgtest"
	"github.com/pergolafl/pergola/test/chaos"
)

// house is a hub, a site and a user on this machine, by files and processes as real as can be.
type house struct {
	*testing.T
	auth               *pki.Authority
	hubDir, siteDir    string
	addr               string // of the hub
	stop               func() // ends the hub
	proxy, extraConfig string
}

// build makes a house whose hub runs.
func build(t *testing.T) *house {
	t.Helper()
	root := t.TempDir()
	h := &house{T: t, hubDir: filepath.Join(root, "hub"), siteDir: filepath.Join(root, "site")}
	t.Setenv("HOME", root)
	t.Setenv("XDG_CONFIG_HOME", "")
	t.Setenv("PERGOLA_CACHE", filepath.Join(root, "cache"))
	t.Setenv("PERGOLA_CONTEXT", "")
	for _, v := range []string{"HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"} {
		t.Setenv(v, "")
	}
	var err error
	if h.auth, err = hub.Init(h.hubDir, []string{"127.0.0.1:1"}, "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	h.start()
	h.must(os.MkdirAll(h.siteDir, 0o700))
	h.enrol(time.Hour)
	return h
}

func (h *house) must(errs ...error) {
	h.Helper()
	if err := errors.Join(errs...); err != nil {
		h.Fatal(err)
	}
}

func (h *house) start() {
	h.Helper()
	h.must(os.WriteFile(filepath.Join(h.hubDir, hub.ConfigFile), fmt.Appendf(nil, "listen = %q\naddresses = [%q]\nsites = [\"st-anna\"]\n", "127.0.0.1:0", "127.0.0.1:1"), 0o600))
	ctx, cancel := context.WithCancel(context.Background())
	x, err := hub.Open(ctx, h.hubDir, slog.New(slog.DiscardHandler))
	h.must(err)
	at, done := make(chan string, 1), make(chan error, 1)
	go func() { done <- x.Run(ctx, func(a net.Addr) { at <- a.String() }) }()
	ended := false
	h.stop = func() {
		if !ended {
			ended = true
			cancel()
			if err := <-done; err != nil {
				h.Error(err)
			}
		}
	}
	h.Cleanup(h.stop)
	h.addr = <-at
}

// enrol gives the site, and the user, a certificate, and writes their configuration.
func (h *house) enrol(ttl time.Duration) {
	h.Helper()
	k, err := h.auth.NewKeypair(pki.Identity{Kind: pki.KindSite, Name: "st-anna"}, nil, ttl)
	h.must(err, pki.SaveKeypair(h.siteDir, "site", k))
	h.configure(h.addr)
	u, err := h.auth.NewKeypair(pki.Identity{Kind: pki.KindUser, Name: "maria"}, nil, ttl)
	h.must(err, client.Save(client.Context{Name: "here", Hubs: []string{strings.Replace(h.addr, "127.0.0.1", "localhost", 1)}, Proxy: h.proxy, User: "maria"}, u))
}

func (h *house) configure(addr string) {
	h.Helper()
	text := fmt.Sprintf("name = \"st-anna\"\nhub = %q\n", addr)
	if h.proxy != "" {
		text += fmt.Sprintf("proxy = %q\n", h.proxy)
	}
	h.must(os.WriteFile(filepath.Join(h.siteDir, site.ConfigFile), []byte(text+h.extraConfig), 0o600))
}

// usual are warnings that depend on the machine on which the test runs.
var usual = []string{"clock", "memory", "service", "disk"}

// finds wants that the report has exactly one check that is not ok, and that it says so.
func finds(t *testing.T, r Report, check string, status Status, says, next string) {
	t.Helper()
	found := false
	for _, f := range r.Findings {
		if f.Status != OK && f.Next == "" {
			t.Errorf("%s says not what to do: %+v", r.Kind, f)
		}
		if f.Check == check && f.Status == status && strings.Contains(f.Seen, says) && strings.Contains(f.Next, next) {
			found = true
		} else if f.Status == Error && f.Check != check || f.Status == Warning && f.Check != check && !slices.Contains(usual, f.Check) {
			t.Logf("beside it: %+v", f)
		}
	}
	if !found {
		t.Errorf("no %s of check %s that says %q, next %q:\n%s", status, check, says, next, text(r))
	}
}

func text(r Report) string {
	var b strings.Builder
	for _, f := range r.Findings {
		fmt.Fprintf(&b, "%s %s: %s; next: %s\n", f.Status, f.Check, f.Seen, f.Next)
	}
	return b.String()
}

// Where nothing is wrong, nothing is found; and every check was made.
func TestHealthy(t *testing.T) {
	h := build(t)
	ctx := t.Context()
	made := map[string]bool{}
	for _, r := range []Report{Hub(ctx, h.hubDir, Options{}), Site(ctx, h.siteDir, Options{}), User(ctx, "here", Options{})} {
		for _, f := range r.Findings {
			made[f.Check] = true
			if f.Status == Error || f.Status == Warning && !slices.Contains(usual, f.Check) {
				t.Errorf("%s: %+v", r.Kind, f)
			}
		}
		if r.Version == "" || r.Time.IsZero() || r.Dir == "" {
			t.Errorf("%+v", r)
		}
	}
	for _, id := range IDs() {
		if !made[id] {
			t.Errorf("check %s was not made anywhere", id)
		}
	}
	for dir, want := range map[string]string{h.hubDir: KindHub, h.siteDir: KindSite, t.TempDir(): ""} {
		if got, err := Kind(dir); got != want || (err == nil) != (want != "") {
			t.Errorf("%s is a %q, %v", dir, got, err)
		}
	}
	// Nothing was written.
	for _, f := range []string{"pergola.db-wal", "pergola.db-shm"} {
		if _, err := os.Stat(filepath.Join(h.siteDir, f)); err == nil {
			t.Error(f)
		}
	}
	h.stop()
	before := entries(t, h.hubDir)
	r := Hub(ctx, h.hubDir, Options{})
	if after := entries(t, h.hubDir); !slices.Equal(before, after) {
		t.Errorf("looking at a hub that does not run changed its directory:\n%v\n%v", before, after)
	}
	finds(t, r, "service", Warning, "the hub does not run", "pergola hub --dir")
	finds(t, r, "port", OK, "can be listened at", "")
	finds(t, r, "store", OK, "a whole SQLite file", "")
}

func entries(t *testing.T, dir string) []string {
	t.Helper()
	es, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range es {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, fmt.Sprint(e.Name(), " ", info.Size(), " ", info.ModTime()))
	}
	return out
}

// Each fault at a site, really brought about, is found by its check, with what to do.
func TestFaultsOfSites(t *testing.T) {
	h := build(t)
	for _, c := range []struct {
		name       string
		fault      func(t *testing.T, h *house)
		check      string
		status     Status
		says, next string
		asUser     bool
	}{
		{"an unknown key", func(_ *testing.T, h *house) { h.extraConfig = "pyton = \"x\"\n"; h.configure(h.addr) }, "configuration", Error, `site.toml:3: unknown key pyton; did you mean "python"?`, "correct", false},
		{"a key that others can read", func(_ *testing.T, h *house) { h.must(os.Chmod(filepath.Join(h.siteDir, "site.key"), 0o644)) }, "directory", Error, "site.key, which is secret, can be read by others (mode 0644)", "chmod 600", false},
		{"a directory that is open", func(_ *testing.T, h *house) { h.must(os.Chmod(h.siteDir, 0o755)) }, "directory", Warning, "is open to other users", "chmod 700", false},
		{"a file of another user", func(t *testing.T, h *house) {
			if os.Getuid() != 0 {
				t.Skip("only root can give files away")
			}
			h.must(os.Chown(filepath.Join(h.siteDir, "site.key"), 12345, 12345))
		}, "directory", Error, "not of its owner", "chown", false},
		{"a certificate that is over", func(_ *testing.T, h *house) { h.enrol(time.Nanosecond) }, "certificate", Error, "the certificate of site st-anna ended", "pergola site join", false},
		{"which the way to the hub tells, too", func(_ *testing.T, h *house) { h.enrol(time.Nanosecond) }, "hub", Error, "this end's certificate is over", "new token", false},
		{"a user's certificate that is over", func(_ *testing.T, h *house) { h.enrol(time.Nanosecond) }, "certificate", Error, "the certificate of user maria ended", "pergola login", true},
		{"another site's certificate", func(_ *testing.T, h *house) {
			k, err := h.auth.NewKeypair(pki.Identity{Kind: pki.KindSite, Name: "charite"}, nil, time.Hour)
			h.must(err, pki.SaveKeypair(h.siteDir, "site", k))
		}, "certificate", Error, "is that of site charite, and site.toml is of site st-anna", "correct name", false},
		{"a certificate that ends soon", func(_ *testing.T, h *house) {
			k, err := h.auth.NewKeypair(pki.Identity{Kind: pki.KindSite, Name: "st-anna"}, nil, 20*time.Second)
			h.must(err, pki.SaveKeypair(h.siteDir, "site", k))
		}, "certificate", Warning, "ends in", "renew", false},
		{"a key that does not fit", func(_ *testing.T, h *house) {
			b, err := os.ReadFile(filepath.Join(h.hubDir, "hub.key"))
			h.must(err, os.WriteFile(filepath.Join(h.siteDir, "site.key"), b, 0o600))
		}, "certificate", Error, "do not fit", "", false},
		{"another authority on disk", func(_ *testing.T, h *house) {
			other, err := pki.NewAuthority("other")
			h.must(err, os.WriteFile(filepath.Join(h.siteDir, "ca.crt"), other.CertPEM(), 0o600))
		}, "authority", Error, "was not issued by the authority", "enrol again", false},
		{"a hub of another authority", func(_ *testing.T, h *house) {
			other, err := pki.NewAuthority("other")
			h.must(err)
			k, err := other.NewKeypair(pki.Identity{Kind: pki.KindSite, Name: "st-anna"}, nil, time.Hour)
			h.must(err, pki.SaveKeypair(h.siteDir, "site", k))
		}, "authority", Error, "a hub of another authority", "enrol again", false},
		{"a site that was never enrolled", func(_ *testing.T, h *house) {
			k, err := h.auth.NewKeypair(pki.Identity{Kind: pki.KindSite, Name: "nobody"}, nil, time.Hour)
			h.must(err, pki.SaveKeypair(h.siteDir, "site", k), config.Write(filepath.Join(h.siteDir, site.ConfigFile), map[string]any{"name": "nobody", "hub": h.addr}))
		}, "hub", Error, "site nobody is not enrolled", "new token", false},
		{"a port that refuses", func(t *testing.T, h *house) { h.configure(closed(t)) }, "hub", Error, "connection refused", "check that the hub runs", false},
		{"a name that is none", func(_ *testing.T, h *house) { h.configure("hub.invalid:8443") }, "resolution", Error, "hub.invalid cannot be resolved here", "DNS", false},
		{"a proxy that refuses", func(t *testing.T, h *house) {
			h.proxy = "http://anna:hunter2hunter2@" + proxyOf(t, &chaos.Proxy{Status: http.StatusForbidden})
			h.configure(h.addr)
		}, "proxy", Error, "does not allow connections", "ask whoever runs it to allow CONNECT", false},
		{"a proxy that is not there", func(t *testing.T, h *house) { h.proxy = "http://anna:hunter2hunter2@" + closed(t); h.configure(h.addr) }, "proxy", Error, "cannot be reached", "check that the proxy runs", false},
		{"a proxy that works", func(t *testing.T, h *house) { h.proxy = "http://" + proxyOf(t, &chaos.Proxy{}); h.configure(h.addr) }, "proxy", OK, "is asked, and gives connections", "", false},
		{"a middle box", func(t *testing.T, h *house) { h.configure(box(t)) }, "path", Error, `decrypted by a middle box whose certificate is issued by "Box CA`, "no TLS inspection", false},
		{"a clock that is behind", func(t *testing.T, h *house) { h.configure(h.oddClock(t, 43*time.Second)) }, "clock", Warning, "is 43s behind the hub's", "NTP", false},
		{"a clock that is far ahead", func(t *testing.T, h *house) { h.configure(h.oddClock(t, -2*time.Hour)) }, "clock", Error, "not valid at both", "NTP", false},
		{"no Python", func(t *testing.T, _ *house) { t.Setenv("PATH", t.TempDir()); t.Setenv("PERGOLA_PYTHON", "") }, "python", Error, "there is no python3 on PATH", "install Python", false},
		{"a Python that is none", func(_ *testing.T, h *house) { h.extraConfig = "python = \"/bin/false\"\n"; h.configure(h.addr) }, "python", Error, "is not a Python interpreter that works", "install Python", false},
		{"an interpreter without flwr", func(t *testing.T, h *house) {
			venv := filepath.Join(t.TempDir(), "v")
			if out, err := exec.Command("python3", "-m", "venv", "--without-pip", venv).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			h.extraConfig = fmt.Sprintf("python = %q\nexisting = true\n", venv)
			h.configure(h.addr)
		}, "environment", Error, "flwr (not installed)", "install what is missing", false},
		{"a full disk", func(t *testing.T, h *house) {
			dir := t.TempDir()
			if err := syscall.Mount("none", dir, "tmpfs", 0, "size=1m"); err != nil {
				t.Skipf("no tmpfs can be mounted here: %v", err)
			}
			t.Cleanup(func() { h.must(syscall.Unmount(dir, 0)) })
			h.extraConfig = fmt.Sprintf("cache = %q\n", dir)
			h.configure(h.addr)
		}, "disk", Error, "MiB left for the environments' cache", "make room", false},
		{"a disk without inodes", func(t *testing.T, h *house) {
			dir := t.TempDir()
			if err := syscall.Mount("none", dir, "tmpfs", 0, "nr_inodes=50"); err != nil {
				t.Skipf("no tmpfs can be mounted here: %v", err)
			}
			t.Cleanup(func() { h.must(syscall.Unmount(dir, 0)) })
			h.extraConfig = fmt.Sprintf("cache = %q\n", dir)
			h.configure(h.addr)
		}, "disk", Error, "inodes left", "remove files", false},
		{"few files", func(t *testing.T, _ *house) {
			var old syscall.Rlimit
			if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &old); err != nil {
				t.Fatal(err)
			}
			if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: 500, Max: old.Max}); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = syscall.Setrlimit(syscall.RLIMIT_NOFILE, &old) })
		}, "files", Warning, "500 files open, which is few", "LimitNOFILE", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := *h
			h.T, h.proxy, h.extraConfig = t, "", ""
			h.siteDir = t.TempDir()
			h.must(os.Chmod(h.siteDir, 0o700))
			h.enrol(time.Hour)
			c.fault(t, &h)
			r := Site(t.Context(), h.siteDir, Options{})
			if c.asUser {
				r = User(t.Context(), "here", Options{})
			}
			finds(t, r, c.check, c.status, c.says, c.next)
			if strings.Contains(text(r), "hunter2") {
				t.Errorf("the report has the proxy's password:\n%s", text(r))
			}
		})
	}
}

var deep = flag.Bool("deep", false, "build environments, as pergola doctor --deep does: minutes, and the package index")

// An environment is built, or it is said why it cannot be.
func TestDeep(t *testing.T) {
	if !*deep {
		t.Skip("only with -deep")
	}
	h := build(t)
	finds(t, Site(t.Context(), h.siteDir, Options{Deep: true}), "environment", OK, "an environment with flwr ", "")
	finds(t, Site(t.Context(), h.siteDir, Options{}), "environment", OK, "1 environments are built", "")
	t.Setenv("PERGOLA_CACHE", t.TempDir())
	url := "http://" + closed(t) + "/simple"
	for _, v := range []string{"PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL"} {
		t.Setenv(v, url)
	}
	t.Setenv("PIP_RETRIES", "0")
	t.Setenv("UV_HTTP_RETRIES", "0")
	t.Setenv("PIP_CONFIG_FILE", os.DevNull)
	finds(t, Site(t.Context(), h.siteDir, Options{Deep: true}), "environment", Error, "index", "")
}

// closed gives an address at which nobody listens.
func closed(t *testing.T) string {
	t.Helper()
	var lc net.ListenConfig
	ln, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}

func proxyOf(t *testing.T, p *chaos.Proxy) string {
	t.Helper()
	addr, err := p.Start(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Stop)
	return addr
}

// box is a middle box: a TLS server with a certificate of its own authority.
func box(t *testing.T) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Box CA"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		DNSNames: []string{pki.HubName}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(http.NotFoundHandler())
	s.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, MinVersion: tls.VersionTLS12}
	s.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug)
	s.StartTLS()
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

// oddClock is the hub, with a clock that is off: the one thing that a real one cannot be told to have.
func (h *house) oddClock(t *testing.T, ahead time.Duration) string {
	t.Helper()
	pair, err := h.auth.NewKeypair(pki.Identity{Kind: pki.KindHub, Name: pki.HubName}, nil, time.Hour)
	h.must(err)
	cert, err := pair.Certificate()
	h.must(err)
	var lc net.ListenConfig
	ln, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	h.must(err)
	s := &http.Server{ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug), Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Date", time.Now().Add(ahead).UTC().Format(http.TimeFormat))
		_, _ = io.WriteString(w, "{}")
	})}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(plain{tls.NewListener(ln, h.auth.WithJoin(pki.ServerTLS(cert, h.auth.Roots(), "http/1.1")))}) // until it is closed
	}()
	t.Cleanup(func() { h.must(s.Close()); <-done })
	return ln.Addr().String()
}

// plain hides from net/http that connections are TLS: it serves no protocol that it does not know.
type plain struct{ net.Listener }

func (p plain) Accept() (net.Conn, error) {
	c, err := p.Listener.Accept()
	return struct{ net.Conn }{c}, err
}

// Each fault at a hub is found by its check.
func TestFaultsOfHubs(t *testing.T) {
	if !t.Run("of one that runs", func(t *testing.T) {
		h := build(t)
		h.must(os.Chmod(filepath.Join(h.hubDir, "ca.key"), 0o640))
		finds(t, Hub(t.Context(), h.hubDir, Options{}), "directory", Error, "ca.key, which is secret", "make a new hub")
		h.must(os.Chmod(filepath.Join(h.hubDir, "ca.key"), 0o600))

		// A process that has the socket and does not answer, as one that was stopped: that it runs is known all the same.
		held := h.hubDir + "2"
		if out, err := exec.Command("cp", "-r", h.hubDir, held).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		ln, err := sock.Listen(filepath.Join(held, hub.MonitorSocket))
		h.must(err)
		defer ln.Close()
		short, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		p := &patient{kind: KindHub, dir: held}
		if f := service(short, p); f[0].Status != Error || !strings.Contains(f[0].Seen, "runs, but does not answer") || !p.runs {
			t.Errorf("%+v", f)
		}
		if f := port(t.Context(), p); f[0].Status != OK {
			t.Errorf("%+v", f)
		}

		// A runner of a job that the hub does not know.
		id := string(job.NewID(time.Now()))
		dir := filepath.Join(h.hubDir, "jobs", id, "party")
		left := exec.Command("sh", "-c", "read x", "runner", "--dir", dir)
		in, err := left.StdinPipe()
		h.must(err, left.Start())
		finds(t, Hub(t.Context(), h.hubDir, Options{}), "leftovers", Warning, fmt.Sprintf("%s (process %d)", id, left.Process.Pid), "")
		in.Close()
		_ = left.Wait()
	}) {
		return
	}
	h := build(t)
	h.stop()
	conf := filepath.Join(h.hubDir, hub.ConfigFile)
	write := func(text string) { h.must(os.WriteFile(conf, []byte(text), 0o600)) }
	var lc net.ListenConfig
	ln, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	h.must(err)
	defer ln.Close()
	write(fmt.Sprintf("listen = %q\naddresses = [\"127.0.0.1:1\"]\n", ln.Addr()))
	finds(t, Hub(t.Context(), h.hubDir, Options{}), "port", Error, "another program has "+ln.Addr().String(), "ss -ltnp")
	write("listen = \"192.0.2.1:8443\"\n")
	r := Hub(t.Context(), h.hubDir, Options{})
	finds(t, r, "port", Error, "192.0.2.1:8443 cannot be listened at", "correct listen")
	finds(t, r, "configuration", Warning, "does not say at which address", "addresses = ")
	write("lisen = \":1\"\n")
	finds(t, Hub(t.Context(), h.hubDir, Options{}), "configuration", Error, `unknown key lisen; did you mean "listen"?`, "correct")

	t.Run("a store in Postgres", func(t *testing.T) {
		pg := pgtest.Start(t)
		url := pg.Fresh(t)
		write(fmt.Sprintf("listen = \"127.0.0.1:0\"\naddresses = [\"127.0.0.1:1\"]\nstore = %q\n", url))
		finds(t, Hub(t.Context(), h.hubDir, Options{}), "store", Warning, "has no tables of a hub yet", "start the hub")
		x, err := hub.Open(t.Context(), h.hubDir, slog.New(slog.DiscardHandler))
		h.must(err)
		ctx, cancel := context.WithCancel(t.Context())
		h.must(x.Run(ctx, func(net.Addr) { cancel() }))
		finds(t, Hub(t.Context(), h.hubDir, Options{}), "store", OK, "PostgreSQL ", "")
		pg.Restart(t, func() {
			finds(t, Hub(t.Context(), h.hubDir, Options{}), "store", Error, "its store does not answer", "docs/store.md")
		})
	})
	write("listen = \"127.0.0.1:0\"\naddresses = [\"127.0.0.1:1\"]\n")

	// The store's second page on is overwritten, as a disk that fails would.
	db := filepath.Join(h.hubDir, hub.DatabaseFile)
	b, err := os.ReadFile(db)
	h.must(err)
	for i := 4096; i < len(b); i++ {
		b[i] = byte(i * 7)
	}
	h.must(os.WriteFile(db, b, 0o600))
	finds(t, Hub(t.Context(), h.hubDir, Options{}), "store", Error, "is damaged", "backup")
	h.must(os.Remove(db))
	finds(t, Hub(t.Context(), h.hubDir, Options{}), "store", Warning, "there is no store", "start the hub")
	if _, err := os.Stat(db); err == nil {
		t.Error("looking made a store")
	}
	other, err := pki.NewAuthority("other")
	h.must(err)
	k, err := other.NewKeypair(pki.Identity{Kind: pki.KindHub, Name: pki.HubName}, nil, time.Hour)
	h.must(err, os.WriteFile(filepath.Join(h.hubDir, "hub.crt"), k.CertPEM, 0o600), os.WriteFile(filepath.Join(h.hubDir, "hub.key"), k.KeyPEM, 0o600))
	finds(t, Hub(t.Context(), h.hubDir, Options{}), "authority", Error, "was not issued by the authority", "one backup")
}

var sections = regexp.MustCompile("(?m)^## `([a-z]+)`$")

// docs/doctor.md has a section for each check, and for nothing else.
func TestChecksOfTheManual(t *testing.T) {
	b, err := os.ReadFile("../../docs/doctor.md")
	if err != nil {
		t.Fatal(err)
	}
	var page []string
	for _, m := range sections.FindAllStringSubmatch(string(b), -1) {
		page = append(page, m[1])
	}
	if !slices.Equal(page, IDs()) {
		t.Errorf("the page has  %v\nthe checks are %v", page, IDs())
	}
}
