package logline

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/problem"
)

func TestLines(t *testing.T) {
	refused := problem.Wrap(errors.New("dial http://anna:hunter2@proxy:3128: refused"), problem.ProxyFailed, "look at it", "the proxy is away")
	for _, c := range []struct {
		name string
		log  func(*slog.Logger)
		want map[string]any
	}{
		{
			"an error has its problem's code", func(l *slog.Logger) { l.Warn("m", "err", fmt.Errorf("call: %w", refused)) },
			map[string]any{"msg": "m", "level": "WARN", "code": "proxy-failed", "err": "call: the proxy is away: dial http://[removed]@proxy:3128: refused; next: look at it"},
		},
		{
			"also of a logger's own attributes", func(l *slog.Logger) { l.With("err", refused, "job", job.ID("01kb")).Info("m") },
			map[string]any{"msg": "m", "level": "INFO", "code": "proxy-failed", "job": "01kb", "err": "the proxy is away: dial http://[removed]@proxy:3128: refused; next: look at it"},
		},
		{
			"a code that is there is kept", func(l *slog.Logger) { l.Error("m", "code", problem.AppError, "err", refused) },
			map[string]any{"msg": "m", "level": "ERROR", "code": "app-error", "err": "the proxy is away: dial http://[removed]@proxy:3128: refused; next: look at it"},
		},
		{"a foreign error has none", func(l *slog.Logger) { l.Info("m", "err", errors.New("x")) }, map[string]any{"msg": "m", "level": "INFO", "err": "x"}},
		{"no error at all", func(l *slog.Logger) { l.Info("m", "err", error(nil)) }, map[string]any{"msg": "m", "level": "INFO", "err": nil}},
		{"secrets go from every place", func(l *slog.Logger) {
			l.Info("used pergola-site-hunter2hunter2", "token", "hunter2", "n", 1, "u", url.UserPassword("a", "b"), "list", []string{"Bearer hunter2hunter2"}, slog.Group("g", "password", "hunter2"))
		}, map[string]any{"msg": "used pergola-site-[removed]", "level": "INFO", "token": "[removed]", "n": 1., "u": "a:b", "list": []any{"Bearer [removed]"}, "g": map[string]any{"password": "[removed]"}}},
		{"durations can be read", func(l *slog.Logger) { l.Info("m", "retry", 1500*time.Millisecond) }, map[string]any{"msg": "m", "level": "INFO", "retry": "1.5s"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var b bytes.Buffer
			c.log(New(&b, Auto, slog.LevelInfo))
			var got map[string]any
			if err := json.Unmarshal(b.Bytes(), &got); err != nil || strings.Count(b.String(), "\n") != 1 {
				t.Fatalf("%q is not one JSON object on one line: %v", b.String(), err)
			}
			if _, err := time.Parse(time.RFC3339Nano, fmt.Sprint(got["time"])); err != nil {
				t.Error(err)
			}
			delete(got, "time")
			a, _ := json.Marshal(got)
			w, _ := json.Marshal(c.want)
			if string(a) != string(w) {
				t.Errorf("got  %s\nwant %s", a, w)
			}
			var text bytes.Buffer
			c.log(New(&text, Text, slog.LevelInfo))
			if strings.Contains(b.String()+text.String(), "hunter2") || strings.Contains(text.String(), "\x1b") || text.Len() == 0 {
				t.Errorf("as text: %q", text.String())
			}
			b.Reset()
			c.log(New(&b, JSON, slog.LevelError+1))
			if b.Len() > 0 {
				t.Errorf("beyond the level: %s", b.String())
			}
		})
	}
}

func TestParse(t *testing.T) {
	for _, f := range Formats {
		for _, l := range Levels {
			if _, _, err := Parse(f, l); err != nil {
				t.Error(err)
			}
		}
	}
	if _, _, err := Parse("jsom", "info"); problem.CodeOf(err) != problem.Usage || !strings.Contains(err.Error(), `did you mean "json"?`) {
		t.Error(err)
	}
	if _, _, err := Parse("json", "warning"); problem.CodeOf(err) != problem.Usage || !strings.Contains(err.Error(), "did you mean") {
		t.Error(err)
	}
}
