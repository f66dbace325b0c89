package pyenv

import (
	"archive/zip"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pergolafl/pergola/internal/problem"
)

// The tests below use real installers and wheels that they make themselves; nothing is downloaded. Tools are prepared once.
var testRoot string

// helperVar makes this binary a builder that is killed in the middle.
const helperVar = "PYENV_TEST_BUILD"

func TestMain(m *testing.M) {
	if job := os.Getenv(helperVar); job != "" {
		os.Exit(helper(job))
	}
	os.Exit(withRoot(m))
}

func withRoot(m *testing.M) int {
	var err error
	if testRoot, err = os.MkdirTemp("", "pyenv-test"); err != nil {
		panic(err)
	}
	defer os.RemoveAll(testRoot)
	for _, kv := range os.Environ() {
		if k, _, _ := strings.Cut(kv, "="); strings.HasPrefix(k, "UV_") || strings.HasPrefix(k, "PIP_") || k == "PERGOLA_PYTHON" {
			if err := os.Unsetenv(k); err != nil {
				panic(err)
			}
		}
	}
	for k, v := range map[string]string{
		"PERGOLA_CACHE": filepath.Join(testRoot, "cache"), "UV_CACHE_DIR": filepath.Join(testRoot, "uv"), "PIP_CACHE_DIR": filepath.Join(testRoot, "pip"),
		"XDG_CONFIG_HOME": filepath.Join(testRoot, "config"), "PYTHONDONTWRITEBYTECODE": "1", "UV_HTTP_RETRIES": "0",
	} {
		os.Setenv(k, v)
	}
	return m.Run()
}

// buildJob is what a helper process is told.
type buildJob struct {
	Cache   string
	In      Interpreter
	Lock    Lock
	Opt     Options
	StopAt  string // phase to say so and stand still at
	Started string // file to write then
}

