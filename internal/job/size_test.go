package job

import "testing"

func TestLimits(t *testing.T) {
	for text, want := range map[string]Size{
		"1GiB": 1 << 30, "512 MiB": 512 << 20, "1500B": 1500, "0": NoSize, "0GiB": NoSize, "2TB": 2e12,
	} {
		n, err := ParseLimit(text)
		if err != nil || n != want {
			t.Errorf("%s is %d, %v; want %d", text, n, err, want)
		}
		if again, err := ParseLimit(n.String()); err != nil || again != n {
			t.Errorf("%d is written %q, which reads as %d, %v", n, n, again, err)
		}
	}
	for _, text := range []string{"", "x", "-1", "-1GiB", "1,000", "1e9", "1XB", "99999999TiB", "0.1", "+1", "4096"} {
		if n, err := ParseLimit(text); err == nil {
			t.Errorf("%q is read as %d", text, n)
		}
	}
	for _, c := range []struct{ a, b, want Size }{
		{0, 0, 0}, {0, 5, 5}, {5, 0, 5}, {5, 7, 5}, {7, 5, 5}, {NoSize, 5, 5}, {5, NoSize, 5}, {NoSize, 0, NoSize}, {0, NoSize, NoSize}, {NoSize, NoSize, NoSize},
	} {
		if got := c.a.Least(c.b); got != c.want {
			t.Errorf("the least of %d and %d is %d, want %d", c.a, c.b, got, c.want)
		}
	}
}

// What is read is written so that it reads the same.
func FuzzParseLimit(f *testing.F) {
	for _, s := range []string{"1GiB", "0", "1.5 MB", "9223372036854775807B", "1e3"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := ParseLimit(s)
		if err != nil {
			return
		}
		if again, err := ParseLimit(n.String()); err != nil || again != n {
			t.Errorf("%q is %d, written %q, which reads as %d, %v", s, n, n, again, err)
		}
	})
}
