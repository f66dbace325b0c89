// Package arch holds what is true of the repository as a whole and that the compiler does not check:
// importing goes downward only, every package says what it is for, every cause has its page. There is
// nothing to import here. A package that arrives gets its row in [layer] first.
package arch

import (
	"encoding/json"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/pergolafl/pergola/internal/problem"
)

const (
	module = "github.com/pergolafl/pergola"
	inside = module + "/internal/"
)

// layer has every package below internal/, named from there. A package imports lower layers only.
var layer = map[string]int{
	"arch":    0,
	"compat":  0,
	"keyed":   0,
	"problem": 0,
	"redact":  0,
	"sock":    0,

	"api/pergola/v1":                  0, // generated from proto/
	"api/pergola/v1/pergolav1connect": 1, // generated from proto/
	"clock":                           1,
	"config":                          1,
	"link":                            1,
	"logline":                         1,
	"logs":                            1,
	"monitor":                         1,
	"pki":                             1,
	"native/python":                   1, // data: the modules to be embedded
	"proc":                            1,
	"relay":                           1,
	"sandbox":                         1,

	"bundle":      2,
	"fleet":       2,
	"flower":      2,
	"launch":      2,
	"metrics":     2,
	"native":      2,
	"nvflare":     2,
	"pki/pkitest": 2,
	"pyenv":       2,
	"uplink":      2, // it knows the hub's certificates

	"api":             3, // the wire's forms of jobs and events
	"audit":           3,
	"job":             3,
	"policy":          3,
	"schedule":        3,
	"store":           3,
	"store/postgres":  3,
	"store/pgtest":    3,
	"store/sqlite":    3,
	"store/sqlstore":  3,
	"store/storetest": 3,

	"hub":      4,
	"localrun": 4,
	"prepare":  4,
	"enrol":    3,
	"client":   4,
	"runner":   4,
	"site":     4,

	"cli":     5,
	"doctor":  5,
	"support": 5,
	"web":     5,
}

// beside lists the imports within a layer that are meant: each is a part that cannot be thought of
// without the other, never a convenience.
var beside = map[string]bool{
	"cli support":                   true, // as doctor
	"support doctor":                true, // a bundle has what it finds
	"cli doctor":                    true, // it looks at what every role has, and is a command
	"compat problem":                true, // a refusal is one
	"api job":                       true, // it has the wire's forms of what job has
	"hub runner":                    true, // each starts runners and reads their journals;
	"site runner":                   true, // a runner knows neither
	"enrol api":                     true, // a newcomer's one call
	"localrun prepare":              true, // the same app, the same bundle as for a hub that runs for years
	"localrun hub":                  true, // it writes the configuration that the processes it starts read
	"localrun site":                 true,
	"localrun runner":               true, // the leash by which runners end with it
	"schedule job":                  true, // it decides about jobs
	"store job":                     true, // a store keeps jobs
	"store/sqlite job":              true,
	"store/sqlite store":            true, // an implementation knows its interface
	"store/sqlite store/sqlstore":   true,
	"store/postgres store/sqlstore": true,
	"store/sqlstore job":            true,
	"store/sqlstore store":          true,
	"store/postgres job":            true,
	"store/postgres store":          true,
	"store/storetest job":           true,
	"store/storetest store":         true, // one suite for both
}

// only names the packages outside of the standard library that are kept to a few of ours, so that
// what they bring does not spread.
var only = map[string][]string{
	"github.com/spf13/cobra":                     {"cli"},
	"modernc.org/sqlite":                         {"store/sqlite", "flower"},
	"github.com/jackc/pgx/v5":                    {"store/postgres", "store/pgtest"},
	"github.com/rogpeppe/go-internal/testscript": {},
	"go.uber.org/goleak":                         {},
	"pgregory.net/rapid":                         {"store/storetest"},
	"testing":                                    {"store/storetest", "store/pgtest", "pki/pkitest"},
}

// A goPackage is what `go list -json` tells of a package; Imports excludes those of tests.
type goPackage struct {
	ImportPath  string
	Dir         string
	GoFiles     []string
	TestGoFiles []string
	Imports     []string
}

func packages(t *testing.T, pattern ...string) []goPackage {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", append([]string{"list", "-e", "-json=ImportPath,Dir,GoFiles,TestGoFiles,Imports"}, pattern...)...)
	cmd.Dir = root(t)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var all []goPackage
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p goPackage
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
	if len(all) == 0 {
		t.Fatalf("go list %v found no package", pattern)
	}
	return all
}

