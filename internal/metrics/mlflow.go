package metrics

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"
)

// The requests and answers are those of MLflow's REST API 2.0 (https://mlflow.org/docs/latest/api_reference/rest-api.html,
// mlflow/protos/service.proto), as far as mlflow 2.x and 3.x call it to start and end runs and to log. What they log is kept
// in the party's file; what is remembered here is what they read back: the state of runs, and the last values.

// Limits of what is remembered. The file is not bound by them.
const (
	maxRuns        = 10_000
	maxExperiments = 1000
	maxEntries     = 200_000 // names of parameters, tags and metrics of all runs together
)

// mlflowVersion is what the server says it is: one that has all of what is served here. Clients look only whether it is
// new enough for features that are not.
const mlflowVersion = "2.0.0"

// mlflow is a party's experiments and runs.
type mlflow struct {
	keep func([]Record) *failure

	mu          sync.Mutex // guards the rest; held while records are written, so that their order is that of the state
	experiments map[string]*experiment
	runs        map[string]*mlRun
	order       []string // of runs, oldest first
	entries     int
	made        int // runs that were made here
}

type experiment struct {
	id, name string
	created  int64 // ms
	tags     map[string]string
}

// mlRun is a run. Its strings and maps are never long: see the limits.
type mlRun struct {
	id, name, given, experiment, user, status string
	start, end                                int64 // ms; end 0 = goes on
	params, tags                              map[string]string
	metrics                                   map[string]Record // the last of each
}

func newMLflow(keep func([]Record) *failure) *mlflow {
	m := &mlflow{keep: keep, experiments: map[string]*experiment{}, runs: map[string]*mlRun{}}
	m.experiments["0"] = &experiment{id: "0", name: "Default", created: time.Now().UnixMilli(), tags: map[string]string{}}
	return m
}

// params are a request's fields: of its JSON body, or with GET of its query.
type params struct {
	RunID          string          `json:"run_id"`
	RunUUID        string          `json:"run_uuid"` // the name of run_id before MLflow 1.0; clients still send both
	RunName        string          `json:"run_name"`
	ExperimentID   string          `json:"experiment_id"`
	ExperimentName string          `json:"experiment_name"`
	Name           string          `json:"name"`
	UserID         string          `json:"user_id"`
	Status         string          `json:"status"`
	StartTime      wireInt         `json:"start_time"`
	EndTime        wireInt         `json:"end_time"`
	Key            string          `json:"key"`
	Value          json.RawMessage `json:"value"`
	Timestamp      *wireInt        `json:"timestamp"`
	Step           wireInt         `json:"step"`
	Metrics        []metricEntry   `json:"metrics"`
	Params         []textEntry     `json:"params"`
	Tags           []textEntry     `json:"tags"`
}

type metricEntry struct {
	Key       string          `json:"key"`
	Value     json.RawMessage `json:"value"`
	Timestamp *wireInt        `json:"timestamp"`
	Step      wireInt         `json:"step"`
}

type textEntry struct {
	Key   string `json:"key"`
	Value string `json:"value"`
}

// decodeParams reads a request's body.
func decodeParams(b []byte) (*params, *failure) {
	var p params
	if err := json.Unmarshal(quoteSpecials(b), &p); err != nil {
		return nil, &failure{http.StatusBadRequest, codeMalformed, "the request is not what MLflow's clients send: " + err.Error()}
	}
	p.RunID = orElse(p.RunID, p.RunUUID)
	return &p, nil
}

func queryParams(q url.Values) *params {
	return &params{RunID: orElse(q.Get("run_id"), q.Get("run_uuid")), ExperimentID: q.Get("experiment_id"), ExperimentName: q.Get("experiment_name")}
}

