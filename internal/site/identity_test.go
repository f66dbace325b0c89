package site

import (
	"context"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pergolafl/pergola/internal/api"
	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/api/pergola/v1/pergolav1connect"
	"github.com/pergolafl/pergola/internal/config"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/pki/pkitest"
	"github.com/pergolafl/pergola/internal/problem"
)

// otherHub is a hub of another age, as an agent sees it.
type otherHub struct {
	pergolav1connect.UnimplementedSiteServiceHandler
	called chan struct{}
}

func (h *otherHub) WatchDesired(ctx context.Context, req *pb.WatchDesiredRequest, out pergolav1connect.SiteServiceWatchDesiredServerStream) error {
	if req.GetProtocol() != 1 { // as hubs of version 1 do
		return problem.New(problem.Version, "", "the hub speaks version 1")
	}
	if err := out.Send(&pb.WatchDesiredResponse{}); err != nil {
		return err
	}
	h.called <- struct{}{}
	<-ctx.Done()
	return ctx.Err()
}

type otherWriter struct {
	http.ResponseWriter
	speaks string
}

func (w otherWriter) WriteHeader(code int) {
	w.Header().Del(api.ProtocolHeader)
	if w.speaks != "" {
		w.Header().Set(api.ProtocolHeader, w.speaks)
		w.Header().Set(api.BuildHeader, "v9.9.9")
	}
	w.ResponseWriter.WriteHeader(code)
}

func (w otherWriter) Write(b []byte) (int, error) {
	if w.Header().Get(api.ProtocolHeader) != w.speaks {
		w.WriteHeader(http.StatusOK)
	}
	return w.ResponseWriter.Write(b)
}

func (w otherWriter) Flush() {
	if f, ok := w.ResponseWriter.(http.Flusher); ok {
		f.Flush()
	}
}

// An agent plays with older and newer hubs: with an older one it does without what that cannot, and one that is too new is refused with both
// named, for good.
func TestHubsOfOtherAges(t *testing.T) {
	auth := pkitest.Authority(t, "here")
	hubCert := pkitest.Cert(t, auth, pki.Identity{Kind: pki.KindHub, Name: pki.HubName})
	for name, c := range map[string]struct {
		speaks string
		want   int // 0: refused
	}{
		"one of version 1":                     {"", 1},
		"a newer one that knows this version":  {"2-9", 2},
		"one that is too new for this version": {"8-9", 0},
	} {
		t.Run(name, func(t *testing.T) {
			h := &otherHub{called: make(chan struct{}, 1)}
			srv := api.NewServer(slog.New(slog.DiscardHandler))
			pergolav1connect.RegisterSiteServiceHandler(srv, h)
			mux := http.NewServeMux()
			api.Mount(mux, srv)
			ts := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				r.Header.Del(api.ProtocolHeader)
				mux.ServeHTTP(otherWriter{w, c.speaks}, r)
			}))
			ts.TLS = pki.ServerTLS(hubCert, auth.Roots(), "http/1.1")
			ts.StartTLS()
			defer ts.Close()
			dir := t.TempDir()
			k, err := auth.NewKeypair(pki.Identity{Kind: pki.KindSite, Name: "a"}, nil, time.Hour)
			if err == nil {
				err = pki.SaveKeypair(dir, "site", k)
			}
			if err == nil {
				err = config.Write(filepath.Join(dir, ConfigFile), Config{Name: "a", Hub: ts.Listener.Addr().String(), Cache: t.TempDir()})
			}
			if err != nil {
				t.Fatal(err)
			}
			a, err := Open(dir, slog.New(slog.DiscardHandler))
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			ended := make(chan error, 1)
			told := make(chan string, 10)
			a.Status = func(s string) { told <- s }
			go func() { ended <- a.Run(ctx) }()
			if c.want == 0 {
				err := <-ended
				if problem.CodeOf(err) != problem.Version || !strings.Contains(err.Error(), "the hub (pergola v9.9.9) versions 8 to 9") || !strings.Contains(err.Error(), "update pergola at this machine") {
					t.Errorf("the agent ended with %v", err)
				}
				return
			}
			<-h.called
			for s := range told {
				if strings.HasPrefix(s, "connected") {
					break
				}
			}
			if v := a.client.Spoken(); v != c.want {
				t.Errorf("version %d is spoken, want %d", v, c.want)
			}
			cancel()
			if err := <-ended; err != nil {
				t.Error(err)
			}
		})
	}
}
