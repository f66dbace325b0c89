package e2e

import (
	"context"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"testing"

	"github.com/pergolafl/pergola/internal/metrics"
	"github.com/pergolafl/pergola/internal/pyenv"
)

// tools gives a cached environment of Python packages that no app needs.
func tools(t *testing.T, packages ...string) pyenv.Env {
	t.Helper()
	in, err := pyenv.Find(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	lock, err := pyenv.MakeLock(t.Context(), pyenv.DefaultCache(), in, pyenv.Requirements{Names: packages}, pyenv.Options{})
	if err != nil {
		t.Fatal(err)
	}
	env, err := pyenv.Ensure(t.Context(), pyenv.DefaultCache(), in, lock, pyenv.Options{}, func(pyenv.Progress) {})
	if err != nil {
		t.Fatal(err)
	}
	return env
}

// readEvents prints what the real TensorBoard reads of event files: by folder and tag, each point's step and value, NaN and
// infinities as words, which Go's JSON has none for.
const readEvents = `
import json, os, sys
from tensorboard.backend.event_processing import event_accumulator as ea
out = {}
for folder, _, files in os.walk(sys.argv[1]):
    if files:
        a = ea.EventAccumulator(folder, size_guidance={ea.SCALARS: 0, ea.TENSORS: 0})
        a.Reload()
        name = os.path.relpath(folder, sys.argv[1])
        for tag in a.Tags()["scalars"]:
            out[f"{name} {tag}"] = [f"{e.step} {e.value!r}" for e in a.Scalars(tag)]
        for tag in a.Tags()["tensors"]:
            out[f"{name} {tag}"] = [e.tensor_proto.string_val[0].decode() for e in a.Tensors(tag)]
json.dump(out, sys.stdout)
`

// What client code logs, with the real MLflow client, as plain JSON and by NVIDIA FLARE's SummaryWriter, is in the results: in
// the CSV exactly, and in event files as the real TensorBoard reads them.
func TestMetricsOfClientCode(t *testing.T) {
	t.Parallel()
	app := filepath.Join(t.TempDir(), "metrics")
	if err := os.CopyFS(app, os.DirFS(filepath.Join(apps, "metrics"))); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(binary, "shim", "nvflare", "-o", app).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	tb := tools(t, "tensorboard", "setuptools<81")
	r := start(t, spec{app: app, args: []string{"--flwr", "1.30.0", "--run-config", "writer=true"}})
	res := r.end()
	r.succeeded(res, "1.30.0", 2)

	type point struct {
		site, run, name string
		step            int64
	}
	want := map[point]float64{{"hub", "", "clients", 0}: 2}
	tbWant := map[string][]string{"hub clients": {"0 2.0"}}
	for i, site := range []string{"site-1", "site-2"} {
		for rnd := range int64(2) {
			n := rnd + 1
			f := float64(n)
			tenth := 0.1 // a variable: constants are not rounded as Python's floats are
			third := float64(float32(f) / 3)
			for p, v := range map[point]float64{
				{site, "train", "loss", n}: tenth*f + float64(i), {site, "train", "third", n}: 1.0 / 3, {site, "train", "not a number", n}: math.NaN(), {site, "train", "infinite", n}: math.Inf(-1),
				{site, "", "seconds", n}: 1e-300, {site, "", "plain", n}: f / 7, {site, "", "diverged", n}: math.Inf(1), {site, "", "written", n}: third, {site, "", "group/a", n}: 1.5, {site, "", "group/b", n}: f,
			} {
				want[p] = v
				folder := p.site
				if p.run != "" {
					folder += "/" + p.run
				}
				key := folder + " " + p.name
				tbWant[key] = append(tbWant[key], fmt.Sprintf("%d %s", n, pythonFloat(float64(float32(v)))))
			}
		}
		for tag, v := range map[string][]string{"params/lr": {"0.1", "0.1"}, "params/batch": {"32", "32"}, "params/optimizer": {"sgd, with momentum", "sgd, with momentum"}, "tags/partition": {fmt.Sprint(i), fmt.Sprint(i)}, "tags/round": {"1", "2"}} {
			tbWant[site+"/train "+tag] = v
		}
	}

	dir := filepath.Join(r.out, "results", "metrics")
	f, err := os.Open(filepath.Join(dir, metrics.MetricsCSV))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	rows, err := csv.NewReader(f).ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range rows[1:] {
		step, err := strconv.ParseInt(row[4], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		p := point{row[1], row[2], row[3], step}
		got, err := strconv.ParseFloat(row[5], 64)
		w, ok := want[p]
		if err != nil || !ok || math.Float64bits(got) != math.Float64bits(w) && !(math.IsNaN(got) && math.IsNaN(w)) {
			t.Errorf("%+v is %s, want %v (%t)", p, row[5], w, ok)
		}
		delete(want, p)
	}
	for p := range want {
		t.Errorf("%+v is not there", p)
	}

	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, tb.Python, "-c", readEvents, filepath.Join(dir, metrics.Tensorboard))
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var got map[string][]string
	if err := json.Unmarshal(out, &got); err != nil {
		t.Fatal(err)
	}
	for key, w := range tbWant {
		var g []string
		for _, s := range got[key] {
			g = append(g, canonical(s))
		}
		if !slices.Equal(g, w) {
			t.Errorf("TensorBoard reads %s as %q, want %q", key, got[key], w)
		}
		delete(got, key)
	}
	if len(got) > 0 {
		t.Errorf("TensorBoard reads more than was logged: %v", got)
	}
	for _, e := range res.Events {
		if e.Kind == "log" && slices.Contains([]string{"metrics.jsonl", "metrics"}, fmt.Sprint(as[map[string]any](t, e)["program"])) {
			t.Fatalf("metrics are among the programs' lines: %s", e.Body)
		}
	}
}

// pythonFloat writes a float so that canonical leaves it alone.
func pythonFloat(v float64) string {
	s := strconv.FormatFloat(v, 'g', -1, 64)
	if v == math.Trunc(v) && math.Abs(v) < 1e16 {
		return strconv.FormatFloat(v, 'f', 1, 64)
	}
	switch s {
	case "NaN":
		return "nan"
	case "+Inf":
		return "inf"
	case "-Inf":
		return "-inf"
	}
	return s
}

// canonical rewrites the value of a point, "STEP VALUE" in Python's words, as pythonFloat does.
func canonical(s string) string {
	var step int64
	var word string
	if n, err := fmt.Sscanf(s, "%d %s", &step, &word); n != 2 || err != nil {
		return s
	}
	v, err := strconv.ParseFloat(word, 64)
	if err != nil {
		return s
	}
	return fmt.Sprintf("%d %s", step, pythonFloat(v))
}

// useMLflow goes through the client's calls, and reads back what a run has.
const useMLflow = `
import mlflow
from mlflow.exceptions import MlflowException
mlflow.set_experiment("e")
with mlflow.start_run(run_name="r") as run:
    mlflow.log_metric("loss", 0.1, step=3)
    mlflow.log_metric("nan", float("nan"))
    mlflow.log_metrics({"a": 1, "b": float("inf")}, step=-1)
    mlflow.log_metric("later", 7, synchronous=False)
    mlflow.log_param("lr", 0.1)
    mlflow.log_params({"x": 1})
    mlflow.set_tag("t", "v")
    mlflow.set_tags({"u": 2})
    mlflow.delete_tag("t")
    mlflow.set_experiment_tag("et", "v")
    with mlflow.start_run(nested=True):
        mlflow.log_metric("inner", 1)
    try:
        mlflow.log_param("lr", 0.2)
        raise SystemExit("a parameter was changed")
    except MlflowException as e:
        assert e.error_code == "INVALID_PARAMETER_VALUE", e
    try:
        mlflow.log_text("hello", "x.txt")
        raise SystemExit("a file was taken")
    except Exception as e:
        assert "no files or models" in str(e), e
got = mlflow.get_run(run.info.run_id)
assert got.info.status == "FINISHED" and got.info.run_name == "r", got.info
assert got.data.metrics["loss"] == 0.1 and got.data.metrics["b"] == float("inf") and got.data.metrics["nan"] != got.data.metrics["nan"], got.data
assert got.data.params == {"lr": "0.1", "x": "1"} and got.data.tags["u"] == "2" and "t" not in got.data.tags, got.data
with mlflow.start_run(run_id=run.info.run_id):
    mlflow.log_metric("loss", 0.05, step=4)
try:
    mlflow.log_metric("", 1)
    raise SystemExit("an empty name was taken")
except MlflowException as e:
    pass
`

// The real clients of both of MLflow's generations.
func TestMLflowClients(t *testing.T) {
	t.Parallel()
	for _, version := range []string{"mlflow-skinny<3", "mlflow-skinny"} {
		t.Run(version, func(t *testing.T) {
			env := tools(t, version)
			dir := t.TempDir()
			s, err := metrics.Serve(t.Context(), metrics.Options{IP: "127.0.0.1", Dir: dir, Site: "site-1"})
			if err != nil {
				t.Fatal(err)
			}
			cmd := exec.CommandContext(t.Context(), env.Python, "-c", useMLflow)
			cmd.Dir = t.TempDir()
			cmd.Env = append(os.Environ(), s.Env(nil)...)
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Errorf("%v\n%s", err, out)
			}
			if err := s.Close(); err != nil {
				t.Error(err)
			}
			f, err := os.Open(filepath.Join(dir, "metrics.jsonl"))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			var got []string
			skipped, err := metrics.Read(f, func(r metrics.Record) error {
				if r.Kind == metrics.Metric {
					got = append(got, fmt.Sprintf("%s %s=%s@%d", r.Run, r.Name, metrics.FormatValue(r.Value), r.Step))
				}
				return nil
			})
			if skipped != 0 || err != nil {
				t.Errorf("%d skipped, %v", skipped, err)
			}
			slices.Sort(got)
			want := []string{" inner=1@0", "r a=1@-1", "r b=+Inf@-1", "r later=7@0", "r loss=0.05@4", "r loss=0.1@3", "r nan=NaN@0"}
			if !slices.Equal(got, want) {
				t.Errorf("kept %q, want %q\n%s", got, want, out)
			}
		})
	}
}
