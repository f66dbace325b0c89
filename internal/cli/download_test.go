package cli

import "testing"

func TestChosenFiles(t *testing.T) {
	for _, c := range []struct {
		file     string
		patterns []string
		want     bool
	}{
		{"results/a.npz", nil, true},
		{"results/a.npz", []string{"*.npz"}, true},
		{"results/a.npz", []string{"*.csv"}, false},
		{"results/a.npz", []string{"*.csv", "results/*"}, true},
		{"results/x/a.npz", []string{"results/*"}, true},
		{"results/x/a.npz", []string{"results"}, true},
		{"results/x/a.npz", []string{"results/"}, true},
		{"results/x/a.npz", []string{"results/y"}, false},
		{"logs/hub/a.txt", []string{"results"}, false},
		{"logs/hub/a.txt", []string{"logs/hub/a.txt"}, true},
	} {
		if got := chosen(c.file, c.patterns); got != c.want {
			t.Errorf("%s by %q: %v", c.file, c.patterns, got)
		}
	}
}
