package fleet

import (
	"bytes"
	"math"
	"slices"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
)

// Messages as Flower's stubs serialise them.

func nodeMessage(id uint64) []byte { // message Node { uint64 node_id = 1; } as field 1
	inner := protowire.AppendVarint(protowire.AppendTag(nil, 1, protowire.VarintType), id)
	return protowire.AppendBytes(protowire.AppendTag(nil, 1, protowire.BytesType), inner)
}

func nodeNumber(id uint64) []byte {
	return protowire.AppendVarint(protowire.AppendTag(nil, 1, protowire.VarintType), id)
}

func interval(num protowire.Number, seconds float64) []byte {
	return protowire.AppendFixed64(protowire.AppendTag(nil, num, protowire.Fixed64Type), math.Float64bits(seconds))
}

func stringField(num protowire.Number, s string) []byte {
	return protowire.AppendString(protowire.AppendTag(nil, num, protowire.BytesType), s)
}

func boxed(name string, content []byte) []byte {
	entry := append(stringField(1, "flower-version"), stringField(2, "1.12.0")...)
	b := protowire.AppendBytes(protowire.AppendTag(nil, 1, protowire.BytesType), entry)
	b = append(b, stringField(2, name)...)
	return protowire.AppendBytes(protowire.AppendTag(b, 3, protowire.BytesType), content)
}

func TestOperation(t *testing.T) {
	for in, want := range map[string]string{
		"send-node-heartbeat": opHeartbeat, "SendNodeHeartbeat": opHeartbeat, "SendNodeHeartbeatRequest": opHeartbeat,
		"pull-messages": opPull, "PullTaskInsRequest": "PullTaskIns", "PingRequest": opPing, "": "", "-": "", "a--b": "AB",
	} {
		if got := operation(in); got != want {
			t.Errorf("operation(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestNodeOf(t *testing.T) {
	const id = 1 << 63
	for name, c := range map[string]struct {
		msg       []byte
		want      uint64
		found, ok bool
	}{
		"as a message":                  {nodeMessage(id), id, true, true},
		"as a number":                   {nodeNumber(id), id, true, true},
		"among others":                  {append(stringField(3, "x"), nodeMessage(7)...), 7, true, true},
		"the same twice":                {append(nodeMessage(7), nodeMessage(7)...), 7, true, true},
		"two of them":                   {append(nodeMessage(7), nodeMessage(8)...), 8, true, false},
		"two of them, in both forms":    {append(nodeMessage(7), nodeNumber(8)...), 8, true, false},
		"none":                          {stringField(2, "x"), 0, false, true},
		"an interval in field 1":        {interval(1, 30), 0, false, true},
		"nothing at all":                {nil, 0, false, true},
		"cut off":                       {nodeMessage(id)[:5], 0, false, false},
		"a field 1 that is not a node":  {stringField(1, "\xff\xff"), 0, false, false},
		"a tail that cannot be decoded": {append(nodeMessage(7), 0xff), 7, true, false},
	} {
		if got, found, ok := nodeOf(c.msg); got != c.want || found != c.found || ok != c.ok {
			t.Errorf("%s: got %d, %v, %v, want %d, %v, %v", name, got, found, ok, c.want, c.found, c.ok)
		}
	}
}

func TestWithInterval(t *testing.T) {
	for name, c := range map[string]struct{ msg, want []byte }{
		"ping":      {append(nodeMessage(7), interval(2, 30)...), append(nodeMessage(7), interval(2, 3600)...)},
		"create":    {interval(1, 30), interval(1, 3600)},
		"none":      {nodeMessage(7), nodeMessage(7)},
		"malformed": {[]byte{0xff}, []byte{0xff}},
	} {
		if got := withInterval(c.msg, 3600); !bytes.Equal(got, c.want) {
			t.Errorf("%s: got %x, want %x", name, got, c.want)
		}
	}
}

func TestContainer(t *testing.T) {
	in := boxed("PingRequest", append(nodeMessage(7), interval(2, 30)...))
	box, ok := openContainer(in)
	if !ok || box.name != "PingRequest" || !bytes.Equal(box.with(box.content), in) {
		t.Errorf("got %+v, %v", box, ok)
	}
	if again, _ := openContainer(box.with([]byte("other"))); string(again.content) != "other" || again.name != box.name {
		t.Errorf("with other content: %+v", again)
	}
}

// FuzzWire: nothing that a site sends makes the gate fail, an interval can be changed without changing anything else, and what
// was framed can be unframed.
func FuzzWire(f *testing.F) {
	f.Add(append(nodeMessage(7), interval(2, 30)...))
	f.Add(interval(1, 30))
	f.Add(boxed("PingRequest", append(nodeMessage(7), interval(2, 30)...)))
	f.Add(frame(nodeMessage(1 << 63)))
	f.Add([]byte{0, 0xff, 0xff, 0xff, 0xff, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		if msg, rest, ok := unframe(b); ok && !bytes.Equal(append(frame(msg), rest...), b) {
			t.Error("a frame was changed")
		}
		if len(b) < maxSmall {
			if msg, rest, ok := unframe(frame(b)); !ok || len(rest) > 0 || !bytes.Equal(msg, b) {
				t.Error("what was framed is not what comes out")
			}
		}
		id, found, ok := nodeOf(b)
		own, has := intervalOf(b)
		out := withInterval(b, 1234.5)
		if id2, found2, ok2 := nodeOf(out); id2 != id || found2 != found || ok2 != ok {
			t.Errorf("the node changed with the interval: %d, %v, %v", id2, found2, ok2)
		}
		if now, still := intervalOf(out); ok && (still != has || has && now != 1234.5 && !slices.Equal(out, b)) {
			t.Errorf("the interval %v became %v", own, now)
		}
		if box, ok := openContainer(b); ok {
			if again, ok := openContainer(box.with(box.content)); !ok || again.name != box.name || !bytes.Equal(again.content, box.content) {
				t.Error("a container changed")
			}
		}
		_ = hasMessage(b)
		_ = text(b, 3)
		_ = operation(string(b))
	})
}
