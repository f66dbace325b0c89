// Package metrics takes what an app's own code measures, parameters and tags with it, at each party, and makes files of it
// that people's tools read. A party's [Server] speaks the part of MLflow's REST API that logging needs, and a form of one
// JSON object a value; each record is a line of a file in the party's log folder before the app has its answer, so the
// records travel, resume and outlive their programs as logs do (package logs). [Export] makes CSV and TensorBoard event
// files of all parties' lines.
//
// It is no tracking server: what was logged is not searched, and files and models are refused. Start with [Serve]
// and [Export]; users' view is docs/metrics.md.
package metrics

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// Kind says what a record is.
type Kind string

// Kinds of records.
const (
	Metric Kind = "metric" // a number at a step
	Param  Kind = "param"  // a text that stays as it is for its run
	Tag    Kind = "tag"    // a text; the last one counts
)

// Limits of one record. Those of names and texts are MLflow's (mlflow/utils/validation.py: MAX_ENTITY_KEY_LENGTH,
// MAX_PARAM_VAL_LENGTH, MAX_TAG_VAL_LENGTH), in characters.
const (
	MaxName  = 250
	MaxParam = 6000
	MaxTag   = 8000
	maxRunID = 256

	// maxLine is in bytes, and more than any record that keeps to the limits above has.
	maxLine = 128 << 10
)

// Record is one line of a metrics file.
type Record struct {
	Time  time.Time // milliseconds and finer are kept
	Site  string    // the party
	Kind  Kind
	Name  string
	Value float64 // of a metric
	Text  string  // of a param or tag
	Step  int64   // of a metric: step, epoch or round, as the app counts
	Run   string  // the name that the app gave to the run; "" = none
	RunID string  // "" = logged without a run
}

// wire is a record as JSON. Value is a number, or a string where JSON has no number: text, "NaN", "+Inf", "-Inf".
type wire struct {
	Time  time.Time       `json:"time"`
	Site  string          `json:"site"`
	Kind  Kind            `json:"kind"`
	Name  string          `json:"name"`
	Value json.RawMessage `json:"value"`
	Step  int64           `json:"step,omitempty"`
	Run   string          `json:"run,omitempty"`
	RunID string          `json:"run_id,omitempty"`
}

// MarshalJSON writes what UnmarshalJSON reads back as the same record, bit for bit but for the payload of a NaN.
func (r Record) MarshalJSON() ([]byte, error) {
	var v any = r.Text
	if r.Kind == Metric {
		v = r.Value
		if math.IsNaN(r.Value) || math.IsInf(r.Value, 0) {
			v = FormatValue(r.Value)
		}
	}
	b, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	return json.Marshal(wire{r.Time.UTC(), r.Site, r.Kind, r.Name, b, r.Step, r.Run, r.RunID})
}

// UnmarshalJSON takes only what [Record.check] allows.
func (r *Record) UnmarshalJSON(b []byte) error {
	var w wire
	if err := json.Unmarshal(b, &w); err != nil {
		return err
	}
	out := Record{Time: w.Time, Site: w.Site, Kind: w.Kind, Name: w.Name, Step: w.Step, Run: w.Run, RunID: w.RunID}
	if w.Kind == Metric {
		v, err := parseValue(w.Value)
		if err != nil {
			return err
		}
		out.Value = v
	} else if err := json.Unmarshal(w.Value, &out.Text); err != nil {
		return err
	}
	if err := out.check(); err != nil {
		return err
	}
	*r = out
	return nil
}

// FormatValue writes a metric's value so that reading it gives the same float64: shortest digits, "NaN", "+Inf" or "-Inf".
func FormatValue(v float64) string { return strconv.FormatFloat(v, 'g', -1, 64) }

