package pyenv

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"github.com/pergolafl/pergola/internal/problem"
)

// minPython is the oldest Python that current Flower and Pergola's own shim run on.
const minPython = "3.10"

// probeTimeout is how long an interpreter may take to say what it is.
const probeTimeout = 30 * time.Second

const pythonNext = "install Python " + minPython + " or newer, or name one with --python PATH or PERGOLA_PYTHON"

var minSpec = []specifier{mustSpecifier(">=" + minPython)}

func mustSpecifier(text string) specifier {
	s, err := parseSpecifier(text)
	if err != nil {
		panic(err)
	}
	return s
}

// candidates are the names that are looked for on PATH when none is given.
var candidates = []string{"python3", "python3.13", "python3.12", "python3.11", "python3.10"}

// Find gives the interpreter that want means: a path, a name on PATH, a version such as "3.12", or a folder of a virtual
// environment. An empty want stands for $PERGOLA_PYTHON, and without that for the newest of python3 and
// python3.13 … python3.10 on PATH that works (python3 where it is as new as another).
//
// What is missing, no interpreter, or older than 3.10 is a problem python-unsuitable. What was learned is kept in
// [DefaultCache] for as long as the file does not change, so finding it again runs no program.
func Find(ctx context.Context, want string) (Interpreter, error) {
	if want == "" {
		want = os.Getenv("PERGOLA_PYTHON")
	}
	if want != "" {
		return findNamed(ctx, want)
	}
	var best Interpreter
	var bestVersion version
	var seen []string
	tried := map[string]bool{}
	for _, name := range candidates {
		path, err := lookPath(name)
		if err != nil || tried[path] {
			continue
		}
		tried[path] = true
		in, err := probe(ctx, path)
		if ctx.Err() != nil {
			return Interpreter{}, context.Cause(ctx)
		}
		if err != nil {
			seen = append(seen, fmt.Sprintf("%s does not work", path))
			continue
		}
		v, ok := parseVersion(in.Version)
		if !ok || !meets(minSpec, in.Version) {
			seen = append(seen, fmt.Sprintf("%s is %s", path, in.Version))
			continue
		}
		if best.Path == "" || v.compare(bestVersion) > 0 {
			best, bestVersion = in, v
		}
	}
	if best.Path != "" {
		return best, nil
	}
	if len(seen) == 0 {
		return Interpreter{}, problem.New(problem.PythonUnsuitable, pythonNext, "there is no python3 on PATH")
	}
	return Interpreter{}, problem.New(problem.PythonUnsuitable, pythonNext, "no Python on PATH is %s or newer (%s)", minPython, strings.Join(seen, ", "))
}

var bareVersionRE = regexp.MustCompile(`^\d+(\.\d+)?$`)

func findNamed(ctx context.Context, want string) (Interpreter, error) {
	name := want
	if bareVersionRE.MatchString(name) {
		name = "python" + name
	}
	path, err := lookPath(name)
	if err != nil {
		if errors.Is(err, os.ErrPermission) {
			return Interpreter{}, problem.New(problem.PythonUnsuitable, pythonNext, "%s may not be executed", want)
		}
		return Interpreter{}, problem.New(problem.PythonUnsuitable, pythonNext, "there is no Python at %s", want)
	}
	if info, err := os.Stat(path); err == nil && info.IsDir() {
		if path = filepath.Join(path, "bin", "python"); !isFile(path) {
			return Interpreter{}, problem.New(problem.PythonUnsuitable, pythonNext, "%s is a folder without bin/python", want)
		}
	}
	in, err := probe(ctx, path)
	if ctx.Err() != nil {
		return Interpreter{}, context.Cause(ctx)
	}
	if err != nil {
		return Interpreter{}, problem.Wrap(err, problem.PythonUnsuitable, pythonNext, "%s is not a Python interpreter that works", path)
	}
	if !meets(minSpec, in.Version) {
		return Interpreter{}, problem.New(problem.PythonUnsuitable, pythonNext, "%s is Python %s, and Flower apps need %s or newer", path, in.Version, minPython)
	}
	return in, nil
}

// lookPath finds a program as a shell would and makes its path absolute, keeping symlinks. A folder is found too when
// it is named with a slash.
func lookPath(name string) (string, error) {
	if strings.HasPrefix(name, "~/") {
		if home, err := os.UserHomeDir(); err == nil {
			name = filepath.Join(home, name[2:])
		}
	}
	if info, err := os.Stat(name); err == nil && info.IsDir() && strings.Contains(name, "/") {
		return filepath.Abs(name)
	}
	path, err := exec.LookPath(name)
	if err != nil && !errors.Is(err, exec.ErrDot) {
		return "", err
	}
	return filepath.Abs(path)
}

func isFile(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular()
}

// probeScript runs on any Python since 2.6, so that an old one can be named with its version. The first entry of
// sys.path is the working directory for -c, where a file called json.py may lie.
const probeScript = `import sys
if sys.path and sys.path[0] == "": del sys.path[0]
import json, os, platform, sysconfig
abi = sysconfig.get_config_var("SOABI") or sys.version_info[:2]
print("PERGOLA:" + json.dumps({"version": platform.python_version(), "path": sys.executable,
    "real": os.path.realpath(sys.executable), "platform": "%s-%s" % (sysconfig.get_platform(), abi)}))
`

const probePrefix = "PERGOLA:"

