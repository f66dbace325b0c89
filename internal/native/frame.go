package native

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/sock"
)

// Protocol is the version of the frames, said in hello by either end.
const Protocol = 1

// Limits of a frame; either side refuses more, with the connection.
const (
	MaxHead  = 4 << 20   // bytes of JSON: ids of the most clients that a job may have are half of it
	MaxBody  = 1<<31 - 1 // bytes of a protobuf, or of a state: protobuf's own limit
	maxFiles = 2
)

// Types of frames.
const (
	tHello   = "hello"
	tWelcome = "welcome"
	tStart   = "start"
	tReady   = "ready"
	tMsg     = "msg"
	tReply   = "reply"
	tLost    = "lost"
	tNodes   = "nodes"
	tForgot  = "forgot"
	tFree    = "free"
	tDone    = "done"
	tPack    = "pack"
)

// head is the JSON of a frame. Each type uses some of it.
type head struct {
	T        string `json:"t"`
	Protocol int    `json:"protocol,omitempty"`

	// hello
	Role   string `json:"role,omitempty"`
	Pid    int    `json:"pid,omitempty"`
	Flwr   string `json:"flwr,omitempty"`
	Python string `json:"python,omitempty"`
	Site   string `json:"site,omitempty"`

	Clients int `json:"clients,omitempty"`
	First   int `json:"first,omitempty"`

	// start, welcome, nodes
	Run       uint64   `json:"run,omitempty"`
	Task      uint64   `json:"task,omitempty"`
	App       string   `json:"app,omitempty"`
	Config    []string `json:"config,omitempty"`
	Nodes     []uint64 `json:"nodes,omitzero"`
	Cwd       string   `json:"cwd,omitempty"`
	Isolation string   `json:"isolation,omitempty"`

	// msg, reply, lost
	ID         string          `json:"id,omitempty"`
	Node       uint64          `json:"node,omitempty"`
	TTL        float64         `json:"ttl,omitempty"` // seconds
	Type       string          `json:"type,omitempty"`
	Group      string          `json:"group,omitempty"`
	NodeConfig json.RawMessage `json:"node_config,omitempty"`
	Plen       int             `json:"plen,omitempty"`
	Slen       int             `json:"slen,omitempty"`
	Pack       string          `json:"pack,omitempty"`
	Lens       []int64         `json:"lens,omitempty"`
	Drop       []string        `json:"drop,omitempty"` // packs that the ServerApp's process will not name again
	SPack      string          `json:"spack,omitempty"`
	SLens      []int64         `json:"slens,omitempty"`
	Fds        []string        `json:"fds,omitempty"`
	Code       int             `json:"code,omitempty"`
	Reason     string          `json:"reason,omitempty"`
	Numbers    Values          `json:"numbers,omitempty"`
	Round      int             `json:"round,omitempty"`
	Kept       bool            `json:"kept,omitempty"` // the node's state stays what it was
	Died       string          `json:"died,omitempty"` // how the forked child ended that was to answer
	Err        *errorReply     `json:"error_reply,omitempty"`
	Seconds    float64         `json:"seconds,omitempty"`

	// ready, done. In a reply it is an object, and goes to Err.
	Error     string `json:"-"`
	Exception string `json:"exception,omitempty"`
	OK        bool   `json:"ok,omitempty"`
	Fork      *bool  `json:"fork,omitempty"`
	Why       string `json:"why,omitempty"`

	// pack
	Name string `json:"name,omitempty"`
	Size int64  `json:"size,omitempty"`
}

// errorReply tells that a reply carries an error in its content's place.
type errorReply struct {
	Code   int    `json:"code"`
	Reason string `json:"reason,omitempty"`
}

type plainHead head

// MarshalJSON writes "error" as what its frame has there: a text, or an object in replies.
func (h head) MarshalJSON() ([]byte, error) {
	x := struct {
		plainHead
		Err   any `json:"error_reply,omitempty"` // hides the embedded one
		Error any `json:"error,omitempty"`
	}{plainHead: plainHead(h)}
	if h.Err != nil {
		x.Error = h.Err
	} else if h.Error != "" {
		x.Error = h.Error
	}
	return json.Marshal(x)
}

// UnmarshalJSON reads both forms of "error".
func (h *head) UnmarshalJSON(b []byte) error {
	var x struct {
		plainHead
		Err   json.RawMessage `json:"error_reply"`
		Error json.RawMessage `json:"error"`
	}
	if err := json.Unmarshal(b, &x); err != nil {
		return err
	}
	*h = head(x.plainHead)
	switch {
	case len(x.Error) == 0 || string(x.Error) == "null":
		return nil
	case x.Error[0] == '{':
		h.Err = &errorReply{}
		return json.Unmarshal(x.Error, h.Err)
	}
	return json.Unmarshal(x.Error, &h.Error)
}

// frame is one unit of the protocol. Whoever takes it owns its files.
type frame struct {
	head
	proto, state []byte
	files        []*os.File // as head.Fds names them
}

// file gives the file of a pack that came with the frame, and takes it out; nil if it did not come.
func (f *frame) file(name string) *os.File {
	for i, n := range f.Fds {
		if n == name && name != "" && i < len(f.files) {
			file := f.files[i]
			f.files[i] = nil
			return file
		}
	}
	return nil
}

// close closes the files that nobody took.
func (f *frame) close() { closeFiles(f.files) }

