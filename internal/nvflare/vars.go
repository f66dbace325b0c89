package nvflare

import (
	"regexp"
	"slices"
	"strings"
)

// systemNames are the variables to which NVIDIA FLARE gives values when a job runs.
var systemNames = []string{"SITE_NAME", "WORKSPACE", "JOB_ID", "ROOT_URL", "CP_URL", "RELAY_URL", "SECURE_MODE", "JOB_CUSTOM_DIR", "JOB_CONFIG_DIR"}

// A variable of the machine's environment is written with a dollar sign: {$HOME}.
func isSystem(name string) bool {
	return strings.HasPrefix(name, "$") || slices.Contains(systemNames, name)
}

var (
	wholeForm = regexp.MustCompile(`^\s*\{([^{}]*)\}\s*$`)
	fieldForm = regexp.MustCompile(`\{\{|\}\}|\{[^{}]*\}|[{}]`)
)

// systemVars gives the names of the system's variables in a text, after [resolver.text].
func systemVars(s string) (names []string) {
	for _, m := range fieldForm.FindAllString(s, -1) {
		if len(m) > 2 && isSystem(m[1:len(m)-1]) {
			names = append(names, m[1:len(m)-1])
		}
	}
	return names
}

// maxResolved is how many values the variables of a file may stand for in all.
const maxResolved = 20_000

// resolver puts top-level values of a file in place of {NAME} (_EnvUpdater of nvflare/fuel/utils/wfconf.py): a text that
// is nothing but {NAME} becomes the value itself, of whatever kind; in any other one each {NAME} becomes its text, if all the
// names are known; else the text stays. The system's variables stay: nobody knows their values here.
type resolver struct {
	f     *file
	used  map[string]bool // the top-level keys that something refers to
	count int
}

func (r *resolver) value(v *node, depth int) (*node, error) {
	if r.count++; r.count > maxResolved || depth > maxDepth {
		return nil, r.f.fault(v, "", "write the values themselves", "the variables stand for too much, or for one another")
	}
	out := *v
	switch v.kind {
	case kindList:
		out.list = make([]*node, 0, len(v.list))
		for _, e := range v.list {
			n, err := r.value(e, depth+1)
			if err != nil {
				return nil, err
			}
			out.list = append(out.list, n)
		}
	case kindObject:
		out.keys, out.obj = nil, map[string]*node{}
		for _, k := range v.keys {
			n, err := r.value(v.obj[k], depth+1)
			if err != nil {
				return nil, err
			}
			out.set(k, n)
		}
	case kindString:
		return r.text(v, depth)
	}
	return &out, nil
}

func (r *resolver) text(v *node, depth int) (*node, error) {
	if m := wholeForm.FindStringSubmatch(v.s); m != nil {
		name := m[1]
		switch to := r.f.root.get(name); {
		case isSystem(name):
			return v, nil
		case strings.HasPrefix(name, "@") || strings.Contains(name, ":"):
			return nil, r.f.fault(v, "", "write the value itself", "%s: definitions with parameters are not read", strings.TrimSpace(v.s))
		case to == nil:
			return nil, r.f.fault(v, "", "define it at the top of the file, or write the value itself", "%s is defined nowhere in this file", strings.TrimSpace(v.s))
		default:
			r.used[name] = true
			n, err := r.value(to, depth+1)
			if err != nil {
				return nil, err
			}
			out := *n
			out.line = v.line
			return &out, nil
		}
	}
	if !strings.ContainsAny(v.s, "{}") || strings.Contains(v.s, "${") {
		return v, nil
	}
	known, some := true, false
	s := fieldForm.ReplaceAllStringFunc(v.s, func(m string) string {
		switch {
		case m == "{{" || m == "}}":
			return m[:1]
		case len(m) < 3: // a lone brace, or {}
			known = false
			return m
		}
		name := m[1 : len(m)-1]
		to := r.f.root.get(name)
		switch {
		case isSystem(name):
			return m
		case to == nil || to.kind == kindObject || to.kind == kindList:
			known = false
			return m
		}
		some = true
		r.used[name] = true
		if to.kind == kindString {
			return to.s
		}
		return pythonText(to)
	})
	if !known || !some && s == v.s {
		return v, nil
	}
	out := *v
	out.s = s
	return &out, nil
}

// pythonText gives a scalar as Python's str does.
func pythonText(v *node) string {
	switch v.kind {
	case kindNull:
		return "None"
	case kindBool:
		if v.b {
			return "True"
		}
		return "False"
	}
	return v.text()
}