func orElse(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

// empty is the answer to a request that asks for nothing.
type empty struct{}

// register adds the endpoints to mux.
func (m *mlflow) register(mux *http.ServeMux) {
	const at = "/api/2.0/mlflow/"
	for path, f := range map[string]func(*params) (any, *failure){
		"GET " + at + "experiments/get":                 m.getExperiment,
		"GET " + at + "experiments/get-by-name":         m.experimentByName,
		"POST " + at + "experiments/create":             m.createExperiment,
		"POST " + at + "experiments/set-experiment-tag": m.tagExperiment,
		"POST " + at + "runs/create":                    m.createRun,
		"GET " + at + "runs/get":                        m.getRun,
		"POST " + at + "runs/update":                    m.updateRun,
		"POST " + at + "runs/log-metric":                m.logMetric,
		"POST " + at + "runs/log-parameter":             m.logParam,
		"POST " + at + "runs/log-batch":                 m.logBatch,
		"POST " + at + "runs/set-tag":                   m.setTag,
		"POST " + at + "runs/delete-tag":                m.deleteTag,
	} {
		mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
			p, fail := queryParams(r.URL.Query()), (*failure)(nil)
			if r.Method == http.MethodPost {
				var b []byte
				if b, fail = readBody(r); fail == nil {
					p, fail = decodeParams(b)
				}
			}
			var out any
			if fail == nil {
				m.mu.Lock()
				out, fail = f(p)
				m.mu.Unlock()
			}
			if fail != nil {
				fail.write(w)
				return
			}
			answer(w, http.StatusOK, out)
		})
	}
	text := func(s string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/plain; charset=utf-8")
			_, _ = w.Write([]byte(s)) // a client that is gone does not want it
		}
	}
	mux.HandleFunc("GET /version", text(mlflowVersion))
	mux.HandleFunc("GET /health", text("OK"))
	mux.HandleFunc("/api/2.0/mlflow-artifacts/", func(w http.ResponseWriter, _ *http.Request) {
		(&failure{
			http.StatusNotImplemented, codeNotThere,
			"Pergola takes metrics, parameters and tags, but no files or models: write files to the working directory, or set " + MLflowVar + " to a server of your own",
		}).write(w)
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		(&failure{
			http.StatusNotFound, codeEndpoint,
			fmt.Sprintf("Pergola does not offer %s %s of MLflow's API: it takes metrics, parameters and tags, and what was logged is in the job's results", r.Method, clip(r.URL.Path)),
		}).write(w)
	})
}

// experimentJSON is MLflow's message Experiment.
type experimentJSON struct {
	ID       string     `json:"experiment_id"`
	Name     string     `json:"name"`
	Location string     `json:"artifact_location"`
	Stage    string     `json:"lifecycle_stage"`
	Created  int64      `json:"creation_time"`
	Updated  int64      `json:"last_update_time"`
	Tags     []textJSON `json:"tags,omitempty"`
}

type textJSON struct {
	Key   string `json:"key"`
	Value string `json:"value"`
}

type metricJSON struct {
	Key       string          `json:"key"`
	Value     json.RawMessage `json:"value"` // "NaN", "Infinity" and "-Infinity" are strings in protobuf's JSON
	Timestamp int64           `json:"timestamp"`
	Step      int64           `json:"step"`
}

// infoJSON is MLflow's message RunInfo.
type infoJSON struct {
	ID         string `json:"run_id"`
	UUID       string `json:"run_uuid"`
	Name       string `json:"run_name"`
	Experiment string `json:"experiment_id"`
	User       string `json:"user_id"`
	Status     string `json:"status"`
	Start      int64  `json:"start_time"`
	End        int64  `json:"end_time,omitempty"`
	Location   string `json:"artifact_uri"`
	Stage      string `json:"lifecycle_stage"`
}

type dataJSON struct {
	Metrics []metricJSON `json:"metrics,omitempty"`
	Params  []textJSON   `json:"params,omitempty"`
	Tags    []textJSON   `json:"tags,omitempty"`
}

type runJSON struct {
	Info   infoJSON `json:"info"`
	Data   dataJSON `json:"data"`
	Inputs empty    `json:"inputs"`
}

type runAnswer struct {
	Run runJSON `json:"run"`
}

type infoAnswer struct {
	Info infoJSON `json:"run_info"`
}

type experimentAnswer struct {
	Experiment experimentJSON `json:"experiment"`
}

type createdAnswer struct {
	ID string `json:"experiment_id"`
}

func texts(m map[string]string) []textJSON {
	var out []textJSON
	for _, k := range slices.Sorted(maps.Keys(m)) {
		out = append(out, textJSON{k, m[k]})
	}
	return out
}

func (e *experiment) json() experimentAnswer {
	return experimentAnswer{experimentJSON{e.id, e.name, "mlflow-artifacts:/" + e.id, "active", e.created, e.created, texts(e.tags)}}
}

func (r *mlRun) info() infoJSON {
	return infoJSON{r.id, r.id, r.name, r.experiment, r.user, r.status, r.start, r.end, "mlflow-artifacts:/" + r.experiment + "/" + r.id + "/artifacts", "active"}
}

