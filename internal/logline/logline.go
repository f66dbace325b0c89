// Package logline writes the logs of hub, agents and runners: JSON, one object a line, where a program reads them, and coloured
// text on a terminal. An error is written as its text under the key err, and its problem's code under code; nothing that has the
// form of a secret is written (package redact).
//
// The keys that other programs may rely on are the constants below; docs/monitoring.md tells what they mean. Start with [New].
package logline

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/lmittmann/tint"
	"github.com/mattn/go-isatty"

	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/redact"
)

// Keys with a fixed meaning, beside slog's own time, level and msg.
const (
	Job       = "job"       // a job's id
	Site      = "site"      // a site's name
	Party     = "party"     // "hub", or the site whose part in the job it is
	Err       = "err"       // the text of an error
	Code      = "code"      // the code of its problem, as in docs/causes.md
	Procedure = "procedure" // of the API
	Identity  = "identity"  // who called or connected, as its certificate says
	From      = "from"      // the address that a connection came from
)

// Format is how lines are written.
type Format string

// The formats there are.
const (
	Auto Format = "auto" // text on a terminal, else JSON
	JSON Format = "json"
	Text Format = "text"
)

// Variables of the environment that give format and level where no flag does. Runners have them from who started them.
const (
	FormatVar = "PERGOLA_LOG_FORMAT"
	LevelVar  = "PERGOLA_LOG_LEVEL"
)

// Formats and Levels are what the flags take.
var (
	Formats = []string{string(Auto), string(JSON), string(Text)}
	Levels  = []string{"debug", "info", "warn", "error"}
)

// Parse reads a format and a level; the error is a usage problem that names the nearest known one.
func Parse(format, level string) (Format, slog.Level, error) {
	if !slices.Contains(Formats, format) {
		return "", 0, problem.New(problem.Usage, "use auto, json or text", "--log-format %q is unknown%s", format, problem.DidYouMean(format, Formats))
	}
	var l slog.Level
	level = strings.ToLower(level) // as slog itself writes them
	if !slices.Contains(Levels, level) || l.UnmarshalText([]byte(level)) != nil {
		return "", 0, problem.New(problem.Usage, "use debug, info, warn or error", "--log-level %q is unknown%s", level, problem.DidYouMean(level, Levels))
	}
	return Format(format), l, nil
}

// New gives a logger that writes to w.
func New(w io.Writer, format Format, level slog.Level) *slog.Logger {
	f, isFile := w.(*os.File)
	terminal := isFile && isatty.IsTerminal(f.Fd())
	if format == Text || format == Auto && terminal {
		return slog.New(handler{tint.NewTextHandler(w, &tint.Options{Level: level, TimeFormat: "15:04:05.000", NoColor: !terminal || os.Getenv("NO_COLOR") != ""})})
	}
	return slog.New(handler{slog.NewJSONHandler(w, &slog.HandlerOptions{Level: level})})
}

// handler cleans what passes.
type handler struct{ next slog.Handler }

// Enabled implements slog.Handler.
func (h handler) Enabled(ctx context.Context, l slog.Level) bool { return h.next.Enabled(ctx, l) }

// WithGroup implements slog.Handler.
func (h handler) WithGroup(name string) slog.Handler { return handler{h.next.WithGroup(name)} }

// WithAttrs implements slog.Handler.
func (h handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return handler{h.next.WithAttrs(cleanAll(attrs))}
}

// Handle implements slog.Handler.
func (h handler) Handle(ctx context.Context, r slog.Record) error {
	out := slog.NewRecord(r.Time, r.Level, redact.Text(r.Message), r.PC)
	var attrs []slog.Attr
	r.Attrs(func(a slog.Attr) bool {
		attrs = append(attrs, a)
		return true
	})
	out.AddAttrs(cleanAll(attrs)...)
	return h.next.Handle(ctx, out)
}

func cleanAll(attrs []slog.Attr) []slog.Attr {
	out := make([]slog.Attr, 0, len(attrs)+1)
	coded := slices.ContainsFunc(attrs, func(a slog.Attr) bool { return a.Key == Code })
	for _, a := range attrs {
		out = append(out, clean(a))
		if err, ok := a.Value.Any().(error); ok && a.Key == Err && !coded {
			if p, ok := errors.AsType[*problem.Error](err); ok {
				out = append(out, slog.String(Code, string(p.Code)))
			}
		}
	}
	return out
}

func clean(a slog.Attr) slog.Attr {
	v := a.Value.Resolve()
	switch v.Kind() {
	case slog.KindString:
		s := v.String()
		if redact.Secret(a.Key) && s != "" {
			return slog.String(a.Key, redact.Mark)
		}
		return slog.String(a.Key, redact.Text(s))
	case slog.KindDuration:
		return slog.String(a.Key, v.Duration().Round(time.Microsecond).String()) // not a number of nanoseconds, which nobody reads
	case slog.KindGroup:
		return slog.Attr{Key: a.Key, Value: slog.GroupValue(cleanAll(v.Group())...)}
	case slog.KindAny:
		switch x := v.Any().(type) {
		case error:
			return slog.String(a.Key, redact.Text(x.Error()))
		case interface{ String() string }:
			return slog.String(a.Key, redact.Text(x.String()))
		case []byte:
			return slog.String(a.Key, redact.Text(string(x)))
		case []string:
			out := make([]string, len(x))
			for i, s := range x {
				out[i] = redact.Text(s)
			}
			return slog.Any(a.Key, out)
		}
	}
	return slog.Attr{Key: a.Key, Value: v}
}
