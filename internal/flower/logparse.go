package flower

import (
	"regexp"
	"strings"
)

var escapes = regexp.MustCompile("\x1b(?:\\[[0-9;?]*[ -/]*[@-~]|\\][^\x07\x1b]*(?:\x07|\x1b\\\\)?|[@-_])")

// plain removes ANSI escapes (colours, cursor, titles).
func plain(s string) string {
	if strings.IndexByte(s, 0x1b) < 0 {
		return s
	}
	return escapes.ReplaceAllString(s, "")
}

// parser reads the lines of one program.
type parser struct {
	program string
	run     uint64
}

func newParser(program string) *parser { return &parser{program: program} }

func (p *parser) line(string) []Event { return nil }

func (p *parser) end() []Event { return nil }
