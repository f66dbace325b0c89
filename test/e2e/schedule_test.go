package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pergolafl/pergola/internal/config"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/site"
)

// shown is what `pergola show --json` says of a job, as far as it is looked at here.
type shown struct {
	ID     string `json:"id"`
	State  string `json:"state"`
	Reason string `json:"reason"`
	Wait   struct {
		Place, Queued int
		Never         bool
		Lacks         []struct {
			Site, Kind, Resource  string
			Asked, Free, Declared json.Number
			Jobs                  []string
		}
	} `json:"wait"`
	Start   time.Time `json:"start_time"`
	Parties []struct {
		Name, State string
		Update      time.Time `json:"update_time"`
	} `json:"parties"`
}

func (u *user) show(id string) (j shown) {
	u.t.Helper()
	out, _ := u.does(0, "show", id, "--json")
	if err := json.Unmarshal([]byte(out), &j); err != nil {
		u.t.Fatalf("%v: %s", err, out)
	}
	return j
}

// until asks again and again until what is asked for is so.
func (u *user) until(what string, ok func() bool) {
	u.t.Helper()
	for late := time.Now().Add(limit); !ok(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(late) {
			out, _ := u.does(0, "jobs", "--all")
			sites, _ := u.does(0, "sites")
			u.t.Fatalf("there never was: %s\n%s\n%s", what, out, sites)
		}
	}
}

// sites gives what `pergola sites --json` says.
func (u *user) sites() map[string]map[string]any {
	u.t.Helper()
	out, _ := u.does(0, "sites", "--json")
	var list []map[string]any
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		u.t.Fatalf("%v: %s", err, out)
	}
	m := map[string]map[string]any{}
	for _, s := range list {
		m[fmt.Sprint(s["name"])] = s
	}
	return m
}

// queue gives the jobs that wait, in the order of their places.
func (u *user) queue() (ids []string) {
	u.t.Helper()
	out, _ := u.does(0, "jobs", "--state", "queued", "--all", "--json")
	var list []shown
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		u.t.Fatalf("%v: %s", err, out)
	}
	slices.SortFunc(list, func(a, b shown) int { return a.Wait.Place - b.Wait.Place })
	for i, j := range list {
		if j.Wait.Place == i+1 { // else the hub has not decided since its start
			ids = append(ids, j.ID)
		}
	}
	return ids
}

// devicesOf gives the CUDA_VISIBLE_DEVICES of a party's programs; none as long as there are no programs.
func devicesOf(mark string) []string {
	var out []string
	es, _ := os.ReadDir("/proc") // none: it is asked again
	for _, e := range es {
		if _, err := strconv.Atoi(e.Name()); err != nil {
			continue
		}
		env, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "environ")) // it may have gone
		vars := bytes.Split(env, []byte{0})
		if !slices.ContainsFunc(vars, func(kv []byte) bool { return string(kv) == "PERGOLA_MARK="+mark }) {
			continue
		}
		for _, kv := range vars {
			if v, ok := strings.CutPrefix(string(kv), "CUDA_VISIBLE_DEVICES="); ok && !slices.Contains(out, v) {
				out = append(out, v)
			}
		}
	}
	return out
}

