package job

import (
	"strconv"
	"strings"
	"time"

	"github.com/pergolafl/pergola/internal/problem"
)

// Duration is a time span as a specification gives it. The zero value means that nobody said
// anything, so that a default may take its place; "0" is [NoLimit] and stays.
type Duration time.Duration

// NoLimit is what "0" means: none of it.
const NoLimit Duration = -1

// ParseDuration reads "90s", "6h", "1h30m", "2d" or "0". A day has 24 hours. Negative and empty
// ones are refused; the problem has the code usage.
func ParseDuration(s string) (Duration, error) {
	rest, days := s, time.Duration(0)
	if before, after, ok := strings.Cut(s, "d"); ok {
		n, err := strconv.ParseUint(before, 10, 16)
		if err != nil || n > 36500 {
			return 0, durationProblem(s)
		}
		days, rest = time.Duration(n)*24*time.Hour, after
		if rest == "" {
			rest = "0"
		}
	}
	d, err := time.ParseDuration(rest)
	if err != nil || d < 0 || strings.HasPrefix(rest, "+") || d+days < 0 {
		return 0, durationProblem(s)
	}
	if d += days; d > 0 {
		return Duration(d), nil
	}
	if strings.ContainsAny(s, "123456789") { // less than a nanosecond is not none
		return 0, durationProblem(s)
	}
	return NoLimit, nil
}

func durationProblem(s string) error {
	if len(s) > 40 {
		s = s[:40] + "…"
	}
	return problem.New(problem.Usage, durationRule, "%q is not a duration", s)
}

const durationRule = `write it like "90s", "15m", "6h" or "2d"; "0" means no limit`

// Std gives the span for timers: 0 where there is none or nobody said anything.
func (d Duration) Std() time.Duration { return time.Duration(max(d, 0)) }

// Or gives d, or the default where nobody said anything.
func (d Duration) Or(def Duration) Duration {
	if d == 0 {
		return def
	}
	return d
}

// String gives the shortest form that ParseDuration reads back: "6h", "1m30s", "0" for none, and
// "" where nobody said anything.
func (d Duration) String() string {
	if d == 0 {
		return ""
	}
	if d < 0 {
		return "0"
	}
	s := time.Duration(d).String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// MarshalText gives String.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText reads what MarshalText gives.
func (d *Duration) UnmarshalText(b []byte) error {
	if len(b) == 0 {
		*d = 0
		return nil
	}
	v, err := ParseDuration(string(b))
	if err == nil {
		*d = v
	}
	return err
}
