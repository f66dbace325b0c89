package metrics

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/pergolafl/pergola/internal/logs"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// serve starts a server that ends with the test.
func serve(t *testing.T, opt Options) (s *Server, tracking, plain string) {
	t.Helper()
	opt.IP = "127.0.0.1"
	if opt.Dir == "" {
		opt.Dir = t.TempDir()
	}
	if opt.Site == "" {
		opt.Site = "site-1"
	}
	s, err := Serve(t.Context(), opt)
	must(t, err)
	t.Cleanup(func() {
		http.DefaultClient.CloseIdleConnections()
		if err := s.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	env := map[string]string{}
	for _, kv := range s.Env(nil) {
		k, v, _ := strings.Cut(kv, "=")
		env[k] = v
	}
	return s, env[MLflowVar], env[PlainVar]
}

// call gives the status and the body of an answer.
func call(t *testing.T, method, url, body string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	must(t, err)
	res, err := http.DefaultClient.Do(req)
	must(t, err)
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	must(t, err)
	return res.StatusCode, string(b)
}

// records reads what a server has kept.
func records(t *testing.T, dir string) []Record {
	t.Helper()
	f, err := os.Open(filepath.Join(dir, logs.MetricsFile))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	must(t, err)
	defer f.Close()
	var out []Record
	skipped, err := Read(f, func(r Record) error { out = append(out, r); return nil })
	if skipped != 0 || err != nil {
		t.Errorf("%d broken lines, %v", skipped, err)
	}
	return out
}

// brief is a record without its time, for tables.
func brief(r Record) string {
	v := r.Text
	if r.Kind == Metric {
		v = fmt.Sprintf("%s@%d", FormatValue(r.Value), r.Step)
	}
	return fmt.Sprintf("%s %s %s=%s", r.Site, r.Kind, r.Name, v)
}

func TestPlain(t *testing.T) {
	for _, c := range []struct {
		name, body string
		status     int
		want       []string // records, or with another status than 200 what the message says
	}{
		{"one object", `{"name":"loss","value":0.1,"step":3}`, 200, []string{"site-1 metric loss=0.1@3"}},
		{"without a step", `{"name":"loss","value":-1e-300}`, 200, []string{"site-1 metric loss=-1e-300@0"}},
		{"a line each", "{\"name\":\"a\",\"value\":1}\n{\"name\":\"b\",\"value\":2}\n", 200, []string{"site-1 metric a=1@0", "site-1 metric b=2@0"}},
		{"an array", `[{"name":"a","value":1},{"name":"b","value":2,"step":-7}]`, 200, []string{"site-1 metric a=1@0", "site-1 metric b=2@-7"}},
		{
			"what Python's json makes of no numbers", `[{"name":"NaN","value":NaN},{"name":"\"NaN","value":Infinity},{"name":"i","value":-Infinity}]`,
			200,
			[]string{"site-1 metric NaN=NaN@0", `site-1 metric "NaN=+Inf@0`, "site-1 metric i=-Inf@0"},
		},
		{"no numbers as strings", `{"name":"a","value":"nan"} {"name":"b","value":"-inf"}`, 200, []string{"site-1 metric a=NaN@0", "site-1 metric b=-Inf@0"}},
		{"a parameter", `{"kind":"param","name":"lr","value":"0.1"}`, 200, []string{"site-1 param lr=0.1"}},
		{"a parameter that is a number", `{"kind":"param","name":"lr","value":0.10}`, 200, []string{"site-1 param lr=0.10"}},
		{"a tag", `{"kind":"tag","name":"gpu","value":"none"}`, 200, []string{"site-1 tag gpu=none"}},
		{"a name with more than letters", `{"name":"train/f1 (macro) @1 é","value":1}`, 200, []string{"site-1 metric train/f1 (macro) @1 é=1@0"}},
		{"the largest step", `{"name":"a","value":1,"step":9223372036854775807}`, 200, []string{"site-1 metric a=1@9223372036854775807"}},
		{"a step like numpy's", `{"name":"a","value":1,"step":2.0}`, 200, []string{"site-1 metric a=1@2"}},
		{"a run", `{"name":"a","value":1,"run":"fold 3"}`, 200, []string{"site-1 metric a=1@0"}},

		{"nothing", ``, 400, []string{"empty"}},
		{"an empty array", `[]`, 400, []string{"empty"}},
		{"no JSON", `loss=1`, 400, []string{"object 1", "invalid character"}},
		{"cut off", `{"name":"a","value":1}{"name":"b"`, 400, []string{"object 2", "breaks off"}},
		{"an array without an end", `[{"name":"a","value":1}`, 400, []string{"no end"}},
		{"more than the array", `[{"name":"a","value":1}] x`, 400, []string{"follows the array"}},
		{"no name", `{"value":1}`, 400, []string{"object 1", "name is missing"}},
		{"no value", `{"name":"a"}`, 400, []string{"value is missing"}},
		{"a value that is no number", `{"name":"a","value":"high"}`, 400, []string{`"high"`, "not a number"}},
		{"a boolean", `{"name":"a","value":true}`, 400, []string{"true", "not a number"}},
		{"a value beyond float64", `{"name":"a","value":1e999}`, 400, []string{"1e999", "64-bit"}},
		{"hexadecimal", `{"name":"a","value":"0x10"}`, 400, []string{"not a number"}},
		{"a step that is none", `{"name":"a","value":1,"step":1.5}`, 400, []string{"1.5", "integer"}},
		{"a step of a parameter", `{"kind":"param","name":"a","value":"1","step":1}`, 400, []string{"no step"}},
		{"an unknown kind", `{"kind":"image","name":"a","value":"1"}`, 400, []string{`"image"`, "metric, param, tag"}},
		{"an unknown field", `{"name":"a","value":1,"stpe":1}`, 400, []string{"stpe"}},
		{"a bad time", `{"name":"a","value":1,"time":"yesterday"}`, 400, []string{"time"}},
		{"a time far off", `{"name":"a","value":1,"time":1e18}`, 400, []string{"time"}},
		{"a long name", `{"name":"` + strings.Repeat("n", 251) + `","value":1}`, 400, []string{"250"}},
		{"a name of two lines", `{"name":"a\nb","value":1}`, 400, []string{"printed"}},
		{"a long parameter", `{"kind":"param","name":"a","value":"` + strings.Repeat("x", MaxParam+1) + `"}`, 400, []string{"6000"}},
		{"null", `null`, 400, []string{"null"}},
		{"one bad among good ones", `{"name":"a","value":1} {"name":"","value":1}`, 400, []string{"object 2"}},
		{"too many", strings.Repeat(`{"name":"a","value":1}`, maxBatch+1), 400, []string{"10000"}},
		{"too much", `{"name":"` + strings.Repeat("n", maxBody) + `","value":1}`, 413, []string{"4.0 MiB"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			_, _, url := serve(t, Options{Dir: dir})
			status, body := call(t, "POST", url, c.body)
			if status != c.status {
				t.Fatalf("status %d, want %d: %s", status, c.status, body)
			}
			var got []string
			for _, r := range records(t, dir) {
				got = append(got, brief(r))
			}
			if status == 200 {
				if !slices.Equal(got, c.want) {
					t.Errorf("kept %q, want %q", got, c.want)
				}
				return
			}
			if len(got) > 0 {
				t.Errorf("kept %q of a request that was refused", got)
			}
			isError(t, body, codeInvalid, c.want...)
		})
	}
}

// isError checks MLflow's form of an error.
func isError(t *testing.T, body, code string, says ...string) {
	t.Helper()
	var e struct {
		Code    string `json:"error_code"`
		Message string `json:"message"`
	}
	if err := json.Unmarshal([]byte(body), &e); err != nil || e.Code != code {
		t.Errorf("the answer is %s, want the code %s", body, code)
	}
	for _, s := range says {
		if !strings.Contains(e.Message, s) {
			t.Errorf("the message %q does not say %q", e.Message, s)
		}
	}
}

func TestTimes(t *testing.T) {
	dir := t.TempDir()
	_, _, url := serve(t, Options{Dir: dir})
	before := time.Now()
	if status, body := call(t, "POST", url, `{"name":"a","value":1,"time":1700000000.25} {"name":"a","value":1,"time":"2026-01-31T12:00:00+01:00"} {"name":"a","value":1}`); status != 200 {
		t.Fatal(body)
	}
	got := records(t, dir)
	if want := time.Unix(1700000000, 250e6); !got[0].Time.Equal(want) {
		t.Errorf("got %v, want %v", got[0].Time, want)
	}
	if want := time.Date(2026, 1, 31, 11, 0, 0, 0, time.UTC); !got[1].Time.Equal(want) {
		t.Errorf("got %v, want %v", got[1].Time, want)
	}
	if got[2].Time.Before(before) || got[2].Time.After(time.Now()) {
		t.Errorf("got %v, want now", got[2].Time)
	}
}

func TestToken(t *testing.T) {
	dir := t.TempDir()
	_, tracking, plain := serve(t, Options{Dir: dir})
	root := tracking[:strings.LastIndex(tracking, "/")]
	for _, url := range []string{root + "/metrics", root + "/0123/metrics", root + "//metrics", root, tracking, tracking[:len(tracking)-1] + "/metrics", strings.ToUpper(tracking) + "/metrics"} {
		url = strings.Replace(url, "HTTP:", "http:", 1)
		if status, body := call(t, "POST", url, `{"name":"a","value":1}`); status != 404 || strings.Contains(body, "Pergola") {
			t.Errorf("POST %s: %d %s", url, status, body)
		}
	}
	if got := records(t, dir); len(got) > 0 {
		t.Errorf("kept %v", got)
	}
	if status, _ := call(t, "GET", plain, ""); status != 405 {
		t.Errorf("GET: %d", status)
	}
	if _, err := Serve(t.Context(), Options{IP: "0.0.0.0"}); err == nil {
		t.Error("it listens on all addresses")
	}
}

func TestEnv(t *testing.T) {
	s, _, _ := serve(t, Options{})
	for _, c := range []struct {
		name        string
		given, want []string
	}{
		{"nothing was set", nil, []string{PlainVar, SiteVar, MLflowVar, "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "MLFLOW_DISABLE_TELEMETRY"}},
		{"a tracking server of one's own", []string{"MLFLOW_TRACKING_URI=http://mine"}, []string{PlainVar, SiteVar, "MLFLOW_DISABLE_TELEMETRY"}},
		{"telemetry as one likes", []string{"MLFLOW_DISABLE_TELEMETRY=false"}, []string{PlainVar, SiteVar, MLflowVar, "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"}},
	} {
		var got []string
		for _, kv := range s.Env(c.given) {
			k, _, _ := strings.Cut(kv, "=")
			got = append(got, k)
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: got %q, want %q", c.name, got, c.want)
		}
	}
}

const at = "/api/2.0/mlflow/"

// step is a request of a conversation and its answer. $ID in path and body stands for the id of the last run made.
type step struct {
	method, path, body string
	status             int
	code               string   // of an error
	says               []string // in the answer
}

func TestMLflow(t *testing.T) {
	run := step{"POST", "runs/create", `{"experiment_id":"0","user_id":"me","run_name":"r1","start_time":"1700000000000","tags":[{"key":"a","value":"b"}]}`, 200, "", []string{`"status":"RUNNING"`, `"run_name":"r1"`, `"start_time":1700000000000`}}
	for _, c := range []struct {
		name  string
		steps []step
		want  []string
	}{
		{"an experiment is looked for, made and found", []step{
			{"GET", "experiments/get-by-name?experiment_name=e%20x", "", 404, codeMissing, []string{"e x"}},
			{"POST", "experiments/create", `{"name":"e x"}`, 200, "", []string{`"experiment_id":"1"`}},
			{"GET", "experiments/get?experiment_id=1", "", 200, "", []string{`"name":"e x"`, `"lifecycle_stage":"active"`}},
			{"GET", "experiments/get-by-name?experiment_name=e%20x", "", 200, "", []string{`"experiment_id":"1"`}},
			{"POST", "experiments/create", `{"name":"e x"}`, 400, codeExists, nil},
			{"POST", "experiments/set-experiment-tag", `{"experiment_id":"1","key":"k","value":"v"}`, 200, "", nil},
			{"GET", "experiments/get?experiment_id=1", "", 200, "", []string{`{"key":"k","value":"v"}`}},
			{"POST", "runs/create", `{"experiment_id":"1"}`, 200, "", []string{`"experiment_id":"1"`, `"run_name":"run-1"`}},
		}, []string{"site-1 tag mlflow.experiment=e x"}},
		{"the default experiment", []step{
			{"GET", "experiments/get?experiment_id=0", "", 200, "", []string{`"name":"Default"`}},
			{"GET", "experiments/get?experiment_id=9", "", 404, codeMissing, []string{"id=9"}},
			{"POST", "experiments/create", `{"name":""}`, 400, codeInvalid, []string{"missing"}},
			{"POST", "experiments/set-experiment-tag", `{"experiment_id":"9","key":"k","value":"v"}`, 404, codeMissing, nil},
		}, nil},
		{"metrics", []step{
			run,
			{"POST", "runs/log-metric", `{"run_uuid":"$ID","run_id":"$ID","key":"loss","value":0.1,"timestamp":1700000000001,"step":3}`, 200, "", []string{"{}"}},
			{"POST", "runs/log-metric", `{"run_id":"$ID","key":"loss","value":"NaN","timestamp":"1700000000002","step":"4"}`, 200, "", nil},
			{"POST", "runs/log-metric", `{"run_uuid":"$ID","key":"up","value":"-Infinity","timestamp":1}`, 200, "", nil},
			{"POST", "runs/log-metric", `{"run_uuid":"$ID","key":"loss","value":7,"timestamp":1,"step":2}`, 200, "", nil},
			{"GET", "runs/get?run_id=$ID", "", 200, "", []string{`{"key":"loss","value":"NaN","timestamp":1700000000002,"step":4}`, `{"key":"up","value":"-Infinity"`, `{"key":"a","value":"b"}`}},
		}, []string{"site-1 tag a=b", "site-1 metric loss=0.1@3", "site-1 metric loss=NaN@4", "site-1 metric up=-Inf@0", "site-1 metric loss=7@2"}},
		{"metrics that are none", []step{
			run,
			{"POST", "runs/log-metric", `{"key":"a","value":1}`, 400, codeInvalid, []string{"run_id"}},
			{"POST", "runs/log-metric", `{"run_id":"../x","key":"a","value":1}`, 400, codeInvalid, []string{"../x"}},
			{"POST", "runs/log-metric", `{"run_id":"$ID","key":"a"}`, 400, codeInvalid, []string{"value is missing"}},
			{"POST", "runs/log-metric", `{"run_id":"$ID","value":1}`, 400, codeInvalid, []string{"name is missing"}},
			{"POST", "runs/log-metric", `{"run_id":"$ID","key":"a","value":1,"timestamp":9000000000000000000}`, 400, codeInvalid, []string{"years"}},
			{"POST", "runs/log-metric", `{"run_id":"$ID","key":"a","value":1,"step":"x"}`, 400, codeMalformed, []string{"integer"}},
			{"POST", "runs/log-metric", `{`, 400, codeMalformed, nil},
			{"POST", "runs/log-metric", ``, 400, codeMalformed, nil},
		}, []string{"site-1 tag a=b"}},
		{"parameters", []step{
			run,
			{"POST", "runs/log-parameter", `{"run_id":"$ID","key":"lr","value":"0.1"}`, 200, "", nil},
			{"POST", "runs/log-parameter", `{"run_id":"$ID","key":"lr","value":"0.1"}`, 200, "", nil},
			{"POST", "runs/log-parameter", `{"run_id":"$ID","key":"lr","value":"0.2"}`, 400, codeInvalid, []string{"not allowed", "lr"}},
			{"POST", "runs/log-parameter", `{"run_id":"$ID","key":"n","value":1}`, 400, codeInvalid, []string{"not a string"}},
			{"POST", "runs/log-batch", `{"run_id":"$ID","params":[{"key":"x","value":"1"},{"key":"x","value":"2"}]}`, 400, codeInvalid, []string{"not allowed"}},
			{"GET", "runs/get?run_uuid=$ID", "", 200, "", []string{`"params":[{"key":"lr","value":"0.1"}]`}},
		}, []string{"site-1 tag a=b", "site-1 param lr=0.1"}},
		{"tags", []step{
			run,
			{"POST", "runs/set-tag", `{"run_id":"$ID","key":"t","value":"1"}`, 200, "", nil},
			{"POST", "runs/set-tag", `{"run_id":"$ID","key":"t","value":"2"}`, 200, "", nil},
			{"GET", "runs/get?run_id=$ID", "", 200, "", []string{`{"key":"t","value":"2"}`}},
			{"POST", "runs/delete-tag", `{"run_id":"$ID","key":"t"}`, 200, "", nil},
			{"POST", "runs/delete-tag", `{"run_id":"$ID","key":"t"}`, 404, codeMissing, nil},
		}, []string{"site-1 tag a=b", "site-1 tag t=1", "site-1 tag t=2", "site-1 tag t="}},
		{"a batch is kept as a whole or not at all", []step{
			run,
			{"POST", "runs/log-batch", `{"run_id":"$ID","metrics":[{"key":"a","value":1,"timestamp":1,"step":-1},{"key":"b","value":2.5,"timestamp":1}],"params":[{"key":"x","value":"1"}],"tags":[{"key":"q","value":"w"}]}`, 200, "", nil},
			{"POST", "runs/log-batch", `{"run_id":"$ID","metrics":[{"key":"c","value":1},{"key":"","value":2}]}`, 400, codeInvalid, nil},
			{"POST", "runs/log-batch", `{"run_id":"$ID"}`, 200, "", nil},
		}, []string{"site-1 tag a=b", "site-1 metric a=1@-1", "site-1 metric b=2.5@0", "site-1 param x=1", "site-1 tag q=w"}},
		{"a run ends and goes on", []step{
			run,
			{"POST", "runs/update", `{"run_id":"$ID","status":"FINISHED","end_time":1700000000009}`, 200, "", []string{`"status":"FINISHED"`, `"end_time":1700000000009`}},
			{"POST", "runs/update", `{"run_id":"$ID","status":"RUNNING","run_name":"r2"}`, 200, "", []string{`"status":"RUNNING"`, `"run_name":"r2"`}},
			{"POST", "runs/update", `{"run_id":"$ID","status":"LOST"}`, 400, codeInvalid, []string{"LOST", "FINISHED"}},
		}, []string{"site-1 tag a=b"}},
		{"a run of another party is joined", []step{
			{"GET", "runs/get?run_id=0123456789abcdef0123456789abcdef", "", 200, "", []string{`"status":"RUNNING"`}},
			{"POST", "runs/log-metric", `{"run_id":"0123456789abcdef0123456789abcdef","key":"a","value":1}`, 200, "", nil},
		}, []string{"site-1 metric a=1@0"}},
		{"long values are cut as MLflow does", []step{
			run,
			{"POST", "runs/log-parameter", `{"run_id":"$ID","key":"p","value":"` + strings.Repeat("é", MaxParam+5) + `"}`, 200, "", nil},
		}, []string{"site-1 tag a=b", "site-1 param p=" + strings.Repeat("é", MaxParam)}},
		{"what is not offered", []step{
			{"POST", "runs/search", `{}`, 404, codeEndpoint, []string{"does not offer POST"}},
			{"GET", "runs/create", ``, 404, codeEndpoint, []string{"GET"}},
			{"PUT", "../mlflow-artifacts/artifacts/0/x/model.pkl", "bytes", 501, codeNotThere, []string{"no files", MLflowVar}},
			{"GET", "../../../version", "", 200, "", []string{mlflowVersion}},
			{"GET", "../../../health", "", 200, "", []string{"OK"}},
		}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			_, tracking, _ := serve(t, Options{Dir: dir})
			id := ""
			for _, s := range c.steps {
				path := at + s.path
				for strings.Contains(path, "/../") { // clients send clean paths
					i := strings.Index(path, "/../")
					path = path[:strings.LastIndex(path[:i], "/")] + path[i+3:]
				}
				status, body := call(t, s.method, tracking+strings.ReplaceAll(path, "$ID", id), strings.ReplaceAll(s.body, "$ID", id))
				if status != s.status {
					t.Fatalf("%s %s %s: status %d, want %d: %s", s.method, path, s.body, status, s.status, body)
				}
				if s.code != "" {
					isError(t, body, s.code, s.says...)
				} else {
					for _, want := range s.says {
						if !strings.Contains(body, want) {
							t.Errorf("%s: %s has no %s", path, body, want)
						}
					}
				}
				if s.path == "runs/create" && status == 200 {
					var a runAnswer
					must(t, json.Unmarshal([]byte(body), &a))
					id = a.Run.Info.ID
				}
			}
			var got []string
			for _, r := range records(t, dir) {
				got = append(got, brief(r))
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("kept %q, want %q", got, c.want)
			}
		})
	}
}

func idOf(t *testing.T, a any) string {
	t.Helper()
	r, ok := a.(runAnswer)
	if !ok {
		t.Fatalf("%T is no run", a)
	}
	return r.Run.Info.ID
}

// What is remembered is bound, and what was forgotten is taken up again.
func TestRunsAreForgotten(t *testing.T) {
	m := newMLflow(func([]Record) *failure { return nil })
	ids := []string{}
	for range maxRuns + 5 {
		a, fail := m.createRun(&params{Tags: []textEntry{{"k", "v"}}})
		if fail != nil {
			t.Fatal(fail.message)
		}
		ids = append(ids, idOf(t, a))
	}
	if len(m.runs) != maxRuns || len(m.order) != maxRuns || m.entries != maxRuns || m.runs[ids[4]] != nil || m.runs[ids[5]] == nil {
		t.Errorf("%d runs, %d in order, %d entries", len(m.runs), len(m.order), m.entries)
	}
	if _, fail := m.logMetric(&params{RunID: ids[0], Key: "a", Value: []byte("1")}); fail != nil {
		t.Error(fail.message)
	}
	// Names of runs that are over make room for those of runs that go on.
	m = newMLflow(func([]Record) *failure { return nil })
	tags := make([]textEntry, maxBatch)
	for i := range tags {
		tags[i] = textEntry{fmt.Sprint(i), ""}
	}
	for i := range 2 * maxEntries / maxBatch {
		a, fail := m.createRun(&params{Tags: tags})
		if fail != nil {
			t.Fatal(i, fail.message)
		}
		if _, fail := m.updateRun(&params{RunID: idOf(t, a), Status: "FINISHED"}); fail != nil {
			t.Fatal(fail.message)
		}
	}
	if m.entries != maxEntries {
		t.Errorf("%d entries, want %d", m.entries, maxEntries)
	}
	m = newMLflow(func([]Record) *failure { return nil })
	var fail *failure
	n := 0
	for ; fail == nil && n < maxEntries; n++ {
		_, fail = m.createRun(&params{Tags: tags})
	}
	if fail == nil || fail.code != codeLimit || n != maxEntries/maxBatch+1 {
		t.Errorf("after %d runs that go on: %+v", n, fail)
	}
}

// Many clients at once: nothing is lost, doubled or torn, and each client's own order is kept.
func TestConcurrently(t *testing.T) {
	dir := t.TempDir()
	var mu sync.Mutex
	noted := 0
	_, tracking, plain := serve(t, Options{Dir: dir, OnRecords: func() { mu.Lock(); noted++; mu.Unlock() }})
	const clients, each = 8, 40
	var wg sync.WaitGroup
	for c := range clients {
		wg.Go(func() {
			for i := range each {
				url, body := plain, fmt.Sprintf(`{"name":"c%d","value":%d,"step":%d}`, c, i, i)
				if c%2 == 1 {
					url, body = tracking+at+"runs/log-metric", fmt.Sprintf(`{"run_id":"r%d","key":"c%d","value":%d,"step":%d}`, c, c, i, i)
				}
				if status, body := call(t, "POST", url, body); status != 200 {
					t.Errorf("%d %s", status, body)
				}
			}
		})
	}
	wg.Wait()
	next := map[string]int64{}
	for _, r := range records(t, dir) {
		if r.Step != next[r.Name] || r.Value != float64(r.Step) {
			t.Errorf("%s, want step %d", brief(r), next[r.Name])
		}
		next[r.Name]++
	}
	for c := range clients {
		if n := next[fmt.Sprintf("c%d", c)]; n != each {
			t.Errorf("client %d: %d records", c, n)
		}
	}
	if noted != clients*each {
		t.Errorf("%d notes", noted)
	}
}

func TestLimitOfBytes(t *testing.T) {
	dir := t.TempDir()
	_, tracking, plain := serve(t, Options{Dir: dir, MaxBytes: 300})
	n, status, body := 0, 200, ""
	for ; status == 200 && n < 10; n++ {
		status, body = call(t, "POST", plain, `{"name":"a","value":1}`)
	}
	if status != http.StatusInsufficientStorage || n < 3 {
		t.Errorf("after %d: %d", n, status)
	}
	isError(t, body, codeLimit, "site-1", "300 B", "log less often")
	if got := len(records(t, dir)); got != n-1 {
		t.Errorf("%d records after %d answers", got, n-1)
	}
	if status, _ := call(t, "POST", tracking+at+"runs/create", `{"tags":[{"key":"a","value":"b"}]}`); status != http.StatusInsufficientStorage {
		t.Errorf("a run was made: %d", status)
	}
}

// A file that cannot be written is said to the client and to the party.
func TestWriteError(t *testing.T) {
	for _, c := range []struct {
		name string
		path func(dir string) error
	}{
		{"a folder in its place", func(dir string) error { return os.Mkdir(filepath.Join(dir, logs.MetricsFile), 0o700) }},
		{"a link in its place", func(dir string) error {
			return os.Symlink(filepath.Join(dir, "elsewhere"), filepath.Join(dir, logs.MetricsFile))
		}},
		{"a fifo in its place", func(dir string) error { return syscall.Mkfifo(filepath.Join(dir, logs.MetricsFile), 0o600) }},
		{"the folder is gone", os.Remove},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			must(t, c.path(dir))
			var told error
			_, _, plain := serve(t, Options{Dir: dir, OnError: func(err error) { told = err }})
			status, body := call(t, "POST", plain, `{"name":"a","value":1}`)
			if status != http.StatusInsufficientStorage || told == nil {
				t.Errorf("status %d, told %v", status, told)
			}
			isError(t, body, codeInternal, "disk")
			if _, err := os.Lstat(filepath.Join(dir, "elsewhere")); err == nil {
				t.Error("the link was followed")
			}
		})
	}
}

// A writer that was killed leaves a torn line; the next one's first record is a line of its own.
func TestTornLine(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, logs.MetricsFile)
	rec := Record{Time: time.Unix(1, 0), Site: "s", Kind: Metric, Name: "a", Value: 1}
	f := newFile(dir, 1<<20)
	must(t, f.add([]Record{rec}))
	must(t, f.close())
	if err := f.add([]Record{rec}); !errors.Is(err, os.ErrClosed) {
		t.Errorf("add after close: %v", err)
	}
	b, err := os.ReadFile(path)
	must(t, err)
	must(t, os.WriteFile(path, append(b, b[:len(b)/2]...), 0o600))
	f = newFile(dir, 1<<20)
	must(t, f.add([]Record{rec, rec}))
	must(t, f.close())
	after, err := os.ReadFile(path)
	must(t, err)
	n := 0
	skipped, err := Read(bytes.NewReader(after), func(Record) error { n++; return nil })
	if n != 3 || skipped != 1 || err != nil {
		t.Errorf("%d records, %d skipped, %v", n, skipped, err)
	}
}

