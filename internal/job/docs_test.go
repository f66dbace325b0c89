package job

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "rewrite docs/states.md from the tables")

// docs/states.md is what the tables say. Rewrite it with: go test ./internal/job -run TestDocs -update
func TestDocs(t *testing.T) {
	const path = "../../docs/states.md"
	var b bytes.Buffer
	b.WriteString(`# The states of a job

This page is printed from the tables in ` + "`internal/job/state.go`" + ` (` + "`go test ./internal/job -run TestDocs -update`" + `). The store
refuses every move that is not in them, and writes each move together with its event before anything acts upon it.

A job that runs is stopped before it ends, whatever ends it. One that does not succeed has a cause: a code, the party,
one sentence, and what to do.

## Job

`)
	table(&b, States(), meaning, State.Next, State.Terminal)
	b.WriteString(`
## Party

The hub's side and each site's side of a job have a state of their own. When a job is stopped, a party that did nothing
wrong is done, wherever it was.

`)
	table(&b, PartyStates(), partyMeaning, PartyState.Next, PartyState.Terminal)
	var from []string
	for _, s := range PartyStates() {
		if s.Again() {
			from = append(from, "**"+string(s)+"**")
		}
	}
	b.WriteString(`
## A new attempt

While a job prepares or runs, the hub may begin a party anew: from ` + strings.Join(from, ", ") + ` it is **absent** again, with the number of
its attempt in the event. What is left of the attempt before is ended first, and what that says of its state afterwards is not listened to.
That is done for a site that was lost and is there again, while the job went on without it, and for all parties when the hub's runner died
and the job's ` + "`restarts`" + ` allow it ([settings](settings.md)). The job itself never goes back: one that ran stays running meanwhile.
`)
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
		t.Errorf("%s is not what the tables say; rewrite it with -update (-want +got):\n%s", path, d)
	}
}

func table[S ~string](b *bytes.Buffer, all []S, meaning map[S]string, next func(S) []S, terminal func(S) bool) {
	fmt.Fprintf(b, "```mermaid\nstateDiagram-v2\n    [*] --> %s\n", all[0])
	for _, s := range all {
		for _, n := range next(s) {
			fmt.Fprintf(b, "    %s --> %s\n", s, n)
		}
		if terminal(s) {
			fmt.Fprintf(b, "    %s --> [*]\n", s)
		}
	}
	b.WriteString("```\n\n| state | what it means | what may follow |\n|---|---|---|\n")
	for _, s := range all {
		follow := "nothing: it is the end"
		if !terminal(s) {
			var names []string
			for _, n := range next(s) {
				names = append(names, string(n))
			}
			follow = strings.Join(names, ", ")
		}
		fmt.Fprintf(b, "| **%s** | %s | %s |\n", s, meaning[s], follow)
	}
}
