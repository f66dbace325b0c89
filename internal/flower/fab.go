package flower

import (
	"archive/zip"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/pergolafl/pergola/internal/problem"
)

// maxFAB is FAB_MAX_SIZE of flwr/common/constant.py: superlinks from about 1.23 on refuse more.
const maxFAB = 10 << 20

// What goes into a FAB: FAB_INCLUDE_PATTERNS and FAB_EXCLUDE_PATTERNS of flwr/common/constant.py,
// 1.30 and 1.41. Generations up to 1.21 take .py, .toml and .md only and exclude less; what they leave
// out is harmless there.
var (
	fabInclude = ignoreRules("**/*.py", "**/*.toml", "**/*.md", "**/*.yaml", "**/*.yml", "**/*.json", "**/*.jsonl", "/LICENSE")
	fabExclude = ignoreRules(".flwr/**", "**/__pycache__/**", "build/**", "eggs/**", ".eggs/**", "lib/**", "lib64/**", "parts/**",
		"*.egg", ".venv/**", "env/**", "venv/**", "ENV/**", "env.bak/**", "venv.bak/**")
	fabExcludeTests = ignoreRules("**/*_test.py", "**/test_*.py") // not excluded up to 1.21
)

// fabDate is FAB_DATE: the same files give the same FAB.
var fabDate = time.Date(2024, 10, 1, 0, 0, 0, 0, time.UTC)

// buildFAB makes the Flower app bundle of a staged app, as `flwr build` does: a zip file with
// pyproject.toml first, the other files in order, and .info/CONTENT with "path,sha256,bits" of each.
// .gitignore of the top directory and [tool.flwr.app] fab-include and fab-exclude are honoured.
func buildFAB(dir string, gen Generation) (content []byte, hash string, err error) {
	pyproject, err := readText(filepath.Join(dir, "pyproject.toml"))
	if err != nil {
		return nil, "", problem.Wrap(err, problem.AppInvalid, "stage the app first", "the staged app has no pyproject.toml")
	}
	var doc map[string]any
	if err := toml.Unmarshal(pyproject, &doc); err != nil {
		return nil, "", tomlProblem(filepath.Join(dir, "pyproject.toml"), err)
	}
	var ignored rules
	if raw, err := os.ReadFile(filepath.Join(dir, ".gitignore")); err == nil {
		ignored = ignoreRules(strings.Split(string(raw), "\n")...)
	}
	include := patternList(lookup(doc, "tool.flwr.app.fab-include"))
	exclude := patternList(lookup(doc, "tool.flwr.app.fab-exclude"))

	var names []string
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		rel = filepath.ToSlash(rel)
		if d.IsDir() {
			if skipDirs[d.Name()] {
				return filepath.SkipDir
			}
			return nil
		}
		switch {
		case !isFile(path): // a link to nowhere or to a directory
			return nil
		case rel == "pyproject.toml", ignored.match(rel), include != nil && !include.match(rel), exclude.match(rel),
			!fabInclude.match(rel), fabExclude.match(rel), gen >= GenControl && fabExcludeTests.match(rel):
			return nil
		}
		names = append(names, rel)
		return nil
	})
	if err != nil {
		return nil, "", problem.Wrap(err, codeOf(err), "make the app's files readable", "the app's files could not be read")
	}
	slices.Sort(names)

	var out bytes.Buffer
	z := zip.NewWriter(&out)
	add := func(name string, data []byte) error {
		w, err := z.CreateHeader(&zip.FileHeader{Name: name, Method: zip.Deflate, Modified: fabDate})
		if err != nil {
			return err
		}
		_, err = w.Write(data)
		return err
	}
	var manifest []string
	for _, name := range append([]string{"pyproject.toml"}, names...) {
		data, err := os.ReadFile(filepath.Join(dir, filepath.FromSlash(name)))
		if err != nil {
			return nil, "", problem.Wrap(err, codeOf(err), "make the app's files readable", "the app's files could not be read")
		}
		if err := add(name, data); err != nil {
			return nil, "", fmt.Errorf("build the app bundle: %w", err)
		}
		sum := sha256.Sum256(data)
		manifest = append(manifest, fmt.Sprintf("%s,%s,%d", name, hex.EncodeToString(sum[:]), len(data)*8))
	}
	if err := add(".info/CONTENT", []byte(strings.Join(manifest, "\n"))); err != nil {
		return nil, "", fmt.Errorf("build the app bundle: %w", err)
	}
	if err := z.Close(); err != nil {
		return nil, "", fmt.Errorf("build the app bundle: %w", err)
	}
	if out.Len() > maxFAB {
		return nil, "", problem.New(problem.AppInvalid, "narrow it by fab-exclude patterns in [tool.flwr.app], or by .gitignore",
			"the app's code is %d bytes when packed; Flower takes at most %d", out.Len(), maxFAB)
	}
	sum := sha256.Sum256(out.Bytes())
	return out.Bytes(), hex.EncodeToString(sum[:]), nil
}

