package nvflare

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/pergolafl/pergola/internal/problem"
)

// What is read of a configuration: a real one has a few kB and is not ten levels deep.
const (
	maxConfig = 1 << 20 // bytes
	maxDepth  = 64
)

// kind is what a value is.
type kind int

const (
	kindNull kind = iota
	kindBool
	kindInt
	kindFloat
	kindString
	kindList
	kindObject
)

func (k kind) String() string {
	return [...]string{"nothing", "true or false", "a whole number", "a fraction", "text", "a list", "an object"}[k]
}

// node is a value of a configuration, with the line on which it begins.
type node struct {
	line int
	kind kind
	b    bool
	i    int64
	f    float64
	s    string
	list []*node
	keys []string // of obj, in the file's order
	obj  map[string]*node
}

func newObject(line int) *node { return &node{line: line, kind: kindObject, obj: map[string]*node{}} }

// get gives the value of a key, nil if it is not there.
func (n *node) get(key string) *node {
	if n == nil || n.kind != kindObject {
		return nil
	}
	return n.obj[key]
}

func (n *node) set(key string, v *node) {
	if _, ok := n.obj[key]; !ok {
		n.keys = append(n.keys, key)
	}
	n.obj[key] = v
}

// empty tells whether the value asks for nothing: null, "", {}, [].
func (n *node) empty() bool {
	switch n.kind {
	case kindNull:
		return true
	case kindString:
		return n.s == ""
	case kindList:
		return len(n.list) == 0
	case kindObject:
		return len(n.keys) == 0
	}
	return false
}

// number gives the value of a number.
func (n *node) number() (float64, bool) {
	switch n.kind {
	case kindInt:
		return float64(n.i), true
	case kindFloat:
		return n.f, true
	}
	return 0, false
}

// text gives a value as a person would write it, for messages.
func (n *node) text() string {
	var s string
	switch n.kind {
	case kindNull:
		s = "null"
	case kindBool:
		s = strconv.FormatBool(n.b)
	case kindInt:
		s = strconv.FormatInt(n.i, 10)
	case kindFloat:
		s = strconv.FormatFloat(n.f, 'g', -1, 64)
	case kindString:
		s = strconv.Quote(n.s)
	case kindList:
		parts := make([]string, 0, len(n.list))
		for _, e := range n.list {
			parts = append(parts, e.text())
		}
		s = "[" + strings.Join(parts, ", ") + "]"
	case kindObject:
		parts := make([]string, 0, len(n.keys))
		for _, k := range n.keys {
			parts = append(parts, k+": "+n.obj[k].text())
		}
		s = "{" + strings.Join(parts, ", ") + "}"
	}
	if len(s) > 80 {
		cut := 80
		for !utf8.RuneStart(s[cut]) {
			cut--
		}
		s = s[:cut] + "…"
	}
	return s
}

// file is a configuration that was read.
type file struct {
	path string // for messages
	root *node
}

// fault is a problem with a value: it names the file, the line and the key.
func (f *file) fault(at *node, key, next, format string, args ...any) error {
	line := 1
	if at != nil && at.line > 0 {
		line = at.line
	}
	what := fmt.Sprintf(format, args...)
	if key != "" {
		what = key + ": " + what
	}
	return problem.New(problem.AppInvalid, next, "%s:%d: %s", f.path, line, what)
}

// extensions are the endings of configurations in the order in which NVIDIA FLARE looks for them (ConfigFormat of
// nvflare/fuel/utils/config.py, 2.5 – 2.9).
var extensions = []string{".json", ".conf", ".yml", ".yaml", ".json.default", ".conf.default", ".yml.default", ".yaml.default"}

// find gives the path of the first configuration of that name in dir, "" if there is none.
func find(dir, name string) string {
	for _, ext := range extensions {
		path := filepath.Join(dir, name+ext)
		if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() {
			return path
		}
	}
	return ""
}

// readConfig reads a configuration in the form that its ending says.
func readConfig(path string) (*file, error) {
	info, err := os.Stat(path)
	if err == nil && info.Size() > maxConfig {
		return nil, problem.New(problem.AppInvalid, "is it the right file?", "%s has %d bytes; more than %d are not read", path, info.Size(), maxConfig)
	}
	src, err := os.ReadFile(path)
	if err != nil {
		return nil, problem.Wrap(err, problem.AppInvalid, "make it readable", "%s cannot be read", path)
	}
	return parseConfig(src, path)
}

