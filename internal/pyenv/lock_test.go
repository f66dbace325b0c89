package pyenv

import (
	"slices"
	"strings"
	"testing"
)

var someHash = strings.Repeat("0123456789abcdef", 4)

func TestReadLock(t *testing.T) {
	text := "# a comment\n\nflwr==1.30.0 \\\n    --hash=sha256:" + someHash + " \\\n    --hash=sha256:" + strings.Repeat("f", 64) + "\n" +
		"numpy==2.2.6 ; python_full_version < '3.11' --hash=sha256:" + someHash + "\n" +
		"own @ git+https://x.org/own@0123456\n" +
		"wheel @ https://x.org/wheel-3.1-py3-none-any.whl \\\n  --hash=sha256:" + someHash + "\n"
	pins, err := readLock(text)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, p := range pins {
		got = append(got, p.name+"="+p.version()+strings.Repeat("#", len(p.hashes)))
	}
	if want := []string{"flwr=1.30.0##", "numpy=2.2.6#", "own=", "wheel=3.1#"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	for name, bad := range map[string]string{
		"no hash":                     "flwr==1.30.0\n",
		"no exact version":            "flwr>=1.30.0 --hash=sha256:" + someHash,
		"a prefix":                    "flwr==1.30.* --hash=sha256:" + someHash,
		"an option":                   "--index-url https://evil\nflwr==1 --hash=sha256:" + someHash,
		"an option after a backslash": "flwr==1 \\\n --hash=sha256:" + someHash + " \\\n --index-url=https://evil",
		"a file":                      "-r /etc/passwd",
		"a weak hash":                 "flwr==1 --hash=md5:0123456789abcdef0123456789abcdef",
		"half a hash":                 "flwr==1 --hash=sha256:0123",
		"an open end":                 "flwr==1 --hash=sha256:" + someHash + " \\",
		"a backslash alone":           "\\\n--index-url=https://evil",
	} {
		if pins, err := readLock(bad); err == nil {
			t.Errorf("%s: got %v, want an error", name, pins)
		}
	}
}

func TestFlwrForTheInterpreter(t *testing.T) {
	lock := Lock{Flwr: "9", Text: "flwr-datasets==0.5\nflwr==1.20.0 ; python_full_version < '3.11' \\\n --hash=sha256:x\nflwr==1.41.0 ; python_full_version >= '3.11' --hash=sha256:x\n"}
	for version, want := range map[string]string{"3.10.4": "1.20.0", "3.12.0": "1.41.0"} {
		if got := lock.flwrFor(Interpreter{Version: version, Platform: "linux-x86_64"}); got != want {
			t.Errorf("flwr for Python %s is %s, want %s", version, got, want)
		}
	}
}

func TestFloor(t *testing.T) {
	for _, c := range [][3]string{
		{"", "3.12", "3.10"},
		{">=3.9", "3.12", "3.10"},
		{">=3.11,<4", "3.12", "3.11"},
		{">=3.11.4", "3.12", "3.11"},
		{"~=3.12", "3.12", "3.12"},
		{">=3.14", "3.12", "3.12"},
		{"<3.13", "3.10", "3.10"},
		{"nonsense", "3.11", "3.10"},
	} {
		if got := floor(c[0], c[1]); got != c[2] {
			t.Errorf("floor(%q, %s) = %s, want %s", c[0], c[1], got, c[2])
		}
	}
}

func TestLockFromReport(t *testing.T) {
	report := `{"version":"1","install":[
	 {"download_info":{"url":"https://i/numpy-2.0-cp311.whl","archive_info":{"hashes":{"sha256":"` + someHash + `"}}},"is_direct":false,"metadata":{"name":"numpy","version":"2.0"}},
	 {"download_info":{"url":"https://x.org/own","vcs_info":{"vcs":"git","commit_id":"abc"},"subdirectory":"sub"},"is_direct":true,"metadata":{"name":"own","version":"1"}},
	 {"download_info":{"url":"file:///w/flwr-1.30.0-py3-none-any.whl","archive_info":{"hashes":{"sha256":"` + someHash + `"}}},"is_direct":true,"metadata":{"name":"Flwr","version":"1.30.0"}}]}`
	got, err := lockFromReport([]byte(report))
	want := "Flwr @ file:///w/flwr-1.30.0-py3-none-any.whl \\\n    --hash=sha256:" + someHash + "\nnumpy==2.0 \\\n    --hash=sha256:" + someHash + "\nown @ git+https://x.org/own@abc#subdirectory=sub\n"
	if err != nil || got != want {
		t.Errorf("got %q, %v; want %q", got, err, want)
	}
	if _, err := readLock(got); err != nil {
		t.Errorf("the lock is not read: %v", err)
	}
	for name, bad := range map[string]string{
		"no JSON": "x", "no hash": `{"install":[{"download_info":{"url":"https://i/a"},"metadata":{"name":"a","version":"1"}}]}`,
		"a line break": `{"install":[{"download_info":{"url":"https://i/a"},"metadata":{"name":"a\n-r /etc/passwd","version":"1"}}]}`,
	} {
		if got, err := lockFromReport([]byte(bad)); err == nil {
			t.Errorf("%s: got %q, want an error", name, got)
		}
	}
}

func FuzzReadLock(f *testing.F) {
	f.Add("flwr==1.30.0 \\\n    --hash=sha256:" + someHash + "\n")
	f.Add("a @ git+https://x/y@z\n# c\nb==1 ; os_name=='posix' --hash=sha256:" + someHash)
	f.Add("\\\n--index-url=x")
	// What is read is written back as entries that are read as the same, and has a hash or a direct reference each.
	f.Fuzz(func(t *testing.T, text string) {
		pins, err := readLock(text)
		if err != nil {
			return
		}
		for _, p := range pins {
			line := p.String()
			for _, h := range p.hashes {
				line += " \\\n    --hash=" + h
			}
			again, err := readLock(line + "\n")
			if err != nil || len(again) != 1 || again[0].String() != p.String() || !slices.Equal(again[0].hashes, p.hashes) {
				t.Fatalf("%q is read again as %v, %v", line, again, err)
			}
			if p.url == "" && len(p.hashes) == 0 {
				t.Fatalf("%q has no hash", line)
			}
		}
	})
}

func TestMissingBound(t *testing.T) {
	for text, want := range map[string]string{
		"typer==0.12.5\nclick==8.5.1\n":  "click<8.2",
		"typer==0.12.5\nclick==8.1.8\n":  "",
		"typer==0.16.0\nclick==8.5.1\n":  "",
		"typer==0.20.0\nclick==8.10.0\n": "",
		"click==8.5.1\n":                 "",
	} {
		hash := " --hash=sha256:" + strings.Repeat("0", 64) + "\n"
		pins, err := readLock(strings.ReplaceAll(text, "\n", hash))
		if err != nil {
			t.Fatal(err)
		}
		if got := missingBound(pins); got != want {
			t.Errorf("missingBound(%q) = %q, want %q", text, got, want)
		}
	}
}
