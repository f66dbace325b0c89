package job

import (
	"encoding/json"
	"fmt"
	"math"
	"strconv"
	"time"
)

// Event is one thing that happened to a job. Seq is given by the store, grows over all jobs of a
// hub, and is the cursor of whoever reads on.
type Event struct {
	Seq   int64           `json:"seq"`
	Job   ID              `json:"job"`
	At    time.Time       `json:"at"`
	Party string          `json:"party,omitempty"` // whose event it is; "" = the job as a whole
	Kind  string          `json:"kind"`
	Body  json.RawMessage `json:"body,omitempty"` // the struct named beside the kind
}

// Kinds of events.
const (
	KindJobState       = "job-state"       // JobState
	KindPartyState     = "party-state"     // PartyStateChange
	KindEnvProgress    = "env-progress"    // EnvProgress
	KindProgramStarted = "program-started" // Program
	KindProgramEnded   = "program-ended"   // Program
	KindSitesReady     = "sites-ready"     // SitesReady
	KindRound          = "round"           // Round
	KindMetrics        = "metrics"         // Metrics
	KindClientFailure  = "client-failure"  // ClientFailure
	KindWarning        = "warning"         // Text
	KindProgress       = "progress"        // Text: a sign that the work moves, a few times a minute at most
	KindNote           = "note"            // Text
	KindLink           = "link"            // Link
	KindClientMetrics  = "client-metrics"  // ClientMetrics
	KindEngine         = "engine"          // EngineChoice
)

// JobState is the body of job-state. Only the store writes it, in the transaction of the move.
type JobState struct {
	From   State  `json:"from,omitempty"` // "" for a job that was just submitted
	To     State  `json:"to"`
	Cause  *Cause `json:"cause,omitempty"`
	Reason string `json:"reason,omitempty"`
}

// PartyStateChange is the body of party-state. Only the store writes it, in the transaction of the
// move; the event's Party says whose state it is.
type PartyStateChange struct {
	From    PartyState `json:"from,omitempty"`
	To      PartyState `json:"to"`
	Cause   *Cause     `json:"cause,omitempty"`
	Reason  string     `json:"reason,omitempty"`
	Attempt int        `json:"attempt,omitempty"` // with absent: which attempt begins, 1 = the first after the first
}

// EnvProgress is the body of env-progress: how far the building of an environment is.
type EnvProgress struct {
	Phase   string `json:"phase"`           // "resolve", "download", "install", "compile", …
	Done    int    `json:"done,omitempty"`  // of Total
	Total   int    `json:"total,omitempty"` // 0 = unknown
	Message string `json:"message,omitempty"`
}

// Program is the body of program-started (Name, Pid) and program-ended (all).
type Program struct {
	Name   string   `json:"name"` // "flower-superlink"
	Pid    int      `json:"pid,omitempty"`
	Code   int      `json:"code"` // its own code; −9 killed, −15 terminated
	Signal string   `json:"signal,omitempty"`
	OOM    bool     `json:"oom,omitempty"`
	Tail   []string `json:"tail,omitempty"` // its last lines, where it ended badly
}

// SitesReady is the body of sites-ready.
type SitesReady struct {
	Ready   int      `json:"ready"`
	Wanted  int      `json:"wanted"`
	Missing []string `json:"missing,omitempty"`
}

// Round is the body of round: round Round has begun. Total is 0 where the app does not say.
type Round struct {
	Round int `json:"round"`
	Total int `json:"total,omitempty"`
}

// Metrics is the body of metrics: what the app reported for a round, after aggregation.
type Metrics struct {
	Round  int    `json:"round"`
	Phase  string `json:"phase"` // "train", "evaluate", "server"
	Values Values `json:"values"`
}

// Values are metrics by name. A diverging model reports NaN and infinities, which JSON numbers
// cannot say: they travel as the strings "NaN", "+Inf" and "-Inf".
type Values map[string]float64

// MarshalJSON writes the finite values as numbers, the others as strings.
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

// UnmarshalJSON reads what MarshalJSON writes.
func (v *Values) UnmarshalJSON(b []byte) error {
	var m map[string]json.RawMessage
	if err := json.Unmarshal(b, &m); err != nil {
		return err
	}
	out := make(Values, len(m))
	for k, raw := range m {
		var f float64
		if err := json.Unmarshal(raw, &f); err == nil {
			out[k] = f
			continue
		}
		var s string
		if err := json.Unmarshal(raw, &s); err != nil {
			return fmt.Errorf("metric %q: %w", k, err)
		}
		f, err := strconv.ParseFloat(s, 64)
		if err != nil {
			return fmt.Errorf("metric %q: %w", k, err)
		}
		out[k] = f
	}
	*v = out
	return nil
}

