package fleet

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// superlink is what a gate calls: it keeps the calls, and answers as it is told. It stands for every generation's Fleet API.
type superlink struct {
	*httptest.Server
	mu     sync.Mutex // guards the rest
	calls  []received
	answer func(path string) []byte
	refuse bool // for the signature
}

type received struct {
	path   string
	header http.Header
	body   []byte
}

func newSuperlink(t *testing.T) *superlink {
	s := &superlink{}
	s.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		s.mu.Lock()
		s.calls = append(s.calls, received{r.URL.Path, r.Header.Clone(), body})
		var out []byte
		if s.answer != nil {
			out = s.answer(r.URL.Path)
		}
		refuse := s.refuse
		s.mu.Unlock()
		if refuse && !strings.HasPrefix(r.Header.Get("Content-Type"), grpcType) {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		if refuse {
			w.Header().Set("Content-Type", grpcType)
			w.Header().Set("Grpc-Status", "16")
			return
		}
		if strings.HasPrefix(r.Header.Get("Content-Type"), grpcType) {
			w.Header().Set("Content-Type", grpcType)
			w.Header().Set("Trailer", "Grpc-Status")
			_, _ = w.Write(frame(out))
			w.Header().Set("Grpc-Status", "0")
			return
		}
		_, _ = w.Write(out)
	}))
	s.Config.Protocols = new(http.Protocols)
	s.Config.Protocols.SetHTTP1(true)
	s.Config.Protocols.SetUnencryptedHTTP2(true)
	s.Start()
	t.Cleanup(s.Close)
	return s
}

func (s *superlink) got(path string) (out []received) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.calls {
		if c.path == path {
			out = append(out, c)
		}
	}
	return out
}

func (s *superlink) addr() string { return s.Listener.Addr().String() }

// rig is a gate with a superlink behind it.
type rig struct {
	*Gate
	link *superlink
	mu   sync.Mutex // guards warnings
	warn []string
}

func newRig(t *testing.T, tolerance time.Duration) *rig {
	r := &rig{link: newSuperlink(t)}
	r.Gate = New(Options{Tolerance: tolerance, Warn: func(site, text string) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.warn = append(r.warn, site+": "+text)
	}})
	done := make(chan error, 1)
	go func() { done <- r.Serve() }()
	t.Cleanup(func() {
		r.Close()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	r.Open(r.link.addr())
	return r
}

func (r *rig) warnings() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.warn)
}

