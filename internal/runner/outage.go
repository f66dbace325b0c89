package runner

import (
	"fmt"
	"sync"
	"time"

	human "github.com/dustin/go-humanize"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/link"
)

// outages tells people when a site's link is cut and when it is back, and counts. The hub's side does that for both: it is the
// one whose journal is read during the outage.
type outages struct {
	note func(kind string, body any)

	mu   sync.Mutex // guards the rest
	sums map[string]job.Link
}

// began is told of an outage that has lasted a while.
func (o *outages) began(p link.Peer, since time.Time) {
	o.mu.Lock()
	defer o.mu.Unlock()
	s := o.sums[p.Site]
	s.Site, s.Since = p.Site, since
	o.note(job.KindLink, s)
}

// over is told of an outage that has ended.
func (o *outages) over(out link.Outage) {
	down := out.Resumed.Sub(out.Cut)
	o.mu.Lock()
	defer o.mu.Unlock() // also while it is written down: the counters go up from event to event
	if o.sums == nil {
		o.sums = map[string]job.Link{}
	}
	s := o.sums[out.Peer.Site]
	s.Site = out.Peer.Site
	s.Cuts++
	s.Resumes++
	s.ResentBytes += out.Resent
	s.DownSeconds += down.Seconds()
	o.sums[out.Peer.Site] = s
	o.note(job.KindWarning, job.Text{Message: fmt.Sprintf("site %s was unreachable for %s; resumed, %s re-sent", out.Peer.Site, lasted(down), human.IBytes(uint64(out.Resent)))})
	o.note(job.KindLink, s)
}

// ended is told of a session that has ended; one that ended cut off has had a cut without a resume.
func (o *outages) ended(p link.Peer, st link.Stats, at time.Time) {
	if st.Down.IsZero() {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.sums == nil {
		o.sums = map[string]job.Link{}
	}
	s := o.sums[p.Site]
	s.Site = p.Site
	s.Cuts++
	s.DownSeconds += at.Sub(st.Down).Seconds()
	o.sums[p.Site] = s
	o.note(job.KindLink, s)
}

// lasted writes how long something took: "0.4 s", "42 s", "2m10s".
func lasted(d time.Duration) string {
	switch {
	case d < 10*time.Second:
		return fmt.Sprintf("%.1f s", d.Seconds())
	case d < time.Minute:
		return fmt.Sprintf("%.0f s", d.Seconds())
	}
	return d.Round(time.Second).String()
}
