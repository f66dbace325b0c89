package native

import (
	"slices"
	"sync/atomic"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
)

// between is the protobuf of a message from one node to another.
func between(src, dst uint64) []byte {
	var meta []byte
	meta = protowire.AppendTag(meta, 2, protowire.BytesType)
	meta = protowire.AppendString(meta, "an id")
	for num, v := range map[protowire.Number]uint64{metadataSrc: src, metadataDst: dst} {
		meta = protowire.AppendTag(meta, num, protowire.VarintType)
		meta = protowire.AppendVarint(meta, v)
	}
	b := protowire.AppendTag(nil, messageMetadata, protowire.BytesType)
	return protowire.AppendBytes(b, meta)
}

// The ends of a message are read as protobuf's own readers read them, so that nothing can be said to one reader and not to the other.
func TestEnds(t *testing.T) {
	content := protowire.AppendBytes(protowire.AppendTag(nil, 2, protowire.BytesType), between(8, 9))
	other := protowire.AppendFixed64(protowire.AppendTag(nil, metadataSrc, protowire.Fixed64Type), 7)
	for _, c := range []struct {
		name     string
		proto    []byte
		src, dst uint64
		fails    bool
	}{
		{"nothing", nil, 0, 0, false},
		{"a message", between(1<<63-1, 5), 1<<63 - 1, 5, false},
		{"behind its content", slices.Concat(content, between(1, 5)), 1, 5, false},
		{"with metadata twice", slices.Concat(between(1, 5), content, between(2, 6)), 2, 6, false},
		{"with a field of another kind", slices.Concat(between(1, 5), protowire.AppendBytes(protowire.AppendTag(nil, messageMetadata, protowire.BytesType), other)), 1, 5, false},
		{"cut off", between(1, 5)[:9], 0, 0, true},
		{"no protobuf", []byte("hello"), 0, 0, true},
	} {
		src, dst, err := ends(c.proto)
		if (err != nil) != c.fails || err == nil && (src != c.src || dst != c.dst) {
			t.Errorf("%s: from %d to %d, %v; want %d and %d", c.name, src, dst, err, c.src, c.dst)
		}
	}
}

// A site answers for its own nodes: a reply that says to come from another is refused, its message answered for, and the site goes on.
func TestReplyForAnotherNode(t *testing.T) {
	var bad atomic.Pointer[[]byte] // what a site answers with
	w := newWorld(t, 2, 1, 1, Warm, func(_ *conn, f *frame, _ map[string]string) (*frame, bool) {
		_, dst, err := ends(f.proto)
		if err != nil {
			t.Error(err)
		}
		if f.ID == "good" {
			return &frame{proto: between(dst, 1)}, true
		}
		return &frame{proto: *bad.Load()}, true
	})
	for _, proto := range [][]byte{
		between(w.nodes[1], 1), slices.Concat(between(w.nodes[0], 1), between(w.nodes[1], 1)), between(w.nodes[0]<<1, 1), []byte("no protobuf"), nil,
	} {
		bad.Store(&proto)
		w.send(frame{head: head{T: tMsg, ID: "bad", Node: w.nodes[0], TTL: 1000, Type: "train"}, proto: between(1, w.nodes[0])})
		if f := w.next(tReply, tLost); f.T != tLost || f.ID != "bad" || f.Code != CodeNoReply || f.Node != w.nodes[0] {
			t.Errorf("%x: the ServerApp is told %+v", proto, f.head)
		}
		if site := <-w.refused; site != w.site(0) {
			t.Errorf("%x: a reply of %s is said to be refused", proto, site)
		}
		w.send(frame{head: head{T: tMsg, ID: "good", Node: w.nodes[0], TTL: 1000, Type: "train"}, proto: between(1, w.nodes[0])})
		if f := w.next(tReply, tLost); f.T != tReply || f.ID != "good" {
			t.Errorf("the ServerApp is told %+v", f.head)
		}
	}
	w.done()
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.batch) != 1 || w.batch[0].Replies != 10 || w.batch[0].Errors != 5 {
		t.Errorf("the replies came to %+v", w.batch)
	}
}

// Nor does it answer a message that another site was sent.
func TestReplyToAnothersMessage(t *testing.T) {
	held := make(chan struct{})
	w := newWorld(t, 2, 1, 1, Warm, func(_ *conn, f *frame, _ map[string]string) (*frame, bool) {
		if f.ID == "theirs" {
			<-held
		}
		return &frame{proto: between(f.Node, 1)}, true
	})
	w.send(frame{head: head{T: tMsg, ID: "theirs", Node: w.nodes[0], TTL: 1000}, proto: between(1, w.nodes[0])})
	l := w.links[0]
	if l.member.site == w.site(0) {
		l = w.links[1]
	}
	// What the other site sends is read in its order: when its own message is answered, the forged answer has been.
	<-l.site.welcomed
	for _, id := range []string{"theirs", "mine"} {
		if id == "mine" {
			w.send(frame{head: head{T: tMsg, ID: id, Node: w.nodes[1], TTL: 1000}, proto: between(1, w.nodes[1])})
		} else if err := l.site.link.write(frame{head: head{T: tReply, ID: id, Node: w.nodes[0]}, proto: between(w.nodes[0], 1)}); err != nil {
			t.Fatal(err)
		}
	}
	if f := w.next(tReply, tLost); f.ID != "mine" {
		t.Errorf("the ServerApp is told %+v", f.head)
	}
	close(held)
	if f := w.next(tReply, tLost); f.ID != "theirs" || f.T != tReply {
		t.Errorf("the ServerApp is told %+v", f.head)
	}
	w.done()
}