// parseValue reads a number, or the texts that people and programs write where JSON has no number.
func parseValue(raw json.RawMessage) (float64, error) {
	text := string(raw)
	if len(raw) > 0 && raw[0] == '"' {
		if err := json.Unmarshal(raw, &text); err != nil {
			return 0, err
		}
	}
	switch strings.ToLower(text) {
	case "nan":
		return math.NaN(), nil
	case "inf", "+inf", "infinity", "+infinity":
		return math.Inf(1), nil
	case "-inf", "-infinity":
		return math.Inf(-1), nil
	case "":
		return 0, errors.New("value is missing")
	case "true", "false", "null":
		return 0, fmt.Errorf("value is %s, which is not a number", text)
	}
	v, err := strconv.ParseFloat(text, 64)
	switch {
	case errors.Is(err, strconv.ErrRange):
		return 0, fmt.Errorf("value %s is beyond what a 64-bit float holds", clip(text))
	case err != nil || strings.ContainsAny(text, "xXpP_"): // Go's own ways to write numbers
		return 0, fmt.Errorf("value %s is not a number", clip(strings.TrimSpace(string(raw))))
	}
	return v, nil
}

// clip keeps what is repeated of a stranger's input short.
func clip(s string) string {
	if len(s) <= 60 {
		return s
	}
	return strings.ToValidUTF8(s[:60], "") + "…"
}

// check tells what is wrong with a record.
func (r Record) check() error {
	switch r.Kind {
	case Metric, Param, Tag:
	default:
		return fmt.Errorf("kind %q is none of metric, param, tag", clip(string(r.Kind)))
	}
	if err := checkName("name", r.Name); err != nil {
		return err
	}
	if r.Run != "" {
		if err := checkName("run", r.Run); err != nil {
			return err
		}
	}
	if r.RunID != "" && !validRunID(r.RunID) {
		return fmt.Errorf("run id %q is not 1 to %d letters, digits, '-' and '_'", clip(r.RunID), maxRunID)
	}
	if limit := map[Kind]int{Param: MaxParam, Tag: MaxTag}[r.Kind]; utf8.RuneCountInString(r.Text) > limit {
		return fmt.Errorf("the value of %s %q has more than %d characters", r.Kind, clip(r.Name), limit)
	}
	if !utf8.ValidString(r.Text) {
		return fmt.Errorf("the value of %s %q is not UTF-8", r.Kind, clip(r.Name))
	}
	// What RFC 3339 can say.
	if y := r.Time.UTC().Year(); y < 1 || y > 9999 {
		return fmt.Errorf("the time of %q is not in the years 1 to 9999", clip(r.Name))
	}
	return nil
}

// checkName allows more than MLflow's server does ("acc@1", "f1 (macro)"): what reads well as a line of a table.
func checkName(what, s string) error {
	switch {
	case s == "":
		return fmt.Errorf("%s is missing", what)
	case !utf8.ValidString(s):
		return fmt.Errorf("%s %q is not UTF-8", what, clip(s))
	case utf8.RuneCountInString(s) > MaxName:
		return fmt.Errorf("%s %q has more than %d characters", what, clip(s), MaxName)
	case strings.ContainsFunc(s, func(c rune) bool { return !unicode.IsPrint(c) }):
		return fmt.Errorf("%s %q has a character that cannot be printed", what, clip(s))
	}
	return nil
}

func validRunID(s string) bool {
	for _, c := range []byte(s) {
		if c != '-' && c != '_' && (c < '0' || c > '9') && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') {
			return false
		}
	}
	return s != "" && len(s) <= maxRunID
}

// Read gives the records of a metrics file to fn, in order. Lines that are no records are skipped and counted: a writer
// that was killed leaves a torn one, and a file that came from elsewhere may hold anything. No more than one line is kept
// in memory. It ends with fn's error, or that of reading.
func Read(r io.Reader, fn func(Record) error) (skipped int, err error) {
	br := bufio.NewReaderSize(r, maxLine)
	for end := false; !end; {
		line, err := br.ReadSlice('\n')
		if errors.Is(err, bufio.ErrBufferFull) {
			skipped++
			for errors.Is(err, bufio.ErrBufferFull) {
				_, err = br.ReadSlice('\n')
			}
			line = nil
		}
		if end = errors.Is(err, io.EOF); err != nil && !end {
			return skipped, err
		}
		if line = bytes.TrimSpace(line); len(line) == 0 {
			continue
		}
		var rec Record
		if json.Unmarshal(line, &rec) != nil {
			skipped++
		} else if err := fn(rec); err != nil {
			return skipped, err
		}
	}
	return skipped, nil
}
