package pyenv

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/pergolafl/pergola/internal/problem"
)

// oldestUV is the first uv with all options used here (--universal, UV_DEFAULT_INDEX).
var oldestUV = []specifier{mustSpecifier(">=0.4.23")}

// uvRetry is how long after a failed attempt to fetch uv the next is made.
const uvRetry = time.Hour

// tool is what locks and installs: uv, or a Python that has a current pip.
type tool struct {
	uv  string
	pip string
	env environment
	indexFlags
}

// findTool picks the installer and makes it ready to use, fetching it into the cache where need be.
func findTool(ctx context.Context, cacheDir string, in Interpreter, opt Options) (tool, error) {
	t := tool{env: cleanEnv(opt.ExtraEnv)}
	var err error
	if t.indexFlags, err = withIndexes(ctx, t.env, in, opt.log); err != nil {
		return t, err
	}
	if opt.Installer != "pip" {
		t.uv, err = findUV(ctx, cacheDir, in, t.env, opt)
		if ctx.Err() != nil {
			return t, context.Cause(ctx)
		}
		if err == nil {
			return t, nil
		}
		if opt.Installer == "uv" {
			return t, err
		}
		opt.log("uv is not to be had, going on with pip: " + err.Error())
	}
	t.pip, err = pipTool(ctx, cacheDir, in, t.env, opt)
	return t, err
}

// findUV gives the path of a uv that works: from PATH, beside the interpreter, or fetched as a wheel.
func findUV(ctx context.Context, cacheDir string, in Interpreter, env environment, opt Options) (string, error) {
	var places []string
	for dir := range strings.SplitSeq(env["PATH"], ":") {
		if path := filepath.Join(dir, "uv"); filepath.IsAbs(path) && executable(path) {
			places = append(places, path)
			break
		}
	}
	if beside := filepath.Join(filepath.Dir(in.Real), "uv"); executable(beside) {
		places = append(places, beside)
	}
	for _, path := range places {
		if err := uvWorks(ctx, path, env); err == nil {
			return path, nil
		} else if ctx.Err() != nil {
			return "", context.Cause(ctx)
		}
	}
	dir := filepath.Join(cacheDir, "tools", "uv")
	uv := filepath.Join(dir, "bin", "uv")
	if complete(dir, "uv") && uvWorks(ctx, uv, env) == nil {
		return uv, nil
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return "", cacheProblem(err, cacheDir)
	}
	unlock, err := flock(ctx, dir+".lock", func() { opt.log("waiting for another process that fetches uv") })
	if err != nil {
		return "", err
	}
	defer unlock()
	if complete(dir, "uv") && uvWorks(ctx, uv, env) == nil {
		return uv, nil
	}
	// One failure an hour is enough: offline, each attempt takes seconds. Another set of indexes is another try.
	failed := dir + ".failed"
	mark := sha256.Sum256([]byte(indexMark(env, in)))
	if info, err := os.Stat(failed); err == nil && time.Since(info.ModTime()) < uvRetry && opt.Installer != "uv" && !opt.Fresh {
		if b, err := os.ReadFile(failed); err == nil && string(b) == hex.EncodeToString(mark[:]) {
			return "", errors.New("fetching it failed within the last hour")
		}
	}
	opt.log("fetching uv")
	if err := fetchUV(ctx, dir, in, env, opt); err != nil {
		if ctx.Err() == nil {
			_ = writeFile(failed, []byte(hex.EncodeToString(mark[:])), false)
		}
		return "", err
	}
	if err := uvWorks(ctx, uv, env); err != nil {
		return "", problem.Wrap(err, problem.EnvBuildFailed, "install uv, or use --installer pip", "the uv that was fetched does not run")
	}
	if err := finish(dir, "uv"); err != nil {
		return "", cacheProblem(err, cacheDir)
	}
	return uv, nil
}

// fetchUV installs uv's wheel into a virtual environment at dir.
func fetchUV(ctx context.Context, dir string, in Interpreter, env environment, opt Options) error {
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	pip, err := pipTool(ctx, filepath.Dir(filepath.Dir(dir)), in, env, opt)
	if err != nil {
		return err
	}
	if err := venv(ctx, dir, in, env, opt, "--without-pip"); err != nil {
		return err
	}
	args := []string{pip, "-m", "pip", "--python", filepath.Join(dir, "bin", "python"), "install", "--only-binary", ":all:", "--no-deps", "--retries", "1", "--timeout", "20", "uv>=0.4.23"}
	r, err := run(ctx, command{name: "pip install uv", args: args, env: env.list(), onLine: opt.log})
	if err != nil {
		return err
	}
	if !r.ok() {
		return installFailed(r, dir, "uv")
	}
	return nil
}