// client calls as a site's supernode, over HTTP/1.1 or gRPC's HTTP/2.
func (r *rig) client(t *testing.T, site string, grpc bool) *http.Client {
	p := new(http.Protocols)
	if grpc {
		p.SetUnencryptedHTTP2(true)
	} else {
		p.SetHTTP1(true)
	}
	tr := &http.Transport{Protocols: p, DialContext: func(context.Context, string, string) (net.Conn, error) { return r.Dial(site) }}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

type reply struct {
	status int // HTTP
	grpc   string
	body   []byte
}

func post(t *testing.T, c *http.Client, path string, body []byte, header ...string) reply {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://superlink"+path, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/protobuf")
	if strings.HasPrefix(path, "/flwr.proto.") {
		req.Header.Set("Content-Type", grpcType)
		req.Header.Set("TE", "trailers")
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	out, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return reply{resp.StatusCode, resp.Header.Get("Grpc-Status") + resp.Trailer.Get("Grpc-Status"), out}
}

func TestOnlyTheFleetAPI(t *testing.T) {
	r := newRig(t, time.Hour)
	h1, h2 := r.client(t, "a", false), r.client(t, "a", true)
	for _, c := range []struct {
		client *http.Client
		path   string
		want   string // status, HTTP and gRPC
	}{
		{h1, "/v1/fleet/push-messages", "200 "},
		{h1, "/v1/fleet/register-node", "200 "},
		{h1, "/v1/control/start-run", "403 "},
		{h1, "/v1/control/stop-run", "403 "},
		{h1, "/v1/control/list-runs", "403 "},
		{h1, "/v1/runtime/pull-messages", "403 "},
		{h1, "/v1/fleet/../control/start-run", "403 "},
		{h1, "/v1/fleet/%2e%2e/control/start-run", "403 "},
		{h1, "/v1/fleet//push-messages", "403 "},
		{h1, "/v1/fleet/push-messages/", "403 "},
		{h1, "/v1/fleet/push-messages?x=/v1/control", "403 "},
		{h1, "/v1/Fleet/push-messages", "403 "},
		{h1, "//v1/fleet/push-messages", "403 "},
		{h1, "/", "403 "},
		{h1, "/flwr.proto.Fleet/PushMessages", "403 "}, // no gRPC without HTTP/2
		{h2, "/flwr.proto.Fleet/PushMessages", "200 0"},
		{h2, "/flwr.proto.GrpcAdapter/SendReceive", "200 0"},
		{h2, "/flwr.proto.Control/StartRun", "200 7"},
		{h2, "/flwr.proto.Exec/StartRun", "200 7"},
		{h2, "/flwr.proto.ServerAppIo/PullMessages", "200 7"},
		{h2, "/flwr.proto.Fleet/../Control/StartRun", "200 7"},
		{h2, "/v1/control/start-run", "403 "},
		{h2, "/v1/fleet/push-messages", "200 "},
	} {
		body := frame(nil)
		if strings.HasPrefix(c.path, "/v1") {
			body = nil
		}
		before := len(r.link.got(c.path))
		got := post(t, c.client, c.path, body)
		if s := fmt.Sprintf("%d %s", got.status, got.grpc); s != c.want {
			t.Errorf("%s: answered %s, want %s", c.path, s, c.want)
		}
		if passed := len(r.link.got(c.path)) > before; passed != (strings.HasPrefix(c.want, "200") && !strings.HasSuffix(c.want, "7")) {
			t.Errorf("%s: reached the superlink: %v", c.path, passed)
		}
	}
	for _, method := range []string{http.MethodGet, http.MethodPut, http.MethodDelete, http.MethodOptions} {
		req, err := http.NewRequestWithContext(t.Context(), method, "http://superlink/v1/fleet/pull-messages", http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := h1.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusForbidden {
			t.Errorf("%s: %s", method, resp.Status)
		}
	}
	if w := r.warnings(); !slices.ContainsFunc(w, func(s string) bool { return strings.Contains(s, "a: site a called POST /v1/control/start-run") }) {
		t.Errorf("nobody was warned: %q", w)
	}
}

// What a superlink sees of signs of life.
func TestIntervals(t *testing.T) {
	ping := append(nodeMessage(7), interval(2, ownInterval)...)
	for name, c := range map[string]struct {
		tolerance time.Duration
		path      string
		message   []byte
		adapter   string
		want      float64
	}{
		"heartbeat over HTTP":             {10 * time.Minute, "/v1/fleet/send-node-heartbeat", ping, "", 300},
		"heartbeat over gRPC":             {10 * time.Minute, "/flwr.proto.Fleet/SendNodeHeartbeat", ping, "", 300},
		"activation":                      {time.Hour, "/v1/fleet/activate-node", append(stringField(1, "key"), interval(2, ownInterval)...), "", 1800},
		"as long as a superlink takes it": {24 * time.Hour, "/v1/fleet/send-node-heartbeat", ping, "", maxInterval},
		"without limit":                   {-1, "/v1/fleet/send-node-heartbeat", ping, "", maxInterval},
		"never shorter than its own":      {10 * time.Second, "/v1/fleet/send-node-heartbeat", ping, "", ownInterval},
		"ping":                            {2 * time.Hour, "/flwr.proto.Fleet/Ping", ping, "", 7200},
		"ping without limit":              {-1, "/flwr.proto.Fleet/Ping", ping, "", forever},
		"creation":                        {time.Hour, "/flwr.proto.Fleet/CreateNode", interval(1, ownInterval), "", 3600},
		"ping through the adapter":        {time.Hour, "/flwr.proto.GrpcAdapter/SendReceive", ping, "PingRequest", 3600},
		"creation through the adapter":    {time.Hour, "/flwr.proto.GrpcAdapter/SendReceive", interval(1, ownInterval), "CreateNodeRequest", 3600},
		"something else":                  {time.Hour, "/v1/fleet/push-messages", ping, "", ownInterval},
		"something else by the adapter":   {time.Hour, "/flwr.proto.GrpcAdapter/SendReceive", ping, "PushTaskResRequest", ownInterval},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, c.tolerance)
			grpc := strings.HasPrefix(c.path, "/flwr")
			body := c.message
			if c.adapter != "" {
				body = boxed(c.adapter, body)
			}
			if grpc {
				body = frame(body)
			}
			if got := post(t, r.client(t, "a", grpc), c.path, body); got.status != http.StatusOK {
				t.Fatalf("answered %+v", got)
			}
			calls := r.link.got(c.path)
			if len(calls) != 1 {
				t.Fatalf("%d calls", len(calls))
			}
			msg := calls[0].body
			if grpc {
				msg, _, _ = unframe(msg)
			}
			if c.adapter != "" {
				box, _ := openContainer(msg)
				if msg = box.content; box.name != c.adapter {
					t.Errorf("the container became one of %s", box.name)
				}
			}
			if got, _ := intervalOf(msg); got != c.want {
				t.Errorf("announced %v s, want %v", got, c.want)
			}
			if !bytes.Equal(withInterval(msg, ownInterval), c.message) {
				t.Errorf("more than the interval changed: %x, was %x", msg, c.message)
			}
		})
	}
}

