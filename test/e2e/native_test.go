package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/localrun"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/pyenv"
)

// clientMetrics gives what the events say of the replies of a round and phase, by site.
func clientMetrics(t *testing.T, res result, round int, phase string) map[string]job.ClientMetrics {
	t.Helper()
	out := map[string]job.ClientMetrics{}
	for _, e := range res.Events {
		if e.Kind != job.KindClientMetrics {
			continue
		}
		if m := as[job.ClientMetrics](t, e); m.Round == round && m.Phase == phase {
			if _, twice := out[m.Site]; twice {
				t.Errorf("%s is told of twice in round %d", m.Site, round)
			}
			out[m.Site] = m
		}
	}
	return out
}

// engineOf gives the engine events.
func enginesOf(t *testing.T, res result) (out []job.EngineChoice) {
	t.Helper()
	for _, e := range res.Events {
		if e.Kind == job.KindEngine {
			out = append(out, as[job.EngineChoice](t, e))
		}
	}
	return out
}

func programsOf(t *testing.T, res result) map[string]int {
	t.Helper()
	out := map[string]int{}
	for _, e := range res.Events {
		if e.Kind == job.KindProgramStarted {
			out[as[job.Program](t, e).Name]++
		}
	}
	return out
}

// The same app has the same numbers on the native engine, chosen by itself, without any of Flower's programs; and the numbers of every
// client are there without a word of the app's.
func TestNative(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ flwr, isolation string }{{oldest, ""}, {newest, ""}, {newest, "process"}} {
		t.Run(c.flwr+" "+c.isolation, func(t *testing.T) {
			t.Parallel()
			args := []string{"--flwr", c.flwr, "--engine", "auto"}
			if c.isolation != "" {
				args = append(args, "--isolation", c.isolation)
			}
			r := start(t, spec{app: "tiny", args: args})
			res := r.end()
			if res.Code != 0 || res.Summary.Engine != job.EngineNative || res.Summary.Flwr != c.flwr || !strings.Contains(res.Summary.Why, "known") {
				t.Fatalf("exit %d, %s, engine %s (%s)", res.Code, causeText(res.Summary), res.Summary.Engine, res.Summary.Why)
			}
			sameRounds(t, res.Summary.Rounds, tinyRounds)
			if got := enginesOf(t, res); len(got) != 1 || got[0].Engine != job.EngineNative {
				t.Errorf("the events tell of %+v", got)
			}
			for name := range programsOf(t, res) {
				if name != newAppProgram && name != newClientProgram {
					t.Errorf("%s was started", name)
				}
			}
			for _, site := range []string{"site-1", "site-2"} {
				m := clientMetrics(t, res, 2, "evaluate")[site]
				if m.Replies != 1 || m.Errors != 0 || m.Values["loss"] != (job.Stat{Count: 1, Mean: 12, Min: 12, Max: 12}) || m.SentBytes == 0 || m.ReceivedBytes == 0 || m.Seconds.Count != 1 {
					t.Errorf("of the evaluation of round 2 at %s the events say %+v", site, m)
				}
			}
			if len(res.Summary.Clients) != 8 {
				t.Errorf("the summary has the replies of %d phases, want 2 rounds of 2 at 2 sites", len(res.Summary.Clients))
			}
		})
	}
}

// A client whose memory does not suffice is an error to the strategy and an event of the job, in whatever process it was, and the next round
// has a worker as the first had.
func TestNativeOutOfMemory(t *testing.T) {
	t.Parallel()
	for _, isolation := range []string{"warm", "fork", "process"} {
		t.Run(isolation, func(t *testing.T) {
			t.Parallel()
			r := start(t, spec{app: "faulty", args: []string{
				"--flwr", newest, "--engine", "native", "--isolation", isolation, "--run-config", `fault="memory"`, "--run-config", "num-server-rounds=3",
			}})
			res := r.end()
			if res.Code != 0 || res.Summary.Engine != job.EngineNative || len(res.Summary.Rounds) != 3 {
				t.Fatalf("exit %d, %s, engine %s, %d rounds", res.Code, causeText(res.Summary), res.Summary.Engine, len(res.Summary.Rounds))
			}
			for round, errors := range []int{1, 1, 0} {
				for site, want := range map[string]int{"site-1": errors, "site-2": 0} {
					if m := clientMetrics(t, res, round+1, "train")[site]; m.Replies != 1 || m.Errors != want {
						t.Errorf("round %d: %s has %d replies, %d of them errors; want 1 and %d", round+1, site, m.Replies, m.Errors, want)
					}
				}
			}
			failures := 0
			for _, e := range res.Events {
				if e.Party == job.HubParty && e.Kind == job.KindClientFailure {
					failures += as[job.ClientFailure](t, e).Count
				}
			}
			if failures != 2 {
				t.Errorf("the strategy had %d failures, want 2", failures)
			}
			tells := func(what, text string) {
				t.Helper()
				if !slices.ContainsFunc(res.Events, func(e event) bool { return e.Party == "site-1" && strings.Contains(string(e.Body), text) }) {
					t.Errorf("no event tells of %s (%s)", what, text)
				}
			}
			tells("the exception", "MemoryError")
			tells("the kill", "while it had a message, which is answered with an error; another takes its place")
		})
	}
}