func TestRead(t *testing.T) {
	good := `{"time":"2026-01-02T03:04:05.006Z","site":"s","kind":"metric","name":"a","value":1}`
	for _, c := range []struct {
		name, text    string
		want, skipped int
	}{
		{"nothing", "", 0, 0},
		{"lines", good + "\n" + good + "\n", 2, 0},
		{"the last line has no end", good + "\n" + good, 2, 0},
		{"the last line is torn", good + "\n" + good[:30], 1, 1},
		{"a torn line in the middle", good[:30] + "\n" + good + "\n", 1, 1},
		{"empty lines", "\n\n" + good + "\n\n", 1, 0},
		{"a line without end", strings.Repeat("x", 3*maxLine), 0, 1},
		{"a long line among good ones", good + "\n" + strings.Repeat("x", 3*maxLine) + "\n" + good + "\n", 2, 1},
		{"no record", "{}\n[]\n1\nnull\n", 0, 4},
		{"an unknown kind", strings.Replace(good, "metric", "image", 1), 0, 1},
		{"a metric that is a text", strings.Replace(good, `"value":1`, `"value":"high"`, 1), 0, 1},
		{"no value", strings.Replace(good, `,"value":1`, ``, 1), 0, 1},
		{"a name of two lines", strings.Replace(good, `"a"`, `"a\nb"`, 1), 0, 1},
	} {
		n := 0
		skipped, err := Read(strings.NewReader(c.text), func(Record) error { n++; return nil })
		if n != c.want || skipped != c.skipped || err != nil {
			t.Errorf("%s: %d records, %d skipped, %v; want %d, %d", c.name, n, skipped, err, c.want, c.skipped)
		}
	}
	stop := errors.New("stop")
	if _, err := Read(strings.NewReader(good), func(Record) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("got %v", err)
	}
	broken := errors.New("broken disk")
	if _, err := Read(io.MultiReader(strings.NewReader(good), errReader{broken}), func(Record) error { return nil }); !errors.Is(err, broken) {
		t.Errorf("got %v", err)
	}
}

