package site

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/pergolafl/pergola/internal/api"
	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/api/pergola/v1/pergolav1connect"
	"github.com/pergolafl/pergola/internal/monitor"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/pki/pkitest"
)

// watchStub is a hub that wants nothing, and ends its streams when told.
type watchStub struct {
	pergolav1connect.UnimplementedSiteServiceHandler
	end chan struct{}
}

func (w watchStub) WatchDesired(ctx context.Context, _ *pb.WatchDesiredRequest, out pergolav1connect.SiteServiceWatchDesiredServerStream) error {
	if err := out.Send(&pb.WatchDesiredResponse{}); err != nil {
		return err
	}
	select {
	case <-w.end:
	case <-ctx.Done():
	}
	return nil
}

// An agent tells at its socket, and nowhere else, how it is: before it reaches its hub, while it does, and afterwards.
func TestStatus(t *testing.T) {
	auth := pkitest.Authority(t, "here")
	pair := pkitest.Keypair(t, auth, pki.Identity{Kind: pki.KindSite, Name: "st-anna"})
	hubCert := pkitest.Cert(t, auth, pki.Identity{Kind: pki.KindHub, Name: pki.HubName})
	dir := t.TempDir()
	if err := pki.SaveKeypair(dir, "site", pair); err != nil {
		t.Fatal(err)
	}
	var lc net.ListenConfig
	ln, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := ln.Addr().String()
	ln.Close() // nobody listens there yet
	if err := os.WriteFile(filepath.Join(dir, ConfigFile), fmt.Appendf(nil, "name = %q\nhub = %q\ncache = %q\n", "st-anna", addr, t.TempDir()), 0o600); err != nil {
		t.Fatal(err)
	}
	a, err := Open(dir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(filepath.Join(dir, MonitorSocket)); !os.IsNotExist(err) {
			t.Errorf("the socket stays: %v", err)
		}
	}()
	until := func(what string, ok func(Status) bool) Status {
		t.Helper()
		for {
			code, body, err := monitor.Ask(t.Context(), filepath.Join(dir, MonitorSocket), "/status")
			var s Status
			if err == nil && code == http.StatusOK {
				if err := json.Unmarshal(body, &s); err != nil {
					t.Fatal(err)
				}
				if ok(s) {
					return s
				}
			}
			select {
			case err := <-done:
				done <- nil
				t.Fatalf("%s: the agent ended: %v", what, err)
			case <-t.Context().Done():
				t.Fatal(what)
			case <-time.After(5 * time.Millisecond): // asking again, until the condition holds
			}
		}
	}
	readyz := func() (int, string) {
		code, body, err := monitor.Ask(t.Context(), filepath.Join(dir, MonitorSocket), "/readyz")
		if err != nil {
			t.Fatal(err)
		}
		return code, string(body)
	}
	s := until("a hub that is not there", func(s Status) bool { return s.Problem != "" })
	if s.Connected || s.Site != "st-anna" || !strings.Contains(s.Problem, "cannot be reached") || s.Next == "" || time.Until(s.Certificate) < 50*time.Minute || len(s.Parts) != 0 {
		t.Errorf("%+v", s)
	}
	if code, body := readyz(); code != http.StatusServiceUnavailable || !strings.Contains(body, "cannot be reached") {
		t.Errorf("%d %s", code, body)
	}

	stub := watchStub{end: make(chan struct{})}
	srv := api.NewServer(slog.New(slog.DiscardHandler))
	pergolav1connect.RegisterSiteServiceHandler(srv, stub)
	mux := http.NewServeMux()
	api.Mount(mux, srv)
	if ln, err = lc.Listen(t.Context(), "tcp", addr); err != nil {
		t.Fatal(err)
	}
	hs := &http.Server{Handler: mux, TLSConfig: pki.ServerTLS(hubCert, auth.Roots(), "h2", "http/1.1"), ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug)}
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = hs.ServeTLS(ln, "", "") // until it is closed
	}()
	s = until("a hub that is there", func(s Status) bool { return s.Connected })
	if s.Problem != "" {
		t.Errorf("%+v", s)
	}
	for { // what /readyz has found is given again for a second
		if code, _ := readyz(); code == http.StatusOK {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	_, metrics, err := monitor.Ask(t.Context(), filepath.Join(dir, MonitorSocket), "/metrics")
	if err != nil || !strings.Contains(string(metrics), "\npergola_agent_connected 1\n") || !strings.Contains(string(metrics), "\npergola_agent_connections_total 1\n") || !strings.Contains(string(metrics), `pergola_agent_ready{check="hub"} 1`) {
		t.Errorf("%v\n%s", err, metrics)
	}
	if err := hs.Close(); err != nil {
		t.Fatal(err)
	}
	<-served
	until("a hub that went", func(s Status) bool { return !s.Connected && strings.Contains(s.Problem, "cannot be reached") })
}

var documented = regexp.MustCompile("(?m)^\\| `(pergola_agent_[a-z_]+)(?:\\{([a-z,]+)\\})?` \\|")

// docs/monitoring.md lists each of the agent's metrics with its labels, and none that there is not.
func TestMetricsOfTheManual(t *testing.T) {
	text, err := os.ReadFile("../../docs/monitoring.md")
	if err != nil {
		t.Fatal(err)
	}
	page, have := map[string]string{}, map[string]string{}
	for _, m := range documented.FindAllStringSubmatch(string(text), -1) {
		page[m[1]] = m[2]
	}
	ch := make(chan *prometheus.Desc)
	go func() {
		defer close(ch)
		collector{}.Describe(ch)
	}()
	form := regexp.MustCompile(`fqName: "([^"]+)".*variableLabels: \{([^}]*)\}`)
	for d := range ch {
		m := form.FindStringSubmatch(d.String())
		have[m[1]] = m[2]
	}
	if !maps.Equal(page, have) {
		t.Errorf("the page has %v\nthere are %v", slices.Sorted(maps.Keys(page)), slices.Sorted(maps.Keys(have)))
	}
}