func parseConfig(src []byte, path string) (*file, error) {
	f := &file{path: path}
	if len(src) > maxConfig {
		return nil, f.fault(nil, "", "is it the right file?", "more than %d bytes are not read", maxConfig)
	}
	if i := invalidUTF8(src); i >= 0 {
		return nil, f.fault(&node{line: lineOf(src, i)}, "", "save it as UTF-8", "it is not UTF-8")
	}
	name := strings.TrimSuffix(filepath.Base(path), ".default")
	var err error
	switch filepath.Ext(name) {
	case ".json":
		err = f.parseJSON(src)
	case ".conf":
		err = f.parseHOCON(src, true)
	default:
		err = f.parseYAML(src)
	}
	if err != nil {
		return nil, err
	}
	return f, nil
}

func invalidUTF8(src []byte) int {
	for i := 0; i < len(src); {
		r, n := utf8.DecodeRune(src[i:])
		if r == utf8.RuneError && n == 1 {
			return i
		}
		i += n
	}
	return -1
}

func lineOf(src []byte, offset int) int {
	return 1 + bytes.Count(src[:min(max(offset, 0), len(src))], []byte{'\n'})
}

// parseJSON takes JSON only: what the reader of HOCON lets pass beyond it was refused before.
func (f *file) parseJSON(src []byte) error {
	d := json.NewDecoder(bytes.NewReader(src))
	var raw json.RawMessage
	err := d.Decode(&raw)
	if err == nil && len(bytes.TrimSpace(src[d.InputOffset():])) > 0 {
		return f.fault(&node{line: lineOf(src, int(d.InputOffset())+1)}, "", "remove it", "something follows the JSON object")
	}
	if err != nil {
		at := len(src)
		if s, ok := errors.AsType[*json.SyntaxError](err); ok {
			at = int(s.Offset) - 1
		}
		return f.fault(&node{line: lineOf(src, at)}, "", "correct the JSON", "it is not JSON (%v)", err)
	}
	return f.parseHOCON(src, false)
}

// parseHOCON reads the part of HOCON (https://github.com/lightbend/config/blob/main/HOCON.md) that configurations of jobs
// are written in: comments, keys without quotes and with dots, "=" or ":" or neither before an object, commas that may be
// left out, texts without quotes and in triple quotes, objects that add to one another. Includes, substitutions and "+=" are
// refused. Where the specification and pyhocon, which NVIDIA FLARE reads with, differ, it is pyhocon that is followed: "//"
// within a word begins no comment. With relaxed off the document is JSON that was checked already: keys have no parts,
// and of two values of one key the last one counts.
func (f *file) parseHOCON(src []byte, relaxed bool) error {
	p := &hocon{file: f, src: src, line: 1, relaxed: relaxed}
	p.space(true)
	var root *node
	var err error
	switch p.peek() {
	case '[':
		return f.fault(&node{line: p.line}, "", "begin it with {", "it is a list, and has to be an object")
	case '{':
		root, err = p.object(0)
		if err == nil {
			p.space(true)
			if !p.done() {
				err = p.fault("remove it, or put it inside", "something follows the closing brace")
			}
		}
	default:
		if !relaxed {
			return f.fault(&node{line: p.line}, "", "begin it with {", "it is no object")
		}
		root = newObject(p.line)
		err = p.fields(root, 0, false)
	}
	f.root = root
	return err
}

type hocon struct {
	file    *file
	src     []byte
	at      int
	line    int
	relaxed bool
}

func (p *hocon) fault(next, format string, args ...any) error {
	return p.file.fault(&node{line: p.line}, "", next, format, args...)
}

func (p *hocon) done() bool { return p.at >= len(p.src) }

// peek gives the next byte, 0 at the end.
func (p *hocon) peek() byte {
	if p.done() {
		return 0
	}
	return p.src[p.at]
}

func (p *hocon) has(s string) bool { return bytes.HasPrefix(p.src[p.at:], []byte(s)) }

// skip goes n bytes on.
func (p *hocon) skip(n int) {
	p.line += bytes.Count(p.src[p.at:p.at+n], []byte{'\n'})
	p.at += n
}

// space skips blanks and comments, line feeds too if told so, and tells whether there was a line feed.
func (p *hocon) space(lines bool) (feed bool) {
	for !p.done() {
		switch c := p.peek(); {
		case c == '\n':
			if !lines {
				return feed
			}
			feed = true
			p.skip(1)
		case c == ' ' || c == '\t' || c == '\r' || c == '\f':
			p.skip(1)
		case p.has("\ufeff"):
			p.skip(len("\ufeff"))
		case p.has("\u00a0"):
			p.skip(len("\u00a0"))
		case p.relaxed && (c == '#' || p.has("//")):
			for !p.done() && p.peek() != '\n' {
				p.skip(1)
			}
		default:
			return feed
		}
	}
	return feed
}

func (p *hocon) object(depth int) (*node, error) {
	if depth > maxDepth {
		return nil, p.fault("flatten it", "objects and lists are more than %d deep", maxDepth)
	}
	o := newObject(p.line)
	p.skip(1)
	return o, p.fields(o, depth, true)
}

