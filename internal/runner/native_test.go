package runner

import (
	"slices"
	"testing"
)

// Devices go to workers in turn: each has its share, and none that the site has not given the job.
func TestDevicesOfWorkers(t *testing.T) {
	for _, c := range []struct {
		name    string
		ids     []string
		per     float64
		workers int
		env     []string // of the first four slots
	}{
		{"the site declares none", nil, 0, 0, nil},
		{"none is for this job", []string{}, 0, 0, []string{"", "", "", ""}},
		{"one each", []string{"0", "GPU-8932f937"}, 0, 2, []string{"0", "GPU-8932f937", "0", "GPU-8932f937"}},
		{"two share one", []string{"4", "5"}, 0.5, 4, []string{"4", "5", "4", "5"}},
		{"three share one", []string{"4"}, 1.0 / 3, 3, []string{"4", "4", "4", "4"}},
		{"two each", []string{"0", "1", "2", "3"}, 2, 2, []string{"0,1", "2,3", "0,1", "2,3"}},
		{"two each of three", []string{"0", "1", "2"}, 2, 1, []string{"0,1", "2,0", "1,2", "0,1"}},
		{"more than there are", []string{"0"}, 2, 0, []string{"0", "0", "0", "0"}},
	} {
		d := newDevices(c.ids, c.per)
		if got := d.workers(); got != c.workers {
			t.Errorf("%s: %d workers, want %d", c.name, got, c.workers)
		}
		var env []string
		for slot := range 4 {
			env = append(env, d.env(slot)...)
		}
		var want []string
		for _, e := range c.env {
			want = append(want, "CUDA_VISIBLE_DEVICES="+e)
		}
		if !slices.Equal(env, want) {
			t.Errorf("%s: %q, want %q", c.name, env, want)
		}
	}
}

// What is done aside holds up nobody, and is done in its order by the end of the wait.
func TestAside(t *testing.T) {
	var a aside
	a.wait() // for nothing
	gate := make(chan struct{})
	var got []int
	a.do(func() { <-gate })
	for i := range 100 {
		a.do(func() { got = append(got, i) })
	}
	close(gate)
	a.wait()
	if len(got) != 100 || !slices.IsSorted(got) {
		t.Errorf("done: %v", got)
	}
	a.do(func() { got = nil })
	a.wait()
	if got != nil {
		t.Error("what came after a wait was not done")
	}
}