// Many clients are spread over the sites, each with its own node config, on as few workers as there are.
func TestManyClients(t *testing.T) {
	t.Parallel()
	r := start(t, spec{app: "look", args: []string{
		"--flwr", newest, "--clients", "41", "--workers", "2", "--site-env", "LOOK=7", "--run-config", "clients=41", "--run-config", "num-server-rounds=1",
	}})
	res := r.end()
	if res.Code != 0 || res.Summary.Engine != job.EngineNative {
		t.Fatalf("exit %d, %s, engine %s", res.Code, causeText(res.Summary), res.Summary.Engine)
	}
	if n := programsOf(t, res)[newClientProgram]; n != 4 {
		t.Errorf("%d workers were started at two sites, want 4", n)
	}
	values := res.Summary.Rounds[0].Phases["evaluate"]
	for i := range 41 {
		if values[fmt.Sprintf("partitions-%d", i)] != 41 || values[fmt.Sprintf("look-%d", i)] != 7 {
			t.Errorf("the client %d says %v", i, values)
		}
	}
	m := clientMetrics(t, res, 1, "train")
	if p := m["site-1"].Values["partition"]; p != (job.Stat{Count: 21, Mean: 10, Min: 0, Max: 20}) {
		t.Errorf("the partitions of site-1 are %+v", p)
	}
	if p := m["site-2"].Values["partition"]; p != (job.Stat{Count: 20, Mean: 30.5, Min: 21, Max: 40}) {
		t.Errorf("the partitions of site-2 are %+v", p)
	}
}

// The network between a site and the hub goes away while a message is worked on, and comes back: a pause, and nothing else.
func TestNativeOutage(t *testing.T) {
	t.Parallel()
	hub := freeAddress(t)
	n := forward(t, hub)
	r := start(t, spec{app: "slow", args: []string{
		"--flwr", oldest, "--engine", "native", "--run-config", "sleep=1", "--listen", hub, "--site-dials", "site-1=" + n.addr(),
	}, idle: true})
	for i, how := range []netState{cut, hole} {
		r.round(i + 1)
		n.set(how)
		time.Sleep(3 * time.Second) // the outage is what is tested
		n.set(up)
	}
	res := r.end()
	if res.Code != 0 || res.Summary.State != job.Succeeded {
		t.Fatalf("exit %d, %s", res.Code, causeText(res.Summary))
	}
	sameRounds(t, res.Summary.Rounds, tinyRounds)
	for _, m := range res.Summary.Clients {
		if m.Errors > 0 {
			t.Errorf("the strategy saw an error: %+v", m)
		}
	}
}

// Large packs have connections of their own. When one breaks, or all do, in the middle of a pack, the pack goes another way.
func TestNativeLanes(t *testing.T) {
	t.Parallel()
	for _, all := range []bool{false, true} {
		t.Run(map[bool]string{false: "one connection breaks", true: "all break"}[all], func(t *testing.T) {
			t.Parallel()
			hub := freeAddress(t)
			n := &network{to: hub, much: 20 << 20} // of 128 MiB
			var mu sync.Mutex
			broken, carried := map[bool]int{}, map[bool]int{} // by direction: connections
			n.passed = func(out bool) bool {
				mu.Lock()
				defer mu.Unlock()
				carried[out]++
				if broken[out] > 0 {
					return false
				}
				broken[out]++
				if all {
					n.wg.Go(func() {
						n.set(cut)
						time.Sleep(time.Second) // the outage is what is tested
						n.set(up)
					})
				}
				return true
			}
			n.start(t)
			r := start(t, spec{app: "big", args: []string{
				"--flwr", newest, "--engine", "native", "--sites", "1", "--run-config", "mebibytes=128", "--listen", hub, "--site-dials", "site-1=" + n.addr(),
			}})
			res := r.end()
			if res.Code != 0 || res.Summary.State != job.Succeeded {
				t.Fatalf("exit %d, %s", res.Code, causeText(res.Summary))
			}
			const want = "came back: 1 of 1 parts, 134217728 bytes seen by the client"
			if !slices.ContainsFunc(res.Events, func(e event) bool { return e.Kind == localrun.KindLog && strings.Contains(string(e.Body), want) }) {
				t.Errorf("the server app did not say %q", want)
			}
			mu.Lock()
			defer mu.Unlock()
			// The lane that broke, and the link, by which the pack came in its place.
			if broken[true] != 1 || broken[false] != 1 || carried[true] != 2 || carried[false] != 2 {
				t.Errorf("connections broken and used, towards the hub %d and %d, from it %d and %d", broken[true], carried[true], broken[false], carried[false])
			}
			if cuts := len(res.Summary.Link); all != (cuts == 1) {
				t.Errorf("the link of %d sites was cut: %+v", cuts, res.Summary.Link)
			}
		})
	}
}

