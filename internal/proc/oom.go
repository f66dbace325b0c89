package proc

import (
	"bytes"
	"os"
	"path"
	"strconv"
	"strings"
)

// OOMCount is how many processes of our cgroup the kernel has killed for want of memory. Programs
// are started into the same cgroup.
type OOMCount struct {
	n  int64
	ok bool // the kernel keeps such a count for us
}

func (now OOMCount) since(before OOMCount) bool { return now.ok && before.ok && now.n > before.n }

// OOMKills notes how many processes the kernel has killed for want of memory in our cgroup, for [OOMKilled].
func OOMKills() OOMCount { return readOOM() }

// OOMKilled tells whether there was another such kill since: for a process that is not our child. It is one of our cgroup,
// which need not be the one that is missing.
func OOMKilled(before OOMCount) bool { return readOOM().since(before) }

// readOOM looks at cgroup v2 (memory.events) and then v1 (memory.oom_control), see the kernel's
// Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst. Neither may be there.
func readOOM() OOMCount {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return OOMCount{}
	}
	return oomIn("/sys/fs/cgroup", string(b))
}

// oomIn reads the count below root for the cgroups listed as "id:controllers:path".
func oomIn(root, cgroups string) OOMCount {
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
						return OOMCount{n, true}
					}
				}
			}
		}
	}
	return OOMCount{}
}

// OOMVisible tells whether such a count can be read here: without it, a program that the kernel killed for want of memory looks like one that
// somebody killed.
func OOMVisible() bool { return readOOM().ok }
