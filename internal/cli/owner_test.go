package cli

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

// What root writes into a service's directory is the service's; the rest stays whose it is.
func TestKeepOwner(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root gives files away")
	}
	const uid = 54321
	dir := t.TempDir()
	elsewhere := filepath.Join(t.TempDir(), "root's")
	for _, p := range []string{filepath.Join(dir, "site.key"), elsewhere} {
		if err := os.WriteFile(p, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Link(elsewhere, filepath.Join(dir, "linked")); err != nil {
		t.Fatal(err)
	}
	owner := func(p string) int {
		info, err := os.Lstat(p)
		if err != nil {
			t.Fatal(err)
		}
		st, ok := info.Sys().(*syscall.Stat_t)
		if !ok {
			t.Fatal("no owner is to be had")
		}
		return int(st.Uid)
	}
	if err := keepOwner(dir); err != nil || owner(filepath.Join(dir, "site.key")) != 0 {
		t.Errorf("in root's own directory: %v, owner %d", err, owner(filepath.Join(dir, "site.key")))
	}
	if err := os.Chown(dir, uid, uid); err != nil {
		t.Fatal(err)
	}
	if err := keepOwner(dir); err != nil {
		t.Fatal(err)
	}
	if owner(filepath.Join(dir, "site.key")) != uid || owner(elsewhere) != 0 {
		t.Errorf("owners: %d, %d", owner(filepath.Join(dir, "site.key")), owner(elsewhere))
	}
}
