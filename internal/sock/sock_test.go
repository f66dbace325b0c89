package sock

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestLongPath(t *testing.T) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("deep/", 60))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "c.sock")
	for range 2 { // the second time over the stale socket of a process that was killed
		ln, err := Listen(path)
		if err != nil {
			t.Fatal(err)
		}
		c, err := Dial(t.Context(), path)
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
		if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
			t.Errorf("socket: %v %v, want mode 0600", fi, err)
		}
		l, ok := ln.(*listener)
		if !ok {
			t.Fatalf("a %T", ln)
		}
		l.Listener.Close()
	}
	ln, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	ln.Close()
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("the socket is still there: %v", err)
	}
	if _, err := Dial(t.Context(), path); err == nil {
		t.Error("dialled a socket that is gone")
	}
}
