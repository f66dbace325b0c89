package job

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"

	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/proc"
)

// MaxPyproject is the largest pyproject.toml in bytes that is read. Real ones have a few KiB; the
// parser holds the whole in memory and finds lines by scanning.
const MaxPyproject = 1 << 20

// ParseSpec reads [tool.pergola] of a pyproject.toml; file is its name for messages. The rest of
// the file has to be TOML and is otherwise left alone. No table is an empty Spec; defaults are
// not filled in, so that flags can tell what the file says. An unknown key, a wrong type, a bad
// duration or a bad name is a *problem.Error with the code usage that names file, line and key.
func ParseSpec(pyproject []byte, file string) (Spec, error) {
	if len(pyproject) > MaxPyproject {
		return Spec{}, problem.New(problem.Usage, "move data out of it", "%s is larger than %d bytes", file, MaxPyproject)
	}
	var doc struct {
		Tool map[string]any `toml:"tool"`
	}
	if err := toml.Unmarshal(pyproject, &doc); err != nil {
		return Spec{}, syntaxProblem(err, file)
	}
	p := &specReader{file: file, lines: keyLines(pyproject)}
	var s Spec
	if v, ok := doc.Tool["pergola"]; ok {
		if table, isTable := v.(map[string]any); isTable {
			p.table(nil, table, reflect.ValueOf(&s).Elem())
		} else {
			p.fault(nil, "[tool.pergola] has to be a table, not "+tomlType(v), "begin it with [tool.pergola]")
		}
	}
	p.found = append(p.found, s.faults()...)
	// Only the file itself can be inconsistent here: flags may name other sites later.
	if len(s.Sites) > 0 {
		for _, name := range slices.Sorted(maps.Keys(s.Site.Named)) {
			if !slices.Contains(s.Sites, name) {
				p.fault([]string{"site", name}, fmt.Sprintf("site %q is not among the job's sites", name)+problem.DidYouMean(name, s.Sites),
					"name it in sites too, or remove its table")
			}
		}
	}
	if len(p.found) == 0 {
		return s, nil
	}
	first := slices.MinFunc(p.found, func(a, b fault) int { return cmp.Compare(p.line(a.key), p.line(b.key)) })
	return Spec{}, problem.New(problem.Usage, first.next, "%s:%d: %s: %s", file, p.line(first.key),
		strings.Join(append([]string{"tool.pergola"}, first.key...), "."), first.msg)
}

func syntaxProblem(err error, file string) error {
	var de *toml.DecodeError
	if errors.As(err, &de) {
		row, col := de.Position()
		return problem.New(problem.Usage, "correct the file", "%s:%d:%d: %s", file, row, col, strings.TrimPrefix(de.Error(), "toml: "))
	}
	return problem.New(problem.Usage, "correct the file", "%s: %s", file, strings.TrimPrefix(err.Error(), "toml: "))
}

// specReader turns the generic form of the table into a Spec by the TOML names of its fields, and
// collects what is wrong. go-toml's own strict mode judges the whole file, of which only one table
// is ours, and cannot mix known keys with tables named by sites.
type specReader struct {
	file  string
	lines map[string]int
	found []fault
}

func (p *specReader) fault(key []string, msg, next string) {
	p.found = append(p.found, fault{slices.Clone(key), msg, next})
}

// line gives the line of a key, or of the nearest table around it that has one.
func (p *specReader) line(key []string) int {
	full := append([]string{"tool", "pergola"}, key...)
	for n := len(full); n > 0; n-- {
		if l, ok := p.lines[lineKey(full[:n])]; ok {
			return l
		}
	}
	return 1
}

var (
	durationType = reflect.TypeFor[Duration]()
	sizeType     = reflect.TypeFor[Size]()
)

