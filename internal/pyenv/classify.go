package pyenv

import (
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/pergolafl/pergola/internal/problem"
)

// failure is what a resolver's or installer's words mean.
type failure struct {
	kind    string   // one of the constants below
	pkg     string   // the package that it is about, canonical; "" if not known
	want    string   // what is asked of it: "flwr==9.9.9", or for kindPython the versions: ">=3.11"
	by      string   // what asks for it: "flwr==1.42.0", or "" for the app itself
	offered []string // versions that exist
	said    string   // the words that matter, on one line
}

const (
	kindOther   = ""        // nothing recognised
	kindFull    = "full"    // disk or quota
	kindIndex   = "index"   // the index, or the network before it
	kindUnknown = "unknown" // no package has that name
	kindVersion = "version" // the package is there, the version is not
	kindPython  = "python"  // the package does not go with this Python
	kindClash   = "clash"   // requirements contradict each other
	kindHash    = "hash"    // what was downloaded is not what was locked
	kindBuild   = "build"   // a source distribution could not be built
)

var (
	indexRE = regexp.MustCompile(`(?i)failed to fetch|request failed after|error sending request|dns error|failed to lookup address|name resolution|` +
		`connection refused|connection reset|connection broken|connect timeout|read timed out|network is unreachable|could not connect|` +
		`operation timed out|failed to establish a new connection|SSLError|network was disabled|Error, Credentials not correct|certificate verify failed|invalid peer certificate|proxyerror|tunnel error|` +
		`network connectivity is disabled|50[0234] (?:server error|bad gateway|service unavailable|gateway time)|403 (?:client error|forbidden)|401 (?:client error|unauthorized)|HTTP error 5\d\d`)
	unknownUV  = regexp.MustCompile(`^(\S+?) was not found in the (?:package registry|provided package locations|cache)`)
	versionUV  = regexp.MustCompile(`^there (?:is|are) no versions? of (\S+)`)
	onlyUV     = regexp.MustCompile(`^only (?:the following versions of )?(\S+) (?:is|are) available(?:: (.*?) and )?`)
	directUV   = regexp.MustCompile(` and you require (\S+)`)
	byUV       = regexp.MustCompile(` and (\S+) depends on (\S+)`)
	pythonUV   = regexp.MustCompile(`^the (?:current|requested) Python version \([^)]*\) does not satisfy Python(\S+) and (\S+) depends on`)
	versionPip = regexp.MustCompile(`Could not find a version that satisfies the requirement (\S+)(?: \(from (?:versions: ([^)]*)|([^)]*))\))+`)
	pythonPip  = regexp.MustCompile(`(?:Package '([^']+)' requires a different Python: \S+ not in '([^']+)')`)
	specBegins = regexp.MustCompile(`[\[{<>=!~]`)
	clashRE    = regexp.MustCompile(`(?i)No solution found|ResolutionImpossible|conflicting dependencies|No matching distribution`)
	hashRE     = regexp.MustCompile(`(?i)hash mismatch|DO NOT MATCH THE HASHES`)
	buildRE    = regexp.MustCompile("(?i)Failed to build `?([^`\\s]+)`?|Failed to download and build `?([^`\\s]+)`?|Failed building wheel for (\\S+)|metadata-generation-failed|no wheels? with a matching|has no usable wheels|subprocess-exited-with-error")
)

// bareName cuts the extras and versions off.
func bareName(req string) string {
	if at := specBegins.FindStringIndex(req); at != nil {
		req = req[:at[0]]
	}
	return canonical(strings.Trim(req, "`'\".,:;()"))
}

