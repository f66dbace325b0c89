package proc

import (
	"bytes"
	"strings"
	"testing"
	"unicode/utf8"
)

// runSplitter feeds the input in pieces of the given size and gives the log and the lines' heads.
func runSplitter(in []byte, limit, piece int) (log []byte, heads []string) {
	s := &splitter{
		limit: limit,
		log:   func(b []byte) { log = append(log, b...) },
		line:  func(l lineInfo) { heads = append(heads, string(l.head)) },
	}
	for len(in) > 0 {
		n := min(piece, len(in))
		s.write(in[:n])
		in = in[n:]
	}
	s.close()
	return log, heads
}

// logged is the rule of the splitter in a few lines, for a whole line without its newline.
func logged(line string, limit int) string {
	if !strings.Contains(strings.TrimRight(line, "\r"), "\r") {
		return line
	}
	last := ""
	for rest := line; rest != ""; {
		n := strings.IndexByte(rest, '\r')
		if n < 0 {
			n = len(rest)
		}
		end := n + len(rest[n:]) - len(strings.TrimLeft(rest[n:], "\r"))
		if end > limit {
			return rest
		}
		last, rest = rest[:n], rest[end:]
	}
	return last
}

func TestLines(t *testing.T) {
	for _, c := range []struct {
		name, in, log, heads string // heads joined by |
	}{
		{"nothing", "", "", ""},
		{"lines", "a\nb\n", "a\nb\n", "a|b"},
		{"empty lines", "\n\n", "\n\n", "|"},
		{"the last newline is missing", "a\nb", "a\nb\n", "a|b"},
		{"Windows ends", "a\r\n\r\nb\r\r\n", "a\r\n\r\nb\r\r\n", "a||b"},
		{"progress", "\r1%\r2%\r3%\n", "3%\n", "3%"},
		{"progress that ends with a carriage return", "1%\r2%\r\nx\n", "2%\nx\n", "2%|x"},
		{"progress without an end", "1%\r2%", "2%\n", "2%"},
		{"starts with a carriage return", "\ra\n", "a\n", "a"},
		{"only carriage returns at the end", "a\n\r", "a\n\r\n", "a|"},
		{"not UTF-8", "\xff\xfe\x00\n", "\xff\xfe\x00\n", "\xff\xfe\x00"},
		{"a line of the limit", "0123456789\n", "0123456789\n", "0123456789"},
		{"a long line", "0123456789abc\nx\n", "0123456789abc\nx\n", "0123456789|x"},
		{"a long line keeps its carriage returns", "0123456789abc\rdef\r\n", "0123456789abc\rdef\r\n", "0123456789"},
		{"a long form", "1%\r0123456789abc\rd\n", "0123456789abc\rd\n", "0123456789"},
		{"many carriage returns", "a\r\r\r\r\r\r\r\r\r\r\rb\n", "a\r\r\r\r\r\r\r\r\r\r\rb\n", "a"},
	} {
		for _, piece := range []int{1, 2, 7, 1000} {
			log, heads := runSplitter([]byte(c.in), 10, piece)
			if string(log) != c.log || strings.Join(heads, "|") != c.heads {
				t.Errorf("%s, in pieces of %d: log %q, lines %q\nwant %q, %q", c.name, piece, log, heads, c.log, c.heads)
			}
		}
	}
}

// FuzzLines: however the bytes come, the log has what the rule says; without carriage returns that
// is the input itself. Nothing longer than the limit is held, and what listeners get is valid.
func FuzzLines(f *testing.F) {
	f.Add([]byte("a\r\nb\rc\n\xff"), 3, 2)
	f.Add([]byte("1%\r2%\r3%\r\n"), 64, 1)
	f.Add([]byte("0123456789abc\rdef\r\n\r\r\r\r"), 4, 5)
	f.Fuzz(func(t *testing.T, in []byte, limit, piece int) {
		limit, piece = 1+abs(limit)%100, 1+abs(piece)%200
		log, heads := runSplitter(in, limit, piece)
		var want bytes.Buffer
		n := 0
		if len(in) > 0 {
			for line := range strings.SplitSeq(strings.TrimSuffix(string(in), "\n"), "\n") {
				want.WriteString(logged(line, limit) + "\n")
				n++
			}
		}
		if !bytes.Equal(log, want.Bytes()) {
			t.Errorf("%q, limit %d, pieces of %d: log\n%q, want\n%q", in, limit, piece, log, want.Bytes())
		}
		if !bytes.ContainsRune(in, '\r') && string(log) != strings.TrimSuffix(string(in), "\n")+"\n" && len(in) > 0 {
			t.Errorf("%q became %q", in, log)
		}
		if len(heads) != n {
			t.Errorf("%d lines, want %d", len(heads), n)
		}
		for _, h := range heads {
			if v := valid([]byte(h), limit); len(h) > limit || len(v) > limit || !utf8.ValidString(v) {
				t.Errorf("head %q, shown as %q with limit %d", h, v, limit)
			}
		}
	})
}

func abs(n int) int {
	if n < 0 {
		return -(n + 1)
	}
	return n
}

func TestValid(t *testing.T) {
	for _, c := range []struct {
		in    string
		limit int
		want  string
	}{
		{"abc", 10, "abc"},
		{"abc", 2, "ab"},
		{"aé", 2, "a"},
		{"aé", 3, "aé"},
		{"a\U0001F600", 4, "a"},
		{"a\xffb", 10, "a\uFFFDb"},
		{"\xff\xfe", 10, "\uFFFD"}, // a run becomes one
		{"a\xffb", 3, "a"},
		{"a\xc3", 10, "a\uFFFD"},
		{"", 0, ""},
	} {
		if got := valid([]byte(c.in), c.limit); got != c.want {
			t.Errorf("valid(%q, %d) = %q, want %q", c.in, c.limit, got, c.want)
		}
	}
}