func (r *mlRun) json() runAnswer {
	d := dataJSON{Params: texts(r.params), Tags: texts(r.tags)}
	for _, k := range slices.Sorted(maps.Keys(r.metrics)) {
		rec := r.metrics[k]
		v, err := json.Marshal(rec.Value)
		if err != nil { // no finite number
			v = []byte(strconv.Quote(strings.NewReplacer("+Inf", "Infinity", "-Inf", "-Infinity").Replace(FormatValue(rec.Value))))
		}
		d.Metrics = append(d.Metrics, metricJSON{k, v, rec.Time.UnixMilli(), rec.Step})
	}
	return runAnswer{runJSON{Info: r.info(), Data: d}}
}

func (m *mlflow) getExperiment(p *params) (any, *failure) {
	e := m.experiments[p.ExperimentID]
	if e == nil {
		return nil, &failure{http.StatusNotFound, codeMissing, fmt.Sprintf("No Experiment with id=%s exists", clip(p.ExperimentID))}
	}
	return e.json(), nil
}

func (m *mlflow) named(name string) *experiment {
	for _, e := range m.experiments {
		if e.name == name {
			return e
		}
	}
	return nil
}

func (m *mlflow) experimentByName(p *params) (any, *failure) {
	e := m.named(p.ExperimentName)
	if e == nil {
		return nil, &failure{http.StatusNotFound, codeMissing, fmt.Sprintf("Could not find experiment with name '%s'", clip(p.ExperimentName))}
	}
	return e.json(), nil
}

func (m *mlflow) createExperiment(p *params) (any, *failure) {
	if err := checkName("the experiment's name", p.Name); err != nil {
		return nil, badInput("%v", err)
	}
	if m.named(p.Name) != nil {
		return nil, &failure{http.StatusBadRequest, codeExists, fmt.Sprintf("Experiment '%s' already exists.", clip(p.Name))}
	}
	if len(m.experiments) >= maxExperiments {
		return nil, &failure{http.StatusBadRequest, codeLimit, fmt.Sprintf("a party may have %d experiments in a job", maxExperiments)}
	}
	e := &experiment{id: strconv.Itoa(len(m.experiments)), name: p.Name, created: time.Now().UnixMilli(), tags: map[string]string{}}
	m.experiments[e.id] = e
	return createdAnswer{e.id}, nil
}

// tagExperiment remembers a tag of an experiment; the results have runs only.
func (m *mlflow) tagExperiment(p *params) (any, *failure) {
	e := m.experiments[p.ExperimentID]
	if e == nil {
		return m.getExperiment(p)
	}
	v, fail := p.text()
	if fail != nil {
		return nil, fail
	}
	rec, fail := textRecord(Tag, p.Key, v)
	if fail != nil {
		return nil, fail
	}
	if fail := m.room(1, nil); fail != nil {
		return nil, fail
	}
	if _, ok := e.tags[rec.Name]; !ok {
		m.entries++
	}
	e.tags[rec.Name] = rec.Text
	return empty{}, nil
}

// room makes room for n more entries, of the run own if there is one, or refuses them.
func (m *mlflow) room(n int, own *mlRun) *failure {
	for i := 0; m.entries+n > maxEntries && i < len(m.order); {
		if r := m.runs[m.order[i]]; r.end != 0 && r != own {
			m.forget(i)
		} else {
			i++
		}
	}
	if m.entries+n > maxEntries {
		return &failure{http.StatusBadRequest, codeLimit, fmt.Sprintf("the runs that go on have %d names of metrics, parameters and tags: end some, or use fewer names", m.entries)}
	}
	return nil
}

// forget drops the run at place i of the order. Should somebody go on with it, it is made anew by its id.
func (m *mlflow) forget(i int) {
	r := m.runs[m.order[i]]
	m.entries -= len(r.params) + len(r.tags) + len(r.metrics)
	delete(m.runs, r.id)
	m.order = slices.Delete(m.order, i, i+1)
}

// insert remembers a run, in place of the oldest that is over, or else the oldest.
func (m *mlflow) insert(r *mlRun) {
	if len(m.order) >= maxRuns {
		m.forget(max(0, slices.IndexFunc(m.order, func(id string) bool { return m.runs[id].end != 0 })))
	}
	r.params, r.tags, r.metrics = map[string]string{}, map[string]string{}, map[string]Record{}
	m.runs[r.id] = r
	m.order = append(m.order, r.id)
}

