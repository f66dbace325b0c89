package pyenv

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"

	"github.com/pergolafl/pergola/internal/problem"
)

// Phases of [Ensure] as progress tells them.
const (
	PhaseWaiting    = "waiting for another build"
	PhaseResolving  = "resolving" // finding or fetching the installer, making the empty environment
	PhaseInstalling = "installing"
	PhaseCompiling  = "compiling"
)

// Progress tells how far a build is.
type Progress struct {
	Phase   string // one of the Phase constants
	Done    int    // packages, of Total
	Total   int    // 0 if unknown
	Message string // the last thing that the installer said
}

// Env is an environment that programs can be started from.
type Env struct {
	Dir      string // its root
	Python   string // its interpreter, to be started by this path
	Bin      string // where its programs are: flower-superlink and the others
	Flwr     string // version of flwr
	Key      string // changes when anything in it does
	Existing bool   // brought by the user, and left as it is
}

// keyFormat is part of every key: raise it when environments are built differently.
const keyFormat = "pergola-env-1"

// envKey names an environment: what is in it, and what it runs on.
func envKey(in Interpreter, lock Lock) string {
	h := sha256.New()
	for _, part := range []string{keyFormat, lock.Text, in.Real, in.Version, in.Platform} {
		fmt.Fprintf(h, "%d:%s\n", len(part), part)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// Ensure gives the environment for lock on in, building it if need be. Where it is complete, that takes a few system
// calls and no program; where another process builds it, Ensure waits, telling so by progress (which may be nil and is
// never called concurrently). When ctx ends, the installer is killed and what it did is removed; where this process is
// killed, the next builder does that, since only a marker file that is written last makes an environment count.
//
// Problems: env-build-failed, disk-full, and with [ErrIndex] in the chain an index that could not be reached.
func Ensure(ctx context.Context, cacheDir string, in Interpreter, lock Lock, opt Options, progress func(Progress)) (Env, error) {
	if err := installerKnown(opt.Installer); err != nil {
		return Env{}, err
	}
	cacheDir, err := filepath.Abs(cacheDir)
	if err != nil {
		return Env{}, cacheProblem(err, cacheDir)
	}
	key := envKey(in, lock)
	// 24 digits keep the path short: it stands in the first line of every program, which old kernels cut at 127 bytes.
	dir := filepath.Join(cacheDir, "envs", key[:24])
	env := Env{Dir: dir, Python: filepath.Join(dir, "bin", "python"), Bin: filepath.Join(dir, "bin"), Flwr: lock.flwrFor(in), Key: key}
	usable := func() bool { return complete(dir, key) && executable(env.Python) }
	if usable() {
		return env, nil
	}
	pins, err := readLock(lock.Text)
	if err != nil {
		return Env{}, problem.Wrap(err, problem.BundleInvalid, "submit the app again, so that it is locked again", "the lock of the app's dependencies is damaged")
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return Env{}, cacheProblem(err, cacheDir)
	}
	b := &build{dir: dir, key: key, cacheDir: cacheDir, in: in, lock: lock, pins: pins, opt: opt, progress: progress}
	unlock, err := flock(ctx, dir+".lock", func() { b.tell(PhaseWaiting, "") })
	if err != nil {
		if ctx.Err() != nil {
			return Env{}, fmt.Errorf("wait for another build of the environment: %w", context.Cause(ctx))
		}
		return Env{}, cacheProblem(err, cacheDir)
	}
	defer unlock()
	if usable() {
		return env, nil
	}
	if err := b.run(ctx); err != nil {
		// Not trusted either way; removed because it may be large.
		err = errors.Join(err, os.RemoveAll(dir))
		if ctx.Err() != nil {
			return Env{}, fmt.Errorf("build the environment: %w", context.Cause(ctx))
		}
		return Env{}, err
	}
	return env, nil
}

// build is one construction of an environment.
type build struct {
	dir, key, cacheDir string
	in                 Interpreter
	lock               Lock
	pins               []pin
	opt                Options
	progress           func(Progress)

	mu   sync.Mutex // guards the rest: a program's two streams are read concurrently
	last Progress
}

// tell passes progress on. An empty phase keeps the one before.
func (b *build) tell(phase, message string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.tellLocked(phase, message)
}

func (b *build) tellLocked(phase, message string) {
	if phase != "" && phase != b.last.Phase {
		b.last.Phase = phase
		if phase == PhaseCompiling {
			b.last.Done = b.last.Total
		}
	}
	b.last.Message = message
	if b.progress != nil {
		b.progress(b.last)
	}
}

var (
	fetchedRE   = regexp.MustCompile(`^\s*(?:Downloaded|Built|Collecting|Processing) (\S+)`)
	installedRE = regexp.MustCompile(`^(?:Installed (\d+) package|Successfully installed )`)
)

// heard reads the installers' lines for progress.
func (b *build) heard(line string) {
	b.opt.log(line)
	// After the work uv lists what it installed, with a plus before each.
	if strings.TrimSpace(line) == "" || strings.HasPrefix(line, " + ") {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case fetchedRE.MatchString(line):
		b.last.Done = min(b.last.Done+1, b.last.Total)
	case installedRE.MatchString(line):
		b.tellLocked(PhaseCompiling, line)
		return
	}
	b.tellLocked("", line)
}

func (b *build) run(ctx context.Context) error {
	b.tell(PhaseResolving, "")
	if err := os.RemoveAll(b.dir); err != nil {
		return cacheProblem(err, b.cacheDir)
	}
	t, err := findTool(ctx, b.cacheDir, b.in, b.opt)
	if err != nil {
		return err
	}
	dir, err := scratch(b.cacheDir)
	if err != nil {
		return cacheProblem(err, b.cacheDir)
	}
	defer func() {
		if err := os.RemoveAll(dir); err != nil {
			b.opt.log(err.Error())
		}
	}()

	// Direct references without an archive (a repository at a commit) have no hash; an installer takes either only hashed
	// entries or none, so they go second.
	var hashed, direct strings.Builder
	total := 0
	env := b.in.markerEnv()
	for _, p := range b.pins {
		to := &hashed
		if len(p.hashes) == 0 {
			to = &direct
		}
		to.WriteString(p.String())
		for _, h := range p.hashes {
			to.WriteString(" \\\n    --hash=" + h)
		}
		to.WriteString("\n")
		if p.wanted(env) {
			total++
		}
	}
	b.mu.Lock()
	b.last.Total = total
	b.mu.Unlock()

	if t.uv != "" {
		args := []string{t.uv, "venv", "--python", b.in.Path, "--no-project", b.dir}
		r, err := run(ctx, command{name: "uv venv", args: args, dir: dir, env: t.env.list(), onLine: b.opt.log})
		if err != nil {
			return err
		}
		if !r.ok() {
			return b.failed(r)
		}
	} else if err := venv(ctx, b.dir, b.in, t.env, b.opt, "--without-pip"); err != nil {
		return err
	}
	b.tell(PhaseInstalling, fmt.Sprintf("installing %d packages", total))
	for i, text := range []string{hashed.String(), direct.String()} {
		if text == "" {
			continue
		}
		file := filepath.Join(dir, "lock"+strconv.Itoa(i)+".txt")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			return cacheProblem(err, b.cacheDir)
		}
		args := b.installArgs(t, file, i == 0)
		r, err := run(ctx, command{name: "install the environment", args: args, dir: dir, env: t.env.list(), onLine: b.heard})
		if err != nil {
			return err
		}
		if !r.ok() {
			return b.failed(r)
		}
	}
	if t.uv == "" {
		if err := b.compile(ctx, t.env); err != nil {
			return err
		}
	}
	if err := b.check(); err != nil {
		return err
	}
	if err := finish(b.dir, b.key); err != nil {
		return cacheProblem(err, b.cacheDir)
	}
	return nil
}

func (b *build) installArgs(t tool, file string, hashes bool) []string {
	python := filepath.Join(b.dir, "bin", "python")
	var args []string
	if t.uv != "" {
		args = append([]string{t.uv, "pip", "install", "--python", python, "--no-deps", "--compile-bytecode"}, t.indexFlags.uv...)
	} else {
		args = []string{t.pip, "-m", "pip", "--python", python, "install", "--no-deps", "--no-compile"}
	}
	if hashes {
		args = append(args, "--require-hashes")
	}
	return append(args, "-r", file)
}

// compile writes bytecode for all that pip installed, on all processors. Files that are not meant to compile (templates,
// tests of syntax errors) exist in many packages, so its exit status says nothing.
func (b *build) compile(ctx context.Context, env environment) error {
	b.tell(PhaseCompiling, "")
	args := []string{filepath.Join(b.dir, "bin", "python"), "-E", "-s", "-m", "compileall", "-q", "-j", "0", filepath.Join(b.dir, "lib")}
	r, err := run(ctx, command{name: "python -m compileall", args: args, env: env.list(), onLine: b.opt.log})
	if err == nil && full(nil, r.output()) {
		return diskFull(errors.New(lastLines(r.output(), 2)), b.cacheDir)
	}
	return err
}

func (b *build) failed(r result) error {
	return installFailed(r, b.cacheDir, "the app's environment")
}

// check looks for the one package that nothing works without.
func (b *build) check() error {
	found, err := filepath.Glob(filepath.Join(b.dir, "lib", "python*", "site-packages", "flwr*.dist-info"))
	if err != nil || len(found) == 0 {
		return problem.New(problem.FlwrUnavailable, "lock the app's dependencies again", "the environment was installed without flwr")
	}
	return nil
}
