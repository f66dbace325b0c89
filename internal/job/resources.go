package job

import (
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"

	human "github.com/dustin/go-humanize"

	"github.com/pergolafl/pergola/internal/problem"
)

// Names of resources that Pergola knows. Every other name of the form of a site's is one that people agree upon, such as a
// number of licences.
const (
	CPUs   = "cpus"
	Memory = "memory" // in bytes
	GPUs   = "gpus"

	// MaxJobs stands beside resources in a site's configuration, and is none: a job cannot ask for it.
	MaxJobs = "max-jobs"
)

// maxAmount is more than anybody has of anything; sums of many stay far from overflowing.
const maxAmount = 1 << 53

// Resources says how much of each resource there is, or is asked for, by its name. Memory is in bytes. As JSON, memory is a
// text like "64GiB", as in files.
type Resources map[string]int64

// MarshalJSON writes memory as a text.
func (r Resources) MarshalJSON() ([]byte, error) {
	m := make(map[string]any, len(r))
	for k, v := range r {
		m[k] = v
		if k == Memory {
			m[k] = FormatSize(v)
		}
	}
	return json.Marshal(m)
}

// UnmarshalJSON reads what MarshalJSON writes, and memory as a number of bytes.
func (r *Resources) UnmarshalJSON(b []byte) error {
	var m map[string]json.RawMessage
	if err := json.Unmarshal(b, &m); err != nil {
		return err
	}
	out := make(Resources, len(m))
	for k, raw := range m {
		var text string
		var n int64
		var err error
		if k == Memory && json.Unmarshal(raw, &text) == nil {
			n, err = ParseSize(text)
		} else {
			err = json.Unmarshal(raw, &n)
		}
		if err != nil {
			return fmt.Errorf("resource %s: %w", k, err)
		}
		out[k] = n
	}
	*r = out
	return nil
}

// Format gives an amount of a resource as people write it.
func Format(name string, amount int64) string {
	if name == Memory {
		return FormatSize(amount)
	}
	return strconv.FormatInt(amount, 10)
}

// String lists them by name: "cpus 4, memory 8GiB"; "" for none.
func (r Resources) String() string {
	var out []string
	for _, k := range slices.Sorted(maps.Keys(r)) {
		out = append(out, k+" "+Format(k, r[k]))
	}
	return strings.Join(out, ", ")
}

var sizeForm = regexp.MustCompile(`^[0-9]{1,18}(\.[0-9]{1,9})?\s?([KMGTP]i?)?B$`)

const sizeRule = `write it like "8GiB" or "512MB"`

// ParseSize reads a number of bytes: "64GiB", "1.5 GB", "100B". The problem has the code usage.
func ParseSize(s string) (int64, error) {
	if sizeForm.MatchString(s) {
		if n, err := human.ParseBytes(s); err == nil && n <= maxAmount {
			return int64(n), nil
		}
	}
	return 0, problem.New(problem.Usage, sizeRule, "%q is not a size", clipped(s))
}

// FormatSize gives the shortest text that ParseSize reads back exactly: "64GiB", "1000B".
func FormatSize(n int64) string {
	for i := len(sizeUnits) - 1; i > 0 && n > 0; i-- {
		if unit := int64(1) << (10 * i); n%unit == 0 {
			return strconv.FormatInt(n/unit, 10) + sizeUnits[i]
		}
	}
	return strconv.FormatInt(n, 10) + "B"
}

var sizeUnits = []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB"}

func clipped(s string) string {
	if len(s) > 40 {
		return s[:40] + "…"
	}
	return s
}

// ResourceFault tells what is wrong with an amount of a resource, "" for nothing.
func ResourceFault(name string, amount int64) (msg, next string) {
	if name == MaxJobs {
		return "max-jobs is for a site's own configuration", "leave it out: a job counts as one at each of its sites"
	}
	if msg, _ := nameFault("resource", name); msg != "" {
		return msg, nameRule
	}
	if amount < 0 || amount > maxAmount {
		return fmt.Sprintf("%d is no amount of %s", amount, name), "give 0 or more"
	}
	return "", ""
}

// ParseAmount reads one value of a table of resources as TOML gives it: a whole number, for memory a text.
func ParseAmount(name string, v any) (n int64, msg, next string) {
	switch v := v.(type) {
	case int64:
		if name == Memory {
			return 0, "memory has to have a unit", sizeRule
		}
		n = v
	case string:
		if name != Memory {
			return 0, "this is a string, and has to be a whole number", "write it without quotes"
		}
		size, err := ParseSize(v)
		if err != nil {
			e := problem.From(err)
			return 0, e.Msg, e.Next
		}
		n = size
	default:
		if name == Memory {
			return 0, "this is " + tomlType(v) + ", and has to be a size in quotes", sizeRule
		}
		return 0, "this is " + tomlType(v) + ", and has to be a whole number", "write it without quotes, like 2"
	}
	msg, next = ResourceFault(name, n)
	return n, msg, next
}

// ResourcesFor gives what the job asks for at a site: what it says for every site, then what it says for this one. Resources of
// which it asks for none are left out. The caller may change the result.
func (s Spec) ResourcesFor(site string) Resources {
	out := Resources{}
	maps.Copy(out, s.Site.Resources)
	maps.Copy(out, s.Site.Named[site].Resources)
	maps.DeleteFunc(out, func(_ string, n int64) bool { return n == 0 })
	return out
}

// Declared is what a site's agent says of its site. It is what the store keeps of it, as JSON.
type Declared struct {
	Resources Resources `json:"resources"`
	MaxJobs   int       `json:"max-jobs,omitempty"` // how many jobs may have a part there at a time; 0 = any number
}

// Check finds what is wrong with a declaration that came from elsewhere.
func (d Declared) Check() error {
	for _, k := range slices.Sorted(maps.Keys(d.Resources)) {
		if msg, next := ResourceFault(k, d.Resources[k]); msg != "" {
			return problem.New(problem.Usage, next, "resources.%s: %s", k, msg)
		}
	}
	if d.MaxJobs < 0 || d.MaxJobs > math.MaxInt32 {
		return problem.New(problem.Usage, "give 1 or more, or leave it out for any number", "max-jobs: %d is no number of jobs", d.MaxJobs)
	}
	return nil
}

// MaxPriority bounds the priorities of jobs, on both sides: nobody has to outbid anybody.
const MaxPriority = 1000
