package e2e

import (
	"bytes"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/test/chaos"
)

// The sites reach the hub through a proxy that wants a password. It is killed in the middle of a round and comes back: the job
// succeeds, the outage is told, and the password is nowhere in what the run leaves.
func TestThroughAProxyThatRestarts(t *testing.T) {
	t.Parallel()
	const password = "s3cret@pass"
	p := &chaos.Proxy{User: "anna", Password: password}
	addr, err := p.Start(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Stop)
	u := url.URL{Scheme: "http", User: url.UserPassword(p.User, password), Host: addr}
	r := start(t, spec{app: "slow", args: []string{"--flwr", oldest, "--site-proxy", u.String(), "--run-config", "sleep=3.0"}})
	r.round(1)
	p.Stop()
	time.Sleep(1500 * time.Millisecond) // the outage
	if _, err := p.Start(t.Context(), addr); err != nil {
		t.Fatal(err)
	}
	res := r.end()
	if res.Summary.State != job.Succeeded || len(res.Summary.Rounds) == 0 || len(res.Summary.Failures) > 0 {
		t.Errorf("the run ended %s, with the rounds %+v and the failures %+v", causeText(res.Summary), res.Summary.Rounds, res.Summary.Failures)
	}
	all := strings.Join(res.Summary.Warnings, "\n")
	for _, site := range []string{"site-1", "site-2"} {
		if !strings.Contains(all, "site "+site+" was unreachable for ") {
			t.Errorf("the outage of %s was not told:\n%s", site, all)
		}
		if l := res.Summary.Link[site]; l.Cuts < 1 || l.Resumes != l.Cuts || l.DownSeconds < 1 {
			t.Errorf("the link of %s has the counters %+v", site, l)
		}
	}
	if n := len(p.Asked()); n < 8 { // two agents and two links, each twice
		t.Errorf("the proxy was asked for %d connections: not everything goes through it", n)
	}
	if err := filepath.WalkDir(res.Out, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		for _, secret := range []string{password, url.QueryEscape(password)} {
			if bytes.Contains(b, []byte(secret)) {
				t.Errorf("%s has the proxy's password", path)
			}
		}
		return err
	}); err != nil {
		t.Error(err)
	}
}
