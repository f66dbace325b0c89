package flower

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/pergolafl/pergola/internal/problem"
)

// RunConfig gives what the overrides say as pairs that say the same on every machine, one per key: files among them are read now. The
// keys and values are those of [ParseRunConfig].
func RunConfig(overrides []string) ([]string, error) {
	values, err := ParseRunConfig(overrides)
	if err != nil {
		return nil, err
	}
	var pairs []string
	for _, key := range slices.Sorted(maps.Keys(values)) {
		pairs = append(pairs, tomlPair(key, values[key]))
	}
	return pairs, nil
}

// SplitArgs takes the run config (--run-config, -c) out of a server app's arguments.
func SplitArgs(args []string) (rest, overrides []string, err error) {
	flag := "" // whose value is next
	for _, arg := range args {
		name, value, joined := strings.Cut(arg, "=")
		switch {
		case flag != "":
			overrides, flag = append(overrides, arg), ""
		case joined && name == "--run-config":
			overrides = append(overrides, value)
		case arg == "--run-config" || arg == "-c":
			flag = arg
		default:
			rest = append(rest, arg)
		}
	}
	if flag != "" {
		return nil, nil, problem.New(problem.Usage, "give it a value: --run-config 'rounds=3'", "the server app's argument %s has no value", flag)
	}
	return rest, overrides, nil
}

var bareKey = regexp.MustCompile(`^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$`)

// tomlPair writes key=value so that every flwr reads it as it is meant, "" if the value is of another type. All of them cut the text
// into pairs before they look at it as TOML, at spaces outside of quotes (pairForm) or, in 1.10, at each comma, and none knows escaped
// quotes. So what they cut at is written as an escape.
func tomlPair(key string, value any) string {
	v := tomlValue(value)
	if v == "" || key == "" {
		return ""
	}
	if !bareKey.MatchString(key) {
		key = tomlText(key, " \t=,'")
	}
	return key + "=" + v
}

// tomlValue writes a value as TOML, "" if it is none that Flower passes on.
func tomlValue(v any) string {
	switch v := v.(type) {
	case string:
		if !strings.ContainsFunc(v, func(r rune) bool { return r == '\'' || r == ',' || r < ' ' || r == 0x7f }) {
			return "'" + v + "'" // literal: no escapes
		}
		return tomlText(v, ",")
	case float64:
		s := strconv.FormatFloat(v, 'g', -1, 64)
		if !strings.ContainsAny(s, ".eIN") {
			s += ".0"
		}
		return strings.ToLower(s)
	case float32:
		return tomlValue(float64(v))
	case int, int64, int32, uint, uint32, uint64, bool:
		return fmt.Sprint(v)
	}
	return ""
}

// tomlText writes a basic string without a quote, or one of the other characters, in it: those are escaped by their number.
func tomlText(s, other string) string {
	var b strings.Builder
	b.WriteByte('"')
	for _, r := range s {
		if r < ' ' || r == 0x7f || r == '"' || r == '\\' || strings.ContainsRune(other, r) {
			fmt.Fprintf(&b, `\u%04X`, r)
		} else {
			b.WriteRune(r)
		}
	}
	b.WriteByte('"')
	return b.String()
}