func (m *mlflow) createRun(p *params) (any, *failure) {
	r := &mlRun{id: newRunID(), given: p.RunName, experiment: orElse(p.ExperimentID, "0"), user: p.UserID, status: "RUNNING", start: int64(p.StartTime)}
	if !validRunID(r.experiment) {
		return nil, badInput("Invalid experiment ID: '%s'", clip(r.experiment))
	}
	if r.start == 0 {
		r.start = time.Now().UnixMilli()
	}
	for _, t := range p.Tags {
		if t.Key == nameTag && r.given == "" {
			r.given = t.Value
		}
	}
	if r.given != "" {
		if err := checkName("the run's name", r.given); err != nil {
			return nil, badInput("%v", err)
		}
	}
	if err := checkUser(r.user); err != nil {
		return nil, badInput("%v", err)
	}
	r.name = orElse(r.given, "run-"+strconv.Itoa(m.made+1))
	tags := p.Tags
	if e := m.experiments[r.experiment]; e != nil && e.id != "0" {
		tags = append(slices.Clone(tags), textEntry{"mlflow.experiment", e.name})
	}
	recs, fail := batch(&params{Tags: tags})
	if fail != nil {
		return nil, fail
	}
	m.insert(r)
	if fail := m.write(r, recs); fail != nil {
		m.forget(len(m.order) - 1)
		return nil, fail
	}
	m.made++
	return r.json(), nil
}

func checkUser(s string) error {
	if s == "" {
		return nil
	}
	return checkName("user_id", s)
}

// nameTag is the tag by which clients older than MLflow 2.0 name a run.
const nameTag = "mlflow.runName"

// run gives the run that a request is about. A run that is not known is one of another party, whose id came with the
// job's messages, or one that was forgotten: it is taken up.
func (m *mlflow) run(p *params) (*mlRun, *failure) {
	if p.RunID == "" {
		return nil, badInput("Missing value for required parameter 'run_id'.")
	}
	if !validRunID(p.RunID) {
		return nil, badInput("Invalid run ID: '%s'", clip(p.RunID))
	}
	r := m.runs[p.RunID]
	if r == nil {
		r = &mlRun{id: p.RunID, name: p.RunID, experiment: "0", status: "RUNNING", start: time.Now().UnixMilli()}
		m.insert(r)
	}
	return r, nil
}

func (m *mlflow) getRun(p *params) (any, *failure) {
	r, fail := m.run(p)
	if fail != nil {
		return nil, fail
	}
	return r.json(), nil
}

var statuses = []string{"RUNNING", "SCHEDULED", "FINISHED", "FAILED", "KILLED"}

func (m *mlflow) updateRun(p *params) (any, *failure) {
	r, fail := m.run(p)
	if fail != nil {
		return nil, fail
	}
	if p.RunName != "" {
		if err := checkName("the run's name", p.RunName); err != nil {
			return nil, badInput("%v", err)
		}
	}
	if p.Status != "" && !slices.Contains(statuses, p.Status) {
		return nil, badInput("status %q is none of %s", clip(p.Status), strings.Join(statuses, ", "))
	}
	if p.RunName != "" {
		r.name, r.given = p.RunName, p.RunName
	}
	if p.Status != "" {
		r.status, r.end = p.Status, 0
		if p.Status != "RUNNING" && p.Status != "SCHEDULED" {
			if r.end = int64(p.EndTime); r.end == 0 {
				r.end = time.Now().UnixMilli()
			}
		}
	}
	return infoAnswer{r.info()}, nil
}

// text gives the value of a parameter or tag.
func (p *params) text() (string, *failure) {
	var s string
	if len(p.Value) == 0 {
		return "", nil
	}
	if err := json.Unmarshal(p.Value, &s); err != nil {
		return "", badInput("the value of %q is not a string", clip(p.Key))
	}
	return s, nil
}

// textRecord makes a record of a parameter or tag. Long values are cut as by MLflow's server (MLFLOW_TRUNCATE_LONG_VALUES).
func textRecord(k Kind, name, value string) (Record, *failure) {
	limit := MaxParam
	if k == Tag {
		limit = MaxTag
	}
	if utf8.RuneCountInString(value) > limit {
		value = string([]rune(value)[:limit])
	}
	r := Record{Time: time.Now(), Kind: k, Name: name, Text: value}
	if err := r.check(); err != nil {
		return r, badInput("%s: %v", k, err)
	}
	return r, nil
}

func metricRecord(e metricEntry) (Record, *failure) {
	v, err := parseValue(e.Value)
	if err != nil {
		return Record{}, badInput("metric %q: %v", clip(e.Key), err)
	}
	r := Record{Time: time.Now(), Kind: Metric, Name: e.Key, Value: v, Step: int64(e.Step)}
	if e.Timestamp != nil {
		r.Time = time.UnixMilli(int64(*e.Timestamp))
	}
	if err := r.check(); err != nil {
		return r, badInput("metric: %v", err)
	}
	return r, nil
}

