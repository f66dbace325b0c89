package pyenv

import (
	"cmp"
	"fmt"
	"regexp"
	"strings"
)

// version is a PEP 440 version. Numbers stay strings of digits, since nothing bounds their length.
type version struct {
	epoch   string
	release []string
	pre     string // "", "a", "b" or "rc"
	preNum  string
	post    string // "" for none
	dev     string // "" for none
	local   []string
}

// The pattern of PEP 440, appendix B.
var versionRE = regexp.MustCompile(`^v?(?:(\d+)!)?(\d+(?:\.\d+)*)` +
	`(?:[-_.]?(alpha|a|beta|b|preview|pre|c|rc)[-_.]?(\d+)?)?` +
	`(-\d+|[-_.]?(?:post|rev|r)[-_.]?\d*)?` +
	`([-_.]?dev[-_.]?\d*)?` +
	`(?:\+([a-z0-9]+(?:[-_.][a-z0-9]+)*))?$`)

var preNames = map[string]string{"alpha": "a", "a": "a", "beta": "b", "b": "b", "c": "rc", "rc": "rc", "pre": "rc", "preview": "rc"}

func parseVersion(text string) (version, bool) {
	m := versionRE.FindStringSubmatch(strings.ToLower(strings.TrimSpace(text)))
	if m == nil {
		return version{}, false
	}
	v := version{epoch: number(m[1]), pre: preNames[m[3]]}
	for _, n := range strings.Split(m[2], ".") {
		v.release = append(v.release, number(n))
	}
	if v.pre != "" {
		v.preNum = number(m[4])
	}
	if m[5] != "" {
		v.post = number(strings.TrimLeft(m[5], "-_.postrev"))
	}
	if m[6] != "" {
		v.dev = number(strings.TrimLeft(m[6], "-_.dev"))
	}
	if m[7] != "" {
		v.local = strings.FieldsFunc(m[7], func(r rune) bool { return strings.ContainsRune("-_.", r) })
	}
	return v, true
}

// number drops leading zeros; nothing counts as 0.
func number(digits string) string {
	if digits = strings.TrimLeft(digits, "0"); digits == "" {
		return "0"
	}
	return digits
}

func compareNumbers(a, b string) int {
	if c := cmp.Compare(len(a), len(b)); c != 0 {
		return c
	}
	return cmp.Compare(a, b)
}

// String gives the normal form of PEP 440.
func (v version) String() string {
	var b strings.Builder
	if v.epoch != "0" {
		b.WriteString(v.epoch + "!")
	}
	b.WriteString(strings.Join(v.release, "."))
	b.WriteString(v.pre + v.preNum)
	if v.post != "" {
		b.WriteString(".post" + v.post)
	}
	if v.dev != "" {
		b.WriteString(".dev" + v.dev)
	}
	if len(v.local) > 0 {
		b.WriteString("+" + strings.Join(v.local, "."))
	}
	return b.String()
}

func (v version) minor() string {
	if len(v.release) < 2 {
		return v.release[0] + ".0"
	}
	return v.release[0] + "." + v.release[1]
}

func (v version) prerelease() bool { return v.pre != "" || v.dev != "" }

func (v version) public() version { v.local = nil; return v }

func (v version) base() version { return version{epoch: v.epoch, release: v.release} }

func at(list []string, i int) string {
	if i < len(list) {
		return list[i]
	}
	return "0"
}

func compareRelease(a, b []string) int {
	for i := range max(len(a), len(b)) {
		if c := compareNumbers(at(a, i), at(b, i)); c != 0 {
			return c
		}
	}
	return 0
}

// compare orders as PEP 440 does: 1.dev1 < 1a1 < 1 < 1+local < 1.post1.
func (v version) compare(w version) int {
	if c := compareNumbers(v.epoch, w.epoch); c != 0 {
		return c
	}
	if c := compareRelease(v.release, w.release); c != 0 {
		return c
	}
	if c := cmp.Or(cmp.Compare(v.preRank(), w.preRank()), compareNumbers(v.preNum, w.preNum)); c != 0 {
		return c
	}
	if c := compareNumbers(v.post, w.post); c != 0 { // none is the empty string, which is shorter than any number
		return c
	}
	switch {
	case v.dev == "" && w.dev != "":
		return 1
	case v.dev != "" && w.dev == "":
		return -1
	}
	return cmp.Or(compareNumbers(v.dev, w.dev), compareLocal(v.local, w.local))
}

func (v version) preRank() int {
	switch {
	case v.pre == "" && v.post == "" && v.dev != "":
		return 0
	case v.pre == "":
		return 4
	}
	return map[string]int{"a": 1, "b": 2, "rc": 3}[v.pre]
}

