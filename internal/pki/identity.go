// Package pki says who is who: identities in certificates, an authority that issues them, and the TLS
// configurations of Pergola's one port. An identity is a URI in the certificate's subject alternative name:
//
//	pergola:///hub/<name>           the hub
//	pergola:///site/<name>          an organisation's agent
//	pergola:///user/<name>          somebody who submits jobs
//	pergola:///party/<job>/<name>   one side of one job; <name> is a site, or "hub"
//
// Everything is ECDSA P-256 and TLS 1.3, both ends present a certificate, and sessions are never resumed by
// ticket, so that a certificate is looked at on every connection. A [Credential] is a key pair on disk that is renewed before it
// ends and used from then on. The package does not decide what an identity may do nor who is still let in; the hub does, by the
// enrolment that each certificate carries ([Enrolled]). Start with [NewAuthority], [ServerTLS] and [OpenCredential].
package pki

import (
	"net/url"
	"strings"

	"github.com/pergolafl/pergola/internal/problem"
)

// Kind is what an identity is.
type Kind string

// The kinds of identity. A party is job-scoped: it opens links of that one job and nothing else.
const (
	KindHub   Kind = "hub"
	KindSite  Kind = "site"
	KindUser  Kind = "user"
	KindParty Kind = "party"
)

// HubName is the name of the hub's side of a job, which no site may therefore bear.
const HubName = "hub"

// MaxName is the greatest length of a name in bytes: that of a DNS label (RFC 1035, 2.3.4).
const MaxName = 63

// maxJob bounds a job's identifier in bytes; a ULID has 26.
const maxJob = 64

// Identity is who a certificate speaks for. Job is set for parties alone.
type Identity struct {
	Kind Kind
	Name string
	Job  string
}

// URI gives the identity as it stands in a certificate.
func (id Identity) URI() string {
	if id.Kind == KindParty {
		return "pergola:///party/" + id.Job + "/" + id.Name
	}
	return "pergola:///" + string(id.Kind) + "/" + id.Name
}

// String gives the identity as people read it: "site st-anna", "party st-anna of job 01J…".
func (id Identity) String() string {
	if id.Kind == KindParty {
		return "party " + id.Name + " of job " + id.Job
	}
	return string(id.Kind) + " " + id.Name
}

// Check tells whether the identity is one that a certificate may have; the error is a usage problem that names the rule.
func (id Identity) Check() error {
	switch id.Kind {
	case KindHub, KindSite, KindUser:
		if id.Job != "" {
			return problem.New(problem.Usage, "leave the job out", "a %s certificate cannot be bound to a job", id.Kind)
		}
	case KindParty:
		if !validJob(id.Job) {
			return problem.New(problem.Usage, "use the identifier that the hub gave the job",
				"%q cannot be a job's identifier: 1 to %d letters, digits, - and _", clip(id.Job), maxJob)
		}
	default:
		return problem.New(problem.Usage, "use one of hub, site, user, party", "%q is no kind of identity", clip(string(id.Kind)))
	}
	if id.Kind == KindSite {
		return ValidSite(id.Name)
	}
	return ValidName(id.Name)
}

// ParseIdentity reads a URI written by [Identity.URI]. Exactly what URI writes is accepted: no escapes, host,
// query or other spelling. The error is a denied problem.
func ParseIdentity(uri string) (Identity, error) {
	bad := func() (Identity, error) {
		return Identity{}, problem.New(problem.Denied, "have the certificate issued again by this hub's authority",
			"%q is not the identity of a hub, site, user or party", clip(uri))
	}
	rest, ok := strings.CutPrefix(uri, "pergola:///")
	if !ok || len(rest) > len(KindParty)+maxJob+MaxName+2 {
		return bad()
	}
	var id Identity
	switch parts := strings.Split(rest, "/"); {
	case len(parts) == 2 && Kind(parts[0]) != KindParty:
		id = Identity{Kind: Kind(parts[0]), Name: parts[1]}
	case len(parts) == 3 && Kind(parts[0]) == KindParty:
		id = Identity{Kind: KindParty, Job: parts[1], Name: parts[2]}
	default:
		return bad()
	}
	if id.Check() != nil {
		return bad()
	}
	return id, nil
}

// url gives the URI parsed, for a certificate.
func (id Identity) url() *url.URL {
	return &url.URL{Scheme: "pergola", Path: strings.TrimPrefix(id.URI(), "pergola://")}
}

// ValidName tells whether s can name a site, job, hub or user: a lower-case DNS label, that is 1 to 63 of a–z,
// 0–9 and -, first and last a letter or digit. The error is a usage problem that tells the rule.
func ValidName(s string) error {
	ok := len(s) >= 1 && len(s) <= MaxName && s[0] != '-' && s[len(s)-1] != '-'
	for i := 0; ok && i < len(s); i++ {
		ok = s[i] >= 'a' && s[i] <= 'z' || s[i] >= '0' && s[i] <= '9' || s[i] == '-'
	}
	if !ok {
		return problem.New(problem.Usage, "choose a name of 1 to 63 lower-case letters, digits and hyphens that starts and ends with a letter or digit",
			"%q cannot be a name", clip(s))
	}
	return nil
}

// ValidSite is [ValidName] for sites: "hub" is taken by the hub's side of a job.
func ValidSite(s string) error {
	if s == HubName {
		return problem.New(problem.Usage, "choose another name", "a site cannot be named %q: that is the hub's side of a job", s)
	}
	return ValidName(s)
}

func validJob(s string) bool {
	if s == "" || len(s) > maxJob {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' && c != '_' {
			return false
		}
	}
	return true
}

// clip shortens foreign text for a message.
func clip(s string) string {
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}
