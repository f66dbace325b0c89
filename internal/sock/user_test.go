package sock

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

const tcpTable = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 12345 1 0000000000000000 100 0 0 10 0
   1: 0200407F:C001 0100007F:1F90 01 00000000:00000000 00:00000000 00000000  1000        0 23456 1 0000000000000000 20 4 30 10 -1
   2: 0100007F:1F90 0200407F:C001 01 00000000:00000000 00:00000000 00000000     0        0 34567 1 0000000000000000 20 4 30 10 -1
`

func TestFindUser(t *testing.T) {
	server, client := netip.MustParseAddrPort("127.0.0.1:8080"), netip.MustParseAddrPort("127.64.0.2:49153")
	if uid, err := findUser(strings.NewReader(tcpTable), client, server); err != nil || uid != 1000 {
		t.Errorf("the client's user is %d, %v; want 1000", uid, err)
	}
	if uid, err := findUser(strings.NewReader(tcpTable), server, client); err != nil || uid != 0 {
		t.Errorf("the server's user is %d, %v; want 0", uid, err)
	}
	const six = "  11: 0000000000000000FFFF00000200407F:C001 0000000000000000FFFF00000100007F:1F90 01 00000000:00000000 00:00000000 00000000  1001 0 1 2 0 20 0 0 10 -1\n"
	if uid, err := findUser(strings.NewReader(six), client, server); err != nil || uid != 1001 {
		t.Errorf("the user of a client with an IPv6 socket is %d, %v; want 1001", uid, err)
	}
	if uid, err := findUser(strings.NewReader(tcpTable), netip.MustParseAddrPort("127.64.0.2:1"), server); err == nil {
		t.Errorf("a connection that is not there is of user %d", uid)
	}
	if uid, err := findUser(strings.NewReader("x\n0: a b c\n"), client, server); err == nil {
		t.Errorf("rubbish gives user %d", uid)
	}
}

// A connection of another user is closed before a byte of it is read; one's own is not.
func TestOwnUser(t *testing.T) {
	if os.Getenv("PERGOLA_TEST_DIAL") != "" {
		c, err := net.Dial("tcp", os.Getenv("PERGOLA_TEST_DIAL"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, make([]byte, 5)); err == nil {
			t.Log("welcome")
		}
		return
	}
	base, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var said bytes.Buffer
	ln := OwnUser(base, slog.New(slog.NewTextHandler(&said, nil)))
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				if !errors.Is(err, net.ErrClosed) {
					t.Error(err)
				}
				return
			}
			if _, err := c.Write([]byte("hello")); err != nil {
				t.Error(err)
			}
			c.Close()
		}
	}()
	dial := func(uid int) string {
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.CommandContext(context.Background(), self, "-test.run=^TestOwnUser$", "-test.v")
		cmd.Env = append(os.Environ(), "PERGOLA_TEST_DIAL="+base.Addr().String())
		if uid != os.Getuid() {
			// The test's own folder may be closed to others: the program is run by its descriptor.
			f, err := os.Open(self)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			cmd.Path, cmd.ExtraFiles, cmd.Dir = "/proc/self/fd/3", []*os.File{f}, "/"
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
		}
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("as user %d: %v\n%s", uid, err, out)
		}
		return string(out)
	}
	if out := dial(os.Getuid()); !strings.Contains(out, "welcome") {
		t.Errorf("one's own connection was refused:\n%s", out)
	}
	if os.Getuid() == 0 { // nobody else can become another user
		if out := dial(65534); strings.Contains(out, "welcome") {
			t.Errorf("another user's connection was taken:\n%s", out)
		}
	}
	ln.Close()
	<-done
	if os.Getuid() == 0 && !strings.Contains(said.String(), "uid=65534") {
		t.Errorf("it was not noted: %s", said.String())
	}
}
