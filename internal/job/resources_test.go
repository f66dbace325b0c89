package job

import (
	"encoding/json"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pergolafl/pergola/internal/problem"
)

func TestResourcesOfASite(t *testing.T) {
	s := Spec{Site: Site{
		Resources: Resources{CPUs: 2, Memory: 1 << 30, "licence-x": 1},
		Named:     map[string]Site{"a": {Resources: Resources{CPUs: 8, "licence-x": 0, GPUs: 1}}},
	}}
	for site, want := range map[string]string{"a": "cpus 8, gpus 1, memory 1GiB", "b": "cpus 2, licence-x 1, memory 1GiB"} {
		r := s.ResourcesFor(site)
		if r.String() != want {
			t.Errorf("%s: %s, want %s", site, r, want)
		}
		r[CPUs] = 99 // the caller's own
	}
	if s.Site.Resources[CPUs] != 2 {
		t.Error("the job's own resources were changed")
	}
}

func TestResourcesAsJSON(t *testing.T) {
	for in, want := range map[string]string{
		`{"cpus":2,"memory":"1.5 GiB"}`: `{"cpus":2,"memory":"1536MiB"}`,
		`{"memory":1000}`:               `{"memory":"1000B"}`,
		`{}`:                            `{}`,
		`{"cpus":"2"}`:                  "",
		`{"memory":"2"}`:                "",
		`{"gpus":1.5}`:                  "",
		`[]`:                            "",
	} {
		var r Resources
		err := json.Unmarshal([]byte(in), &r)
		if (err != nil) != (want == "") {
			t.Errorf("%s: %v", in, err)
		}
		if err != nil {
			continue
		}
		if b, err := json.Marshal(r); err != nil || string(b) != want {
			t.Errorf("%s became %s, %v; want %s", in, b, err, want)
		}
	}
}

func TestDeclared(t *testing.T) {
	if err := (Declared{Resources: Resources{CPUs: 4, "a": 0}, MaxJobs: 2}).Check(); err != nil {
		t.Error(err)
	}
	for _, d := range []Declared{{Resources: Resources{"A": 1}}, {Resources: Resources{CPUs: -1}}, {MaxJobs: -1}, {Resources: Resources{MaxJobs: 1}}} {
		if err := d.Check(); problem.CodeOf(err) != problem.Usage {
			t.Errorf("%+v: %v", d, err)
		}
	}
}

// A size that is read prints as one that reads as the same.
func FuzzSize(f *testing.F) {
	for _, s := range []string{"64GiB", "1.5 GB", "0B", "100B", "1PiB", "9007199254740992B", "1e3B", "-1B", "999999999999999999PiB", "1 Gi", ".5KiB"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := ParseSize(s)
		if err != nil {
			if problem.CodeOf(err) != problem.Usage {
				t.Errorf("%q: %v", s, err)
			}
			return
		}
		if n < 0 || n > maxAmount {
			t.Fatalf("%q is %d", s, n)
		}
		if back, err := ParseSize(FormatSize(n)); err != nil || back != n {
			t.Errorf("%q is %d, prints %s and reads back as %d, %v", s, n, FormatSize(n), back, err)
		}
	})
}

func TestSizes(t *testing.T) {
	for s, want := range map[string]int64{"64GiB": 64 << 30, "512MB": 512e6, "1.5KiB": 1536, "7B": 7, "0B": 0} {
		if got, err := ParseSize(s); err != nil || got != want {
			t.Errorf("%s is %d, %v; want %d", s, got, err, want)
		}
	}
	got := map[int64]string{}
	for _, n := range []int64{0, 1, 1024, 1536, 1 << 40, 1e9, 3 << 29} {
		got[n] = FormatSize(n)
	}
	want := map[int64]string{0: "0B", 1: "1B", 1024: "1KiB", 1536: "1536B", 1 << 40: "1TiB", 1e9: "1000000000B", 3 << 29: "1536MiB"}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
}