// isFile tells whether path is a regular file or a link to one.
func isFile(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular()
}

func patternList(v any) rules {
	list, ok := v.([]any)
	if !ok {
		return nil
	}
	var lines []string
	for _, p := range list {
		lines = append(lines, fmt.Sprint(p))
	}
	return ignoreRules(lines...)
}

// rules are gitignore patterns, matched against slash-separated relative file names.
type rules []rule

type rule struct {
	re   *regexp.Regexp
	take bool // false for "!pattern"
}

// match tells whether the last pattern that fits name takes it.
func (rs rules) match(name string) bool {
	for i := len(rs) - 1; i >= 0; i-- {
		if rs[i].re.MatchString(name) {
			return rs[i].take
		}
	}
	return false
}

// ignoreRules reads the lines of a .gitignore file (gitignore(5)); lines that are no pattern are skipped.
func ignoreRules(lines ...string) rules {
	var out rules
	for _, line := range lines {
		line = strings.TrimRight(line, "\r\n \t")
		if line == "" || line[0] == '#' {
			continue
		}
		r := rule{take: true}
		if line[0] == '!' {
			r.take, line = false, line[1:]
		}
		line = strings.TrimPrefix(line, `\`)
		dir := strings.HasSuffix(line, "/")
		line = strings.TrimSuffix(line, "/")
		anchored := strings.Contains(line, "/")
		line = strings.TrimPrefix(line, "/")
		if line == "" {
			continue
		}
		expr := "^"
		if !anchored {
			expr += "(?:.*/)?"
		}
		expr += globExpr(line)
		// What matches a directory takes all below it.
		if dir {
			expr += "/.*$"
		} else {
			expr += "(?:/.*)?$"
		}
		re, err := regexp.Compile(expr)
		if err != nil {
			continue
		}
		r.re = re
		out = append(out, r)
	}
	return out
}

func globExpr(p string) string {
	var b strings.Builder
	for i := 0; i < len(p); {
		switch {
		case strings.HasPrefix(p[i:], "**/") && (i == 0 || p[i-1] == '/'):
			b.WriteString("(?:.*/)?")
			i += 3
		case p[i:] == "**" && (i == 0 || p[i-1] == '/'):
			b.WriteString(".*")
			i += 2
		case p[i] == '*':
			b.WriteString("[^/]*")
			i++
		case p[i] == '?':
			b.WriteString("[^/]")
			i++
		case p[i] == '[':
			if end := strings.IndexByte(p[i+1:], ']'); end > 0 {
				class := strings.ReplaceAll(p[i+1:i+1+end], `\`, `\\`)
				if class[0] == '!' {
					class = "^" + class[1:]
				}
				b.WriteString("[" + class + "]")
				i += end + 2
				continue
			}
			b.WriteString(`\[`)
			i++
		case p[i] == '\\' && i+1 < len(p):
			b.WriteString(regexp.QuoteMeta(p[i+1 : i+2]))
			i += 2
		default:
			b.WriteString(regexp.QuoteMeta(p[i : i+1]))
			i++
		}
	}
	return b.String()
}

// codeOf is the code for a failed file operation on the app.
func codeOf(err error) problem.Code {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return problem.DiskFull
	}
	return problem.AppInvalid
}
