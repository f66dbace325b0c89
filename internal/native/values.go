package native

import (
	"encoding/json"
	"math"
	"strconv"
)

// Values are numbers by name. JSON cannot say NaN and infinities, which travel as strings.
type Values map[string]float64

// MarshalJSON writes the finite ones as numbers.
func (v Values) MarshalJSON() ([]byte, error) {
	m := make(map[string]any, len(v))
	for k, f := range v {
		if math.IsNaN(f) || math.IsInf(f, 0) {
			m[k] = strconv.FormatFloat(f, 'g', -1, 64)
		} else {
			m[k] = f
		}
	}
	return json.Marshal(m)
}

// UnmarshalJSON reads numbers and their names. What is neither is left out: a worker's numbers are a report, and no reason to refuse
// its reply.
func (v *Values) UnmarshalJSON(b []byte) error {
	var m map[string]any
	if err := json.Unmarshal(b, &m); err != nil {
		return err
	}
	*v = make(Values, len(m))
	for k, x := range m {
		switch x := x.(type) {
		case float64:
			(*v)[k] = x
		case string:
			if f, err := strconv.ParseFloat(x, 64); err == nil {
				(*v)[k] = f
			}
		}
	}
	return nil
}
