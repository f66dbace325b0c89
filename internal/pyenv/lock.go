package pyenv

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pergolafl/pergola/internal/problem"
)

// Lock is a resolved set of packages: what travels in a bundle, so that every site installs the same.
type Lock struct {
	Text   string `json:"text"`   // a requirements.txt with exact versions and SHA-256 hashes
	Flwr   string `json:"flwr"`   // the version of flwr in it, for the interpreter it was made for
	Python string `json:"python"` // that interpreter's version
}

// lockLife is how long a lock is given again for the same question. Long enough for a day's work to see one set of
// versions, short enough for a released fix to arrive.
const lockLife = 24 * time.Hour

// cachedLock is a lock as the cache keeps it.
type cachedLock struct {
	Made time.Time `json:"made"`
	Lock Lock      `json:"lock"`
}

// MakeLock resolves what an app asks for. With uv the lock is a universal one: it holds for other platforms, and for
// other Python versions from the app's lower bound (at least 3.10) up where the packages allow; with pip it holds for
// in's version and platform. A lock is cached for 24 h under everything that the answer depends on, unless opt.Fresh.
//
// Problems: app-invalid (a line that cannot be read), python-unsuitable (requires-python), flwr-unavailable (with the
// nearest versions that exist), dependency-missing (no such package or version), env-build-failed, disk-full. With
// [ErrIndex] in the chain the index could not be asked; then a lock older than 24 h is used if there is one.
func MakeLock(ctx context.Context, cacheDir string, in Interpreter, req Requirements, opt Options) (Lock, error) {
	if err := installerKnown(opt.Installer); err != nil {
		return Lock{}, err
	}
	names, err := req.Normalise()
	if err != nil {
		return Lock{}, err
	}
	if err := in.suits(req.RequiresPython); err != nil {
		return Lock{}, err
	}
	if cacheDir, err = filepath.Abs(cacheDir); err != nil {
		return Lock{}, cacheProblem(err, cacheDir)
	}
	file := filepath.Join(cacheDir, "locks", lockKey(names, in, req, opt)+".json")
	var have cachedLock
	if b, err := os.ReadFile(file); err == nil {
		if json.Unmarshal(b, &have) != nil {
			have = cachedLock{}
		}
	}
	if age := time.Since(have.Made); have.Lock.Text != "" && !opt.Fresh && age >= 0 && age < lockLife {
		return have.Lock, nil
	}
	lock, err := resolve(ctx, cacheDir, in, req, names, opt)
	if err != nil {
		if errors.Is(err, ErrIndex) && have.Lock.Text != "" && !opt.Fresh {
			opt.log(fmt.Sprintf("the package index could not be asked; the lock of %s is used", have.Made.Format(time.DateTime)))
			return have.Lock, nil
		}
		return Lock{}, err
	}
	b, err := json.Marshal(cachedLock{time.Now(), lock})
	if err == nil {
		if err = os.MkdirAll(filepath.Dir(file), 0o755); err == nil {
			err = writeFile(file, b, false)
		}
	}
	if err != nil {
		return Lock{}, cacheProblem(err, cacheDir)
	}
	return lock, nil
}

// lockKey names everything that a resolution depends on, other than what the index holds.
func lockKey(names []string, in Interpreter, req Requirements, opt Options) string {
	v, _ := parseVersion(in.Version)
	minor := in.Version
	if len(v.release) > 0 {
		minor = v.minor()
	}
	question := struct {
		Format                     int
		Names                      []string
		Minor, Platform, Installer string
		Floor, Index               string
	}{3, names, minor, in.Platform, opt.Installer, floor(req.RequiresPython, minor), indexMark(cleanEnv(opt.ExtraEnv), in)}
	b, err := json.Marshal(question)
	if err != nil {
		panic(err) // strings and numbers
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:16])
}

