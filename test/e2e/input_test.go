package e2e

import (
	"archive/zip"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// A job folder of NVIDIA FLARE around an app gives the app's numbers; what it says has an effect: the sites, a run config, a
// variable. Imported, it gives the same job.
func TestJobFolder(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "blood")
	if err := os.CopyFS(filepath.Join(dir, "app", "custom"), os.DirFS(filepath.Join(apps, "tiny"))); err != nil {
		t.Fatal(err)
	}
	write := func(name, text string) {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("meta.json", `{"name": "blood", "min_clients": 2, "resource_spec": {}, "deploy_map": {"app": ["server", "Ward_1", "ward-2"]}, "mandatory_clients": ["Ward_1"]}`)
	write("app/config/config_fed_server.json", `{"format_version": 2, "workflows": [{"id": "controller", "path": "nvflare.app_opt.flower.controller.FlowerController",
		"args": {"num_rounds": 7, "progress_timeout": 7200.0, "run_config": {"num-server-rounds": 1}}}], "components": [], "task_data_filters": [], "task_result_filters": []}`)
	write("app/config/config_fed_client.json", `{"format_version": 2, "executors": [{"tasks": ["*"], "executor": {"path": "nvflare.app_opt.flower.executor.FlowerExecutor",
		"args": {"tx_timeout": 600.0, "extra_env": {"SITE_DATA": "{SITE_NAME}"}}}}], "components": [], "task_data_filters": [], "task_result_filters": []}`)

	app := filepath.Join(t.TempDir(), "app")
	if res := command(t, "import", dir, "-o", app); res != "" {
		t.Fatal(res)
	}
	folder := start(t, spec{app: dir, args: []string{"--flwr", "1.30.0"}})
	a := folder.end()
	folder.succeeded(a, "1.30.0", 1)
	sameRounds(t, a.Summary.Rounds, tinyRounds[:1])
	if !slices.Equal(a.Summary.Sites, []string{"ward-1", "ward-2"}) {
		t.Errorf("the sites are %v", a.Summary.Sites)
	}
	if !slices.ContainsFunc(a.Summary.Warnings, func(w string) bool { return strings.Contains(w, "num_rounds: 7 has no effect") }) {
		t.Errorf("the warnings are %q", a.Summary.Warnings)
	}

	imported := start(t, spec{app: app, args: []string{"--flwr", "1.30.0"}})
	b := imported.end()
	imported.succeeded(b, "1.30.0", 1)
	sameRounds(t, b.Summary.Rounds, tinyRounds[:1])
	if x, y := fmt.Sprintf("%+v", a.Job.Spec), fmt.Sprintf("%+v", b.Job.Spec); x != y {
		t.Errorf("the job of the folder and that of the import differ:\n%s\n%s", x, y)
	}
	if s := a.Job.Spec; s.MinSites != 2 || s.NoProgress.String() != "2h" || s.OutageTolerance.String() != "10m" || s.Site.Named["ward-2"].Env["SITE_DATA"] != "ward-2" ||
		!slices.Equal(s.MandatorySites, []string{"ward-1"}) {
		t.Errorf("the job's settings are %+v", s)
	}
}

// A FAB gives the numbers of the app that it was built of.
func TestFAB(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "tiny.fab")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	z := zip.NewWriter(f)
	var list []string
	add := func(name string, b []byte) {
		w, err := z.Create(name)
		if err == nil {
			_, err = w.Write(b)
		}
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, fmt.Sprintf("%s,%x,%d", name, sha256.Sum256(b), 8*len(b)))
	}
	for _, name := range []string{"pyproject.toml", "tiny/__init__.py", "tiny/app.py"} {
		b, err := os.ReadFile(filepath.Join(apps, "tiny", filepath.FromSlash(name)))
		if err != nil {
			t.Fatal(err)
		}
		add(name, b)
	}
	add(".info/CONTENT", []byte(strings.Join(list, "\n")))
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	r := start(t, spec{app: path, args: []string{"--flwr", "1.30.0"}})
	res := r.end()
	r.succeeded(res, "1.30.0", 2)
	sameRounds(t, res.Summary.Rounds, tinyRounds)
}
