package nvflare

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/pergolafl/pergola/internal/problem"
)

// Settings are those of [tool.pergola] that a job folder can speak of. A zero field says nothing.
type Settings struct {
	Sites           []string
	MinSites        int
	MandatorySites  []string
	OutageTolerance time.Duration
	NoProgress      time.Duration
	StartTimeout    time.Duration
	RunConfig       []string // key=value, the values as in TOML
	ServerArgs      []string
	Database        string
	ReadyTimeout    time.Duration
	StopGrace       time.Duration
	SiteEnv         map[string]string
	NamedEnv        map[string]map[string]string // by site
}

func (s Settings) empty() bool { return len(s.list()) == 0 }

// list gives each setting as one line of TOML with its whole key.
func (s Settings) list() []string {
	var out []string
	for _, t := range s.tables() {
		for _, line := range t.lines {
			out = append(out, strings.TrimPrefix(strings.TrimPrefix(t.name, "tool.pergola")+".", ".")+line)
		}
	}
	return out
}

type tomlTable struct {
	name  string
	lines []string
}

func (s Settings) tables() []tomlTable {
	top, server, site := tomlTable{name: "tool.pergola"}, tomlTable{name: "tool.pergola.server"}, tomlTable{name: "tool.pergola.site"}
	add := func(t *tomlTable, key, value string, there bool) {
		if there {
			t.lines = append(t.lines, key+" = "+value)
		}
	}
	add(&top, "sites", tomlList(s.Sites), len(s.Sites) > 0)
	add(&top, "min-sites", strconv.Itoa(s.MinSites), s.MinSites > 0)
	add(&top, "mandatory-sites", tomlList(s.MandatorySites), len(s.MandatorySites) > 0)
	add(&top, "outage-tolerance", tomlString(short(s.OutageTolerance)), s.OutageTolerance > 0)
	add(&top, "no-progress", tomlString(short(s.NoProgress)), s.NoProgress > 0)
	add(&top, "start-timeout", tomlString(short(s.StartTimeout)), s.StartTimeout > 0)
	add(&top, "run-config", tomlList(s.RunConfig), len(s.RunConfig) > 0)
	add(&server, "args", tomlList(s.ServerArgs), len(s.ServerArgs) > 0)
	add(&server, "database", tomlString(s.Database), s.Database != "")
	add(&server, "ready-timeout", tomlString(short(s.ReadyTimeout)), s.ReadyTimeout > 0)
	add(&server, "stop-grace", tomlString(short(s.StopGrace)), s.StopGrace > 0)
	add(&site, "env", tomlMap(s.SiteEnv), len(s.SiteEnv) > 0)
	all := []tomlTable{top, server, site}
	for _, name := range slices.Sorted(maps.Keys(s.NamedEnv)) {
		t := tomlTable{name: "tool.pergola.site." + name}
		add(&t, "env", tomlMap(s.NamedEnv[name]), len(s.NamedEnv[name]) > 0)
		all = append(all, t)
	}
	return slices.DeleteFunc(all, func(t tomlTable) bool { return len(t.lines) == 0 })
}

// TOML gives the settings as tables that can be appended to a pyproject.toml; "" if there are none.
func (s Settings) TOML() string {
	var b strings.Builder
	for _, t := range s.tables() {
		if b.Len() > 0 {
			b.WriteByte('\n')
		}
		fmt.Fprintf(&b, "[%s]\n%s\n", t.name, strings.Join(t.lines, "\n"))
	}
	return b.String()
}

// short writes a time span as settings have it: 90s, 10m, 2h, 1.5s.
func short(d time.Duration) string {
	switch {
	case d > 0 && d%time.Hour == 0:
		return strconv.FormatInt(int64(d/time.Hour), 10) + "h"
	case d > 0 && d%time.Minute == 0:
		return strconv.FormatInt(int64(d/time.Minute), 10) + "m"
	}
	return strconv.FormatFloat(d.Seconds(), 'f', -1, 64) + "s"
}

// tomlString writes a basic string without a quotation mark inside, so that it can also stand in a run config's pair, which
// Flower ends at the next mark.
func tomlString(s string) string {
	var b strings.Builder
	b.WriteByte('"')
	for _, r := range s {
		switch {
		case r == '\\':
			b.WriteString(`\\`)
		case r == '"' || r < ' ' || r == 0x7f:
			fmt.Fprintf(&b, `\u%04X`, r)
		default:
			b.WriteRune(r)
		}
	}
	b.WriteByte('"')
	return b.String()
}

func tomlList(list []string) string {
	out := make([]string, 0, len(list))
	for _, s := range list {
		out = append(out, tomlString(s))
	}
	return "[" + strings.Join(out, ", ") + "]"
}

