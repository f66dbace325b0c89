// Package problem holds the errors that people act upon: a stable code for programs, one sentence
// that says what happened and to whom, and what to do next. The cause of a job's end is such an
// error too, so that a refusal before the start and a failure in the middle of a round read alike.
//
// It does not log, print or translate; callers do. Start with [Error] and [Code].
package problem

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Code names a kind of problem. Codes are stable: scripts compare them, docs/causes.md has a
// section for each.
type Code string

// Codes of problems found before a job starts or outside of any job.
const (
	Usage          Code = "usage"               // a flag, argument or configuration key is wrong
	NotFound       Code = "not-found"           // the job, site or file does not exist
	Exists         Code = "exists"              // a thing with that name exists already
	Denied         Code = "denied"              // the identity may not do that
	Expired        Code = "certificate-expired" // a certificate is over
	Superseded     Code = "superseded"          // somebody has enrolled again under that name
	HubUnreachable Code = "hub-unreachable"     // the hub does not answer
	Unavailable    Code = "unavailable"         // the hub answers, but its store does not for now
	ProxyFailed    Code = "proxy-failed"        // the HTTP or SOCKS proxy on the way to the hub lets nothing through
	TLSIntercepted Code = "tls-intercepted"     // a middle box on the way to the hub decrypts the connection
	Version        Code = "version"             // the two programs speak different protocol versions
	Internal       Code = "internal"            // a defect of Pergola
)

// Codes that a job can end with.
const (
	AppInvalid        Code = "app-invalid"        // the directory is not a Flower app that can run
	AppError          Code = "app-error"          // the app's own code raised, or exited with a failure
	EnvBuildFailed    Code = "env-build-failed"   // the Python environment could not be built
	FlwrUnavailable   Code = "flwr-unavailable"   // no such flwr version, or it does not fit the interpreter
	PythonUnsuitable  Code = "python-unsuitable"  // no Python, too old, or not an interpreter
	DependencyMissing Code = "dependency-missing" // the interpreter, or the app's list, lacks a package
	StartTimeout      Code = "start-timeout"      // a program or a site was not ready in time
	WaitTimeout       Code = "wait-timeout"       // the job was in the queue for too long
	ProgramFailed     Code = "program-failed"     // one of Flower's programs could not start, or died
	SiteLost          Code = "site-lost"          // a site's agent went away and stayed away
	Removed           Code = "removed"            // the site, or the user, was removed from the hub
	LinkLost          Code = "link-lost"          // the connection between two runners could not be had back
	NoProgress        Code = "no-progress"        // nothing moved for longer than the job allows
	Deadline          Code = "deadline"           // the job's time was over
	AbortedByUser     Code = "aborted-by-user"    // somebody asked for the end
	PolicyDenied      Code = "policy-denied"      // a site's policy refuses the job
	HubRunnerDied     Code = "hub-runner-died"    // the hub's runner of the job was killed or crashed
	SiteRunnerDied    Code = "site-runner-died"   // a site's runner of the job was killed or crashed
	HubLost           Code = "hub-lost"           // the hub itself went away for good
	OutOfMemory       Code = "out-of-memory"      // the kernel ended a program for want of memory
	DiskFull          Code = "disk-full"          // no space where the job writes
	NativeUnavailable Code = "native-unavailable" // the native engine does not work in the party's environment
	BundleInvalid     Code = "bundle-invalid"     // the bundle is damaged, or not what was announced
)

// Error is a problem as a person gets it. Err is for logs and never sent to a peer.
type Error struct {
	Code  Code   `json:"code"`
	Party string `json:"party,omitempty"` // "hub", or the site's name; empty where no party is at fault
	Msg   string `json:"message"`         // one sentence: what happened, to whom
	Next  string `json:"next,omitempty"`  // what to do about it
	Log   string `json:"log,omitempty"`   // where in which log to look
	Err   error  `json:"-"`
}

// Error gives the message, the error below if there is one, and what to do.
func (e *Error) Error() string {
	if e.Next == "" {
		return e.What()
	}
	return e.What() + "; next: " + e.Next
}

// What gives what happened, with the text of the error below: "cannot read x: permission denied".
func (e *Error) What() string {
	if e.Err == nil {
		return e.Msg
	}
	return fmt.Sprintf("%s: %v", e.Msg, e.Err)
}

// Told gives a copy whose message is What, for where the error below may be told: to the user of this very machine.
// Elsewhere it stays in the log, since it may name what is nobody else's business.
func (e *Error) Told() *Error {
	c := *e
	c.Msg, c.Err = e.What(), nil
	return &c
}

// Unwrap gives the error below, for errors.Is and errors.As.
func (e *Error) Unwrap() error { return e.Err }

// New makes a problem without an error below it.
func New(code Code, next, format string, args ...any) *Error {
	return &Error{Code: code, Msg: fmt.Sprintf(format, args...), Next: next}
}

// Wrap makes a problem around err.
func Wrap(err error, code Code, next, format string, args ...any) *Error {
	return &Error{Code: code, Msg: fmt.Sprintf(format, args...), Next: next, Err: err}
}

// From gives the problem that err is or wraps; anything else becomes an Internal one.
func From(err error) *Error {
	if err == nil {
		return nil
	}
	if e, ok := errors.AsType[*Error](err); ok {
		return e
	}
	return &Error{Code: Internal, Msg: "something failed that should not", Err: err, Next: "please report this with the job's logs"}
}

// IsUnreachable tells whether err is about the way to the hub, or what the hub itself cannot reach, which may be better at
// another time, and not the hub's answer.
func IsUnreachable(err error) bool {
	switch CodeOf(err) {
	case HubUnreachable, Unavailable, ProxyFailed, TLSIntercepted:
		return true
	}
	return false
}

// CodeOf gives the code of the problem in err: Internal for a foreign error, empty for nil.
func CodeOf(err error) Code {
	if err == nil {
		return ""
	}
	return From(err).Code
}

// Nearest gives the entry of known that name was probably meant to be, or "" if none is near:
// at most two edits away, and fewer than half of the name's letters.
func Nearest(name string, known []string) string {
	best, at := "", 3
	for _, k := range slices.Sorted(slices.Values(known)) {
		if d := distance(strings.ToLower(name), strings.ToLower(k)); d < at && d*2 < max(len(name), 2) {
			best, at = k, d
		}
	}
	if best == "" {
		for _, k := range slices.Sorted(slices.Values(known)) {
			if len(name) >= 3 && (strings.HasPrefix(k, name) || strings.HasPrefix(name, k)) {
				return k
			}
		}
	}
	return best
}

// DidYouMean gives `; did you mean "x"?` for the nearest of known, or "".
func DidYouMean(name string, known []string) string {
	if n := Nearest(name, known); n != "" {
		return fmt.Sprintf("; did you mean %q?", n)
	}
	return ""
}

// distance is the number of insertions, deletions, substitutions and swaps of neighbours
// (optimal string alignment) between a and b, in bytes.
func distance(a, b string) int {
	rows := make([][]int, len(a)+1)
	for i := range rows {
		rows[i] = make([]int, len(b)+1)
		rows[i][0] = i
	}
	for j := range rows[0] {
		rows[0][j] = j
	}
	for i := 1; i <= len(a); i++ {
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			rows[i][j] = min(rows[i-1][j]+1, rows[i][j-1]+1, rows[i-1][j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				rows[i][j] = min(rows[i][j], rows[i-2][j-2]+1)
			}
		}
	}
	return rows[len(a)][len(b)]
}
