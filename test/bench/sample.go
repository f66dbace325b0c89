package main

import (
	"bytes"
	"context"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// markVar names the variable by which the processes of one run are found, wherever they have gone: its value is the run's folder.
const markVar = "BENCH_MARK"

// samples collects what all processes of a run use: those with the run's folder in their environment.
type samples struct {
	mark      string
	own       map[int]bool          // whether a pid belongs to the run; what is not there was not looked at yet
	cpu       map[int]time.Duration // by pid, the last seen
	kind      map[int]string
	peak      int64            // of all processes together at one moment: proportional set sizes, so that shared pages count once
	unweighed bool             // memory is not summed up
	anon      map[string]int64 // by role of Pergola's processes: the most anonymous memory, which the Go side holds by itself
}

func newSamples(mark string) *samples {
	return &samples{mark: mark, own: map[int]bool{}, cpu: map[int]time.Duration{}, kind: map[int]string{}, anon: map[string]int64{}}
}

// watch looks every 100 ms until ctx ends; memory, which is dear to sum, every fifth time.
func (s *samples) watch(ctx context.Context) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for i := 0; ; i++ {
		s.look(i%5 == 0 && !s.unweighed)
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (s *samples) look(memory bool) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return // no /proc, no figures
	}
	var sum int64
	alive := map[int]bool{}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		alive[pid] = true
		dir := filepath.Join("/proc", e.Name())
		own, looked := s.own[pid]
		if !looked {
			environ, err := os.ReadFile(filepath.Join(dir, "environ"))
			if err != nil || len(environ) == 0 {
				continue // it is just being started, or gone
			}
			own = bytes.Contains(environ, []byte(s.mark))
			s.own[pid] = own
		}
		if !own {
			continue
		}
		if stat, err := os.ReadFile(filepath.Join(dir, "stat")); err == nil {
			if used, ok := used(stat); ok {
				s.cpu[pid] = used
			}
		}
		if cmdline, err := os.ReadFile(filepath.Join(dir, "cmdline")); err == nil && len(cmdline) > 0 {
			s.kind[pid] = kindOf(cmdline) // read each time: a fork becomes something else by its exec
		}
		if memory {
			if rollup, err := os.ReadFile(filepath.Join(dir, "smaps_rollup")); err == nil {
				sum += kib(rollup, "Pss:")
			}
		}
		if kind, ok := strings.CutPrefix(s.kind[pid], "pergola "); ok {
			if status, err := os.ReadFile(filepath.Join(dir, "status")); err == nil {
				s.anon[kind] = max(s.anon[kind], kib(status, "RssAnon:"))
			}
		}
	}
	s.peak = max(s.peak, sum)
	maps.DeleteFunc(s.own, func(pid int, _ bool) bool { return !alive[pid] }) // a pid may come again
}

// total is the CPU time of all processes, as far as it was seen: what a process used in its last 100 ms may be missing.
func (s *samples) total() (sum time.Duration) {
	for _, d := range s.cpu {
		sum += d
	}
	return sum
}

// byKind is the CPU time by what the processes are.
func (s *samples) byKind() map[string]time.Duration {
	m := map[string]time.Duration{}
	for pid, d := range s.cpu {
		m[s.kind[pid]] += d
	}
	return m
}

// used is the CPU time in a /proc/PID/stat: fields 14 and 15, in hundredths of seconds, after a name that may have anything in it.
func used(stat []byte) (time.Duration, bool) {
	i := bytes.LastIndexByte(stat, ')')
	fields := strings.Fields(string(stat[i+1:]))
	if i < 0 || len(fields) < 13 {
		return 0, false
	}
	user, err := strconv.ParseInt(fields[11], 10, 64)
	if err != nil {
		return 0, false
	}
	system, err := strconv.ParseInt(fields[12], 10, 64)
	return time.Duration(user+system) * 10 * time.Millisecond, err == nil
}

// kib is a value of a file such as /proc/PID/status, in bytes.
func kib(file []byte, key string) int64 {
	for line := range strings.Lines(string(file)) {
		if value, ok := strings.CutPrefix(line, key); ok {
			n, err := strconv.ParseInt(strings.Fields(value)[0], 10, 64)
			if err != nil {
				return 0
			}
			return n << 10
		}
	}
	return 0
}

// kindOf says in words what a process is.
func kindOf(cmdline []byte) string {
	words := strings.Split(strings.TrimRight(string(cmdline), "\x00"), "\x00")
	program := filepath.Base(words[0])
	if program == "pergola" {
		return "pergola " + role(cmdline)
	}
	if strings.HasPrefix(program, "python") && len(words) > 1 {
		script := filepath.Base(words[1])
		if script == "boot.py" && len(words) > 2 {
			return "python " + words[2]
		}
		return script
	}
	return program
}
