package arch

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var (
	namedTest  = regexp.MustCompile("`(Test[A-Z][A-Za-z0-9]*)`")
	testFunc   = regexp.MustCompile(`(?m)^func (Test[A-Z][A-Za-z0-9]*)\(`)
	namedFile  = regexp.MustCompile(`\]\(([A-Za-z0-9./_-]+\.md)(#[a-z0-9-]*)?\)`)
	skippedDir = map[string]bool{".git": true, ".cache": true, "bin": true, "pergola-runs": true}
)

// What the pages say is shown by tests is shown by tests that are there, and their links lead somewhere.
func TestPagesNameWhatIsThere(t *testing.T) {
	have := map[string]bool{}
	var pages []string
	err := filepath.WalkDir("../..", func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir():
			if skippedDir[d.Name()] {
				return filepath.SkipDir
			}
		case strings.HasSuffix(path, ".md"):
			pages = append(pages, path)
		case strings.HasSuffix(path, "_test.go"):
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			for _, m := range testFunc.FindAllSubmatch(b, -1) {
				have[string(m[1])] = true
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	named := 0
	for _, page := range pages {
		b, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range namedTest.FindAllSubmatch(b, -1) {
			if named++; !have[string(m[1])] {
				t.Errorf("%s names %s, which is not there", page, m[1])
			}
		}
		for _, m := range namedFile.FindAllSubmatch(b, -1) {
			if _, err := os.Stat(filepath.Join(filepath.Dir(page), string(m[1]))); err != nil {
				t.Errorf("%s links to %s: %v", page, m[1], err)
			}
		}
	}
	if named == 0 || len(pages) == 0 {
		t.Error("no page names any test: the test looks in the wrong place")
	}
}
