package pyenv

import (
	"context"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// environment is a set of variables for a child.
type environment map[string]string

func (e environment) list() []string {
	out := make([]string, 0, len(e))
	for _, k := range slices.Sorted(maps.Keys(e)) {
		out = append(out, k+"="+e[k])
	}
	return out
}

func (e environment) has(keys ...string) bool {
	return slices.ContainsFunc(keys, func(k string) bool { return e[k] != "" })
}

// set sets what is not set yet.
func (e environment) set(key, value string) {
	if e[key] == "" && value != "" {
		e[key] = value
	}
}

// unwanted variables would aim an installer at something else than the environment under construction, or have Python
// start with somebody else's modules, or without writing bytecode.
var unwanted = []string{
	"PYTHONHOME", "PYTHONPATH", "PYTHONSTARTUP", "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX", "PYTHONINSPECT", "PYTHONOPTIMIZE",
	"VIRTUAL_ENV", "CONDA_PREFIX", "__PYVENV_LAUNCHER__",
	"PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_USER", "PIP_PYTHON", "PIP_DRY_RUN", "PIP_REPORT", "PIP_REQUIREMENT", "PIP_EDITABLE",
	"PIP_NO_DEPS", "PIP_IGNORE_INSTALLED", "PIP_REQUIRE_VIRTUALENV", "PIP_QUIET", "PIP_VERBOSE", "PIP_REQUIRE_HASHES", "PIP_NO_COMPILE",
	"UV_SYSTEM_PYTHON", "UV_PYTHON", "UV_PROJECT", "UV_WORKING_DIR", "UV_PROJECT_ENVIRONMENT", "UV_BREAK_SYSTEM_PACKAGES", "UV_MANAGED_PYTHON",
	"UV_REQUIRE_HASHES", "UV_NO_VERIFY_HASHES", "UV_CUSTOM_COMPILE_COMMAND", "UV_VENV_SEED", "UV_VENV_RELOCATABLE", "UV_VENV_CLEAR",
	"UV_RESOLUTION", "UV_FORK_STRATEGY",
}

// pathVariables may name files relative to the working directory, which is another one for the installers.
var pathVariables = []string{
	"UV_CONSTRAINT", "UV_OVERRIDE", "UV_BUILD_CONSTRAINT", "UV_CONFIG_FILE", "UV_CACHE_DIR", "PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT",
	"PIP_CONFIG_FILE", "PIP_CERT", "PIP_CLIENT_CERT", "PIP_CACHE_DIR", "SSL_CERT_FILE", "SSL_CERT_DIR", "SSL_CLIENT_CERT",
	"REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "UV_FIND_LINKS", "PIP_FIND_LINKS", "UV_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX",
	"UV_EXTRA_INDEX_URL", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL",
}

// cleanEnv is this process's environment and extra, without what would mislead an installer.
func cleanEnv(extra []string) environment {
	env := environment{}
	for _, kv := range append(os.Environ(), extra...) {
		if k, v, ok := strings.Cut(kv, "="); ok {
			env[k] = v
		}
	}
	for _, k := range unwanted {
		delete(env, k)
	}
	maps.DeleteFunc(env, func(k, v string) bool { // uv stops at an empty one
		return v == "" && (strings.HasPrefix(k, "UV_") || strings.HasPrefix(k, "PIP_"))
	})
	cwd, err := os.Getwd()
	if err != nil {
		cwd = ""
	}
	for _, k := range pathVariables {
		if env[k] == "" || cwd == "" {
			continue
		}
		sep := func(r rune) bool { return r == ' ' || r == '\n' || r == '\t' }
		join := " "
		if k == "UV_FIND_LINKS" {
			sep, join = func(r rune) bool { return r == ',' }, ","
		}
		// One path that has blanks in it is one path.
		if _, err := os.Stat(env[k]); err == nil {
			sep = func(rune) bool { return false }
		}
		parts := strings.FieldsFunc(env[k], sep)
		for i, part := range parts {
			if part = strings.TrimSpace(part); !strings.Contains(part, ":") && !strings.HasPrefix(part, "~") && !strings.Contains(part, "=") {
				if !filepath.IsAbs(part) {
					part = filepath.Join(cwd, part)
				}
			}
			parts[i] = part
		}
		env[k] = strings.Join(parts, join)
	}
	// Said in English, without colours and questions, whoever asks.
	maps.Copy(env, environment{
		"NO_COLOR": "1", "UV_NO_PROGRESS": "1", "UV_PYTHON_DOWNLOADS": "never", "UV_NO_WRAP": "1",
		"PIP_NO_INPUT": "1", "PIP_NO_COLOR": "1", "PIP_PROGRESS_BAR": "off", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_USER": "0",
		"GIT_TERMINAL_PROMPT": "0", "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8:backslashreplace",
	})
	// Without a retry pip says "no such package" when it could not ask; with its five it takes half a minute to say so.
	if env["PIP_RETRIES"] == "" || env["PIP_RETRIES"] == "0" {
		env["PIP_RETRIES"] = "2"
	}
	return env
}

// truth reads a variable's value as pip and uv do.
func truth(value string) bool {
	switch strings.ToLower(value) {
	case "1", "true", "yes", "y", "on", "t":
		return true
	}
	return false
}

// configFiles are those that pip and uv read settings from, whether they are there or not.
func configFiles(env environment, in Interpreter) (pip, uv []string) {
	home := env["HOME"]
	conf := env["XDG_CONFIG_HOME"]
	if conf == "" {
		conf = filepath.Join(home, ".config")
	}
	global := filepath.SplitList(env["XDG_CONFIG_DIRS"])
	if len(global) == 0 {
		global = []string{"/etc/xdg"}
	}
	pip = append(pip, "/etc/pip.conf", filepath.Join(home, ".pip", "pip.conf"), filepath.Join(conf, "pip", "pip.conf"),
		filepath.Join(filepath.Dir(filepath.Dir(in.Path)), "pip.conf"), env["PIP_CONFIG_FILE"])
	uv = append(uv, "/etc/uv/uv.toml", filepath.Join(conf, "uv", "uv.toml"), env["UV_CONFIG_FILE"])
	for _, g := range global {
		pip = append(pip, filepath.Join(g, "pip", "pip.conf"))
		uv = append(uv, filepath.Join(g, "uv", "uv.toml"))
	}
	none := func(f string) bool { return f == "" }
	return slices.DeleteFunc(pip, none), slices.DeleteFunc(uv, none)
}

// pipConfig gives the settings of pip's files that matter to both installers: what `pip config list` says, since only
// pip knows which file wins. An interpreter without pip has no such settings.
func pipConfig(ctx context.Context, env environment, in Interpreter, log func(string)) (map[string]string, error) {
	files, _ := configFiles(env, in)
	if !slices.ContainsFunc(files, isFile) {
		return nil, nil
	}
	r, err := run(ctx, command{name: "pip config", args: []string{in.Path, "-m", "pip", "config", "list"}, env: env.list()})
	if err != nil {
		return nil, err
	}
	if !r.ok() {
		log("pip's configuration files are not read: " + lastLines(r.output(), 1))
		return nil, nil
	}
	return parsePipConfig(r.stdout), nil
}

// parsePipConfig reads lines such as global.index-url='https://…'. The section install is nearer than global.
func parsePipConfig(text string) map[string]string {
	found := map[string]string{}
	for _, section := range []string{"global.", "install."} {
		for line := range strings.Lines(text) {
			key, value, ok := strings.Cut(strings.TrimSpace(line), "=")
			if name, in := strings.CutPrefix(key, section); ok && in {
				found[strings.ReplaceAll(name, "_", "-")] = unquotePython(value)
			}
		}
	}
	return found
}

// unquotePython undoes Python's repr of a string.
func unquotePython(s string) string {
	if len(s) < 2 || s[0] != '\'' && s[0] != '"' || s[len(s)-1] != s[0] {
		return s
	}
	q, body := s[0], s[1:len(s)-1]
	var b strings.Builder
	for body != "" {
		c, _, tail, err := strconv.UnquoteChar(body, q)
		if err != nil { // an escape or a quote that Go does not know stays as it is
			b.WriteByte(body[0])
			body = body[1:]
			continue
		}
		b.WriteRune(c)
		body = tail
	}
	return b.String()
}

// indexFlags are options that neither installer takes from the environment.
type indexFlags struct{ uv []string }

// withIndexes completes env so that uv and pip see the same indexes, proxies and certificates, whichever of the two the
// user has set up: pip's variables and files count for uv where uv has no setting, and uv's variables for pip.
func withIndexes(ctx context.Context, env environment, in Interpreter, log func(string)) (indexFlags, error) {
	conf, err := pipConfig(ctx, env, in, log)
	if err != nil {
		return indexFlags{}, err
	}
	return share(env, conf, in, log), nil
}

func share(env environment, conf map[string]string, in Interpreter, log func(string)) indexFlags {
	pip := func(variable, key string) string {
		if v := env[variable]; v != "" {
			return v
		}
		return conf[key]
	}
	index, extra := pip("PIP_INDEX_URL", "index-url"), pip("PIP_EXTRA_INDEX_URL", "extra-index-url")
	links, noIndex := pip("PIP_FIND_LINKS", "find-links"), truth(pip("PIP_NO_INDEX", "no-index"))
	uvIndex := env.has("UV_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX") || uvNamesIndex(env, in)
	uvNoIndex := truth(env["UV_NO_INDEX"])

	// uv's own settings for pip, before env is changed.
	if index == "" && extra == "" && !noIndex {
		own := env["UV_DEFAULT_INDEX"]
		if own == "" {
			own = env["UV_INDEX_URL"]
		}
		env.set("PIP_INDEX_URL", bareIndex(own))
		var more []string
		for _, u := range strings.Fields(env["UV_INDEX"] + " " + env["UV_EXTRA_INDEX_URL"]) {
			more = append(more, bareIndex(u))
		}
		env.set("PIP_EXTRA_INDEX_URL", strings.Join(more, " "))
	}
	if links == "" {
		env.set("PIP_FIND_LINKS", strings.ReplaceAll(env["UV_FIND_LINKS"], ",", " "))
	}
	if uvNoIndex {
		env.set("PIP_NO_INDEX", "1")
	}
	if !env.has("PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE") && conf["cert"] == "" {
		env.set("PIP_CERT", env["SSL_CERT_FILE"])
	}

	// pip's settings for uv.
	if !uvIndex {
		env.set("UV_DEFAULT_INDEX", index)
		if extra != "" && !env.has("UV_EXTRA_INDEX_URL") {
			env["UV_EXTRA_INDEX_URL"] = strings.Join(strings.Fields(extra), " ")
			env.set("UV_INDEX_STRATEGY", "unsafe-best-match") // what pip does with several indexes
		}
	}
	if !env.has("UV_FIND_LINKS") {
		var keep []string
		for _, l := range strings.Fields(links) {
			// pip warns of a folder that is not there, uv fails.
			if _, err := os.Stat(l); err != nil && !strings.Contains(l, "://") {
				log("find-links " + l + " of pip's settings is left out: there is no such folder")
				continue
			}
			keep = append(keep, l)
		}
		env.set("UV_FIND_LINKS", strings.Join(keep, ","))
	}
	for _, ca := range []string{pip("PIP_CERT", "cert"), env["REQUESTS_CA_BUNDLE"], env["CURL_CA_BUNDLE"]} {
		if !env.has("SSL_CERT_DIR") || ca != "" {
			env.set("SSL_CERT_FILE", ca)
		}
	}
	env.set("UV_INSECURE_HOST", strings.Join(strings.Fields(pip("PIP_TRUSTED_HOST", "trusted-host")), " "))
	env.set("UV_HTTP_TIMEOUT", pip("PIP_DEFAULT_TIMEOUT", "timeout"))
	if proxy := pip("PIP_PROXY", "proxy"); proxy != "" && !env.has("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy") {
		env["HTTPS_PROXY"], env["HTTP_PROXY"] = proxy, proxy
	}
	var flags indexFlags
	if uvNoIndex || noIndex && !uvIndex {
		flags.uv = append(flags.uv, "--no-index") // uv reads no variable for this
	}
	return flags
}

// bareIndex drops the name that uv allows before an index's URL.
func bareIndex(u string) string {
	if name, rest, ok := strings.Cut(u, "="); ok && !strings.ContainsAny(name, ":/") {
		return rest
	}
	return u
}

// uvNamesIndex tells whether a uv.toml has settings for indexes.
func uvNamesIndex(env environment, in Interpreter) bool {
	_, files := configFiles(env, in)
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && strings.Contains(string(b), "index") {
			return true
		}
	}
	return false
}

// indexMark changes when the way to packages does: variables, configuration files, folders of wheels.
func indexMark(env environment, in Interpreter) string {
	var b strings.Builder
	for _, k := range slices.Sorted(maps.Keys(env)) {
		if strings.HasPrefix(k, "UV_") && k != "UV_CACHE_DIR" || strings.HasPrefix(k, "PIP_") && k != "PIP_CACHE_DIR" {
			b.WriteString(k + "=" + env[k] + "\n")
		}
	}
	pip, uv := configFiles(env, in)
	for _, f := range append(pip, uv...) {
		if info, err := os.Stat(f); err == nil {
			b.WriteString(f + " " + fileMark(info) + "\n")
		}
	}
	for _, dir := range strings.FieldsFunc(env["UV_FIND_LINKS"]+" "+env["PIP_FIND_LINKS"], func(r rune) bool { return r == ',' || r == ' ' || r == '\n' }) {
		if info, err := os.Stat(dir); err == nil {
			b.WriteString(dir + " " + fileMark(info) + "\n")
		}
	}
	return b.String()
}
