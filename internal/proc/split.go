package proc

import (
	"strings"

	"github.com/pergolafl/pergola/internal/problem"
)

// Split cuts a command into words as a shell would, without a shell: nothing is expanded, and
// operators, # and newlines in quotes are ordinary. The rules are those of Python's shlex.split,
// which the reference system uses: blank, tab, newline and carriage return part words; single
// quotes keep all; in double quotes a backslash escapes only " and \; outside it escapes anything.
// The error is a *problem.Error with code usage.
func Split(command string) ([]string, error) {
	var words []string
	var word strings.Builder
	in := false // a word has begun, maybe an empty one in quotes
	for i := 0; i < len(command); i++ {
		switch c := command[i]; c {
		case ' ', '\t', '\n', '\r':
			if in {
				words = append(words, word.String())
				word.Reset()
				in = false
			}
		case '\'':
			n := strings.IndexByte(command[i+1:], '\'')
			if n < 0 {
				return nil, unclosed(command, c)
			}
			word.WriteString(command[i+1 : i+1+n])
			in = true
			i += n + 1
		case '"':
			in = true
			for i++; ; i++ {
				if i >= len(command) {
					return nil, unclosed(command, c)
				}
				if command[i] == '"' {
					break
				}
				if command[i] == '\\' && i+1 < len(command) && (command[i+1] == '"' || command[i+1] == '\\') {
					i++
				}
				word.WriteByte(command[i])
			}
		case '\\':
			if i++; i >= len(command) {
				return nil, problem.New(problem.Usage, `write \\ for a backslash`, "the command %q ends with a backslash", command)
			}
			in = true
			word.WriteByte(command[i])
		default:
			in = true
			word.WriteByte(c)
		}
	}
	if in {
		words = append(words, word.String())
	}
	return words, nil
}

func unclosed(command string, quote byte) error {
	return problem.New(problem.Usage, "close the quote, or put a backslash before it", "the command %q has a %c without its other half", command, quote)
}

// Join writes words so that Split, and a shell, give them back.
func Join(words []string) string {
	quoted := make([]string, len(words))
	for i, w := range words {
		if w == "" || strings.IndexFunc(w, special) >= 0 {
			w = "'" + strings.ReplaceAll(w, "'", `'\''`) + "'"
		}
		quoted[i] = w
	}
	return strings.Join(quoted, " ")
}

// special tells whether a shell could see more than itself in r.
func special(r rune) bool {
	return !strings.ContainsRune("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_@%+=:,./-", r)
}
