package site

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pergolafl/pergola/internal/config"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/runner"
)

func offerOf(text string) (offer, error) {
	var c Config
	if err := config.Parse([]byte(text), "site.toml", &c); err != nil {
		return offer{}, err
	}
	return c.offer("site.toml")
}

func TestOffer(t *testing.T) {
	for _, c := range []struct {
		toml, resources string
		devices         string // "-": none declared
		maxJobs         int
		fault           string
	}{
		{"[resources]\ncpus = 8\nmemory = '64GiB'", "cpus 8, memory 64GiB", "-", 0, ""},
		{"[resources]\ncpus = 0\nmemory = '0B'\ngpus = 2\nlicence-x = 3\nmax-jobs = 4", "cpus 0, gpus 2, licence-x 3, memory 0B", "0,1", 4, ""},
		{"[resources]\ncpus = 1\nmemory = '1B'\ngpus = ['GPU-8932f937', 3]", "cpus 1, gpus 2, memory 1B", "GPU-8932f937,3", 0, ""},
		{"[resources]\ncpus = 1\nmemory = '1B'\ngpus = 0", "cpus 1, gpus 0, memory 1B", "", 0, ""},
		{"[resources]\ngpus = ['1', 1]", "", "", 0, "site.toml: resources.gpus: device 1 is listed twice"},
		{"[resources]\ngpus = ['1,2']", "", "", 0, "site.toml: resources.gpus: 1,2 is no device's id"},
		{"[resources]\ngpus = 1.5", "", "", 0, "site.toml: resources.gpus: this is neither a number nor a list"},
		{"[resources]\ngpus = -1", "", "", 0, "site.toml: resources.gpus: -1 is no number of devices"},
		{"[resources]\nmemory = 64", "", "", 0, "site.toml: resources.memory: memory has to have a unit"},
		{"[resources]\nmax-jobs = 0", "", "", 0, "site.toml: resources.max-jobs: 0 is no number of jobs"},
		{"[resources]\nLicence = 1", "", "", 0, `site.toml: resources.Licence: "Licence" cannot be the name`},
		{"[resource]\ncpus = 1", "", "", 0, `site.toml:1: unknown key resource; did you mean "resources"?`},
	} {
		o, err := offerOf(c.toml)
		if c.fault != "" {
			if problem.CodeOf(err) != problem.Usage || !strings.HasPrefix(err.Error(), c.fault) {
				t.Errorf("%s: %v, want %s", c.toml, err, c.fault)
			}
			continue
		}
		devices := strings.Join(o.devices, ",")
		if o.devices == nil {
			devices = "-"
		}
		if err != nil || o.Resources.String() != c.resources || devices != c.devices || o.MaxJobs != c.maxJobs || o.Check() != nil {
			t.Errorf("%s: %s, devices %s, %d jobs, %v", c.toml, o.Resources, devices, o.MaxJobs, err)
		}
	}
}

// What a site does not say is what the machine has.
func TestDetection(t *testing.T) {
	o, err := offerOf("")
	if err != nil || o.Resources[job.CPUs] < 1 || o.Resources[job.Memory] < 1<<20 || o.devices != nil || o.MaxJobs != 0 {
		t.Fatalf("%+v, %v", o, err)
	}
	whole := memory(t.TempDir())
	for _, c := range []struct {
		cgroup string
		files  map[string]string
		want   int64
	}{
		{"0::/a/b\n", map[string]string{"a/b/memory.max": "max\n", "a/memory.max": "1048576\n", "memory.max": "2097152\n"}, 1 << 20},
		{"0::/\n", map[string]string{"memory.max": "3145728"}, 3 << 20},
		{"12:cpu:/x\n5:hugetlb,memory:/a\n", map[string]string{"memory/a/memory.limit_in_bytes": "4194304\n"}, 4 << 20},
		{"12:cpu:/x\n", nil, whole},
		{"0::/../..\n", map[string]string{"memory.max": "9223372036854771712\n"}, whole},
		{"nonsense", nil, whole},
	} {
		root := t.TempDir()
		for name, text := range c.files {
			write(t, filepath.Join(root, "sys/fs/cgroup", name), text)
		}
		write(t, filepath.Join(root, "proc/self/cgroup"), c.cgroup)
		if got := memory(root); got != c.want {
			t.Errorf("%q, %v: %d bytes, want %d", c.cgroup, c.files, got, c.want)
		}
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// Each device is one part's at a time, also after a new start of the agent, until the part's folder is gone.
func TestDevicesOfParts(t *testing.T) {
	first := dialStub(t, &hubStub{}, 0)
	a := first.agent
	a.offer.devices = []string{"g0", "g1", "g2"}
	if err := os.MkdirAll(filepath.Join(a.dir, "jobs"), 0o700); err != nil {
		t.Fatal(err)
	}
	another := func() *part { return newPart(a, job.NewID(time.Now()), first.first) }
	take := func(p *part, n int64) string {
		t.Helper()
		ids, err := p.takeDevices(t.Context(), n)
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprint(ids)
	}
	begin := func(p *part, gpus string) { // as its runner's starter does
		write(t, filepath.Join(p.partyDir(), "spec.json"), `{"gpus": [`+gpus+`]}`)
	}
	if got := take(first, 2); got != "[g0 g1]" {
		t.Errorf("the first part has %s", got)
	}
	if got := take(first, 2); got != "[g0 g1]" {
		t.Errorf("asked again, the first part has %s", got)
	}
	none := another()
	if ids, err := none.takeDevices(t.Context(), 0); ids == nil || len(ids) != 0 || err != nil {
		t.Errorf("a part that asks for none has %v, %v", ids, err)
	}
	begin(first, `"g0", "g1"`)
	a.taken = map[job.ID][]string{} // started again
	second, third := another(), another()
	if got := take(second, 1); got != "[g2]" {
		t.Errorf("the second part has %s", got)
	}
	begin(second, `"g2"`)
	got := make(chan []string)
	go func() {
		ids, err := third.takeDevices(t.Context(), 2)
		if err != nil {
			t.Error(err)
		}
		got <- ids
	}()
	second.clear() // one is too few
	first.clear()
	if ids := <-got; !slices.Equal(ids, []string{"g0", "g1"}) {
		t.Errorf("the third part has %v", ids)
	}
	if _, err := another().takeDevices(t.Context(), 4); err == nil {
		t.Error("more devices were given than there are")
	}
	fourth := another()
	done := make(chan error)
	go func() {
		_, err := fourth.takeDevices(t.Context(), 3)
		done <- err
	}()
	fourth.forget()
	if err := <-done; err == nil {
		t.Error("a part that nobody wants has devices")
	}
	a.offer.devices = nil
	if ids, err := another().takeDevices(t.Context(), 0); ids != nil || err != nil {
		t.Errorf("at a site without devices: %v, %v", ids, err)
	}
	if _, err := another().takeDevices(t.Context(), 1); err == nil {
		t.Error("a site without devices gives one")
	}
	if runner.GPUsIn(first.partyDir()) != nil {
		t.Error("a part that is gone has devices")
	}
}