// A supernode that is dead is taken for dead, in the form of its own generation and with its latest signature.
func TestExpire(t *testing.T) {
	beat := append(nodeMessage(7), interval(2, ownInterval)...)
	for name, c := range map[string]struct {
		path string
		body []byte
		want float64
	}{
		"heartbeat":                {"/v1/fleet/send-node-heartbeat", beat, minInterval},
		"heartbeat over gRPC":      {"/flwr.proto.Fleet/SendNodeHeartbeat", frame(beat), minInterval},
		"ping through the adapter": {"/flwr.proto.GrpcAdapter/SendReceive", frame(boxed("PingRequest", beat)), 0.001},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, time.Hour)
			if err := r.Expire(t.Context(), "a"); err != nil || len(r.link.got(c.path)) > 0 {
				t.Errorf("a site without a node: %v", err)
			}
			grpc := c.path[1] == 'f'
			cl := r.client(t, "a", grpc)
			now := time.Now().UTC()
			post(t, cl, c.path, c.body, timestampHeader, now.Add(-time.Minute).Format(time.RFC3339Nano), "Flwr-Signature", "old")
			later := map[bool]string{false: "/v1/fleet/get-run", true: "/flwr.proto.Fleet/GetRun"}[grpc]
			body := nodeMessage(7)
			if grpc {
				body = frame(body)
			}
			post(t, cl, later, body, timestampHeader, now.Format(time.RFC3339Nano), "Flwr-Signature", "new")
			if err := r.Expire(t.Context(), "a"); err != nil {
				t.Fatal(err)
			}
			calls := r.link.got(c.path)
			if len(calls) != 2 {
				t.Fatalf("%d calls, want the supernode's and the gate's", len(calls))
			}
			msg := calls[1].body
			if grpc {
				msg, _, _ = unframe(msg)
			}
			if strings.HasSuffix(c.path, "SendReceive") {
				box, _ := openContainer(msg)
				msg = box.content
			}
			if got, _ := intervalOf(msg); got != c.want {
				t.Errorf("announced %v s, want %v", got, c.want)
			}
			if got := calls[1].header.Get("Flwr-Signature"); got != "new" {
				t.Errorf("the signature is the %q one", got)
			}
			if err := r.Expire(t.Context(), "a"); err != nil || len(r.link.got(c.path)) != 2 {
				t.Errorf("once more: %v, %d calls", err, len(r.link.got(c.path)))
			}
		})
	}
}

func TestForeignNodes(t *testing.T) {
	r := newRig(t, time.Hour)
	r.link.answer = func(path string) []byte {
		if strings.HasSuffix(path, "CreateNode") {
			return nodeMessage(7)
		}
		return nil
	}
	a, b := r.client(t, "a", true), r.client(t, "b", true)
	const svc = "/flwr.proto.Fleet/"
	if got := post(t, a, svc+"CreateNode", frame(interval(1, 30))); got.grpc != "0" {
		t.Fatalf("%+v", got)
	}
	for _, op := range []string{"PullTaskIns", "PullMessages", "Ping", "DeleteNode", "PullObject", "SendNodeHeartbeat"} {
		if got := post(t, a, svc+op, frame(nodeMessage(7))); got.grpc != "0" {
			t.Errorf("%s by its own site: %+v", op, got)
		}
		if got := post(t, b, svc+op, frame(nodeMessage(7))); got.grpc != "7" {
			t.Errorf("%s by another site: %+v", op, got)
		}
		if got := post(t, b, svc+op, frame(append(nodeMessage(8), nodeMessage(7)...))); got.grpc != "7" {
			t.Errorf("%s with two nodes: %+v", op, got)
		}
		if got := post(t, b, svc+op, append([]byte{1}, frame(nodeMessage(7))[1:]...)); got.grpc != "7" {
			t.Errorf("%s, compressed: %+v", op, got)
		}
		if got := post(t, b, svc+op, frame(append(stringField(9, strings.Repeat("x", maxSmall)), nodeMessage(7)...))); got.grpc != "7" {
			t.Errorf("%s in a long message: %+v", op, got)
		}
		if n := len(r.link.got(svc + op)); n != 1 {
			t.Errorf("%s: %d calls reached the superlink, want 1", op, n)
		}
	}
}