func tomlMap(m map[string]string) string {
	out := make([]string, 0, len(m))
	for _, k := range slices.Sorted(maps.Keys(m)) {
		key := k
		if strings.Trim(k, strings.TrimSuffix(bareKey, ".")) != "" {
			key = tomlString(k)
		}
		out = append(out, key+" = "+tomlString(m[k]))
	}
	return "{ " + strings.Join(out, ", ") + " }"
}

// tomlScalar gives what Flower takes for a value of a run config.
func tomlScalar(v *node) (string, bool) {
	switch v.kind {
	case kindBool, kindInt:
		return v.text(), true
	case kindFloat:
		s := strconv.FormatFloat(v.f, 'g', -1, 64)
		if !strings.ContainsAny(s, ".e") {
			s += ".0"
		}
		return s, true
	case kindString:
		return tomlString(v.s), true
	}
	return "", false
}

// Write makes dst, which must not exist or be empty, the app that the job folder has: the custom folder, and the settings
// appended to its pyproject.toml, of which every byte stays. Caches and version control's folders are left out.
func (j *Job) Write(dst string) error {
	if err := os.MkdirAll(dst, 0o755); err != nil {
		return writeProblem(err, dst)
	}
	if es, err := os.ReadDir(dst); err != nil {
		return writeProblem(err, dst)
	} else if len(es) > 0 {
		return problem.New(problem.Exists, "choose a new or an empty directory", "%s is not empty", dst)
	}
	project, err := j.Pyproject()
	if err != nil {
		return err
	}
	if err := walk(j.AppDir, func(rel string, d fs.DirEntry) error {
		from, to := filepath.Join(j.AppDir, rel), filepath.Join(dst, rel)
		switch {
		case d.IsDir():
			return os.MkdirAll(to, 0o755)
		case d.Type()&fs.ModeSymlink != 0:
			link, err := os.Readlink(from)
			if err != nil {
				return err
			}
			return os.Symlink(link, to)
		case rel == "pyproject.toml":
			return nil
		}
		return copyFile(from, to)
	}); err != nil {
		return writeProblem(err, dst)
	}
	if project == nil {
		return nil
	}
	if err := os.WriteFile(filepath.Join(dst, "pyproject.toml"), project, 0o644); err != nil {
		return writeProblem(err, dst)
	}
	return nil
}

// Pyproject gives the app's pyproject.toml with the settings appended; nil if there is neither.
func (j *Job) Pyproject() ([]byte, error) {
	path := filepath.Join(j.AppDir, "pyproject.toml")
	src, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		src, err = nil, nil
	}
	if err != nil {
		return nil, problem.Wrap(err, problem.AppInvalid, "make it readable", "%s cannot be read", path)
	}
	text := j.Settings.TOML()
	if text == "" {
		return src, nil
	}
	out := bytes.Clone(src)
	if len(out) > 0 && out[len(out)-1] != '\n' {
		out = append(out, '\n')
	}
	if len(out) > 0 {
		out = append(out, '\n')
	}
	out = append(out, "# What "+filepath.Base(absolute(j.Dir))+", a job folder of NVIDIA FLARE, says; see docs/nvflare-jobs.md of Pergola.\n"+text...)
	var was, doc map[string]any
	if toml.Unmarshal(src, &was) == nil && toml.Unmarshal(out, &doc) != nil {
		return nil, problem.New(problem.AppInvalid, "write [tool] as a table of its own, not in one line; what is to be added is:\n"+text,
			"[tool.pergola] cannot be added to %s", path)
	}
	return out, nil
}

func copyFile(src, dst string) (err error) {
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		return err
	}
	out, err := os.OpenFile(dst, os.O_WRONLY|os.O_CREATE|os.O_EXCL, info.Mode().Perm()|0o600)
	if err != nil {
		return err
	}
	defer func() {
		if e := out.Close(); err == nil {
			err = e
		}
	}()
	_, err = io.Copy(out, in)
	return err
}

func writeProblem(err error, dst string) error {
	if p, ok := errors.AsType[*problem.Error](err); ok {
		return p
	}
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return problem.Wrap(err, problem.DiskFull, "make room", "the app cannot be written to %s", dst)
	}
	return problem.Wrap(err, problem.AppInvalid, "look at the directory's permissions, or choose another", "the app cannot be written to %s", dst)
}

// MarshalJSON gives the settings by their keys in [tool.pergola].
func (s Settings) MarshalJSON() ([]byte, error) {
	var doc struct {
		Tool struct {
			Pergola map[string]any `toml:"pergola"`
		} `toml:"tool"`
	}
	if err := toml.Unmarshal([]byte(s.TOML()), &doc); err != nil {
		return nil, err
	}
	if doc.Tool.Pergola == nil {
		doc.Tool.Pergola = map[string]any{}
	}
	return json.Marshal(doc.Tool.Pergola)
}
