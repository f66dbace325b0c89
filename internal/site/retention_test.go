package site

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pergolafl/pergola/internal/job"
)

// What parts use stays, whether the agent knows them or only their folders tell; the rest goes by age, and the oldest by size.
func TestRetention(t *testing.T) {
	dir, now := t.TempDir(), time.Date(2026, 11, 27, 12, 0, 0, 0, time.UTC)
	const day = 24 * time.Hour
	hex := func(n int) string { return fmt.Sprintf("%064x", n) }
	put := func(age time.Duration, size int, path ...string) {
		t.Helper()
		p := filepath.Join(append([]string{dir}, path...)...)
		err := os.MkdirAll(filepath.Dir(p), 0o700)
		if err == nil {
			err = os.WriteFile(p, make([]byte, size), 0o600)
		}
		for ; err == nil && p != dir; p = filepath.Dir(p) {
			err = os.Chtimes(p, now.Add(-age), now.Add(-age))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for n, age := range map[int]time.Duration{1: 40 * day, 2: 40 * day, 3: 40 * day, 4: 20 * day, 5: 10 * day, 6: time.Minute} {
		put(age, 100<<10, "bundles", hex(n), "app.py")
		if err := os.Chtimes(filepath.Join(dir, "bundles", hex(n)), now.Add(-age), now.Add(-age)); err != nil {
			t.Fatal(err)
		}
	}
	put(2*day, 10, "bundles", hex(7)+".part")
	put(time.Minute, 10, "bundles", hex(8)+".part")
	put(0, 10, "bundles", gonePrefix+hex(9), "app.py")
	put(100*day, 10, RunnerLogs, "old.log")
	put(day, 10, RunnerLogs, "new.log")
	put(0, 0, "jobs", "x", "party", "y")
	if err := os.WriteFile(filepath.Join(dir, "jobs", "x", "party", "spec.json"), []byte(`{"bundle":"`+filepath.Join(dir, "bundles", hex(2))+`"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, n := range []string{"envs/" + strings.Repeat("a", 24), "envs/" + strings.Repeat("b", 24), "envs/other"} {
		put(200*day, 10, "cache", n, "pyvenv.cfg")
		if err := os.Chtimes(filepath.Join(dir, "cache", n), now.Add(-200*day), now.Add(-200*day)); err != nil {
			t.Fatal(err)
		}
	}
	k := &keeper{
		dir: dir, cache: filepath.Join(dir, "cache"), log: slog.New(slog.DiscardHandler), now: func() time.Time { return now },
		keep: Retention{RunnerLogs: job.Duration(30 * day), Environments: job.Duration(90 * day)},
		used: func() []string { return []string{"sha256:" + hex(1)} },
	}
	left := func() []string {
		t.Helper()
		var out []string
		for _, d := range []string{"bundles", RunnerLogs, "cache/envs"} {
			es, err := os.ReadDir(filepath.Join(dir, d))
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range es {
				if !strings.HasSuffix(e.Name(), ".lock") && !strings.HasSuffix(e.Name(), ".used") {
					out = append(out, strings.TrimLeft(e.Name(), "0"))
				}
			}
		}
		slices.Sort(out)
		return out
	}
	all := func() {
		t.Helper()
		todo, err := k.plan()
		if err != nil {
			t.Fatal(err)
		}
		done, err := k.removeAll(t.Context(), todo)
		if err != nil || len(done) != len(todo) {
			t.Fatalf("removed %v of %v: %v", done, todo, err)
		}
	}
	all()
	if d := cmp.Diff([]string{"1", "2", "4", "5", "6", "8.part", "new.log", "other"}, left()); d != "" {
		t.Errorf("by age (-want +got):\n%s", d)
	}
	k.keep.Size = 450 << 10
	all()
	if d := cmp.Diff([]string{"1", "2", "5", "6", "8.part", "new.log", "other"}, left()); d != "" {
		t.Errorf("within 450 KiB (-want +got):\n%s", d)
	}
	// One that is used between the plan and its execution stays.
	k.keep.Size = 1
	todo, err := k.plan()
	if err != nil || len(todo) != 1 {
		t.Fatalf("within 1 byte: %v, %v", todo, err)
	}
	a := &Agent{dir: dir}
	if has, err := a.useBundle(filepath.Join(dir, "bundles", hex(5))); !has || err != nil {
		t.Fatal(has, err)
	}
	k.now = time.Now
	if done, err := k.removeAll(t.Context(), todo); len(done) != 0 || err != nil {
		t.Errorf("removed %v, %v", done, err)
	}
	if has, err := a.useBundle(filepath.Join(dir, "bundles", hex(99))); has || err != nil {
		t.Errorf("a bundle that is not there: %v, %v", has, err)
	}
}
