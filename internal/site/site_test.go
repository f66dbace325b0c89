package site

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/pergolafl/pergola/internal/config"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/pki/pkitest"
	"github.com/pergolafl/pergola/internal/problem"
)

func TestHubsOfTheConfiguration(t *testing.T) {
	for text, want := range map[string][]string{
		`hub = "a:1"`:                {"a:1"},
		`hub = ["a:1", "[::1]:2"]`:   {"a:1", "[::1]:2"},
		`hub = ""`:                   nil,
		`hub = []`:                   nil,
		`hub = 1`:                    nil,
		`hub = ["a:1", 1]`:           nil,
		`name = "st-anna"`:           nil,
		`hub = {host = "a"}`:         nil,
		"hub = [\"a:1\",\n\"b:1\",]": {"a:1", "b:1"},
	} {
		var c Config
		err := config.Parse([]byte(text), "site.toml", &c)
		var got []string
		if err == nil {
			got, err = c.hubs("site.toml")
		}
		if !slices.Equal(got, want) || (err == nil) != (want != nil) {
			t.Errorf("%s gave %q, %v; want %q", text, got, err, want)
		}
		if err != nil && (problem.CodeOf(err) != problem.Usage || !strings.Contains(err.Error(), "site.toml")) {
			t.Errorf("%s gave %v", text, err)
		}
	}
}

// What is wrong with the way to the hub is said at the start, with the file, and without a proxy's password.
func TestOpenSaysWhatIsWrong(t *testing.T) {
	auth := pkitest.Authority(t, "here")
	pair := pkitest.Keypair(t, auth, pki.Identity{Kind: pki.KindSite, Name: "st-anna"})
	for text, want := range map[string]string{
		`hub = "hub.test:8443"`: "",
		`hub = ["a:1", "b:1"]` + "\nproxy = \"http://u:secret@p:3128\"": "",
		`hub = "hub.test:8443"` + "\nproxy = \"direct\"":                "",
		`hub = "2001:db8:::1"`: "brackets",
		`hub = ["a:443", "a"]`: "twice",
		`hub = "a:1"` + "\nproxy = \"gopher://u:secret@p:3128\"":          "unknown kind",
		`hub = "a:1"` + "\nproxy = \"http://u:secret%qq@p:3128\"":         "cannot be read",
		`hub = "a:1"` + "\nprxy = \"http://u:secret@p:3128\"":             `did you mean "proxy"`,
		`hub = "a:1"` + "\nproxy = [\"http://u:secret@p:3128\"]":          "line 3",
		`hub = "a:1"` + "\nproxy = \"http://u:secret@p:3128\nname = \"\"": "",
	} {
		dir := t.TempDir()
		if err := pki.SaveKeypair(dir, "site", pair); err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(dir, ConfigFile)
		if err := os.WriteFile(file, []byte("name = \"st-anna\"\n"+text+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := Open(dir, nil)
		broken := strings.Contains(text, "3128\nname") || want == "line 3"
		if (err != nil) != (want != "" || broken) {
			t.Errorf("%s gave %v", text, err)
			continue
		}
		if err == nil {
			continue
		}
		if !broken && !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), file) || problem.CodeOf(err) != problem.Usage || strings.Contains(fmt.Sprintf("%v %+v", err, err), "secret") {
			t.Errorf("%s gave %v", text, err)
		}
	}
}
