package metrics

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/csv"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/pergolafl/pergola/internal/logs"
)

// Names of what Export makes.
const (
	MetricsCSV  = "metrics.csv"
	ParamsCSV   = "params.csv" // parameters and tags
	Tensorboard = "tensorboard"

	folder      = "metrics"
	otherFolder = "pergola-metrics" // where the app has made a folder of the first name
	tempPrefix  = ".metrics-"
)

// The columns of the CSV files. Times are RFC 3339 in UTC.
var (
	metricColumns = []string{"time", "site", "run", "name", "step", "value", "kind", "run_id"}
	paramColumns  = []string{"time", "site", "run", "name", "value", "kind", "run_id"}
)

// Source is one party's metrics file, which need not be there.
type Source struct {
	Site string // a name like those of sites: fit to be that of a folder
	Path string
}

// Exported says what Export made.
type Exported struct {
	Dir     string // "" = nothing was logged
	Records int
	Skipped int // lines that are no records
	Merged  int // records of runs that share a folder for TensorBoard, because there are more than maxFolders
}

const (
	maxFolders = 1000 // of event files, per party
	maxOpen    = 64   // event files at once
)

// Export makes CSV and TensorBoard event files of the parties' records in the folder "metrics" of results, in the order of
// sources and, within one, in that of logging. The folder appears as a whole, or not at all; one of an earlier export, by a
// hub that was interrupted, is replaced. It holds no more than a record at a time in memory. Which party a record is of
// is decided by its source, whatever the line says.
func Export(ctx context.Context, results string, sources []Source) (out Exported, err error) {
	x := &exporter{}
	defer func() {
		err = errors.Join(err, x.close())
		if x.dir != "" {
			err = errors.Join(err, os.RemoveAll(x.dir)) // it was renamed if all went well
		}
	}()
	for _, s := range sources {
		f, err := logs.Open(s.Path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return out, err
		}
		x.site, x.folders = s.Site, map[string]bool{}
		n, err := Read(f, func(r Record) error {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if x.dir == "" {
				if err := x.open(results); err != nil {
					return err
				}
			}
			r.Site = s.Site
			return x.write(r)
		})
		x.out.Skipped += n
		if err := errors.Join(err, f.Close()); err != nil {
			return x.out, fmt.Errorf("metrics of %s: %w", s.Site, err)
		}
	}
	if x.dir == "" {
		return x.out, nil
	}
	if err := x.close(); err != nil {
		return x.out, err
	}
	target, err := place(results)
	if err != nil {
		return x.out, err
	}
	if err := os.Rename(x.dir, target); err != nil {
		return x.out, err
	}
	x.dir, x.out.Dir = "", target
	return x.out, nil
}

// place gives a path at which there is nothing: the folder's usual one, or another if the app has something there.
func place(results string) (string, error) {
	for _, name := range []string{folder, otherFolder} {
		path := filepath.Join(results, name)
		_, err := os.Lstat(path)
		if errors.Is(err, fs.ErrNotExist) {
			return path, nil
		}
		if err != nil {
			return "", err
		}
		if isExport(path) {
			return path, os.RemoveAll(path)
		}
	}
	return "", fmt.Errorf("the app's results have both %s and %s", folder, otherFolder)
}

// isExport tells an earlier export from a folder of the app's by the columns of its CSV.
func isExport(dir string) bool {
	info, err := os.Lstat(dir)
	if err != nil || !info.IsDir() {
		return false
	}
	f, err := logs.Open(filepath.Join(dir, MetricsCSV))
	if err != nil {
		return false
	}
	defer f.Close()
	want := []byte(strings.Join(metricColumns, ",") + "\n")
	got := make([]byte, len(want))
	n, err := f.Read(got)
	return err == nil && bytes.Equal(got[:n], want)
}

// exporter writes all files at once.
type exporter struct {
	dir             string // "" before the first record
	metrics, params *table
	events          map[string]*output // open event files by path
	site            string
	folders         map[string]bool // this site's
	out             Exported
}

// output is a file with a buffer.
type output struct {
	f *os.File
	w *bufio.Writer
}

func create(path string, flag int) (*output, error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|flag, 0o600)
	if err != nil {
		return nil, err
	}
	return &output{f, bufio.NewWriter(f)}, nil
}

func (o *output) close() error { return errors.Join(o.w.Flush(), o.f.Close()) }

// table is a CSV file.
type table struct {
	*output
	csv *csv.Writer
}

