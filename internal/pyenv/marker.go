package pyenv

import (
	"errors"
	"fmt"
	"strings"
)

// marker is the condition after the semicolon of a PEP 508 line.
type marker interface {
	eval(env map[string]string) bool
}

type (
	markerAnd  struct{ a, b marker }
	markerOr   struct{ a, b marker }
	markerTest struct {
		op          string
		left, right markerValue
	}
	markerValue struct {
		text     string
		variable bool
	}
)

func (m markerAnd) eval(env map[string]string) bool { return m.a.eval(env) && m.b.eval(env) }
func (m markerOr) eval(env map[string]string) bool  { return m.a.eval(env) || m.b.eval(env) }

func (v markerValue) in(env map[string]string) string {
	if v.variable {
		return env[v.text]
	}
	return v.text
}

func (m markerTest) eval(env map[string]string) bool {
	l, r := m.left.in(env), m.right.in(env)
	if m.left.variable && m.left.text == "extra" || m.right.variable && m.right.text == "extra" {
		l, r = canonical(l), canonical(r)
	}
	switch m.op {
	case "in":
		return strings.Contains(r, l)
	case "not in":
		return !strings.Contains(r, l)
	}
	// PEP 508: versions are compared as versions where both sides are, otherwise as text.
	if s, err := parseSpecifier(m.op + r); err == nil {
		if v, ok := parseVersion(l); ok || s.op == "===" {
			return s.contains(v, l)
		}
	}
	switch m.op {
	case "==", "===":
		return l == r
	case "!=":
		return l != r
	case "<":
		return l < r
	case "<=":
		return l <= r
	case ">":
		return l > r
	case ">=":
		return l >= r
	}
	return false
}

// markerVariables are those of PEP 508 with their old spellings.
var markerVariables = map[string]string{
	"os_name": "os_name", "os.name": "os_name",
	"sys_platform": "sys_platform", "sys.platform": "sys_platform",
	"platform_machine": "platform_machine", "platform.machine": "platform_machine",
	"platform_python_implementation": "platform_python_implementation",
	"platform.python_implementation": "platform_python_implementation",
	"python_implementation":          "platform_python_implementation",
	"platform_release":               "platform_release",
	"platform_system":                "platform_system",
	"platform_version":               "platform_version", "platform.version": "platform_version",
	"python_version":         "python_version",
	"python_full_version":    "python_full_version",
	"implementation_name":    "implementation_name",
	"implementation_version": "implementation_version",
	"extra":                  "extra",
	"extras":                 "extras", "dependency_groups": "dependency_groups", // PEP 751, in lock files only
}

// maxMarkerDepth bounds the parentheses in a marker, so that a hostile line cannot exhaust the stack.
const maxMarkerDepth = 50

type markerParser struct {
	rest  string
	depth int
}

func parseMarker(text string) (marker, error) {
	p := &markerParser{rest: text}
	m, err := p.or()
	if err != nil {
		return nil, err
	}
	if p.space(); p.rest != "" {
		return nil, fmt.Errorf("unexpected %q in the marker", p.rest)
	}
	return m, nil
}

func (p *markerParser) space() { p.rest = strings.TrimLeft(p.rest, " \t") }

// word takes the next word if it is w.
func (p *markerParser) word(w string) bool {
	p.space()
	after, ok := strings.CutPrefix(p.rest, w)
	if !ok || after != "" && isWord(after[0]) {
		return false
	}
	p.rest = after
	return true
}

func isWord(c byte) bool {
	return c == '_' || c == '.' || c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
}

func (p *markerParser) or() (marker, error) {
	a, err := p.and()
	for err == nil && p.word("or") {
		var b marker
		b, err = p.and()
		a = markerOr{a, b}
	}
	return a, err
}

func (p *markerParser) and() (marker, error) {
	a, err := p.test()
	for err == nil && p.word("and") {
		var b marker
		b, err = p.test()
		a = markerAnd{a, b}
	}
	return a, err
}

func (p *markerParser) test() (marker, error) {
	p.space()
	if after, ok := strings.CutPrefix(p.rest, "("); ok {
		if p.depth++; p.depth > maxMarkerDepth {
			return nil, errors.New("the marker is nested too deeply")
		}
		p.rest = after
		m, err := p.or()
		if err != nil {
			return nil, err
		}
		p.space()
		if after, ok = strings.CutPrefix(p.rest, ")"); !ok {
			return nil, errors.New("the marker lacks a closing parenthesis")
		}
		p.rest = after
		p.depth--
		return m, nil
	}
	left, err := p.value()
	if err != nil {
		return nil, err
	}
	op, err := p.operator()
	if err != nil {
		return nil, err
	}
	right, err := p.value()
	if err != nil {
		return nil, err
	}
	return markerTest{op, left, right}, nil
}

func (p *markerParser) operator() (string, error) {
	p.space()
	for _, op := range []string{"===", "~=", "==", "!=", "<=", ">=", "<", ">"} {
		if after, ok := strings.CutPrefix(p.rest, op); ok {
			p.rest = after
			return op, nil
		}
	}
	if p.word("in") {
		return "in", nil
	}
	if p.word("not") && p.word("in") {
		return "not in", nil
	}
	return "", errors.New("the marker lacks a comparison such as ==")
}

func (p *markerParser) value() (markerValue, error) {
	p.space()
	if p.rest == "" {
		return markerValue{}, errors.New("the marker ends too early")
	}
	if q := p.rest[0]; q == '"' || q == '\'' {
		end := strings.IndexByte(p.rest[1:], q)
		if end < 0 {
			return markerValue{}, errors.New("the marker has an open quote")
		}
		v := markerValue{text: p.rest[1 : 1+end]}
		p.rest = p.rest[end+2:]
		return v, nil
	}
	n := 0
	for n < len(p.rest) && isWord(p.rest[n]) {
		n++
	}
	name, ok := markerVariables[p.rest[:n]]
	if !ok {
		return markerValue{}, fmt.Errorf("the marker has an unknown variable at %q", p.rest)
	}
	p.rest = p.rest[n:]
	return markerValue{text: name, variable: true}, nil
}

// markerEnv is what an interpreter would say of itself, as far as version and platform tell.
func (in Interpreter) markerEnv() map[string]string {
	env := map[string]string{
		"os_name": "posix", "sys_platform": "linux", "platform_system": "Linux",
		"platform_python_implementation": "CPython", "implementation_name": "cpython",
		"python_full_version": in.Version, "implementation_version": in.Version,
	}
	if strings.Contains(in.Platform, "pypy") {
		env["platform_python_implementation"], env["implementation_name"] = "PyPy", "pypy"
	}
	if v, ok := parseVersion(in.Version); ok {
		env["python_version"] = v.minor()
	}
	if _, after, ok := strings.Cut(in.Platform, "-"); ok { // "linux-x86_64-…"
		env["platform_machine"], _, _ = strings.Cut(after, "-")
	}
	return env
}
