package flower

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
)

// superlink is a stand-in for the calls that control makes, over gRPC or HTTP.
type superlink struct {
	grpc    bool
	path    string
	request []byte
	reply   []byte
	status  string   // gRPC
	code    int      // HTTP
	stream  [][]byte // messages of a stream
}

func (s *superlink) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.path = r.URL.Path
	s.request, _ = io.ReadAll(r.Body)
	frame := func(msg []byte) []byte {
		if s.grpc {
			return grpcFrame(msg)
		}
		return append(binary.BigEndian.AppendUint32(nil, uint32(len(msg))), msg...)
	}
	if s.grpc {
		w.Header().Set("Content-Type", "application/grpc")
		w.Header().Set("Trailer", "Grpc-Status, Grpc-Message")
		for _, m := range s.stream {
			_, _ = w.Write(frame(m))
		}
		if s.stream == nil && s.status == "0" {
			_, _ = w.Write(frame(s.reply))
		}
		w.Header().Set("Grpc-Status", s.status)
		w.Header().Set("Grpc-Message", "it%20says no")
		return
	}
	if s.code != 0 {
		w.WriteHeader(s.code)
	}
	for _, m := range s.stream {
		_, _ = w.Write(frame(m))
	}
	_, _ = w.Write(s.reply)
}

func (s *superlink) start(t *testing.T) *control {
	t.Helper()
	server := httptest.NewUnstartedServer(s)
	server.Config.Protocols = new(http.Protocols)
	server.Config.Protocols.SetHTTP1(true)
	server.Config.Protocols.SetUnencryptedHTTP2(true)
	server.Start()
	gen := GenHTTP
	if s.grpc {
		gen = GenControl
	}
	c := newControl(strings.TrimPrefix(server.URL, "http://"), gen)
	t.Cleanup(func() {
		c.close()
		server.Close()
	})
	return c
}

func message(n protowire.Number, parts ...[]byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(nil, n, protowire.BytesType), slices.Concat(parts...))
}

func varint(n protowire.Number, v uint64) []byte {
	return protowire.AppendVarint(protowire.AppendTag(nil, n, protowire.VarintType), v)
}

// The reply is what a 1.41 superlink gave for a finished run, decoded and written again.
var runsReply = slices.Concat(
	message(1, varint(1, 5), message(2, varint(1, 5), message(2, []byte("acme/a")), message(10, message(1, []byte("running"))))),
	message(1, varint(1, 7), message(2, varint(1, 7), message(10, message(1, []byte("finished")), message(2, []byte("failed")), message(3, []byte("ServerApp failed"))))),
	message(2, []byte("2026-11-23")),
)

func TestControl(t *testing.T) {
	for _, grpc := range []bool{true, false} {
		s := &superlink{grpc: grpc, status: "0", reply: varint(1, 42)}
		c := s.start(t)
		id, err := c.startRun(t.Context(), []byte("FAB"), "abc", map[string]any{"b": true, "f": 1.5, "i": int64(-3), "s": "x"})
		if err != nil || id != 42 {
			t.Fatalf("grpc %v: startRun = %d, %v", grpc, id, err)
		}
		entry := func(key string, value []byte) []byte { return message(2, message(1, []byte(key)), message(2, value)) }
		want := slices.Concat(
			message(1, message(1, []byte("abc")), message(2, []byte("FAB"))),
			entry("b", varint(13, 1)),
			entry("f", protowire.AppendFixed64(protowire.AppendTag(nil, 1, protowire.Fixed64Type), math.Float64bits(1.5))),
			entry("i", varint(8, 5)),
			entry("s", message(14, []byte("x"))),
		)
		if grpc {
			want = grpcFrame(want)
		}
		if !slices.Equal(s.request, want) {
			t.Errorf("grpc %v: request %x, want %x", grpc, s.request, want)
		}
		if wantPath := map[bool]string{true: "/flwr.proto.Control/StartRun", false: "/v1/control/start-run"}[grpc]; s.path != wantPath {
			t.Errorf("path %s", s.path)
		}

		s.reply = runsReply
		if st, err := c.state(t.Context(), 7); err != nil || st != (runStatus{"finished", "failed", "ServerApp failed"}) {
			t.Errorf("grpc %v: state = %+v, %v", grpc, st, err)
		}
		if _, err := c.state(t.Context(), 8); err == nil || !strings.Contains(err.Error(), "does not know run 8") {
			t.Errorf("grpc %v: another run: %v", grpc, err)
		}

		s.reply, s.stream = nil, [][]byte{
			slices.Concat(message(1, []byte("one\ntw")), protowire.AppendFixed64(protowire.AppendTag(nil, 2, protowire.Fixed64Type), math.Float64bits(2.5))),
			message(1, []byte("o\n")),
		}
		var text strings.Builder
		after, err := c.follow(t.Context(), 7, 1, func(s string) { text.WriteString(s) })
		if err != nil || after != 2.5 || text.String() != "one\ntwo\n" {
			t.Errorf("grpc %v: follow = %v, %v, %q", grpc, after, err, text.String())
		}

		s.stream = nil
		s.status, s.code = "12", http.StatusNotFound
		if _, err := c.startRun(t.Context(), nil, "", nil); !errors.Is(err, errNotOffered) {
			t.Errorf("grpc %v: not offered: %v", grpc, err)
		}
		s.status, s.code, s.reply = "9", http.StatusBadRequest, []byte("it says no")
		var refused *callError
		if _, err := c.startRun(t.Context(), nil, "", nil); !errors.As(err, &refused) || !strings.Contains(err.Error(), "it says no") {
			t.Errorf("grpc %v: refused: %v", grpc, err)
		}
		s.status, s.code, s.reply = "0", http.StatusOK, nil
		if _, err := c.startRun(t.Context(), nil, "", nil); err == nil {
			t.Errorf("grpc %v: no run id is an error", grpc)
		}
	}
}

