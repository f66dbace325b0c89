// Package config reads and writes the TOML files of hub and agents: strictly, so that a misspelt key is an error that names
// its line and the nearest known key. The files' meaning is their owners' affair.
//
// It knows nothing of an app's pyproject.toml; package job reads that. Start with [Read].
package config

import (
	"errors"
	"fmt"
	"os"
	"reflect"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"github.com/pergolafl/pergola/internal/problem"
)

// maxFile is more than any of these files has; the parser holds a file in memory.
const maxFile = 1 << 20

// Read decodes the file at path into the struct that into points to. The error is a usage problem that names file, line
// and key.
func Read(path string, into any) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return problem.Wrap(err, problem.Usage, "give the directory that has it with --dir", "cannot read the configuration")
	}
	return Parse(b, path, into)
}

// Parse is Read for a text; path is its name for messages.
func Parse(text []byte, path string, into any) error {
	if len(text) > maxFile {
		return problem.New(problem.Usage, "", "%s is longer than %d bytes", path, maxFile)
	}
	err := toml.NewDecoder(strings.NewReader(string(text))).DisallowUnknownFields().Decode(into)
	if err == nil {
		return nil
	}
	if s, ok := errors.AsType[*toml.StrictMissingError](err); ok && len(s.Errors) > 0 {
		first := s.Errors[0]
		row, _ := first.Position()
		key := strings.Join(first.Key(), ".")
		last := first.Key()[len(first.Key())-1]
		return problem.New(problem.Usage, "correct or remove it", "%s:%d: unknown key %s%s", path, row, key, problem.DidYouMean(last, keys(reflect.TypeOf(into))))
	}
	if d, ok := errors.AsType[*toml.DecodeError](err); ok {
		row, _ := d.Position()
		return problem.New(problem.Usage, "correct that line", "%s:%d: %s", path, row, strings.TrimPrefix(d.Error(), "toml: "))
	}
	return problem.New(problem.Usage, "correct it", "%s: %s", path, strings.TrimPrefix(err.Error(), "toml: "))
}

// keys gives the names of a struct's top-level keys.
func keys(t reflect.Type) []string {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if t.Kind() != reflect.Struct {
		return nil
	}
	var out []string
	for f := range t.Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("toml"), ",")
		if name != "" && name != "-" {
			out = append(out, name)
		}
	}
	return out
}

// Write encodes v into the file at path, mode 0600.
func Write(path string, v any) error {
	b, err := toml.Marshal(v)
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return os.WriteFile(path, b, 0o600)
}
