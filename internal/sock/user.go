package sock

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
)

// OwnUser lets only programs of this process's user connect to a loopback TCP port: a port has no owner and no mode, so any
// user of the machine could. Others' connections are closed at once, and noted. The user of a connection is what the kernel's
// table of this network namespace says (/proc/net/tcp, proc_net_tcp.rst); a connection that is not in it, or no longer, is
// nobody's and is closed, too.
func OwnUser(ln net.Listener, log *slog.Logger) net.Listener {
	return &ownUser{ln, uint64(os.Getuid()), log}
}

type ownUser struct {
	net.Listener
	uid uint64
	log *slog.Logger
}

// Accept implements net.Listener.
func (l *ownUser) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		uid, err := userOf(c)
		if err == nil && uid == l.uid {
			return c, nil
		}
		l.log.Warn("refused a connection of another user", "address", l.Addr().String(), "uid", uid, "err", err)
		_ = c.Close() // nothing was written
	}
}

// userOf gives the user at the other end of a loopback connection.
func userOf(c net.Conn) (uint64, error) {
	far, err := netip.ParseAddrPort(c.RemoteAddr().String())
	if err != nil {
		return 0, err
	}
	near, err := netip.ParseAddrPort(c.LocalAddr().String())
	if err != nil {
		return 0, err
	}
	// Programs may dial an IPv4 address with an IPv6 socket, as gRPC does; the kernel has those in the other table.
	var uid uint64
	for _, table := range []string{"tcp", "tcp6"} {
		if uid, err = userIn("/proc/thread-self/net/"+table, far, near); err == nil {
			return uid, nil
		}
	}
	return 0, err
}

func userIn(table string, local, remote netip.AddrPort) (uint64, error) {
	f, err := os.Open(table)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return findUser(f, local, remote)
}

// mapped begins an IPv4 address in the table of IPv6 sockets (RFC 4291, 2.5.5.2), in the machine's byte order by words of 32 bits.
var mapped = func() string {
	var word [4]byte
	binary.NativeEndian.PutUint32(word[:], 0x0000ffff)
	return "0000000000000000" + strings.ToUpper(hex.EncodeToString(word[:]))
}()

// findUser looks for the socket with the given ends in a table like /proc/net/tcp.
func findUser(table io.Reader, local, remote netip.AddrPort) (uint64, error) {
	s := bufio.NewScanner(table)
	for s.Scan() {
		f := strings.Fields(s.Text())
		if len(f) < 8 || strings.TrimPrefix(f[1], mapped) != tableForm(local) || strings.TrimPrefix(f[2], mapped) != tableForm(remote) {
			continue
		}
		return strconv.ParseUint(f[7], 10, 32)
	}
	if err := s.Err(); err != nil {
		return 0, err
	}
	return 0, fmt.Errorf("the connection from %s is not known to the kernel", local)
}

// tableForm writes an IPv4 address and port as the kernel's table does: the address in the machine's byte order.
func tableForm(a netip.AddrPort) string {
	ip := a.Addr().Unmap().As4()
	var host [4]byte
	binary.NativeEndian.PutUint32(host[:], binary.BigEndian.Uint32(ip[:]))
	return strings.ToUpper(hex.EncodeToString(host[:])) + fmt.Sprintf(":%04X", a.Port())
}