// A setting that only Flower's programs know has the job run on them, and says so.
func TestEngineOfSettings(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS(filepath.Join(apps, "tiny"))); err != nil {
		t.Fatal(err)
	}
	p := filepath.Join(dir, "pyproject.toml")
	b, err := os.ReadFile(p)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p, append(b, "\n[tool.pergola.server]\ndatabase = \"state.db\"\n"...), 0o600); err != nil {
		t.Fatal(err)
	}
	r := start(t, spec{app: dir, args: []string{"--flwr", oldest, "--engine", "native"}})
	if res := r.end(); res.Code != 2 || !strings.Contains(res.Summary.Cause.Msg, "server.database") {
		t.Errorf("exit %d, %s; want a refusal", res.Code, causeText(res.Summary))
	}
	r = start(t, spec{app: dir, args: []string{"--flwr", oldest, "--engine", "auto", "--run-config", "num-server-rounds=1"}})
	res := r.end()
	if res.Code != 0 || res.Summary.Engine != job.EngineFlower || !strings.Contains(res.Summary.Why, "server.database") {
		t.Errorf("exit %d, %s, engine %s (%s)", res.Code, causeText(res.Summary), res.Summary.Engine, res.Summary.Why)
	}
}

// Where a site finds that the native engine does not work there, the job begins anew on Flower's programs, and says why; if nothing but the
// native engine was asked for, that is its cause.
func TestNativeIsUnavailable(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	broken := `
import os
with open("/proc/self/cmdline", "rb") as f:
    if b"check" in f.read().split(b"\0"):
        print("one thing is not as it should be", file=__import__("sys").stderr)
        os._exit(3)
`
	if err := os.WriteFile(filepath.Join(dir, "sitecustomize.py"), []byte(broken), 0o600); err != nil {
		t.Fatal(err)
	}
	env := []string{"PERGOLA_CACHE=" + cacheBeside(t, pyenv.DefaultCache()), "PYTHONPATH=" + dir}
	args := []string{"--flwr", oldest, "--engine"}
	r := start(t, spec{app: "tiny", args: append(args, "native"), env: env})
	if res := r.end(); res.Code != 1 || res.Summary.Cause == nil || res.Summary.Cause.Code != problem.NativeUnavailable || res.Summary.Cause.Party == "" ||
		!strings.Contains(res.Summary.Cause.Msg, "one thing is not as it should be") {
		t.Errorf("exit %d, %s", res.Code, causeText(res.Summary))
	}
	r = start(t, spec{app: "tiny", args: append(args, "auto"), env: env})
	res := r.end()
	if res.Code != 0 || res.Summary.Engine != job.EngineFlower || !strings.Contains(res.Summary.Why, "one thing is not as it should be") {
		t.Fatalf("exit %d, %s, engine %s (%s)", res.Code, causeText(res.Summary), res.Summary.Engine, res.Summary.Why)
	}
	sameRounds(t, res.Summary.Rounds, tinyRounds)
	if got := enginesOf(t, res); len(got) != 2 || got[0].Engine != job.EngineNative || got[1].Engine != job.EngineFlower {
		t.Errorf("the events tell of %+v", got)
	}
	if !slices.ContainsFunc(res.Summary.Warnings, func(w string) bool { return strings.Contains(w, "begins anew on Flower's own programs") }) {
		t.Errorf("the warnings are %q", res.Summary.Warnings)
	}
}

// cacheBeside makes a cache that has the environments of the user's, and no other answers about them.
func cacheBeside(t *testing.T, of string) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"envs", "interpreters", "locks"} {
		if err := os.MkdirAll(filepath.Join(of, name), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(filepath.Join(of, name), filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}