func helper(text string) int {
	var job buildJob
	if err := json.Unmarshal([]byte(text), &job); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	job.Opt.Log = nil
	env, err := Ensure(context.Background(), job.Cache, job.In, job.Lock, job.Opt, func(p Progress) {
		if p.Phase == job.StopAt {
			if err := os.WriteFile(job.Started, nil, 0o600); err != nil {
				fmt.Fprintln(os.Stderr, err)
			}
			select {} // until killed
		}
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Print(env.Dir)
	return 0
}

func testPython(t *testing.T) Interpreter {
	t.Helper()
	in, err := Find(t.Context(), "")
	if err != nil {
		t.Fatalf("these tests need Python: %v", err)
	}
	return in
}

func needUV(t *testing.T) {
	t.Helper()
	if _, err := findUV(t.Context(), t.TempDir(), testPython(t), cleanEnv([]string{"PIP_NO_INDEX=1"}), Options{}); err != nil {
		t.Skipf("uv is not here: %v", err)
	}
}

// sharedTools is a cache folder in which the pip tool is made only once.
func sharedTools(t *testing.T) string { t.Helper(); return filepath.Join(testRoot, "shared") }

// eachInstaller runs a test with uv and with venv and pip.
func eachInstaller(t *testing.T, fn func(t *testing.T, cache string, opt Options)) {
	for _, name := range []string{"uv", "pip"} {
		t.Run(name, func(t *testing.T) {
			if name == "uv" {
				needUV(t)
			}
			fn(t, cacheFor(t), Options{Installer: name, Log: func(l string) { t.Log(l) }})
		})
	}
}

// cacheFor makes a fresh cache with the tools in it.
func cacheFor(t *testing.T) string {
	t.Helper()
	cache := t.TempDir()
	if err := os.MkdirAll(filepath.Join(sharedTools(t), "tools"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(sharedTools(t), "tools"), filepath.Join(cache, "tools")); err != nil {
		t.Fatal(err)
	}
	return cache
}

// wheel writes a small pure-Python wheel.
func wheel(t *testing.T, dir, name, version string, requires []string, files map[string]string) string {
	t.Helper()
	path := filepath.Join(dir, fmt.Sprintf("%s-%s-py3-none-any.whl", name, version))
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	info := fmt.Sprintf("%s-%s.dist-info/", name, version)
	all := map[string]string{
		name + "/__init__.py": "VERSION = " + fmt.Sprintf("%q", version) + "\n",
		info + "WHEEL":        "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
	}
	meta := fmt.Sprintf("Metadata-Version: 2.1\nName: %s\nVersion: %s\n", name, version)
	for _, r := range requires {
		if _, extra, ok := strings.Cut(r, "extra == '"); ok {
			meta += "Provides-Extra: " + strings.TrimSuffix(extra, "'") + "\n"
		}
		meta += "Requires-Dist: " + r + "\n"
	}
	all[info+"METADATA"] = meta
	for name, text := range files {
		all[name] = text
	}
	record := ""
	z := zip.NewWriter(f)
	put := func(name, text string) {
		h := &zip.FileHeader{Name: name, Method: zip.Deflate}
		h.SetMode(0o755)
		w, err := z.CreateHeader(h)
		if err == nil {
			_, err = w.Write([]byte(text))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	names := make([]string, 0, len(all))
	for n := range all {
		names = append(names, n)
	}
	slices.Sort(names)
	for _, n := range names {
		sum := sha256.Sum256([]byte(all[n]))
		record += fmt.Sprintf("%s,sha256=%s,%d\n", n, base64.RawURLEncoding.EncodeToString(sum[:]), len(all[n]))
		put(n, all[n])
	}
	put(info+"RECORD", record+info+"RECORD,,\n")
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

// wheels makes a folder with a stand-in for flwr in two versions, and a dependency.
func wheels(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, v := range []string{"1.29.0", "1.30.0"} {
		wheel(t, dir, "flwr", v, []string{"tinydep>=1.0", "tinyray; extra == 'simulation'"}, map[string]string{
			fmt.Sprintf("flwr-%s.dist-info/entry_points.txt", v): "[console_scripts]\nflower-superlink = flwr:main\n",
			"flwr/cli.py": "def main(): pass\n",
		})
	}
	wheel(t, dir, "tinydep", "1.1", nil, nil)
	wheel(t, dir, "tinydep", "0.9", nil, nil)
	wheel(t, dir, "tinyray", "2.0", nil, nil)
	wheel(t, dir, "appdep", "3.2.1", []string{"tinydep"}, nil)
	return dir
}

// offline has both installers see that folder alone, by the variables of one of them.
func offline(t *testing.T, by, dir string) {
	t.Helper()
	t.Setenv(by+"_FIND_LINKS", dir)
	t.Setenv(by+"_NO_INDEX", "1")
}

func python(t *testing.T, env Env, code string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), env.Python, "-c", code).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", code, err, out)
	}
	return strings.TrimSpace(string(out))
}

func TestAnAppGetsItsEnvironment(t *testing.T) {
	for _, by := range []string{"UV", "PIP"} {
		t.Run("settings of "+by, func(t *testing.T) {
			eachInstaller(t, func(t *testing.T, cache string, opt Options) {
				if by == "PIP" && opt.Installer == "pip" {
					t.Skip("the other tests do that")
				}
				offline(t, by, wheels(t))
				in := testPython(t)
				req := Requirements{Names: []string{"flwr[simulation]>=1.20", "appdep; python_version>='3.8'", "tinyray; sys_platform=='win32'"}}
				lock, err := MakeLock(t.Context(), cache, in, req, opt)
				if err != nil {
					t.Fatal(err)
				}
				if lock.Flwr != "1.30.0" || lock.Python != in.Version || !strings.Contains(lock.Text, "appdep==3.2.1") || !strings.Contains(lock.Text, "tinydep==1.1") {
					t.Fatalf("lock: %+v", lock)
				}
				var phases []string
				env, err := Ensure(t.Context(), cache, in, lock, opt, func(p Progress) {
					if len(phases) == 0 || phases[len(phases)-1] != p.Phase {
						phases = append(phases, p.Phase)
					}
					if p.Done > p.Total {
						t.Errorf("progress %+v", p)
					}
				})
				if err != nil {
					t.Fatal(err)
				}
				if other, err := filepath.Glob(filepath.Join(env.Dir, "lib", "*", "site-packages", "tinyray")); err != nil || len(other) > 0 {
					t.Errorf("what is for another system or for simulations was installed: %q, %v", other, err)
				}
				if got := python(t, env, "import flwr, appdep, tinydep; print(flwr.VERSION, appdep.VERSION, tinydep.VERSION)"); got != "1.30.0 3.2.1 1.1" {
					t.Errorf("got %s", got)
				}
				if want := []string{PhaseResolving, PhaseInstalling, PhaseCompiling}; !slices.Equal(phases, want) {
					t.Errorf("phases %q, want %q", phases, want)
				}
				if !executable(filepath.Join(env.Bin, "flower-superlink")) {
					t.Error("flwr's program is not in Bin")
				}
				if pyc, err := filepath.Glob(filepath.Join(env.Dir, "lib", "*", "site-packages", "flwr", "__pycache__", "*.pyc")); err != nil || len(pyc) != 2 {
					t.Errorf("bytecode: %q, %v", pyc, err)
				}

				// Once it is there, no program runs: neither the interpreter nor an installer is needed.
				t.Setenv("PATH", "/nowhere")
				gone := in
				gone.Path = "/nowhere/python3"
				again, err := Ensure(t.Context(), cache, gone, lock, opt, func(p Progress) { t.Errorf("progress %+v", p) })
				if err != nil || again != env {
					t.Errorf("again: %+v, %v; want %+v", again, err, env)
				}
				// The same question has the same answer without a program too; the mark of the settings is what counts.
				relock, err := MakeLock(t.Context(), cache, in, req, opt)
				if err != nil || relock != lock {
					t.Errorf("a second lock: %+v, %v", relock, err)
				}
				if _, err := os.Stat(filepath.Join(cache, "tmp")); err == nil {
					if left, err := os.ReadDir(filepath.Join(cache, "tmp")); err != nil || len(left) > 0 {
						t.Errorf("left behind: %v, %v", left, err)
					}
				}
			})
		})
	}
}

func TestFlwrVersions(t *testing.T) {
	eachInstaller(t, func(t *testing.T, cache string, opt Options) {
		dir := wheels(t)
		offline(t, "UV", dir)
		in := testPython(t)
		lock, err := MakeLock(t.Context(), cache, in, Requirements{Names: []string{"flwr>=1.30"}, Flwr: "1.29"}, opt)
		if err != nil || lock.Flwr != "1.29.0" {
			t.Errorf("--flwr 1.29: %+v, %v", lock, err)
		}
		lock, err = MakeLock(t.Context(), cache, in, Requirements{Simulation: true}, opt)
		if err != nil || !strings.Contains(lock.Text, "tinyray==2.0") {
			t.Errorf("simulation: %+v, %v", lock, err)
		}
		for _, c := range []struct {
			req   Requirements
			code  problem.Code
			words []string
		}{
			{Requirements{Flwr: "1.29.5"}, problem.FlwrUnavailable, []string{"there is no flwr==1.29.5", "the nearest are 1.29.0 and 1.30.0"}},
			{Requirements{Flwr: "2.0"}, problem.FlwrUnavailable, []string{"nearest is 1.30.0"}},
			{Requirements{Names: []string{"nosuchdep"}}, problem.DependencyMissing, []string{`"nosuchdep"`}},
			{Requirements{Names: []string{"appdep>=4"}}, problem.DependencyMissing, []string{"appdep>=4", "3.2.1"}},
			{Requirements{Names: []string{"flwr", "tinydep<1"}}, problem.EnvBuildFailed, []string{"tinydep"}},
			{Requirements{RequiresPython: ">=3.99"}, problem.PythonUnsuitable, []string{">=3.99", in.Version}},
		} {
			_, err := MakeLock(t.Context(), cache, in, c.req, opt)
			if problem.CodeOf(err) != c.code || errors.Is(err, ErrIndex) {
				t.Errorf("%+v: got %v (%s)", c.req, err, problem.CodeOf(err))
				continue
			}
			for _, w := range c.words {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("%+v: %v lacks %q", c.req, err, w)
				}
			}
		}
		// A wheel that arrives is seen at once.
		wheel(t, dir, "flwr", "1.29.5", nil, nil)
		if lock, err = MakeLock(t.Context(), cache, in, Requirements{Flwr: "1.29.5"}, opt); err != nil || lock.Flwr != "1.29.5" {
			t.Errorf("a new wheel: %+v, %v", lock, err)
		}
	})
}

func TestAnIndexThatDoesNotAnswer(t *testing.T) {
	eachInstaller(t, func(t *testing.T, cache string, opt Options) {
		in := testPython(t)
		if opt.Installer == "pip" { // made before the index is gone
			if _, err := findTool(t.Context(), cache, in, opt); err != nil {
				t.Fatal(err)
			}
		}
		t.Setenv("PIP_RETRIES", "1")
		t.Setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple") // nothing listens on port 1; for uv it is taken over
		_, err := MakeLock(t.Context(), cache, in, Requirements{}, opt)
		if problem.CodeOf(err) != problem.EnvBuildFailed || !errors.Is(err, ErrIndex) {
			t.Fatalf("got %v", err)
		}
		// An old lock is better than none.
		req := Requirements{}
		names, err := req.Normalise()
		if err != nil {
			t.Fatal(err)
		}
		old := cachedLock{Made: time.Now().Add(-30 * 24 * time.Hour), Lock: Lock{Text: "old", Flwr: "1.0", Python: in.Version}}
		b, err := json.Marshal(old)
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(cache, "locks", lockKey(names, in, req, opt)+".json")
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, b, 0o600)); err != nil {
			t.Fatal(err)
		}
		if lock, err := MakeLock(t.Context(), cache, in, req, opt); err != nil || lock != old.Lock {
			t.Errorf("with an old lock: %+v, %v", lock, err)
		}
		opt.Fresh = true
		if _, err := MakeLock(t.Context(), cache, in, req, opt); !errors.Is(err, ErrIndex) {
			t.Errorf("a fresh lock: %v", err)
		}
	})
}

