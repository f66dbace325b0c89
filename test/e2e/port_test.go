package e2e

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pergolafl/pergola/internal/link"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/problem"
)

// patience is how long a peer may take to answer or to hang up.
const patience = 20 * time.Second

// While a job runs, the hub's port is the only thing that can be reached from outside; and what it lets in.
func TestOnePort(t *testing.T) {
	t.Parallel()
	for _, v := range []string{oldest, newest} {
		t.Run(v, func(t *testing.T) {
			t.Parallel()
			gate := filepath.Join(t.TempDir(), "gate")
			r := start(t, spec{app: "look", args: []string{"--flwr", v, "--listen", "0.0.0.0:0", "--site-env", "GATE=" + gate}})
			r.round(1)
			port := r.onlyPort()
			if v == newest { // the port is the same whatever Flower does behind it
				r.knock(port)
			}
			if err := os.WriteFile(gate, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			r.succeeded(r.end(), v, 1)
		})
	}
}

// A port that somebody else has is the user's to change, and nothing is started for it.
func TestPortIsTaken(t *testing.T) {
	t.Parallel()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	res := start(t, spec{app: "tiny", args: []string{"--flwr", oldest, "--listen", ln.Addr().String()}}).end()
	c := res.Summary.Cause
	if res.Code != 2 || c == nil || c.Code != problem.Usage || !strings.Contains(c.Msg, ln.Addr().String()) || !strings.Contains(c.Next, "--listen") {
		t.Errorf("exit %d, cause %+v; want a usage error that names the address and the flag", res.Code, c)
	}
	if res.Job.ID != "" {
		t.Errorf("there is a job: %+v", res.Job)
	}
}

// socket is one that listens.
type socket struct {
	addr  netip.AddrPort
	owner process
}

// sockets gives what the processes of the run listen on now.
func (r *run) sockets() []socket {
	t := r.t
	t.Helper()
	all := listening()
	var out []socket
	for _, p := range append(r.processes(), process{pid: r.cmd.Process.Pid, args: r.cmd.Args}) {
		dir := filepath.Join("/proc", strconv.Itoa(p.pid), "fd")
		fds, err := os.ReadDir(dir)
		if errors.Is(err, os.ErrNotExist) {
			continue // it has ended
		}
		if err != nil {
			t.Fatal(err)
		}
		for _, fd := range fds {
			l, err := os.Readlink(filepath.Join(dir, fd.Name()))
			if err != nil {
				continue // it was closed
			}
			if addr, ok := all[strings.TrimSuffix(strings.TrimPrefix(l, "socket:["), "]")]; ok {
				out = append(out, socket{plain(t, addr), p})
			}
		}
	}
	return out
}

// plain writes [hexadecimal]:port as an IPv6 address, or as IPv4 where it stands for one.
func plain(t *testing.T, addr string) netip.AddrPort {
	t.Helper()
	if host, port, ok := strings.Cut(strings.TrimPrefix(addr, "["), "]:"); ok {
		b, err := hex.DecodeString(host)
		ip, whole := netip.AddrFromSlice(b)
		n, err2 := strconv.ParseUint(port, 10, 16)
		if err != nil || err2 != nil || !whole {
			t.Fatalf("%q is no address", addr)
		}
		return netip.AddrPortFrom(ip.Unmap(), uint16(n))
	}
	ap, err := netip.ParseAddrPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	return ap
}

// onlyPort checks who listens where, and gives the hub's port.
func (r *run) onlyPort() string {
	t := r.t
	t.Helper()
	hub := r.service("hub", "hub")
	agents := []int{r.service("site", "site-1"), r.service("site", "site-2"), r.cmd.Process.Pid}
	var port string
	addrs := map[netip.Addr]string{} // of loopback: who has it
	for _, s := range r.sockets() {
		if slices.Contains(agents, s.owner.pid) {
			t.Errorf("%s listens at %s; agents and the command listen nowhere", s.owner, s.addr)
		}
		ip := s.addr.Addr()
		switch {
		case s.owner.pid == hub && port == "" && ip.IsUnspecified():
			port = strconv.Itoa(int(s.addr.Port()))
		case ip.IsLoopback() && s.owner.pid != hub:
			party := r.partyOf(s.owner)
			if was := addrs[ip]; was != "" && was != party {
				t.Errorf("%s and %s share the address %s", was, party, ip)
			}
			addrs[ip] = party
		default:
			t.Errorf("%s listens at %s; outside of loopback only the hub may, once", s.owner, s.addr)
		}
	}
	if port == "" {
		t.Fatal("the hub listens nowhere")
	}
	if len(addrs) != 3 {
		t.Errorf("the parties' loopback addresses are %v, want one each", addrs)
	}
	return port
}

// partyOf tells whose side a process is on: programs have their party's name in their mark.
func (r *run) partyOf(p process) string {
	r.t.Helper()
	for _, party := range []string{"hub", "site-1", "site-2"} {
		if strings.Contains(strings.Join(p.args, " "), filepath.Join(r.out, ".state", party)+"/") {
			return party
		}
	}
	env, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(p.pid), "environ"))
	if err != nil {
		r.t.Fatal(err)
	}
	for v := range strings.SplitSeq(string(env), "\x00") {
		if mark, ok := strings.CutPrefix(v, "PERGOLA_MARK="); ok {
			for _, party := range []string{"hub", "site-1", "site-2"} {
				if strings.HasSuffix(mark, "-"+party) {
					return party
				}
			}
		}
	}
	r.t.Fatalf("%s belongs to no party", p)
	return ""
}

