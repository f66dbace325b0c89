package proc

import (
	"bytes"
	"strings"
	"unicode/utf8"
)

// splitter cuts a stream of bytes into lines in bounded memory and decides what of it is logged.
//
// Rules, for a line without its newline:
//   - carriage returns at the very end belong to the line's end ("a\r\n") and are kept;
//   - if there is any other carriage return, the line is a progress line: each carriage return
//     begins a new form that replaces the one before, and only the last form is logged;
//   - once a form, its carriage returns included, exceeds the limit it is logged from its first byte, and the rest of the line
//     follows byte for byte whatever it has;
//   - a last line without a newline gets one, so that the next program to append starts on its own.
//
// So without such carriage returns the log has exactly the bytes of the input.
type splitter struct {
	limit int // of what is held back, in bytes: MaxLine outside of tests

	log  func([]byte)      // bytes for the log, in order
	line func(lineInfo)    // a line ended
	form func(form []byte) // a form of a progress line was replaced by the next one; may be nil

	cur      []byte // the current form; once long, its first limit bytes
	returns  int    // carriage returns seen since cur
	progress bool   // an earlier form was dropped
	long     bool   // the form is being logged as it comes
	size     int64  // of the line as logged so far, where long
}

// lineInfo is a finished line: its first limit bytes without newline and trailing carriage returns.
type lineInfo struct {
	head     []byte
	size     int64 // of the whole
	progress bool
}

func (s *splitter) write(b []byte) {
	for len(b) > 0 {
		if s.long {
			i := bytes.IndexByte(b, '\n')
			if i < 0 {
				s.size += int64(len(b))
				s.log(b)
				return
			}
			s.size += int64(i)
			s.log(b[:i+1])
			s.end()
			b = b[i+1:]
			continue
		}
		switch b[0] {
		case '\n':
			s.finish()
			b = b[1:]
			continue
		case '\r':
			if len(s.cur)+s.returns >= s.limit {
				s.commit()
				continue
			}
			s.returns++
			b = b[1:]
			continue
		}
		if s.returns > 0 { // something follows a carriage return: the form before it is history
			if s.form != nil && len(s.cur) > 0 {
				s.form(s.cur)
			}
			s.progress, s.returns, s.cur = true, 0, s.cur[:0]
		}
		i := bytes.IndexAny(b, "\r\n")
		if i < 0 {
			i = len(b)
		}
		if n := s.limit - len(s.cur); i > n {
			s.cur = append(s.cur, b[:n]...)
			b = b[n:]
			s.commit()
			continue
		}
		s.cur = append(s.cur, b[:i]...)
		b = b[i:]
	}
}

// commit begins to log a form that is too long to be held back.
func (s *splitter) commit() {
	s.log(s.cur)
	for range s.returns {
		s.log([]byte{'\r'})
	}
	s.size, s.long = int64(len(s.cur)+s.returns), true
}

// finish logs the held-back line at its newline.
func (s *splitter) finish() {
	s.size = int64(len(s.cur))
	s.log(s.cur)
	if !s.progress {
		for range s.returns {
			s.log([]byte{'\r'})
		}
	}
	s.log([]byte{'\n'})
	s.end()
}

func (s *splitter) end() {
	s.line(lineInfo{head: s.cur, size: s.size, progress: s.progress})
	s.cur, s.returns, s.progress, s.long, s.size = s.cur[:0], 0, false, false, 0
}

// close ends a last line that has no newline.
func (s *splitter) close() {
	switch {
	case s.long:
		s.log([]byte{'\n'})
		s.end()
	case len(s.cur) > 0 || s.returns > 0:
		s.finish()
	}
}

// valid gives b as valid UTF-8 of at most limit bytes, cut between characters.
func valid(b []byte, limit int) string {
	b = b[:min(len(b), limit)]
	// A character cut off at the end is dropped, not shown as broken: up to three bytes may be missing.
	for i := 1; i <= min(utf8.UTFMax-1, len(b)) && len(b) == limit; i++ {
		if c := b[len(b)-i]; utf8.RuneStart(c) {
			if c >= utf8.RuneSelf && !utf8.FullRune(b[len(b)-i:]) {
				b = b[:len(b)-i]
			}
			break
		}
	}
	s := strings.ToValidUTF8(string(b), "\uFFFD")
	if len(s) <= limit {
		return s
	}
	for limit > 0 && !utf8.RuneStart(s[limit]) { // each replaced byte became three
		limit--
	}
	return s[:limit]
}
