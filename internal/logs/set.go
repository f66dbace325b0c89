package logs

import (
	"io"
	"sync"
)

// Set has the logs of a folder that programs write to now. Several programs may have one log: each Write stays together.
type Set struct {
	Dir Dir

	mu   sync.Mutex // guards the rest
	open map[string]*shared
}

type shared struct {
	users int // guarded by the set

	mu sync.Mutex // guards w
	w  *Writer
}

// Open opens a log for a program's output, as [Dir.Open] does. It is to be closed.
func (s *Set) Open(name string) (io.WriteCloser, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	sh := s.open[name]
	if sh == nil {
		w, err := s.Dir.Open(name)
		if err != nil {
			return nil, err
		}
		if s.open == nil {
			s.open = map[string]*shared{}
		}
		sh = &shared{w: w}
		s.open[name] = sh
	}
	sh.users++
	return &handle{set: s, name: name, log: sh}, nil
}

// handle is one program's.
type handle struct {
	set    *Set
	name   string
	log    *shared
	closed sync.Once
}

// Write appends b.
func (h *handle) Write(b []byte) (int, error) {
	h.log.mu.Lock()
	defer h.log.mu.Unlock()
	return h.log.w.Write(b)
}

// Close ends the log's writing with the last of its programs.
func (h *handle) Close() (err error) {
	h.closed.Do(func() {
		h.set.mu.Lock()
		defer h.set.mu.Unlock()
		if h.log.users--; h.log.users > 0 {
			return
		}
		delete(h.set.open, h.name)
		h.log.mu.Lock()
		defer h.log.mu.Unlock()
		err = h.log.w.Close()
	})
	return err
}
