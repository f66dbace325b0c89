// Package support packs what whoever helps with a hub or a site needs to see into one file: what doctor finds, configuration, versions, status,
// measurements, jobs, the last lines of logs, and what the process is doing. Secrets are taken out (package redact), keys are never read into it, and a
// manifest says what is inside and what was left out. The file is bounded, and refused rather than written if a known secret is left in it.
//
// It sends nothing anywhere, and changes nothing. Start with [Collect] and [Bundle.Write].
package support

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/pergolafl/pergola/internal/api"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/redact"
)

// Limits of a bundle, in bytes before it is packed, and of what is in it.
const (
	MaxBundle = 32 << 20
	maxTail   = 512 << 10 // of a log
	maxFiles  = 40        // logs of one kind
	maxJobs   = 500       // in the list
	maxEvents = 20_000    // of the one job
)

// Options say what to collect.
type Options struct {
	Kind string // as package doctor has it: "hub" or "site"
	Dir  string
	Job  string   // how the id of a job begins whose events and logs are wanted; "" = none
	Logs []string // files with the service's own log, beside what is found
	Now  time.Time
}

// File is one file of a bundle.
type File struct {
	Name    string `json:"name"`
	Bytes   int    `json:"bytes"`
	About   string `json:"about"`
	Cut     bool   `json:"cut,omitempty"`     // only its last lines are here
	Removed int    `json:"removed,omitempty"` // places where something secret was taken out

	data []byte
}

// LeftOut is what could not, or may not, be had.
type LeftOut struct {
	What string `json:"what"`
	Why  string `json:"why"`
}

// Manifest is MANIFEST.json of a bundle.
type Manifest struct {
	Kind    string    `json:"kind"`
	Name    string    `json:"name"`
	Version string    `json:"version"`
	Made    time.Time `json:"made"`
	Files   []File    `json:"files"`
	LeftOut []LeftOut `json:"left_out"`
	Never   []string  `json:"never"` // what no bundle has
}

// never is what is in no bundle.
var never = []string{
	"private keys (*.key), tokens, passwords in addresses: what has their form, or is known to be one, is replaced by " + redact.Mark,
	"values of environment variables that the configuration or a job sets",
	"the store itself, bundles, results, and the data that jobs work on; lines of a job's programs only with --job",
}

// Bundle is what was collected.
type Bundle struct {
	Manifest Manifest
	red      redact.Redactor
	size     int
}

// add takes a text in, without its secrets.
func (b *Bundle) add(name, about, text string, cut bool) {
	b.put(name, about, []byte(b.red.Text(text)), cut)
}

// addJSON is add for JSON, or lines of it.
func (b *Bundle) addJSON(name, about string, data []byte, cut bool) {
	b.put(name, about, b.red.JSON(data), cut)
}

// addValue is addJSON for what is no JSON yet.
func (b *Bundle) addValue(name, about string, v any) {
	data, err := json.Marshal(v)
	if err != nil {
		b.leave(name, err)
		return
	}
	var plain any
	if err := json.Unmarshal(data, &plain); err != nil {
		b.leave(name, err)
		return
	}
	var out bytes.Buffer
	e := json.NewEncoder(&out)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(b.red.Value("", plain)); err != nil {
		b.leave(name, err)
		return
	}
	b.put(name, about, out.Bytes(), false)
}

func (b *Bundle) put(name, about string, data []byte, cut bool) {
	name = b.red.Text(name)
	if b.size+len(data) > MaxBundle {
		b.leave(name, fmt.Errorf("the bundle would be longer than %d MiB", MaxBundle>>20))
		return
	}
	b.size += len(data)
	b.Manifest.Files = append(b.Manifest.Files, File{Name: name, Bytes: len(data), About: about, Cut: cut, Removed: bytes.Count(data, []byte(redact.Mark)), data: data})
}

func (b *Bundle) leave(what string, err error) {
	b.Manifest.LeftOut = append(b.Manifest.LeftOut, LeftOut{b.red.Text(what), b.red.Text(problem.From(err).What())})
	if p, ok := errors.AsType[*problem.Error](err); !ok || p == nil {
		b.Manifest.LeftOut[len(b.Manifest.LeftOut)-1].Why = b.red.Text(err.Error())
	}
}