func (p *specReader) table(at []string, table map[string]any, dst reflect.Value) {
	fields := map[string]reflect.Value{}
	for i := range dst.NumField() {
		if name := dst.Type().Field(i).Tag.Get("toml"); name != "-" {
			fields[name] = dst.Field(i)
		}
	}
	for _, k := range slices.Sorted(maps.Keys(table)) {
		key := append(slices.Clone(at), k)
		if f, ok := fields[k]; ok {
			p.value(key, table[k], f)
			continue
		}
		if sub, ok := table[k].(map[string]any); ok && len(at) == 1 { // a site's own table has no sites
			if all, ok := dst.Addr().Interface().(*Site); ok {
				p.site(key, sub, all)
				continue
			}
		}
		known := slices.Sorted(maps.Keys(fields))
		p.fault(key, "there is no such key"+problem.DidYouMean(k, known), "the keys here are "+strings.Join(known, ", "))
	}
}

// site reads [tool.pergola.site.NAME].
func (p *specReader) site(key []string, table map[string]any, all *Site) {
	name := key[len(key)-1]
	// `ndoe-config = {…}` is a slip in a key, not a site: no table of a site looks like that.
	if near := problem.Nearest(name, siteKeys); near != "" && !hasSiteKeys(table) {
		p.fault(key, fmt.Sprintf("there is no such key; did you mean %q?", near), "the keys here are "+strings.Join(siteKeys, ", ")+" and the names of sites")
		return
	}
	var one Site
	p.table(key, table, reflect.ValueOf(&one).Elem())
	if all.Named == nil {
		all.Named = map[string]Site{}
	}
	all.Named[name] = one
}

// siteKeys are the keys of [tool.pergola.site], which no site can be called.
var siteKeys = tomlKeys(reflect.TypeFor[Site]())