type errReader struct{ err error }

func (r errReader) Read([]byte) (int, error) { return 0, r.err }

func FuzzPlain(f *testing.F) {
	for _, s := range []string{
		`{"name":"loss","value":0.1,"step":3}`, `[{"name":"a","value":NaN}]`, `{"kind":"param","name":"lr","value":[1,{"a":"b"}],"time":1.5}`, `[`, `{"name":"\\\"NaN","value":"-inf"}`,
		`{"name":"a","value":1,"time":"2026-01-31T12:00:00Z","run":"r"}`, `[null]`, `{"name":"a","value":1}]`,
	} {
		f.Add([]byte(s))
	}
	now := time.Date(2026, 1, 2, 3, 4, 5, 6e6, time.UTC)
	// What is taken can be kept: each record is a line that reads back as the same.
	f.Fuzz(func(t *testing.T, b []byte) {
		recs, err := parsePlain(b, now)
		if err != nil {
			return
		}
		if len(recs) == 0 {
			t.Error("nothing was taken, and that is no error")
		}
		roundTrip(t, recs)
	})
}

func FuzzMLflow(f *testing.F) {
	for _, s := range []string{
		`{"run_id":"r","key":"loss","value":0.1,"timestamp":1700000000000,"step":3}`, `{"run_uuid":"r","key":"loss","value":"NaN","timestamp":"1","step":"-1"}`,
		`{"run_id":"r","metrics":[{"key":"a","value":-Infinity}],"params":[{"key":"p","value":"v"}],"tags":[{"key":"mlflow.runName","value":"n"}]}`,
		`{"run_id":"r","status":"FINISHED","end_time":1,"run_name":"x"}`, `{"experiment_id":"0","name":"e","experiment_name":"e"}`,
	} {
		f.Add([]byte(s))
	}
	// Whatever a request says, every endpoint has an answer, and what is kept can be read back.
	f.Fuzz(func(t *testing.T, b []byte) {
		p, fail := decodeParams(b)
		if fail != nil {
			return
		}
		m := newMLflow(func(recs []Record) *failure {
			for i := range recs {
				recs[i].Site = "s"
			}
			roundTrip(t, recs)
			return nil
		})
		for _, call := range []func(*params) (any, *failure){
			m.createRun, m.createExperiment, m.getExperiment, m.experimentByName, m.tagExperiment, m.updateRun, m.logMetric, m.logParam, m.setTag, m.logBatch, m.deleteTag, m.getRun,
		} {
			out, fail := call(p)
			if (out == nil) == (fail == nil) {
				t.Errorf("%v and %v", out, fail)
			}
			if _, err := json.Marshal(out); err != nil {
				t.Error(err)
			}
			if fail != nil && (fail.status < 400 || fail.code == "" || fail.message == "") {
				t.Errorf("%+v", fail)
			}
		}
		n := 0
		for _, r := range m.runs {
			n += len(r.params) + len(r.tags) + len(r.metrics)
		}
		for _, e := range m.experiments {
			n += len(e.tags)
		}
		if n != m.entries {
			t.Errorf("%d entries are counted, there are %d", m.entries, n)
		}
	})
}

