package schedule

import (
	"fmt"
	"strings"

	"github.com/pergolafl/pergola/internal/job"
)

// How many of a kind are named; the rest is counted.
const (
	maxNamed = 5
	maxUsers = 3
)

// Text says why a job waits, in one sentence. Queued is how many jobs wait; who gives a job's submitter, "" where that is not known.
func (w *Wait) Text(queued int, who func(job.ID) string) string {
	if w.Never {
		return "can never start: " + w.lacks(who, func(k Kind) bool { return k == TooSmall })
	}
	at := ""
	if w.Place > 0 {
		at = fmt.Sprintf("place %d of %d: ", w.Place, queued)
	}
	switch {
	case w.Joining:
		text := fmt.Sprintf("%d of %d sites could begin, and others are waited for", w.Able, w.Able+len(w.Lacks))
		if !w.Until.IsZero() {
			text += " until " + w.Until.UTC().Format("15:04:05 MST")
		}
		return at + text + ": " + w.lacks(who, nil)
	case w.HubFull:
		return at + "the hub runs as many jobs as it may"
	}
	return at + w.lacks(who, nil)
}

func (w *Wait) lacks(who func(job.ID) string, only func(Kind) bool) string {
	var parts []string
	for _, kind := range []struct {
		kind     Kind
		before   string
		one, all string
	}{
		{Away, "waiting for ", " to connect", " to connect"},
		{Drained, "", " is drained", " are drained"},
		{Removed, "", " was removed", " were removed"},
		{Undeclared, "the agent of ", " does not say what it has", " do not say what they have"},
	} {
		var names []string
		for _, l := range w.Lacks {
			if l.Kind == kind.kind && (only == nil || only(l.Kind)) {
				names = append(names, l.Site)
			}
		}
		if len(names) == 1 {
			parts = append(parts, kind.before+names[0]+kind.one)
		} else if len(names) > 1 {
			before := kind.before
			if kind.kind == Undeclared {
				before = "the agents of "
			}
			parts = append(parts, before+list(names, maxNamed)+kind.all)
		}
	}
	n := 0
	for _, l := range w.Lacks {
		text := l.text(who)
		if text == "" || only != nil && !only(l.Kind) {
			continue
		}
		if n++; n <= maxNamed {
			parts = append(parts, text)
		}
	}
	if n > maxNamed {
		parts = append(parts, fmt.Sprintf("so at %d more sites", n-maxNamed))
	}
	return strings.Join(parts, "; ")
}

// text says what one site lacks, of the kinds that have something of their own to say.
func (l Lack) text(who func(job.ID) string) string {
	switch l.Kind {
	case TooSmall:
		return fmt.Sprintf("%s has %s %s, and %s asked for", l.Site, job.Format(l.Resource, l.Has), l.Resource, are(l.Resource, l.Asked))
	case Busy:
		return fmt.Sprintf("%s has %s of %s %s free, and %s asked for%s", l.Site, job.Format(l.Resource, l.Free), job.Format(l.Resource, l.Has), l.Resource, are(l.Resource, l.Asked), by(", in use by ", l.By, who))
	case MaxJobs:
		return fmt.Sprintf("%s has as many jobs as it takes (%d)%s", l.Site, l.Has, by(": ", l.By, who))
	case Held:
		if l.Resource == "" {
			return fmt.Sprintf("%s takes %d jobs, and what is left is kept for jobs before this one%s", l.Site, l.Has, by(": ", l.By, who))
		}
		return fmt.Sprintf("%s has %s of %s %s free, but keeps them for jobs before this one%s", l.Site, job.Format(l.Resource, l.Free), job.Format(l.Resource, l.Has), l.Resource, by(": ", l.By, who))
	}
	return ""
}

func are(resource string, n int64) string {
	if n == 1 || resource == job.Memory {
		return job.Format(resource, n) + " is"
	}
	return job.Format(resource, n) + " are"
}

func by(before string, ids []job.ID, who func(job.ID) string) string {
	if len(ids) == 0 {
		return ""
	}
	var names []string
	for _, id := range ids {
		name := string(id)
		if w := who(id); w != "" {
			name += " of " + w
		}
		names = append(names, name)
	}
	return before + list(names, maxUsers)
}

func list(names []string, most int) string {
	if len(names) > most {
		return strings.Join(names[:most], ", ") + fmt.Sprintf(" and %d more", len(names)-most)
	}
	return strings.Join(names, ", ")
}

// Key tells whether a wait is another one than before, to people: which sites lack what, whatever the numbers.
func (w *Wait) Key() string {
	var b strings.Builder
	fmt.Fprint(&b, w.Never, w.Joining, w.HubFull)
	for _, l := range w.Lacks {
		b.WriteString("\x00" + l.Site + "\x00" + string(l.Kind) + "\x00" + l.Resource)
	}
	return b.String()
}
