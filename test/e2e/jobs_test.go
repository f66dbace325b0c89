package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/client"
	"github.com/pergolafl/pergola/internal/config"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/pki"
)

// user is somebody with a context for a hub, at a command line.
type user struct {
	t   *testing.T
	dir string // HOME's configuration, and where commands run
}

func (f *fleetOf) user(t *testing.T, name string) *user {
	t.Helper()
	u := &user{t: t, dir: t.TempDir()}
	ctx := filepath.Join(u.dir, "pergola", "contexts", "test")
	k, err := f.auth.NewKeypair(pki.Identity{Kind: pki.KindUser, Name: name}, nil, time.Hour)
	if err == nil {
		err = os.MkdirAll(ctx, 0o700)
	}
	if err == nil {
		err = pki.SaveKeypair(ctx, "user", k)
	}
	if err == nil {
		err = config.Write(filepath.Join(ctx, client.File), client.Context{Hubs: f.addrs, User: name})
	}
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func (u *user) command(args ...string) *exec.Cmd {
	c := exec.CommandContext(u.t.Context(), binary, args...)
	c.Dir = u.dir
	c.Env = append(os.Environ(), "XDG_CONFIG_HOME="+u.dir)
	return c
}

// does runs a command that has to end with a status, and gives what it printed.
func (u *user) does(status int, args ...string) (stdout, stderr string) {
	u.t.Helper()
	c := u.command(args...)
	var out, diag bytes.Buffer
	c.Stdout, c.Stderr = &out, &diag
	err := c.Run()
	code := 0
	if e, ok := errors.AsType[*exec.ExitError](err); ok {
		code = e.ExitCode()
	} else if err != nil {
		u.t.Fatal(err)
	}
	if code != status {
		u.t.Fatalf("pergola %s: status %d, want %d\n%s%s", strings.Join(args, " "), code, status, out.String(), diag.String())
	}
	return out.String(), diag.String()
}

// A job's whole life by the commands that a researcher has, at a hub that is killed and started again while the job is followed.
func TestJobsByCommand(t *testing.T) {
	t.Parallel()
	slots <- struct{}{}
	defer func() { <-slots }()
	f := daemons(t, "site-1", "site-2")
	f.hub.start()
	for _, s := range f.sites {
		s.start()
	}
	for _, err := f.client.Jobs.ListSites(t.Context(), &pb.ListSitesRequest{}); err != nil; _, err = f.client.Jobs.ListSites(t.Context(), &pb.ListSitesRequest{}) {
		time.Sleep(20 * time.Millisecond) // until the hub listens
		if t.Context().Err() != nil {
			t.Fatal(err)
		}
	}
	u := f.user(t, "anna")
	app, err := filepath.Abs("../apps/tiny")
	if err != nil {
		t.Fatal(err)
	}

	// What is wrong is said before anything is submitted.
	if _, diag := u.does(1, "submit", app, "--sites", "site-1,site-3"); !strings.Contains(diag, `no site is named "site-3"`) {
		t.Errorf("an unknown site: %s", diag)
	}
	if out, diag := u.does(0, "jobs"); out != "" || !strings.Contains(diag, "no jobs") {
		t.Errorf("nothing was submitted: %s%s", out, diag)
	}
	for _, args := range [][]string{{"show", "01"}, {"logs", "01"}, {"events", "01"}, {"abort", "01"}, {"resubmit", "01"}, {"rm", "01"}, {"download", "01"}} {
		if _, diag := u.does(1, args...); !strings.Contains(diag, "there is no job 01") {
			t.Errorf("%v of no job: %s", args, diag)
		}
	}

	out, _ := u.does(0, "submit", app, "--engine", "flower", "--flwr", oldest, "--key", "once", "--json")
	var j struct {
		ID    string `json:"id"`
		State string `json:"state"`
	}
	if err := json.Unmarshal([]byte(out), &j); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	f.jobs = append(f.jobs, job.ID(j.ID))
	if out, _ := u.does(0, "submit", app, "--engine", "flower", "--flwr", oldest, "--key", "once"); strings.TrimSpace(out) != j.ID {
		t.Errorf("the same key gave another job: %s, %s", out, j.ID)
	}

	// Both followers go on when the hub was killed, and miss nothing.
	logs, events := u.command("logs", j.ID, "--follow", "--json"), u.command("events", j.ID[:20], "--follow", "--json")
	var lines, told bytes.Buffer
	logs.Stdout, events.Stdout = &lines, &told
	for _, c := range []*exec.Cmd{logs, events} {
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
	}
	f.watch(t, job.ID(j.ID), 0, func(e job.Event) bool { return e.Kind == job.KindRound })
	f.hub.kill()
	f.hub.start()
	for _, c := range []*exec.Cmd{logs, events} {
		if err := c.Wait(); err != nil {
			t.Errorf("%v: %v", c.Args, err)
		}
	}
	if again, _ := u.does(0, "logs", j.ID, "--json"); !sameLines(again, lines.String()) {
		t.Errorf("what was followed is not what there is:\n%s\n---\n%s", lines.String(), again)
	}
	if again, _ := u.does(0, "events", j.ID, "--json"); again != told.String() {
		t.Errorf("what was followed is not what there is:\n%s\n---\n%s", told.String(), again)
	}
	if out, _ := u.does(0, "logs", j.ID, "--party", "site-2"); !strings.Contains(out, "[FLWR-CA@site-2]") || strings.Contains(out, "@hub]") {
		t.Errorf("the logs of one party: %.400s", out)
	}
	if out, _ := u.does(0, "show", j.ID[:22]); !strings.Contains(out, "succeeded") || !strings.Contains(out, "site-2") {
		t.Errorf("show: %s", out)
	}
	if out, _ := u.does(0, "jobs", "--state", "succeeded"); !strings.Contains(out, j.ID) {
		t.Errorf("jobs: %s", out)
	}

	// Its files, once whole and once more with a part there already.
	u.does(0, "download", j.ID, "--out", "got")
	first := files(t, filepath.Join(u.dir, "got"))
	if len(first["results/metrics.csv"])+len(first["logs/hub/server_app_log.txt"]) == 0 {
		t.Errorf("downloaded: %v", keysOf(first))
	}
	spoilt := filepath.Join(u.dir, "got", "logs", "hub", "superlink_log.txt")
	whole := first["logs/hub/superlink_log.txt"]
	if err := errors.Join(os.Remove(spoilt), os.WriteFile(spoilt+".part", []byte(whole[:len(whole)/2]), 0o600)); err != nil {
		t.Fatal(err)
	}
	u.does(0, "download", j.ID, "--out", "got")
	if got := files(t, filepath.Join(u.dir, "got")); len(got) != len(first) || got["logs/hub/superlink_log.txt"] != whole {
		t.Errorf("a download that was cut short is not completed: %v", keysOf(got))
	}

	// Again, until its end, and once more, which is aborted.
	out, diag := u.does(0, "submit", app, "--engine", "flower", "--flwr", oldest, "--wait")
	if !strings.Contains(out, "succeeded") || !strings.Contains(diag, "round 2") {
		t.Errorf("submit --wait: %s\n%s", out, diag)
	}
	second, _ := u.does(0, "resubmit", j.ID)
	second = strings.TrimSpace(second)
	f.jobs = append(f.jobs, job.ID(second))
	if _, diag := u.does(2, "rm", second); !strings.Contains(diag, "pergola abort") {
		t.Errorf("rm of a job that runs: %s", diag)
	}
	u.does(0, "abort", second)
	u.does(0, "abort", second)
	f.watch(t, job.ID(second), 0, func(e job.Event) bool {
		var s job.JobState
		return e.Kind == job.KindJobState && e.Decode(&s) == nil && s.To == job.Aborted
	})
	u.does(0, "rm", second, j.ID)
	if _, diag := u.does(1, "show", j.ID); !strings.Contains(diag, "there is no job") {
		t.Errorf("a job that was removed: %s", diag)
	}
	if _, err := os.Stat(filepath.Join(f.hub.dir, "jobs", j.ID)); !os.IsNotExist(err) {
		t.Errorf("the files of a job that was removed: %v", err)
	}
}

// sameLines tells whether two outputs have the same lines; those of different files come in any order.
func sameLines(a, b string) bool {
	count := map[string]int{}
	for l := range strings.Lines(a) {
		count[l]++
	}
	for l := range strings.Lines(b) {
		count[l]--
	}
	for _, n := range count {
		if n != 0 {
			return false
		}
	}
	return true
}

func files(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	err := filepath.WalkDir(dir, func(p string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(p)
		rel, e := filepath.Rel(dir, p)
		out[filepath.ToSlash(rel)] = string(b)
		return errors.Join(err, e)
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func keysOf(m map[string]string) []string {
	var out []string
	for k := range m {
		out = append(out, k)
	}
	return out
}
