package flower

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"github.com/pergolafl/pergola/internal/problem"
)

// Style is how an app's directory tells what the app is.
type Style string

// Styles, newest first.
const (
	StyleNew        Style = "new"        // [tool.flwr.app] (flwr 1.11 and on)
	StyleComponents Style = "components" // [tool.flwr.components] or [flower.components] (flwr 1.8 – 1.10)
	StyleModules    Style = "modules"    // server.py and client.py with an `app` each, no such table
)

// Limits of what is read of an app; a pyproject.toml or requirements.txt is a few kB.
const maxText = 1 << 20

// App is a Flower app as its directory describes it.
type App struct {
	Dir            string
	Name           string
	Version        string
	Publisher      string
	ServerApp      string // "package.module:attribute"
	ClientApp      string
	Dependencies   []string // as in [project], [tool.poetry.dependencies] or requirements.txt
	RequiresPython string   // as in [project]; "" is any
	Config         map[string]any
	Style          Style
	Pyproject      []byte // as read; nil where there is none

	doc map[string]any // Pyproject parsed
}

const appHelp = "see https://flower.ai/docs/framework/how-to-configure-pyproject-toml.html, or copy examples/quickstart"

// LoadApp reads the app in dir and checks what Flower's programs would trip over later. Config is
// flattened as Flower does it ({a: {b: 1}} is "a.b"). Errors have the code app-invalid and name the
// file, the line and the key.
func LoadApp(dir string) (*App, error) {
	info, err := os.Stat(dir)
	if err != nil {
		return nil, problem.Wrap(err, problem.AppInvalid, "give the directory of a Flower app", "%s cannot be read", dir)
	}
	if !info.IsDir() {
		return nil, problem.New(problem.AppInvalid, "give the directory that pyproject.toml is in", "%s is a file, not the directory of a Flower app", dir)
	}
	a := &App{Dir: dir}
	path := filepath.Join(dir, "pyproject.toml")
	raw, err := readText(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		if !a.isModules() {
			return nil, problem.New(problem.AppInvalid, appHelp, "%s is no Flower app: it has neither pyproject.toml nor server.py and client.py", dir)
		}
		return a, a.loadModules()
	case err != nil:
		return nil, err
	}
	a.Pyproject = raw
	if err := toml.Unmarshal(raw, &a.doc); err != nil {
		return nil, tomlProblem(path, err)
	}
	return a, a.load(path)
}

// isModules tells whether the directory has the server.py and client.py of the modules style.
func (a *App) isModules() bool {
	for _, name := range []string{"server.py", "client.py"} {
		if info, err := os.Stat(filepath.Join(a.Dir, name)); err != nil || !info.Mode().IsRegular() {
			return false
		}
	}
	return true
}

func (a *App) loadModules() error {
	a.Style, a.ServerApp, a.ClientApp = StyleModules, "server:app", "client:app"
	a.Name = nameOf(filepath.Base(absolute(a.Dir)))
	a.Version, a.Publisher, a.Config = "0.0.0", defaultPublisher, map[string]any{}
	raw, err := readText(filepath.Join(a.Dir, "requirements.txt"))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(raw)) {
		line, _, _ = strings.Cut(line, " #")
		if line = strings.TrimSpace(line); line != "" && line[0] != '#' && line[0] != '-' {
			a.Dependencies = append(a.Dependencies, line)
		}
	}
	return nil
}

const defaultPublisher = "pergola"

