package link

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/pki/pkitest"
)

// calls counts what reaches the network.
type calls struct {
	net.Conn
	reads, writes atomic.Int64
}

func (c *calls) Read(b []byte) (int, error) {
	c.reads.Add(1)
	return c.Conn.Read(b)
}

func (c *calls) Write(b []byte) (int, error) {
	c.writes.Add(1)
	return c.Conn.Write(b)
}

// secured gives both ends of a TLS connection over loopback that lies on coalescers, and what those call.
func secured(t *testing.T) (*tls.Conn, *tls.Conn, [2]*calls) {
	t.Helper()
	var below [2]*calls
	ca := pkitest.Authority(t, "test")
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	t.Cleanup(func() { ln.Close() })
	for i, open := range []func() (net.Conn, error){func() (net.Conn, error) { return net.Dial("tcp", ln.Addr().String()) }, ln.Accept} {
		c, err := open()
		must(t, err)
		t.Cleanup(func() { c.Close() })
		below[i] = &calls{Conn: c}
	}
	hub := pkitest.Cert(t, ca, pki.Identity{Kind: pki.KindHub, Name: pki.HubName})
	client := tls.Client(Coalesce(below[0]), pki.ClientTLS(pkitest.Cert(t, ca, pki.Identity{Kind: pki.KindSite, Name: "a"}), ca.Roots(), pki.HubName))
	server := tls.Server(Coalesce(below[1]), &tls.Config{Certificates: []tls.Certificate{hub}})
	shaken := make(chan error, 1)
	go func() { shaken <- server.Handshake() }()
	must(t, client.Handshake())
	must(t, <-shaken)
	return client, server, below
}

// Bytes come as they were sent, whatever the sizes of writes and reads, and with far fewer calls than records.
func TestCoalesce(t *testing.T) {
	client, server, below := secured(t)
	const size = 32 << 20
	data := make([]byte, size)
	for i := range data {
		data[i] = byte(rand.Uint32())
	}
	sent := make(chan error, 1)
	go func() {
		w := coalescerOf(client)
		for left := data; len(left) > 0; {
			n := min(len(left), 64<<10)
			if len(left)%3 == 0 {
				n = min(len(left), 1+rand.IntN(100_000))
			}
			if err := w.writeTo(client, left[:n]); err != nil {
				sent <- err
				return
			}
			left = left[n:]
		}
		sent <- client.CloseWrite()
	}()
	got := sha256.New()
	r := coalescerOf(server)
	var reads, n int
	for buf := make([]byte, spliceBuffer); ; reads++ {
		k, err := r.readFrom(server, buf)
		got.Write(buf[:k])
		if n += k; errors.Is(err, io.EOF) {
			break
		}
		must(t, err)
	}
	must(t, <-sent)
	if want := sha256.Sum256(data); n != size || !bytes.Equal(got.Sum(nil), want[:]) {
		t.Fatalf("%d bytes of %d came, or others", n, size)
	}
	const records = size >> 14
	if w := below[0].writes.Load(); w > records/2 {
		t.Errorf("%d calls wrote about %d records", w, records)
	}
	t.Logf("%d records, %d writes, %d reads below, %d above", records, below[0].writes.Load(), below[1].reads.Load(), reads)
	if r.ahead != nil || r.left.Load() != 0 {
		t.Error("an idle connection holds a buffer")
	}
}

// A read that has a deadline ends by it with nothing lost, in the middle of much as well as while little comes.
func TestCoalescedDeadlines(t *testing.T) {
	a, b := net.Pipe()
	t.Cleanup(func() { a.Close(); b.Close() })
	c := &coalescer{Conn: b, much: true}
	must(t, b.SetReadDeadline(time.Unix(1, 0)))
	if n, err := c.Read(make([]byte, 10)); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("%d, %v", n, err)
	}
	if c.ahead != nil {
		t.Error("it holds a buffer")
	}
	must(t, b.SetReadDeadline(time.Time{}))
	c.much = true
	go func() {
		_, _ = a.Write([]byte("0123456789"))
		_ = a.Close()
	}()
	out, err := io.ReadAll(io.MultiReader(io.LimitReader(c, 3), c))
	if string(out) != "0123456789" || err != nil {
		t.Errorf("%q, %v", out, err)
	}
}

// What was held and could not be written is told to who wrote it.
func TestCoalescedWriteFails(t *testing.T) {
	a, b := net.Pipe()
	t.Cleanup(func() { a.Close(); b.Close() })
	must(t, a.Close())
	c := &coalescer{Conn: b}
	if err := c.writeTo(c, make([]byte, 64<<10)); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("%v", err)
	}
	if err := c.writeTo(c, make([]byte, 2*wireBuffer)); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("%v", err)
	}
	if c.out != nil {
		t.Error("it holds a buffer")
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
