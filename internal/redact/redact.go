// Package redact takes secrets out of what is shown to others: lines of logs, configuration, events. It knows the forms that
// secrets have (private keys as PEM, URLs with a password, bearer tokens, Pergola's own tokens, keys of well-known services), the
// names that they stand behind (password = …), and the very texts that it was told are secret, wherever they occur.
//
// What it cannot recognise it leaves: a secret without a form, behind a harmless name, that nobody told of. Start with [Text],
// or with a [Redactor] where there are secrets to tell of.
package redact

import (
	"bytes"
	"cmp"
	"encoding/base64"
	"encoding/json"
	"net/url"
	"regexp"
	"slices"
	"strings"
)

// Mark stands where something was taken out.
const Mark = "[removed]"

// MinSecret is the fewest bytes of a text that is taken out wherever it occurs: what is shorter, such as a 1 or a no, occurs by chance.
const MinSecret = 6

// secretName is the end of a name that a secret stands behind.
const secretName = `(?:passw(?:or)?d|passwort|passphrase|pwd|secrets?|tokens?|api[_.-]?keys?|access[_.-]?keys?|private[_.-]?keys?|secret[_.-]?keys?|account[_.-]?key|` +
	`credentials?|authori[sz]ation|signature|sig|cookie|session[_.-]?id|auth)`

// nameOf matches a whole name of that kind.
var nameOf = regexp.MustCompile(`(?i)(?:^|[^a-z])` + secretName + `$|(?i:passw(?:or)?d|passphrase|secret|api_?key|private_?key|access_?key)$`)

type rule struct {
	hint []string // one of these is in every text that the rule applies to, in lower case
	re   *regexp.Regexp
	with string
}

// rules are applied one after the other.
var rules = []rule{
	// PEM: whole, its beginning without an end, or its end without a beginning, as where a log is cut.
	{[]string{"private key"}, regexp.MustCompile(`-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----[\s\S]*?-----END [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----`), Mark},
	{[]string{"private key"}, regexp.MustCompile(`-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----(?:\\[nr]|[A-Za-z0-9+/=:,\s-])*`), Mark + "\n"},
	{[]string{"private key"}, regexp.MustCompile(`[A-Za-z0-9+/=]*(?:(?:\\[nr]|[\r\n])+[A-Za-z0-9+/=]+)*(?:\\[nr]|\s)*-----END [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----`), Mark},
	// URLs: all of what stands before the @, since a token may stand in the user's place.
	{[]string{"://"}, regexp.MustCompile(`([A-Za-z][A-Za-z0-9+.-]*://)[^\s/?#"'<>` + "`" + `]*@`), "${1}" + Mark + "@"},
	// Pergola's own tokens.
	{[]string{"pergola-"}, regexp.MustCompile(`pergola-(site|user)-[A-Za-z0-9_-]{8,}`), "pergola-${1}-" + Mark},
	// HTTP's.
	{[]string{"bearer", "basic", "negotiate", "digest"}, regexp.MustCompile(`(?i)\b(bearer|basic|negotiate|digest)(\s+|%20|\+)[A-Za-z0-9._~+/=-]{6,}`), "${1}${2}" + Mark},
	// Of services that give theirs a form.
	{[]string{"eyj"}, regexp.MustCompile(`\beyJ[A-Za-z0-9_-]{5,}\.[A-Za-z0-9_-]{5,}(?:\.[A-Za-z0-9_-]*)?`), Mark},
	{[]string{"akia", "asia", "aroa", "aida", "agpa"}, regexp.MustCompile(`\b(?:AKIA|ASIA|AROA|AIDA|AGPA)[A-Z0-9]{16}\b`), Mark},
	{[]string{"gh", "glpat-"}, regexp.MustCompile(`\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{16,})`), Mark},
	{[]string{"hf_"}, regexp.MustCompile(`\bhf_[A-Za-z0-9]{20,}`), Mark},
	{[]string{"sk-"}, regexp.MustCompile(`\bsk-[A-Za-z0-9_-]{16,}`), Mark},
	{[]string{"xox"}, regexp.MustCompile(`\bxox[abposr]-[A-Za-z0-9-]{10,}`), Mark},
	{[]string{"pypi-"}, regexp.MustCompile(`\bpypi-[A-Za-z0-9_-]{16,}`), Mark},
	{[]string{"aiza"}, regexp.MustCompile(`\bAIza[A-Za-z0-9_-]{30,}`), Mark},
	{[]string{"age-secret-key-"}, regexp.MustCompile(`(?i)AGE-SECRET-KEY-[A-Z0-9]+`), Mark},
}