// fields reads the fields of an object up to its closing brace, or to the end of the file.
func (p *hocon) fields(o *node, depth int, braces bool) error {
	for first, comma := true, false; ; first = false {
		feed := p.space(true)
		if p.peek() == ',' && !comma && !first {
			comma = true
			p.skip(1)
			continue
		}
		if p.done() {
			if braces {
				return p.file.fault(o, "", "close it with }", "this object has no end")
			}
			return nil
		}
		if p.peek() == '}' && braces {
			p.skip(1)
			return nil
		}
		if !first && !comma && !feed {
			return p.fault("begin a new line, or put a comma between", "two values stand side by side")
		}
		comma = false
		line := p.line
		path, err := p.key()
		if err != nil {
			return err
		}
		p.space(true)
		switch c := p.peek(); {
		case c == '=' || c == ':':
			p.skip(1)
		case c == '{' && p.relaxed:
		case p.has("+="):
			return p.fault("write the whole list", "%s: += is not read", strings.Join(path, "."))
		default:
			return p.fault("write it like key = value", "the key %q has no value", strings.Join(path, "."))
		}
		p.space(true)
		v, err := p.value(depth + 1)
		if err != nil {
			return err
		}
		v.line = line
		if err := p.put(o, path, v, depth); err != nil {
			return err
		}
		// What follows has to be told apart from this: by a comma or a new line.
		p.space(false)
	}
}

// put sets a value below its dotted key; in HOCON, objects of one key add to one another.
func (p *hocon) put(o *node, path []string, v *node, depth int) error {
	if depth+len(path) > maxDepth {
		return p.fault("flatten it", "objects and lists are more than %d deep", maxDepth)
	}
	for _, k := range path[:len(path)-1] {
		sub := o.get(k)
		if sub == nil || sub.kind != kindObject {
			sub = newObject(v.line)
			o.set(k, sub)
		}
		o = sub
	}
	last := path[len(path)-1]
	if old := o.get(last); p.relaxed && old != nil && old.kind == kindObject && v.kind == kindObject {
		merge(old, v)
		return nil
	}
	o.set(last, v)
	return nil
}

func merge(into, from *node) {
	for _, k := range from.keys {
		a, b := into.obj[k], from.obj[k]
		if a != nil && a.kind == kindObject && b.kind == kindObject {
			merge(a, b)
		} else {
			into.set(k, b)
		}
	}
}

// key reads a key: one part, or several with dots between. Blanks around a part do not belong to it unless they are in quotes.
func (p *hocon) key() ([]string, error) {
	var path []string
	part, kept, there := "", 0, false // kept is how much of part is no blank at its end, there tells whether it has begun
	for {
		c := p.peek()
		switch {
		case c == '"':
			s, err := p.quoted()
			if err != nil {
				return nil, err
			}
			part, there = part+s, true
			kept = len(part)
			continue
		case !p.relaxed || p.done() || strings.IndexByte("=:{}[],\n#", c) >= 0 || p.has("+="):
			if !there {
				return nil, p.fault("write it like key = value", "a key is missing here")
			}
			return append(path, part[:kept]), nil
		case c == '.':
			if !there {
				return nil, p.fault("write it like a.b = value", "a key has an empty part")
			}
			path, part, kept, there = append(path, part[:kept]), "", 0, false
			p.skip(1)
		case c == ' ' || c == '\t' || c == '\r':
			if part == "include" && len(path) == 0 {
				return nil, p.fault("put the content of that file here", "includes are not read")
			}
			if there {
				part += string(c)
			}
			p.skip(1)
		case c < ' ' || c == '$' || c == '`':
			return nil, p.fault("put the key in quotes", "%q cannot stand in a key", c)
		default:
			r, n := utf8.DecodeRune(p.src[p.at:])
			part, there = part+string(r), true
			kept = len(part)
			p.skip(n)
		}
	}
}

