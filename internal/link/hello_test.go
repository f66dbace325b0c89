package link

import (
	"bytes"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/pergolafl/pergola/internal/problem"
)

func TestWindowFor(t *testing.T) {
	for rtt, want := range map[time.Duration]uint32{0: minWindow, 100 * time.Microsecond: minWindow, 10 * time.Millisecond: 2_500_000, 100 * time.Millisecond: MaxWindow, time.Hour: MaxWindow} {
		if got := windowFor(rtt); got != want {
			t.Errorf("windowFor(%v) = %d, want %d", rtt, got, want)
		}
	}
}

func TestPreface(t *testing.T) {
	longest := Peer{Job: strings.Repeat("j", MaxName), Site: strings.Repeat("s", MaxName)}
	for _, p := range []Peer{anna, {"a", "b"}, longest} {
		var b bytes.Buffer
		if err := WritePreface(&b, p); err != nil {
			t.Fatal(err)
		}
		if b.Len() > 135 {
			t.Errorf("%d bytes for %v", b.Len(), p)
		}
		b.WriteString("PGLK")
		if got, err := ReadPreface(&b); err != nil || got != p || b.String() != "PGLK" {
			t.Errorf("ReadPreface = %v, %v with %q left, want %v", got, err, b.String(), p)
		}
	}
	for _, p := range []Peer{{}, {"a", ""}, {"", "b"}, {"a b", "c"}, {"a", "b\n"}, {longest.Job + "j", "s"}} {
		if err := WritePreface(io.Discard, p); problem.CodeOf(err) != problem.Internal {
			t.Errorf("WritePreface took %v: %v", p, err)
		}
	}
	for _, b := range []string{
		"", "PGLP", "PGLP\x01", "PGLK\x01\x01a\x01b", "PGLP\x02\x01a\x01b", "PGLP\x01\x00\x01b", "PGLP\x01\x01a\x00",
		"PGLP\x01\xff" + strings.Repeat("a", 300), "PGLP\x01\x01a\xff" + strings.Repeat("a", 300), "PGLP\x01\x01a\x02b", "PGLP\x01\x01\x00\x01b",
	} {
		if p, err := ReadPreface(strings.NewReader(b)); problem.CodeOf(err) != problem.Internal || p != (Peer{}) {
			t.Errorf("ReadPreface(%q) = %v, %v", b, p, err)
		}
	}
}

// What parses is written back byte for byte, and nothing behind it is read.
func FuzzReadPreface(f *testing.F) {
	f.Add([]byte("PGLP\x01\x01a\x01b and more"))
	f.Add([]byte("PGLP\x01\x0401JA\x07st-anna"))
	f.Add([]byte("PGLP\x01\x40"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		p, err := ReadPreface(r)
		if err != nil {
			return
		}
		var again bytes.Buffer
		if err := WritePreface(&again, p); err != nil || !bytes.HasPrefix(b, again.Bytes()) || r.Len() != len(b)-again.Len() {
			t.Errorf("%q gave %v, which is written %q, %v; %d bytes left", b, p, again.Bytes(), err, r.Len())
		}
	})
}

// What parses is written back byte for byte, and neither reads nor keeps more than its declared limit.
func FuzzReadFrame(f *testing.F) {
	f.Add(appendFrame(nil, helloFrame(greeting{id: sessionID{1, 2, 3}, attempt: 1})))
	f.Add(appendFrame(nil, helloFrame(greeting{id: sessionID{1}, secret: [keySize]byte{7}, attempt: 9, resume: true, at: position{1 << 40, 2, 3}})))
	f.Add(appendFrame(nil, welcomeFrame(sessionID{}, position{4, 5, 6})))
	f.Add(appendFrame(nil, refuseFrame(refuseVersion)))
	f.Add(appendFrame(nil, startFrame(sessionID{9})))
	f.Add(appendFrame(nil, laneFrame(sessionID{9}, [keySize]byte{8}, 7)))
	f.Add(appendFrame(nil, frame{kind: frameHello, version: 65535, body: make([]byte, maxBody)}))
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		fr, err := readFrame(r)
		if err != nil {
			return
		}
		if len(fr.body) > maxBody || fr.kind < frameHello || fr.kind > frameLane {
			t.Errorf("read %+v", fr)
		}
		if again := appendFrame(nil, fr); !bytes.HasPrefix(b, again) || r.Len() != len(b)-len(again) {
			t.Errorf("%q gave %+v, which is written %q; %d bytes left", b, fr, again, r.Len())
		}
		if g, err := fr.greeting(); err == nil && !bytes.Equal(helloFrame(g).body, fr.body) {
			t.Errorf("%q gave %+v", fr.body, g)
		}
		if id, secret, number, err := fr.lane(); err == nil && !bytes.Equal(laneFrame(id, secret, number).body, fr.body) {
			t.Errorf("%q gave lane %d of %v", fr.body, number, id)
		}
		if fr.kind == frameWelcome && len(fr.body) >= idSize {
			id := sessionID(fr.body)
			if at, err := fr.welcome(id); err == nil && !bytes.Equal(welcomeFrame(id, at).body, fr.body) {
				t.Errorf("%q gave %+v", fr.body, at)
			}
		}
	})
}

// What parses is written back byte for byte; nothing behind the head of DATA is read, and nothing is allocated.
func FuzzReadUnit(f *testing.F) {
	f.Add(appendUnit(nil, unit{kind: frameData, length: MaxData, number: 1 << 50}))
	f.Add(appendUnit(nil, unit{kind: frameData, length: MaxData + 1}))
	f.Add(appendUnit(nil, unit{kind: frameData}))
	f.Add(appendUnit(nil, ackUnit(3, 1<<63)))
	f.Add(appendUnit(nil, unit{kind: framePing}))
	f.Add(appendUnit(nil, unit{kind: frameClose, number: 77}))
	f.Add(appendUnit(nil, unit{kind: frameAsk, number: 1}))
	f.Add(appendUnit(nil, unit{kind: frameAsk}))
	f.Add(appendUnit(nil, unit{kind: frameNo, length: noBody, number: 1, limit: noWay}))
	f.Add([]byte{0, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		var head [unitHead + ackBody]byte
		u, err := readUnit(r, &head)
		if err != nil {
			return
		}
		if u.length > MaxData || u.kind < frameData || u.kind > frameNo {
			t.Errorf("read %+v", u)
		}
		if again := appendUnit(nil, u); !bytes.HasPrefix(b, again) || r.Len() != len(b)-len(again) {
			t.Errorf("%q gave %+v, which is written %q; %d bytes left", b, u, again, r.Len())
		}
	})
}