// locked gives a lock for flwr's stand-in.
func locked(t *testing.T, cache string, opt Options) (Interpreter, Lock) {
	t.Helper()
	offline(t, "UV", wheels(t))
	in := testPython(t)
	lock, err := MakeLock(t.Context(), cache, in, Requirements{Names: []string{"appdep"}}, opt)
	if err != nil {
		t.Fatal(err)
	}
	return in, lock
}

func TestBuildersWaitForOneAnother(t *testing.T) {
	eachInstaller(t, func(t *testing.T, cache string, opt Options) {
		in, lock := locked(t, cache, opt)
		opt.Log = nil
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		dirs := make([]string, 6)
		built := make([]bool, 3)
		for i := range dirs {
			wg.Go(func() {
				if i < 3 { // in this process
					env, err := Ensure(t.Context(), cache, in, lock, opt, func(p Progress) {
						if p.Phase == PhaseInstalling {
							built[i] = true
						}
					})
					if err != nil {
						t.Error(err)
						return
					}
					dirs[i] = env.Dir
					// As a runner does, to the end of its job: nobody who waits for the build waits for that.
					release, ok, err := Hold(t.Context(), env)
					if err != nil || !ok {
						t.Errorf("held: %v, %v", ok, err)
						return
					}
					t.Cleanup(release)
					return
				}
				job, err := json.Marshal(map[string]any{"Cache": cache, "In": in, "Lock": lock, "Opt": map[string]string{"Installer": opt.Installer}})
				if err != nil {
					t.Error(err)
					return
				}
				cmd := exec.CommandContext(t.Context(), self)
				cmd.Env = append(os.Environ(), helperVar+"="+string(job))
				out, err := cmd.Output()
				if err != nil {
					t.Errorf("builder: %v", err)
				}
				dirs[i] = string(out)
			})
		}
		wg.Wait()
		for _, d := range dirs {
			if d == "" || d != dirs[0] {
				t.Errorf("environments: %q", dirs)
				break
			}
		}
		n := 0
		for _, b := range built {
			if b {
				n++
			}
		}
		if n > 1 {
			t.Errorf("%d builders of this process built", n)
		}
		if unused, err := FindUnused(cache, time.Now().Add(time.Hour)); err != nil || len(unused) > 0 {
			t.Errorf("held, and found unused: %v, %v", unused, err)
		}
	})
}

