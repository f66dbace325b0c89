package flower

import (
	"sync"

	"github.com/pergolafl/pergola/internal/proc"
)

// EventKind tells what an [Event] is about, and so which of its fields are set.
type EventKind string

// Kinds of events.
const (
	ProgramStarted  EventKind = "program-started"  // Program, Pid
	ProgramEnded    EventKind = "program-ended"    // Program, Pid, Exit, Tail
	Round           EventKind = "round"            // Round, and Total where the app says it: this round begins
	Metrics         EventKind = "metrics"          // Round, Phase, Metrics
	ClientFailures  EventKind = "client-failures"  // Round, Phase, Results, Failures: what the strategy got
	ClientException EventKind = "client-exception" // Exception, Traceback: the client app raised (supernode's log)
	AppException    EventKind = "app-exception"    // Exception, Traceback: the server app raised
	NodeReady       EventKind = "node-ready"       // a supernode is known to the superlink
	Progress        EventKind = "progress"         // work moves: a message came or went, the server app printed
	Warning         EventKind = "warning"          // Message
	Note            EventKind = "note"             // Message: of use to who looks back
)

// Phases of a round's metrics.
const (
	PhaseTrain    = "train"    // aggregated from the clients' training
	PhaseEvaluate = "evaluate" // aggregated from the clients' evaluation
	PhaseServer   = "server"   // evaluated on the server; round 0 is before the first round
)

// Event is something that happened in Flower's programs of one party.
type Event struct {
	Kind       EventKind
	Program    string // "flower-superlink", "flower-supernode", "flower-server-app", "flwr run"
	Pid        int
	Exit       proc.Exit
	Tail       []string // the program's last lines
	Round      int
	Total      int                // rounds in all, 0 if unknown
	Phase      string             // PhaseTrain, PhaseEvaluate or PhaseServer
	Metrics    map[string]float64 // by the app's names; the legacy API's loss is "loss"
	Failures   int
	Results    int
	Message    string
	Exception  string // the last line of the traceback, "ZeroDivisionError: asked to"
	Traceback  []string
	FinalTable bool // Metrics of a summary at the end of a run, which repeats or replaces what came before
}

// emitter hands events to the listener one at a time.
type emitter struct {
	mu sync.Mutex // held during fn, so that events come one after the other
	fn func(Event)
}

func (e *emitter) emit(ev Event) {
	if e.fn == nil {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.fn(ev)
}
