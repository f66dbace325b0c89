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
	kind    string // one of the constants below
	pkg     string // for kindUnknown, kindVersion, kindBuild
	want    string // for kindVersion: "flwr==9.9.9"
	offered []string
	said    string // the words that matter, on one line
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
		`operation timed out|failed to establish a new connection|SSLError|certificate verify failed|invalid peer certificate|proxyerror|tunnel error|` +
		`network connectivity is disabled|50[0234] (?:server error|bad gateway|service unavailable|gateway time)|403 (?:client error|forbidden)|401 (?:client error|unauthorized)|HTTP error 5\d\d`)
	// uv: Because NAME was not found in the package registry; pip: Could not find … NAME (from versions: none)
	unknownUV  = regexp.MustCompile(`Because (\S+?) was not found in the (?:package registry|provided package locations|cache)`)
	unknownPip = regexp.MustCompile(`Could not find a version that satisfies the requirement (\S+?)(?:[<>=!~;\s\[].*?)?\(from versions: none\)`)
	versionUV  = regexp.MustCompile(`there (?:is|are) no versions? of (\S+?)(?:\[[^\]]*\])?((?:==|>=|<=|>|<|~=|!=)\S+?|) and `)
	onlyUV     = regexp.MustCompile(`only (?:the following versions of )?(\S+?)(?:\[[^\]]*\])?((?:==|>=|<=|>|<)\S+) (?:is|are) available`)
	versionPip = regexp.MustCompile(`Could not find a version that satisfies the requirement (\S+?)(?:\[[^\]]*\])?((?:==|>=|<=|>|<|~=|!=)\S+)[^(]*(?:\(from \S+\) )?\(from versions: ([^)]*)\)`)
	pythonRE   = regexp.MustCompile(`(?i)(?:current|requested) Python version \([^)]*\) does not satisfy|requires a different Python|Ignored the following versions that require a different python`)
	pythonPkg  = regexp.MustCompile(`and (\S+?)(?:==|>=|<=|>|<)\S* depends on Python|Package '([^']+)' requires a different Python`)
	clashRE    = regexp.MustCompile(`(?i)No solution found|ResolutionImpossible|conflicting dependencies|No matching distribution`)
	hashRE     = regexp.MustCompile(`(?i)hash mismatch|DO NOT MATCH THE HASHES`)
	buildRE    = regexp.MustCompile("(?i)Failed to build `?([^`\\s]+)`?|Failed to download and build `?([^`\\s]+)`?|Failed building wheel for (\\S+)|metadata-generation-failed|no wheels? with a matching|has no usable wheels|subprocess-exited-with-error")
)

func classify(said string) failure {
	// uv folds its sentences to the width of a terminal and draws a tree before them.
	flat := strings.Join(strings.Fields(strings.NewReplacer("×", " ", "╰─▶", " ", "├─▶", " ", "│", " ").Replace(said)), " ")
	f := failure{said: lastLines(said, 12)}
	m := func(re *regexp.Regexp) []string { return re.FindStringSubmatch(flat) }
	first := func(groups []string) string {
		for _, g := range groups[1:] {
			if g != "" {
				return strings.Trim(g, "`'\".,:")
			}
		}
		return ""
	}
	switch {
	case full(nil, flat):
		f.kind = kindFull
	case hashRE.MatchString(flat):
		f.kind = kindHash
	// Before the names: pip goes on to say "from versions: none" when it could not ask.
	case indexRE.MatchString(flat):
		f.kind = kindIndex
	case unknownUV.MatchString(flat):
		f.kind, f.pkg = kindUnknown, first(m(unknownUV))
	case unknownPip.MatchString(flat):
		f.kind, f.pkg = kindUnknown, first(m(unknownPip))
	case versionPip.MatchString(flat):
		g := m(versionPip)
		f.kind, f.pkg, f.want = kindVersion, g[1], g[1]+g[2]
		for _, v := range strings.Split(g[3], ",") {
			f.offered = append(f.offered, strings.TrimSpace(v))
		}
		// pip hides the versions that want another Python and says so first.
		if pythonRE.MatchString(flat) && strings.Contains(flat, strings.TrimLeft(g[2], "=")+" Requires-Python") {
			f.kind = kindPython
		}
	case versionUV.MatchString(flat):
		g := m(versionUV)
		f.kind, f.pkg, f.want = kindVersion, g[1], g[1]+g[2]
	case onlyUV.MatchString(flat):
		g := m(onlyUV)
		f.kind, f.pkg, f.offered = kindVersion, g[1], []string{strings.TrimLeft(g[2], "<>=")}
	case pythonRE.MatchString(flat):
		f.kind = kindPython
		if g := m(pythonPkg); g != nil {
			f.pkg = first(g)
		}
	case buildRE.MatchString(flat):
		f.kind, f.pkg = kindBuild, first(m(buildRE))
	case clashRE.MatchString(flat):
		f.kind = kindClash
	}
	f.pkg = canonical(f.pkg)
	return f
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
	case kindUnknown:
		if isFlwr(f.pkg) {
			return problem.Wrap(err, problem.FlwrUnavailable, "check which index or wheel folder is set (UV_*, PIP_*)", "the package index has no %s", f.pkg)
		}
		return problem.Wrap(err, problem.DependencyMissing, "correct its name in the app's dependencies, or name the index that has it (UV_INDEX, PIP_EXTRA_INDEX_URL)",
			"the package index has no package named %q", f.pkg)
	case kindVersion:
		what := f.want
		if what == "" {
			what = "the wanted version of " + f.pkg
		}
		if isFlwr(f.pkg) {
			return problem.Wrap(err, problem.FlwrUnavailable, f.choose("--flwr or the app's dependencies"), "there is no %s", what)
		}
		return problem.Wrap(err, problem.DependencyMissing, f.choose("the app's dependencies"), "there is no %s", what)
	case kindPython:
		if isFlwr(f.pkg) {
			return problem.Wrap(err, problem.FlwrUnavailable, "name another version with --flwr, or another interpreter with --python", "this flwr does not go with Python %s", in.Version)
		}
		return problem.Wrap(err, problem.EnvBuildFailed, "name another interpreter with --python, or change the app's dependencies", "the app's dependencies do not go with Python %s", in.Version)
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
	err := f.words()
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
