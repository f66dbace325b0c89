// Package sock listens on and dials unix sockets whose paths may be longer than the kernel's 107 bytes:
// it goes through a descriptor of the folder, so a socket can lie in a job's directory however deep that is.
//
// It does not decide who may connect: the folder's mode does. Start with [Listen] and [Dial].
package sock

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
)

// Listen makes the socket, mode 0600, replacing a stale one. Closing the listener removes it.
func Listen(path string) (net.Listener, error) {
	if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
		return nil, err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	var lc net.ListenConfig
	ln, err := lc.Listen(context.Background(), "unix", short(dir, path))
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	// The name through the descriptor is gone after this function; the real one is removed by Close below.
	if u, ok := ln.(*net.UnixListener); ok {
		u.SetUnlinkOnClose(false)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, err
	}
	return &listener{ln, path}, nil
}

// Dial connects to the socket at path.
func Dial(ctx context.Context, path string) (net.Conn, error) {
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	var d net.Dialer
	return d.DialContext(ctx, "unix", short(dir, path))
}

func short(dir *os.File, path string) string {
	return fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), filepath.Base(path))
}

type listener struct {
	net.Listener
	path string
}

func (l *listener) Close() error {
	err := l.Listener.Close()
	if e := os.Remove(l.path); e != nil && !os.IsNotExist(e) && err == nil {
		err = e
	}
	return err
}