// assigned is a value behind the name of a secret: NAME=VALUE, NAME: VALUE, "NAME": "VALUE", --NAME VALUE, ?NAME=VALUE.
var assigned = regexp.MustCompile(`(?i)((?:[A-Za-z0-9_.-]*[^A-Za-z0-9\s]|\b|[a-z0-9]*)` + secretName + `)` +
	`(\\*["']?\s*(?:=>|:=|[=:])\s*|\\*["']\s*,\s*|\s+(?:is|was)\s+)` +
	`(\\*"(?:[^"\\\n]|\\[^"\n])*\\*"|\\*'(?:[^'\\\n]|\\[^'\n])*\\*'|\[removed\]|(?:(?:bearer|basic)\s+)?[^\s"'&,;}\])<>\\]+)`)

// flagged is a value behind a flag, after a space.
var flagged = regexp.MustCompile(`(?i)(--?[a-z0-9-]*` + secretName + `)(\s+)([^\s"'-][^\s"']*)`)

// assignedHints are in every text that has an assigned secret, in lower case.
var assignedHints = []string{"pass", "pwd", "secret", "token", "key", "credential", "auth", "sig", "cookie", "session"}

// Text gives s without what has the form of a secret. It changes nothing in most lines, and takes little time for them.
func Text(s string) string {
	low := strings.ToLower(s)
	has := func(hints []string) bool {
		return slices.ContainsFunc(hints, func(h string) bool { return strings.Contains(low, h) })
	}
	for _, r := range rules {
		if has(r.hint) {
			s = r.re.ReplaceAllString(s, r.with)
		}
	}
	if has(assignedHints) && strings.ContainsAny(s, "=:,- ") {
		s = assignments(s)
		s = flagged.ReplaceAllString(s, "${1}${2}"+Mark)
	}
	return s
}

// assignments takes out the values behind the names of secrets.
func assignments(s string) string {
	var out strings.Builder
	for {
		at := assigned.FindStringSubmatchIndex(s)
		if at == nil {
			out.WriteString(s)
			return out.String()
		}
		value, rest := s[at[6]:at[7]], s[at[7]:]
		out.WriteString(s[:at[6]])
		if next := assigned.FindStringIndex(s[at[6]:]); next != nil && next[0] == 0 { // "secret: token = x": the value is a name itself
			s = s[at[6]:]
			continue
		}
		out.WriteString(quoteLike(value))
		s = rest
	}
}

// quoteLike gives the mark in the quotes that the value had.
func quoteLike(value string) string {
	i := strings.IndexAny(value, `"'`)
	if i < 0 || strings.Trim(value[:i], `\`) != "" {
		return Mark
	}
	q := value[:i+1]
	return q + Mark + q
}

// Secret tells whether what is called name is taken to be a secret.
func Secret(name string) bool { return nameOf.MatchString(name) }

// Redactor is for texts in which known secrets may occur. The zero value knows none. It is not for concurrent use while it learns.
type Redactor struct {
	known []string // longest first
	keep  []string // never secret
}

// Keep tells of texts that are no secrets though they may look it or were told of, such as names of sites.
func (r *Redactor) Keep(texts ...string) { r.keep = append(r.keep, texts...) }

// Learn tells of texts that are secret wherever they occur, also within URLs, in base64 and in JSON. Those of fewer than [MinSecret] bytes are
// left out.
func (r *Redactor) Learn(secrets ...string) {
	for _, s := range secrets {
		s = strings.TrimSpace(s)
		if len(s) < MinSecret || slices.Contains(r.keep, s) {
			continue
		}
		forms := []string{s, url.QueryEscape(s), url.PathEscape(s), url.UserPassword("", s).String()[1:]}
		if b, err := json.Marshal(s); err == nil {
			forms = append(forms, strings.Trim(string(b), `"`))
		}
		// In base64 a text has three forms, by what stands before it; the characters at either end depend on the neighbours.
		for shift := range 3 {
			e := base64.RawStdEncoding.EncodeToString(append(make([]byte, shift), s...))
			from, to := []int{0, 2, 3}[shift], len(e)
			if (shift+len(s))%3 != 0 {
				to--
			}
			if to-from >= MinSecret+2 {
				forms = append(forms, e[from:to], strings.NewReplacer("+", "-", "/", "_").Replace(e[from:to]))
			}
		}
		for _, line := range strings.Split(s, "\n") { // of a key, each
			if line = strings.TrimSpace(line); len(line) >= 16 && !strings.HasPrefix(line, "-----") {
				forms = append(forms, line)
			}
		}
		r.known = append(r.known, forms...)
	}
	slices.SortFunc(r.known, func(a, b string) int {
		if d := len(b) - len(a); d != 0 {
			return d
		}
		return cmp.Compare(a, b)
	})
	r.known = slices.Compact(r.known)
}

