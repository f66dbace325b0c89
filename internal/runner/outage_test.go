package runner

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/link"
)

func TestOutagesAreToldAndCounted(t *testing.T) {
	type told struct {
		Kind string
		Body any
	}
	var got []told
	o := &outages{note: func(kind string, body any) { got = append(got, told{kind, body}) }}
	cut := time.Date(2026, 11, 23, 12, 0, 7, 0, time.Local)
	anna, bert := link.Peer{Job: "j", Site: "st-anna"}, link.Peer{Job: "j", Site: "bert"}
	o.began(anna, cut)
	o.over(link.Outage{Peer: anna, Cut: cut, Resumed: cut.Add(42 * time.Second), Resent: 1363149})
	o.over(link.Outage{Peer: bert, Cut: cut, Resumed: cut.Add(400 * time.Millisecond)})
	o.over(link.Outage{Peer: anna, Cut: cut, Resumed: cut.Add(130 * time.Second), Resent: 1})
	o.ended(bert, link.Stats{Cuts: 1}, cut)
	o.ended(anna, link.Stats{Cuts: 3, Down: cut}, cut.Add(8*time.Second))
	want := []told{
		{job.KindLink, job.Link{Site: "st-anna", Since: cut}},
		{job.KindWarning, job.Text{Message: "site st-anna was unreachable for 42 s; resumed, 1.3 MiB re-sent"}},
		{job.KindLink, job.Link{Site: "st-anna", Cuts: 1, Resumes: 1, ResentBytes: 1363149, DownSeconds: 42}},
		{job.KindWarning, job.Text{Message: "site bert was unreachable for 0.4 s; resumed, 0 B re-sent"}},
		{job.KindLink, job.Link{Site: "bert", Cuts: 1, Resumes: 1, DownSeconds: 0.4}},
		{job.KindWarning, job.Text{Message: "site st-anna was unreachable for 2m10s; resumed, 1 B re-sent"}},
		{job.KindLink, job.Link{Site: "st-anna", Cuts: 2, Resumes: 2, ResentBytes: 1363150, DownSeconds: 172}},
		{job.KindLink, job.Link{Site: "st-anna", Cuts: 3, Resumes: 2, ResentBytes: 1363150, DownSeconds: 180}},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}
