// Package job holds what a job is: its identity, its state and that of each party, the events that
// happen to it, and the specification that says what it wants. The tables of allowed moves are data
// here, in one place; the store refuses every other move, and docs/states.md is printed from them.
//
// It stores nothing, starts nothing and decides nothing about when to move: store, hub and runner do.
// Start with [Job], [State.Can] and [ParseSpec].
package job

import (
	"crypto/rand"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/pergolafl/pergola/internal/problem"
)

// ID names a job: a ULID in lower case, 26 characters. Sorted as text, the jobs of one hub are in
// the order of their submission.
type ID string

var entropy = struct {
	mu sync.Mutex // guards the rest
	*ulid.MonotonicEntropy
}{MonotonicEntropy: ulid.Monotonic(rand.Reader, 0)}

// NewID makes the ID of a job that is submitted now. IDs made by one process within the same
// millisecond sort in the order in which they were made.
func NewID(now time.Time) ID {
	// A clock before 1970 is a machine without a battery, not a reason to stop.
	ms := uint64(max(now.UnixMilli(), 0))
	entropy.mu.Lock()
	defer entropy.mu.Unlock()
	id, err := ulid.New(ms, entropy.MonotonicEntropy)
	if err != nil {
		// The random part is at its end for this millisecond (one case in 2^48 at worst), or the
		// clock is past the year 10889: fresh randomness, order within the millisecond given up.
		id = ulid.MustNew(min(ms, ulid.MaxTime()), rand.Reader)
	}
	return ID(strings.ToLower(id.String()))
}

// ParseID reads an ID, in lower or upper case; the problem has the code usage.
func ParseID(s string) (ID, error) {
	if _, err := ulid.ParseStrict(s); err != nil {
		return "", problem.New(problem.Usage, "see the jobs and their IDs with: pergola jobs",
			"%q is not the ID of a job (26 letters and digits)", s)
	}
	return ID(strings.ToLower(s)), nil
}

// Created gives the time in the ID, in milliseconds' precision; zero for what is not an ID.
func (id ID) Created() time.Time {
	u, err := ulid.ParseStrict(string(id))
	if err != nil {
		return time.Time{}
	}
	return ulid.Time(u.Time()).UTC()
}

// HubParty is the name of the hub's own side of a job. No site may be called so.
const HubParty = "hub"

// Cause is why a job or a party ended: a problem.
type Cause = problem.Error

// Job is one run of an app across a hub and its sites, as the store keeps it.
type Job struct {
	ID        ID     `json:"id"`
	Name      string `json:"name"`
	Key       string `json:"key,omitempty"` // makes a repeated submission the same job; "" = none
	Submitter string `json:"submitter,omitempty"`
	Bundle    string `json:"bundle,omitempty"` // digest, "sha256:…"

	State  State  `json:"state"`
	Reason string `json:"reason,omitempty"` // what it waits for, or why it stops, for people
	Cause  *Cause `json:"cause,omitempty"`  // why it ends; a job that succeeds has none

	Spec Spec `json:"spec"`

	Created time.Time `json:"created"`
	Started time.Time `json:"started,omitzero"` // when it entered preparing
	Ended   time.Time `json:"ended,omitzero"`   // when it entered a terminal state
}

// Party is the hub's or one site's side of a job.
type Party struct {
	Job     ID         `json:"job"`
	Name    string     `json:"name"` // HubParty or the site's name
	State   PartyState `json:"state"`
	Attempt int        `json:"attempt,omitempty"` // how often it has begun anew
	Reason  string     `json:"reason,omitempty"`
	Cause   *Cause     `json:"cause,omitempty"`
	Updated time.Time  `json:"updated"`

	// Allocated tells that the job was given what it asks for at the site; see [Job.Holds].
	Allocated bool `json:"allocated,omitempty"`
}

// Holds tells whether the job holds now what it asks for at the site of one of its parties: until the party is over, unless it is
// about to begin anew on another engine, which no job does whose run has begun.
func (j Job) Holds(p Party) bool {
	falls := p.State == PartyFailed && p.Cause != nil && p.Cause.Code == problem.NativeUnavailable && j.Spec.EngineAuto && j.State == Preparing
	return p.Allocated && (!p.State.Terminal() || falls)
}

// CheckName refuses a name that is not a lower-case DNS label: 1 to 63 letters, digits and inner
// hyphens. What says what is named ("site", "job") and stands in the message. For a site, "hub" is
// refused too, and so are the names that mean something else in [tool.pergola.site].
// The problem has the code usage.
func CheckName(what, name string) error {
	if msg, next := nameFault(what, name); msg != "" {
		return problem.New(problem.Usage, next, "%s", msg)
	}
	return nil
}

const nameRule = "use 1 to 63 lower-case letters, digits and hyphens, with no hyphen first or last"

func nameFault(what, name string) (msg, next string) {
	article := "a "
	if what != "" && strings.ContainsRune("aeiou", rune(what[0])) {
		article = "an "
	}
	ok := len(name) >= 1 && len(name) <= 63 && name[0] != '-' && name[len(name)-1] != '-'
	for i := 0; ok && i < len(name); i++ {
		c := name[i]
		ok = c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-'
	}
	if !ok {
		if len(name) > 80 {
			name = name[:80] + "…"
		}
		return strconv.Quote(name) + " cannot be the name of " + article + what, nameRule
	}
	if what == "site" {
		switch {
		case name == HubParty:
			return `no site can be called "hub": that is the hub's own side of a job`, "choose another name"
		case slices.Contains(siteKeys, name):
			return `no site can be called ` + strconv.Quote(name) + `: [tool.pergola.site] has a key of that name`, "choose another name"
		}
	}
	return "", ""
}
