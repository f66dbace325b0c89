package problem

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
)

func TestNearest(t *testing.T) {
	known := []string{"deadline", "engine", "sites", "min-sites", "outage-tolerance"}
	for name, want := range map[string]string{
		"dedline": "deadline", "enigne": "engine", "Sites": "sites", "zzz": "", "outage": "outage-tolerance", "": "", "x": "",
	} {
		if got := Nearest(name, known); got != want {
			t.Errorf("Nearest(%q) = %q, want %q", name, got, want)
		}
	}
}

func TestFromFindsWrappedProblem(t *testing.T) {
	p := New(DiskFull, "make room", "no space in %s", "/x")
	if got := From(fmt.Errorf("run: %w", p)); got != p {
		t.Errorf("From = %v, want the wrapped problem", got)
	}
	if got := From(errors.New("boom")); got.Code != Internal || !strings.Contains(got.Error(), "boom") {
		t.Errorf("a foreign error became %v", got)
	}
	if Exit(nil) != 0 || Exit(p) != ExitFailed || Exit(New(Usage, "", "x")) != ExitUsage || Exit(errors.New("x")) != ExitFailed {
		t.Error("exit statuses do not follow the table")
	}
}

// Every constant of this package is in the table, and nothing else is.
func TestTableHasEveryCode(t *testing.T) {
	src, err := os.ReadFile("problem.go")
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile(`Code += "([a-z-]+)"`).FindAllSubmatch(src, -1)
	if len(found) != len(Codes) {
		t.Errorf("%d constants, %d rows in the table", len(found), len(Codes))
	}
	for _, f := range found {
		if m, ok := Codes[Code(f[1])]; !ok || m.HTTP == 0 {
			t.Errorf("no row for %s", f[1])
		}
	}
}

// What travels does not have the error below, unless it is told.
func TestTold(t *testing.T) {
	in := Wrap(errors.New("permission denied"), AppInvalid, "look", "/x cannot be read")
	for want, p := range map[string]*Error{"/x cannot be read": in, "/x cannot be read: permission denied": in.Told()} {
		b, err := json.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		var out Error
		if err := json.Unmarshal(b, &out); err != nil || out.Msg != want || out.Code != AppInvalid {
			t.Errorf("%s gave %q, %v; want %q", b, out.Msg, err, want)
		}
	}
}
