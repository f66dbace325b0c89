package main

import (
	"strings"
	"testing"
	"time"
)

// What `pergola run --json` prints, and the phases that follow from it.
func TestFollow(t *testing.T) {
	const run = `
{"time":"2026-11-23T12:00:01Z","kind":"env-progress","party":"hub","body":{}}
{"time":"2026-11-23T12:00:02Z","kind":"program-started","party":"hub","body":{"name":"flower-superlink","pid":7}}
{"time":"2026-11-23T12:00:04Z","kind":"program-started","party":"hub","body":{"name":"flwr-run","pid":8}}
{"time":"2026-11-23T12:00:06Z","kind":"round","party":"hub","body":{"round":1,"total":2}}
{"time":"2026-11-23T12:00:06.5Z","kind":"log","party":"hub","body":{"program":"server-app","line":"\u001b[92mINFO \u001b[0m:  [ROUND 1]"}}
{"time":"2026-11-23T12:00:09Z","kind":"log","party":"hub","body":{"program":"server-app","line":"INFO :      [ROUND 2]"}}
{"time":"2026-11-23T12:00:11Z","kind":"log","party":"site-1","body":{"program":"supernode","line":"[SUMMARY] of my own"}}
{"time":"2026-11-23T12:00:12Z","kind":"log","party":"hub","body":{"program":"server-app","line":"INFO :      [SUMMARY]"}}
{"time":"2026-11-23T12:00:13Z","kind":"job-state","body":{"from":"running","to":"stopping"}}
{"time":"2026-11-23T12:00:14Z","kind":"summary","body":{"state":"succeeded","duration_seconds":14}}`
	start := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	c := clock{start: start}
	state, err := follow(strings.NewReader(run), &c)
	if err != nil || state != "succeeded" {
		t.Fatalf("follow = %q, %v", state, err)
	}
	m, err := c.measure(2, start.Add(15*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	want := measure{app: 4 * time.Second, first: 2 * time.Second, perRound: 3 * time.Second, stop: 3 * time.Second, total: 15 * time.Second}
	if m.app != want.app || m.first != want.first || m.perRound != want.perRound || m.stop != want.stop || m.total != want.total {
		t.Errorf("measure = %+v, want %+v", m, want)
	}
	if _, err := c.measure(3, start); err == nil {
		t.Error("a run that lacks a round was measured")
	}
	failed := `{"kind":"summary","body":{"state":"failed","cause":{"code":"start-timeout","party":"hub","message":"too late"}}}`
	if state, err := follow(strings.NewReader(failed), &c); err != nil || !strings.Contains(state, "too late") {
		t.Errorf("a run that failed ended %q, %v", state, err)
	}
	if _, err := follow(strings.NewReader("Traceback\n"), &c); err == nil {
		t.Error("a line that is no event was taken")
	}
}

func TestReport(t *testing.T) {
	s := time.Second
	plain := []measure{{app: 5 * s, first: 4 * s, perRound: 9 * s, stop: s, total: 37 * s}}
	quick := []measure{{app: 5 * s, first: 4 * s, perRound: 9 * s, stop: s, total: 37*s + 900*time.Millisecond, memory: map[string]int64{"hub": 30 << 20, "runner": 45 << 20}}}
	var out strings.Builder
	if !report(&out, options{}, "1.41.0", plain, quick) || !strings.Contains(out.String(), "runner 45.0") || !strings.Contains(out.String(), "+0.90") {
		t.Errorf("0.9 s and 45 MiB do not meet the goals:\n%s", &out)
	}
	quick[0].memory["hub"] = 61 << 20
	if report(&out, options{}, "1.41.0", plain, quick) {
		t.Errorf("61 MiB meet the goals:\n%s", &out)
	}
}

func TestSmallParts(t *testing.T) {
	if n, ok := highWater([]byte("Name:\tpergola\nVmHWM:\t   2048 kB\nVmRSS:\t 1 kB\n")); !ok || n != 2<<20 {
		t.Errorf("highWater = %d, %v", n, ok)
	}
	for cmdline, want := range map[string]string{"/bin/pergola\x00run\x00app\x00": "run", "pergola\x00-v\x00hub\x00": "hub", "pergola\x00": "pergola"} {
		if got := role([]byte(cmdline)); got != want {
			t.Errorf("role(%q) = %q, want %q", cmdline, got, want)
		}
	}
	if median([]int64{3, 1, 2}) != 2 || median([]int64{4, 1}) != 2 {
		t.Error("the median is not in the middle")
	}
}
