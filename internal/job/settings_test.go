package job

import (
	"bytes"
	"fmt"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// keysOf gives every key that ParseSpec takes, with its type as people call it.
func keysOf(t reflect.Type, at string, out map[string]string) {
	for i := range t.NumField() {
		f := t.Field(i)
		name := f.Tag.Get("toml")
		if name == "-" {
			continue
		}
		switch {
		case f.Type == durationType:
			out[at+name] = "duration"
		case f.Type == sizeType:
			out[at+name] = "size"
		case f.Type == reflect.TypeFor[NodeConfig](), f.Type == reflect.TypeFor[Resources]():
			out[at+name] = "table"
		case f.Type.Kind() == reflect.Struct:
			keysOf(f.Type, at+name+".", out)
		default:
			out[at+name] = map[string]string{
				"string": "string", "int": "whole number", "float64": "number", "bool": "boolean", "[]string": "list of strings", "map[string]string": "table of strings",
			}[f.Type.String()]
		}
	}
}

// The table of settings has what the code reads, with the types and defaults that the code has.
func TestSettingsAreComplete(t *testing.T) {
	want := map[string]string{}
	keysOf(reflect.TypeFor[Spec](), "", want)
	have := map[string]string{}
	for _, s := range Settings {
		if _, twice := have[s.Key]; twice {
			t.Errorf("%s stands twice in the table", s.Key)
		}
		have[s.Key] = s.Type
		if s.Meaning == "" || s.Default == "" {
			t.Errorf("%s has no meaning or no default", s.Key)
		}
	}
	if d := cmp.Diff(want, have); d != "" {
		t.Errorf("keys and types (-code +table):\n%s", d)
	}
	defaults := Spec{}.WithDefaults()
	for _, s := range Settings {
		v := reflect.ValueOf(defaults)
		for _, part := range strings.Split(s.Key, ".") {
			for i := range v.NumField() {
				if v.Type().Field(i).Tag.Get("toml") == part {
					v = v.Field(i)
					break
				}
			}
		}
		switch d := v.Interface().(type) {
		case Duration:
			if text := fmt.Sprintf("%q", d); s.Default != text && (d != NoLimit || s.Default != "no limit") {
				t.Errorf("%s: the table says %s, the code %s", s.Key, s.Default, text)
			}
		case Size:
			if text := fmt.Sprintf("%q", d); s.Default != text {
				t.Errorf("%s: the table says %s, the code %s", s.Key, s.Default, text)
			}
		case bool:
			if s.Default != fmt.Sprint(d) {
				t.Errorf("%s: the table says %s, the code %t", s.Key, s.Default, d)
			}
		}
	}
}

const settingsHead = `# Settings of a job

This page is printed from the table in ` + "`internal/job/settings.go`" + ` (` + "`go test ./internal/job -run TestSettingsPage -update`" + `), which is
tested against the code. All settings are optional. They stand in the app's ` + "`pyproject.toml`" + `, in ` + "`[tool.pergola]`, `[tool.pergola.server]`" + ` and
` + "`[tool.pergola.site]`" + `; what ` + "`[tool.pergola.site.NAME]`" + ` says holds for that one site and comes before what is said for all. A flag comes before the
file. A key that does not exist is refused with its line and the nearest key that does.

A duration is written like ` + "`\"90s\"`, `\"15m\"`, `\"6h\"` or `\"2d\"`; `\"0\"`" + ` means no limit, where nothing else is said.

`

const settingsTail = `
## Which sites a job needs

Without ` + "`min-sites`" + ` a job needs every wanted site, from the start to the end: one that fails or stays away ends it, with that site's
[cause](causes.md). With ` + "`min-sites`" + ` lower than the number of wanted sites:

* The job is prepared as soon as that many, and all ` + "`mandatory-sites`" + `, can take it ([scheduling](scheduling.md)) and ` + "`join-wait`" + ` is over; at once when
  all can, or the others are drained. The app starts in the same way, when that many are ready.
* A site that comes later, or whose environment takes longer, joins the job while it runs: its supernode registers at the superlink, and Flower's
  strategies choose among the nodes that are there when a round begins.
* A site that fails, or whose agent stays away for longer than the hub's ` + "`site-grace`" + `, is gone, which a warning says. The job goes on while
  ` + "`min-sites`" + ` and all mandatory ones are left, and ends with the site's cause when they are not.
* One whose agent, link or runner was lost may come back: once its agent is there again, what was left of its part is ended, and it begins anew,
  as a new node for Flower. Between such attempts of one site there is a pause, from 10 s on, doubling up to 10 min. A site whose app,
  environment or programs failed does not begin anew, since the same would happen again.

` + "`strict-clients`" + ` is how failures are judged. Where it is false, as in the reference system, a supernode that ends with a failure costs its site
and no more, as long as ` + "`min-sites`" + ` are left. The reference system counts such a client as done and lets the job succeed even if no client is
left; here that takes a ` + "`min-sites`" + ` that says so, because a job that lost what it needed has a cause, and never the word "succeeded". Where it is
true, every failure of a site ends the job; only being away is still forgiven up to ` + "`min-sites`" + `. In both cases a program that cannot be started
at all (code 101) ends the job, as it does there, and an exception in a client app is no end of anything: it is reported as an event, and
Flower's strategy decides what a failed reply means.

## When the hub's runner dies

With ` + "`restarts`" + ` in ` + "`[tool.pergola.server]`" + `, the hub starts its side of the job again when its runner was killed or crashed: the superlink comes up
on the same ` + "`database`" + ` file, all sites begin anew, and the app is run again from its start. Flower cannot continue a server app in its middle, in
any version: what it computed is lost unless the app itself has written it somewhere and reads it again.

| flwr | what the file keeps |
|---|---|
| up to 1.12 | nodes, messages and runs; the server app is a program of its own and is started again |
| 1.13 to 1.41 | nodes, messages, runs, their states and their FABs, and from 1.30 on their output; the new attempt is a further run, and the one before it stays as it was |

A superlink that dies leaves its nodes online in the file, for as long as their supernodes had announced. They are taken offline in it before the
next superlink starts, so that no strategy chooses nodes that are gone.

## Settings of the reference system that have no counterpart

| name there | default there | why there is none here |
|---|---|---|
`

// docs/settings.md is what the table says. Rewrite it with: go test ./internal/job -run TestSettingsPage -update
func TestSettingsPage(t *testing.T) {
	const path = "../../docs/settings.md"
	var b bytes.Buffer
	b.WriteString(settingsHead)
	b.WriteString("| key | type | default | flag | meaning | in the reference system |\n|---|---|---|---|---|---|\n")
	for _, s := range Settings {
		flag, def, ref := s.Flag, s.Default, s.Reference
		if flag != "" {
			flag = "`" + strings.ReplaceAll(flag, ", ", "`, `") + "`"
		}
		if strings.HasPrefix(def, `"`) {
			def = "`" + def + "`"
		}
		if ref == "" {
			ref = "none"
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s | %s | %s |\n", s.Key, s.Type, def, flag, s.Meaning, ref)
	}
	b.WriteString(settingsTail)
	for _, a := range Absent {
		names := strings.Split(a.Name, ", ")
		if slices.ContainsFunc(names, func(n string) bool { return !strings.Contains(n, " ") }) {
			names = []string{"`" + strings.Join(names, "`, `") + "`"}
		}
		fmt.Fprintf(&b, "| %s | %s | %s |\n", strings.Join(names, ", "), a.Default, a.Why)
	}
	if *update {
		if err := os.WriteFile(path, b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(b.String(), string(have)); d != "" {
		t.Errorf("%s is not what the table says; rewrite it with -update (-want +got):\n%s", path, d)
	}
}