func (a *App) load(path string) error {
	bad := func(key, next, format string, args ...any) error {
		return problem.New(problem.AppInvalid, next, "%s: %s", a.at(path, key), fmt.Sprintf(format, args...))
	}
	var (
		components map[string]any
		where      string
	)
	for _, place := range []struct {
		key   string
		style Style
	}{{"tool.flwr.app.components", StyleNew}, {"tool.flwr.components", StyleComponents}, {"flower.components", StyleComponents}} {
		if t, ok := lookup(a.doc, place.key).(map[string]any); ok {
			components, where, a.Style = t, place.key, place.style
			break
		}
	}
	_, hasFlwr := lookup(a.doc, "tool.flwr").(map[string]any)
	switch {
	case components != nil:
	case a.isModules() && lookup(a.doc, "tool.flwr.app") == nil:
		if err := a.loadModules(); err != nil {
			return err
		}
	case !hasFlwr:
		return bad("", appHelp, "this is no Flower app: the table [tool.flwr.app] is missing")
	default:
		return bad("tool.flwr", `add [tool.flwr.app.components] with serverapp = "package.module:app" and clientapp = "package.module:app"`,
			"[tool.flwr.app.components] is missing")
	}

	project, _ := a.doc["project"].(map[string]any)
	poetry, _ := lookup(a.doc, "tool.poetry").(map[string]any)
	a.Name = firstString(project["name"], poetry["name"], nameOf(filepath.Base(absolute(a.Dir))))
	a.Version = firstString(project["version"], poetry["version"], "0.0.0")
	a.Publisher = firstString(lookup(a.doc, "tool.flwr.app.publisher"), lookup(a.doc, "tool.flwr.publisher"), lookup(a.doc, "flower.publisher"), defaultPublisher)
	a.RequiresPython = firstString(project["requires-python"])
	if err := a.dependencies(project, poetry, bad); err != nil {
		return err
	}

	if components != nil {
		for _, c := range []struct {
			key string
			to  *string
		}{{"serverapp", &a.ServerApp}, {"clientapp", &a.ClientApp}} {
			ref, ok := components[c.key]
			if !ok {
				return bad(where, fmt.Sprintf(`add %s = "package.module:app"`, c.key), "%s is missing in [%s]", c.key, where)
			}
			s, ok := ref.(string)
			if !ok || !refForm.MatchString(s) {
				return bad(where+"."+c.key, `write it as "package.module:attribute"`, "%s = %q does not name a module and its attribute", c.key, fmt.Sprint(ref))
			}
			*c.to = s
			if missing := a.missingModule(s); missing != "" {
				return bad(where+"."+c.key, "create the file, or correct the name", "%s = %q: there is no %s", c.key, s, missing)
			}
		}
	}

	config := lookup(a.doc, "tool.flwr.app.config")
	table, isTable := config.(map[string]any)
	if config != nil && !isTable {
		return bad("tool.flwr.app.config", "make it a table", "tool.flwr.app.config is not a table")
	}
	a.Config = map[string]any{}
	if key := flatten(table, "", a.Config); key != "" {
		return bad("tool.flwr.app.config."+key, "use text, a number, true or false, or a table of those",
			"the run config value of %q is of a type that Flower does not pass on (%s)", key, kindOf(lookup(table, key)))
	}
	return nil
}

func (a *App) dependencies(project, poetry map[string]any, bad func(key, next, format string, args ...any) error) error {
	if deps, ok := project["dependencies"]; ok {
		list, ok := deps.([]any)
		if !ok {
			return bad("project.dependencies", `write it as ["flwr>=1.21", "numpy"]`, "dependencies is not a list")
		}
		for _, d := range list {
			s, ok := d.(string)
			if !ok {
				return bad("project.dependencies", "write each dependency as text", "dependencies has an entry that is not text")
			}
			a.Dependencies = append(a.Dependencies, s)
		}
		return nil
	}
	deps, _ := poetry["dependencies"].(map[string]any)
	for _, name := range slices.Sorted(maps.Keys(deps)) {
		version, extras, required := "", "", true
		switch d := deps[name].(type) {
		case string:
			version = d
		case map[string]any:
			version, _ = d["version"].(string)
			if optional, _ := d["optional"].(bool); optional {
				required = false
			}
			if list, ok := d["extras"].([]any); ok {
				var names []string
				for _, e := range list {
					names = append(names, fmt.Sprint(e))
				}
				extras = "[" + strings.Join(names, ",") + "]"
			}
		}
		switch {
		case name == "python":
			a.RequiresPython = poetryRange(version)
		case required:
			a.Dependencies = append(a.Dependencies, name+extras+poetryRange(version))
		}
	}
	return nil
}

// poetryRange turns Poetry's version notation into the standard one (PEP 440): "^1.2" is
// ">=1.2,<2", "~1.2" is ">=1.2,<1.3", "1.2" is "==1.2", "*" is nothing.
// Source: https://python-poetry.org/docs/dependency-specification/
func poetryRange(s string) string {
	var out []string
	for part := range strings.SplitSeq(s, ",") {
		part = strings.TrimSpace(part)
		switch {
		case part == "" || part == "*":
		case part[0] == '^' || (part[0] == '~' && !strings.HasPrefix(part, "~=")):
			v := strings.TrimSpace(part[1:])
			out = append(out, ">="+v)
			if upper := nextRelease(v, part[0] == '^'); upper != "" {
				out = append(out, "<"+upper)
			}
		case part[0] >= '0' && part[0] <= '9':
			out = append(out, "=="+part)
		default:
			out = append(out, strings.ReplaceAll(part, " ", ""))
		}
	}
	return strings.Join(out, ",")
}

