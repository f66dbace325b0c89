package proc

import (
	"fmt"
	"io"
	"os"
	"sync"
)

// sink is where the lines of a program go: log, echo, OnLine and the tail.
type sink struct {
	spec *Spec

	mu     sync.Mutex     // held while lines are handed on, so that two streams take turns; guards log, out, noEcho
	log    io.WriteCloser // nil if none, or given up
	out    []byte         // collected for the log, written before the next read from the program
	noEcho bool

	tailMu sync.Mutex // apart from mu, so that OnLine may ask for the tail
	tail   []string   // the last tailLines lines, oldest first
}

func newSink(spec *Spec) (*sink, error) {
	s := &sink{spec: spec}
	if spec.Log != "" {
		open := spec.OpenLog
		if open == nil {
			open = appendTo
		}
		f, err := open(spec.Log)
		if err != nil {
			return nil, err
		}
		s.log = f
	}
	return s, nil
}

func appendTo(path string) (io.WriteCloser, error) {
	return os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
}

// splitter gives a splitter of one stream into this sink; its methods are for [sink.feed].
func (s *sink) splitter() *splitter {
	sp := &splitter{limit: MaxLine, log: s.collect, line: s.line}
	if s.spec.Progress && s.spec.Echo != nil {
		sp.form = func(form []byte) { s.echo("\r" + s.prefix() + valid(form, MaxLine)) }
	}
	return sp
}

// feed splits b, and what ends in it is in the log when feed returns.
func (s *sink) feed(sp *splitter, b []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	sp.write(b)
	s.flushLocked()
}

func (s *sink) end(sp *splitter) {
	s.mu.Lock()
	defer s.mu.Unlock()
	sp.close()
	s.flushLocked()
}

// close closes the log; the disk may report only now what it could not store.
func (s *sink) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.log != nil {
		err := s.log.Close()
		s.log = nil
		if err != nil {
			s.logFailed(err)
		}
	}
}

func (s *sink) collect(b []byte) {
	if s.log == nil {
		return
	}
	s.out = append(s.out, b...)
	if len(s.out) >= 2*MaxLine {
		s.flushLocked()
	}
}

func (s *sink) flushLocked() {
	if s.log == nil || len(s.out) == 0 {
		return
	}
	_, err := s.log.Write(s.out)
	s.out = s.out[:0]
	if err != nil {
		// Later lines might fit again, but after a hole: who reads the log could not tell.
		_ = s.log.Close() // the write's error is the one to tell
		s.log = nil
		s.logFailed(err)
	}
}

func (s *sink) logFailed(err error) {
	if s.spec.OnLogError != nil {
		s.spec.OnLogError(fmt.Errorf("write the log of %s: %w", s.spec.Name, err))
	}
}

func (s *sink) prefix() string {
	if s.spec.Prefix == "" {
		return ""
	}
	return "[" + s.spec.Prefix + "] "
}

func (s *sink) line(l lineInfo) {
	text := valid(l.head, MaxLine)
	s.keep(valid(l.head, tailBytes))
	if s.spec.Echo != nil {
		start, more := s.prefix(), ""
		if l.progress && s.spec.Progress {
			start = "\r" + start
		}
		if l.size > MaxLine {
			more = fmt.Sprintf(" … (%d bytes in all)", l.size)
		}
		s.echo(start + text + more + "\n")
	}
	if s.spec.OnLine != nil {
		s.flushLocked() // what OnLine is told of is in the log by then
		s.spec.OnLine(text)
	}
}

// echo gives up at the first error: the echo is a courtesy, and a terminal that went away is no
// reason to stop anything.
func (s *sink) echo(text string) {
	if s.noEcho {
		return
	}
	if _, err := io.WriteString(s.spec.Echo, text); err != nil {
		s.noEcho = true
	}
}

func (s *sink) keep(line string) {
	s.tailMu.Lock()
	defer s.tailMu.Unlock()
	if len(s.tail) == tailLines {
		copy(s.tail, s.tail[1:])
		s.tail = s.tail[:tailLines-1]
	}
	s.tail = append(s.tail, line)
}

func (s *sink) last(n int) []string {
	s.tailMu.Lock()
	defer s.tailMu.Unlock()
	n = max(0, min(n, len(s.tail)))
	return append([]string(nil), s.tail[len(s.tail)-n:]...)
}

// note puts a remark of ours into the log and the tail, as a line of its own.
func (s *sink) note(err error) {
	sp := s.splitter()
	s.feed(sp, []byte("pergola: "+err.Error()))
	s.end(sp)
}
