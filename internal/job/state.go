package job

import (
	"slices"

	"github.com/pergolafl/pergola/internal/problem"
)

// State is where a job is between its submission and its end.
type State string

// The states of a job, in the order in which a job goes through them.
const (
	Submitted State = "submitted"
	Waiting   State = "waiting"
	Queued    State = "queued"
	Preparing State = "preparing"
	Running   State = "running"
	Stopping  State = "stopping"
	Succeeded State = "succeeded"
	Failed    State = "failed"
	Aborted   State = "aborted"
	Rejected  State = "rejected"
)

// moves is the whole truth about which state may follow which. A state without a row is terminal.
var moves = map[State][]State{
	Submitted: {Waiting, Queued, Failed, Aborted, Rejected},
	Waiting:   {Queued, Failed, Aborted, Rejected},
	Queued:    {Preparing, Failed, Aborted, Rejected},
	Preparing: {Running, Stopping},
	Running:   {Stopping}, // whatever ends a job, its programs are stopped first
	Stopping:  {Succeeded, Failed, Aborted},
}

var states = []State{Submitted, Waiting, Queued, Preparing, Running, Stopping, Succeeded, Failed, Aborted, Rejected}

// meaning of each state, for docs/states.md.
var meaning = map[State]string{
	Submitted: "the hub has stored the job and its bundle",
	Waiting:   "somebody has to approve it",
	Queued:    "it may run, and waits for its sites or their resources; the reason says for what",
	Preparing: "its parties fetch the bundle, build the environment and start their programs",
	Running:   "all wanted parties are ready and the app runs",
	Stopping:  "the outcome is known; its programs are being stopped and its results collected",
	Succeeded: "the app ended well; its results are kept",
	Failed:    "something went wrong; the cause says what",
	Aborted:   "somebody asked for the end",
	Rejected:  "a policy or a person refused it before anything of it ran",
}

// States gives all states of a job, in the order in which a job goes through them.
func States() []State { return slices.Clone(states) }

// Can tells whether a job may move from s to to. Staying is not a move.
func (s State) Can(to State) bool { return slices.Contains(moves[s], to) }

// Next gives the states that may follow s; none if s is terminal.
func (s State) Next() []State { return slices.Clone(moves[s]) }

// Known tells whether s is a state at all.
func (s State) Known() bool { return slices.Contains(states, s) }

// Terminal tells whether the job is over: nothing follows s.
func (s State) Terminal() bool { return s.Known() && len(moves[s]) == 0 }

// Active tells whether programs of the job may run in s, so that it has to be stopped before it ends.
func (s State) Active() bool { return s == Preparing || s == Running || s == Stopping }

// PartyState is where one party of a job is.
type PartyState string

// The states of a party, in the order in which it goes through them.
const (
	PartyAbsent    PartyState = "absent"
	PartyPreparing PartyState = "preparing"
	PartyReady     PartyState = "ready"
	PartyRunning   PartyState = "running"
	PartyDone      PartyState = "done"
	PartyFailed    PartyState = "failed"
)

var partyMoves = map[PartyState][]PartyState{
	PartyAbsent:    {PartyPreparing, PartyDone, PartyFailed},
	PartyPreparing: {PartyReady, PartyDone, PartyFailed},
	PartyReady:     {PartyRunning, PartyDone, PartyFailed},
	PartyRunning:   {PartyDone, PartyFailed},
}

// again is from where a party may begin anew, as absent, in a new attempt of its own (see Party.Attempt). It is the hub that
// begins one, never the party itself: what an attempt says of itself after that is not listened to.
var again = []PartyState{PartyPreparing, PartyReady, PartyRunning, PartyDone, PartyFailed}

var partyStates = []PartyState{PartyAbsent, PartyPreparing, PartyReady, PartyRunning, PartyDone, PartyFailed}

var partyMeaning = map[PartyState]string{
	PartyAbsent:    "the party has not begun, or its site is not connected",
	PartyPreparing: "it fetches the bundle, builds the environment, starts its programs",
	PartyReady:     "its programs run and wait for the others",
	PartyRunning:   "the app runs",
	PartyDone:      "its programs have ended as they should, or were stopped with the job",
	PartyFailed:    "its side went wrong; the cause says what",
}

// PartyStates gives all states of a party, in the order in which it goes through them.
func PartyStates() []PartyState { return slices.Clone(partyStates) }

// Can tells whether a party may move from s to to. Staying is not a move.
func (s PartyState) Can(to PartyState) bool { return slices.Contains(partyMoves[s], to) }

// Next gives the states that may follow s; none if s is terminal.
func (s PartyState) Next() []PartyState { return slices.Clone(partyMoves[s]) }

// Again tells whether a party in s may begin anew.
func (s PartyState) Again() bool { return slices.Contains(again, s) }

// Known tells whether s is a state at all.
func (s PartyState) Known() bool { return slices.Contains(partyStates, s) }

// Terminal tells whether the party's attempt is over: only a new one can follow s.
func (s PartyState) Terminal() bool { return s.Known() && len(partyMoves[s]) == 0 }

// Outcome gives the state in which a job with that cause ends, seen from s: no cause is success,
// the wish of a person an abort, a refusal before anything ran a rejection, all else a failure.
func (s State) Outcome(cause *Cause) State {
	switch {
	case cause == nil && s.Active():
		return Succeeded
	case cause != nil && cause.Code == problem.AbortedByUser:
		return Aborted
	case cause != nil && cause.Code == problem.PolicyDenied && !s.Active():
		return Rejected
	}
	return Failed
}
