package proc

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestSmoke(t *testing.T) {
	log := filepath.Join(t.TempDir(), "x.txt")
	p, err := Start(Spec{Args: []string{"/bin/sh", "-c", "echo a; echo b >&2; setsid sleep 100 & exit 3"}, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	if e := p.Exit(); e.Code != 3 {
		t.Errorf("exit %v", e)
	}
	b, _ := os.ReadFile(log)
	if string(b) != "a\nb\n" {
		t.Errorf("log %q", b)
	}
	p, err = Start(Spec{Args: []string{"/bin/sleep", "100"}})
	if err != nil {
		t.Fatal(err)
	}
	if e := p.Stop(time.Minute); e.Code != -15 {
		t.Errorf("exit %v", e)
	}
	o, err := Run(context.Background(), Spec{Args: []string{"/bin/sh", "-c", "head -c 300000 /dev/zero; echo e >&2"}})
	if err != nil || len(o.Stdout) != 300000 || o.Stderr != "e\n" || !o.Exit.OK() {
		t.Errorf("%d %q %v %v", len(o.Stdout), o.Stderr, o.Exit, err)
	}
}