func tomlKeys(t reflect.Type) []string {
	var out []string
	for i := range t.NumField() {
		if name := t.Field(i).Tag.Get("toml"); name != "-" {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

func hasSiteKeys(table map[string]any) bool {
	_, env := table["env"].(map[string]any)
	_, cfg := table["node-config"].(map[string]any)
	_, restarts := table["restarts"]
	_, app := table["app-path"].(string)
	_, res := table["resources"].(map[string]any)
	return env || cfg || restarts || app || res || len(table) == 0
}

func (p *specReader) value(key []string, v any, dst reflect.Value) {
	wrong := func(want, next string) {
		p.fault(key, fmt.Sprintf("this is %s, and has to be %s", tomlType(v), want), next)
	}
	if dst.Type() == durationType {
		s, ok := v.(string)
		if !ok {
			wrong("a duration in quotes", durationRule)
			return
		}
		d, err := ParseDuration(s)
		if err != nil {
			e := problem.From(err)
			p.fault(key, e.Msg, e.Next)
			return
		}
		dst.SetInt(int64(d))
		return
	}
	if dst.Type() == sizeType {
		s, ok := v.(string)
		if !ok {
			wrong("a size in quotes", limitRule)
			return
		}
		n, err := ParseLimit(s)
		if err != nil {
			e := problem.From(err)
			p.fault(key, e.Msg, e.Next)
			return
		}
		dst.SetInt(int64(n))
		return
	}
	switch dst.Interface().(type) {
	case string:
		if s, ok := v.(string); ok {
			dst.SetString(s)
		} else {
			wrong("a string", "put it in quotes")
		}
	case int:
		if i, ok := v.(int64); !ok {
			wrong("a whole number", "write it without quotes")
		} else if i != int64(int32(i)) {
			p.fault(key, "the number is out of range", "write a smaller one")
		} else {
			dst.SetInt(i)
		}
	case float64:
		switch n := v.(type) {
		case float64:
			dst.SetFloat(n)
		case int64:
			dst.SetFloat(float64(n))
		default:
			wrong("a number", "write it without quotes")
		}
	case bool:
		if b, ok := v.(bool); ok {
			dst.SetBool(b)
		} else {
			wrong("true or false", "write it without quotes")
		}
	case []string:
		if command, ok := v.(string); ok && slices.Equal(key, []string{"server", "args"}) {
			// A command line in one string, as the reference system has it: cut as a shell would, without one.
			words, err := proc.Split(command)
			if err != nil {
				e := problem.From(err)
				p.fault(key, e.Msg, e.Next)
				return
			}
			dst.Set(reflect.ValueOf(words))
			return
		}
		list, ok := v.([]any)
		if !ok {
			wrong("a list of strings", `write it like ["a", "b"]`)
			return
		}
		out := make([]string, 0, len(list))
		for _, e := range list {
			s, ok := e.(string)
			if !ok {
				p.fault(key, "the list holds "+tomlType(e)+", and may hold strings only", `write it like ["a", "b"]`)
				return
			}
			out = append(out, s)
		}
		dst.Set(reflect.ValueOf(out))
	case map[string]string:
		table, ok := v.(map[string]any)
		if !ok {
			wrong("a table of strings", `write it like { NAME = "value" }`)
			return
		}
		out := make(map[string]string, len(table))
		for _, k := range slices.Sorted(maps.Keys(table)) {
			s, ok := table[k].(string)
			if !ok {
				p.fault(append(slices.Clone(key), k), fmt.Sprintf("this is %s, and has to be a string", tomlType(table[k])), "put it in quotes")
				continue
			}
			out[k] = s
		}
		dst.Set(reflect.ValueOf(out))
	case NodeConfig:
		table, ok := v.(map[string]any)
		if !ok {
			wrong("a table", `write it like { partition-id = 0 }`)
			return
		}
		dst.Set(reflect.ValueOf(NodeConfig(table))) // its values are judged by Site.faults
	case Resources:
		table, ok := v.(map[string]any)
		if !ok {
			wrong("a table", `write it like { cpus = 2, memory = "4GiB" }`)
			return
		}
		out := make(Resources, len(table))
		for _, k := range slices.Sorted(maps.Keys(table)) {
			n, msg, next := ParseAmount(k, table[k])
			if msg != "" {
				p.fault(append(slices.Clone(key), k), msg, next)
				continue
			}
			out[k] = n
		}
		dst.Set(reflect.ValueOf(out))
	default:
		table, ok := v.(map[string]any)
		if !ok {
			wrong("a table", "begin it with [tool.pergola."+strings.Join(key, ".")+"]")
			return
		}
		p.table(key, table, dst)
	}
}

func tomlType(v any) string {
	switch v.(type) {
	case string:
		return "a string"
	case int64:
		return "a whole number"
	case float64:
		return "a fraction"
	case bool:
		return "a boolean"
	case []any:
		return "a list"
	case map[string]any:
		return "a table"
	}
	return "a date or time"
}

func lineKey(key []string) string { return strings.Join(key, "\x00") }

// keyLines gives the line on which each key and table stands that is within [tool.pergola].
// The document has been parsed before, so errors do not come up here.
func keyLines(doc []byte) map[string]int {
	x := lineIndex{lines: map[string]int{}}
	for i, c := range doc {
		if c == '\n' {
			x.ends = append(x.ends, i)
		}
	}
	var p unstable.Parser
	p.Reset(doc)
	var table []string
	for p.NextExpression() {
		e := p.Expression()
		switch e.Kind {
		case unstable.Table, unstable.ArrayTable:
			table = x.note(nil, e.Key())
		case unstable.KeyValue:
			x.noteKeyValue(table, e)
		}
	}
	return x.lines
}

type lineIndex struct {
	ends  []int // offsets of the line feeds
	lines map[string]int
}

// note enters a dotted key below the table at and gives its full path.
func (x *lineIndex) note(at []string, it unstable.Iterator) []string {
	full := slices.Clone(at)
	for it.Next() {
		full = append(full, string(it.Node().Data))
		if len(full) < 2 || full[0] != "tool" || full[1] != "pergola" {
			continue
		}
		if k := lineKey(full); x.lines[k] == 0 {
			before, _ := slices.BinarySearch(x.ends, int(it.Node().Raw.Offset))
			x.lines[k] = before + 1
		}
	}
	return full
}

func (x *lineIndex) noteKeyValue(at []string, kv *unstable.Node) {
	full := x.note(at, kv.Key())
	if v := kv.Value(); v.Kind == unstable.InlineTable {
		for it := v.Children(); it.Next(); {
			if it.Node().Kind == unstable.KeyValue {
				x.noteKeyValue(full, it.Node())
			}
		}
	}
}
