package e2e

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/pergolafl/pergola/internal/fleet"
	"github.com/pergolafl/pergola/internal/flower"
)

// A site that does not run a supernode but makes calls of its own: it can neither start nor stop runs, nor get at another
// node's messages. What a superlink does by itself when nobody stands before it is shown beside.
func TestHostileSite(t *testing.T) {
	t.Parallel()
	for _, v := range []string{oldest, newest} {
		t.Run(v, func(t *testing.T) {
			t.Parallel()
			slots <- struct{}{}
			defer func() { <-slots }()
			direct, gate := superlink(t, v)
			site := func(name string) *http.Client {
				return caller(t, v == newest, func(context.Context, string, string) (net.Conn, error) { return gate.Dial(name) })
			}
			victim, hostile := site("victim"), site("hostile")
			open := caller(t, v == newest, func(ctx context.Context, _, _ string) (net.Conn, error) {
				return (&net.Dialer{}).DialContext(ctx, "tcp", direct)
			})
			if v == newest {
				hostileHTTP(t, open, victim, hostile)
			} else {
				hostileAdapter(t, open, victim, hostile)
			}
		})
	}
}

func hostileHTTP(t *testing.T, open, victim, hostile *http.Client) {
	for _, path := range []string{
		"/v1/control/list-runs", "/v1/control/start-run", "/v1/control/stop-run", "/v1/fleet/../control/list-runs", "/v1/runtime/pull-messages",
	} {
		if status, body := call(t, hostile, path, nil); status != http.StatusForbidden || !strings.Contains(body, "Fleet API only") {
			t.Errorf("a site called %s: %d %s", path, status, body)
		}
	}
	if status, body := call(t, open, "/v1/control/list-runs", nil); status != http.StatusOK {
		t.Errorf("without the gate, list-runs gives %d %s: the test shows nothing", status, body)
	}
	mine, theirs := newSigner(t), newSigner(t)
	node := register(t, victim, theirs)
	register(t, hostile, mine)
	pull := protowire.AppendBytes(protowire.AppendTag(nil, 1, protowire.BytesType), protowire.AppendVarint(protowire.AppendTag(nil, 1, protowire.VarintType), node))
	if status, body := call(t, victim, "/v1/fleet/pull-messages", pull, theirs.sign(t)...); status != http.StatusOK {
		t.Errorf("its own messages: %d %s", status, body)
	}
	if status, _ := call(t, hostile, "/v1/fleet/pull-messages", pull, mine.sign(t)...); status != http.StatusUnauthorized {
		t.Errorf("another node's messages, with a signature of one's own: %d", status)
	}
	if status, _ := call(t, hostile, "/v1/fleet/pull-messages", pull); status != http.StatusUnauthorized {
		t.Errorf("another node's messages, without a signature: %d", status)
	}
}

// Nodes of this generation do not sign their calls: who knows a node's number is the node, as far as the superlink can tell.
func hostileAdapter(t *testing.T, open, victim, hostile *http.Client) {
	const adapter = "/flwr.proto.GrpcAdapter/SendReceive"
	box := func(name string, content []byte) []byte {
		b := protowire.AppendString(protowire.AppendTag(nil, 2, protowire.BytesType), name)
		return protowire.AppendBytes(protowire.AppendTag(b, 3, protowire.BytesType), content)
	}
	for _, path := range []string{"/flwr.proto.Driver/CreateRun", "/flwr.proto.Driver/PullTaskRes", "/flwr.proto.Exec/StartRun"} {
		if status, body := call(t, hostile, path, nil); status != 7 {
			t.Errorf("a site called %s: %d %s", path, status, body)
		}
	}
	interval := protowire.AppendFixed64(protowire.AppendTag(nil, 1, protowire.Fixed64Type), 0x403e000000000000) // 30.0
	status, reply := call(t, victim, adapter, box("CreateNodeRequest", interval))
	var node []byte // CreateNodeResponse has its node in field 1, where a PullTaskInsRequest has it
	for b := []byte(reply); status == 0 && len(b) > 0; {
		num, typ, n := protowire.ConsumeTag(b)
		m := protowire.ConsumeFieldValue(num, typ, b[n:])
		if n < 0 || m < 0 {
			break
		}
		if num == 3 {
			node, _ = protowire.ConsumeBytes(b[n:])
		}
		b = b[n+m:]
	}
	if len(node) < 3 {
		t.Fatalf("no node: %d %q", status, reply)
	}
	pull := box("PullTaskInsRequest", node)
	if status, body := call(t, victim, adapter, pull); status != 0 {
		t.Errorf("its own messages: %d %s", status, body)
	}
	if status, _ := call(t, hostile, adapter, pull); status != 7 {
		t.Errorf("another node's messages: %d", status)
	}
	if status, _ := call(t, hostile, adapter, box("DeleteNodeRequest", node)); status != 7 {
		t.Errorf("another node's end: %d", status)
	}
	if status, body := call(t, open, adapter, pull); status != 0 {
		t.Errorf("without the gate, another node's messages give %d %s: the test shows nothing", status, body)
	}
}