// Jobs at two sites that have declared what they have, by the commands that people have: each job says why it waits, the queue has
// its order, also after the hub was killed, and a drained site gets nothing new.
func TestQueueByCommand(t *testing.T) {
	t.Parallel()
	slots <- struct{}{}
	defer func() { <-slots }()
	f := daemons(t, "site-1", "site-2")
	for _, s := range f.sites {
		path := filepath.Join(s.dir, site.ConfigFile)
		var conf site.Config
		if err := config.Read(path, &conf); err != nil {
			t.Fatal(err)
		}
		conf.Resources = map[string]any{"cpus": 4, "memory": "8GiB", "gpus": []string{"g0", "g1"}}
		if err := config.Write(path, conf); err != nil {
			t.Fatal(err)
		}
	}
	f.start()
	anna, bob := f.user(t, "anna"), f.user(t, "bob")
	up := func(want int) { // until the hub listens and so many sites are connected
		t.Helper()
		for late := time.Now().Add(limit); ; time.Sleep(50 * time.Millisecond) {
			var out bytes.Buffer
			c := anna.command("sites", "--json")
			c.Stdout = &out
			if c.Run() == nil && strings.Count(out.String(), `"connected":true`) >= want {
				return
			}
			if time.Now().After(late) {
				t.Fatal(out.String())
			}
		}
	}
	up(2)
	if out, _ := anna.does(0, "sites"); !strings.Contains(out, "cpus 0/4, gpus 0/2, memory 0/8GiB") {
		t.Errorf("sites: %s", out)
	}
	app, err := filepath.Abs("../apps/slow")
	if err != nil {
		t.Fatal(err)
	}
	submit := func(u *user, more ...string) string {
		t.Helper()
		out, _ := u.does(0, append([]string{"submit", app, "--flwr", oldFlwr, "--engine", "flower", "--run-config", "sleep=90"}, more...)...)
		id := strings.TrimSpace(out)
		f.jobs = append(f.jobs, job.ID(id))
		return id
	}

	// What can never be is said at once.
	if _, diag := anna.does(2, "submit", app, "--sites", "site-1", "--cpus", "5", "--flwr", oldFlwr); !strings.Contains(diag, "site-1 has 4 cpus, and 5 are asked for") {
		t.Errorf("too much: %s", diag)
	}
	if _, diag := anna.does(2, "submit", app, "--resource", "memory=x"); !strings.Contains(diag, "memory=x") {
		t.Errorf("no amount: %s", diag)
	}

	first := submit(anna, "--sites", "site-1", "--cpus", "4", "--gpus", "1")
	anna.until("the first job's part", func() bool { return len(devicesOf("restart-"+first+"-site-1")) > 0 })
	if got := devicesOf("restart-" + first + "-site-1"); !slices.Equal(got, []string{"g0"}) {
		t.Errorf("the first job's programs see the devices %q", got)
	}
	second := submit(anna, "--sites", "site-1", "--cpus", "4")
	gang := submit(bob, "--cpus", "2", "--memory", "1GiB") // of both sites
	urgent := submit(anna, "--sites", "site-1", "--cpus", "3", "--priority", "5")

	anna.until("a queue of three", func() bool { return len(anna.queue()) == 3 })
	order := []string{urgent, gang, second} // the priority first; then bob, who has used nothing
	if got := anna.queue(); !slices.Equal(got, order) {
		t.Errorf("the queue is %v, want %v", got, order)
	}
	j := bob.show(gang)
	if l := j.Wait.Lacks; len(l) != 1 || l[0].Site != "site-1" || l[0].Kind != "busy" || l[0].Resource != "cpus" || l[0].Free != "" || l[0].Declared != "4" || !slices.Equal(l[0].Jobs, []string{first}) {
		t.Errorf("the gang lacks %+v", l)
	}
	if want := "place 2 of 3: site-1 has 0 of 4 cpus free, and 2 are asked for, in use by " + first + " of anna"; j.Reason != want {
		t.Errorf("the gang waits: %s\nwant %s", j.Reason, want)
	}
	if out, _ := bob.does(0, "show", gang); !strings.Contains(out, "cpus: 0 of 4 free, 2 asked for, in use by "+first) {
		t.Errorf("show: %s", out)
	}
	if out, _ := bob.does(0, "jobs", "--state", "queued"); !strings.Contains(out, "place 1 of 3: site-1 has 0 of 4 cpus free") {
		t.Errorf("jobs: %s", out)
	}
	if out, _ := bob.does(0, "events", gang, "--json"); !strings.Contains(out, "site-1 has 0 of 4 cpus free") {
		t.Errorf("events: %s", out)
	}
	if got := anna.sites()["site-1"]; fmt.Sprint(got["used"]) != "map[cpus:4 gpus:1]" || fmt.Sprint(got["jobs"]) != "["+first+"]" {
		t.Errorf("site-1: %v", got)
	}

	// The hub is killed with all of that in it.
	f.hub.kill()
	f.hub.start()
	up(0)
	anna.until("the queue as it was", func() bool { return slices.Equal(anna.queue(), order) })
	if s := anna.show(first); s.State != "preparing" && s.State != "running" {
		t.Errorf("the job that ran is %+v", s)
	}

	over := func(id string) {
		t.Helper()
		anna.does(0, "abort", id)
		anna.until("the end of "+id, func() bool { return anna.show(id).State == "aborted" })
	}
	begun := func(id string) {
		t.Helper()
		anna.until("the start of "+id, func() bool { return anna.show(id).State != "queued" })
	}
	bob.does(0, "site", "drain", "site-2")
	if got := anna.sites()["site-2"]; got["drained"] != true {
		t.Errorf("site-2: %v", got)
	}
	over(first)
	begun(urgent)
	anna.until("a job without devices sees none", func() bool { return slices.Equal(devicesOf("restart-"+urgent+"-site-1"), []string{""}) })
	anna.until("the reason that a site is drained", func() bool { return strings.Contains(bob.show(gang).Reason, "site-2 is drained") })
	if s := anna.show(second); s.State != "queued" {
		t.Errorf("two jobs have more than the site has: %+v", s)
	}
	over(urgent)
	begun(second) // the gang cannot: its site is drained, and nothing is kept for it
	over(second)
	if s := bob.show(gang); s.State != "queued" || s.Reason != "place 1 of 1: site-2 is drained" {
		t.Errorf("the gang is %s: %s", s.State, s.Reason)
	}
	if out, _ := bob.does(0, "site", "resume", "site-2"); !strings.Contains(out, "site-2: connected") {
		t.Errorf("resume: %s", out)
	}
	begun(gang)
	over(gang)

	// One after the other, each begun once.
	var ends []time.Time
	for i, id := range []string{first, urgent, second, gang} {
		s := anna.show(id)
		if i > 0 && s.Start.Before(ends[i-1]) {
			t.Errorf("job %d began at %s, before the part at site-1 of the one before it had ended at %s", i, s.Start, ends[i-1])
		}
		for _, p := range s.Parties {
			if p.Name == "site-1" {
				ends = append(ends, p.Update)
			}
		}
		out, _ := anna.does(0, "events", id, "--json")
		if n := strings.Count(out, `"to":"preparing"`); n < 1 || strings.Count(out, `"kind":"job-state"`) != 5 { // submitted, queued, preparing (running), stopping, aborted
			if strings.Count(out, `"kind":"job-state"`) != 6 {
				t.Errorf("job %d was moved otherwise than once each:\n%s", i, out)
			}
		}
	}
	if _, diag := bob.does(1, "site", "drain", "site-3"); !strings.Contains(diag, `no site is named "site-3"`) {
		t.Errorf("drain of an unknown site: %s", diag)
	}
}
