package job

import (
	"cmp"

	"github.com/pergolafl/pergola/internal/problem"
)

// Size is a number of bytes as a specification gives it. The zero value means that nobody said anything, so that a default may
// take its place; "0" is [NoSize] and stays.
type Size int64

// NoSize is what "0" means: no limit.
const NoSize Size = -1

const limitRule = `write it like "512MiB", "20GiB" or "1TB"; "0" means no limit`

// ParseLimit reads a number of bytes as ParseSize does, or "0".
func ParseLimit(s string) (Size, error) {
	if s == "0" {
		return NoSize, nil
	}
	n, err := ParseSize(s)
	if err != nil {
		return 0, problem.New(problem.Usage, limitRule, "%s", problem.From(err).Msg)
	}
	if n == 0 {
		return NoSize, nil
	}
	return Size(n), nil
}

// Bytes gives the number: 0 where there is no limit or nobody said anything.
func (s Size) Bytes() int64 { return int64(max(s, 0)) }

// Or gives s, or the default where nobody said anything.
func (s Size) Or(def Size) Size {
	if s == 0 {
		return def
	}
	return s
}

// Least gives the smaller of two limits; one that nobody has set counts for nothing.
func (s Size) Least(o Size) Size {
	switch {
	case s == 0 || s < 0 && o > 0:
		return cmp.Or(o, s)
	case o <= 0:
		return s
	}
	return min(s, o)
}

// String gives a form that ParseLimit reads back to the same number: "1GiB", "1500B", "0" for no limit, and "" where nobody
// said anything.
func (s Size) String() string {
	switch {
	case s == 0:
		return ""
	case s < 0:
		return "0"
	}
	return FormatSize(int64(s))
}

// MarshalText gives String.
func (s Size) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText reads what MarshalText gives.
func (s *Size) UnmarshalText(b []byte) error {
	if len(b) == 0 {
		*s = 0
		return nil
	}
	v, err := ParseLimit(string(b))
	if err == nil {
		*s = v
	}
	return err
}
