package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/config"
	"github.com/pergolafl/pergola/internal/hub"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/proc"
)

// operated is a hub with sites where tokens can be made.
func operated(t *testing.T, names ...string) (*fleetOf, *user) {
	t.Helper()
	f := daemons(t, names...)
	if err := config.Write(filepath.Join(f.hub.dir, hub.ConfigFile), hub.Config{Listen: f.addrs[0], Addresses: f.addrs[:1], Sites: names, Mark: f.mark}); err != nil {
		t.Fatal(err)
	}
	return f, f.user(t, "anna")
}

func (f *fleetOf) token(u *user, kind, name string) string {
	u.t.Helper()
	out, _ := u.does(0, "hub", "token", kind, name, "--dir", f.hub.dir)
	return strings.TrimSpace(out)
}

// listens waits until the hub answers.
func (f *fleetOf) listens(t *testing.T) {
	t.Helper()
	for began := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		if _, err := f.client.Jobs.ListSites(t.Context(), &pb.ListSitesRequest{}); err == nil {
			return
		} else if time.Since(began) > limit {
			t.Fatal(err)
		}
	}
}

// ends waits until a daemon has ended by itself, and gives its exit status.
func (s *daemon) ends() int {
	s.t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.cmd.Wait() // the status says it
	}()
	select {
	case <-done:
	case <-time.After(limit):
		s.t.Fatalf("%s goes on", s.dir)
	}
	code := s.cmd.ProcessState.ExitCode()
	s.cmd = nil
	return code
}

// until waits for a condition.
func until(t *testing.T, what string, is func() bool) {
	t.Helper()
	for began := time.Now(); !is(); time.Sleep(50 * time.Millisecond) {
		if time.Since(began) > limit {
			t.Fatalf("%s does not come", what)
		}
	}
}

// In the middle of a round one site enrols again, and its part goes on with the new certificate; another one is removed: its part ends with
// its cause, nothing of it is left there, its agent says why it ends, and the job goes on with the others and ends well.
func TestSiteIsRemoved(t *testing.T) {
	t.Parallel()
	slots <- struct{}{}
	defer func() { <-slots }()
	f, anna := operated(t, "site-1", "site-2", "site-3")
	f.hub.start()
	for _, s := range f.sites {
		s.start()
	}
	id := f.submit(t, "slow", job.Spec{Engine: "flower", Sites: []string{"site-1", "site-2", "site-3"}, MinSites: 2, Flwr: oldest, RunConfig: []string{"num-server-rounds=2", "sleep=2"}})
	last, ready := job.State(""), 0
	states := map[string]job.PartyStateChange{}
	var resumed bool
	take := func(e job.Event) {
		var s job.JobState
		var p job.PartyStateChange
		var l job.Link
		switch {
		case e.Kind == job.KindJobState && e.Decode(&s) == nil:
			last = s.To
		case e.Kind == job.KindPartyState && e.Decode(&p) == nil:
			states[e.Party] = p
			if p.To == job.PartyReady {
				ready++
			}
		case e.Kind == job.KindLink && e.Decode(&l) == nil:
			resumed = resumed || l.Site == "site-1" && l.Resumes > 0
		}
	}
	after := f.watch(t, id, 0, func(e job.Event) bool {
		take(e)
		return last == job.Running && ready == 4 || last.Terminal()
	})

	// Enrolled again in the same directory, while agent and runner go on.
	old, err := pki.LoadKeypair(f.sites[0].dir, "site")
	if err != nil {
		t.Fatal(err)
	}
	anna.does(0, "site", "join", f.token(anna, "site", "site-1"), "--dir", f.sites[0].dir)
	party := filepath.Join(f.sites[0].dir, "jobs", string(id), "party")
	until(t, "the new certificate of site-1's link", func() bool {
		k, err := pki.LoadKeypair(party, "party")
		if err != nil {
			return false
		}
		c, err := k.Certificate()
		return err == nil && !pki.Enrolled(c.Leaf).IsZero()
	})

	began := time.Now()
	out, diag := anna.does(0, "site", "rm", "site-3", "--json")
	var gone struct {
		Kind, Name, Removed string
		Jobs                []string
	}
	if err := json.Unmarshal([]byte(out), &gone); err != nil || gone.Name != "site-3" || len(gone.Jobs) != 1 || gone.Jobs[0] != string(id) {
		t.Errorf("%v: %s%s", err, out, diag)
	}
	returned := time.Since(began)
	after = f.watch(t, id, after, func(e job.Event) bool {
		take(e)
		return states["site-3"].To.Terminal() || last.Terminal()
	})
	failed := time.Since(began)
	if c := f.sites[2].ends(); c != 1 {
		t.Errorf("the removed site's agent ended with status %d", c)
	}
	left := time.Since(began)
	t.Logf("after the command was begun: it returned after %v, the part had failed after %v, all of the site had ended after %v", returned, failed, left)
	if n, err := proc.KillMarked(fmt.Sprintf("%s-%s-site-3", f.mark, id)); err != nil || n > 0 {
		t.Errorf("%d programs of the removed site were left; %v", n, err)
	}
	if text := f.sites[2].text(); !strings.Contains(text, "site-3 was removed from the hub") || !strings.Contains(text, "pergola site join TOKEN --dir "+f.sites[2].dir) {
		t.Errorf("its agent said:\n%s", text)
	}
	f.sites[2].start() // as a service manager does
	if c := f.sites[2].ends(); c != 1 {
		t.Errorf("started again it ended with status %d", c)
	}
	f.watch(t, id, after, func(e job.Event) bool {
		take(e)
		return last.Terminal()
	})
	if last != job.Succeeded || states["site-3"].Cause == nil || states["site-3"].Cause.Code != "removed" || states["site-1"].To != job.PartyDone {
		t.Errorf("the job %s, parties %+v", last, states)
	}
	if !resumed {
		t.Error("the link of the site that enrolled again was not resumed")
	}
	if list, _ := anna.does(0, "sites", "--all"); !strings.Contains(list, "site-3") || !strings.Contains(list, "removed") {
		t.Errorf("all sites:\n%s", list)
	}
	if list, _ := anna.does(0, "sites"); strings.Contains(list, "site-3") {
		t.Errorf("sites:\n%s", list)
	}
	if _, diag := anna.does(1, "site", "rm", "site-4"); !strings.Contains(diag, `no site is named "site-4"; did you mean`) {
		t.Errorf("an unknown site: %s", diag)
	}
	now, err := pki.LoadKeypair(f.sites[0].dir, "site")
	if err != nil || string(now.CertPEM) == string(old.CertPEM) {
		t.Errorf("site-1 has its old certificate, %v", err)
	}
}