// LearnURL tells of the password of a URL, and of its user where there is no password.
func (r *Redactor) LearnURL(s string) {
	if !strings.Contains(s, "://") {
		s = "http://" + s
	}
	u, err := url.Parse(s)
	if err != nil {
		if _, rest, ok := strings.Cut(s, "://"); ok { // it cannot be read: all before the @ then
			if at := strings.LastIndex(rest, "@"); at >= 0 {
				_, pass, _ := strings.Cut(rest[:at], ":")
				r.Learn(rest[:at], pass)
			}
		}
		return
	}
	if u.User != nil {
		if pass, ok := u.User.Password(); ok {
			r.Learn(pass, u.User.String())
		} else if u.User.Username() != "" && len(u.User.Username()) >= 20 {
			r.Learn(u.User.Username()) // a token in the user's place
		}
	}
	for k, vs := range u.Query() {
		if Secret(k) {
			r.Learn(vs...)
		}
	}
}

// Text gives s without what has the form of a secret and without the known ones.
func (r *Redactor) Text(s string) string {
	for _, k := range r.known {
		if strings.Contains(s, k) {
			s = strings.ReplaceAll(s, k, Mark)
		}
	}
	return Text(s)
}

// Known tells whether a secret that was told of is in s.
func (r *Redactor) Known(s string) bool {
	s = strings.ReplaceAll(s, Mark, "\x00") // whose own word may be one
	return slices.ContainsFunc(r.known, func(k string) bool { return strings.Contains(s, k) })
}

// Environment tells whether what is called name holds variables of an environment, whose values are all taken to be secret.
func Environment(name string) bool { return name == "env" || name == "environment" }

// Value gives v, as encoding/json or a TOML decoder makes it, without secrets: behind names of such nothing is left, neither of an environment's
// values, and texts are as [Redactor.Text] has them.
func (r *Redactor) Value(name string, v any) any {
	switch v := v.(type) {
	case map[string]any:
		out := make(map[string]any, len(v))
		for k, e := range v {
			if _, nested := e.(map[string]any); Environment(name) && !nested {
				out[r.Text(k)] = Mark
				continue
			}
			out[r.Text(k)] = r.Value(k, e)
		}
		return out
	case []any:
		out := make([]any, len(v))
		for i, e := range v {
			out[i] = r.Value(name, e)
		}
		return out
	case string:
		if Secret(name) && v != "" {
			return Mark
		}
		return r.Text(v)
	case nil, bool:
		return v
	}
	if Secret(name) {
		return Mark
	}
	return v
}

// JSON gives one JSON value, or several with one on each line, without secrets. What is none is treated as text.
func (r *Redactor) JSON(b []byte) []byte {
	var out bytes.Buffer
	lines := bytes.Lines(b)
	if json.Valid(b) {
		lines = slices.Values([][]byte{b}) // one that may go over several lines
	}
	for line := range lines {
		d := json.NewDecoder(bytes.NewReader(line))
		d.UseNumber()
		var v any
		if err := d.Decode(&v); err != nil || d.More() {
			out.WriteString(r.Text(string(line)))
			continue
		}
		e := json.NewEncoder(&out)
		e.SetEscapeHTML(false)
		if err := e.Encode(r.Value("", v)); err != nil {
			out.WriteString(Mark + "\n") // it was JSON a moment ago
		}
	}
	return out.Bytes()
}
