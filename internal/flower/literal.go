package flower

import (
	"errors"
	"math"
	"strconv"
	"strings"
)

// tuple is a Python tuple; lists are []any, dicts are []pair in their order.
type (
	tuple []any
	pair  struct{ key, value any }
)

const (
	maxLiteral = 1 << 20 // bytes of a literal that are looked at
	maxDepth   = 16
)

var errLiteral = errors.New("not a Python literal")

// parseLiteral reads what Python's repr writes for dicts, lists, tuples, texts and numbers, also inside
// of calls such as np.float64(0.5). It gives what follows the literal too.
func parseLiteral(s string) (v any, rest string, err error) {
	if len(s) > maxLiteral {
		return nil, s, errLiteral
	}
	l := literal{s: s}
	v, err = l.value(0)
	return v, s[l.i:], err
}

type literal struct {
	s string
	i int
}

func (l *literal) space() {
	for l.i < len(l.s) && strings.IndexByte(" \t\r\n", l.s[l.i]) >= 0 {
		l.i++
	}
}

func (l *literal) take(b byte) bool {
	l.space()
	if l.i < len(l.s) && l.s[l.i] == b {
		l.i++
		return true
	}
	return false
}

func (l *literal) value(depth int) (any, error) {
	if depth > maxDepth {
		return nil, errLiteral
	}
	l.space()
	if l.i >= len(l.s) {
		return nil, errLiteral
	}
	switch c := l.s[l.i]; c {
	case '{':
		return l.dict(depth)
	case '[':
		l.i++
		return l.items(']', depth)
	case '(':
		l.i++
		items, err := l.items(')', depth)
		return tuple(items), err
	case '\'', '"':
		return l.text(c)
	}
	start := l.i
	for l.i < len(l.s) && (isWord(l.s[l.i]) || strings.IndexByte("+-.", l.s[l.i]) >= 0) {
		l.i++
	}
	word := l.s[start:l.i]
	if word == "" {
		return nil, errLiteral
	}
	if l.i < len(l.s) && l.s[l.i] == '(' { // np.float64(0.5), tensor(0.5)
		l.i++
		args, err := l.items(')', depth)
		if err != nil || len(args) == 0 {
			return nil, errLiteral
		}
		return args[0], nil
	}
	switch word {
	case "True":
		return true, nil
	case "False":
		return false, nil
	case "None":
		return nil, nil
	case "nan", "-nan":
		return math.NaN(), nil
	case "inf":
		return math.Inf(1), nil
	case "-inf":
		return math.Inf(-1), nil
	}
	f, err := strconv.ParseFloat(word, 64)
	if err != nil && !errors.Is(err, strconv.ErrRange) {
		return nil, errLiteral
	}
	return f, nil
}

func (l *literal) items(end byte, depth int) ([]any, error) {
	var items []any
	for {
		if l.take(end) {
			return items, nil
		}
		v, err := l.value(depth + 1)
		if err != nil {
			return nil, err
		}
		items = append(items, v)
		if l.take('=') { // a keyword argument: its value is dropped
			if _, err := l.value(depth + 1); err != nil {
				return nil, err
			}
			items = items[:len(items)-1]
		}
		if !l.take(',') {
			if l.take(end) {
				return items, nil
			}
			return nil, errLiteral
		}
	}
}

func (l *literal) dict(depth int) ([]pair, error) {
	l.i++
	var pairs []pair
	for {
		if l.take('}') {
			return pairs, nil
		}
		k, err := l.value(depth + 1)
		if err != nil {
			return nil, err
		}
		if !l.take(':') {
			return nil, errLiteral
		}
		v, err := l.value(depth + 1)
		if err != nil {
			return nil, err
		}
		pairs = append(pairs, pair{k, v})
		if !l.take(',') {
			if l.take('}') {
				return pairs, nil
			}
			return nil, errLiteral
		}
	}
}

func (l *literal) text(quote byte) (string, error) {
	l.i++
	var b strings.Builder
	for l.i < len(l.s) {
		c := l.s[l.i]
		l.i++
		switch {
		case c == quote:
			return b.String(), nil
		case c == '\\' && l.i < len(l.s):
			b.WriteByte(l.s[l.i]) // enough for names of metrics
			l.i++
		default:
			b.WriteByte(c)
		}
	}
	return "", errLiteral
}

func isWord(c byte) bool {
	return c == '_' || c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
}

// number gives v as a metric's value.
func number(v any) (float64, bool) {
	switch v := v.(type) {
	case float64:
		return v, true
	case bool:
		if v {
			return 1, true
		}
		return 0, true
	}
	return 0, false
}

// numbers gives the entries of a dict whose values are numbers.
func numbers(v any) map[string]float64 {
	pairs, _ := v.([]pair)
	out := map[string]float64{}
	for _, p := range pairs {
		if key, ok := p.key.(string); ok {
			if f, ok := number(p.value); ok {
				out[key] = f
			}
		}
	}
	return out
}