// batch makes records of a batch's lists.
func batch(p *params) ([]Record, *failure) {
	if n := len(p.Metrics) + len(p.Params) + len(p.Tags); n > maxBatch {
		return nil, badInput("a batch of %d is more than the %d that a request may have", n, maxBatch)
	}
	var out []Record
	for _, e := range p.Metrics {
		r, fail := metricRecord(e)
		if fail != nil {
			return nil, fail
		}
		out = append(out, r)
	}
	for _, list := range []struct {
		kind Kind
		of   []textEntry
	}{{Param, p.Params}, {Tag, p.Tags}} {
		for _, e := range list.of {
			r, fail := textRecord(list.kind, e.Key, e.Value)
			if fail != nil {
				return nil, fail
			}
			out = append(out, r)
		}
	}
	return out, nil
}

// write keeps records under a run, all or none, and remembers them.
func (m *mlflow) write(r *mlRun, recs []Record) *failure {
	news := recs[:0:0]
	params := map[string]string{}
	given := r.given
	for _, rec := range recs {
		switch rec.Kind {
		case Param:
			old, ok := r.params[rec.Name]
			if !ok {
				old, ok = params[rec.Name]
			}
			if ok && old != rec.Text {
				return badInput("Changing param values is not allowed. Param with key='%s' was already logged with value='%s' for run ID='%s'. Attempted logging new value '%s'.",
					rec.Name, clip(old), r.id, clip(rec.Text))
			}
			if ok {
				continue
			}
			params[rec.Name] = rec.Text
		case Tag:
			if rec.Name == nameTag && rec.Text != "" {
				if err := checkName("the run's name", rec.Text); err != nil {
					return badInput("%v", err)
				}
				given = rec.Text
			}
		}
		news = append(news, rec)
	}
	for i := range news {
		news[i].RunID, news[i].Run = r.id, given
	}
	if fail := m.room(len(news), r); fail != nil {
		return fail
	}
	if fail := m.keep(news); fail != nil {
		return fail
	}
	if given != r.given {
		r.given, r.name = given, given
	}
	before := len(r.params) + len(r.tags) + len(r.metrics)
	for _, rec := range news {
		switch rec.Kind {
		case Param:
			r.params[rec.Name] = rec.Text
		case Tag:
			r.tags[rec.Name] = rec.Text
		case Metric:
			// The one of the highest step is what MLflow calls a run's metric, the later one of two with the same.
			if old, ok := r.metrics[rec.Name]; !ok || rec.Step >= old.Step {
				r.metrics[rec.Name] = rec
			}
		}
	}
	m.entries += len(r.params) + len(r.tags) + len(r.metrics) - before
	return nil
}

func (m *mlflow) logged(p *params, recs ...Record) (any, *failure) {
	r, fail := m.run(p)
	if fail == nil {
		fail = m.write(r, recs)
	}
	if fail != nil {
		return nil, fail
	}
	return empty{}, nil
}

func (m *mlflow) logMetric(p *params) (any, *failure) {
	rec, fail := metricRecord(metricEntry{p.Key, p.Value, p.Timestamp, p.Step})
	if fail != nil {
		return nil, fail
	}
	return m.logged(p, rec)
}

func (m *mlflow) logParam(p *params) (any, *failure) { return m.logText(Param, p) }
func (m *mlflow) setTag(p *params) (any, *failure)   { return m.logText(Tag, p) }

func (m *mlflow) logText(k Kind, p *params) (any, *failure) {
	v, fail := p.text()
	if fail != nil {
		return nil, fail
	}
	rec, fail := textRecord(k, p.Key, v)
	if fail != nil {
		return nil, fail
	}
	return m.logged(p, rec)
}

func (m *mlflow) logBatch(p *params) (any, *failure) {
	recs, fail := batch(p)
	if fail != nil {
		return nil, fail
	}
	return m.logged(p, recs...)
}

// deleteTag writes an empty one down: lines are not taken back.
func (m *mlflow) deleteTag(p *params) (any, *failure) {
	r, fail := m.run(p)
	if fail != nil {
		return nil, fail
	}
	if _, ok := r.tags[p.Key]; !ok {
		return nil, &failure{http.StatusNotFound, codeMissing, fmt.Sprintf("No tag with name: %s in run with id %s", clip(p.Key), r.id)}
	}
	if fail := m.write(r, []Record{{Time: time.Now(), Kind: Tag, Name: p.Key}}); fail != nil {
		return nil, fail
	}
	delete(r.tags, p.Key)
	m.entries--
	return empty{}, nil
}

// newRunID makes an id like MLflow's: 32 hexadecimal digits.
func newRunID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	return hex.EncodeToString(b[:])
}