func root(t *testing.T) string {
	t.Helper()
	dir, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestImportsGoDownwardOnly(t *testing.T) {
	for _, p := range packages(t, "./internal/...") {
		for _, complaint := range complaints(strings.TrimPrefix(p.ImportPath, inside), p.Imports) {
			t.Error(complaint)
		}
	}
}

func complaints(name string, imports []string) (found []string) {
	at, ok := layer[name]
	if !ok {
		return []string{"internal/" + name + " has no layer: give it its row in internal/arch/arch_test.go"}
	}
	for _, path := range imports {
		if who, restricted := only[path]; restricted && !slices.Contains(who, name) {
			found = append(found, "internal/"+name+" imports "+path+", which is kept to "+strings.Join(append([]string{"tests"}, who...), ", "))
		}
		imp, ours := strings.CutPrefix(path, inside)
		if !ours {
			if path == module || strings.HasPrefix(path, module+"/") {
				found = append(found, "internal/"+name+" imports "+path+", which is not below internal/")
			}
			continue
		}
		below, ok := layer[imp]
		if !ok || below < at || beside[name+" "+imp] {
			continue // a package without a layer has its own complaint
		}
		found = append(found, "internal/"+name+" imports "+imp+": move what both need down")
	}
	return found
}

// The check itself finds what it should.
func TestComplaints(t *testing.T) {
	for _, c := range []struct {
		about, name string
		imports     []string
		want        int
	}{
		{"downward", "cli", []string{inside + "hub", inside + "problem", "fmt"}, 0},
		{"upward", "link", []string{inside + "job"}, 1},
		{"a neighbour", "link", []string{inside + "relay"}, 1},
		{"a listed neighbour", "store", []string{inside + "job"}, 0},
		{"a listed neighbour the other way", "job", []string{inside + "store"}, 1},
		{"a package that the table lacks", "util", nil, 1},
		{"a library that is kept to one", "hub", []string{"github.com/spf13/cobra"}, 1},
		{"a program", "cli", []string{module + "/cmd/pergola"}, 1},
	} {
		if got := complaints(c.name, c.imports); len(got) != c.want {
			t.Errorf("%s: %d complaints, want %d: %q", c.about, len(got), c.want, got)
		}
	}
}

// A listed pair is one way, and still there: the list is no place for what was once needed.
func TestBesideIsOneWay(t *testing.T) {
	imports := map[string]bool{}
	known := map[string]bool{}
	for _, p := range packages(t, "./internal/...") {
		name := strings.TrimPrefix(p.ImportPath, inside)
		known[name] = true
		for _, path := range p.Imports {
			imports[name+" "+strings.TrimPrefix(path, inside)] = true
		}
	}
	for pair := range beside {
		from, to, _ := strings.Cut(pair, " ")
		if beside[to+" "+from] {
			t.Errorf("%s and %s may import each other", from, to)
		}
		if layer[from] != layer[to] {
			t.Errorf("%s and %s are in different layers: the pair says nothing", from, to)
		}
		if known[from] && known[to] && !imports[pair] {
			t.Errorf("%s does not import %s any more: take the pair out", from, to)
		}
	}
}

// main only ties the command tree to the process.
func TestProgramsImportTheCommandLineOnly(t *testing.T) {
	for _, p := range packages(t, "./cmd/...") {
		for _, path := range p.Imports {
			if imp, ours := strings.CutPrefix(path, inside); ours && imp != "cli" && imp != "problem" {
				t.Errorf("%s imports %s: internal/cli is the place", strings.TrimPrefix(p.ImportPath, module+"/"), imp)
			}
		}
	}
}

var sentence = regexp.MustCompile(`[.!?](\s|$)`)

// A package comment says what for and, in a second sentence at least, what not or where to start.
func TestPackagesSayWhatTheyAreFor(t *testing.T) {
	for _, p := range packages(t, "./...") {
		files := p.GoFiles
		if len(files) == 0 {
			files = p.TestGoFiles
		}
		name := strings.TrimPrefix(p.ImportPath, module+"/")
		var doc string
		generated := len(files) > 0
		for _, file := range files {
			f, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, file), nil, parser.PackageClauseOnly|parser.ParseComments)
			if err != nil {
				t.Fatal(err)
			}
			generated = generated && ast.IsGenerated(f)
			if f.Doc != nil {
				if doc != "" {
					t.Errorf("%s has two package comments; one is in %s", name, file)
				}
				doc = f.Doc.Text()
			}
		}
		if generated {
			continue // the .proto file says it
		}
		if n := len(sentence.FindAllString(doc, -1)); n < 2 {
			t.Errorf("%s: its package comment has %d sentences; say what it is for, what it does not do and where to start", name, n)
		}
	}
}

// docs/causes.md has a section for each code that a job can end with, and for nothing else.
func TestEveryCauseHasItsPage(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(root(t), "docs", "causes.md"))
	if err != nil {
		t.Fatal(err)
	}
	sections := map[problem.Code]string{}
	for _, part := range strings.Split("\n"+string(text), "\n## ")[1:] {
		title, body, _ := strings.Cut(part, "\n")
		code, ok := strings.CutPrefix(title, "`")
		code, closed := strings.CutSuffix(code, "`")
		if !ok || !closed {
			t.Errorf("section %q: want a code in backquotes", title)
			continue
		}
		if _, twice := sections[problem.Code(code)]; twice {
			t.Errorf("two sections for %s", code)
		}
		sections[problem.Code(code)] = body
	}
	for _, code := range slices.Sorted(maps.Keys(problem.Codes)) {
		body, there := sections[code]
		delete(sections, code)
		switch {
		case problem.Codes[code].Ends && !there:
			t.Errorf("no section for %s", code)
		case !problem.Codes[code].Ends && there:
			t.Errorf("a section for %s, which no job ends with", code)
		case there:
			for _, part := range []string{"**What it means.**", "**What to do.**", "**Where to look.**"} {
				if !strings.Contains(body, part) {
					t.Errorf("the section for %s lacks %s", code, part)
				}
			}
		}
	}
	for code := range sections {
		t.Errorf("a section for %s, which is no code", code)
	}
}