// killedBuild starts a builder in another process and kills it at phase.
func killedBuild(t *testing.T, cache string, in Interpreter, lock Lock, installer, phase string) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	started := filepath.Join(t.TempDir(), "started")
	job, err := json.Marshal(map[string]any{"Cache": cache, "In": in, "Lock": lock, "Opt": map[string]string{"Installer": installer}, "StopAt": phase, "Started": started})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), self)
	cmd.Env = append(os.Environ(), helperVar+"="+string(job))
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for !isFile(started) {
		if t.Context().Err() != nil {
			t.Fatal("the builder never came so far")
		}
		time.Sleep(5 * time.Millisecond)
	}
	if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
		t.Error(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Error("the builder was not killed")
	}
}

func TestAKilledBuildIsNotTrusted(t *testing.T) {
	eachInstaller(t, func(t *testing.T, cache string, opt Options) {
		in, lock := locked(t, cache, opt)
		phases := []string{PhaseInstalling, PhaseCompiling}
		if opt.Installer == "pip" {
			phases = phases[1:]
		}
		for _, phase := range phases {
			killedBuild(t, cache, in, lock, opt.Installer, phase)
			dir := filepath.Join(cache, "envs", envKey(in, lock)[:24])
			if _, err := os.Stat(dir); err != nil {
				t.Fatalf("the killed builder left nothing: %v", err)
			}
			// What is half-made may be worse than missing.
			lib, err := filepath.Glob(filepath.Join(dir, "lib", "python*", "site-packages"))
			if err != nil || len(lib) == 0 {
				t.Fatalf("%v %v", lib, err)
			}
			// (Removed first: it may be a hard link into uv's cache.)
			if err := errors.Join(os.RemoveAll(filepath.Join(lib[0], "flwr")), os.Mkdir(filepath.Join(lib[0], "flwr"), 0o755), os.WriteFile(filepath.Join(lib[0], "flwr", "__init__.py"), []byte("half"), 0o600),
				os.WriteFile(filepath.Join(lib[0], "stray.py"), nil, 0o600)); err != nil {
				t.Fatal(err)
			}
			env, err := Ensure(t.Context(), cache, in, lock, opt, nil)
			if err != nil {
				t.Fatal(err)
			}
			if got := python(t, env, "import flwr; print(flwr.VERSION)"); got != "1.30.0" {
				t.Errorf("got %s", got)
			}
			if isFile(filepath.Join(lib[0], "stray.py")) {
				t.Error("a stray file is left in the environment")
			}
			if err := os.RemoveAll(dir); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func TestDamagedEnvironmentsAreBuiltAgain(t *testing.T) {
	needUV(t)
	cache, opt := cacheFor(t), Options{}
	in, lock := locked(t, cache, opt)
	env, err := Ensure(t.Context(), cache, in, lock, opt, nil)
	if err != nil {
		t.Fatal(err)
	}
	marker := filepath.Join(env.Dir, markerName)
	for name, damage := range map[string]func() error{
		"another key":      func() error { return os.WriteFile(marker, []byte(strings.Repeat("0", 64)+"\n"), 0o600) },
		"half a key":       func() error { return os.Truncate(marker, 20) },
		"no marker":        func() error { return os.Remove(marker) },
		"an empty marker":  func() error { return os.Truncate(marker, 0) },
		"python is gone":   func() error { return os.Remove(env.Python) },
		"a dangling link":  func() error { return errors.Join(os.Remove(env.Python), os.Symlink("/nowhere", env.Python)) },
		"it is no folder":  func() error { return errors.Join(os.RemoveAll(env.Dir), os.WriteFile(env.Dir, nil, 0o600)) },
		"it is not there":  func() error { return os.RemoveAll(env.Dir) },
		"a folder instead": func() error { return errors.Join(os.Remove(marker), os.Mkdir(marker, 0o755)) },
	} {
		if err := damage(); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		rebuilt := false
		again, err := Ensure(t.Context(), cache, in, lock, opt, func(p Progress) { rebuilt = rebuilt || p.Phase == PhaseInstalling })
		if err != nil || again != env || !rebuilt {
			t.Errorf("%s: %+v, %v, built again: %v", name, again, err, rebuilt)
		}
		if got := python(t, env, "import flwr; print(flwr.VERSION)"); got != "1.30.0" {
			t.Errorf("%s: got %s", name, got)
		}
	}
}

func TestCancelledBuildsLeaveNothing(t *testing.T) {
	eachInstaller(t, func(t *testing.T, cache string, opt Options) {
		in, lock := locked(t, cache, opt)
		why := errors.New("enough")
		ctx, cancel := context.WithCancelCause(t.Context())
		_, err := Ensure(ctx, cache, in, lock, opt, func(p Progress) {
			if p.Phase == PhaseInstalling {
				cancel(why)
			}
		})
		if !errors.Is(err, why) {
			t.Errorf("got %v, want %v", err, why)
		}
		if left, err := filepath.Glob(filepath.Join(cache, "envs", "*[^k]")); err != nil || len(left) != 0 {
			t.Errorf("left: %q, %v", left, err)
		}
		// Waiting for another builder ends with the context too.
		file := filepath.Join(cache, "envs", envKey(in, lock)[:24]+".lock")
		unlock, err := flock(t.Context(), file, func() { t.Error("nobody else builds") })
		if err != nil {
			t.Fatal(err)
		}
		defer unlock()
		ctx, cancel = context.WithCancelCause(t.Context())
		if _, err = Ensure(ctx, cache, in, lock, opt, func(p Progress) {
			if p.Phase == PhaseWaiting {
				cancel(why)
			}
		}); !errors.Is(err, why) {
			t.Errorf("waiting: got %v, want %v", err, why)
		}
	})
}

func TestADownloadThatIsNotWhatWasLocked(t *testing.T) {
	eachInstaller(t, func(t *testing.T, cache string, opt Options) {
		dir := wheels(t)
		offline(t, "PIP", dir)
		in := testPython(t)
		lock, err := MakeLock(t.Context(), cache, in, Requirements{}, opt)
		if err != nil {
			t.Fatal(err)
		}
		wheel(t, dir, "tinydep", "1.1", nil, map[string]string{"tinydep/evil.py": "print('owned')\n"})
		t.Setenv("UV_CACHE_DIR", t.TempDir()) // uv has what was locked in its cache
		_, err = Ensure(t.Context(), cache, in, lock, opt, nil)
		if problem.CodeOf(err) != problem.EnvBuildFailed || !strings.Contains(err.Error(), "not what the lock says") {
			t.Errorf("got %v", err)
		}
		bad := lock
		bad.Text = "--index-url https://evil.example/\n" + bad.Text
		if _, err := Ensure(t.Context(), cache, in, bad, opt, nil); problem.CodeOf(err) != problem.BundleInvalid {
			t.Errorf("a lock with an option: %v", err)
		}
	})
}

// script writes a program for PATH.
func script(t *testing.T, dir, name, body string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+body+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestAFullDisk(t *testing.T) {
	bin := t.TempDir()
	script(t, bin, "uv", `case "$1" in --version) echo uv 0.9.0;; *) echo "error: failed to write: No space left on device (os error 28)" >&2; exit 2;; esac`)
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	in, cache := testPython(t), t.TempDir()
	lock := Lock{Text: "flwr==1.30.0 --hash=sha256:" + someHash + "\n", Flwr: "1.30.0", Python: in.Version}
	if _, err := Ensure(t.Context(), cache, in, lock, Options{}, nil); problem.CodeOf(err) != problem.DiskFull {
		t.Errorf("building: %v", err)
	}
	if _, err := MakeLock(t.Context(), cache, in, Requirements{}, Options{}); problem.CodeOf(err) != problem.DiskFull {
		t.Errorf("locking: %v", err)
	}
	if err := cacheProblem(&fs.PathError{Op: "write", Path: "/x", Err: syscall.ENOSPC}, "/x"); problem.CodeOf(err) != problem.DiskFull {
		t.Errorf("own files: %v", err)
	}
}

func TestACacheThatCannotBeWritten(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	in := testPython(t)
	lock := Lock{Text: "flwr==1.30.0 --hash=sha256:" + someHash + "\n"}
	if _, err := Ensure(t.Context(), file, in, lock, Options{}, nil); problem.CodeOf(err) != problem.EnvBuildFailed || !strings.Contains(err.Error(), "PERGOLA_CACHE") {
		t.Errorf("building: %v", err)
	}
	if _, err := MakeLock(t.Context(), file, in, Requirements{}, Options{}); problem.CodeOf(err) != problem.EnvBuildFailed {
		t.Errorf("locking: %v", err)
	}
}

// A machine without uv gets it as a wheel; one that cannot get it goes on with pip.
func TestUVIsBroughtAsAWheel(t *testing.T) {
	needUV(t)
	in := testPython(t)
	genuine, err := findUV(t.Context(), t.TempDir(), in, cleanEnv(nil), Options{})
	if err != nil {
		t.Fatal(err)
	}
	dir := wheels(t)
	offline(t, "PIP", dir)
	path := os.Getenv("PATH")
	t.Setenv("PATH", t.TempDir())
	in.Real = "/nowhere/bin/python3" // so that no uv lies beside it
	cache := t.TempDir()
	var said []string
	opt := Options{Log: func(l string) { said = append(said, l) }}
	lock, err := MakeLock(t.Context(), cache, in, Requirements{}, opt)
	if err != nil || !strings.Contains(strings.Join(said, "\n"), "going on with pip") {
		t.Fatalf("without uv: %v; said %q", err, said)
	}
	wheel(t, dir, "uv", "0.9.0", nil, map[string]string{"uv-0.9.0.data/scripts/uv": "#!/bin/sh\nPATH='" + path + "' exec '" + genuine + "' \"$@\"\n"})
	env, err := Ensure(t.Context(), cache, in, lock, opt, nil)
	if err != nil {
		t.Fatalf("%v; said %q", err, said)
	}
	if _, err := os.Stat(filepath.Join(cache, "tools", "uv", markerName)); err != nil {
		t.Error(err)
	}
	if b, err := os.ReadFile(filepath.Join(env.Dir, "pyvenv.cfg")); err != nil || !strings.Contains(string(b), "uv = ") {
		t.Errorf("not built by uv: %s, %v", b, err)
	}
}

func TestAnUnknownInstallerIsRefused(t *testing.T) {
	_, err := MakeLock(t.Context(), t.TempDir(), Interpreter{}, Requirements{}, Options{Installer: "uw"})
	if problem.CodeOf(err) != problem.Usage || !strings.Contains(err.Error(), "uw") {
		t.Errorf("got %v", err)
	}
}

func TestAnExistingInterpreterIsOnlyLookedAt(t *testing.T) {
	needUV(t)
	cache := cacheFor(t)
	in, lock := locked(t, cache, Options{})
	built, err := Ensure(t.Context(), cache, in, lock, Options{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	before := tree(t, built.Dir)
	env, err := Existing(t.Context(), built.Python, Requirements{Names: []string{"flwr>=1.20", "appdep~=3.2", "other; sys_platform=='win32'"}})
	if err != nil {
		t.Fatal(err)
	}
	if env.Python != built.Python || env.Bin != built.Bin || env.Dir != built.Dir || env.Flwr != "1.30.0" || !env.Existing || env.Key == "" {
		t.Errorf("got %+v", env)
	}
	again, err := Existing(t.Context(), built.Dir, Requirements{})
	if err != nil || again.Key != env.Key {
		t.Errorf("by its folder: %+v, %v", again, err)
	}
	for _, c := range []struct {
		req   Requirements
		code  problem.Code
		words []string
	}{
		{
			Requirements{Names: []string{"scikit-learn>=1.3", "appdep>=4", "flwr[simulation]"}, Simulation: true},
			problem.DependencyMissing,
			[]string{"scikit-learn>=1.3 (not installed)", "appdep>=4 (3.2.1 is installed)", "tinyray (not installed, for flwr[simulation])"},
		},
		{Requirements{Flwr: "1.29.0"}, problem.DependencyMissing, []string{"flwr==1.29.0 (1.30.0 is installed)"}},
		{Requirements{RequiresPython: "<3"}, problem.PythonUnsuitable, []string{"<3"}},
		{Requirements{Names: []string{"-e ."}}, problem.AppInvalid, []string{"-e ."}},
	} {
		_, err := Existing(t.Context(), built.Python, c.req)
		if problem.CodeOf(err) != c.code {
			t.Errorf("%+v: got %v", c.req, err)
		}
		for _, w := range c.words {
			if !strings.Contains(fmt.Sprint(err), w) {
				t.Errorf("%+v: %v lacks %q", c.req, err, w)
			}
		}
	}
	if after := tree(t, built.Dir); after != before {
		t.Error("the interpreter's folder was changed")
	}
	if _, err := Existing(t.Context(), in.Path, Requirements{Names: []string{"certainly-not-installed"}}); problem.CodeOf(err) != problem.DependencyMissing {
		t.Errorf("another interpreter: %v", err)
	}
}

func tree(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	if err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err == nil {
			fmt.Fprintln(&b, path, fileMark(info))
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// The real index and the real Flower, where they can be reached.
func TestRealFlower(t *testing.T) {
	if testing.Short() {
		t.Skip("downloads flwr")
	}
	needUV(t)
	t.Setenv("UV_CACHE_DIR", "") // uv's own cache, so that a second run downloads nothing
	in, cache := testPython(t), t.TempDir()
	req := Requirements{Names: []string{"flwr[simulation]>=1.20", "numpy"}, Flwr: "1.30.0"}
	lock, err := MakeLock(t.Context(), cache, in, req, Options{})
	if errors.Is(err, ErrIndex) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	if lock.Flwr != "1.30.0" || strings.Contains(lock.Text, "\nray==") {
		t.Errorf("lock: %s", lock.Text)
	}
	env, err := Ensure(t.Context(), cache, in, lock, Options{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := python(t, env, "from importlib.metadata import version; import numpy; print(version('flwr'))"); got != "1.30.0" {
		t.Errorf("got %s", got)
	}
	if pyc, err := filepath.Glob(filepath.Join(env.Dir, "lib", "*", "site-packages", "flwr", "__pycache__", "__init__.*.pyc")); err != nil || len(pyc) != 1 {
		t.Errorf("bytecode: %q, %v", pyc, err)
	}
	if _, err := MakeLock(t.Context(), cache, in, Requirements{Flwr: "1.30.7"}, Options{}); problem.CodeOf(err) != problem.FlwrUnavailable || !strings.Contains(err.Error(), "1.30.0 and ") {
		t.Errorf("a version that does not exist: %v", err)
	}
	if got, err := Existing(t.Context(), env.Python, req); err != nil || got.Bin != env.Bin {
		t.Errorf("looked at: %+v, %v", got, err)
	}
}
