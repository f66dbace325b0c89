package fleet

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httputil"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
)

// Calls that the gate looks into.
const (
	opCreate    = "CreateNode"        // up to 1.2x: announces the first ping interval
	opPing      = "Ping"              // up to 1.20
	opHeartbeat = "SendNodeHeartbeat" // since
	opActivate  = "ActivateNode"
	opPull      = "PullMessages"
	opPullObj   = "PullObject"
	opConfirm   = "ConfirmMessageReceived"
	opDelete    = "DeleteNode"
	opDeact     = "DeactivateNode"
	opUnreg     = "UnregisterNode"
)

// mine are the calls that are made in a node's name and have short messages.
var mine = map[string]bool{
	opPing: true, opHeartbeat: true, opPull: true, "PullTaskIns": true, opPullObj: true, opConfirm: true, opDelete: true, opDeact: true, opUnreg: true,
	"GetRun": true, "GetFab": true,
}

// maxSmall bounds the messages that the gate reads whole; all that it has to understand have less than 1 KiB. Others pass
// through as they come, whatever their size.
const maxSmall = 64 << 10

// maxHeld bounds an answer that is held until it is known to have arrived: messages without their content.
const maxHeld = 64 << 20

var (
	grpcPath = regexp.MustCompile(`^/flwr\.proto\.(Fleet|GrpcAdapter)/([A-Za-z]{1,64})$`)
	httpPath = regexp.MustCompile(`^/v1/fleet/([a-z-]{1,64})$`)
)

const (
	timestampHeader = "Flwr-Timestamp" // of signed calls, ISO 8601
	grpcType        = "application/grpc"
)

// A call is one request and what the gate has understood of it.
type call struct {
	*http.Request
	w       http.ResponseWriter
	conn    *conn
	site    *site
	grpc    bool
	op      string
	adapter bool
	message []byte // of a small call: without framing and container
	small   bool
	late    bool                // it was signed some time ago
	wrap    func([]byte) []byte // puts framing and container round a message
}

func isGRPC(r *http.Request) bool {
	return r.ProtoMajor == 2 && strings.HasPrefix(r.Header.Get("Content-Type"), grpcType)
}

// serve handles one call of a site.
func (g *Gate) serve(w http.ResponseWriter, r *http.Request) {
	from, ok := r.Context().Value(connKey{}).(*conn)
	if !ok {
		http.Error(w, "no site", http.StatusForbidden) // cannot be: every connection comes from Dial
		return
	}
	c := &call{Request: r, w: w, conn: from, site: g.site(from.site), grpc: isGRPC(r)}
	if !c.allowed() {
		g.warn(c.site, "path "+r.URL.Path, "site %s called %s, which sites may not; it was refused", c.site.name, clip(r.Method+" "+r.URL.Path))
		c.refuse(http.StatusForbidden, "sites may call the Fleet API only")
		return
	}
	select {
	case <-g.ready:
	case <-r.Context().Done():
		return
	}
	if err := c.read(); err != nil {
		c.refuse(http.StatusBadRequest, err.Error())
		return
	}
	c.site.arrived(c)
	if !g.timely(c) {
		return
	}
	if msg := g.foreign(c); msg != "" {
		g.warn(c.site, msg, "site %s made a call in the name of another node (%s); it was refused", c.site.name, c.op)
		c.refuse(http.StatusForbidden, msg)
		return
	}
	g.live(c)
	if c.op == opPull && !c.grpc {
		g.pull(c)
		return
	}
	g.proxy(c)
}

// allowed tells whether the call is one of the Fleet API. The path is taken as it was sent: no escapes, no dots, no query.
func (c *call) allowed() bool {
	if c.Method != http.MethodPost || c.RequestURI != c.URL.Path || c.URL.RawQuery != "" || c.Header.Get("Upgrade") != "" {
		return false
	}
	pattern := httpPath
	if c.grpc {
		pattern = grpcPath
	}
	m := pattern.FindStringSubmatch(c.URL.Path)
	if m == nil {
		return false
	}
	c.op, c.adapter = operation(m[len(m)-1]), c.grpc && m[1] == "GrpcAdapter"
	return true
}

