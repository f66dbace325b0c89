package metrics

import (
	"bytes"
	"context"
	"encoding/csv"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// The check values of CRC-32C are those of RFC 3720, B.4; the frames are
// those that TensorBoard itself writes.
func TestTFRecord(t *testing.T) {
	for _, c := range []struct {
		data string
		want uint32
	}{
		{strings.Repeat("\x00", 32), 0x8a9136aa},
		{strings.Repeat("\xff", 32), 0x62a8ab43},
		{"123456789", 0xe3069283},
	} {
		masked := (c.want>>15 | c.want<<17) + 0xa282ead8
		if got := maskedCRC([]byte(c.data)); got != masked {
			t.Errorf("%q: got %#x, want %#x", c.data, got, masked)
		}
	}
	for _, c := range []struct{ name, got, want string }{
		{"version", hex.EncodeToString(appendTFRecord(nil, versionEvent(time.Unix(1, 5e8)))), goldenVersion},
		{"scalar", hex.EncodeToString(appendTFRecord(nil, scalarEvent(time.Unix(1, 5e8), 3, "loss", 0.25))), goldenScalar},
		{"text", hex.EncodeToString(appendTFRecord(nil, textEvent(time.Unix(1, 5e8), "params/lr", "0.1"))), goldenText},
	} {
		if c.got != c.want {
			t.Errorf("%s: got\n%s, want\n%s", c.name, c.got, c.want)
		}
	}
}

// lines writes a metrics file of records.
func lines(t *testing.T, path string, recs ...Record) {
	t.Helper()
	var b bytes.Buffer
	for _, r := range recs {
		j, err := json.Marshal(r)
		must(t, err)
		b.Write(append(j, '\n'))
	}
	must(t, os.WriteFile(path, b.Bytes(), 0o600))
}

func files(t *testing.T, dir string) []string {
	t.Helper()
	var out []string
	must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			path, err = filepath.Rel(dir, path)
			out = append(out, path)
		}
		return err
	}))
	return out
}

func readCSV(t *testing.T, path string) [][]string {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	out, err := csv.NewReader(f).ReadAll()
	must(t, err)
	return out
}

const eventFile = "events.out.tfevents.0000000000.pergola"

func TestExport(t *testing.T) {
	dir := t.TempDir()
	results := filepath.Join(dir, "results")
	at := time.Date(2026, 1, 2, 3, 4, 5, 6e6, time.UTC)
	one, two := filepath.Join(dir, "1.jsonl"), filepath.Join(dir, "2.jsonl")
	lines(t, one,
		Record{at, "somebody", Metric, "loss", 0.1, "", 3, "", ""},
		Record{at, "site-1", Param, `a,"b"`, 0, "two\nlines, \"quoted\"", 0, "fold 1", "r1"},
		Record{at, "site-1", Tag, "mlflow.user", 0, "me", 0, "fold 1", "r1"},
		Record{at, "site-1", Metric, "loss", 1e-300, "", -1, "fold_1", "r2"},
	)
	f, err := os.OpenFile(one, os.O_APPEND|os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteString("torn {\n{\"time\":\"2026-")
	must(t, errors.Join(err, f.Close()))
	lines(t, two, Record{at, "site-2", Metric, "../../x", 2, "", 0, "../../../escape", "r3"})
	sources := []Source{{"hub", filepath.Join(dir, "none.jsonl")}, {"site-1", one}, {"site-2", two}}

	// A second time, as by a hub that was killed before it could say that it had exported, replaces the first.
	for range 2 {
		must(t, os.MkdirAll(filepath.Join(results, tempPrefix+"left"), 0o755))
		out, err := Export(t.Context(), results, sources)
		must(t, err)
		if want := (Exported{Dir: filepath.Join(results, "metrics"), Records: 5, Skipped: 2}); out != want {
			t.Errorf("got %+v, want %+v", out, want)
		}
	}
	want := []string{"metrics/metrics.csv", "metrics/params.csv", "metrics/tensorboard/site-1/" + eventFile}
	for _, run := range []string{"site-1/" + folderName("fold 1"), "site-1/fold_1", "site-2/" + folderName("../../../escape")} {
		want = append(want, "metrics/tensorboard/"+run+"/"+eventFile)
	}
	slices.Sort(want)
	got := files(t, results)
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("files %q, want %q", got, want)
	}
	const when = "2026-01-02T03:04:05.006Z"
	if got, want := fmt.Sprint(readCSV(t, filepath.Join(results, "metrics", MetricsCSV))), fmt.Sprint([][]string{
		metricColumns,
		{when, "site-1", "", "loss", "3", "0.1", "metric", ""},
		{when, "site-1", "fold_1", "loss", "-1", "1e-300", "metric", "r2"},
		{when, "site-2", "../../../escape", "../../x", "0", "2", "metric", "r3"},
	}); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if got, want := fmt.Sprint(readCSV(t, filepath.Join(results, "metrics", ParamsCSV))), fmt.Sprint([][]string{
		paramColumns,
		{when, "site-1", "fold 1", `a,"b"`, "two\nlines, \"quoted\"", "param", "r1"},
		{when, "site-1", "fold 1", "mlflow.user", "me", "tag", "r1"},
	}); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestExportOfNothing(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "x.jsonl")
	for _, text := range []string{"", "no record\n"} {
		must(t, os.WriteFile(path, []byte(text), 0o600))
		out, err := Export(t.Context(), filepath.Join(dir, "results"), []Source{{"a", path}, {"b", filepath.Join(dir, "none")}})
		if err != nil || out.Dir != "" {
			t.Errorf("%q: %+v, %v", text, out, err)
		}
	}
	if got := files(t, dir); len(got) != 1 {
		t.Errorf("files %q", got)
	}
}

