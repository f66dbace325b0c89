package site

import (
	"fmt"
	"maps"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/problem"
)

// offer is what a site has for jobs.
type offer struct {
	job.Declared
	devices []string // ids of its GPUs; nil: it declares none
}

// maxDevices is more than one machine has.
const maxDevices = 1024

// offer reads [resources]; path is the file's name for messages. What it does not say of CPUs and memory is looked up.
func (c *Config) offer(path string) (offer, error) {
	o := offer{Declared: job.Declared{Resources: job.Resources{}}}
	bad := func(key, msg, next string) error {
		return problem.New(problem.Usage, next, "%s: resources.%s: %s", path, key, msg)
	}
	for _, k := range slices.Sorted(maps.Keys(c.Resources)) {
		v := c.Resources[k]
		switch k {
		case job.MaxJobs:
			n, ok := v.(int64)
			if !ok || n < 1 || n > math.MaxInt32 {
				return o, bad(k, fmt.Sprintf("%v is no number of jobs", v), "give 1 or more, or leave it out for any number")
			}
			o.MaxJobs = int(n)
		case job.GPUs:
			ids, msg := devices(v)
			if msg != "" {
				return o, bad(k, msg, `write gpus = 2, or their ids: gpus = ["0", "3"]`)
			}
			o.devices = ids
			o.Resources[k] = int64(len(ids))
		default:
			n, msg, next := job.ParseAmount(k, v)
			if msg != "" {
				return o, bad(k, msg, next)
			}
			o.Resources[k] = n
		}
	}
	if _, ok := o.Resources[job.CPUs]; !ok {
		o.Resources[job.CPUs] = int64(runtime.GOMAXPROCS(0)) // what this process may use, a cgroup's limit considered
	}
	if _, ok := o.Resources[job.Memory]; !ok {
		if n := memory("/"); n > 0 {
			o.Resources[job.Memory] = n
		}
	}
	return o, nil
}

// devices reads gpus: their number, which are called 0, 1, … then, or a list of their ids, as CUDA_VISIBLE_DEVICES has them.
func devices(v any) (ids []string, msg string) {
	ids = []string{}
	switch v := v.(type) {
	case int64:
		if v < 0 || v > maxDevices {
			return nil, fmt.Sprintf("%d is no number of devices", v)
		}
		for i := range v {
			ids = append(ids, strconv.FormatInt(i, 10))
		}
	case []any:
		for _, e := range v {
			id, ok := e.(string)
			if n, isNumber := e.(int64); isNumber && n >= 0 {
				id, ok = strconv.FormatInt(n, 10), true
			}
			if !ok || id == "" || strings.ContainsAny(id, ", \t\r\n\x00") {
				return nil, fmt.Sprintf("%v is no device's id", e)
			}
			if slices.Contains(ids, id) {
				return nil, fmt.Sprintf("device %s is listed twice", id)
			}
			ids = append(ids, id)
		}
		if len(ids) > maxDevices {
			return nil, fmt.Sprintf("there are more than %d devices", maxDevices)
		}
	default:
		return nil, "this is neither a number nor a list"
	}
	return ids, ""
}

// memory gives the bytes that this machine, or the cgroup in which this process is, has; 0 if nobody can tell. Root is where the
// machine's files begin.
func memory(root string) int64 {
	var si unix.Sysinfo_t
	if unix.Sysinfo(&si) != nil {
		return 0
	}
	n := int64(si.Totalram) * int64(max(si.Unit, 1))
	b, err := os.ReadFile(filepath.Join(root, "proc/self/cgroup"))
	if err != nil {
		return n
	}
	for l := range strings.Lines(string(b)) { // "0::/a/b" of version 2, "5:memory:/a/b" of version 1
		parts := strings.SplitN(strings.TrimSpace(l), ":", 3)
		if len(parts) != 3 {
			continue
		}
		top, file := filepath.Join(root, "sys/fs/cgroup"), "memory.max"
		if parts[0] != "0" {
			if !slices.Contains(strings.Split(parts[1], ","), "memory") {
				continue
			}
			top, file = filepath.Join(top, "memory"), "memory.limit_in_bytes"
		}
		// The limits of all above count. In a container the path may be the host's: its own limit is at the top then.
		for p := filepath.Clean("/" + parts[2]); ; p = filepath.Dir(p) {
			if text, err := os.ReadFile(filepath.Join(top, p, file)); err == nil {
				if limit, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64); err == nil && limit > 0 {
					n = min(n, limit)
				}
			}
			if p == "/" {
				break
			}
		}
	}
	return n
}

// proto is the offer as the hub is told of it.
func (o offer) proto() *pb.SiteOffer {
	return &pb.SiteOffer{Resources: o.Resources, MaxJobs: int32(o.MaxJobs)}
}
