package e2e

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/pergolafl/pergola/internal/job"
)

// An app that lies ready on the machine runs in place of the bundle's, which would raise. Up to 1.12 each party has its
// own; later the sites get the hub's through Flower.
func TestPredeployedApp(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		flwr, keys string
		parties    int // that say so
	}{
		{oldest, "[tool.pergola.server]\napp-path = \"ct/tiny\"\n[tool.pergola.site]\napp-path = \"ct/tiny\"\n", 3},
		{"1.30.0", "[tool.pergola.server]\napp-path = \"ct/tiny\"\n", 1},
	} {
		t.Run(c.flwr, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			ready, app := filepath.Join(dir, "ready"), filepath.Join(dir, "app")
			for from, to := range map[string]string{"tiny": filepath.Join(ready, "ct", "tiny"), "raise-server": app} {
				if err := os.CopyFS(to, os.DirFS(filepath.Join(apps, from))); err != nil {
					t.Fatal(err)
				}
			}
			if err := appendTo(filepath.Join(app, "pyproject.toml"), "\n"+c.keys); err != nil {
				t.Fatal(err)
			}
			r := start(t, spec{app: app, args: []string{"--flwr", c.flwr, "--apps", ready}})
			res := r.end()
			r.succeeded(res, c.flwr, 2)
			sameRounds(t, res.Summary.Rounds, tinyRounds)
			var told []string
			for _, e := range res.Events {
				if e.Kind == job.KindNote && strings.Contains(as[job.Text](t, e).Message, "runs the app tiny that lies ready there (ct/tiny)") {
					told = append(told, e.Party)
				}
			}
			if slices.Sort(told); len(told) != c.parties {
				t.Errorf("told of by %q, want %d parties", told, c.parties)
			}
		})
	}
}
