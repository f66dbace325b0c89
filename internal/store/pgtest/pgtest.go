// Package pgtest gives tests a Postgres server of their own: a real one, of the machine's package, that is run by an unprivileged
// user, listens on a unix socket alone, and is gone with the test process, however that ends. It is used by tests only.
//
// Start with [Start].
package pgtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// Server is a running Postgres server.
type Server struct {
	dir   string // its data; the socket is in there too
	bin   string
	count atomic.Int64
	cmd   *exec.Cmd
	life  io.Closer // the server ends when this is closed
	out   bytes.Buffer
}

// startPatience is how long a server on a busy machine may take to make its files, and again to answer.
const startPatience = 2 * time.Minute

// keeper starts the server and ends it at once when its own input ends, as it does when the test process is gone. The server's
// state is nobody's loss. $1 is the server's program, $2 its data.
const keeper = `"$1" -D "$2" -k "$2" & server=$!; read -r _; kill -QUIT $server; kill -CONT $server; wait $server`

// Start starts a server, which ends with the test. The test is skipped where Postgres is not installed.
func Start(t testing.TB) *Server {
	t.Helper()
	bin := find()
	if bin == "" {
		t.Skip("Postgres is not installed; Debian's package is postgresql")
	}
	// Not t.TempDir: a socket's path must be short, and a plain user must be able to come here.
	dir, err := os.MkdirTemp("/tmp", "pergola-pg-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	s := &Server{dir: filepath.Join(dir, "data"), bin: bin}
	cred := plain(t, dir)
	ctx, cancel := context.WithTimeout(t.Context(), startPatience)
	defer cancel()
	initdb := exec.CommandContext(ctx, filepath.Join(bin, "initdb"), "-D", s.dir, "-U", "pergola", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync")
	initdb.SysProcAttr, initdb.Dir = &syscall.SysProcAttr{Credential: cred}, dir
	if out, err := initdb.CombinedOutput(); err != nil {
		t.Fatalf("initdb: %v\n%s", err, out)
	}
	conf := "listen_addresses = ''\nfsync = off\nfull_page_writes = off\nautovacuum = off\nshared_buffers = 16MB\nmax_connections = 40\n"
	if err := appendTo(filepath.Join(s.dir, "postgresql.conf"), conf); err != nil {
		t.Fatal(err)
	}
	s.run(t, cred)
	t.Cleanup(s.stop)
	s.await(ctx, t)
	return s
}

// stop ends the server at once, also one that is frozen. Its keeper says so with its status, which tells nothing.
func (s *Server) stop() {
	_ = s.life.Close()
	_ = s.cmd.Wait()
}

func (s *Server) run(t testing.TB, cred *syscall.Credential) {
	t.Helper()
	s.cmd = exec.Command("/bin/sh", "-c", keeper, "sh", filepath.Join(s.bin, "postgres"), s.dir) //nolint:noctx // its input is its owner
	s.cmd.SysProcAttr, s.cmd.Dir = &syscall.SysProcAttr{Credential: cred}, filepath.Dir(s.dir)
	s.cmd.Stdout, s.cmd.Stderr = &s.out, &s.out
	in, err := s.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	s.life = in
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
}

func (s *Server) await(ctx context.Context, t testing.TB) {
	t.Helper()
	for {
		c, err := pgx.Connect(ctx, s.url("postgres"))
		if err == nil {
			err = c.Close(ctx)
		}
		if err == nil {
			return
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			t.Fatalf("Postgres does not answer: %v", err)
		}
	}
}

// find gives the folder of Postgres's programs, "" if there is none. Debian keeps them out of PATH, by version.
func find() string {
	if p, err := exec.LookPath("initdb"); err == nil {
		if p, err = filepath.EvalSymlinks(p); err == nil {
			return filepath.Dir(p)
		}
	}
	best, version := "", -1
	all, _ := filepath.Glob("/usr/lib/postgresql/*/bin/initdb") // the pattern is sound
	for _, p := range all {
		if v, err := strconv.Atoi(filepath.Base(filepath.Dir(filepath.Dir(p)))); err == nil && v > version {
			best, version = filepath.Dir(p), v
		}
	}
	return best
}

// plain gives whom the server runs as: Postgres refuses root. The folder becomes that user's.
func plain(t testing.TB, dir string) *syscall.Credential {
	t.Helper()
	if os.Getuid() != 0 {
		return nil
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		if u, err = user.Lookup("nobody"); err != nil {
			t.Skip("Postgres cannot be started: root may not, and there is no other user")
		}
	}
	uid, err1 := strconv.ParseUint(u.Uid, 10, 32)
	gid, err2 := strconv.ParseUint(u.Gid, 10, 32)
	if err := errors.Join(err1, err2, os.Chown(dir, int(uid), int(gid))); err != nil {
		t.Fatal(err)
	}
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
}

func appendTo(path, text string) error {
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Close())
}

func (s *Server) url(database string) string {
	return "postgres:///" + database + "?user=pergola&host=" + url.QueryEscape(s.dir)
}

// Fresh makes an empty database and gives its address.
func (s *Server) Fresh(t testing.TB) string {
	t.Helper()
	name := fmt.Sprintf("t%d", s.count.Add(1))
	s.SQL(t, "CREATE DATABASE "+name)
	return s.url(name)
}

// SQL runs a statement as the server's administrator.
func (s *Server) SQL(t testing.TB, q string) {
	t.Helper()
	c, err := pgx.Connect(t.Context(), s.url("postgres"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.Exec(t.Context(), q)
	if err = errors.Join(err, c.Close(t.Context())); err != nil {
		t.Fatalf("%s: %v", q, err)
	}
}

// Freeze stops all of the server's processes where they are, and Thaw lets them go on.
func (s *Server) Freeze(t testing.TB) { s.signal(t, syscall.SIGSTOP) }

// Thaw is the end of Freeze.
func (s *Server) Thaw(t testing.TB) { s.signal(t, syscall.SIGCONT) }

// signal goes to the server and then to its processes, which it starts and which stay its children.
func (s *Server) signal(t testing.TB, sig syscall.Signal) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(s.dir, "postmaster.pid"))
	if err != nil {
		t.Fatal(err)
	}
	first, _, _ := strings.Cut(string(b), "\n")
	pid, err := strconv.Atoi(first)
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, sig); err != nil {
		t.Fatal(err)
	}
	kids, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		t.Fatal(err)
	}
	for f := range strings.FieldsSeq(string(kids)) {
		kid, err := strconv.Atoi(f)
		if err != nil {
			t.Fatal(err)
		}
		if err := syscall.Kill(kid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
			t.Fatal(err)
		}
	}
}

// Restart ends the server, cutting off whoever is connected, calls while it is down, and starts it again.
func (s *Server) Restart(t testing.TB, down func()) {
	t.Helper()
	s.stop()
	down()
	s.run(t, s.cmd.SysProcAttr.Credential)
	ctx, cancel := context.WithTimeout(t.Context(), startPatience)
	defer cancel()
	s.await(ctx, t)
}
