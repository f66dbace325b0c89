package cli

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pergolafl/pergola/internal/enrol"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/pki/pkitest"
	"github.com/pergolafl/pergola/internal/problem"
)

// A directory of a site goes on with its hub: what would leave it between two is refused before the token is used up.
func TestJoinInADirectoryThatIsThere(t *testing.T) {
	mine, other := pkitest.Authority(t, "test"), pkitest.Authority(t, "test")
	const name, old, fresh = "st-anna", "127.0.0.1:1", "127.0.0.2:1" // where nobody listens
	for _, c := range []struct {
		what      string
		authority *pki.Authority
		hubs      []string
		joined    bool // the directory has a certificate
		want      problem.Code
	}{
		{"its own hub", mine, []string{old}, true, problem.HubUnreachable},
		{"its own hub, which has moved", mine, []string{fresh}, true, problem.HubUnreachable},
		{"a hub made anew in its place", other, []string{fresh, old}, true, problem.HubUnreachable},
		{"another hub", other, []string{fresh}, true, problem.Usage},
		{"a site.toml that was there first", other, []string{fresh}, false, problem.HubUnreachable},
	} {
		t.Run(c.what, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, "site.toml"), []byte("name = \""+name+"\"\nhub = \""+old+"\"\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			if c.joined {
				k, err := mine.NewKeypair(pki.Identity{Kind: pki.KindSite, Name: name}, nil, time.Hour)
				if err == nil {
					err = pki.SaveKeypair(dir, "site", k)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			tok := enrol.Token{Kind: pki.KindSite, Name: name, Hubs: c.hubs, CA: c.authority.Fingerprint(), Secret: enrol.NewSecret(), Expires: time.Now().Add(time.Hour)}
			join := newSiteJoin(env{stdout: io.Discard, stderr: io.Discard})
			join.SetArgs([]string{tok.String(), "--dir", dir, "--proxy", "direct"})
			join.SilenceErrors, join.SilenceUsage = true, true
			err := join.ExecuteContext(t.Context())
			if problem.CodeOf(err) != c.want {
				t.Fatalf("%v, want %s", err, c.want)
			}
			if c.want == problem.Usage && !strings.Contains(problem.From(err).Next, `hub = ["`+fresh+`"]`) {
				t.Errorf("what to do is not said: %v", problem.From(err).Next)
			}
		})
	}
}
