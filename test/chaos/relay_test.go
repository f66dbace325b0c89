package chaos_test

import (
	"context"
	"io"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pergolafl/pergola/internal/link"
	"github.com/pergolafl/pergola/internal/relay"
	"github.com/pergolafl/pergola/test/chaos"
)

// A cut between a stream's opening and its header, however long, is a pause for that connection too.
func TestCutBetweenOpeningAndHeader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &chaos.Network{}
		site, hub := pair(t, n.Listener(), dialer(n.Dial), link.Options{})
		ctx, cancel := context.WithCancel(t.Context())
		var serving sync.WaitGroup
		t.Cleanup(func() { cancel(); serving.Wait() })
		program := make(chan net.Conn, 1)
		serving.Go(func() {
			err := relay.Serve(ctx, hub.Accept, func(_ context.Context, target string) (net.Conn, error) {
				near, far := net.Pipe()
				program <- far
				return near, nil
			})
			if err != nil {
				t.Errorf("Serve: %v", err)
			}
		})
		s, err := site.Open(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait() // the hub has the stream and waits for its header
		n.SetDown(true)
		n.Cut()
		if _, err := s.Write([]byte("R\x01\x05fleethello")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(30 * time.Minute)
		n.SetDown(false)
		var far net.Conn
		select {
		case far = <-program:
		case <-time.After(time.Minute):
			t.Fatal("the connection was given up")
		}
		got := make([]byte, 5)
		if _, err := io.ReadFull(far, got); err != nil || string(got) != "hello" {
			t.Errorf("the program got %q, %v", got, err)
		}
		far.Close()
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
}