// classify finds the meaning in what uv or pip said. Their words are no interface, so whatever is not recognised stays
// kindOther and is shown as it is.
func classify(said string) failure {
	// uv may fold its sentences and draw a tree before them.
	flat := strings.Join(strings.Fields(strings.NewReplacer("×", " ", "╰─▶", " ", "├─▶", " ", "│", " ").Replace(said)), " ")
	f := failure{said: lastLines(said, 12)}
	switch {
	case full(nil, flat):
		f.kind = kindFull
		return f
	case hashRE.MatchString(flat):
		f.kind = kindHash
		return f
	case indexRE.MatchString(flat): // before the names: pip goes on to say "from versions: none" when it could not ask
		f.kind = kindIndex
		return f
	}
	// uv's proof begins with a fact: "Because FACT and you require X, we can conclude that …".
	if _, proof, ok := strings.Cut(flat, "Because "); ok {
		proof, _, _ = strings.Cut(proof, ", we can conclude")
		if f.proof(proof) {
			return f
		}
	}
	if f.pip(flat) {
		return f
	}
	if m := buildRE.FindStringSubmatch(flat); m != nil {
		f.kind = kindBuild
		for _, g := range m[1:] {
			if g != "" {
				f.pkg = bareName(g)
			}
		}
		return f
	}
	if clashRE.MatchString(flat) {
		f.kind = kindClash
	}
	return f
}

// proof reads the first step of uv's reasoning.
func (f *failure) proof(text string) bool {
	if m := pythonUV.FindStringSubmatch(text); m != nil {
		f.kind, f.pkg, f.want, f.by = kindPython, bareName(m[2]), m[1], m[2]
		return true
	}
	switch {
	case unknownUV.MatchString(text):
		f.kind, f.pkg = kindUnknown, bareName(unknownUV.FindStringSubmatch(text)[1])
		f.want = f.pkg
	case versionUV.MatchString(text):
		m := versionUV.FindStringSubmatch(text)
		f.kind, f.pkg, f.want = kindVersion, bareName(m[1]), m[1]
	case onlyUV.MatchString(text):
		m := onlyUV.FindStringSubmatch(text)
		f.kind, f.pkg, f.want = kindVersion, bareName(m[1]), m[1]
		for _, known := range append(strings.Fields(m[2]), m[1]) { // "only numpy<=2.5.5": that one is there
			if at := strings.LastIndexAny(known, "<>="); at >= 0 {
				f.offered = append(f.offered, known[at+1:])
			}
		}
	default:
		return false
	}
	if m := directUV.FindStringSubmatch(text); m != nil {
		f.want = m[1]
	} else if m := byUV.FindStringSubmatch(text); m != nil {
		f.by, f.want = m[1], m[2]
	}
	return true
}

// pip reads pip's complaint about one requirement.
func (f *failure) pip(flat string) bool {
	if m := pythonPip.FindStringSubmatch(flat); m != nil {
		f.kind, f.pkg, f.want, f.by = kindPython, bareName(m[1]), m[2], m[1]
		return true
	}
	m := versionPip.FindStringSubmatch(flat)
	if m == nil {
		return false
	}
	f.kind, f.pkg, f.want, f.by = kindVersion, bareName(m[1]), m[1], m[3]
	if strings.HasPrefix(f.by, "-r ") {
		f.by = ""
	}
	if strings.TrimSpace(m[2]) == "none" || m[2] == "" {
		f.kind, f.want = kindUnknown, f.pkg
	} else {
		for _, v := range strings.Split(m[2], ",") {
			f.offered = append(f.offered, strings.TrimSpace(v))
		}
	}
	// Versions for other Pythons are hidden by pip, which says so first: "1.41.0 Requires-Python >=3.11,<4.0; 1.42.0 …".
	if _, number, ok := strings.Cut(m[1], "=="); ok {
		if _, tail, ok := strings.Cut(flat, " "+number+" Requires-Python "); ok {
			f.kind, f.by = kindPython, m[1]
			if f.want, _, _ = strings.Cut(tail, ";"); strings.Contains(f.want, "ERROR") {
				f.want, _, _ = strings.Cut(f.want, " ERROR")
			}
		}
	}
	return true
}

// words is the failure as an error for the chain: what the program said.
func (f failure) words() error {
	if f.kind == kindIndex {
		return fmt.Errorf("%w: %s", ErrIndex, f.said)
	}
	if f.said == "" {
		return errors.New("it gave no reason")
	}
	return errors.New(f.said)
}

const indexNext = "check the network, the proxy and the index settings (UV_*, PIP_*, HTTPS_PROXY), then try again"

