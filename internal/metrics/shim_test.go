package metrics

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// Code that was written for NVIDIA FLARE's writers, unmodified.
const writers = `
import nvflare.client as flare
from nvflare.client.tracking import MLflowWriter, SummaryWriter, WandBWriter
flare.init()
assert flare.get_site_name() == "site-1"
w = SummaryWriter()
w.add_scalar("loss", 0.1, 3)
w.add_scalar(tag="acc", scalar=1, global_step=None)
w.add_scalars("group", {"a": 1.5, "b": float("nan")}, global_step=4)
w.flush()
w.close()
WandBWriter().log({"x": 2}, step=1)
m = MLflowWriter()
m.log_param("lr", 0.1)
m.log_params({"n": 3})
m.log_metric("y", -1, step=2)
m.log_metrics({"z": 5})
m.set_tag("t", "v")
m.set_tags({"u": 1})
m.log_text("words", "dir/file.txt")
try:
    w.add_scalar("", 1, 1)
    raise SystemExit("an empty name was taken")
except ValueError as e:
    assert "name is missing" in str(e), e
try:
    flare.receive
    raise SystemExit("there is a receive")
except AttributeError as e:
    assert "by way of Flower" in str(e), e
flare.shutdown()
`

func python(t *testing.T) string {
	t.Helper()
	path, err := exec.LookPath("python3")
	if err != nil {
		t.Skip("there is no python3")
	}
	return path
}

// runPython gives what a script prints, the app's folder first on the path as in Flower's programs.
func runPython(t *testing.T, app, site, script string, env []string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), python(t), "-c", "import sys; sys.path[0:0] = ["+`"`+app+`"]; sys.path.append("`+site+`")`+"\n"+script)
	cmd.Dir = t.TempDir()
	cmd.Env = append(append(os.Environ(), "http_proxy=http://127.0.0.1:1", "no_proxy="), env...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func TestShim(t *testing.T) {
	app, dir := t.TempDir(), t.TempDir()
	must(t, os.WriteFile(filepath.Join(app, "pyproject.toml"), nil, 0o600))
	_, err := InstallShim(app)
	must(t, err)
	// As Flower takes an app along: Python files only.
	must(t, filepath.WalkDir(app, func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() && filepath.Ext(path) != ".py" {
			err = os.Remove(path)
		}
		return err
	}))
	s, _, _ := serve(t, Options{Dir: dir})
	out, err := runPython(t, app, t.TempDir(), writers, s.Env(nil))
	if err != nil || out != "" {
		t.Fatalf("%v\n%s", err, out)
	}
	var got []string
	for _, r := range records(t, dir) {
		got = append(got, strings.TrimPrefix(brief(r), "site-1 "))
	}
	want := []string{
		"metric loss=0.1@3", "metric acc=1@0", "metric group/a=1.5@4", "metric group/b=NaN@4", "metric x=2@1", "param lr=0.1", "param n=3", "metric y=-1@2", "metric z=5@0",
		"tag t=v", "tag u=1", "tag dir/file.txt=words",
	}
	if !slices.Equal(got, want) {
		t.Errorf("kept %q, want %q", got, want)
	}
	// Outside of a job it says so, and does not stand in the way.
	out, err = runPython(t, app, t.TempDir(), "from nvflare.client.tracking import SummaryWriter\nSummaryWriter().add_scalar('a', 1)", []string{PlainVar + "="})
	if err != nil || !strings.Contains(out, "not set") {
		t.Errorf("%v\n%s", err, out)
	}
}

// The real nvflare is not shadowed, and that is said.
func TestShimStepsAside(t *testing.T) {
	app, site := t.TempDir(), t.TempDir()
	must(t, os.WriteFile(filepath.Join(app, "pyproject.toml"), nil, 0o600))
	_, err := InstallShim(app)
	must(t, err)
	must(t, os.MkdirAll(filepath.Join(site, "nvflare", "client"), 0o700))
	for path, text := range map[string]string{"__init__.py": "__version__ = '9'\n", "client/__init__.py": "def init(): print('real init')\n", "client/tracking.py": "class SummaryWriter:\n    real = True\n"} {
		must(t, os.WriteFile(filepath.Join(site, "nvflare", path), []byte(text), 0o600))
	}
	out, err := runPython(t, app, site, "import nvflare\nimport nvflare.client as flare\nfrom nvflare.client.tracking import SummaryWriter\nflare.init()\nprint(nvflare.__version__, SummaryWriter.real)", nil)
	if err != nil || !strings.Contains(out, "real init\n9 True\n") || strings.Count(out, "take nvflare out of the app's dependencies") != 1 {
		t.Errorf("%v\n%s", err, out)
	}
}