// floor gives the oldest minor version of Python that a lock is made for: the lower bound of requires-python, but at
// least 3.10 and at most the interpreter's own.
func floor(requires, own string) string {
	low, _ := parseVersion(minPython)
	if specs, err := parseSpecifiers(requires); err == nil {
		for _, s := range specs {
			if (s.op == ">=" || s.op == "~=" || s.op == "==" || s.op == ">") && s.v.compare(low) > 0 {
				low = s.v
			}
		}
	}
	if o, ok := parseVersion(own); ok && low.compare(o) > 0 {
		return own
	}
	return low.minor()
}

func resolve(ctx context.Context, cacheDir string, in Interpreter, req Requirements, names []string, opt Options) (Lock, error) {
	if err := os.MkdirAll(cacheDir, 0o755); err != nil {
		return Lock{}, cacheProblem(err, cacheDir)
	}
	t, err := findTool(ctx, cacheDir, in, opt)
	if err != nil {
		return Lock{}, err
	}
	dir, err := scratch(cacheDir)
	if err != nil {
		return Lock{}, cacheProblem(err, cacheDir)
	}
	defer func() {
		if err := os.RemoveAll(dir); err != nil {
			opt.log(err.Error())
		}
	}()
	var text string
	for {
		if err := os.WriteFile(filepath.Join(dir, "app.in"), []byte(strings.Join(names, "\n")+"\n"), 0o600); err != nil {
			return Lock{}, cacheProblem(err, cacheDir)
		}
		if t.uv != "" {
			text, err = t.uvLock(ctx, dir, cacheDir, in, req, opt)
		} else {
			text, err = t.pipLock(ctx, dir, cacheDir, in, opt)
		}
		if err != nil {
			return Lock{}, err
		}
		pins, err := readLock(text)
		if err != nil {
			return Lock{}, problem.Wrap(err, problem.Internal, "please report this with the app's dependencies", "the resolver's lock cannot be read")
		}
		extra := missingBound(pins)
		if extra == "" || slices.Contains(names, extra) {
			break
		}
		names = append(slices.Clone(names), extra)
	}
	lock := Lock{Text: text, Python: in.Version}
	if lock.Flwr = lock.flwrFor(in); lock.Flwr == "" {
		return Lock{}, problem.New(problem.FlwrUnavailable, "remove the marker from flwr in the app's dependencies", "the app's dependencies leave flwr out for Python %s", in.Version)
	}
	return lock, nil
}

// missingBound gives a requirement that packages in the lock need and do not state. There is one: typer before 0.16, which flwr
// 1.13 to 1.20 pin, breaks with click 8.2 (`flwr run` ends with "Secondary flag is not valid for non-boolean flag";
// typer 0.16.0's release notes name click 8.2 as what it adds).
func missingBound(pins []pin) string {
	var typer, click bool
	typerFixed, _ := parseVersion("0.16")
	clickNew, _ := parseVersion("8.2")
	for _, p := range pins {
		v, ok := parseVersion(p.version())
		if !ok {
			continue
		}
		switch p.name {
		case "typer":
			typer = typer || v.compare(typerFixed) < 0
		case "click":
			click = click || v.compare(clickNew) >= 0
		}
	}
	if typer && click {
		return "click<8.2"
	}
	return ""
}

// flwrFor gives the version of flwr that the lock has for in: a universal lock may have several. It reads the one or two
// lines that matter, since it is on the way of every start.
func (l Lock) flwrFor(in Interpreter) string {
	for line := range strings.Lines(l.Text) {
		if !strings.HasPrefix(line, "flwr") {
			continue
		}
		line, _, _ = strings.Cut(line, " --hash=")
		r, err := parseRequirement(strings.TrimRight(line, "\\ \r\n"))
		if err == nil && isFlwr(r.name) && r.wanted(in.markerEnv()) {
			return pin{requirement: r}.version()
		}
	}
	return l.Flwr
}