// read takes in a small message; of a large one, only as much as that needs.
func (c *call) read() error {
	limit := maxSmall
	if c.grpc {
		limit += framePrefix
	}
	head, err := io.ReadAll(io.LimitReader(c.Body, int64(limit)+1))
	if err != nil {
		return fmt.Errorf("the call broke off: %w", err)
	}
	c.wrap = func(m []byte) []byte { return m }
	if len(head) > limit {
		c.Body = struct {
			io.Reader
			io.Closer
		}{io.MultiReader(bytes.NewReader(head), c.Body), c.Body}
		return nil
	}
	c.small, c.message = true, head
	if c.grpc {
		msg, rest, ok := unframe(head)
		if !ok || len(rest) > 0 {
			// Compressed, or several messages: none of the calls that concern the gate.
			c.small, c.message = false, nil
		} else {
			c.message, c.wrap = msg, frame
		}
	}
	if c.small && c.adapter {
		box, ok := openContainer(c.message)
		if !ok {
			return errors.New("the message is malformed")
		}
		c.op, c.message = operation(box.name), box.content
		c.wrap = func(m []byte) []byte { return frame(box.with(m)) }
	}
	c.setBody(head)
	return nil
}

func (c *call) setBody(b []byte) {
	c.Body = io.NopCloser(bytes.NewReader(b))
	if c.ContentLength >= 0 {
		c.ContentLength = int64(len(b))
		c.Header.Set("Content-Length", strconv.Itoa(len(b)))
	}
}

// age is how long ago the call was signed.
func (c *call) age() (time.Duration, bool) {
	at, err := time.Parse("2006-01-02T15:04:05.999999999Z07:00", c.Header.Get(timestampHeader))
	if err != nil {
		return 0, false // unsigned, or the superlink's to judge
	}
	return time.Since(at), true
}

// timely deals with calls that a superlink would refuse for their time of signature, and a supernode then give up: one that
// was held up in an outage, or comes from a clock that is wrong.
func (g *Gate) timely(c *call) bool {
	age, signed := c.age()
	switch {
	case !signed || age >= -early:
		c.late = signed && age > onTime
		return true
	case age >= -maxEarly:
		g.warn(c.site, "early", "the clock of %s is %v ahead of the hub's, which makes every call wait; correct it", c.site.name, -age.Round(time.Second))
		t := time.NewTimer(-age - early)
		defer t.Stop()
		select {
		case <-t.C:
			return true
		case <-c.Context().Done():
			return false
		}
	default:
		g.warn(c.site, "early", "the clock of %s is %v ahead of the hub's, and Flower takes no calls from the future; correct it", c.site.name, -age.Round(time.Second))
	}
	c.refuse(http.StatusServiceUnavailable, "the call was signed in the future; try again")
	return false
}

// tooLate is the answer to a late call that the superlink has refused for its signature: a supernode gives up after that, but
// repeats a call that finds nobody, with a new signature.
func (g *Gate) tooLate(c *call) {
	age, _ := c.age()
	g.warn(c.site, "late", "a call of %s was signed %v ago and will be repeated: it was held up, or the site's clock is behind the hub's", c.site.name, age.Round(time.Second))
}

// judged looks at the superlink's answer to a late call.
func (g *Gate) judged(c *call, resp *http.Response) error {
	if !c.grpc {
		if resp.StatusCode == http.StatusUnauthorized {
			g.tooLate(c)
			resp.StatusCode = http.StatusServiceUnavailable
		}
		return nil
	}
	// A refusal has no message; its status comes with the header, or behind nothing.
	first := make([]byte, 1)
	n, err := io.ReadFull(resp.Body, first)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	old := resp.Body
	resp.Body = struct {
		io.Reader
		io.Closer
	}{io.MultiReader(bytes.NewReader(first[:n]), old), old}
	const unauthenticated, unavailable = "16", "14"
	for _, h := range []http.Header{resp.Header, resp.Trailer} {
		if n == 0 && h.Get("Grpc-Status") == unauthenticated {
			g.tooLate(c)
			h.Set("Grpc-Status", unavailable)
		}
	}
	return nil
}

