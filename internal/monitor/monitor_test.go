package monitor

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// However many ask, one load is under way; who asks waits for the limit at most, and gets what was there before.
func TestCached(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := NewGroup(t.Context())
		var loads atomic.Int64
		var hang, fail atomic.Bool
		c := NewCached(g, time.Minute, 2*time.Second, func(ctx context.Context) (int64, error) {
			n := loads.Add(1)
			if hang.Load() {
				<-ctx.Done()
				time.Sleep(time.Hour) // as what is stuck in the kernel, it does not even heed its context
				return 0, ctx.Err()
			}
			if fail.Load() {
				return 0, errors.New("no")
			}
			return n, nil
		})
		if _, ok := c.Peek(); ok {
			t.Error("there is a value before any load")
		}
		want := func(what string, v int64, failed bool, took time.Duration, times int64) {
			t.Helper()
			began := time.Now()
			got, err := c.Get(t.Context())
			if got != v || (err != nil) != failed || time.Since(began) != took || loads.Load() != times {
				t.Errorf("%s: %d, %v after %s and %d loads; want %d, an error %v, after %s and %d loads", what, got, err, time.Since(began), loads.Load(), v, failed, took, times)
			}
		}
		synctest.Wait()
		want("the first", 1, false, 0, 1)
		want("while it is fresh", 1, false, 0, 1)
		time.Sleep(time.Minute)
		want("when it is stale", 2, false, 0, 2)
		time.Sleep(time.Minute)
		fail.Store(true)
		want("a load that fails", 2, true, 0, 3)
		want("failed a moment ago", 2, true, 0, 3)
		time.Sleep(time.Minute)
		hang.Store(true)
		want("a load that hangs", 2, true, 2*time.Second, 4)
		want("which still hangs", 2, true, 2*time.Second, 4)
		if v, ok := c.Peek(); v != 2 || !ok {
			t.Errorf("meanwhile there is %d, %v", v, ok)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began := time.Now()
		if _, err := c.Get(ctx); !errors.Is(err, context.DeadlineExceeded) || time.Since(began) != time.Second {
			t.Errorf("a caller with less patience: %v after %s", err, time.Since(began))
		}
		hang.Store(false)
		fail.Store(false)
		time.Sleep(time.Hour + time.Minute)
		want("when that is over", 5, false, 0, 5)
		time.Sleep(time.Minute)
		g.Wait()
		want("after the group's end", 5, true, 0, 5)
	})
}

func TestPages(t *testing.T) {
	g := NewGroup(t.Context())
	defer g.Wait()
	broken := errors.New("the store is away")
	var storeErr, liveErr error
	n := prometheus.NewCounter(prometheus.CounterOpts{Name: "pergola_test_total", Help: "x"})
	m := New(g, Options{
		Name: "hub", Version: "v1", Metrics: []prometheus.Collector{n}, Status: func(context.Context) any { return map[string]int{"jobs": 3} },
		Live:  []Check{{"loop", func(context.Context) error { return liveErr }}},
		Ready: []Check{{"store", func(context.Context) error { return storeErr }}, {"disk", func(context.Context) error { return nil }}},
	})
	get := func(a Access, path, accept string) (int, string) {
		r := httptest.NewRequest(http.MethodGet, path, nil)
		if accept != "" {
			r.Header.Set("Accept", accept)
		}
		w := httptest.NewRecorder()
		m.Handler(a).ServeHTTP(w, r)
		return w.Code, w.Body.String()
	}
	for _, c := range []struct {
		path  string
		least Access
		says  string
	}{
		{"/healthz", Health, `"status":"ok"`},
		{"/readyz", Scrape, `"name":"store","ok":true`},
		{"/metrics", Scrape, "pergola_build_info{goversion="},
		{"/metrics", Scrape, "go_goroutines"},
		{"/status", Own, `{"jobs":3}`},
		{"/debug/goroutines", Own, "goroutine "},
	} {
		for _, a := range []Access{Health, Scrape, Own} {
			code, body := get(a, c.path, "")
			if a < c.least && code != http.StatusNotFound || a >= c.least && (code != http.StatusOK || !strings.Contains(body, c.says)) {
				t.Errorf("%s with access %d: %d %s", c.path, a, code, body)
			}
		}
	}
	g2 := NewGroup(t.Context())
	defer g2.Wait()
	storeErr = broken
	m = New(g2, m.opt)
	code, body := get(Scrape, "/readyz", "")
	var r Report
	if err := json.Unmarshal([]byte(body), &r); err != nil || code != http.StatusServiceUnavailable || r.Status != "failed" || r.Checks[0] != (Result{"store", false, "the store is away"}) || !r.Checks[1].OK || r.Time.IsZero() || r.Version != "v1" {
		t.Errorf("not ready: %d %s", code, body)
	}
	if code, body := get(Scrape, "/readyz", "text/plain"); code != http.StatusServiceUnavailable || body != "failed\nfailed  store: the store is away\nok      disk\n" {
		t.Errorf("as text: %d %q", code, body)
	}
	if code, _ := get(Scrape, "/healthz", ""); code != http.StatusOK {
		t.Errorf("a hub that is not ready lives, and got %d", code)
	}
}

func TestDisk(t *testing.T) {
	dir := t.TempDir()
	d, err := DiskOf(filepath.Join(dir, "not", "there"))
	if err != nil || d.Size == 0 || d.Free > d.Size {
		t.Errorf("%+v, %v", d, err)
	}
	for path, size := range map[string]int{"a/logs/x": 100_000, "a/logs/y/z": 50_000, "b/results/x": 10_000, "c/party/x": 1} {
		path = filepath.Join(dir, path)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, make([]byte, size), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	got := map[string]uint64{}
	if err := Usage(t.Context(), dir, func(p string) string { return strings.Split(p+"//", "/")[1] }, got); err != nil {
		t.Fatal(err)
	}
	if got["logs"] < 150_000 || got["logs"] > 300_000 || got["results"] < 10_000 || got["results"] > 100_000 {
		t.Errorf("%v", got)
	}
	over, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Usage(over, dir, func(string) string { return "" }, got); !errors.Is(err, context.Canceled) {
		t.Errorf("given up: %v", err)
	}
	if err := Usage(t.Context(), filepath.Join(dir, "no"), func(string) string { return "" }, got); err != nil {
		t.Error(err)
	}
	if n, limit, err := OpenFiles(); err != nil || n < 3 || limit < uint64(n) {
		t.Errorf("%d of %d files are open, %v", n, limit, err)
	}
}
