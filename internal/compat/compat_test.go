package compat

import (
	"strings"
	"testing"

	"github.com/pergolafl/pergola/internal/problem"
)

func TestCommon(t *testing.T) {
	for _, c := range []struct {
		a, b Range
		want int // 0: none
	}{
		{Range{1, 1}, Range{1, 1}, 1},
		{Range{1, 2}, Range{1, 1}, 1},
		{Range{1, 2}, Range{2, 5}, 2},
		{Range{2, 4}, Range{3, 9}, 4},
		{Range{1, 9}, Range{3, 5}, 5},
		{Range{1, 2}, Range{3, 4}, 0},
	} {
		for _, p := range [][2]Range{{c.a, c.b}, {c.b, c.a}} {
			if v, ok := p[0].Common(p[1]); ok != (c.want > 0) || ok && v != c.want {
				t.Errorf("%s and %s: %d, %v; want %d", p[0], p[1], v, ok, c.want)
			}
		}
	}
}

func TestRefusal(t *testing.T) {
	hub, site := Side{"the hub", "v0.2.0", Range{1, 2}}, Side{"the agent of st-anna", "", Range{3, 4}}
	for _, p := range []*problem.Error{Refusal("control", hub, site), Refusal("control", site, hub)} {
		if p.Code != problem.Version || !strings.Contains(p.Msg, "the hub (pergola v0.2.0)") || !strings.Contains(p.Msg, "versions 1 to 2") || !strings.Contains(p.Msg, "versions 3 to 4") ||
			!strings.HasPrefix(p.Next, "update pergola at the hub,") {
			t.Errorf("%v", p)
		}
	}
	if p := Refusal("link", Side{"the hub", "", Range{5, 5}}, site); !strings.Contains(p.Msg, "version 5 of") || !strings.HasPrefix(p.Next, "update pergola at the agent of st-anna") {
		t.Errorf("%v", p)
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"1", "1-2", "2-1", "01", "0", "-", "1-", "32768", "1-1", " 1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r, ok := Parse(s)
		if ok != (r != Range{}) || ok && (r.String() != s || !r.Valid()) {
			t.Errorf("%q: %v, %v", s, r, ok)
		}
	})
}

func TestParse(t *testing.T) {
	for s, want := range map[string]Range{"1": {1, 1}, "1-2": {1, 2}, "12-345": {12, 345}, "": {}, "2-1": {}, "0": {}, "1-1": {}, "+1": {}, "1-2-3": {}, "99999": {}} {
		if r, ok := Parse(s); r != want || ok != want.Valid() {
			t.Errorf("%q: %v, %v", s, r, ok)
		}
	}
}