// foreign tells why a call may not be made by this site, "" if it may.
func (g *Gate) foreign(c *call) string {
	if !mine[c.op] {
		return ""
	}
	if !c.small {
		return "the message is too long for this call"
	}
	id, found, ok := nodeOf(c.message)
	if !ok {
		return "the message is malformed"
	}
	if !found {
		return ""
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if owner, known := g.owner[id]; known && owner != c.site.name {
		return "the node belongs to another site"
	}
	return ""
}

// live deals with signs of life and with what a superlink has to be told again when its node dies.
func (g *Gate) live(c *call) {
	s := c.site
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.Header.Get(timestampHeader) != "" {
		s.signed = http.Header{}
		for k, v := range c.Header {
			if strings.HasPrefix(k, "Flwr-") {
				s.signed[k] = v
			}
		}
	}
	switch c.op {
	case opDelete, opDeact, opUnreg:
		s.beat, s.held = nil, nil
	case opCreate, opPing, opHeartbeat, opActivate:
		own, ok := intervalOf(c.message)
		if !c.small || !ok {
			return
		}
		if c.op == opPing || c.op == opHeartbeat {
			s.beat = &beat{path: c.URL.Path, header: c.Header.Clone(), op: c.op, message: bytes.Clone(c.message), wrap: c.wrap}
		}
		c.setBody(c.wrap(withInterval(c.message, g.interval(c.op, own))))
	}
}

// arrived notes what a call proves: that the answer before it on the same connection has arrived, or that the message that
// was held has.
func (s *site) arrived(c *call) {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := s.held
	if h == nil {
		return
	}
	if h.conn == c.conn {
		s.held = nil
		return
	}
	if c.op == opPullObj || c.op == opConfirm {
		for _, id := range text(c.message, 3) { // object_id, message_object_id
			if id != "" && bytes.Contains(h.body, []byte(id)) {
				s.held = nil
				return
			}
		}
	}
}

// pull asks for a message. A superlink hands out each once; if its answer is lost because the supernode has given up waiting
// meanwhile (from 1.40 on it does so after 30 s), it is given again from here.
func (g *Gate) pull(c *call) {
	s := c.site
	s.pulling.Lock()
	defer s.pulling.Unlock()
	node, _, _ := nodeOf(c.message)
	s.mu.Lock()
	h := s.held
	if h != nil && h.node == node {
		h.conn = c.conn
	} else {
		h = nil
	}
	s.mu.Unlock()
	if h == nil {
		// The call is made even if nobody waits for it any more: it must not be cut off between the superlink and here.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(c.Context()), time.Minute)
		defer cancel()
		resp, err := g.send(ctx, c.Request, s)
		if err != nil {
			c.refuse(http.StatusServiceUnavailable, "the superlink does not answer")
			return
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(io.LimitReader(resp.Body, maxHeld+1))
		if err != nil || len(body) > maxHeld {
			c.refuse(http.StatusBadGateway, "the superlink's answer could not be read")
			return
		}
		h = &held{node: node, conn: c.conn, header: resp.Header, body: body}
		if resp.StatusCode == http.StatusOK && hasMessage(body) {
			s.mu.Lock()
			s.held = h
			s.mu.Unlock()
		}
		if resp.StatusCode != http.StatusOK {
			if c.late && resp.StatusCode == http.StatusUnauthorized {
				g.tooLate(c)
				resp.StatusCode = http.StatusServiceUnavailable
			}
			copyHeader(c.w.Header(), h.header)
			c.w.WriteHeader(resp.StatusCode)
			_, _ = c.w.Write(body) // the supernode may be gone
			return
		}
	} else {
		g.opts.Log.Info("a message is handed out again", "site", s.name)
	}
	copyHeader(c.w.Header(), h.header)
	c.w.Header().Set("Content-Length", strconv.Itoa(len(h.body)))
	c.w.WriteHeader(http.StatusOK)
	_, _ = c.w.Write(h.body) // the supernode may be gone; then it asks again
}

// hasMessage tells whether a PullMessagesResponse carries a message (field 2).
func hasMessage(body []byte) (found bool) {
	each(body, func(num protowire.Number, typ protowire.Type, _, _ []byte) {
		found = found || num == 2 && typ == protowire.BytesType
	})
	return found
}

func copyHeader(dst, src http.Header) {
	for k, v := range src {
		switch k {
		case "Connection", "Keep-Alive", "Transfer-Encoding", "Content-Length", "Date", "Server":
		default:
			dst[k] = v
		}
	}
}

func (g *Gate) url(path string) *url.URL {
	g.mu.Lock()
	defer g.mu.Unlock()
	return &url.URL{Scheme: "http", Host: g.addr, Path: path}
}

// send makes a call at the superlink with the request's header and body.
func (g *Gate) send(ctx context.Context, r *http.Request, s *site) (*http.Response, error) {
	out := r.Clone(ctx)
	out.URL, out.Host, out.RequestURI = g.url(r.URL.Path), "", ""
	for _, k := range []string{"Connection", "Keep-Alive", "Proxy-Connection", "Transfer-Encoding"} {
		out.Header.Del(k)
	}
	if isGRPC(r) {
		return s.h2.RoundTrip(out)
	}
	return s.h1.RoundTrip(out)
}

// call makes a small call by the gate itself.
func (g *Gate) call(ctx context.Context, s *site, path string, header http.Header, body []byte) error {
	select {
	case <-g.ready:
	default:
		return errors.New("the superlink does not serve yet")
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, g.url(path).String(), bytes.NewReader(body))
	if err != nil {
		return err
	}
	header.Del("Content-Length")
	req.Header = header
	grpc := strings.HasPrefix(header.Get("Content-Type"), grpcType)
	t := s.h1
	if grpc {
		t = s.h2
	}
	resp, err := t.RoundTrip(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, io.LimitReader(resp.Body, maxSmall)); err != nil {
		return err
	}
	status := resp.Trailer.Get("Grpc-Status") + resp.Header.Get("Grpc-Status")
	if resp.StatusCode != http.StatusOK || grpc && status != "0" {
		return fmt.Errorf("HTTP %s, gRPC status %q", resp.Status, status)
	}
	return nil
}

// proxy passes a call on as it is, of any size.
func (g *Gate) proxy(c *call) {
	p := httputil.ReverseProxy{
		Rewrite: func(pr *httputil.ProxyRequest) {
			pr.Out.URL, pr.Out.Host = g.url(c.URL.Path), ""
		},
		Transport:     c.site.h1,
		FlushInterval: -1,
		ErrorLog:      g.srv.ErrorLog,
		ErrorHandler: func(_ http.ResponseWriter, _ *http.Request, err error) {
			g.opts.Log.Debug("a call was not answered", "site", c.site.name, "call", c.op, "err", err)
			c.refuse(http.StatusServiceUnavailable, "the superlink does not answer")
		},
	}
	if c.grpc {
		p.Transport = c.site.h2
	}
	p.ModifyResponse = func(resp *http.Response) error {
		if c.grpc {
			asTrailer(resp)
		}
		switch {
		case c.late:
			return g.judged(c, resp)
		case c.op == opCreate && c.Header.Get(timestampHeader) == "":
			return g.created(c, resp)
		}
		return nil
	}
	p.ServeHTTP(c.w, c.Request)
}

// asTrailer takes the status of an answer without a body from its header to its trailer. A header that has it must be the answer's last frame
// (Trailers-Only in gRPC's protocol over HTTP/2), but the proxy may flush it before the end, and then an empty DATA frame ends the answer:
// gRPC's core calls that "Stream removed", status UNKNOWN, after which a supernode ends instead of trying again.
func asTrailer(resp *http.Response) {
	if resp.Header.Get("Grpc-Status") == "" {
		return
	}
	if resp.Trailer == nil {
		resp.Trailer = http.Header{}
	}
	for _, k := range []string{"Grpc-Status", "Grpc-Message", "Grpc-Status-Details-Bin"} {
		if v := resp.Header.Values(k); len(v) > 0 {
			resp.Trailer[k] = v
			resp.Header.Del(k)
		}
	}
}

// created notes whose node a new one is.
func (g *Gate) created(c *call, resp *http.Response) error {
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxSmall))
	if err != nil {
		return err
	}
	old := resp.Body
	resp.Body = struct {
		io.Reader
		io.Closer
	}{io.MultiReader(bytes.NewReader(body), old), old}
	msg := body
	if c.grpc {
		var ok bool
		if msg, _, ok = unframe(body); !ok {
			return nil // an error
		}
	}
	if c.adapter {
		box, _ := openContainer(msg)
		msg = box.content
	}
	if id, found, ok := nodeOf(msg); found && ok {
		g.mu.Lock()
		g.owner[id] = c.site.name
		g.mu.Unlock()
	}
	return nil
}

// grpcStatus gives the gRPC status that goes with an HTTP status. UNAVAILABLE makes a supernode try again, PERMISSION_DENIED
// makes it give up.
var grpcStatus = map[int]string{
	http.StatusForbidden: "7", http.StatusBadRequest: "3", http.StatusServiceUnavailable: "14", http.StatusBadGateway: "14",
}

// refuse answers a call in the gate's own name.
func (c *call) refuse(status int, text string) {
	if c.grpc {
		h := c.w.Header()
		h.Set("Content-Type", grpcType)
		h.Set("Grpc-Status", grpcStatus[status])
		h.Set("Grpc-Message", url.PathEscape(text))
		c.w.WriteHeader(http.StatusOK)
		return
	}
	http.Error(c.w, text, status)
}

func clip(s string) string {
	s = strings.ToValidUTF8(s, "?")
	return s[:min(len(s), 100)]
}