// tail adds the last lines of a file, whole ones.
func (b *Bundle) tail(name, path, about string) {
	f, err := os.Open(path)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			b.leave(name, err)
		}
		return
	}
	defer f.Close()
	text, cut, err := lastLines(f, maxTail)
	if err != nil {
		b.leave(name, err)
		return
	}
	if strings.HasPrefix(strings.TrimSpace(text), "{") {
		b.addJSON(name, about, []byte(text), cut)
		return
	}
	b.add(name, about, text, cut)
}

// lastLines reads the last lines that fit into n bytes. Half a line could hide the name that a secret stands behind, so it is left out.
func lastLines(f *os.File, n int64) (text string, cut bool, err error) {
	info, err := f.Stat()
	if err != nil {
		return "", false, err
	}
	if !info.Mode().IsRegular() {
		return "", false, fmt.Errorf("%s is no ordinary file", f.Name())
	}
	from := max(0, info.Size()-n)
	if _, err := f.Seek(from, io.SeekStart); err != nil {
		return "", false, err
	}
	data, err := io.ReadAll(io.LimitReader(f, n))
	if err != nil {
		return "", false, err
	}
	if from > 0 {
		i := bytes.IndexByte(data, '\n')
		if i < 0 {
			return "", true, nil // one line that is longer than all that fits
		}
		data = data[i+1:]
	}
	return strings.ToValidUTF8(string(data), "\ufffd"), from > 0, nil
}

// Write writes the bundle as a tar.gz to a new file at path, mode 0600. A file that is there is refused with the code exists.
func (b *Bundle) Write(path string) (err error) {
	slices.SortFunc(b.Manifest.Files, func(x, y File) int { return strings.Compare(x.Name, y.Name) })
	b.Manifest.Never = never
	if b.Manifest.LeftOut == nil {
		b.Manifest.LeftOut = []LeftOut{}
	}
	manifest, err := json.Marshal(b.Manifest)
	if err != nil {
		return err
	}
	all := append([]File{{Name: "MANIFEST.json", data: b.red.JSON(manifest)}}, b.Manifest.Files...)
	for _, f := range all {
		if b.red.Known(f.Name) || b.red.Known(string(f.data)) {
			return problem.New(problem.Internal, "please report this; nothing was written", "a secret would have been left in %s", b.red.Text(f.Name))
		}
	}
	out, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return problem.New(problem.Exists, "name another file with -o, or remove this one", "%s exists already, and is not overwritten", path)
	}
	if err != nil {
		return problem.Wrap(err, problem.Usage, "name another with -o", "the bundle cannot be written")
	}
	defer func() {
		if e := out.Close(); err == nil {
			err = e
		}
		if err != nil {
			err = errors.Join(problem.Wrap(err, problem.DiskFull, "make room, or name a file elsewhere with -o", "the bundle cannot be written"), os.Remove(path))
		}
	}()
	top := strings.TrimSuffix(strings.TrimSuffix(filepath.Base(path), ".gz"), ".tar") + "/"
	zw := gzip.NewWriter(out)
	tw := tar.NewWriter(zw)
	for _, f := range all {
		if err := tw.WriteHeader(&tar.Header{Name: top + f.Name, Mode: 0o600, Size: int64(len(f.data)), ModTime: b.Manifest.Made, Format: tar.FormatPAX}); err != nil {
			return err
		}
		if _, err := tw.Write(f.data); err != nil {
			return err
		}
	}
	return errors.Join(tw.Close(), zw.Close(), out.Sync())
}

// Collect gathers what there is. What cannot be had is in the manifest, and no error.
func Collect(ctx context.Context, o Options) (*Bundle, error) {
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return nil, err
	}
	o.Dir = dir
	b := &Bundle{Manifest: Manifest{Kind: o.Kind, Name: o.Kind, Version: api.BuildVersion(), Made: o.Now.UTC().Truncate(time.Second)}}
	c := &collection{Bundle: b, Options: o}
	if err := c.learn(ctx); err != nil {
		return nil, err
	}
	defer c.close()
	for _, step := range []func(context.Context){c.configuration, c.versions, c.files, c.doctor, c.process, c.store, c.logs} {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		step(ctx)
	}
	return b, c.job(ctx)
}