// nextRelease is the first release that "^v" (caret) or "~v" leaves out, "" if v is not plain numbers.
func nextRelease(v string, caret bool) string {
	var n []int
	for part := range strings.SplitSeq(v, ".") {
		x, err := strconv.Atoi(part)
		if err != nil {
			return ""
		}
		n = append(n, x)
	}
	at := min(1, len(n)-1)
	if caret {
		at = slices.IndexFunc(n, func(x int) bool { return x != 0 })
		if at < 0 {
			at = len(n) - 1
		}
	}
	n = n[:at+1]
	n[at]++
	parts := make([]string, len(n))
	for i, x := range n {
		parts[i] = strconv.Itoa(x)
	}
	return strings.Join(parts, ".")
}

var refForm = regexp.MustCompile(`^[\pL_][\pL\pN_]*(\.[\pL_][\pL\pN_]*)*:[\pL_][\pL\pN_]*(\.[\pL_][\pL\pN_]*)*$`)

// missingModule gives the file that ref's module should be in, or "" if it is there, or if the module
// may come from a dependency instead of the app's directory.
func (a *App) missingModule(ref string) string {
	module, _, _ := strings.Cut(ref, ":")
	parts := strings.Split(module, ".")
	for _, d := range a.Dependencies {
		if nameOf(requirementName(d)) == nameOf(parts[0]) {
			return ""
		}
	}
	file := filepath.Join(parts...)
	for _, name := range []string{file + ".py", filepath.Join(file, "__init__.py")} {
		if info, err := os.Stat(filepath.Join(a.Dir, name)); err == nil && info.Mode().IsRegular() {
			return ""
		}
	}
	return file + ".py"
}

// requirementName is the package's name in a requirement such as "flwr[simulation]>=1.9".
func requirementName(req string) string {
	if i := strings.IndexAny(req, " \t[<>=!~;@("); i >= 0 {
		return req[:i]
	}
	return req
}

// Override merges run-config overrides into the app's configuration. Each entry holds one or more
// "key=value" pairs, whose values are TOML (a bare word is refused, as Flower does), or names a TOML
// file, relative to the current directory. Keys must exist in the app's [tool.flwr.app.config], as
// Flower demands. Errors have the code usage.
func (a *App) Override(overrides []string) error {
	values, err := ParseRunConfig(overrides)
	if err != nil {
		return err
	}
	for _, key := range slices.Sorted(maps.Keys(values)) {
		if _, ok := a.Config[key]; !ok {
			return unknownKey(key, a.Config)
		}
		a.Config[key] = values[key]
	}
	return nil
}

func unknownKey(key string, config map[string]any) error {
	known := slices.Sorted(maps.Keys(config))
	next := "the app has no [tool.flwr.app.config]"
	if len(known) > 0 {
		next = "the app knows " + strings.Join(known, ", ")
	}
	return problem.New(problem.Usage, next, "the app has no run config key %q%s", key, problem.DidYouMean(key, known))
}

// pairForm is flwr's own (flwr/common/config.py, parse_config_args, 1.12 – 1.41).
var pairForm = regexp.MustCompile(`(\S+?)=('[^']*'|"[^"]*"|\S+)`)

// ParseRunConfig parses overrides as `flwr run --run-config` does: entries of space-separated
// "key=value" pairs, or one name of a TOML file. The result is flat.
func ParseRunConfig(overrides []string) (map[string]any, error) {
	out := map[string]any{}
	for _, entry := range overrides {
		if strings.TrimSpace(entry) == "" {
			continue
		}
		var doc map[string]any
		if strings.HasSuffix(entry, ".toml") && !strings.Contains(entry, "=") {
			raw, err := readText(entry)
			if err != nil {
				return nil, problem.Wrap(err, problem.Usage, "check the file's name", "the run config file %s cannot be read", entry)
			}
			if err := toml.Unmarshal(raw, &doc); err != nil {
				p := tomlProblem(entry, err)
				p.Code = problem.Usage
				return nil, p
			}
		} else {
			const next = `write pairs as key=value with TOML values: --run-config 'rounds=3 name="x" fast=true'`
			if rest := strings.TrimSpace(pairForm.ReplaceAllString(entry, "")); rest != "" {
				return nil, problem.New(problem.Usage, next, "the run config %q is not made of key=value pairs (see %q)", entry, rest)
			}
			var lines strings.Builder
			for _, m := range pairForm.FindAllStringSubmatch(entry, -1) {
				fmt.Fprintf(&lines, "%s = %s\n", m[1], m[2])
			}
			if err := toml.Unmarshal([]byte(lines.String()), &doc); err != nil {
				return nil, problem.Wrap(err, problem.Usage, next, "the run config %q has a value that is not TOML; text needs quotes", entry)
			}
		}
		if key := flatten(doc, "", out); key != "" {
			return nil, problem.New(problem.Usage, "use text, a number, true or false", "the run config value of %q is %s", key, kindOf(lookup(doc, key)))
		}
	}
	return out, nil
}