// knock tries the port with everything that is to be refused, and with what is not.
func (r *run) knock(port string) {
	t := r.t
	t.Helper()
	addr := net.JoinHostPort("127.0.0.1", port)
	auth, err := pki.LoadAuthority(filepath.Join(r.out, ".state", "hub"))
	if err != nil {
		t.Fatal(err)
	}
	roots := auth.Roots()
	sitePair, err := pki.LoadKeypair(filepath.Join(r.out, ".state", "site-1"), "site")
	if err != nil {
		t.Fatal(err)
	}
	site, err := sitePair.Certificate()
	if err != nil {
		t.Fatal(err)
	}
	issue := func(a *pki.Authority, id pki.Identity) tls.Certificate {
		t.Helper()
		pair, err := a.NewKeypair(id, nil, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		cert, err := pair.Certificate()
		if err != nil {
			t.Fatal(err)
		}
		return cert
	}
	user := issue(auth, pki.Identity{Kind: pki.KindUser, Name: "somebody"})
	stranger, err := pki.NewAuthority("somebody else")
	if err != nil {
		t.Fatal(err)
	}
	id := string(r.wait("the job", func(e event) bool { return e.Job != "" }).Job)

	old := pki.ClientTLS(site, roots, pki.HubName, "h2")
	old.MinVersion, old.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	nameless := pki.ClientTLS(site, roots, pki.HubName, "h2")
	nameless.Certificates, nameless.GetClientCertificate = nil, nil
	for _, c := range []struct {
		name string
		conf *tls.Config
		want string // a part of the error; "" is a connection that is closed without a word
	}{
		{"TLS 1.2", old, "protocol version"},
		{"no certificate", nameless, "certificate required"},
		{"a certificate of another authority", pki.ClientTLS(issue(stranger, pki.Identity{Kind: pki.KindSite, Name: "site-1"}), roots, pki.HubName, "h2"), "certificate"},
		{"an unknown protocol", pki.ClientTLS(site, roots, pki.HubName, "pergola-link/9"), "no application protocol"},
		{"a link with a site's certificate", pki.ClientTLS(site, roots, pki.HubName, link.ALPN), ""},
		{"a link with a user's certificate", pki.ClientTLS(user, roots, pki.HubName, link.ALPN), ""},
		{"a link of another job", pki.ClientTLS(issue(auth, pki.Identity{Kind: pki.KindParty, Name: "site-1", Job: "01arz3ndektsv4rrffq69g5fav"}), roots, pki.HubName, link.ALPN), ""},
		{"a link of a site without a part", pki.ClientTLS(issue(auth, pki.Identity{Kind: pki.KindParty, Name: "site-9", Job: id}), roots, pki.HubName, link.ALPN), ""},
	} {
		err := refusal(addr, c.conf)
		if err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: the port did not refuse it: %v", c.name, err)
		} else if c.want == "" && !errors.Is(err, io.EOF) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: refused with %q, want %q", c.name, err, c.want)
		}
	}
	// The hub's certificate is not for everybody's trust either.
	if err := refusal(addr, pki.ClientTLS(site, stranger.Roots(), pki.HubName, "h2")); !errors.As(err, new(*tls.CertificateVerificationError)) {
		t.Errorf("the hub's certificate was taken by somebody who does not trust its authority: %v", err)
	}
	// Without TLS there is no answer but a refusal.
	if res, err := http.Get("http://" + addr + "/"); err == nil {
		res.Body.Close()
		if res.StatusCode != http.StatusBadRequest {
			t.Errorf("plain HTTP was answered with %s", res.Status)
		}
	}

	for _, c := range []struct {
		name, method, body string
		cert               tls.Certificate
		status             int
		want               []string // in the body
	}{
		{"a user asks for sites", "JobService/ListSites", `{}`, user, 200, []string{`"site-1"`, `"connected":true`}},
		{"a user asks for the job", "JobService/GetJob", `{"id":"` + id + `"}`, user, 200, []string{`"running"`}},
		{"a user asks for another job", "JobService/GetJob", `{"id":"01arz3ndektsv4rrffq69g5fav"}`, user, 404, []string{`"not_found"`}},
		{"a user asks for nonsense", "JobService/GetJob", `{"id":"x"}`, user, 404, []string{`"not_found"`, "there is no job x"}},
		{"a site asks what a user may", "JobService/GetJob", `{"id":"` + id + `"}`, site, 403, []string{`"permission_denied"`}},
		{"a site asks for all jobs", "JobService/ListJobs", `{}`, site, 403, []string{`"permission_denied"`}},
		{"a site aborts the job", "JobService/AbortJob", `{"id":"` + id + `"}`, site, 403, []string{`"permission_denied"`}},
		{"a site asks for its logs", "SiteService/GetLogOffsets", `{"jobId":"` + id + `"}`, site, 200, []string{`client_app_log.txt`}},
		{"a user asks what a site may", "SiteService/GetLogOffsets", `{"jobId":"` + id + `"}`, user, 403, []string{`"permission_denied"`}},
		{"a site that is not enrolled", "SiteService/GetLogOffsets", `{"jobId":"` + id + `"}`, issue(auth, pki.Identity{Kind: pki.KindSite, Name: "site-9"}), 403, []string{`"permission_denied"`, "not enrolled"}},
		{"a runner's certificate", "SiteService/GetLogOffsets", `{"jobId":"` + id + `"}`, issue(auth, pki.Identity{Kind: pki.KindParty, Name: "site-1", Job: id}), 403, []string{`"permission_denied"`}},
	} {
		status, body := post(t, addr, roots, c.cert, c.method, c.body)
		if status != c.status {
			t.Errorf("%s: status %d, want %d: %s", c.name, status, c.status, body)
		}
		for _, w := range c.want {
			if !strings.Contains(strings.ReplaceAll(body, `": `, `":`), w) {
				t.Errorf("%s: the answer lacks %s: %s", c.name, w, body)
			}
		}
	}
}

// refusal connects and gives the error with which the port ends that; nil if it does not within patience.
func refusal(addr string, conf *tls.Config) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	d := tls.Dialer{Config: conf}
	c, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	defer c.Close()
	// In TLS 1.3 the client learns with its first read what the server thinks of its certificate.
	if err := c.SetReadDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	b := make([]byte, 1)
	for {
		if _, err = c.Read(b); err != nil {
			return err
		}
	}
}

// post calls the API as curl would.
func post(t *testing.T, addr string, roots *x509.CertPool, cert tls.Certificate, method, body string) (int, string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	tr := &http.Transport{TLSClientConfig: pki.ClientTLS(cert, roots, pki.HubName)}
	defer tr.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+addr+"/pergola.v1."+method, bytes.NewBufferString(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	res, err := (&http.Client{Transport: tr}).Do(req)
	if err != nil {
		t.Fatalf("%s: %v", method, err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	if !json.Valid(b) {
		t.Errorf("%s: the answer is not JSON: %q", method, b)
	}
	return res.StatusCode, string(b)
}
