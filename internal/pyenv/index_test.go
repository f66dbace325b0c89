package pyenv

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestSettingsOfOneInstallerCountForTheOther(t *testing.T) {
	dir := t.TempDir()
	for _, c := range []struct {
		name  string
		env   environment
		conf  map[string]string
		want  environment
		flags []string
	}{
		{"nothing set", environment{}, nil, environment{"UV_DEFAULT_INDEX": "", "PIP_INDEX_URL": ""}, nil},
		{
			"pip's variables for uv",
			environment{"PIP_INDEX_URL": "https://i/simple", "PIP_EXTRA_INDEX_URL": "https://a https://b", "PIP_FIND_LINKS": dir, "PIP_TRUSTED_HOST": "i"},
			nil,
			environment{"UV_DEFAULT_INDEX": "https://i/simple", "UV_EXTRA_INDEX_URL": "https://a https://b", "UV_INDEX_STRATEGY": "unsafe-best-match", "UV_FIND_LINKS": dir, "UV_INSECURE_HOST": "i"},
			nil,
		},
		{
			"pip's files for uv",
			environment{},
			map[string]string{"index-url": "https://i", "extra-index-url": "https://a\nhttps://b", "no-index": "true", "cert": "/c.pem", "proxy": "http://p:1", "timeout": "7"},
			environment{"UV_DEFAULT_INDEX": "https://i", "UV_EXTRA_INDEX_URL": "https://a https://b", "SSL_CERT_FILE": "/c.pem", "HTTPS_PROXY": "http://p:1", "UV_HTTP_TIMEOUT": "7"},
			[]string{"--no-index"},
		},
		{"pip's variables win over its files", environment{"PIP_INDEX_URL": "https://v"}, map[string]string{"index-url": "https://f"}, environment{"UV_DEFAULT_INDEX": "https://v"}, nil},
		{
			"uv's own settings win",
			environment{"UV_INDEX_URL": "https://u", "PIP_INDEX_URL": "https://p", "UV_FIND_LINKS": "https://l", "PIP_FIND_LINKS": dir},
			nil,
			environment{"UV_INDEX_URL": "https://u", "UV_DEFAULT_INDEX": "", "PIP_INDEX_URL": "https://p", "UV_FIND_LINKS": "https://l", "PIP_FIND_LINKS": dir},
			nil,
		},
		{
			"uv's settings for pip",
			environment{"UV_DEFAULT_INDEX": "mine=https://u", "UV_INDEX": "x=https://a https://b?c=d", "UV_FIND_LINKS": dir + ",https://l", "UV_NO_INDEX": "1", "SSL_CERT_FILE": "/c.pem"},
			nil,
			environment{"PIP_INDEX_URL": "https://u", "PIP_EXTRA_INDEX_URL": "https://a https://b?c=d", "PIP_FIND_LINKS": dir + " https://l", "PIP_NO_INDEX": "1", "PIP_CERT": "/c.pem"},
			[]string{"--no-index"},
		},
		{"a folder that is not there", environment{"PIP_FIND_LINKS": "/nowhere/wheels " + dir}, nil, environment{"UV_FIND_LINKS": dir}, nil},
		{"a proxy that is set stays", environment{"HTTPS_PROXY": "http://q:2", "PIP_PROXY": "http://p:1"}, nil, environment{"HTTPS_PROXY": "http://q:2", "HTTP_PROXY": ""}, nil},
	} {
		c.env["HOME"] = dir
		flags := share(c.env, c.conf, Interpreter{Path: "/usr/bin/python3"}, func(string) {})
		for k, v := range c.want {
			if c.env[k] != v {
				t.Errorf("%s: %s is %q, want %q", c.name, k, c.env[k], v)
			}
		}
		if !slices.Equal(flags.uv, c.flags) {
			t.Errorf("%s: flags %q, want %q", c.name, flags.uv, c.flags)
		}
	}
}

func TestCleanEnv(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	for k, v := range map[string]string{
		"PYTHONPATH": "/x", "VIRTUAL_ENV": "/x", "PIP_TARGET": "/x", "UV_SYSTEM_PYTHON": "1", "PYTHONDONTWRITEBYTECODE": "1", "PIP_USER": "1",
		"UV_FIND_LINKS": "wheels,https://x/y", "PIP_FIND_LINKS": "./wheels /abs", "UV_INDEX_URL": "https://i/simple", "HTTPS_PROXY": "http://p:1", "PIP_RETRIES": "0",
	} {
		t.Setenv(k, v)
	}
	env := cleanEnv([]string{"EXTRA=1", "HTTPS_PROXY=http://q:2"})
	for k, want := range map[string]string{
		"PYTHONPATH": "", "VIRTUAL_ENV": "", "PIP_TARGET": "", "UV_SYSTEM_PYTHON": "", "PYTHONDONTWRITEBYTECODE": "", "PIP_USER": "0",
		"UV_FIND_LINKS": filepath.Join(dir, "wheels") + ",https://x/y", "PIP_FIND_LINKS": filepath.Join(dir, "wheels") + " /abs",
		"UV_INDEX_URL": "https://i/simple", "HTTPS_PROXY": "http://q:2", "EXTRA": "1", "UV_PYTHON_DOWNLOADS": "never", "PIP_RETRIES": "2",
	} {
		if env[k] != want {
			t.Errorf("%s is %q, want %q", k, env[k], want)
		}
	}
}

func TestParsePipConfig(t *testing.T) {
	got := parsePipConfig(":env:.find-links='/env'\nglobal.index-url='https://g'\nglobal.extra-index-url='https://a\\nhttps://b'\ninstall.index_url=\"it's\"\nglobal.cert='/a\\\\b'\nfreeze.timeout='1'\nnonsense\n")
	want := map[string]string{"index-url": "it's", "extra-index-url": "https://a\nhttps://b", "cert": `/a\b`}
	if len(got) != len(want) {
		t.Errorf("got %q, want %q", got, want)
	}
	for k, v := range want {
		if got[k] != v {
			t.Errorf("%s is %q, want %q", k, got[k], v)
		}
	}
}

// pip's own files are read by pip.
func TestPipsFilesCountForUV(t *testing.T) {
	needUV(t)
	dir := wheels(t)
	conf := filepath.Join(t.TempDir(), "pip.conf")
	if err := os.WriteFile(conf, []byte("[global]\nno-index = yes\n[install]\nfind-links =\n    "+dir+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PIP_CONFIG_FILE", conf)
	cache := cacheFor(t)
	tool, err := pipTool(t.Context(), cache, testPython(t), cleanEnv(nil), Options{})
	if err != nil {
		t.Fatal(err)
	}
	in, err := Find(t.Context(), tool) // one that certainly has pip
	if err != nil {
		t.Fatal(err)
	}
	lock, err := MakeLock(t.Context(), cache, in, Requirements{Names: []string{"appdep"}}, Options{Installer: "uv"})
	if err != nil || !strings.Contains(lock.Text, "appdep==3.2.1") {
		t.Errorf("%+v, %v", lock, err)
	}
}

func FuzzPipConfig(f *testing.F) {
	f.Add("global.index-url='https://a\\nb'\ninstall.x=\"y\"")
	f.Add("global.a='\\x'\nglobal.b='")
	// Whatever pip says, reading it ends, and keys are settings of the two sections.
	f.Fuzz(func(t *testing.T, text string) {
		for k := range parsePipConfig(text) {
			if strings.Contains(k, "_") || strings.Contains(k, "=") || strings.Contains(k, "\n") {
				t.Fatalf("%q gave the key %q", text, k)
			}
		}
	})
}