func FuzzRead(f *testing.F) {
	f.Add([]byte(`{"time":"2026-01-02T03:04:05.006Z","site":"s","kind":"metric","name":"a","value":"NaN","step":3,"run":"x","run_id":"0"}` + "\n{"))
	f.Add([]byte(`{"time":"2026-01-02T03:04:05+23:59","site":"s","kind":"tag","name":"a","value":"<b>"}`))
	// What is read is written and read as the same.
	f.Fuzz(func(t *testing.T, b []byte) {
		var recs []Record
		if _, err := Read(bytes.NewReader(b), func(r Record) error { recs = append(recs, r); return nil }); err != nil {
			t.Error(err)
		}
		roundTrip(t, recs)
	})
}

// roundTrip checks that records are lines, and that these read back as the same records.
func roundTrip(t *testing.T, recs []Record) {
	t.Helper()
	for _, r := range recs {
		b, err := json.Marshal(r)
		if err != nil || bytes.ContainsRune(b, '\n') || len(b) > maxLine {
			t.Fatalf("%+v: %d bytes, %v", r, len(b), err)
		}
		n := 0
		skipped, err := Read(bytes.NewReader(append(b, '\n')), func(got Record) error {
			n++
			same := got.Value == r.Value || math.IsNaN(got.Value) && math.IsNaN(r.Value)
			got.Value, r.Value = 0, 0
			if !same || !got.Time.Equal(r.Time) {
				t.Errorf("%s reads as %+v, want %+v", b, got, r)
			}
			got.Time, r.Time = time.Time{}, time.Time{}
			if got != r {
				t.Errorf("%s reads as %+v, want %+v", b, got, r)
			}
			return nil
		})
		if n != 1 || skipped != 0 || err != nil {
			t.Errorf("%s: %d records, %d skipped, %v", b, n, skipped, err)
		}
	}
}