// What the app wrote is never replaced or followed.
func TestExportBesideTheApps(t *testing.T) {
	rec := Record{time.Unix(1, 0), "s", Metric, "a", 1, "", 0, "", ""}
	for _, c := range []struct {
		name string
		prep func(results string) error
		want string // "" = an error
	}{
		{"a folder of that name", func(r string) error { return os.Mkdir(filepath.Join(r, "metrics"), 0o700) }, "pergola-metrics"},
		{"a folder with a CSV of its own", func(r string) error {
			must(t, os.Mkdir(filepath.Join(r, "metrics"), 0o700))
			return os.WriteFile(filepath.Join(r, "metrics", MetricsCSV), []byte("time,loss\n"), 0o600)
		}, "pergola-metrics"},
		{"a file", func(r string) error { return os.WriteFile(filepath.Join(r, "metrics"), nil, 0o600) }, "pergola-metrics"},
		{"a link", func(r string) error { return os.Symlink(t.TempDir(), filepath.Join(r, "metrics")) }, "pergola-metrics"},
		{"both names", func(r string) error {
			return errors.Join(os.Mkdir(filepath.Join(r, "metrics"), 0o700), os.Mkdir(filepath.Join(r, "pergola-metrics"), 0o700))
		}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			results := filepath.Join(dir, "results")
			must(t, os.Mkdir(results, 0o700))
			must(t, c.prep(results))
			before := files(t, results)
			lines(t, filepath.Join(dir, "x"), rec)
			out, err := Export(t.Context(), results, []Source{{"s", filepath.Join(dir, "x")}})
			if (err == nil) != (c.want != "") || c.want != "" && out.Dir != filepath.Join(results, c.want) {
				t.Errorf("%+v, %v", out, err)
			}
			after := files(t, results)
			for _, f := range before {
				if !slices.Contains(after, f) {
					t.Errorf("%s is gone", f)
				}
			}
			if left, _ := filepath.Glob(filepath.Join(results, tempPrefix+"*")); len(left) > 0 {
				t.Errorf("left: %q", left)
			}
		})
	}
}

// An export that breaks off leaves nothing.
func TestExportBreaksOff(t *testing.T) {
	dir := t.TempDir()
	lines(t, filepath.Join(dir, "x"), Record{time.Unix(1, 0), "s", Metric, "a", 1, "", 0, "", ""})
	must(t, os.Symlink("x", filepath.Join(dir, "link")))
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for _, c := range []struct {
		name string
		ctx  context.Context
		from []Source
	}{
		{"it is told to", ended, []Source{{"s", filepath.Join(dir, "x")}}},
		{"a party's file is a link", t.Context(), []Source{{"s", filepath.Join(dir, "x")}, {"t", filepath.Join(dir, "link")}}},
	} {
		if _, err := Export(c.ctx, filepath.Join(dir, "results"), c.from); err == nil {
			t.Errorf("%s: no error", c.name)
		}
		if got := files(t, dir); len(got) != 2 {
			t.Errorf("%s: files %q", c.name, got)
		}
	}
}

// More runs than files may be open, and more than there are folders for.
func TestExportOfManyRuns(t *testing.T) {
	dir := t.TempDir()
	var recs []Record
	for step := range int64(2) {
		for i := range maxFolders + 7 {
			recs = append(recs, Record{time.Unix(1, 0), "s", Metric, "a", 1, "", step, fmt.Sprintf("run-%d", i), ""})
		}
	}
	lines(t, filepath.Join(dir, "x"), recs...)
	out, err := Export(t.Context(), filepath.Join(dir, "results"), []Source{{"s", filepath.Join(dir, "x")}})
	must(t, err)
	if out.Records != len(recs) || out.Merged != 14 {
		t.Errorf("%+v", out)
	}
	if n := len(files(t, filepath.Join(out.Dir, Tensorboard))); n != maxFolders+1 {
		t.Errorf("%d event files", n)
	}
	one, err := os.ReadFile(filepath.Join(out.Dir, Tensorboard, "s", "run-0", eventFile))
	must(t, err)
	want := appendTFRecord(nil, versionEvent(time.Unix(1, 0)))
	for step := range int64(2) {
		want = appendTFRecord(want, scalarEvent(time.Unix(1, 0), step, "a", 1))
	}
	if !bytes.Equal(one, want) {
		t.Errorf("got %x, want %x", one, want)
	}
}

// Made by tensorboard 2.21.0: RecordWriter and the protobuf messages of tensorboard.compat.proto.
const (
	goldenVersion = "1800000000000000a37f4b2209000000000000f83f1a0d627261696e2e4576656e743a322a28646c"
	goldenScalar  = "1a00000000000000129bd82d09000000000000f83f10032a0d0a0b0a046c6f7373150000803ed054b255"
	goldenText    = "31000000000000009d8383e909000000000000f83f2a260a240a09706172616d732f6c72420d08071204120208014203302e314a080a060a0474657874ce95c73e"
)