// uvLock resolves with uv, as universally as the packages allow.
func (t tool) uvLock(ctx context.Context, dir, cacheDir string, in Interpreter, req Requirements, opt Options) (string, error) {
	v, ok := parseVersion(in.Version)
	if !ok {
		return "", problem.New(problem.PythonUnsuitable, pythonNext, "%q is no version of Python", in.Version)
	}
	own := v.minor()
	var attempts [][]string
	for _, minor := range minorsBetween(floor(req.RequiresPython, own), own) {
		attempts = append(attempts, []string{"--universal", "--python-version", minor})
	}
	attempts = append(attempts, nil)
	var f failure
	for i, attempt := range attempts {
		r, err := t.uvCompile(ctx, dir, in, opt, append(attempt, "--generate-hashes", "app.in"))
		if err != nil {
			return "", err
		}
		if r.ok() {
			// Two parts of Flower in different versions may not understand one another, so a lock must have one.
			if i < len(attempts)-1 && flwrVersions(r.stdout) > 1 {
				opt.log("the oldest Python that the app allows would get another flwr; locking for newer ones")
				continue
			}
			return r.stdout, nil
		}
		// What no other set of Python versions can change is final.
		if f = classify(r.output()); f.kind == kindFull || f.kind == kindIndex || f.kind == kindUnknown || f.kind == kindVersion && f.by == "" && strings.Contains(f.want, "==") {
			break
		}
		if i < len(attempts)-1 {
			opt.log("no lock holds for every Python that the app allows; trying for fewer")
		}
	}
	if f.kind == kindVersion && f.by == "" && len(f.offered) == 0 {
		f.offered = t.nearest(ctx, dir, in, f.want)
	}
	if ctx.Err() != nil {
		return "", context.Cause(ctx)
	}
	return "", f.resolveFailed(cacheDir, in)
}

// minorsBetween gives the minor versions of Python from low up to own.
func minorsBetween(low, own string) []string {
	var list []string
	for v := low; v != own && len(list) < 10; {
		list = append(list, v)
		major, minor, _ := strings.Cut(v, ".")
		n, err := strconv.Atoi(minor)
		if err != nil {
			break
		}
		v = major + "." + strconv.Itoa(n+1)
	}
	return append(list, own)
}

var flwrLineRE = regexp.MustCompile(`(?m)^flwr(?:-nightly)?==([^\s;\\]+)`)

// flwrVersions counts the versions of flwr in a lock.
func flwrVersions(text string) int {
	seen := map[string]bool{}
	for _, m := range flwrLineRE.FindAllStringSubmatch(text, -1) {
		seen[m[1]] = true
	}
	return len(seen)
}

func (t tool) uvCompile(ctx context.Context, dir string, in Interpreter, opt Options, args []string) (result, error) {
	argv := append([]string{t.uv, "pip", "compile", "--python", in.Path, "--no-header", "--no-annotate"}, t.indexFlags.uv...)
	onLine := func(line string) {
		// The lock itself comes by the same way.
		if opt.Log != nil && !strings.HasPrefix(line, "    --hash=") && !strings.HasSuffix(line, " \\") {
			opt.log(line)
		}
	}
	return run(ctx, command{name: "uv pip compile", args: append(argv, args...), dir: dir, env: t.env.list(), onLine: onLine})
}

// nearestTimeout bounds the search for versions to offer: it only improves a message.
const nearestTimeout = 20 * time.Second

// nearest asks for the versions below and above one that does not exist: uv's own message has none.
func (t tool) nearest(ctx context.Context, dir string, in Interpreter, want string) []string {
	ctx, cancel := context.WithTimeout(ctx, nearestTimeout)
	defer cancel()
	_, number, ok := strings.Cut(want, "==")
	name := bareName(want)
	v, good := parseVersion(number)
	if !ok || !good {
		return nil
	}
	number = v.public().String()
	var found []string
	for _, side := range [][]string{{"<" + number, "--resolution", "highest"}, {">" + number, "--resolution", "lowest-direct"}} {
		if os.WriteFile(filepath.Join(dir, "near.in"), []byte(name+side[0]+"\n"), 0o600) != nil {
			return found
		}
		r, err := t.uvCompile(ctx, dir, in, Options{}, append(side[1:], "--no-deps", "near.in"))
		if err != nil {
			return found
		}
		if _, v, ok := strings.Cut(strings.TrimSpace(r.stdout), "=="); r.ok() && ok {
			found = append(found, strings.Fields(v)[0])
		}
	}
	return found
}