func TestSignatures(t *testing.T) {
	for name, c := range map[string]struct {
		age     time.Duration
		refused bool // by the superlink
		want    string
		warned  bool
	}{
		"new":                                {0, false, "0", false},
		"new and refused":                    {0, true, "16", false},
		"held up":                            {onTime + 7*time.Second, true, "14", true},
		"held up for a superlink that waits": {onTime + 7*time.Second, false, "0", false},
		"a clock ahead":                      {-early - 100*time.Millisecond, false, "0", true},
		"a clock far ahead":                  {-time.Hour, false, "14", true},
		"a clock far behind":                 {time.Hour, true, "14", true},
	} {
		for _, op := range []string{"PullMessages", "PushMessages"} {
			t.Run(name+" "+op, func(t *testing.T) {
				r := newRig(t, time.Hour)
				r.link.refuse = c.refused
				at := time.Now().UTC().Add(-c.age).Format("2006-01-02T15:04:05.000000-07:00") // as Python's isoformat
				got := post(t, r.client(t, "a", true), "/flwr.proto.Fleet/"+op, frame(nodeMessage(7)), timestampHeader, at)
				if got.status != http.StatusOK || got.grpc != c.want {
					t.Errorf("gRPC: %d %s, want %s", got.status, got.grpc, c.want)
				}
				at = time.Now().UTC().Add(-c.age).Format("2006-01-02T15:04:05.000000-07:00")
				path := map[string]string{"PullMessages": "/v1/fleet/pull-messages", "PushMessages": "/v1/fleet/push-messages"}[op]
				h := post(t, r.client(t, "a", false), path, nodeMessage(7), timestampHeader, at)
				if want := map[string]int{"0": http.StatusOK, "14": http.StatusServiceUnavailable, "16": http.StatusUnauthorized}[c.want]; h.status != want {
					t.Errorf("HTTP: %d, want %d", h.status, want)
				}
				if w := r.warnings(); (len(w) == 1 && strings.Contains(w[0], "clock")) != c.warned {
					t.Errorf("warnings: %q", w)
				}
			})
		}
	}
}

// A message whose answer got lost with its connection is handed out again, until it is known to have arrived.
func TestMessagesAreNotLost(t *testing.T) {
	const pull = "/v1/fleet/pull-messages"
	message := func(id string) []byte { return stringField(2, "message "+id) }
	for name, c := range map[string]struct {
		between func(t *testing.T, r *rig, same *http.Client)
		again   bool
	}{
		"the connection breaks":         {func(*testing.T, *rig, *http.Client) {}, true},
		"a call on the same connection": {func(t *testing.T, _ *rig, same *http.Client) { post(t, same, "/v1/fleet/get-run", nil) }, false},
		"its objects are asked for":     {objects("/v1/fleet/pull-object", "1"), false},
		"it is confirmed":               {objects("/v1/fleet/confirm-message-received", "1"), false},
		"another one is confirmed":      {objects("/v1/fleet/confirm-message-received", "22"), true},
		"the node says goodbye": {func(t *testing.T, r *rig, _ *http.Client) {
			post(t, r.client(t, "a", false), "/v1/fleet/deactivate-node", nodeNumber(7))
		}, false},
		"another site asks": {func(t *testing.T, r *rig, _ *http.Client) { post(t, r.client(t, "b", false), pull, nodeMessage(8)) }, true},
		"heartbeats on other connections": {func(t *testing.T, r *rig, _ *http.Client) {
			post(t, r.client(t, "a", false), "/v1/fleet/send-node-heartbeat", append(nodeMessage(7), interval(2, 30)...))
		}, true},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, time.Hour)
			n := 0
			r.link.answer = func(path string) []byte {
				if path != pull {
					return nil
				}
				n++
				return message(fmt.Sprint(n))
			}
			first := r.client(t, "a", false)
			if got := post(t, first, pull, nodeMessage(7)); string(got.body) != string(message("1")) {
				t.Fatalf("%+v", got)
			}
			c.between(t, r, first)
			got := post(t, r.client(t, "a", false), pull, nodeMessage(7))
			if again := string(got.body) == string(message("1")); got.status != http.StatusOK || again != c.again {
				t.Errorf("then came %q; again %v, want %v", got.body, again, c.again)
			}
		})
	}
}

