package native

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"math"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/pergolafl/pergola/internal/problem"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func encoded(t testing.TB, f frame) []byte {
	t.Helper()
	b, err := appendHead(&f)
	if err != nil {
		t.Fatal(err)
	}
	return append(append(b, f.proto...), f.state...)
}

func TestFrames(t *testing.T) {
	no := false
	for _, f := range []frame{
		{head: head{T: tHello, Protocol: 1, Role: "client", Pid: 7, Flwr: "1.30.0"}},
		{head: head{T: tNodes, Nodes: []uint64{}}},
		{head: head{T: tNodes, Nodes: []uint64{math.MaxInt64, 1<<53 + 1}}},
		{head: head{T: tReady, Error: "no such module", Fork: &no, Why: "threads"}},
		{head: head{T: tMsg, ID: "a", Node: 1<<63 + 1, TTL: 3600.5, Lens: []int64{-1, 3}, NodeConfig: json.RawMessage(`{"x":1.0}`)}, proto: []byte("message"), state: []byte("state")},
		{head: head{T: tReply, ID: "a", Err: &errorReply{2, "ValueError"}, Numbers: Values{"loss": math.Inf(1), "acc": 0.5}}, proto: bytes.Repeat([]byte("x"), 3<<20)},
	} {
		b := encoded(t, f)
		got, err := readFrame(io.MultiReader(bytes.NewReader(b), strings.NewReader("more")))
		if err != nil {
			t.Fatalf("%s: %v", f.T, err)
		}
		f.Plen, f.Slen = len(f.proto), len(f.state)
		if d := cmp.Diff(f.head, got.head); d != "" || !bytes.Equal(f.proto, got.proto) || !bytes.Equal(f.state, got.state) {
			t.Errorf("%s came back as another (-sent +got):\n%s", f.T, d)
		}
	}
}

func TestNoFrames(t *testing.T) {
	with := func(head string, rest ...byte) []byte {
		return append(append(binary.LittleEndian.AppendUint32(nil, uint32(len(head))), head...), rest...)
	}
	for _, c := range []struct {
		name string
		b    []byte
		err  error // nil: a problem
	}{
		{"nothing", nil, io.EOF},
		{"part of a length", []byte{1, 0}, io.ErrUnexpectedEOF},
		{"no head", binary.LittleEndian.AppendUint32(nil, 0), nil},
		{"a head of more than 4 MiB", binary.LittleEndian.AppendUint32(nil, MaxHead+1), nil},
		{"half a head", with(`{"t":"msg"}`)[:8], io.ErrUnexpectedEOF},
		{"no JSON", with(`hello, world`), nil},
		{"a message of less than nothing", with(`{"t":"msg","plen":-1}`), nil},
		{"a message of more than 2 GiB", with(`{"t":"msg","plen":2147483648}`), nil},
		{"a state of more than 2 GiB", with(`{"t":"msg","slen":2147483648}`), nil},
		{"three files", with(`{"t":"msg","fds":["a","b","c"]}`), nil},
		{"2 GiB announced and three bytes sent", with(`{"t":"msg","plen":2147483647}`, 1, 2, 3), io.ErrUnexpectedEOF},
	} {
		_, err := readFrame(bytes.NewReader(c.b))
		if c.err != nil && !errors.Is(err, c.err) || c.err == nil && problem.CodeOf(err) != problem.Internal {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

// What is read is written back as the same, and what is not fails without more memory than came in.
func FuzzReadFrame(f *testing.F) {
	f.Add(encoded(f, frame{head: head{T: tMsg, ID: "1", Node: 2, TTL: 3, Lens: []int64{4}}, proto: []byte("p"), state: []byte("s")}))
	f.Add(encoded(f, frame{head: head{T: tReply, Err: &errorReply{1, "x"}, Numbers: Values{"a": math.NaN()}}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := readFrame(bytes.NewReader(b))
		if err != nil {
			return
		}
		again, err := readFrame(bytes.NewReader(encoded(t, got)))
		if err != nil {
			t.Fatal(err)
		}
		x, y := encoded(t, got), encoded(t, again)
		if !bytes.Equal(x, y) {
			t.Errorf("%q\nis written as\n%q\nand that as\n%q", b, x, y)
		}
	})
}

// Files come with the frame that they were sent with, however many frames are in the socket.
func TestFilesOfFrames(t *testing.T) {
	ours, theirs, err := SocketPair()
	if err != nil {
		t.Fatal(err)
	}
	defer ours.Close()
	other := fileConn(t, theirs)
	defer other.close()
	c := newConn(ours)
	for i, text := range []string{"", "first", "", "second"} {
		f := frame{head: head{T: tMsg, Task: uint64(i)}, proto: []byte(strings.Repeat("x", i*1000))}
		if text != "" {
			file := memory(t, text)
			f.Fds, f.files = []string{"p"}, []*os.File{file}
		}
		if err := c.write(f); err != nil {
			t.Fatal(err)
		}
	}
	for i, text := range []string{"", "first", "", "second"} {
		f, err := other.read()
		if err != nil || f.Task != uint64(i) || len(f.proto) != i*1000 || len(f.files) > 1 {
			t.Fatalf("frame %d: %+v, %v", i, f.head, err)
		}
		file := f.file("p")
		if (file != nil) != (text != "") {
			t.Fatalf("frame %d came with the file %v", i, file)
		}
		if file != nil {
			if got := content(t, file); got != text {
				t.Errorf("frame %d has %q, want %q", i, got, text)
			}
			closeFiles([]*os.File{file})
		}
		f.close()
	}
}

// A frame that names files which do not come is refused.
func TestMissingFile(t *testing.T) {
	ours, theirs, err := SocketPair()
	if err != nil {
		t.Fatal(err)
	}
	defer ours.Close()
	other := fileConn(t, theirs)
	defer other.close()
	if err := newConn(ours).write(frame{head: head{T: tMsg, Fds: []string{"p"}}}); err != nil {
		t.Fatal(err)
	}
	if _, err := other.read(); problem.CodeOf(err) != problem.Internal {
		t.Errorf("%v", err)
	}
}

// The ids of as many nodes as a job may have (job.MaxClients) go into one head.
func TestHeadOfManyNodes(t *testing.T) {
	f := frame{head: head{T: tStart, Nodes: slices.Repeat([]uint64{math.MaxUint64 >> 1}, 100_000)}}
	got, err := readFrame(bytes.NewReader(encoded(t, f)))
	if err != nil || len(got.Nodes) != len(f.Nodes) {
		t.Errorf("%d nodes came back, %v", len(got.Nodes), err)
	}
}