// Certificates renew by themselves; what one finds whose certificate is over says what to do, and doing it helps.
func TestCertificatesRenew(t *testing.T) {
	t.Parallel()
	f, anna := operated(t, "site-1", "site-2")
	issue := func(dir, name string, id pki.Identity, ttl time.Duration) {
		t.Helper()
		k, err := f.auth.NewKeypair(id, nil, ttl)
		if err == nil {
			err = pki.SaveKeypair(dir, name, k)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	end := func(dir, name string) time.Time {
		t.Helper()
		k, err := pki.LoadKeypair(dir, name)
		if err != nil {
			t.Fatal(err)
		}
		c, err := k.Certificate()
		if err != nil {
			t.Fatal(err)
		}
		return c.Leaf.NotAfter
	}
	f.hub.start()
	f.listens(t)
	late := f.user(t, "late")
	lateDir := filepath.Join(late.dir, "pergola", "contexts", "test")
	issue(lateDir, "user", pki.Identity{Kind: pki.KindUser, Name: "late"}, time.Second)
	issue(f.sites[1].dir, "site", pki.Identity{Kind: pki.KindSite, Name: "site-2"}, time.Second)
	issue(f.sites[0].dir, "site", pki.Identity{Kind: pki.KindSite, Name: "site-1"}, 18*time.Second)
	f.sites[0].start()
	annaDir := filepath.Join(anna.dir, "pergola", "contexts", "test")
	issue(annaDir, "user", pki.Identity{Kind: pki.KindUser, Name: "anna"}, 45*time.Second) // the last third is for one command

	// Over: the agent ends and says what to do; that helps, and what the site has stays.
	until(t, "the end of site-2's certificate", func() bool { return time.Now().After(end(f.sites[1].dir, "site")) })
	f.sites[1].start()
	if c := f.sites[1].ends(); c != 1 {
		t.Errorf("the agent ended with status %d", c)
	}
	if text := f.sites[1].text(); !strings.Contains(text, "the certificate of site site-2 was good until") || !strings.Contains(text, "pergola hub token site site-2") {
		t.Errorf("its agent said:\n%s", text)
	}
	kept, err := os.ReadFile(filepath.Join(f.sites[1].dir, "site.toml"))
	if err != nil {
		t.Fatal(err)
	}
	anna.does(0, "site", "join", f.token(anna, "site", "site-2"), "--dir", f.sites[1].dir)
	if now, err := os.ReadFile(filepath.Join(f.sites[1].dir, "site.toml")); err != nil || string(now) != string(kept) {
		t.Errorf("site.toml is another one: %s, %v", now, err)
	}
	f.sites[1].start()
	_, diag := late.does(1, "jobs")
	if !strings.Contains(diag, "the certificate of user late was good until") || !strings.Contains(diag, "pergola login") {
		t.Errorf("a user whose certificate is over: %s", diag)
	}
	if _, diag := late.does(2, "login", f.token(anna, "user", "other"), "--context", "test"); !strings.Contains(diag, "have a context test already") {
		t.Errorf("somebody else's token: %s", diag)
	}
	late.does(0, "login", f.token(anna, "user", "late"), "--context", "test")
	late.does(0, "jobs")

	until(t, "the time at which anna's certificate is due", func() bool {
		k, err := pki.LoadKeypair(annaDir, "user")
		if err != nil {
			t.Fatal(err)
		}
		c, err := k.Certificate()
		return err == nil && time.Now().After(pki.Due(c.Leaf))
	})
	anna.does(0, "sites", "--json")
	if e := end(annaDir, "user"); time.Until(e) < 29*24*time.Hour {
		t.Errorf("a command in the last third left a certificate that is good until %v", e)
	}
	until(t, "the renewal of site-1's certificate", func() bool { return time.Until(end(f.sites[0].dir, "site")) > 29*24*time.Hour })
	until(t, "both sites", func() bool {
		res, err := f.client.Jobs.ListSites(t.Context(), &pb.ListSitesRequest{})
		return err == nil && len(res.GetSites()) == 2 && res.GetSites()[0].GetConnected() && res.GetSites()[1].GetConnected()
	})
	if out, _ := anna.does(0, "user", "ls"); !strings.Contains(out, "anna") || !strings.Contains(out, "late") {
		t.Errorf("users:\n%s", out)
	}
	anna.does(0, "user", "rm", "late")
	if _, diag := late.does(1, "jobs"); !strings.Contains(diag, "user late was removed from the hub") {
		t.Errorf("a user who was removed: %s", diag)
	}
}
