package runner

import (
	"slices"
	"testing"
	"time"

	"github.com/pergolafl/pergola/internal/proc"
)

func TestSuspensions(t *testing.T) {
	a, b := proc.Suspended{Pid: 1, Start: 10}, proc.Suspended{Pid: 2, Start: 20}
	reused := proc.Suspended{Pid: 1, Start: 99}
	s := suspensions{}
	at := time.Now()
	for i, c := range []struct {
		after time.Duration
		found []proc.Suspended
		want  []proc.Suspended
	}{
		{0, []proc.Suspended{a}, nil},
		{20 * time.Second, []proc.Suspended{a, b}, nil},
		{30 * time.Second, []proc.Suspended{a, b}, []proc.Suspended{a}},
		{31 * time.Second, []proc.Suspended{b}, nil}, // a went on
		{32 * time.Second, []proc.Suspended{reused, b}, nil},
		{50 * time.Second, []proc.Suspended{reused, b}, []proc.Suspended{b}},
		{62 * time.Second, []proc.Suspended{reused}, []proc.Suspended{reused}},
		{63 * time.Second, nil, nil},
	} {
		if got := s.overdue(c.found, at.Add(c.after), 30*time.Second); !slices.Equal(got, c.want) {
			t.Errorf("look %d: %v, want %v", i, got, c.want)
		}
	}
	if len(s) != 0 {
		t.Errorf("still remembered: %v", s)
	}
}
