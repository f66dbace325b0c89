package metrics

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"strconv"
	"time"
)

// entry is one object of the plain form.
type entry struct {
	Name  *string         `json:"name"`
	Value json.RawMessage `json:"value"`
	Step  *wireInt        `json:"step"`
	Time  json.RawMessage `json:"time"`
	Kind  Kind            `json:"kind"`
	Run   string          `json:"run"`
}

// plain takes JSON objects, one after the other or in an array. Either all of a request's records are kept, or none.
func (s *Server) plain(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodPost {
		w.Header().Set("Allow", http.MethodPost)
		(&failure{http.StatusMethodNotAllowed, codeInvalid, `POST objects like {"name": "loss", "value": 0.5, "step": 1} here`}).write(w)
		return
	}
	b, fail := readBody(r)
	if fail == nil {
		var recs []Record
		var err error
		if recs, err = parsePlain(b, time.Now()); err != nil {
			fail = badInput("%v", err)
		} else {
			fail = s.keep(recs)
		}
		if fail == nil {
			answer(w, http.StatusOK, struct {
				Kept int `json:"kept"`
			}{len(recs)})
			return
		}
	}
	fail.write(w)
}

// parsePlain reads a request of the plain form; the Site of its records is empty.
func parsePlain(b []byte, now time.Time) ([]Record, error) {
	b = quoteSpecials(b)
	array := bytes.HasPrefix(bytes.TrimLeft(b, " \t\r\n"), []byte("["))
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if array {
		if _, err := dec.Token(); err != nil {
			return nil, err
		}
	}
	var out []Record
	for n := 1; ; n++ {
		if array && !dec.More() {
			if _, err := dec.Token(); err != nil {
				return nil, fmt.Errorf("the array has no end: %w", noEOF(err))
			}
			if _, err := dec.Token(); !errors.Is(err, io.EOF) {
				return nil, errors.New("something follows the array")
			}
			break
		}
		var e *entry
		err := dec.Decode(&e)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("object %d: %w", n, noEOF(err))
		}
		if n > maxBatch {
			return nil, fmt.Errorf("a request may have %d objects at most", maxBatch)
		}
		rec, err := e.record(now)
		if err != nil {
			return nil, fmt.Errorf("object %d: %w", n, err)
		}
		out = append(out, rec)
	}
	if len(out) == 0 {
		return nil, errors.New(`the request is empty: send objects like {"name": "loss", "value": 0.5, "step": 1}`)
	}
	return out, nil
}

func noEOF(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return errors.New("the JSON breaks off")
	}
	return err
}

func (e *entry) record(now time.Time) (Record, error) {
	if e == nil {
		return Record{}, errors.New("null is no object")
	}
	r := Record{Time: now, Kind: e.Kind, Run: e.Run}
	if e.Name != nil {
		r.Name = *e.Name
	}
	if r.Kind == "" {
		r.Kind = Metric
	}
	if e.Step != nil {
		r.Step = int64(*e.Step)
	}
	if len(e.Time) > 0 && !bytes.Equal(e.Time, []byte("null")) {
		t, err := parseTime(e.Time)
		if err != nil {
			return r, err
		}
		r.Time = t
	}
	if r.Kind != Metric {
		if len(e.Value) == 0 {
			return r, errors.New("value is missing")
		}
		if e.Step != nil {
			return r, fmt.Errorf("a %s has no step", clip(string(r.Kind)))
		}
		// Other values than strings are kept as they are written, as MLflow does with its parameters.
		if json.Unmarshal(e.Value, &r.Text) != nil {
			r.Text = string(e.Value)
		}
	} else {
		v, err := parseValue(e.Value)
		if err != nil {
			return r, err
		}
		r.Value = v
	}
	return r, r.check()
}

// parseTime reads seconds since 1970, or a text of RFC 3339.
func parseTime(raw json.RawMessage) (time.Time, error) {
	if raw[0] == '"' {
		var t time.Time
		if err := json.Unmarshal(raw, &t); err != nil {
			return t, errors.New("time is neither seconds since 1970 nor like 2026-01-31T12:00:00Z")
		}
		return t, nil
	}
	// Whole and broken seconds apart, as a float64 of now keeps only microseconds.
	f, err := strconv.ParseFloat(string(raw), 64)
	if err != nil || f < -62135596800 || f >= 253402300800 { // years 1 to 9999
		return time.Time{}, errors.New("time is neither seconds since 1970 nor like 2026-01-31T12:00:00Z")
	}
	sec, frac := math.Modf(f)
	return time.Unix(int64(sec), int64(math.Round(frac*1e6))*1000), nil
}

// quoteSpecials puts NaN, Infinity and -Infinity, which Python's json writes outside of strings though JSON has no such
// numbers, in quotes. A model that diverges must not fail because its loss is logged.
func quoteSpecials(b []byte) []byte {
	if !bytes.Contains(b, []byte("NaN")) && !bytes.Contains(b, []byte("Infinity")) {
		return b
	}
	out := make([]byte, 0, len(b)+16)
	inString := false
	for i := 0; i < len(b); {
		c := b[i]
		switch {
		case inString && c == '\\' && i+1 < len(b):
			out = append(out, c, b[i+1])
			i += 2
			continue
		case c == '"':
			inString = !inString
		case !inString:
			if word := special(b[i:]); word != "" {
				out = append(out, '"')
				out = append(out, word...)
				out = append(out, '"')
				i += len(word)
				continue
			}
		}
		out = append(out, c)
		i++
	}
	return out
}

func special(b []byte) string {
	for _, w := range []string{"NaN", "Infinity", "-Infinity"} {
		if bytes.HasPrefix(b, []byte(w)) {
			return w
		}
	}
	return ""
}

// wireInt is an int64 as a number or, as protobuf's JSON writes it, as a string.
type wireInt int64

// UnmarshalJSON takes 3, "3" and 3.0; null changes nothing.
func (i *wireInt) UnmarshalJSON(b []byte) error {
	text := string(b)
	if text == "null" {
		return nil
	}
	if len(b) > 0 && b[0] == '"' {
		if err := json.Unmarshal(b, &text); err != nil {
			return err
		}
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		// 3.0, which steps that went through numpy look like. Beyond 2^53 a float is not one certain integer.
		f, ferr := strconv.ParseFloat(text, 64)
		if ferr != nil || f != math.Trunc(f) || math.Abs(f) > 1<<53 {
			return fmt.Errorf("%s is not a 64-bit integer", clip(string(b)))
		}
		n = int64(f)
	}
	*i = wireInt(n)
	return nil
}
