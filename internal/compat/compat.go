// Package compat lets two programs of different ages find a version of a protocol that both speak: each says the oldest and the newest that
// it speaks, and the newest that both do is used. Where there is none, the refusal names both ranges and who has to be updated.
//
// It knows no protocol; their owners say what they speak, and docs/versions.md for how long. Start with [Range].
package compat

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/pergolafl/pergola/internal/problem"
)

// Range is the versions of a protocol that somebody speaks, both ends included; the first version of any protocol is 1.
type Range struct {
	Min int `json:"min"`
	Max int `json:"max"`
}

// most is more than any protocol will have; it bounds what is read.
const most = 1 << 15

// First is what somebody speaks who says nothing: the version before there were several.
var First = Range{1, 1}

// Valid tells whether r is a range.
func (r Range) Valid() bool { return r.Min >= 1 && r.Min <= r.Max && r.Max < most }

// Common gives the newest version that both speak.
func (r Range) Common(o Range) (version int, ok bool) {
	v := min(r.Max, o.Max)
	return v, v >= max(r.Min, o.Min)
}

// String gives r as [Parse] reads it: "2" or "1-3".
func (r Range) String() string {
	if r.Min == r.Max {
		return strconv.Itoa(r.Min)
	}
	return fmt.Sprintf("%d-%d", r.Min, r.Max)
}

// Words gives r in a sentence: "version 2" or "versions 1 to 3".
func (r Range) Words() string {
	if r.Min == r.Max {
		return fmt.Sprintf("version %d", r.Min)
	}
	return fmt.Sprintf("versions %d to %d", r.Min, r.Max)
}

// Parse reads what String gives, and nothing else.
func Parse(s string) (Range, bool) {
	lo, hi, two := strings.Cut(s, "-")
	if !two {
		hi = lo
	}
	var r Range
	var err1, err2 error
	r.Min, err1 = strconv.Atoi(lo)
	r.Max, err2 = strconv.Atoi(hi)
	if err1 != nil || err2 != nil || !r.Valid() || r.String() != s {
		return Range{}, false
	}
	return r, true
}

// Side is one end of a protocol, for a refusal.
type Side struct {
	Name   string // "the hub", "the agent of st-anna"
	Build  string // the version of its Pergola; "" = not known
	Speaks Range
}

func (s Side) String() string {
	if s.Build == "" {
		return s.Name
	}
	return fmt.Sprintf("%s (pergola %s)", s.Name, s.Build)
}

// Refusal is the problem of two ends that have no version of a protocol in common.
func Refusal(protocol string, a, b Side) *problem.Error {
	older, newer := a, b
	if a.Speaks.Min > b.Speaks.Max {
		older, newer = b, a
	}
	return problem.New(problem.Version, fmt.Sprintf("update pergola at %s, or use an older one at %s (docs/versions.md)", older.Name, newer.Name),
		"%s speaks %s of the %s protocol, %s %s: they have none in common", a, a.Speaks.Words(), protocol, b, b.Speaks.Words())
}