func executable(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0
}

func uvWorks(ctx context.Context, path string, env environment) error {
	ctx, cancel := context.WithTimeoutCause(ctx, probeTimeout, fmt.Errorf("it did not answer within %v", probeTimeout))
	defer cancel()
	r, err := run(ctx, command{name: "uv", args: []string{path, "--version"}, env: env.list()})
	if err != nil {
		return err
	}
	words := strings.Fields(r.stdout)
	if !r.ok() || len(words) < 2 || words[0] != "uv" {
		return fmt.Errorf("%s does not work: %s", path, lastLines(r.output(), 2))
	}
	if !meets(oldestUV, words[1]) {
		return fmt.Errorf("%s is too old: %s", path, words[1])
	}
	return nil
}

// oldestPip is the first with install --report and --python.
var oldestPip = []specifier{mustSpecifier(">=22.3")}

// pipTool gives a Python with a pip that is new enough, in a virtual environment below the cache: the user's
// interpreter may have none, an old one, or a changed one.
func pipTool(ctx context.Context, cacheDir string, in Interpreter, env environment, opt Options) (string, error) {
	sum := sha256.Sum256([]byte(in.Real + "\x00" + in.Version + "\x00" + in.Platform))
	id := hex.EncodeToString(sum[:6])
	dir := filepath.Join(cacheDir, "tools", "pip-"+id)
	python := filepath.Join(dir, "bin", "python")
	if complete(dir, id) && executable(python) {
		return python, nil
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return "", cacheProblem(err, cacheDir)
	}
	unlock, err := flock(ctx, dir+".lock", func() { opt.log("waiting for another process that prepares pip") })
	if err != nil {
		return "", err
	}
	defer unlock()
	if complete(dir, id) && executable(python) {
		return python, nil
	}
	if err := os.RemoveAll(dir); err != nil {
		return "", cacheProblem(err, cacheDir)
	}
	if err := venv(ctx, dir, in, env, opt); err != nil {
		return "", err
	}
	r, err := run(ctx, command{name: "pip --version", args: []string{python, "-m", "pip", "--version"}, env: env.list()})
	if err != nil {
		return "", err
	}
	if words := strings.Fields(r.stdout); !r.ok() || len(words) < 2 || !meets(oldestPip, words[1]) {
		r, err = run(ctx, command{name: "pip install pip", args: []string{python, "-m", "pip", "install", "--upgrade", "pip>=22.3"}, env: env.list(), onLine: opt.log})
		if err != nil {
			return "", err
		}
		if !r.ok() {
			return "", installFailed(r, dir, "pip")
		}
	}
	if err := finish(dir, id); err != nil {
		return "", cacheProblem(err, cacheDir)
	}
	return python, nil
}

// venv makes a virtual environment with Python's own module.
func venv(ctx context.Context, dir string, in Interpreter, env environment, opt Options, flags ...string) error {
	args := append([]string{in.Path, "-E", "-s", "-m", "venv"}, flags...)
	r, err := run(ctx, command{name: "python -m venv", args: append(args, dir), env: env.list(), onLine: opt.log})
	if err != nil {
		return err
	}
	if r.ok() {
		return nil
	}
	said := lastLines(r.output(), 5)
	if full(nil, r.output()) {
		return diskFull(errors.New(said), dir)
	}
	if strings.Contains(r.output(), "ensurepip") || strings.Contains(r.output(), "No module named venv") {
		return problem.Wrap(errors.New(said), problem.EnvBuildFailed, "install uv, or the package that has Python's venv module (python3-venv on Debian and Ubuntu)",
			"%s lacks the venv or ensurepip module", in.Path)
	}
	return problem.Wrap(errors.New(said), problem.EnvBuildFailed, "install uv, or name another interpreter with --python PATH", "%s cannot make a virtual environment", in.Path)
}

// markerName is the file that makes an environment count; it is written last.
const markerName = ".pergola-complete"

// complete tells whether dir was built to its end for key.
func complete(dir, key string) bool {
	b, err := os.ReadFile(filepath.Join(dir, markerName))
	return err == nil && string(b) == key+"\n"
}

// finish makes dir count from now on, also after a power cut.
func finish(dir, key string) error {
	if err := syncAll(dir); err != nil {
		return err
	}
	return writeFile(filepath.Join(dir, markerName), []byte(key+"\n"), true)
}
