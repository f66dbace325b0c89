package pyenv

import (
	"slices"
	"strings"
	"testing"

	"github.com/pergolafl/pergola/internal/problem"
)

func TestRequirements(t *testing.T) {
	for line, want := range map[string]string{
		"numpy":                              "numpy",
		"  Flask_RESTful >= 1.0 , < 2 ":      "flask-restful>=1.0,<2",
		"flwr[simulation, REST]==1.30.0":     "flwr[rest,simulation]==1.30.0",
		"flwr[]":                             "flwr",
		"zope.interface (>=4.0)":             "zope-interface>=4.0",
		"tomli; python_version<'3.11'":       "tomli ; python_version<'3.11'",
		"a @ https://x.org/a-1.0.tar.gz#b=c": "a @ https://x.org/a-1.0.tar.gz#b=c",
		"a@git+https://x.org/a@main":         "a @ git+https://x.org/a@main",
		"a @ file:///w/a.whl ; os_name=='posix' and (extra == \"x\" or 'linux' in sys_platform)": "a @ file:///w/a.whl ; os_name=='posix' and (extra == \"x\" or 'linux' in sys_platform)",
		"a @ https://x.org/a;b": "a @ https://x.org/a;b",
	} {
		r, err := parseRequirement(line)
		if err != nil || r.String() != want {
			t.Errorf("parseRequirement(%q) = %q, %v; want %q", line, r, err, want)
		}
	}
	for _, line := range []string{
		"-r other.txt", "--index-url=https://evil", "./local", "/abs/path", "", "numpy\n--index-url https://evil", "numpy^1.0", "numpy>=", "numpy 1.0",
		"numpy[", "numpy[a b]", "numpy[-]", "numpy @ ", "numpy @ nothing", "numpy @ https://x y", "numpy @ https://x\\", "numpy;", "numpy; python > '3'",
		"numpy; python_version", "numpy; python_version > '3", "numpy; python_version > '3' and", "numpy; (python_version > '3'", "numpy; os_name == 'a' or or",
		"numpy; " + strings.Repeat("(", 100) + "os_name=='a'" + strings.Repeat(")", 100), "нумпи", "numpy # comment", "numpy>=1;os_name=='a' # x", "_x",
		strings.Repeat("a", maxRequirement+1), "numpy (>=1", "numpy\x00",
	} {
		if r, err := parseRequirement(line); err == nil {
			t.Errorf("parseRequirement(%.80q) = %q, want an error", line, r)
		}
	}
}

func TestMarkers(t *testing.T) {
	in := Interpreter{Version: "3.10.13", Platform: "linux-x86_64-cpython-310-x86_64-linux-gnu"}
	env := in.markerEnv()
	for text, want := range map[string]bool{
		"python_version < '3.11'":                                            true,
		"python_version < '3.9'":                                             false, // as text it would be true
		"python_full_version >= '3.10.9'":                                    true,
		"'3.10' == python_version":                                           true,
		"python_version in '3.9 3.10'":                                       true,
		"python_version not in '3.9 3.11'":                                   true,
		"python_full_version == '3.10.*'":                                    true,
		"python_version ~= '3.8'":                                            true,
		"sys_platform == 'win32'":                                            false,
		"sys_platform != 'win32' and platform_machine == 'x86_64'":           true,
		"os_name == 'nt' or os.name == 'posix' and 'Linux'==platform_system": true,
		"(os_name == 'nt' or os_name == 'posix') and sys_platform=='darwin'": false,
		"platform_python_implementation != 'PyPy'":                           true,
		"extra == 'dev'":                                                     false,
		"platform_release >= '6-generic'":                                    false,
	} {
		m, err := parseMarker(text)
		if err != nil {
			t.Errorf("%s: %v", text, err)
		} else if got := m.eval(env); got != want {
			t.Errorf("%s is %v, want %v", text, got, want)
		}
	}
}