// resolveFailed makes the problem that a resolver's failure is.
func (f failure) resolveFailed(cacheDir string, in Interpreter) error {
	err := f.words()
	switch f.kind {
	case kindFull:
		return diskFull(err, cacheDir)
	case kindIndex:
		return problem.Wrap(err, problem.EnvBuildFailed, indexNext, "the package index could not be asked for the app's dependencies")
	case kindUnknown, kindVersion:
		if f.by != "" { // not what the app asks for, but what that asks for
			code := problem.EnvBuildFailed
			if isFlwr(bareName(f.by)) {
				code = problem.FlwrUnavailable
			}
			return problem.Wrap(err, code, "name another version of "+bareName(f.by)+", or an index that has what it needs", "%s cannot be installed: it needs %s, which the package index does not have", f.by, f.want)
		}
		if f.kind == kindVersion && isFlwr(f.pkg) {
			return problem.Wrap(err, problem.FlwrUnavailable, f.choose("--flwr or the app's dependencies"), "there is no %s", f.want)
		}
		if f.kind == kindVersion {
			return problem.Wrap(err, problem.DependencyMissing, f.choose("the app's dependencies"), "there is no %s", f.want)
		}
		if isFlwr(f.pkg) {
			return problem.Wrap(err, problem.FlwrUnavailable, "check which index or wheel folder is set (UV_*, PIP_*)", "the package index has no %s", f.pkg)
		}
		return problem.Wrap(err, problem.DependencyMissing, "correct its name in the app's dependencies, or name the index that has it (UV_INDEX, PIP_EXTRA_INDEX_URL)",
			"the package index has no package named %q", f.pkg)
	case kindPython:
		code, next := problem.EnvBuildFailed, "name another interpreter with --python, or change the app's dependencies"
		if isFlwr(f.pkg) {
			code, next = problem.FlwrUnavailable, "name another interpreter with --python, or another version with --flwr"
		}
		return problem.Wrap(err, code, next, "%s needs Python %s, and %s is %s", f.by, f.want, in.Path, in.Version)
	case kindBuild:
		return problem.Wrap(err, problem.EnvBuildFailed, "choose a version that has a wheel for this Python, or install what its build needs", "%s could not be built from source", orElse(f.pkg, "a dependency"))
	case kindClash:
		return problem.Wrap(err, problem.EnvBuildFailed, "change the app's dependencies so that they agree, or name another flwr with --flwr", "the app's dependencies cannot be met together")
	}
	return problem.Wrap(err, problem.EnvBuildFailed, "read what the installer said; it works in the app's directory the same way", "the app's dependencies could not be resolved")
}

func (f failure) choose(where string) string {
	switch len(f.offered) {
	case 0:
		return "name a version that exists in " + where
	case 1:
		return fmt.Sprintf("name a version that exists in %s; the nearest is %s", where, f.offered[0])
	}
	return fmt.Sprintf("name a version that exists in %s; the nearest are %s", where, strings.Join(f.offered, " and "))
}

func orElse(s, other string) string {
	if s == "" {
		return other
	}
	return s
}

// installFailed makes the problem that a failed installation of what is.
func installFailed(r result, dir, what string) error {
	f := classify(r.output())
	if f.said == "" {
		f.said = r.exit.String()
	}
	err := f.words()
	if r.exit.OOM {
		return problem.Wrap(err, problem.OutOfMemory, "give this machine or container more memory", "the kernel ended the installer of %s for want of memory", what)
	}
	switch f.kind {
	case kindFull:
		return diskFull(err, dir)
	case kindIndex:
		return problem.Wrap(err, problem.EnvBuildFailed, indexNext, "%s could not be downloaded", what)
	case kindHash:
		return problem.Wrap(err, problem.EnvBuildFailed, "make a new lock; if it happens again, the index serves something else than was locked", "a download is not what the lock says")
	case kindBuild:
		return problem.Wrap(err, problem.EnvBuildFailed, "choose a version that has a wheel for this Python and platform, or install what its build needs", "%s could not be built from source", orElse(f.pkg, "a dependency"))
	case kindUnknown, kindVersion, kindPython, kindClash:
		return problem.Wrap(err, problem.EnvBuildFailed, "use the Python that the lock was made for, and an index that has what it names", "%s cannot be installed here", what)
	}
	return problem.Wrap(err, problem.EnvBuildFailed, "read what the installer said", "%s could not be installed", what)
}
