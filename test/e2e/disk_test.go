package e2e

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/problem"
)

// onTmpfs runs the command given as further arguments with a file system of a given size on a folder, in a mount namespace
// of its own, and has the folder's content stay when the namespace goes.
const onTmpfs = `out=$1 save=$2 size=$3; shift 3
mount -t tmpfs -o "size=$size,mode=700" tmpfs "$out" || exit 125
"$@"; status=$?
cp -a "$out/." "$save/"; umount -l "$out" && cp -a "$save/." "$out/"
exit $status`

// smallDisk puts the run's directory on a disk of so many bytes.
func smallDisk(t *testing.T, s *spec, size int) {
	t.Helper()
	if out, err := exec.Command("unshare", "-Urm", "mount", "-t", "tmpfs", "tmpfs", t.TempDir()).CombinedOutput(); err != nil {
		t.Skipf("this kernel lets no user mount a tmpfs in a namespace of its own: %v: %s", err, out)
	}
	s.out = filepath.Join(t.TempDir(), "out")
	save := t.TempDir()
	if err := os.Mkdir(s.out, 0o700); err != nil {
		t.Fatal(err)
	}
	s.wrap = []string{"unshare", "-Urm", "sh", "-c", onTmpfs, "sh", s.out, save, strconv.Itoa(size)}
}

// fill writes to the run's disk until nothing more fits, as another program would.
func fill(r *run) {
	r.t.Helper()
	path := filepath.Join("/proc", strconv.Itoa(r.cmd.Process.Pid), "root", r.out, "filler")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		r.t.Fatal(err)
	}
	defer f.Close()
	for size := 64 << 10; size > 0; {
		if _, err = f.Write(make([]byte, size)); err == nil {
			continue
		}
		if !errors.Is(err, syscall.ENOSPC) {
			r.t.Fatal(err)
		}
		size /= 2
	}
}

// A disk that is full ends the run with a cause that says so, whenever it happens.
func TestDiskFull(t *testing.T) {
	for _, c := range []struct {
		name string
		app  string
		args []string
		size int // bytes
		act  func(r *run)
		job  bool // there must be a job, with its end in the store
	}{
		{name: "from the start", app: "tiny", size: 64 << 10},
		{name: "before the hub is up", app: "tiny", size: 1 << 20},
		{name: "when the job is submitted", app: "tiny", size: 1300 << 10},
		{name: "while the parties prepare", app: "tiny", size: 1700 << 10},
		{name: "an app prints too much", app: "noisy", args: []string{"--run-config", "mebibytes=16"}, size: 16 << 20, job: true},
		{name: "an app prints too much, newest flwr", app: "noisy", args: []string{"--run-config", "mebibytes=16", "--flwr", newFlwr}, size: 16 << 20, job: true},
		{name: "somebody else fills it in a round", app: "slow", args: []string{"--run-config", "sleep=2", "--run-config", "num-server-rounds=30"}, size: 32 << 20, act: func(r *run) {
			r.round(1)
			r.strike()
			fill(r)
		}, job: true},
		{name: "somebody else fills it while the parties prepare", app: "slow", size: 32 << 20, act: func(r *run) {
			r.jobState(job.Preparing)
			r.strike()
			fill(r)
		}, job: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := spec{app: c.app, args: c.args}
			if !strings.Contains(strings.Join(c.args, " "), "--flwr") {
				s.args = append(s.args, "--flwr", oldFlwr)
			}
			smallDisk(t, &s, c.size)
			r := start(t, s)
			if c.act != nil {
				c.act(r)
			}
			res := r.end()
			if res.Code != problem.ExitFailed || res.Summary.State != job.Failed {
				t.Errorf("exit %d, state %s, want %d and %s", res.Code, res.Summary.State, problem.ExitFailed, job.Failed)
			}
			if cause := res.Summary.Cause; cause == nil || cause.Code != problem.DiskFull || !strings.Contains(cause.Msg, "no space") || !strings.Contains(cause.Next, "make room") {
				t.Errorf("cause %+v, want %s", cause, problem.DiskFull)
			}
			if c.job && res.Job.ID == "" {
				t.Error("there is no job in the store")
			}
		})
	}
}