// probed is what the cache keeps of a probe.
type probed struct {
	Stamp string      // of the path that was asked for
	At    string      // of the interpreter that answered
	In    Interpreter // unset if Fail is
	Fail  string
}

// probe asks the program at path what it is.
func probe(ctx context.Context, path string) (Interpreter, error) {
	mark, shim := stamp(path)
	file := ""
	if mark != "" {
		sum := sha256.Sum256([]byte(path + "\x00" + mark))
		file = filepath.Join(DefaultCache(), "interpreters", hex.EncodeToString(sum[:12])+".json")
		var p probed
		if b, err := os.ReadFile(file); err == nil && json.Unmarshal(b, &p) == nil && p.Stamp == mark {
			if p.Fail != "" {
				return Interpreter{}, errors.New(p.Fail)
			}
			if at, _ := stamp(p.In.Path); at == p.At && at != "" {
				return p.In, nil
			}
		}
	}
	in, fail, err := ask(ctx, path)
	if err != nil {
		return Interpreter{}, err
	}
	if fail != "" {
		// A version manager's launcher of a version that is not chosen fails the same way until something changes.
		if shim && file != "" {
			remember(file, probed{Stamp: mark, Fail: fail})
		}
		return Interpreter{}, errors.New(fail)
	}
	direct := sameFile(path, in.Path)
	if direct {
		in.Path = path
	}
	// A launcher of unknown kind may start another interpreter next time.
	if file != "" && (direct || shim) {
		if at, _ := stamp(in.Path); at != "" {
			remember(file, probed{Stamp: mark, At: at, In: in})
		}
	}
	return in, nil
}

// remember is best effort: without it the next call is slower, that is all.
func remember(file string, p probed) {
	if b, err := json.Marshal(p); err == nil && os.MkdirAll(filepath.Dir(file), 0o755) == nil {
		_ = writeFile(file, b, false)
	}
}

func ask(ctx context.Context, path string) (in Interpreter, fail string, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, probeTimeout, fmt.Errorf("it did not answer within %v", probeTimeout))
	defer cancel()
	r, err := run(ctx, command{name: path, args: []string{path, "-E", "-s", "-c", probeScript}, env: cleanEnv(nil).list()})
	if err != nil {
		return in, "", err
	}
	for line := range strings.Lines(r.stdout) {
		if after, ok := strings.CutPrefix(line, probePrefix); ok {
			if err := json.Unmarshal([]byte(after), &in); err == nil && in.Path != "" && filepath.IsAbs(in.Path) {
				return in, "", nil
			}
		}
	}
	if said := lastLines(r.output(), 3); said != "" {
		return in, fmt.Sprintf("it ended with %v and said: %s", r.exit, said), nil
	}
	return in, fmt.Sprintf("it ended with %v and said nothing of itself", r.exit), nil
}

func sameFile(a, b string) bool {
	x, err := os.Stat(a)
	if err != nil {
		return false
	}
	y, err := os.Stat(b)
	return err == nil && os.SameFile(x, y)
}

// stamp changes whenever the program at path may have become another one; "" means that nothing can be said. A script is
// one of pyenv's launchers, whose choice is known to depend on a few variables and files, or unknown.
func stamp(path string) (mark string, shim bool) {
	info, err := os.Stat(path)
	if err != nil || !info.Mode().IsRegular() {
		return "", false
	}
	mark = fileMark(info)
	if cfg, err := os.Stat(filepath.Join(filepath.Dir(path), "..", "pyvenv.cfg")); err == nil {
		mark += "|" + fileMark(cfg)
	}
	if info.Size() > 4096 { // launchers are short, interpreters are not
		return mark, false
	}
	text, err := os.ReadFile(path)
	if err != nil || !strings.HasPrefix(string(text), "#!") {
		return mark, false
	}
	if filepath.Base(filepath.Dir(path)) != "shims" || !strings.Contains(string(text), "pyenv") {
		return "", false
	}
	root := filepath.Dir(filepath.Dir(path))
	mark += "|" + os.Getenv("PYENV_VERSION") + "|" + os.Getenv("PYENV_DIR")
	files := []string{filepath.Join(root, "version"), filepath.Join(root, "versions")}
	if dir, err := os.Getwd(); err == nil {
		for {
			files = append(files, filepath.Join(dir, ".python-version"))
			if dir == filepath.Dir(dir) {
				break
			}
			dir = filepath.Dir(dir)
		}
	}
	for _, f := range files {
		if info, err := os.Stat(f); err == nil {
			mark += "|" + f + fileMark(info)
		}
	}
	return mark, true
}

func fileMark(info os.FileInfo) string {
	var dev, inode uint64
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		dev, inode = st.Dev, st.Ino
	}
	return fmt.Sprintf("%d:%d:%d:%d", dev, inode, info.ModTime().UnixNano(), info.Size())
}

// suits tells whether in meets an app's requires-python.
func (in Interpreter) suits(requires string) error {
	specs, err := parseSpecifiers(requires)
	if err != nil {
		return problem.Wrap(err, problem.AppInvalid, `correct requires-python in the app's pyproject.toml, for example ">=3.10"`, "the app's requires-python %q cannot be read", requires)
	}
	if !meets(specs, in.Version) {
		return problem.New(problem.PythonUnsuitable, "name an interpreter that fits with --python PATH or PERGOLA_PYTHON",
			"the app wants Python %s, and %s is %s", requires, in.Path, in.Version)
	}
	return nil
}
