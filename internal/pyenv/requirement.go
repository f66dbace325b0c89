package pyenv

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/pergolafl/pergola/internal/problem"
)

// requirement is one PEP 508 line.
type requirement struct {
	name   string // canonical: lower case, runs of -_. are one -
	extras []string
	specs  []specifier
	url    string
	marker string
	mark   marker
}

// maxRequirement bounds a line in bytes. The longest that real projects have are a few hundred.
const maxRequirement = 8 << 10

// maxRequirements bounds the number of an app's dependencies.
const maxRequirements = 5000

var (
	nameRE   = regexp.MustCompile(`^[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?`)
	wholeRE  = regexp.MustCompile(`^[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?$`)
	schemeRE = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9+.-]*:[!-\[\]-~]+$`) // printable ASCII without blanks and backslash
	runsRE   = regexp.MustCompile(`[-_.]+`)
)

// canonical gives the name that PEP 503 compares by.
func canonical(name string) string {
	return strings.ToLower(runsRE.ReplaceAllString(strings.TrimSpace(name), "-"))
}

// parseRequirement reads one PEP 508 line. It refuses options (-r, --index-url), paths and anything else that is not a
// dependency, and every control character: what passes is safe as a line of a requirements file.
func parseRequirement(line string) (requirement, error) {
	var r requirement
	if len(line) > maxRequirement {
		return r, fmt.Errorf("it is longer than %d bytes", maxRequirement)
	}
	for _, c := range line {
		if c < ' ' && c != '\t' || c == 0x7f || c > 0x7e {
			return r, errors.New("it has a character that no dependency may have")
		}
	}
	rest := strings.Trim(line, " \t")
	name := nameRE.FindString(rest)
	if name == "" {
		switch {
		case strings.HasPrefix(rest, "-"):
			return r, errors.New("options are not dependencies")
		case strings.HasPrefix(rest, "."), strings.HasPrefix(rest, "/"):
			return r, errors.New("a path is not a dependency; write NAME @ file:///…")
		}
		return r, errors.New("it does not begin with a package name")
	}
	r.name = canonical(name)
	rest = strings.TrimLeft(rest[len(name):], " \t")

	if after, ok := strings.CutPrefix(rest, "["); ok {
		list, tail, closed := strings.Cut(after, "]")
		if !closed {
			return r, errors.New("the list of extras is not closed")
		}
		if strings.TrimSpace(list) != "" {
			for _, extra := range strings.Split(list, ",") {
				if extra = strings.Trim(extra, " \t"); !wholeRE.MatchString(extra) {
					return r, fmt.Errorf("%q is no name of an extra", extra)
				}
				r.extras = append(r.extras, canonical(extra))
			}
			slices.Sort(r.extras)
			r.extras = slices.Compact(r.extras)
		}
		rest = strings.TrimLeft(tail, " \t")
	}

	var cond string
	var hasCond bool
	if after, ok := strings.CutPrefix(rest, "@"); ok {
		r.url = strings.TrimLeft(after, " \t")
		// A URL may hold a semicolon, so PEP 508 wants a blank before the marker's.
		if i := strings.IndexAny(r.url, " \t"); i >= 0 {
			r.url, rest = r.url[:i], strings.TrimLeft(r.url[i:], " \t")
			if cond, hasCond = strings.CutPrefix(rest, ";"); !hasCond {
				return r, fmt.Errorf("unexpected %q after the URL", rest)
			}
		}
		if !schemeRE.MatchString(r.url) {
			return r, fmt.Errorf("%q is no URL", r.url)
		}
	} else {
		var specs string
		specs, cond, hasCond = strings.Cut(rest, ";")
		specs = strings.Trim(specs, " \t")
		if inner, ok := strings.CutPrefix(specs, "("); ok {
			if specs, ok = strings.CutSuffix(inner, ")"); !ok {
				return r, errors.New("a parenthesis is not closed")
			}
		}
		var err error
		if r.specs, err = parseSpecifiers(specs); err != nil {
			return r, err
		}
	}
	if hasCond {
		r.marker = strings.Trim(cond, " \t")
		var err error
		if r.mark, err = parseMarker(r.marker); err != nil {
			return r, err
		}
	}
	return r, nil
}

// String gives the line in normal form.
func (r requirement) String() string {
	s := r.bare()
	if r.marker != "" {
		s += " ; " + r.marker
	}
	return s
}

// bare gives the line without its marker.
func (r requirement) bare() string {
	s := r.name
	if len(r.extras) > 0 {
		s += "[" + strings.Join(r.extras, ",") + "]"
	}
	if r.url != "" {
		return s + " @ " + r.url
	}
	for i, spec := range r.specs {
		if i > 0 {
			s += ","
		}
		s += spec.String()
	}
	return s
}

// wanted tells whether the line counts for an interpreter that describes itself as env.
func (r requirement) wanted(env map[string]string) bool { return r.mark == nil || r.mark.eval(env) }

// Requirements is what an app asks of its environment.
type Requirements struct {
	Names          []string // PEP 508 lines as in the app's [project].dependencies; nothing optional
	Flwr           string   // "" or the exact version that replaces what the app says of flwr
	Simulation     bool     // keep, or add, the simulation extra of flwr, which brings Ray
	RequiresPython string   // the app's [project].requires-python, such as ">=3.10,<3.13"; "" is any
}

// isFlwr tells whether a package is Flower: the nightly one installs the same modules.
func isFlwr(name string) bool { return name == "flwr" || name == "flwr-nightly" }

// Normalise gives the lines to resolve, sorted and in normal form: flwr without its simulation extra unless that is
// wanted, at the version that Flwr wants, and added where the app names none. A line that is not PEP 508 is a problem
// app-invalid that names it.
func (req Requirements) Normalise() ([]string, error) {
	parsed, err := req.parse()
	if err != nil {
		return nil, err
	}
	lines := make([]string, 0, len(parsed))
	for _, r := range parsed {
		lines = append(lines, r.String())
	}
	slices.Sort(lines)
	return slices.Compact(lines), nil
}

func (req Requirements) parse() ([]requirement, error) {
	if len(req.Names) > maxRequirements {
		return nil, problem.New(problem.AppInvalid, "name only what the app imports itself", "the app has %d dependencies; the limit is %d", len(req.Names), maxRequirements)
	}
	var pin []specifier
	if req.Flwr != "" {
		v, ok := parseVersion(req.Flwr)
		if !ok {
			return nil, problem.New(problem.Usage, "give a released version such as 1.30.0", "%q is not a version of flwr", req.Flwr)
		}
		pin = []specifier{{op: "==", text: v.String(), v: v}}
	}
	if _, err := parseSpecifiers(req.RequiresPython); err != nil {
		return nil, problem.Wrap(err, problem.AppInvalid, `correct requires-python in the app's pyproject.toml, for example ">=3.10"`, "the app's requires-python %q cannot be read", req.RequiresPython)
	}
	var list []requirement
	var forced requirement
	named := false
	for _, line := range req.Names {
		if strings.TrimSpace(line) == "" {
			continue
		}
		r, err := parseRequirement(line)
		if err != nil {
			return nil, problem.Wrap(err, problem.AppInvalid, "correct it in [project] dependencies of the app's pyproject.toml", "the app's dependency %q cannot be read", line)
		}
		if isFlwr(r.name) {
			named = true
			r.extras = slices.DeleteFunc(r.extras, func(e string) bool { return e == "simulation" })
			if req.Simulation {
				r.extras = append(r.extras, "simulation")
				slices.Sort(r.extras)
			}
			if pin != nil { // one line replaces all that there are, with the extras of each
				forced.extras = append(forced.extras, r.extras...)
				continue
			}
		}
		list = append(list, r)
	}
	if pin != nil || !named {
		forced.name, forced.specs = "flwr", pin
		if req.Simulation {
			forced.extras = append(forced.extras, "simulation")
		}
		slices.Sort(forced.extras)
		forced.extras = slices.Compact(forced.extras)
		list = append(list, forced)
	}
	return list, nil
}
