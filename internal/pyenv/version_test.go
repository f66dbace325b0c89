package pyenv

import (
	"slices"
	"testing"
)

// The order is that of PEP 440's own examples.
func TestVersionsAreOrdered(t *testing.T) {
	ordered := []string{
		"0.9", "1.0.dev456", "1.0a1", "1.0a2.dev456", "1.0a12.dev456", "1.0a12", "1.0b1.dev456", "1.0b2", "1.0b2.post345.dev456", "1.0b2.post345",
		"1.0rc1.dev456", "1.0rc1", "1.0", "1.0+abc.5", "1.0+abc.7", "1.0+5", "1.0.post456.dev34", "1.0.post456", "1.0.15", "1.1.dev1", "1.10",
		"99999999999999999999999", "1!0.1",
	}
	for i, a := range ordered {
		for j, b := range ordered {
			v, ok1 := parseVersion(a)
			w, ok2 := parseVersion(b)
			if !ok1 || !ok2 {
				t.Fatalf("%q or %q is not read", a, b)
			}
			if got, want := v.compare(w), min(1, max(-1, i-j)); got != want {
				t.Errorf("compare(%s, %s) = %d, want %d", a, b, got, want)
			}
		}
	}
}

func TestVersionsAreNormalised(t *testing.T) {
	for text, want := range map[string]string{
		"1.0": "1.0", "v1.0": "1.0", "01.002": "1.2", "1.0-ALPHA_1": "1.0a1", "1.0c1": "1.0rc1", "1.0preview": "1.0rc0", "1.0-1": "1.0.post1",
		"1.0.rev": "1.0.post0", "1.0.r4": "1.0.post4", "1.0dev": "1.0.dev0", "1.0+Ubuntu-1": "1.0+ubuntu.1", " 1!2 ": "1!2",
	} {
		if v, ok := parseVersion(text); !ok || v.String() != want {
			t.Errorf("parseVersion(%q) = %v %v, want %s", text, v, ok, want)
		}
	}
	for _, text := range []string{"", "a", "1.", "1..2", "1.0.*", "1.0 2", "1.0+", "^1.0", "1.0-"} {
		if v, ok := parseVersion(text); ok {
			t.Errorf("parseVersion(%q) = %v, want none", text, v)
		}
	}
}

func TestSpecifiers(t *testing.T) {
	for _, c := range []struct {
		specs    string
		yes, not []string
	}{
		{"", []string{"1", "weird"}, nil},
		{">=1.3", []string{"1.3", "1.3.0", "2", "1.3.post1", "1.3+cpu"}, []string{"1.2.9", "1.3rc1", "weird"}},
		{">=1.20,<2.0", []string{"1.20", "1.99"}, []string{"2.0", "1.3", "2.0rc1", "2.0.dev1"}},
		{"==1.30", []string{"1.30.0", "1.30", "1.30+cu121"}, []string{"1.30.1", "1.30rc1"}},
		{"==2.1.0+cpu", []string{"2.1.0+cpu", "2.1+CPU"}, []string{"2.1.0", "2.1.0+cu"}},
		{"==1.1.*", []string{"1.1", "1.1.post1", "1.1a1", "1.1.7"}, []string{"1.10", "1", "2.1.1", "1!1.1"}},
		{"!=1.1.*", []string{"1.2"}, []string{"1.1.1"}},
		{"~=2.2", []string{"2.2", "2.3", "2.99.1"}, []string{"3.0", "2.1", "2.2rc1"}},
		{"~=1.4.5", []string{"1.4.5", "1.4.9"}, []string{"1.5", "1.4.4"}},
		{">1.7", []string{"1.7.1", "1.8"}, []string{"1.7", "1.7.0.post1", "1.7+local"}},
		{">1.7.post2", []string{"1.7.post3"}, []string{"1.7.post2"}},
		{"<1.7", []string{"1.6"}, []string{"1.7", "1.7a1", "1.7.dev1"}},
		{"<1.7a2", []string{"1.7a1"}, []string{"1.7a2"}},
		{"<=1.7", []string{"1.7+x", "1.6"}, []string{"1.7.post1"}},
		{"===weird", []string{"WEIRD"}, []string{"1"}},
		{" >= 1 , != 1.5 , ", []string{"1.4"}, []string{"1.5", "0"}},
	} {
		list, err := parseSpecifiers(c.specs)
		if err != nil {
			t.Errorf("%q: %v", c.specs, err)
			continue
		}
		for _, v := range c.yes {
			if !meets(list, v) {
				t.Errorf("%s does not meet %q", v, c.specs)
			}
		}
		for _, v := range c.not {
			if meets(list, v) {
				t.Errorf("%s meets %q", v, c.specs)
			}
		}
	}
	for _, bad := range []string{"1.0", "^1.0", "=1.0", "=>1", ">=", ">=1.*", "~=1", "==1a1.*", ">=1+local", "==1.0;", ",>1", ">1,,<2", ">=x"} {
		if list, err := parseSpecifiers(bad); err == nil {
			t.Errorf("parseSpecifiers(%q) = %v, want an error", bad, list)
		}
	}
}

func FuzzSpecifiers(f *testing.F) {
	for _, s := range []string{"", ">=1.3", "==1.*", "~=1.4.5,!=1.4.7", "===x", "<1!2.3rc4.post5.dev6", "==1+a.1"} {
		f.Add(s, "1.4.5")
	}
	// What is read keeps its meaning when it is written and read again, and comparing is antisymmetric.
	f.Fuzz(func(t *testing.T, specs, text string) {
		list, err := parseSpecifiers(specs)
		if err != nil {
			return
		}
		for _, s := range list {
			again, err := parseSpecifiers(s.String())
			if err != nil || len(again) != 1 || !slices.Equal(again[0].v.release, s.v.release) {
				t.Fatalf("%q is not read as it was written: %v %v", s, again, err)
			}
			if meets(again, text) != meets([]specifier{s}, text) {
				t.Fatalf("%q means something else when read again, for %q", s, text)
			}
			if v, ok := parseVersion(text); ok && v.compare(s.v) != -s.v.compare(v) {
				t.Fatalf("%q and %q are not ordered", text, s.text)
			}
		}
	})
}