// ClientFailure is the body of client-failure: Flower's strategy decides whether the run goes on.
type ClientFailure struct {
	Round     int      `json:"round,omitempty"`
	Count     int      `json:"count,omitempty"` // how many clients failed in that round, where only that is known
	Message   string   `json:"message,omitempty"`
	Exception string   `json:"exception,omitempty"` // "ValueError: no such column"
	Traceback []string `json:"traceback,omitempty"`
}

// Text is the body of warning and note.
type Text struct {
	Message string `json:"message"`
}

// Link is the body of link: what a site's link has been through in this job so far. It comes with Since when an outage has lasted a while, and
// without when one is over.
type Link struct {
	Site        string    `json:"site"`
	Since       time.Time `json:"since,omitzero"` // unreachable since then, and still
	Cuts        int64     `json:"cuts"`           // transports that were lost
	Resumes     int64     `json:"resumes"`        // outages that ended with the same session
	ResentBytes int64     `json:"resent_bytes"`   // of both directions
	DownSeconds float64   `json:"down_seconds"`   // all outages together
}

// ClientMetrics is the body of client-metrics: what one site's replies of one round and phase had in them, without a word of the app's
// about it. Of the native engine only.
type ClientMetrics struct {
	Site    string          `json:"site"`
	Round   int             `json:"round,omitempty"` // 0 where neither message nor reply says
	Phase   string          `json:"phase"`           // "train", "evaluate", "query", or the app's own type of message
	Replies int             `json:"replies"`
	Errors  int             `json:"errors,omitempty"` // of these: error replies, and messages to which none came
	Values  map[string]Stat `json:"values,omitempty"` // by the names of the replies' metric records, num_examples and loss among them

	SentBytes     int64   `json:"sent_bytes"`     // of the messages, the model counted with each though it goes once to a site
	ReceivedBytes int64   `json:"received_bytes"` // of the replies
	Seconds       Stat    `json:"seconds"`        // from a message's leaving the ServerApp to its reply
	WorkSeconds   float64 `json:"work_seconds"`   // of the workers, together
}

// EngineChoice is the body of engine: how the job runs, and why. A later one takes the place of the one before.
type EngineChoice struct {
	Engine string `json:"engine"`
	Flwr   string `json:"flwr,omitempty"`
	Python string `json:"python,omitempty"`
	Why    string `json:"why"`
}

// Stat sums up what several clients said; of one client, it is exact. NaN and infinities are strings, as in Values.
type Stat struct {
	Count          int
	Mean, Min, Max float64
}

// MarshalJSON writes {"count", "mean", "min", "max"}.
func (s Stat) MarshalJSON() ([]byte, error) {
	b, err := json.Marshal(Values{"mean": s.Mean, "min": s.Min, "max": s.Max})
	if err != nil {
		return nil, err
	}
	return append([]byte(`{"count":`+strconv.Itoa(s.Count)+","), b[1:]...), nil
}

// UnmarshalJSON reads what MarshalJSON writes.
func (s *Stat) UnmarshalJSON(b []byte) error {
	var v Values
	if err := json.Unmarshal(b, &v); err != nil {
		return err
	}
	*s = Stat{Count: int(v["count"]), Mean: v["mean"], Min: v["min"], Max: v["max"]}
	return nil
}

// NewEvent makes an event with body as its JSON (nil = none). It fails only where body cannot be
// JSON, which none of the bodies of this package is able to bring about.
func NewEvent(id ID, party, kind string, body any, now time.Time) (Event, error) {
	e := Event{Job: id, At: now, Party: party, Kind: kind}
	if body != nil {
		raw, err := json.Marshal(body)
		if err != nil {
			return Event{}, fmt.Errorf("event %s of job %s: %w", kind, id, err)
		}
		e.Body = raw
	}
	return e, nil
}

// Decode reads the body into dst, a pointer to the struct that belongs to the kind. An empty body
// leaves dst as it is.
func (e Event) Decode(dst any) error {
	if len(e.Body) == 0 {
		return nil
	}
	if err := json.Unmarshal(e.Body, dst); err != nil {
		return fmt.Errorf("event %d (%s) of job %s: %w", e.Seq, e.Kind, e.Job, err)
	}
	return nil
}
