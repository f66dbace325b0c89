package e2e

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pergolafl/pergola/internal/enrol"
	"github.com/pergolafl/pergola/internal/pki"
)

// From nothing to a job at a hub with two sites and a user who is none of its operators, by commands alone.
func TestFromNothing(t *testing.T) {
	t.Parallel()
	slots <- struct{}{}
	defer func() { <-slots }()
	root := t.TempDir()
	operator, maria := &user{t: t, dir: filepath.Join(root, "operator")}, &user{t: t, dir: filepath.Join(root, "maria")}
	for _, u := range []*user{operator, maria} {
		if err := os.Mkdir(u.dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	addr := freeAddress(t)
	hubDir := filepath.Join(root, "hub")
	for args, want := range map[string]string{
		"hub init":                                      "needs an address",
		"hub init --address hub":                        `"hub" is not the HOST:PORT`,
		"hub init --address hub:0":                      "is not the HOST:PORT",
		"hub init --address hub:1 --listen 1":           "--listen",
		"hub init --address hub:1 --context -":          `"-" cannot be a name`,
		"hub init --address hub:1 --user Me":            `"Me" cannot be a name`,
		"hub token site st-anna --dir " + hubDir:        "hub.toml",
		"hub token machine st-anna":                     "needs site or user",
		"site join pergola-site-xyz":                    "the token is damaged",
		"login me":                                      "the token does not begin with pergola-",
		"hub token site hub --dir " + hubDir:            "no site can be called",
		"hub token user maria --ttl x --dir " + hubDir:  `--ttl "x" is not a duration`,
		"hub token user maria --ttl 0s --dir " + hubDir: "cannot be good for",
	} {
		if _, diag := operator.does(2, strings.Fields(args)...); !strings.Contains(diag, want) {
			t.Errorf("%s: %s", args, diag)
		}
	}

	operator.does(0, "hub", "init", "--address", addr, "--listen", addr, "--dir", hubDir, "--context", "here")
	if _, diag := operator.does(2, "hub", "init", "--address", addr, "--dir", hubDir, "--context", "there"); !strings.Contains(diag, "has a hub already") {
		t.Errorf("a second hub in the same directory: %s", diag)
	}
	f := &fleetOf{hub: &daemon{t: t, role: "hub", dir: hubDir, tmp: root}, mark: "hub"}
	t.Cleanup(func() {
		for _, d := range append(f.sites, f.hub) {
			d.kill()
			if t.Failed() {
				t.Logf("%s:\n%s", d.dir, d.out.String())
			}
		}
	})
	f.hub.start()

	// The hub may run or not when tokens are made, and has to run when they are used.
	token := func(kind, name string, more ...string) string {
		out, _ := operator.does(0, append([]string{"hub", "token", kind, name, "--dir", hubDir}, more...)...)
		return strings.TrimSpace(out)
	}
	mine := token("user", "maria")
	for began := time.Now(); ; time.Sleep(50 * time.Millisecond) { // until the hub listens
		c := operator.command("sites", "--context", "here")
		if c.Run() == nil {
			break
		}
		if time.Since(began) > limit {
			t.Fatal("the hub never answered")
		}
	}
	for _, n := range []string{"st-anna", "charite"} {
		dir := filepath.Join(root, n)
		tok := token("site", n)
		if _, diag := maria.does(2, "login", tok); !strings.Contains(diag, "pergola site join") {
			t.Errorf("a site's token used by a user: %s", diag)
		}
		operator.does(0, "site", "join", tok, "--dir", dir)
		if _, diag := operator.does(1, "site", "join", tok, "--dir", dir); !strings.Contains(diag, "used") {
			t.Errorf("a token that was used: %s", diag)
		}
		d := &daemon{t: t, role: "site", dir: dir, tmp: root}
		f.sites = append(f.sites, d)
		d.start()
	}
	if _, diag := operator.does(2, "site", "join", token("site", "charite"), "--dir", filepath.Join(root, "st-anna")); !strings.Contains(diag, "is of site st-anna") {
		t.Errorf("the directory of another site: %s", diag)
	}
	maria.does(0, "login", mine, "--context", "clinic")
	if _, diag := maria.does(2, "login", token("user", "eva"), "--context", "clinic"); !strings.Contains(diag, "have a context clinic already") {
		t.Errorf("a context that is there, of another user: %s", diag)
	}
	if _, diag := maria.does(1, "login", mine, "--context", "clinic"); !strings.Contains(diag, "was used already") {
		t.Errorf("a token that was used: %s", diag)
	}

	// Everything that was made by these commands is well, at each of its ends, and says so.
	for _, dir := range []string{hubDir, filepath.Join(root, "st-anna")} {
		if out, _ := operator.does(0, "doctor", "--dir", dir); !strings.Contains(out, "runs, version ") || !strings.Contains(out, "\n  0 errors, ") {
			t.Errorf("%s", out)
		}
	}
	if out, _ := maria.does(0, "doctor", "--context", "clinic"); !strings.Contains(out, "the hub answers at "+addr) {
		t.Errorf("%s", out)
	}
	if out, _ := operator.does(0, "site", "status", "--dir", filepath.Join(root, "charite"), "--json"); !strings.Contains(out, `"connected":true`) {
		t.Errorf("%s", out)
	}
	if out, _ := operator.does(0, "hub", "status", "--dir", hubDir, "--metrics"); !strings.Contains(out, "\npergola_site_connected{site=\"st-anna\"} 1\n") {
		t.Errorf("%s", out)
	}

	// A token that is over, one of a hub with another authority, and one whose secret nobody gave out.
	over := token("user", "late", "--ttl", "1s")
	tok, err := enrol.Parse(token("user", "eve"), pki.KindUser)
	if err != nil {
		t.Fatal(err)
	}
	other := tok
	other.CA[0] ^= 1
	guessed := tok
	guessed.Secret = enrol.NewSecret()
	if late, err := enrol.Parse(over, pki.KindUser); err != nil {
		t.Fatal(err)
	} else {
		time.Sleep(time.Until(late.Expires.Add(10 * time.Millisecond)))
	}
	for text, want := range map[string]string{over: "was good until", other.String(): "not the hub that made the token", guessed.String(): "token"} {
		if _, diag := maria.does(1, "login", text, "--context", "no"); !strings.Contains(diag, want) {
			t.Errorf("want %q: %s", want, diag)
		}
	}
	if names, _ := maria.does(0, "context", "ls"); strings.Contains(names, " no ") {
		t.Errorf("a refused login left a context: %s", names)
	}

	// Who has no certificate gets at nothing but enrolment, whatever it asks for.
	if _, diag := maria.does(0, "jobs"); !strings.Contains(diag, "no jobs") {
		t.Errorf("maria's first look: %s", diag)
	}

	app, err := filepath.Abs("../apps/tiny")
	if err != nil {
		t.Fatal(err)
	}
	out, diag := maria.does(0, "submit", app, "--flwr", oldest, "--wait")
	if !strings.Contains(out, "succeeded") || !strings.Contains(diag, "st-anna is ready") {
		t.Errorf("%s\n%s", out, diag)
	}
	// What helpers need to see of that job.
	out, _ = maria.does(0, "jobs", "--json")
	var first []struct {
		ID string `json:"id"`
	}
	if err := json.Unmarshal([]byte(out), &first); err != nil || len(first) != 1 {
		t.Fatalf("%v: %s", err, out)
	}
	operator.does(0, "support-bundle", "--dir", hubDir, "--job", first[0].ID, "-o", filepath.Join(root, "b.tar.gz"))
	packed, err := exec.Command("tar", "xzOf", filepath.Join(root, "b.tar.gz"), "b/jobs.json", "b/process/status.json", "b/job-"+first[0].ID+"/events.jsonl").CombinedOutput()
	if text := string(packed); err != nil || !strings.Contains(text, `"maria"`) || !strings.Contains(text, `"succeeded"`) || !strings.Contains(text, "program-started") {
		t.Errorf("%v: %s", err, packed)
	}
	out, _ = operator.does(0, "jobs", "--json")
	var js []struct {
		Submitter string `json:"submitter"`
		State     string `json:"state"`
	}
	if err := json.Unmarshal([]byte(out), &js); err != nil || len(js) != 1 || js[0].Submitter != "maria" || js[0].State != "succeeded" {
		t.Errorf("%v: %s", err, out)
	}
}