// superlink starts a real one, with a gate before its Fleet API.
func superlink(t *testing.T, flwr string) (addr string, gate *fleet.Gate) {
	t.Helper()
	env := environment(t, flwr)
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	inst, err := flower.Probe(ctx, flower.Env{Bin: env.Bin, Python: env.Python}, t.TempDir()+"/probe.json")
	if err != nil {
		t.Fatal(err)
	}
	app, err := flower.LoadApp(apps + "/tiny")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := flower.Stage(app, apps+"/tiny", dir+"/app", inst); err != nil {
		t.Fatal(err)
	}
	srv, err := flower.StartServer(ctx, flower.ServerConfig{
		Install: inst, AppDir: dir + "/app", RunDir: dir, LogDir: dir + "/logs", FlwrHome: dir + "/flwr", Party: "hub",
		IP: map[string]string{oldest: "127.129.1.12", newest: "127.129.1.41"}[flwr], // away from where parties have theirs
	})
	if err != nil {
		t.Fatal(err)
	}
	g := fleet.New(fleet.Options{Tolerance: time.Hour})
	done := make(chan error, 1)
	go func() { done <- g.Serve() }()
	t.Cleanup(func() {
		g.Close()
		srv.Stop(5 * time.Second)
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	g.Open(srv.FleetAddr())
	return srv.FleetAddr(), g
}

func caller(t *testing.T, http1 bool, dial func(context.Context, string, string) (net.Conn, error)) *http.Client {
	p := new(http.Protocols)
	p.SetHTTP1(http1)
	p.SetUnencryptedHTTP2(!http1)
	tr := &http.Transport{Protocols: p, DialContext: dial}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 30 * time.Second}
}

// call makes a call and gives its status: gRPC's where the path is one of gRPC.
func call(t *testing.T, c *http.Client, path string, msg []byte, header ...string) (int, string) {
	t.Helper()
	grpc := strings.HasPrefix(path, "/flwr")
	if grpc {
		msg = append([]byte{0, 0, 0, 0, byte(len(msg))}, msg...)
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://superlink"+path, bytes.NewReader(msg))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/protobuf")
	if grpc {
		req.Header.Set("Content-Type", "application/grpc")
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
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if !grpc {
		return resp.StatusCode, string(body)
	}
	status := -1
	if _, err := fmt.Sscan(resp.Header.Get("Grpc-Status")+resp.Trailer.Get("Grpc-Status"), &status); err != nil {
		t.Fatalf("%s: no gRPC status", path)
	}
	if len(body) >= 5 {
		body = body[5:]
	}
	return status, string(body)
}

// signer signs as supernodes of flwr 1.40 and later do (flwr/supernode/node_auth_http_interceptor.py).
type signer struct {
	key *ecdsa.PrivateKey
	pub []byte // PEM
}

func newSigner(t *testing.T) signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	return signer{key, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})}
}

func (s signer) sign(t *testing.T) []string {
	t.Helper()
	at := time.Now().UTC().Format("2006-01-02T15:04:05.000000-07:00")
	sum := sha256.Sum256([]byte(at))
	sig, err := ecdsa.SignASN1(rand.Reader, s.key, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	b64 := base64.StdEncoding.EncodeToString
	return []string{"flwr-public-key", b64(s.pub), "flwr-timestamp", at, "flwr-signature", b64(sig)}
}

// register makes a node and gives its number.
func register(t *testing.T, c *http.Client, s signer) uint64 {
	t.Helper()
	key := protowire.AppendBytes(protowire.AppendTag(nil, 1, protowire.BytesType), s.pub)
	status, reply := call(t, c, "/v1/fleet/register-node", key, s.sign(t)...)
	if status != http.StatusOK {
		t.Fatalf("no node: %d %s", status, reply)
	}
	_, _, n := protowire.ConsumeTag([]byte(reply))
	id, _ := protowire.ConsumeVarint([]byte(reply)[n:])
	activate := protowire.AppendFixed64(protowire.AppendTag(key, 2, protowire.Fixed64Type), 0x403e000000000000) // 30.0
	if status, reply := call(t, c, "/v1/fleet/activate-node", activate, s.sign(t)...); status != http.StatusOK {
		t.Fatalf("the node is not active: %d %s", status, reply)
	}
	return id
}
