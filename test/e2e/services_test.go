package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/hub"
)

const deploy = "../../deploy"

// The units are what systemd takes without a word, call the command as it is, and let runners outlive their services.
func TestUnits(t *testing.T) {
	t.Parallel()
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("there is no systemd-analyze here; tools/needs.sh systemd installs it where it can")
	}
	verify := func(unit, text string, user bool) string {
		dir := t.TempDir()
		path := filepath.Join(dir, unit)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		args := []string{"verify", "--man=no", path}
		if user {
			args = append([]string{"--user"}, args...)
		}
		c := exec.CommandContext(t.Context(), analyze, args...)
		c.Env = append(os.Environ(), "XDG_RUNTIME_DIR="+dir)
		out, err := c.CombinedOutput()
		if err != nil {
			return fmt.Sprintf("%v\n%s", err, out)
		}
		return string(out)
	}
	execStart := regexp.MustCompile(`(?m)^ExecStart=(\S*/pergola) (.*)$`)
	for _, c := range []struct {
		unit string
		user bool
	}{{"pergola-hub.service", false}, {"pergola-site.service", false}, {"user/pergola-site.service", true}} {
		t.Run(c.unit, func(t *testing.T) {
			b, err := os.ReadFile(filepath.Join(deploy, "systemd", c.unit))
			if err != nil {
				t.Fatal(err)
			}
			m := execStart.FindSubmatch(b)
			if m == nil {
				t.Fatal("no ExecStart= with pergola")
			}
			args := strings.Fields(string(m[2]))
			if out, err := exec.CommandContext(t.Context(), binary, append(args, "--help")...).CombinedOutput(); err != nil {
				t.Errorf("the command has no such arguments: %v\n%s", err, out)
			}
			text := strings.ReplaceAll(string(b), string(m[1]), binary) // which is there, as the check wants it
			name := filepath.Base(c.unit)
			if said := verify(name, text, c.user); said != "" {
				t.Errorf("systemd-analyze verify says:\n%s", said)
			}
			if said := verify(name, strings.Replace(text, "[Service]", "[Service]\nKilMode=process", 1), c.user); !strings.Contains(said, "KilMode") {
				t.Errorf("systemd-analyze verify finds nothing wrong with an unknown key: %q", said)
			}
			for _, want := range []string{"Type=notify", "KillMode=process", "OOMPolicy=continue", "Restart=always", "WatchdogSec=60"} {
				if !slices.Contains(strings.Split(text, "\n"), want) {
					t.Errorf("there is no line %s", want)
				}
			}
			for _, never := range []string{"PrivateTmp=yes", "DynamicUser=yes", "PrivateDevices=yes", "MemoryDenyWriteExecute=yes"} { // jobs would break
				if strings.Contains(text, never) {
					t.Errorf("there is a line %s", never)
				}
			}
		})
	}
	t.Run("user", func(t *testing.T) {
		sysusers, err := exec.LookPath("systemd-sysusers")
		if err != nil {
			t.Skip("there is no systemd-sysusers here")
		}
		root := t.TempDir()
		if err := os.Mkdir(filepath.Join(root, "etc"), 0o700); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(filepath.Join(deploy, "systemd/pergola.sysusers"))
		if err != nil {
			t.Fatal(err)
		}
		c := exec.CommandContext(t.Context(), sysusers, "--root="+root, "-")
		c.Stdin = bytes.NewReader(b)
		if out, err := c.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		b, err = os.ReadFile(filepath.Join(root, "etc/passwd"))
		if err != nil || !strings.HasPrefix(string(b), "pergola:") || !strings.Contains(string(b), ":/var/lib/pergola:") {
			t.Errorf("%v: %s", err, b)
		}
	})
}

