package link

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pergolafl/pergola/internal/problem"
)

func TestStreamsEndAsTCPConnectionsDo(t *testing.T) {
	site, hub := pair(t)
	t.Run("streams", func(t *testing.T) {
		endAsTCPConnectionsDo(t, func() (near, far Stream) { return streams(t, site, hub) })
	})
	t.Run("lanes", func(t *testing.T) { endAsTCPConnectionsDo(t, func() (near, far Stream) { return lanes(t, site, hub) }) })
	t.Run("lanes of the end that does not dial", func(t *testing.T) {
		site, hub := pair(t) // lanes that are reset are broken, and three in a row are the last for a while
		endAsTCPConnectionsDo(t, func() (near, far Stream) { return lanes(t, hub, site) })
	})
	t.Run("Open and Accept obey their contexts", func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		why := errors.New("why")
		cancel(why)
		for name, f := range map[string]func(context.Context) (Stream, error){"Open": site.Open, "OpenLane": site.OpenLane, "Accept": hub.Accept} {
			if _, err := f(ctx); !errors.Is(err, why) {
				t.Errorf("%s: %v", name, err)
			}
		}
	})
}

func endAsTCPConnectionsDo(t *testing.T, pair func() (near, far Stream)) {
	t.Run("Close wakes this end's reader and ends the other's", func(t *testing.T) {
		near, far := pair()
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := near.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
				t.Errorf("the reader was told %v", err)
			}
		})
		if err := near.Close(); err != nil {
			t.Error(err)
		}
		wg.Wait()
		if _, err := near.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
			t.Errorf("a write afterwards gave %v", err)
		}
		if _, err := far.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			t.Errorf("the other end read %v", err)
		}
		far.Close()
	})
	t.Run("who writes to a closed stream is reset", func(t *testing.T) {
		near, far := pair()
		near.Close()
		var err error
		for err == nil {
			_, err = far.Write(make([]byte, 64<<10))
		}
		if !errors.Is(err, ErrReset) {
			t.Errorf("writing on gave %v", err)
		}
	})
	t.Run("Reset ends both ends at once, whatever was under way", func(t *testing.T) {
		near, far := pair()
		if _, err := near.Write(make([]byte, 100)); err != nil {
			t.Fatal(err)
		}
		if err := near.Reset(); err != nil {
			t.Error(err)
		}
		if _, err := near.Read(make([]byte, 1)); !errors.Is(err, ErrReset) {
			t.Errorf("this end reads %v", err)
		}
		if _, err := io.Copy(io.Discard, far); !errors.Is(err, ErrReset) {
			t.Errorf("the other end reads %v", err)
		}
		if _, err := far.Write([]byte{1}); !errors.Is(err, ErrReset) {
			t.Errorf("the other end writes %v", err)
		}
	})
	t.Run("deadlines", func(t *testing.T) {
		near, far := pair()
		defer near.Close()
		defer far.Close()
		if err := near.SetDeadline(time.Unix(1, 0)); err != nil {
			t.Fatal(err)
		}
		if _, err := near.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("read: %v", err)
		}
		if err := near.SetReadDeadline(time.Time{}); err != nil {
			t.Fatal(err)
		}
		if _, err := far.Write([]byte{1}); err != nil {
			t.Fatal(err)
		}
		if n, err := near.Read(make([]byte, 2)); n != 1 || err != nil {
			t.Errorf("later: %d, %v", n, err)
		}
		if _, err := near.Write(make([]byte, 1<<20)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("write: %v", err)
		}
	})
	t.Run("many writers of one stream do not overrun its window", func(t *testing.T) {
		near, far := pair()
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for range 50 {
					if _, err := near.Write(make([]byte, 10_000)); err != nil {
						t.Errorf("write: %v", err)
						return
					}
				}
			})
		}
		if n, err := io.CopyN(io.Discard, far, 8*50*10_000); err != nil {
			t.Errorf("read %d, %v", n, err)
		}
		wg.Wait()
		near.Close()
		far.Close()
	})
}

func TestNewSessionOfAPeerEndsItsOldOne(t *testing.T) {
	a, d := socket(t, Options{})
	var ends [2][2]*Session
	for i := range ends {
		site, err := Dial(t.Context(), d, Options{})
		if err != nil {
			t.Fatal(err)
		}
		hub, err := a.Accept(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		ends[i] = [2]*Session{site, hub}
		t.Cleanup(func() { site.Close(); hub.Close() })
	}
	<-ends[0][0].Done()
	<-ends[0][1].Done()
	for _, s := range ends[0] {
		if problem.CodeOf(s.Err()) != problem.LinkLost {
			t.Errorf("the old session ended with %v", s.Err())
		}
	}
	if ends[1][0].Err() != nil || ends[1][1].Err() != nil {
		t.Errorf("the new session: %v, %v", ends[1][0].Err(), ends[1][1].Err())
	}
}

func TestDialTriesAgainUntilItsTimeIsOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tries, start := 0, time.Now()
		_, err := Dial(t.Context(), func(context.Context) (net.Conn, error) {
			tries++
			return nil, errors.New("no route")
		}, Options{Retry: time.Minute})
		if took := time.Since(start); problem.CodeOf(err) != problem.LinkLost || took < time.Minute || took > time.Minute+time.Second || tries < 30 || tries > 70 {
			t.Errorf("%d tries in %v: %v", tries, took, err)
		}

		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := Dial(ctx, func(context.Context) (net.Conn, error) { return nil, errors.New("no route") }, Options{Retry: time.Hour}); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("given up: %v", err)
		}

		// An end that accepts and then says nothing.
		near, far := net.Pipe()
		defer far.Close()
		go func() { _, _ = io.Copy(io.Discard, far) }()
		start = time.Now()
		_, err = Dial(t.Context(), func(context.Context) (net.Conn, error) { return near, nil }, Options{})
		if took := time.Since(start); problem.CodeOf(err) != problem.LinkLost || took != handshakeWait {
			t.Errorf("after %v: %v", took, err)
		}
	})
}
