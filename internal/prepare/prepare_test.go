package prepare

import (
	"strings"
	"testing"

	"github.com/pergolafl/pergola/internal/job"
)

func TestJobName(t *testing.T) {
	for app, want := range map[string]string{
		"tiny": "tiny", "My_App": "my-app", "--": "app", "": "app", "Größe 1": "gr--e-1",
		strings.Repeat("a", 39) + "_b": strings.Repeat("a", 39),
	} {
		got := JobName(app)
		if got != want {
			t.Errorf("JobName(%q) = %q, want %q", app, got, want)
		}
		if err := job.CheckName("job", got); err != nil {
			t.Errorf("JobName(%q) is no name: %v", app, err)
		}
	}
}