// value reads a value up to where it ends: a comma, a line feed, a closing brace or bracket, a comment.
func (p *hocon) value(depth int) (*node, error) {
	line := p.line
	switch p.peek() {
	case '{':
		o, err := p.object(depth)
		for err == nil {
			p.space(false)
			if p.peek() != '{' || !p.relaxed {
				break
			}
			var more *node
			if more, err = p.object(depth); err == nil {
				merge(o, more)
			}
		}
		if err == nil {
			err = p.ended("an object")
		}
		return o, err
	case '[':
		l, err := p.list(depth)
		if err == nil {
			p.space(false)
			err = p.ended("a list")
		}
		return l, err
	}
	var text strings.Builder
	pieces, quoted, blanks := 0, false, ""
	for !p.done() {
		c := p.peek()
		if strings.IndexByte(",\n}]#", c) >= 0 || blanks != "" && p.has("//") && p.relaxed {
			break
		}
		if c == ' ' || c == '\t' || c == '\r' {
			blanks += string(c)
			p.skip(1)
			continue
		}
		if pieces > 0 {
			text.WriteString(blanks)
		}
		blanks = ""
		switch {
		case p.relaxed && p.has(`"""`):
			s, err := p.tripled()
			if err != nil {
				return nil, err
			}
			text.WriteString(s)
			quoted = true
		case c == '"':
			s, err := p.quoted()
			if err != nil {
				return nil, err
			}
			text.WriteString(s)
			quoted = true
		case p.has("${"):
			return nil, p.fault("write the value itself", "substitutions (${…}) are not read")
		case c == '{' || c == '[':
			return nil, p.fault("begin a new line, or put a comma between", "an object or list follows a text")
		case c < ' ':
			return nil, p.fault("put the text in quotes", "%q cannot stand in a text without quotes", c)
		default:
			for !p.done() && strings.IndexByte(" \t\r\n,{}[]\"#", p.peek()) < 0 && !p.has("${") && p.peek() >= ' ' {
				text.WriteByte(p.peek())
				p.skip(1)
			}
		}
		pieces++
	}
	if pieces == 0 {
		return nil, p.fault("write a value", "a value is missing here")
	}
	if quoted || pieces > 1 {
		return &node{line: line, kind: kindString, s: text.String()}, nil
	}
	return scalar(text.String(), line), nil
}

// ended wants the end of a value: what follows an object or a list on its line would belong to it.
func (p *hocon) ended(what string) error {
	if p.done() || strings.IndexByte(",\n}]", p.peek()) >= 0 {
		return nil
	}
	return p.fault("begin a new line, or put a comma between", "something follows %s", what)
}

func (p *hocon) list(depth int) (*node, error) {
	if depth > maxDepth {
		return nil, p.fault("flatten it", "objects and lists are more than %d deep", maxDepth)
	}
	l := &node{line: p.line, kind: kindList}
	p.skip(1)
	for comma := false; ; {
		feed := p.space(true)
		if p.done() {
			return nil, p.file.fault(l, "", "close it with ]", "this list has no end")
		}
		if p.peek() == ',' && !comma && len(l.list) > 0 {
			comma = true
			p.skip(1)
			continue
		}
		if p.peek() == ']' {
			p.skip(1)
			return l, nil
		}
		if len(l.list) > 0 && !comma && !feed {
			return nil, p.fault("put a comma between", "two values stand side by side")
		}
		v, err := p.value(depth + 1)
		if err != nil {
			return nil, err
		}
		l.list = append(l.list, v)
		comma = false
		p.space(false)
	}
}

// quoted reads a text in quotes, with JSON's escapes.
func (p *hocon) quoted() (string, error) {
	start := p.at
	for i := p.at + 1; i < len(p.src); i++ {
		switch p.src[i] {
		case '\\':
			i++
		case '\n':
			return "", p.fault(`close it with "`, "this text has no end on its line")
		case '"':
			var s string
			if err := json.Unmarshal(p.src[start:i+1], &s); err != nil {
				return "", p.fault("write it as in JSON", "this text cannot be read (%v)", err)
			}
			p.skip(i + 1 - start)
			return s, nil
		}
	}
	return "", p.fault(`close it with "`, "this text has no end")
}

// tripled reads a text in triple quotes: all as it is; quotes beyond three at the end belong to it.
func (p *hocon) tripled() (string, error) {
	rest := p.src[p.at+3:]
	i := bytes.Index(rest, []byte(`"""`))
	if i < 0 {
		return "", p.fault(`close it with """`, "this text has no end")
	}
	for i+3 < len(rest) && rest[i+3] == '"' {
		i++
	}
	p.skip(3 + i + 3)
	return string(rest[:i]), nil
}

// scalar gives what a word without quotes stands for.
func scalar(s string, line int) *node {
	n := &node{line: line}
	switch s {
	case "true":
		n.kind, n.b = kindBool, true
		return n
	case "false":
		n.kind = kindBool
		return n
	case "null":
		return n
	}
	if s[0] == '-' || s[0] >= '0' && s[0] <= '9' {
		if i, err := strconv.ParseInt(s, 10, 64); err == nil {
			n.kind, n.i = kindInt, i
			return n
		}
		if f, err := strconv.ParseFloat(s, 64); err == nil && !math.IsInf(f, 0) && strings.Trim(s, "0123456789+-.eE") == "" {
			n.kind, n.f = kindFloat, f
			return n
		}
	}
	n.kind, n.s = kindString, s
	return n
}
