package flower

import (
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// The forms below were read off real logs of flwr 1.12, 1.15, 1.18, 1.30 and 1.41 (testdata) and the
// sources of flwr/server/server.py (legacy API), flwr/serverapp/strategy/strategy.py (message API),
// flwr/server/history.py and flwr/server/superlink/fleet.

var escapes = regexp.MustCompile("\x1b(?:\\[[0-9;?]*[ -/]*[@-~]|\\][^\x07\x1b]*(?:\x07|\x1b\\\\)?|[@-_])")

// plain removes ANSI escapes (colours, cursor, titles).
func plain(s string) string {
	if strings.IndexByte(s, 0x1b) < 0 {
		return s
	}
	return escapes.ReplaceAllString(s, "")
}

var (
	levelForm    = regexp.MustCompile(`^(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) ?: {0,12}`)
	roundForm    = regexp.MustCompile(`^\[ROUND (\d+)(?:/(\d+))?\]$`)
	totalForm    = regexp.MustCompile(`^Starting Flower ServerApp, config: num_rounds=(\d+)`)
	resultsForm  = regexp.MustCompile(`^(\w+): [Rr]eceived (\d+) results and (\d+) failures`)
	aggregated   = regexp.MustCompile(`^\W*Aggregated MetricRecord: (\{.*)`)
	central      = regexp.MustCompile(`^\W*MetricRecord: (\{.*)`)
	initial      = regexp.MustCompile(`^Initial global evaluation results: (\{.*)`)
	legacyInit   = regexp.MustCompile(`^initial parameters \(loss, other metrics\): ([^,]+), (\{.*)`)
	legacyFit    = regexp.MustCompile(`^fit progress: (\(.*)`)
	historyForm  = regexp.MustCompile(`^History \(([a-z, ]+)\):\s*(.*)$`)
	historyRound = regexp.MustCompile(`^round (\d+): (.+)$`)

	nodeCreated = regexp.MustCompile(`\[Fleet\.(?:CreateNode|ActivateNode)\] (?:Created|Activated) node_id=(-?\d+)|^((?:GrpcAdapter|FleetServicer)\.CreateNode)`)
	pushed      = regexp.MustCompile(`\[Fleet\.PushMessages\]|PushTaskRes|\[Fleet\.GetFab\]|/v1/fleet/push-`)
	nodeWorks   = regexp.MustCompile(`^(?:Received|Receiving|Sending): |^Sent reply|^Sent successfully|^Received successfully`)
	nodeKnown   = regexp.MustCompile(`^SuperNode ID: |^\[RUN -?\d+`)
	nodeRound   = regexp.MustCompile(`^\[RUN -?\d+(?:, ROUND (\d+))?\]$`)

	exceptionForm = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_.]*(?:: .*|:)?$`)
)

const (
	traceStart  = "Traceback (most recent call last):"
	directCause = "The above exception was the direct cause of the following exception:"
	duringCause = "During handling of the above exception, another exception occurred:"

	maxTrace   = 200     // lines kept of a traceback
	maxHistory = 1 << 18 // bytes of one history that are looked at
)

// parser reads the lines of one program, escapes removed, and finds events in them. It is pure and
// never fails: what it does not know it passes over.
type parser struct {
	program string

	round, total int
	phase        string
	global       bool // the next MetricRecord is of the server's own evaluation

	known  bool            // this supernode has been reported as ready
	nodes  map[string]bool // ids that registered; a node that comes back is no new one
	marked bool            // the next traceback is the client app's

	trace   *raised // being read
	reading bool
	held    *raised // complete, but a chain may follow
	chain   string  // the marker that followed held

	history string // name of the history being read, "" outside of a summary
	text    strings.Builder
	table   map[roundPhase]map[string]float64
}

type roundPhase struct {
	round int
	phase string
}

func newParser(program string) *parser {
	return &parser{program: program, phase: PhaseTrain, nodes: map[string]bool{}}
}

// line takes the next line, without its end.
func (p *parser) line(line string) (events []Event) {
	if len(line) > 64<<10 {
		line = line[:64<<10]
	}
	text := line
	leveled := false
	if loc := levelForm.FindStringIndex(line); loc != nil {
		text, leveled = line[loc[1]:], true
	}
	events = append(events, p.traceback(line, text, leveled)...)
	text = strings.TrimSpace(text)
	switch p.program {
	case ProgramSuperlink:
		return append(events, p.superlink(text)...)
	case ProgramSupernode:
		return append(events, p.supernode(text)...)
	}
	return append(events, p.serverApp(text)...)
}

// end says that there are no more lines.
func (p *parser) end() []Event {
	if p.reading && p.trace != nil {
		p.reading = false // cut off: what is there says something
		if p.trace.exception != "" {
			p.held = p.trace
		}
	}
	return append(p.release(), p.finishHistory()...)
}

func (p *parser) superlink(text string) []Event {
	if m := nodeCreated.FindStringSubmatch(text); m != nil {
		if id := m[1]; id != "" {
			if p.nodes[id] {
				return nil
			}
			p.nodes[id] = true
		}
		return []Event{{Kind: NodeReady, Program: p.program}}
	}
	if pushed.MatchString(text) {
		return []Event{{Kind: Progress, Program: p.program, Message: text}}
	}
	return nil
}

func (p *parser) supernode(text string) (events []Event) {
	if !p.known && nodeKnown.MatchString(text) {
		p.known = true
		events = append(events, Event{Kind: NodeReady, Program: p.program})
	}
	if m := nodeRound.FindStringSubmatch(text); m != nil {
		p.round = atoi(m[1])
	}
	if nodeWorks.MatchString(text) {
		events = append(events, Event{Kind: Progress, Program: p.program, Message: text})
	}
	if text == "ClientApp raised an exception" {
		p.marked = true
	}
	return events
}

func (p *parser) serverApp(text string) (events []Event) {
	events = append(events, Event{Kind: Progress, Program: p.program, Message: text})
	metrics := func(round int, phase string, literal string) {
		v, _, err := parseLiteral(literal)
		if values := numbers(v); err == nil && len(values) > 0 {
			events = append(events, Event{Kind: Metrics, Program: p.program, Round: round, Phase: phase, Metrics: values})
		}
	}
	if p.inHistory(text) {
		return events
	}
	events = append(events, p.finishHistory()...)
	switch m := roundForm.FindStringSubmatch(text); {
	case m != nil:
		p.round = atoi(m[1])
		if n := atoi(m[2]); n > 0 {
			p.total = n
		}
		p.global = false
		return append(events, Event{Kind: Round, Program: p.program, Round: p.round, Total: p.total})
	case text == "Global evaluation":
		p.global = true
		return events
	}
	if m := totalForm.FindStringSubmatch(text); m != nil {
		p.total = atoi(m[1])
	} else if m := resultsForm.FindStringSubmatch(text); m != nil {
		p.global = false
		p.phase = PhaseTrain
		if strings.Contains(m[1], "evaluate") {
			p.phase = PhaseEvaluate
		}
		if failures := atoi(m[3]); failures > 0 {
			events = append(events, Event{
				Kind: ClientFailures, Program: p.program, Round: p.round, Phase: p.phase, Results: atoi(m[2]), Failures: failures, Message: text,
			})
		}
	} else if m := aggregated.FindStringSubmatch(text); m != nil {
		metrics(p.round, p.phase, m[1])
	} else if m := central.FindStringSubmatch(text); m != nil && p.global {
		metrics(p.round, PhaseServer, m[1])
	} else if m := initial.FindStringSubmatch(text); m != nil {
		metrics(0, PhaseServer, m[1])
	} else if m := legacyInit.FindStringSubmatch(text); m != nil {
		events = append(events, p.evaluated(0, m[1], m[2])...)
	} else if m := legacyFit.FindStringSubmatch(text); m != nil {
		// (round, loss, {metrics}, seconds)
		if v, _, err := parseLiteral(m[1]); err == nil {
			if t, ok := v.(tuple); ok && len(t) >= 3 {
				if round, ok := t[0].(float64); ok && round >= 0 && round < 1e9 {
					values := numbers(t[2])
					if loss, ok := number(t[1]); ok {
						values["loss"] = loss
					}
					if len(values) > 0 {
						events = append(events, Event{Kind: Metrics, Program: p.program, Round: int(round), Phase: PhaseServer, Metrics: values})
					}
				}
			}
		}
	}
	return events
}

func (p *parser) evaluated(round int, loss, metrics string) []Event {
	v, _, err := parseLiteral(metrics)
	if err != nil {
		return nil
	}
	values := numbers(v)
	if l, _, err := parseLiteral(loss); err == nil {
		if f, ok := number(l); ok {
			values["loss"] = f
		}
	}
	if len(values) == 0 {
		return nil
	}
	return []Event{{Kind: Metrics, Program: p.program, Round: round, Phase: PhaseServer, Metrics: values}}
}

// historyPhases says what the parts of the legacy API's final summary are.
var historyPhases = map[string]string{
	"loss, distributed":              PhaseEvaluate,
	"loss, centralized":              PhaseServer,
	"metrics, distributed, fit":      PhaseTrain,
	"metrics, distributed, evaluate": PhaseEvaluate,
	"metrics, centralized":           PhaseServer,
}

// inHistory reads the legacy API's summary, in which each history begins with its name.
func (p *parser) inHistory(text string) bool {
	if m := historyForm.FindStringSubmatch(text); m != nil {
		p.closeHistory()
		p.history = m[1]
		p.text.WriteString(m[2])
		return true
	}
	if p.history == "" || text == "" {
		return false
	}
	if m := historyRound.FindStringSubmatch(text); m != nil && strings.HasPrefix(p.history, "loss") {
		if v, _, err := parseLiteral(m[2]); err == nil {
			p.enter(atoi(m[1]), "loss", v)
		}
		return true
	}
	if !strings.HasPrefix(p.history, "metrics") || p.text.Len() > maxHistory || p.text.Len() == 0 && text[0] != '{' {
		return false
	}
	p.text.WriteString(" " + text)
	return true
}

func (p *parser) enter(round int, name string, v any) {
	f, ok := number(v)
	phase := historyPhases[p.history]
	if !ok || phase == "" {
		return
	}
	if p.table == nil {
		p.table = map[roundPhase]map[string]float64{}
	}
	key := roundPhase{round, phase}
	if p.table[key] == nil {
		p.table[key] = map[string]float64{}
	}
	p.table[key][name] = f
}

// closeHistory reads a history of metrics: {'name': [(round, value), …], …}.
func (p *parser) closeHistory() {
	if p.text.Len() > 0 {
		v, _, _ := parseLiteral(p.text.String()) // of no other form: nothing is entered
		pairs, _ := v.([]pair)
		for _, kv := range pairs {
			name, _ := kv.key.(string)
			list, _ := kv.value.([]any)
			for _, item := range list {
				if t, ok := item.(tuple); ok && len(t) == 2 && name != "" {
					if round, ok := t[0].(float64); ok && round >= 0 && round < 1e9 {
						p.enter(int(round), name, t[1])
					}
				}
			}
		}
	}
	p.text.Reset()
	p.history = ""
}

// finishHistory gives the summary's table, round by round.
func (p *parser) finishHistory() (events []Event) {
	if p.history == "" && p.table == nil {
		return nil
	}
	p.closeHistory()
	for key, values := range p.table {
		events = append(events, Event{Kind: Metrics, Program: p.program, Round: key.round, Phase: key.phase, Metrics: values, FinalTable: true})
	}
	slices.SortFunc(events, func(a, b Event) int {
		if a.Round != b.Round {
			return a.Round - b.Round
		}
		order := []string{PhaseTrain, PhaseEvaluate, PhaseServer}
		return slices.Index(order, a.Phase) - slices.Index(order, b.Phase)
	})
	p.table = nil
	return events
}

// traceback reads Python's tracebacks; an event comes with the line after the exception, which tells
// whether the exception is part of a chain.
func (p *parser) traceback(line, text string, leveled bool) []Event {
	trimmed := strings.TrimSpace(text)
	switch {
	case strings.HasSuffix(trimmed, traceStart):
		var events []Event
		if p.chain == "" {
			events = p.release()
		}
		p.trace, p.reading = &raised{traceback: []string{line}, marked: p.marked}, true
		p.marked = false
		return events
	case p.reading:
		if len(p.trace.traceback) < maxTrace {
			p.trace.traceback = append(p.trace.traceback, line)
		}
		if leveled || strings.HasPrefix(line, " ") || strings.HasPrefix(line, "\t") || trimmed == "" && p.trace.exception == "" {
			return nil // frames; log lines of another thread may come between
		}
		p.reading = false
		if !exceptionForm.MatchString(trimmed) {
			p.trace = nil
			return nil
		}
		p.trace.exception = strings.TrimSuffix(trimmed, ":")
		if p.held != nil && p.chain == directCause {
			// What came first is the cause; what was made of it says less.
			p.held.traceback = append(p.held.traceback, p.trace.traceback...)
		} else {
			p.held = p.trace
		}
		p.trace, p.chain = nil, ""
		return nil
	case p.held == nil || trimmed == "":
		return nil
	case trimmed == directCause || trimmed == duringCause:
		p.chain = trimmed
		return nil
	case p.chain != "":
		return nil
	}
	return p.release()
}

// release gives the exception that was held.
func (p *parser) release() []Event {
	held := p.held
	p.held, p.chain = nil, ""
	if held == nil {
		return nil
	}
	e := Event{Program: p.program, Round: p.round, Exception: held.exception, Traceback: held.traceback}
	switch {
	case p.program == ProgramSuperlink:
		return nil // it repeats the server app's output in some generations
	case p.program == ProgramSupernode && held.marked:
		e.Kind, e.Message = ClientException, "the client app raised "+held.exception
	case p.program == ProgramSupernode:
		e.Kind, e.Message = Warning, "the supernode printed "+held.exception
	default:
		e.Kind, e.Message = AppException, "the server app raised "+held.exception
	}
	return []Event{e}
}

// atoi reads digits; what is too large for an int32 counts as 0.
func atoi(s string) int {
	n, err := strconv.ParseInt(s, 10, 32)
	if err != nil {
		return 0
	}
	return int(n)
}