// There is no engine here that could build the image; what its file names is there, and is what the Makefile says.
func TestContainerfile(t *testing.T) {
	t.Parallel()
	b, err := os.ReadFile(filepath.Join(deploy, "container/Containerfile"))
	if err != nil {
		t.Fatal(err)
	}
	all := strings.ReplaceAll(string(b), "\\\n", " ")
	of := map[string][]string{}
	for line := range strings.Lines(all) {
		what, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		if what != "" && !strings.HasPrefix(what, "#") {
			of[what] = append(of[what], rest)
		}
	}
	for what := range of {
		if !slices.Contains([]string{"FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "VOLUME", "EXPOSE", "HEALTHCHECK", "STOPSIGNAL", "ENTRYPOINT", "CMD"}, what) {
			t.Errorf("%s is no instruction that is known here", what)
		}
	}
	makefile, err := os.ReadFile("../../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	gomod, err := os.ReadFile("../../go.mod")
	if err != nil {
		t.Fatal(err)
	}
	ignored, err := os.ReadFile("../../.dockerignore")
	if err != nil {
		t.Fatal(err)
	}
	goVersion := regexp.MustCompile(`(?m)^go (\d+\.\d+)`).FindStringSubmatch(string(gomod))[1]
	uv := regexp.MustCompile(`(?m)^UV_VERSION\s*\?= (\S+)`).FindStringSubmatch(string(makefile))[1]
	for _, want := range []string{
		"FROM docker.io/library/golang:" + goVersion + " AS build",
		"CGO_ENABLED=0 go build -trimpath -o /out/pergola ./cmd/pergola\n",
		"COPY --from=build /out/pergola /usr/local/bin/pergola\n",
		"uv==" + uv + "\n", "install -y --no-install-recommends tini ", "useradd --system --uid 985 --home-dir /var/lib/pergola ",
		"\nUSER pergola\n", "\nVOLUME /var/lib/pergola\n", "XDG_STATE_HOME=/var/lib ",
		`ENTRYPOINT ["/usr/bin/tini", "--", "/usr/local/bin/pergola"]` + "\n", `CMD ["hub"]` + "\n",
	} {
		if !strings.Contains(all, want) {
			t.Errorf("there is no %q", want)
		}
	}
	for _, c := range of["COPY"] {
		if strings.HasPrefix(c, "--from") {
			continue
		}
		fs := strings.Fields(c)
		for _, from := range fs[:len(fs)-1] {
			if _, err := os.Stat(filepath.Join("../..", from)); err != nil {
				t.Error(err)
			}
			if !strings.Contains(string(ignored), "\n!"+from+"\n") {
				t.Errorf("%s is copied, but .dockerignore leaves it out", from)
			}
		}
	}
	// The build needs nothing but what is copied.
	root := t.TempDir()
	for _, name := range []string{"go.mod", "go.sum", "cmd", "internal"} {
		abs, err := filepath.Abs(filepath.Join("../..", name))
		if err != nil {
			t.Fatal(err)
		}
		if out, err := exec.CommandContext(t.Context(), "cp", "-r", abs, root).CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	list := exec.CommandContext(t.Context(), "go", "list", "-e=false", "-deps", "./cmd/pergola")
	list.Dir, list.Env = root, append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-buildvcs=false")
	if out, err := list.CombinedOutput(); err != nil {
		t.Errorf("what is copied does not build: %v\n%s", err, out)
	}

	// Services of the compose file: images' commands that there are, and a volume where the image has its state.
	var compose struct {
		Services map[string]struct {
			Image, Restart string
			Command        []string
			Volumes        []string
			Ports          []string
			Grace          string         `yaml:"stop_grace_period"`
			Healthcheck    map[string]any `yaml:"healthcheck"`
			Profiles       []string
		}
		Volumes map[string]any
	}
	b, err = os.ReadFile(filepath.Join(deploy, "container/compose.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	dec := yaml.NewDecoder(bytes.NewReader(b))
	dec.KnownFields(true)
	if err := dec.Decode(&compose); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"hub", "site"} {
		s := compose.Services[name]
		if out, err := exec.CommandContext(t.Context(), binary, append(s.Command, "--help")...).CombinedOutput(); err != nil || len(s.Command) == 0 {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
		if !slices.Contains(s.Volumes, name+":/var/lib/pergola") || s.Restart != "always" {
			t.Errorf("%s: %+v", name, s)
		}
		if _, ok := compose.Volumes[name]; !ok {
			t.Errorf("the volume %s is not there", name)
		}
	}
}

// notices is a service manager's socket.
type notices struct {
	t    *testing.T
	path string
	told chan string
}

func newNotices(t *testing.T) *notices {
	t.Helper()
	dir, err := os.MkdirTemp("", "pergola-notify-") // short: a socket's path has 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	n := &notices{t: t, path: filepath.Join(dir, "s"), told: make(chan string, 10000)}
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: n.path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(n.told)
		buf := make([]byte, 4096)
		for {
			k, err := conn.Read(buf)
			if err != nil {
				return
			}
			n.told <- string(buf[:k])
		}
	}()
	t.Cleanup(func() {
		conn.Close()
		os.RemoveAll(dir)
	})
	return n
}

// until waits until something is told that begins so.
func (n *notices) until(prefix string) string {
	n.t.Helper()
	for {
		select {
		case s := <-n.told:
			if strings.HasPrefix(s, prefix) {
				return s
			}
		case <-time.After(time.Minute):
			n.t.Fatalf("the manager was never told %s", prefix)
		}
	}
}

// terminate is what systemd does to a unit with KillMode=process: SIGTERM to its main process alone. The service ends by itself,
// with status 0.
func (s *daemon) terminate() {
	s.t.Helper()
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		s.t.Fatal(err)
	}
	if err := s.cmd.Wait(); err != nil && !errors.Is(err, exec.ErrWaitDelay) {
		s.t.Errorf("%s %s: %v", s.role, s.dir, err)
	}
	s.cmd = nil
}

// Hub and agent tell the service manager when they are ready, that they live, how they are, and that they stop.
func TestServiceManager(t *testing.T) {
	t.Parallel()
	f := daemons(t, "site-1")
	for _, s := range []*daemon{f.sites[0], f.hub} { // an agent without a hub is ready, too
		n := newNotices(t)
		s.env = []string{"NOTIFY_SOCKET=" + n.path, "WATCHDOG_USEC=200000"}
		s.start()
		if s.role == "hub" {
			if got := n.until("STATUS="); got != "STATUS="+hub.ListeningPrefix+f.addrs[0] {
				t.Error(got)
			}
			n.until("READY=1")
			f.ready(t)
		} else {
			n.until("READY=1")
			n.until("STATUS=no hub: ")
		}
		n.until("WATCHDOG=1")
		n.until("WATCHDOG=1")
		if s.role == "hub" {
			s.terminate()
			n.until("STOPPING=1")
		}
	}
	n := newNotices(t)
	f.sites[0].terminate()
	f.hub.env, f.sites[0].env = nil, []string{"NOTIFY_SOCKET=" + n.path}
	f.hub.start()
	f.sites[0].start()
	n.until("STATUS=connected to ")
	f.sites[0].terminate()
	n.until("STOPPING=1")
}

// ready waits until the hub answers.
func (f *fleetOf) ready(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	for {
		_, err := f.client.Jobs.ListSites(ctx, &pb.ListSitesRequest{})
		if err == nil {
			return
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			t.Fatalf("the hub does not answer: %v", err)
		}
	}
}
