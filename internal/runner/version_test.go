package runner

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/compat"
	"github.com/pergolafl/pergola/internal/problem"
)

// A hub or agent that was upgraded finds runners of other ages: one with which it has a version in common goes on and is led to its end;
// one with which it has none is ended, with nothing left, and both are named.
func TestRunnersOfOtherAges(t *testing.T) {
	for name, c := range map[string]struct {
		speaks string // in runner.json; "" = nothing
		want   string // of the end; "" = as any other
	}{
		"an older one, that says nothing":         {"", ""},
		"an older one":                            {`{"min":1,"max":1}`, ""},
		"a newer one that knows this version":     {`{"min":1,"max":8}`, ""},
		"one that is too new":                     {`{"min":7,"max":8}`, "the runner (pergola v9.9.9) versions 7 to 8"},
		"one of which nobody knows what it means": {`{"min":0,"max":-1}`, "the runner (pergola v9.9.9)"},
	} {
		t.Run(name, func(t *testing.T) {
			dir, spec, pidFile := party(t)
			h := start(t, dir, spec)
			child := asked(t, pidFile)
			h.Release()
			path := filepath.Join(dir, runnerFile)
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			var id map[string]any
			if err := json.Unmarshal(b, &id); err != nil {
				t.Fatal(err)
			}
			id["build"], id["a field of later"] = "v9.9.9", []int{1}
			delete(id, "speaks")
			if c.speaks != "" {
				id["speaks"] = json.RawMessage(c.speaks)
			}
			if err := writeFile(path, id); err != nil {
				t.Fatal(err)
			}
			found, err := Attach(dir)
			if err != nil {
				t.Fatal(err)
			}
			want := NewWant()
			want.Set(pb.Desired_DESIRED_STOP, 0)
			k := &told{t: t}
			err = found.Keep(within(t), 0, spec.Mark, want, k.add)
			if c.want == "" {
				if err != nil || k.states() != "preparing, done" {
					t.Errorf("%v, %s", err, k.states())
				}
			} else if !errors.Is(err, ErrDied) || problem.CodeOf(err) != problem.Version || !strings.Contains(err.Error(), c.want) || !strings.Contains(HowDied(err), "too different") {
				t.Errorf("%v; it %s", err, HowDied(err))
			}
			gone(t, h.Pid())
			gone(t, child)
		})
	}
}

// A binary that was replaced may be a runner that is too new for its starter: it says so in its log, and does nothing.
func TestStartersOfOtherAges(t *testing.T) {
	dir, spec, _ := party(t)
	spec.Starter = compat.Range{Min: 8, Max: 9}
	if err := writeFile(filepath.Join(dir, specFile), spec); err != nil {
		t.Fatal(err)
	}
	err := Main(context.Background(), dir, slog.New(slog.DiscardHandler))
	if problem.CodeOf(err) != problem.Version || !strings.Contains(err.Error(), "its starter versions 8 to 9") {
		t.Errorf("%v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, runnerFile)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it began all the same: %v", err)
	}
}
