package proc

import (
	"bytes"
	"os"
	"path"
	"strconv"
	"strings"
)

// oomCount is how many processes of our cgroup the kernel has killed for want of memory. Programs
// are started into the same cgroup.
type oomCount struct {
	n  int64
	ok bool // the kernel keeps such a count for us
}

func (now oomCount) since(before oomCount) bool { return now.ok && before.ok && now.n > before.n }

// readOOM looks at cgroup v2 (memory.events) and then v1 (memory.oom_control), see the kernel's
// Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst. Neither may be there.
func readOOM() oomCount {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return oomCount{}
	}
	return oomIn("/sys/fs/cgroup", string(b))
}

// oomIn reads the count below root for the cgroups listed as "id:controllers:path".
func oomIn(root, cgroups string) oomCount {
	for line := range strings.Lines(cgroups) {
		_, rest, _ := strings.Cut(strings.TrimSpace(line), ":")
		controllers, dir, ok := strings.Cut(rest, ":")
		if !ok {
			continue
		}
		var files []string
		switch controllers {
		case "":
			// Inside a container the path may be that of the host, and the mount the container's own.
			files = []string{path.Join(root, dir, "memory.events"), path.Join(root, "memory.events")}
		case "memory":
			files = []string{path.Join(root, "memory", dir, "memory.oom_control"), path.Join(root, "memory", "memory.oom_control")}
		}
		for _, f := range files {
			b, err := os.ReadFile(f)
			if err != nil {
				continue
			}
			for l := range bytes.Lines(b) {
				if v, ok := bytes.CutPrefix(l, []byte("oom_kill ")); ok {
					if n, err := strconv.ParseInt(string(bytes.TrimSpace(v)), 10, 64); err == nil {
						return oomCount{n, true}
					}
				}
			}
		}
	}
	return oomCount{}
}