func compareLocal(a, b []string) int {
	for i := range min(len(a), len(b)) {
		x, y := isDigits(a[i]), isDigits(b[i])
		var c int
		switch {
		case x && y:
			c = compareNumbers(number(a[i]), number(b[i]))
		case x:
			c = 1 // numbers are newer than words
		case y:
			c = -1
		default:
			c = cmp.Compare(a[i], b[i])
		}
		if c != 0 {
			return c
		}
	}
	return cmp.Compare(len(a), len(b))
}

func isDigits(s string) bool {
	return s != "" && strings.Trim(s, "0123456789") == ""
}

// specifier is one clause such as ">=1.3" or "==2.*".
type specifier struct {
	op     string
	text   string // the version as written, with ".*" if it had one
	v      version
	prefix bool
}

func (s specifier) String() string { return s.op + s.text }

var specifierRE = regexp.MustCompile(`^(===|~=|==|!=|<=|>=|<|>)\s*([^\s,;()]+)$`)

func parseSpecifier(text string) (specifier, error) {
	m := specifierRE.FindStringSubmatch(strings.TrimSpace(text))
	if m == nil {
		return specifier{}, fmt.Errorf("%q is no version specifier such as >=1.2", strings.TrimSpace(text))
	}
	s := specifier{op: m[1], text: m[2]}
	if s.op == "===" {
		return s, nil
	}
	bare := s.text
	if s.op == "==" || s.op == "!=" {
		bare, s.prefix = strings.CutSuffix(s.text, ".*")
	}
	v, ok := parseVersion(bare)
	switch {
	case !ok:
		return specifier{}, fmt.Errorf("%q is no version", s.text)
	case len(v.local) > 0 && (s.prefix || (s.op != "==" && s.op != "!=")):
		return specifier{}, fmt.Errorf("%s%s: a local version (+…) goes with == and != only", s.op, s.text)
	case s.prefix && (v.dev != "" || v.post != "" || v.pre != ""):
		return specifier{}, fmt.Errorf("%s%s: .* goes after release numbers only", s.op, s.text)
	case s.op == "~=" && len(v.release) < 2:
		return specifier{}, fmt.Errorf("~=%s: ~= needs at least two numbers, as in ~=1.4", s.text)
	}
	s.v = v
	return s, nil
}

// contains tells whether v meets the clause. Pre-releases are accepted: what is installed was somebody's wish.
func (s specifier) contains(v version, text string) bool {
	switch s.op {
	case "===":
		return strings.EqualFold(s.text, text)
	case "==":
		return s.equal(v)
	case "!=":
		return !s.equal(v)
	case "<=":
		return v.public().compare(s.v) <= 0
	case ">=":
		return v.public().compare(s.v) >= 0
	case "<":
		return v.compare(s.v) < 0 && (s.v.prerelease() || !v.prerelease() || v.base().compare(s.v.base()) != 0)
	case ">":
		if v.compare(s.v) <= 0 {
			return false
		}
		same := v.base().compare(s.v.base()) == 0
		return !same || (len(v.local) == 0 && (v.post == "" || s.v.post != ""))
	case "~=":
		up := specifier{op: "==", prefix: true, v: version{epoch: s.v.epoch, release: s.v.release[:len(s.v.release)-1]}}
		return v.public().compare(s.v) >= 0 && up.equal(v)
	}
	return false
}

func (s specifier) equal(v version) bool {
	if s.prefix {
		padded := append([]string(nil), v.release...)
		for len(padded) < len(s.v.release) {
			padded = append(padded, "0")
		}
		return v.epoch == s.v.epoch && compareRelease(padded[:len(s.v.release)], s.v.release) == 0
	}
	if len(s.v.local) == 0 {
		v = v.public()
	}
	return v.compare(s.v) == 0
}

// parseSpecifiers reads a comma-separated list; empty text is the empty list, which everything meets.
func parseSpecifiers(text string) ([]specifier, error) {
	if strings.TrimSpace(text) == "" {
		return nil, nil
	}
	parts := strings.Split(text, ",")
	if strings.TrimSpace(parts[len(parts)-1]) == "" { // pip and uv take a trailing comma
		parts = parts[:len(parts)-1]
	}
	list := make([]specifier, 0, len(parts))
	for _, part := range parts {
		s, err := parseSpecifier(part)
		if err != nil {
			return nil, err
		}
		list = append(list, s)
	}
	return list, nil
}

// meets tells whether the version written as text is one that all of list allow. A version that PEP 440 does not know
// meets only "===" and the empty list.
func meets(list []specifier, text string) bool {
	v, ok := parseVersion(text)
	for _, s := range list {
		if !ok && s.op != "===" || !s.contains(v, text) {
			return false
		}
	}
	return true
}