// flatten puts the leaves of in below their dotted keys into out, and gives the first key, in order,
// whose value Flower does not accept (flwr/common/config.py, flatten_dict), or "".
func flatten(in map[string]any, prefix string, out map[string]any) string {
	for _, k := range slices.Sorted(maps.Keys(in)) {
		key := prefix + k
		switch v := in[k].(type) {
		case map[string]any:
			if bad := flatten(v, key+".", out); bad != "" {
				return bad
			}
		case string, int64, float64, bool:
			out[key] = v
		default:
			return key
		}
	}
	return ""
}

func kindOf(v any) string {
	switch v.(type) {
	case []any:
		return "a list"
	case map[string]any:
		return "a table"
	case nil:
		return "nothing"
	}
	return "a date or time"
}

// lookup finds a dotted key in nested tables; a flat key with dots in it is found too.
func lookup(doc map[string]any, key string) any {
	if v, ok := doc[key]; ok {
		return v
	}
	for i := range len(key) {
		if key[i] != '.' {
			continue
		}
		if t, ok := doc[key[:i]].(map[string]any); ok {
			if v := lookup(t, key[i+1:]); v != nil {
				return v
			}
		}
	}
	return nil
}

func firstString(values ...any) string {
	for _, v := range values {
		if s, ok := v.(string); ok && strings.TrimSpace(s) != "" {
			return strings.TrimSpace(s)
		}
	}
	return ""
}

// maxName is MAX_NAME_LENGTH of flwr/supercore/constant.py (1.30, 1.41).
const maxName = 32

// nameOf makes s a name that every generation of Flower takes: letters, digits and hyphens, a letter first.
func nameOf(s string) string {
	s = strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9':
			return r
		}
		return '-'
	}, s)
	s = strings.Trim(s, "-")
	if s == "" || s[0] >= '0' && s[0] <= '9' {
		s = "app-" + s
	}
	return strings.Trim(s[:min(len(s), maxName)], "-")
}

func absolute(dir string) string {
	if abs, err := filepath.Abs(dir); err == nil {
		return abs
	}
	return dir
}

// at names path, and the line of key in it where that can be told.
func (a *App) at(path, key string) string {
	if line := keyLine(a.Pyproject, key); line > 0 {
		return fmt.Sprintf("%s, line %d", path, line)
	}
	return path
}

var (
	tableForm = regexp.MustCompile(`^\s*\[\[?\s*([^\[\]]+?)\s*\]\]?\s*(#.*)?$`)
	entryForm = regexp.MustCompile(`^\s*([A-Za-z0-9_."' -]+?)\s*=`)
)

// keyLine is the line, from 1, that a dotted key is set in or its table begins in, 0 if unknown. It
// reads lines, not TOML: keys inside of multi-line texts can mislead it, which costs no more than a
// wrong hint.
func keyLine(src []byte, key string) int {
	if key == "" {
		return 0
	}
	plain := strings.NewReplacer(`"`, "", `'`, "", " ", "")
	table, n := "", 0
	for line := range bytes.Lines(src) {
		n++
		text := strings.TrimRight(string(line), "\r\n")
		if m := tableForm.FindStringSubmatch(text); m != nil {
			if table = plain.Replace(m[1]); table == key {
				return n
			}
			continue
		}
		if m := entryForm.FindStringSubmatch(text); m != nil {
			full := plain.Replace(m[1])
			if table != "" {
				full = table + "." + full
			}
			if full == key {
				return n
			}
		}
	}
	// A value deep in an inline table: the line of what holds it.
	if i := strings.LastIndexByte(key, '.'); i > 0 {
		return keyLine(src, key[:i])
	}
	return 0
}

func readText(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, problem.New(problem.AppInvalid, "replace it by a file", "%s is not a file", path)
	}
	if info.Size() > maxText {
		return nil, problem.New(problem.AppInvalid, "is it the right file?", "%s has %d bytes; more than %d are not read", path, info.Size(), maxText)
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, problem.Wrap(err, problem.AppInvalid, "make it readable", "%s cannot be read", path)
	}
	return raw, nil
}

func tomlProblem(path string, err error) *problem.Error {
	const next = "correct the TOML; https://toml.io/en/v1.0.0 has the rules"
	if d, ok := errors.AsType[*toml.DecodeError](err); ok {
		line, column := d.Position()
		return problem.New(problem.AppInvalid, next, "%s, line %d, column %d: %s", path, line, column, strings.TrimPrefix(d.Error(), "toml: "))
	}
	return problem.Wrap(err, problem.AppInvalid, next, "%s is not TOML", path)
}