func createTable(path string, columns []string) (*table, error) {
	o, err := create(path, os.O_EXCL)
	if err != nil {
		return nil, err
	}
	t := &table{o, csv.NewWriter(o.w)}
	return t, t.csv.Write(columns)
}

func (t *table) close() error {
	t.csv.Flush()
	return errors.Join(t.csv.Error(), t.output.close())
}

func (x *exporter) open(results string) error {
	if err := os.MkdirAll(results, 0o755); err != nil {
		return err
	}
	old, err := filepath.Glob(filepath.Join(escape(results), tempPrefix+"*"))
	if err != nil {
		return err
	}
	for _, path := range old { // of a hub that was killed in the middle
		if err := os.RemoveAll(path); err != nil {
			return err
		}
	}
	if x.dir, err = os.MkdirTemp(results, tempPrefix); err != nil {
		return err
	}
	// As the other results.
	if err := os.Chmod(x.dir, 0o755); err != nil {
		return err
	}
	x.events = map[string]*output{}
	if x.metrics, err = createTable(filepath.Join(x.dir, MetricsCSV), metricColumns); err != nil {
		return err
	}
	x.params, err = createTable(filepath.Join(x.dir, ParamsCSV), paramColumns)
	return err
}

// escape keeps Glob from taking a folder's name for a pattern.
func escape(path string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(path)
}

func (x *exporter) write(r Record) error {
	x.out.Records++
	at := r.Time.UTC().Format(time.RFC3339Nano)
	if r.Kind == Metric {
		if err := x.metrics.csv.Write([]string{at, r.Site, r.Run, r.Name, strconv.FormatInt(r.Step, 10), FormatValue(r.Value), string(r.Kind), r.RunID}); err != nil {
			return err
		}
		return x.event(r, scalarEvent(r.Time, r.Step, r.Name, r.Value))
	}
	if err := x.params.csv.Write([]string{at, r.Site, r.Run, r.Name, r.Text, string(r.Kind), r.RunID}); err != nil {
		return err
	}
	if r.Kind == Tag && strings.HasPrefix(r.Name, "mlflow.") {
		return nil // who and from where, which MLflow's clients say of every run: no text for a plot
	}
	return x.event(r, textEvent(r.Time, string(r.Kind)+"s/"+r.Name, r.Text))
}

// event appends to the event file of the record's run. Runs of one name share a file, and so do those without: a client
// app of Flower is a new process, and often a new run, with each message, but its metrics are one curve.
func (x *exporter) event(r Record, data []byte) error {
	dir := filepath.Join(x.dir, Tensorboard, x.site)
	if r.Run != "" {
		name := folderName(r.Run)
		if len(x.folders) >= maxFolders && !x.folders[name] {
			name = "more-runs"
			x.out.Merged++
		} else {
			x.folders[name] = true
		}
		dir = filepath.Join(dir, name)
	}
	path := filepath.Join(dir, "events.out.tfevents.0000000000.pergola")
	o := x.events[path]
	if o == nil {
		if len(x.events) >= maxOpen {
			if err := x.closeEvents(); err != nil {
				return err
			}
		}
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		var err error
		if o, err = create(path, os.O_APPEND); err != nil {
			return err
		}
		x.events[path] = o
		info, err := o.f.Stat()
		if err != nil {
			return err
		}
		if info.Size() == 0 {
			if _, err := o.w.Write(appendTFRecord(nil, versionEvent(r.Time))); err != nil {
				return err
			}
		}
	}
	_, err := o.w.Write(appendTFRecord(nil, data))
	return err
}

func (x *exporter) closeEvents() error {
	var errs []error
	for path, o := range x.events {
		errs = append(errs, o.close())
		delete(x.events, path)
	}
	return errors.Join(errs...)
}

// close ends all files; a second call does nothing.
func (x *exporter) close() error {
	err := x.closeEvents()
	for _, t := range []*table{x.metrics, x.params} {
		if t != nil {
			err = errors.Join(err, t.close())
		}
	}
	x.metrics, x.params = nil, nil
	return err
}

// folderName makes a folder's name of a run's: unchanged if it is one already, else without what paths or people trip
// over, and with a piece of its digest, so that two runs never become one.
func folderName(run string) string {
	s := strings.Map(func(c rune) rune {
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_' || c == '.' {
			return c
		}
		return '_'
	}, run)
	s = strings.TrimLeft(s, ".")
	if len(s) > 80 {
		s = s[:80]
	}
	if s == run {
		return s
	}
	sum := sha256.Sum256([]byte(run))
	return s + "-" + hex.EncodeToString(sum[:4])
}
