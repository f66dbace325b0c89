package flower

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
)

// appLog does for a server app's output that comes by the superlink's log stream what proc does for a
// program's: file, echo, parser and the last lines. It is used by one goroutine at a time.
type appLog struct {
	s       *Server
	file    io.WriteCloser
	parser  *parser
	partial strings.Builder
	tail    []string
	closed  sync.Once
}

const (
	tailKept   = 20
	maxPartial = 64 << 10 // bytes of a line before it is broken up
)

func (s *Server) newAppLog() *appLog {
	l := &appLog{s: s, parser: newParser(ProgramServerApp)}
	open := s.cfg.OpenLog
	if open == nil {
		open = func(path string) (io.WriteCloser, error) {
			return os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
		}
	}
	f, err := open(filepath.Join(s.cfg.LogDir, ServerAppLog))
	if err != nil {
		l.failed(err)
		return l
	}
	l.file = f
	return l
}

func (l *appLog) failed(err error) {
	if l.s.cfg.OnLogError != nil {
		l.s.cfg.OnLogError(fmt.Errorf("%s: %w", ServerAppLog, err))
	}
}

func (l *appLog) write(text string) {
	for line := range strings.Lines(strings.ToValidUTF8(text, "\uFFFD")) {
		l.partial.WriteString(strings.TrimSuffix(line, "\n"))
		if strings.HasSuffix(line, "\n") || l.partial.Len() > maxPartial {
			l.flush()
		}
	}
}

func (l *appLog) flush() {
	line := l.partial.String()
	l.partial.Reset()
	// A progress bar rewrites its line; what stands there last counts.
	if i := strings.LastIndexByte(strings.TrimRight(line, "\r"), '\r'); i >= 0 {
		line = line[i+1:]
	}
	line = strings.TrimRight(line, "\r")
	if l.file != nil {
		if _, err := io.WriteString(l.file, line+"\n"); err != nil {
			l.failed(err)
			_ = l.file.Close() // the write's error was reported
			l.file = nil
		}
	}
	if echo := l.s.cfg.Echo; echo != nil {
		prefix := prefixServerApp
		if l.s.cfg.Party != "" {
			prefix += "@" + l.s.cfg.Party
		}
		_, _ = fmt.Fprintf(echo, "[%s] %s\n", prefix, line) // as with programs: the echo is for people, the log counts
	}
	line = plain(line)
	if l.tail = append(l.tail, line); len(l.tail) > tailKept {
		l.tail = l.tail[1:]
	}
	l.s.handle(l.parser.line(line))
}

// close writes what is left; it may be called more than once.
func (l *appLog) close() {
	l.closed.Do(func() {
		if l.partial.Len() > 0 {
			l.flush()
		}
		l.s.handle(l.parser.end())
		if l.file != nil {
			if err := l.file.Close(); err != nil {
				l.failed(err)
			}
		}
	})
}