func objects(path, id string) func(*testing.T, *rig, *http.Client) {
	return func(t *testing.T, r *rig, _ *http.Client) {
		post(t, r.client(t, "a", false), path, append(nodeMessage(7), stringField(3, "message "+id)...))
	}
}

// A supernode that has gone while the superlink answers loses nothing.
func TestPullOutlivesItsCaller(t *testing.T) {
	const pull = "/v1/fleet/pull-messages"
	r := newRig(t, time.Hour)
	asked, answer := make(chan struct{}), make(chan struct{})
	var once sync.Once
	r.link.answer = func(string) []byte {
		once.Do(func() { close(asked); <-answer })
		return stringField(2, "the only one")
	}
	ctx, cancel := context.WithCancel(t.Context())
	gone := make(chan error, 1)
	go func() {
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://superlink"+pull, bytes.NewReader(nodeMessage(7)))
		if err == nil {
			var resp *http.Response
			if resp, err = r.client(t, "a", false).Do(req); err == nil {
				resp.Body.Close()
			}
		}
		gone <- err
	}()
	<-asked
	cancel()
	if err := <-gone; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	close(answer)
	got := post(t, r.client(t, "a", false), pull, nodeMessage(7))
	if !hasMessage(got.body) || len(r.link.got(pull)) != 1 {
		t.Errorf("got %q after %d calls at the superlink, want the message of the first one", got.body, len(r.link.got(pull)))
	}
}

// Large messages pass as they are, and calls wait for a superlink that does not serve yet.
func TestPassing(t *testing.T) {
	link := newSuperlink(t)
	g := New(Options{Tolerance: time.Hour})
	done := make(chan error, 1)
	go func() { done <- g.Serve() }()
	defer func() {
		g.Close()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	r := &rig{Gate: g, link: link}
	big := bytes.Repeat([]byte("0123456789abcdef"), 1<<20)
	link.answer = func(string) []byte { return big }
	var wg sync.WaitGroup
	for _, grpc := range []bool{false, true} {
		wg.Go(func() {
			path, body := "/v1/fleet/push-object", append(nodeMessage(7), big...)
			if grpc {
				path, body = "/flwr.proto.Fleet/PushObject", append([]byte{0, 1, 0, 0, 9}, body...)
			}
			got := post(t, r.client(t, "a", grpc), path, body)
			want := big
			if grpc {
				want = frame(big)
			}
			if got.status != http.StatusOK || !bytes.Equal(got.body, want) || grpc && got.grpc != "0" {
				t.Errorf("gRPC %v: status %d %s, %d bytes", grpc, got.status, got.grpc, len(got.body))
			}
			if calls := link.got(path); len(calls) != 1 || !bytes.Equal(calls[0].body, body) {
				t.Errorf("gRPC %v: the superlink got something else", grpc)
			}
		})
	}
	g.Open(link.addr())
	wg.Wait()
}

// Without a superlink, calls are to be tried again.
func TestSuperlinkIsGone(t *testing.T) {
	r := newRig(t, time.Hour)
	r.link.Close()
	if got := post(t, r.client(t, "a", true), "/flwr.proto.Fleet/PushMessages", frame(nil)); got.grpc != "14" {
		t.Errorf("gRPC: %+v", got)
	}
	for _, path := range []string{"/v1/fleet/push-messages", "/v1/fleet/pull-messages"} {
		if got := post(t, r.client(t, "a", false), path, nil); got.status != http.StatusServiceUnavailable {
			t.Errorf("%s: %+v", path, got)
		}
	}
}

// A refusal whose status comes in the header must not be passed on in a header: the end of the call may come in a frame of its own,
// and gRPC's core takes that for a broken stream.
func TestStatusComesInTheTrailer(t *testing.T) {
	r := newRig(t, time.Hour)
	r.link.mu.Lock()
	r.link.refuse = true
	r.link.mu.Unlock()
	cl := r.client(t, "a", true)
	for range 50 { // the frames' order was a race
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://superlink/flwr.proto.Fleet/GetRun", bytes.NewReader(frame(nil)))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", grpcType)
		req.Header.Set("TE", "trailers")
		resp, err := cl.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, resp.Body); err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if h, tr := resp.Header.Get("Grpc-Status"), resp.Trailer.Get("Grpc-Status"); h != "" || tr != "16" {
			t.Fatalf("status %q in the header, %q in the trailer", h, tr)
		}
	}
}