func closeFiles(files []*os.File) {
	for _, f := range files {
		if f != nil {
			_ = f.Close() // of a memory file, whose closing cannot fail in a way that matters
		}
	}
}

// errFrame is what was sent is no frame.
func errFrame(format string, args ...any) error {
	return problem.New(problem.Internal, "", "the other end does not speak the native engine's protocol: "+format, args...)
}

// readFrame reads one frame and nothing behind it; io.EOF only at a frame's beginning. What it allocates follows what comes,
// not what is announced.
func readFrame(r io.Reader) (frame, error) {
	var f frame
	var n [4]byte
	if _, err := io.ReadFull(r, n[:]); err != nil {
		return f, err
	}
	size := binary.LittleEndian.Uint32(n[:])
	if size < 2 || size > MaxHead {
		return f, errFrame("a head of %d bytes", size)
	}
	raw, err := readBytes(r, int(size))
	if err != nil {
		return f, err
	}
	if err := json.Unmarshal(raw, &f.head); err != nil {
		return f, errFrame("a head that is no JSON: %v", err)
	}
	if f.Plen < 0 || f.Plen > MaxBody || f.Slen < 0 || f.Slen > MaxBody {
		return f, errFrame("a message of %d and a state of %d bytes", f.Plen, f.Slen)
	}
	if len(f.Fds) > maxFiles {
		return f, errFrame("%d files", len(f.Fds))
	}
	if f.proto, err = readBytes(r, f.Plen); err != nil {
		return f, err
	}
	f.state, err = readBytes(r, f.Slen)
	return f, err
}

// readBytes reads n bytes into memory that grows with them.
func readBytes(r io.Reader, n int) ([]byte, error) {
	const step = 1 << 20
	b := make([]byte, 0, min(n, step))
	for len(b) < n {
		if len(b) == cap(b) {
			grown := make([]byte, len(b), min(n, 2*cap(b)))
			copy(grown, b)
			b = grown
		}
		k, err := io.ReadFull(r, b[len(b):cap(b)])
		b = b[:len(b)+k]
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
	}
	return b, nil
}

// appendHead writes the length and the head of a frame.
func appendHead(f *frame) ([]byte, error) {
	f.Plen, f.Slen = len(f.proto), len(f.state)
	raw, err := json.Marshal(f.head)
	if err != nil {
		return nil, err
	}
	if len(raw) > MaxHead {
		return nil, errFrame("a head of %d bytes is too long", len(raw))
	}
	return append(binary.LittleEndian.AppendUint32(make([]byte, 0, 4+len(raw)), uint32(len(raw))), raw...), nil
}

// conn carries frames, and files where it is a unix socket. One goroutine reads; any may write.
type conn struct {
	c    net.Conn
	unix *net.UnixConn // nil: no files
	got  []*os.File    // came with the frame that is being read

	mu sync.Mutex // one frame is written at a time
}

func newConn(c net.Conn) *conn {
	u, _ := c.(*net.UnixConn)
	return &conn{c: c, unix: u}
}

// read gives the next frame.
func (c *conn) read() (frame, error) {
	r := io.Reader(c.c)
	if c.unix != nil {
		r = filesReader{c}
	}
	f, err := readFrame(r)
	f.files, c.got = c.got, nil
	if err == nil && len(f.files) != len(f.Fds) {
		err = errFrame("%d files are named and %d came", len(f.Fds), len(f.files))
	}
	if err != nil {
		f.close()
		return frame{}, err
	}
	return f, nil
}

// filesReader reads bytes of a unix socket and keeps the files that come with them. It is asked for exactly what belongs to one
// frame, so that the files are that frame's.
type filesReader struct{ c *conn }

func (r filesReader) Read(b []byte) (int, error) {
	n, files, err := sock.ReadFiles(r.c.unix, b, maxFiles)
	r.c.got = append(r.c.got, files...)
	if errors.Is(err, sock.ErrLost) {
		err = errFrame("more than %d files came at once, or none can be opened any more", maxFiles)
	}
	return n, err
}

// write sends a frame; its files stay the caller's.
func (c *conn) write(f frame) error {
	b, err := appendHead(&f)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(f.files) > 0 {
		if c.unix == nil {
			return errFrame("files cannot go this way")
		}
		fds := make([]int, len(f.files))
		for i, file := range f.files {
			fds[i] = int(file.Fd())
		}
		n, _, err := c.unix.WriteMsgUnix(b, unix.UnixRights(fds...), nil)
		if err != nil {
			return err
		}
		b = b[n:]
	}
	for _, part := range [][]byte{b, f.proto, f.state} {
		if len(part) == 0 {
			continue
		}
		if _, err := c.c.Write(part); err != nil {
			return err
		}
	}
	return nil
}

func (c *conn) close() { _ = c.c.Close() } // whoever reads or writes is told

// SocketPair makes the two ends between a runner and one of its processes: ours, and the file that becomes its descriptor 3,
// which the caller closes once the process has it.
func SocketPair() (ours *net.UnixConn, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	theirs = os.NewFile(uintptr(fds[1]), "process")
	own := os.NewFile(uintptr(fds[0]), "runner")
	defer own.Close() // FileConn has its own
	c, err := net.FileConn(own)
	if err != nil {
		return nil, nil, errors.Join(err, theirs.Close())
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		return nil, nil, errors.Join(syscall.EPROTO, theirs.Close(), c.Close())
	}
	return u, theirs, nil
}