// Whatever a superlink answers, the state is one of the run that was asked for, or an error.
func FuzzDecodeRuns(f *testing.F) {
	f.Add(runsReply, uint64(7))
	f.Add([]byte{0x0a, 0xff}, uint64(0))
	f.Fuzz(func(t *testing.T, reply []byte, run uint64) {
		if st, err := decodeRuns(reply, run); err != nil && st.status != "" && !strings.Contains(err.Error(), "bad message") {
			t.Errorf("%+v with %v", st, err)
		}
	})
}

func TestWaitReady(t *testing.T) {
	grpc := httptest.NewUnstartedServer(http.NotFoundHandler())
	grpc.Config.Protocols = new(http.Protocols)
	grpc.Config.Protocols.SetUnencryptedHTTP2(true)
	grpc.Start()
	defer grpc.Close()
	plainHTTP := httptest.NewServer(http.NotFoundHandler())
	defer plainHTTP.Close()
	addr := func(s *httptest.Server) string { return strings.TrimPrefix(s.URL, "http://") }
	if err := speaksHTTP2(t.Context(), addr(grpc)); err != nil {
		t.Error(err)
	}
	if err := speaksHTTP2(t.Context(), addr(plainHTTP)); err == nil {
		t.Error("a web server passes for gRPC")
	}
	if err := speaksHTTP1(t.Context(), addr(plainHTTP)); err != nil {
		t.Error(err)
	}
	if err := speaksHTTP1(t.Context(), addr(grpc)); err == nil {
		t.Error("gRPC passes for HTTP")
	}

	tries := 0
	third := func(context.Context) error {
		if tries++; tries < 3 {
			return errors.New("not yet")
		}
		return nil
	}
	never := func(context.Context) error { return errors.New("nothing there") }
	alive, dead := make(chan struct{}), make(chan struct{})
	close(dead)
	if err := waitReady(t.Context(), alive, []func(context.Context) error{third}); err != nil || tries != 3 {
		t.Errorf("after %d tries: %v", tries, err)
	}
	if err := waitReady(t.Context(), dead, []func(context.Context) error{never}); !errors.Is(err, errDied) {
		t.Error(err)
	}
	ctx, cancel := context.WithTimeoutCause(t.Context(), 2*readyPause, errNotReady)
	defer cancel()
	if err := waitReady(ctx, alive, []func(context.Context) error{never}); !errors.Is(err, errNotReady) || !strings.Contains(err.Error(), "nothing there") {
		t.Error(err)
	}
}

func TestProgramEnv(t *testing.T) {
	got := programEnv([]string{
		"PATH=/a:/b", "PYTHONDONTWRITEBYTECODE=1", "FLWR_HOME=/users/own", "X=1", "no_proxy=corp", "https_proxy=http://p", "broken",
	}, "/env/bin", "/job/flwr", "127.1.2.3", "127.0.0.1")
	want := []string{
		"X=1", "https_proxy=http://p", "FLWR_DISABLE_UPDATE_CHECK=1", "FLWR_HOME=/job/flwr", "FLWR_TELEMETRY_ENABLED=0",
		"NO_PROXY=corp,localhost,127.0.0.1,127.1.2.3", "PATH=/env/bin:/a:/b", "PYTHONUNBUFFERED=1", "no_proxy=corp,localhost,127.0.0.1,127.1.2.3",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %q", got)
	}
}

// Telemetry is the job's to switch on.
func TestTelemetry(t *testing.T) {
	for given, want := range map[string]string{"": "0", telemetry + "=1": "1", telemetry + "=0": "0"} {
		if got := programEnv([]string{given}, "/bin", "/home"); !slices.Contains(got, telemetry+"="+want) {
			t.Errorf("given %q: %q", given, got)
		}
	}
}

// What is written is read back as the same by the rule that Flower has for pairs.
func TestNodeConfig(t *testing.T) {
	config := map[string]any{"partition-id": 1, "name": "it's me", "path": `C:\data "x"`, "rate": 2.0, "tiny": 1e-9, "on": true, "empty": "", "a b": `both ' and "`, "x,y=z": "two\nlines"}
	text, err := nodeConfig(config, " ")
	if err != nil {
		t.Fatal(err)
	}
	back, err := ParseRunConfig([]string{text})
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]any{"partition-id": int64(1), "name": "it's me", "path": `C:\data "x"`, "rate": 2.0, "tiny": 1e-9, "on": true, "empty": "", "a b": `both ' and "`, "x,y=z": "two\nlines"}
	for k, v := range want {
		if back[k] != v {
			t.Errorf("%s = %v (%T), want %v", k, back[k], back[k], v)
		}
	}
	for _, bad := range []map[string]any{{"": 1}, {"x": []any{1}}, {"x": nil}} {
		if _, err := nodeConfig(bad, " "); err == nil {
			t.Errorf("%v was taken", bad)
		}
	}
}