func TestNormalise(t *testing.T) {
	for _, c := range []struct {
		name string
		req  Requirements
		want []string
	}{
		{"an app that names no flwr gets it", Requirements{Names: []string{"numpy"}}, []string{"flwr", "numpy"}},
		{"nothing at all", Requirements{}, []string{"flwr"}},
		{"simulation is dropped", Requirements{Names: []string{"flwr[simulation]>=1.20", "Numpy>=2"}}, []string{"flwr>=1.20", "numpy>=2"}},
		{"other extras stay", Requirements{Names: []string{"flwr[rest,simulation]"}}, []string{"flwr[rest]"}},
		{"simulation is kept when asked for", Requirements{Names: []string{"flwr[simulation]"}, Simulation: true}, []string{"flwr[simulation]"}},
		{"simulation is added when asked for", Requirements{Names: []string{"flwr[rest]>1"}, Simulation: true}, []string{"flwr[rest,simulation]>1"}},
		{"simulation without flwr", Requirements{Simulation: true, Flwr: "1.30.0"}, []string{"flwr[simulation]==1.30.0"}},
		{"--flwr replaces", Requirements{Names: []string{"flwr[simulation,rest]>=1.20,<1.25", "numpy"}, Flwr: "v1.30.0"}, []string{"flwr[rest]==1.30.0", "numpy"}},
		{"--flwr replaces every line", Requirements{Names: []string{"flwr==1.2; python_version<'3.11'", "flwr==1.3; python_version>='3.11'"}, Flwr: "1.30"}, []string{"flwr==1.30"}},
		{"--flwr replaces a nightly and a URL", Requirements{Names: []string{"flwr-nightly", "flwr @ https://x.org/f.whl"}, Flwr: "1.41.0"}, []string{"flwr==1.41.0"}},
		{"the nightly is a flwr", Requirements{Names: []string{"flwr-nightly[simulation]"}}, []string{"flwr-nightly"}},
		{"the same line twice, and blank ones", Requirements{Names: []string{"numpy", " NumPy ", "", "flwr"}}, []string{"flwr", "numpy"}},
		{"ray that the app itself names stays", Requirements{Names: []string{"ray", "flwr-datasets[vision]>=0.5"}}, []string{"flwr", "flwr-datasets[vision]>=0.5", "ray"}},
	} {
		got, err := c.req.Normalise()
		if err != nil || !slices.Equal(got, c.want) {
			t.Errorf("%s: got %q, %v; want %q", c.name, got, err, c.want)
		}
	}
	for _, c := range []struct {
		req  Requirements
		code problem.Code
		word string
	}{
		{Requirements{Names: []string{"numpy", "scikit learn"}}, problem.AppInvalid, `"scikit learn"`},
		{Requirements{Flwr: "latest"}, problem.Usage, `"latest"`},
		{Requirements{Flwr: "1.30.*"}, problem.Usage, "1.30.*"},
		{Requirements{RequiresPython: "3.10"}, problem.AppInvalid, "requires-python"},
		{Requirements{Names: make([]string, maxRequirements+1)}, problem.AppInvalid, "limit"},
	} {
		if _, err := c.req.Normalise(); problem.CodeOf(err) != c.code || !strings.Contains(err.Error(), c.word) {
			t.Errorf("%.80v: got %v, want %s with %s", c.req, err, c.code, c.word)
		}
	}
}

func FuzzRequirement(f *testing.F) {
	for _, s := range []string{
		"numpy", "flwr[simulation]>=1.20,<2", "a @ git+https://x/y@z ; python_version<'3.11'", "x (>=1.0)", "tomli;python_version<'3.11' and (extra=='a' or os_name not in \"nt\")",
		"-r x", "a\\\n", "a @ file:///x#sha256=1", "a===weird", "a==1.*",
	} {
		f.Add(s)
	}
	// What is read is one harmless line of a requirements file, and is read again as the same.
	f.Fuzz(func(t *testing.T, line string) {
		r, err := parseRequirement(line)
		if err != nil {
			return
		}
		out := r.String()
		if strings.ContainsAny(out, "\n\r\x00") || strings.HasPrefix(out, "-") || strings.HasPrefix(out, "#") || strings.HasSuffix(out, "\\") || strings.Contains(r.bare(), " #") {
			t.Fatalf("%q became the line %q", line, out)
		}
		again, err := parseRequirement(out)
		if err != nil || again.String() != out {
			t.Fatalf("%q became %q, which is read as %q, %v", line, out, again, err)
		}
		env := Interpreter{Version: "3.11.7", Platform: "linux-x86_64"}.markerEnv()
		if r.wanted(env) != again.wanted(env) {
			t.Fatalf("%q and %q are not wanted alike", line, out)
		}
	})
}
