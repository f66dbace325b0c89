package flower

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pergolafl/pergola/internal/problem"
)

// What a run would need later is missed before anything starts, and the hint names the interpreter.
func TestCheck(t *testing.T) {
	for _, c := range []struct {
		name      string
		gen       Generation
		hub, flwr bool
		lost      string
		want      bool // it is missed
	}{
		{"the server app's program, 1.12", GenDriver, true, false, "flower-server-app", true},
		{"no matter for a site, 1.12", GenDriver, false, false, "flower-server-app", false},
		{"the server app's program", GenControl, true, false, "flwr-serverapp", true},
		{"the client app's program", GenHTTP, false, false, "flwr-clientapp", true},
		{"flwr where arguments need it", GenHTTP, true, true, "flwr", true},
		{"flwr where nothing needs it", GenHTTP, true, false, "flwr", false},
	} {
		for _, how := range []string{"is not installed: there is no ", "is not an executable file"} {
			bin := t.TempDir()
			for _, name := range []string{"flower-server-app", "flwr-serverapp", "flwr-clientapp", "flwr"} {
				mode := os.FileMode(0o755)
				if name == c.lost {
					if mode = 0o644; how != "is not an executable file" {
						continue
					}
				}
				if err := os.WriteFile(filepath.Join(bin, name), nil, mode); err != nil {
					t.Fatal(err)
				}
			}
			err := (&Installation{Version: "1.41.0", Bin: bin, Caps: Caps{Generation: c.gen}}).Check(c.hub, c.flwr)
			if !c.want && err != nil {
				t.Errorf("%s: %v", c.name, err)
			}
			hint := filepath.Join(bin, "python3") + " -m pip install --force-reinstall flwr==1.41.0"
			if c.want && (problem.CodeOf(err) != problem.ProgramFailed || !strings.Contains(err.Error(), how) || !strings.Contains(err.Error(), hint)) {
				t.Errorf("%s: %v, want %q and %q", c.name, err, how, hint)
			}
		}
	}
}