// pipReport is what is used of pip's installation report, version 1.
type pipReport struct {
	Install []struct {
		DownloadInfo struct {
			URL         string `json:"url"`
			ArchiveInfo *struct {
				Hashes map[string]string `json:"hashes"`
			} `json:"archive_info"`
			VCSInfo *struct {
				VCS      string `json:"vcs"`
				CommitID string `json:"commit_id"`
			} `json:"vcs_info"`
			Subdirectory string `json:"subdirectory"`
		} `json:"download_info"`
		IsDirect bool `json:"is_direct"`
		Metadata struct {
			Name    string `json:"name"`
			Version string `json:"version"`
		} `json:"metadata"`
	} `json:"install"`
}

func (t tool) pipLock(ctx context.Context, dir, cacheDir string, in Interpreter, opt Options) (string, error) {
	report := filepath.Join(dir, "report.json")
	args := []string{t.pip, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--report", report, "-r", "app.in"}
	r, err := run(ctx, command{name: "pip install --dry-run", args: args, dir: dir, env: t.env.list(), onLine: opt.log})
	if err != nil {
		return "", err
	}
	if !r.ok() {
		f := classify(r.output())
		if f.kind == kindVersion && f.by == "" {
			_, number, _ := strings.Cut(f.want, "==")
			f.offered = nearestOf(number, f.offered)
		}
		return "", f.resolveFailed(cacheDir, in)
	}
	b, err := os.ReadFile(report)
	if err != nil {
		return "", cacheProblem(err, cacheDir)
	}
	return lockFromReport(b)
}

// nearestOf gives the versions next to want, one below and one above; without a sensible want, the newest.
func nearestOf(want string, offered []string) []string {
	var list []version
	for _, o := range offered {
		if v, ok := parseVersion(o); ok {
			list = append(list, v)
		}
	}
	slices.SortFunc(list, version.compare)
	if len(list) == 0 {
		return nil
	}
	w, ok := parseVersion(want)
	if !ok {
		return []string{list[len(list)-1].String()}
	}
	n, _ := slices.BinarySearchFunc(list, w, version.compare)
	var near []string
	if n > 0 {
		near = append(near, list[n-1].String())
	}
	if n < len(list) {
		near = append(near, list[n].String())
	}
	return near
}

// lockFromReport writes a pip report as a requirements file with hashes, sorted.
func lockFromReport(b []byte) (string, error) {
	var rep pipReport
	if err := json.Unmarshal(b, &rep); err != nil {
		return "", problem.Wrap(err, problem.EnvBuildFailed, "install uv, or a newer pip", "pip's report cannot be read")
	}
	var blocks []string
	for _, item := range rep.Install {
		info := item.DownloadInfo
		line := item.Metadata.Name + "==" + item.Metadata.Version
		if item.IsDirect {
			url := info.URL
			if info.VCSInfo != nil {
				url = info.VCSInfo.VCS + "+" + url + "@" + info.VCSInfo.CommitID
			}
			if info.Subdirectory != "" {
				url += "#subdirectory=" + info.Subdirectory
			}
			line = item.Metadata.Name + " @ " + url
		}
		hash := ""
		if info.ArchiveInfo != nil {
			hash = info.ArchiveInfo.Hashes["sha256"]
		}
		if _, err := parseRequirement(line); err != nil {
			return "", problem.Wrap(err, problem.EnvBuildFailed, "install uv, which writes the lock itself", "pip chose %q, which cannot be locked", line)
		}
		switch {
		case hash != "" && hashHexRE.MatchString(hash):
			line += " \\\n    --hash=sha256:" + hash
		case !item.IsDirect:
			return "", problem.New(problem.EnvBuildFailed, "install uv, which computes the hashes itself", "the package index gives no SHA-256 for %s", line)
		}
		blocks = append(blocks, strings.ToLower(item.Metadata.Name)+"\x00"+line+"\n")
	}
	slices.Sort(blocks)
	for i, block := range blocks {
		_, blocks[i], _ = strings.Cut(block, "\x00")
	}
	return strings.Join(blocks, ""), nil
}

var hashHexRE = regexp.MustCompile(`^[0-9a-f]{64}$`)

// pin is one entry of a lock.
type pin struct {
	requirement
	hashes []string // "sha256:…"; none for a direct reference that has no archive
}

// version gives the pinned version, "" for a direct reference.
func (p pin) version() string {
	for _, s := range p.specs {
		if s.op == "==" && !s.prefix || s.op == "===" {
			return s.text
		}
	}
	return directVersion(p.url)
}

var wheelRE = regexp.MustCompile(`/([^/]+)-([^-/]+)(?:-[^-/]+)?-[^-/]+-[^-/]+-[^-/]+\.whl`)

// directVersion reads the version out of the URL of a wheel.
func directVersion(url string) string {
	if m := wheelRE.FindStringSubmatch(url); m != nil {
		return m[2]
	}
	return ""
}

// maxLock bounds a lock's size in bytes: one with torch and CUDA has 200 KiB.
const maxLock = 8 << 20

// readLock reads a lock strictly: entries with exact versions or direct references, and hashes; no options. A lock
// arrives from elsewhere, and an installer would obey a line such as --index-url or -r.
func readLock(text string) ([]pin, error) {
	if len(text) > maxLock {
		return nil, fmt.Errorf("the lock is longer than %d bytes", maxLock)
	}
	var pins []pin
	sc := bufio.NewScanner(strings.NewReader(text))
	sc.Buffer(nil, maxLock+1)
	more := false // the line before ended in a backslash
	for n := 1; sc.Scan(); n++ {
		line := strings.TrimSpace(sc.Text())
		cont := more
		line, more = strings.CutSuffix(line, "\\")
		line = strings.TrimSpace(line)
		if !cont {
			if line == "" || strings.HasPrefix(line, "#") {
				if more {
					return nil, fmt.Errorf("line %d of the lock continues nothing", n)
				}
				continue
			}
			head, rest, _ := strings.Cut(line, " --hash=")
			r, err := parseRequirement(head)
			if err != nil {
				return nil, fmt.Errorf("line %d of the lock, %q: %w", n, line, err)
			}
			p := pin{requirement: r}
			if r.url == "" && (len(r.specs) != 1 || p.version() == "") {
				return nil, fmt.Errorf("line %d of the lock, %q, gives no exact version", n, line)
			}
			pins = append(pins, p)
			if rest == "" {
				continue
			}
			line = "--hash=" + rest
		}
		p := &pins[len(pins)-1]
		for _, word := range strings.Fields(line) {
			hash, ok := strings.CutPrefix(word, "--hash=")
			if hex, sha := strings.CutPrefix(hash, "sha256:"); !ok || !sha || !hashHexRE.MatchString(hex) {
				return nil, fmt.Errorf("line %d of the lock: %q is no SHA-256 hash", n, word)
			}
			p.hashes = append(p.hashes, hash)
		}
	}
	if err := sc.Err(); err != nil {
		return nil, fmt.Errorf("the lock: %w", err)
	}
	if more {
		return nil, errors.New("the lock ends in the middle of an entry")
	}
	for _, p := range pins {
		if p.url == "" && len(p.hashes) == 0 {
			return nil, fmt.Errorf("the lock has no hash for %s", p.bare())
		}
	}
	return pins, nil
}
