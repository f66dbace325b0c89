package api

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"

	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/api/pergola/v1/pergolav1connect"
	"github.com/pergolafl/pergola/internal/compat"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/sock"
)

// spoken is a hub and a runner that say in which version they were called.
type spoken struct {
	pergolav1connect.UnimplementedJobServiceHandler
	pergolav1connect.UnimplementedRunnerServiceHandler
	last atomic.Int64
}

func (s *spoken) ListSites(ctx context.Context, _ *pb.ListSitesRequest) (*pb.ListSitesResponse, error) {
	s.last.Store(int64(Spoken(ctx)))
	return &pb.ListSitesResponse{}, nil
}

func (s *spoken) SetDesired(ctx context.Context, _ *pb.SetDesiredRequest) (*pb.SetDesiredResponse, error) {
	s.last.Store(int64(Spoken(ctx)))
	return &pb.SetDesiredResponse{}, nil
}

func (s *spoken) handler() http.Handler {
	srv := NewServer(slog.New(slog.DiscardHandler))
	pergolav1connect.RegisterJobServiceHandler(srv, s)
	pergolav1connect.RegisterRunnerServiceHandler(srv, s)
	mux := http.NewServeMux()
	Mount(mux, srv)
	return mux
}

// A server plays with older and newer callers: the newest version that both speak is used, and where there is none both are named, and
// who is to be updated. Fields that it does not know do no harm.
func TestOlderAndNewerCallers(t *testing.T) {
	s := &spoken{}
	ts := httptest.NewServer(s.handler())
	defer ts.Close()
	const sites, desired = "/pergola.v1.JobService/ListSites", "/pergola.v1.RunnerService/SetDesired"
	unknown := protowire.AppendString(protowire.AppendTag(nil, 999, protowire.BytesType), "of a later version")
	for _, c := range []struct {
		name, path, header, kind string
		body                     []byte
		want                     int64  // 0: refused
		say, next                string // of the refusal
	}{
		{"one that says nothing is of version 1", sites, "", "application/json", []byte("{}"), 1, "", ""},
		{"an older one", sites, "1", "application/json", []byte("{}"), 1, "", ""},
		{"one of the same version", sites, Control.String(), "application/json", []byte("{}"), 2, "", ""},
		{"a newer one that knows this version", sites, "2-9", "application/json", []byte(`{"fieldOfVersion9": {"a": [1]}}`), 2, "", ""},
		{"a newer one with a field that is not known, as protobuf", sites, "2-9", "application/proto", unknown, 2, "", ""},
		{"one that is too new", sites, "3-4", "application/json", []byte("{}"), 0, "the caller (pergola v9.9.9) versions 3 to 4", "update pergola at the hub"},
		{"one that is mad", sites, "a-b", "application/json", []byte("{}"), 0, "none in common", ""},
		{"a starter that says nothing", desired, "", "application/json", []byte("{}"), 1, "", ""},
		{"a starter that is newer", desired, "1-7", "application/proto", unknown, 1, "", ""},
		{"a starter that is too new", desired, "2", "application/json", []byte("{}"), 0, "its starter (pergola v9.9.9) version 2", "update pergola at the runner"},
	} {
		s.last.Store(0)
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, ts.URL+c.path, bytes.NewReader(c.body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", c.kind)
		req.Header.Set(BuildHeader, "v9.9.9")
		if c.header != "" {
			req.Header.Set(ProtocolHeader, c.header)
		}
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if got := s.last.Load(); got != c.want || (res.StatusCode == http.StatusOK) != (c.want > 0) {
			t.Errorf("%s: answered in version %d with %s %s", c.name, got, res.Status, text)
		}
		if got := res.Header.Get(ProtocolHeader); got != Control.String() && got != Runner.String() {
			t.Errorf("%s: the answer says %q", c.name, got)
		}
		if !strings.Contains(string(text), c.say) {
			t.Errorf("%s: %s, want %q", c.name, text, c.say)
		}
		if c.say != "" && !strings.Contains(string(text), "speaks version") {
			t.Errorf("%s: both are to be named: %s", c.name, text)
		}
	}
}

// disguised has a server say that it speaks something else; "": it says nothing, as one of version 1.
func disguised(h http.Handler, header string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.Header.Del(ProtocolHeader) // its own look at the caller is not what is played here
		h.ServeHTTP(&disguise{ResponseWriter: w, header: header}, r)
	})
}

type disguise struct {
	http.ResponseWriter
	header string
	done   bool
}

func (d *disguise) WriteHeader(code int) {
	d.done = true
	d.Header().Del(ProtocolHeader)
	if d.header != "" {
		d.Header().Set(ProtocolHeader, d.header)
		d.Header().Set(BuildHeader, "v7.7.7")
	}
	d.ResponseWriter.WriteHeader(code)
}

func (d *disguise) Write(b []byte) (int, error) {
	if !d.done {
		d.WriteHeader(http.StatusOK)
	}
	return d.ResponseWriter.Write(b)
}

func (d *disguise) Flush() {
	if f, ok := d.ResponseWriter.(http.Flusher); ok {
		f.Flush()
	}
}

// A caller plays with older and newer servers, both over a socket as a starter does.
func TestOlderAndNewerServers(t *testing.T) {
	for _, c := range []struct {
		name, header string
		control      int // what is spoken with a hub; 0: refused
		runner       int // what is spoken with a runner; 0: refused
	}{
		{"one that says nothing", "", 1, 1},
		{"an older one", "1", 1, 1},
		{"a newer one that knows this version", "1-5", 2, 1},
		{"one that is too new", "5-6", 0, 0},
		{"one that cannot be understood", "x", 0, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "control.sock")
			ln, err := sock.Listen(path)
			if err != nil {
				t.Fatal(err)
			}
			hs := &http.Server{Handler: disguised((&spoken{}).handler(), c.header)}
			go func() { _ = hs.Serve(ln) }()
			defer hs.Close()
			cl := NewRunnerClient(path)
			defer cl.Close()
			check := func(what string, want int, err error, say string) {
				t.Helper()
				if want > 0 && (err != nil || cl.Spoken() != want) {
					t.Errorf("%s: version %d, %v; want %d", what, cl.Spoken(), err, want)
				}
				if want == 0 && (problem.CodeOf(err) != problem.Version || !strings.Contains(err.Error(), say) || !strings.Contains(err.Error(), "this machine (pergola")) {
					t.Errorf("%s: %v", what, err)
				}
			}
			_, err = cl.Jobs.ListSites(t.Context(), &pb.ListSitesRequest{})
			check("the hub", c.control, err, "of the control protocol, the hub")
			_, err = cl.Runner.SetDesired(t.Context(), &pb.SetDesiredRequest{})
			check("the runner", c.runner, err, "of the runner protocol, the runner")
		})
	}
	// A hub that is not there is no hub of an older version.
	cl := newClient(func() *http.Transport {
		return &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) { return nil, io.ErrClosedPipe }}
	}, "http://hub")
	if _, err := cl.Jobs.ListSites(t.Context(), &pb.ListSitesRequest{}); problem.CodeOf(err) != problem.HubUnreachable || cl.Spoken() != 0 {
		t.Errorf("nobody there: %v, version %d", err, cl.Spoken())
	}
}

// What this Pergola speaks includes what the one before did (docs/versions.md).
func TestSpeaksWhatWasSpoken(t *testing.T) {
	for name, r := range map[string]compat.Range{"control": Control, "runner": Runner} {
		if !r.Valid() || r.Min > max(1, r.Max-1) {
			t.Errorf("%s: %s", name, r)
		}
	}
}
