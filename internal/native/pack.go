package native

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"
	"golang.org/x/sys/unix"
)

// chunk is how much of a pack is in this process's memory at a time: 16 of the link's frames, and little beside one stream's window.
const chunk = 256 << 10

var chunks = sync.Pool{New: func() any { return new([chunk]byte) }}

// piece takes a buffer of the pool, to be put back.
func piece() *[chunk]byte {
	b, ok := chunks.Get().(*[chunk]byte)
	if !ok {
		return new([chunk]byte) // the pool has nothing else
	}
	return b
}

// memFile makes a memory file. Its pages count as shared memory of whoever writes them first.
func memFile(name string) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// sizeOf gives how many bytes a pack's arrays have together, and refuses lengths that its file cannot have.
func sizeOf(file *os.File, lens []int64) (int64, error) {
	info, err := file.Stat()
	if err != nil {
		return 0, err
	}
	if !info.Mode().IsRegular() {
		return 0, errFrame("a pack that is no memory file")
	}
	var sum int64
	for _, n := range lens {
		if n < -1 || n > info.Size() {
			return 0, errFrame("an array of %d bytes in a pack of %d", n, info.Size())
		}
		sum += max(n, 0)
		if sum > info.Size() {
			return 0, errFrame("arrays of more than the %d bytes of their pack", info.Size())
		}
	}
	return sum, nil
}

// send writes the first size bytes of a pack.
func send(w io.Writer, file *os.File, size int64) error {
	buf := piece()
	defer chunks.Put(buf)
	for at := int64(0); at < size; {
		n, err := file.ReadAt(buf[:min(int64(chunk), size-at)], at)
		if n == 0 {
			return backoff.Permanent(errors.Join(io.ErrUnexpectedEOF, err)) // its writer has cut it
		}
		if _, err := w.Write(buf[:n]); err != nil {
			return err
		}
		at += int64(n)
	}
	return nil
}

// receive writes the next size bytes of r into a pack's file.
func receive(r io.Reader, file *os.File, size int64) error {
	buf := piece()
	defer chunks.Put(buf)
	for at := int64(0); at < size; {
		n, err := r.Read(buf[:min(int64(chunk), size-at)])
		if n > 0 {
			if _, err := file.WriteAt(buf[:n], at); err != nil {
				return err
			}
			at += int64(n)
		}
		if err != nil && at < size {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
	}
	return nil
}

// same tells whether two packs hold the same first size bytes. Different models differ within the first chunk, so that a comparison
// that finds nothing costs two reads; one that succeeds reads both packs once: 30 ms for 100 MB, where one SHA-256 of them took 118 ms (2 busy
// cores).
func same(a, b *os.File, size int64) bool {
	x := piece()
	y := piece()
	defer chunks.Put(x)
	defer chunks.Put(y)
	for at := int64(0); at < size; {
		n := min(int64(chunk), size-at)
		i, _ := a.ReadAt(x[:n], at) // what could not be read is not equal
		j, _ := b.ReadAt(y[:n], at)
		if int64(i) != n || int64(j) != n || !bytes.Equal(x[:n], y[:n]) {
			return false
		}
		at += n
	}
	return true
}

// memFiles keeps files of packs that are done for the next ones: writing to pages that are there takes half the time of writing to new
// ones. The zero value is ready.
type memFiles struct {
	mu   sync.Mutex // guards the rest
	idle []*os.File
	done bool
}

// maxIdle is how many are kept: a model on its way while the one before it is put away.
const maxIdle = 2

// get gives a file for a pack of size bytes. It may be longer.
func (p *memFiles) get(name string, size int64) (*os.File, error) {
	p.mu.Lock()
	for i, f := range p.idle {
		if info, err := f.Stat(); err == nil && info.Size() >= size && info.Size() <= 2*size {
			p.idle = slices.Delete(p.idle, i, i+1)
			p.mu.Unlock()
			return f, nil
		}
	}
	p.mu.Unlock()
	f, err := memFile(name)
	if err != nil {
		return nil, err
	}
	if err := f.Truncate(size); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// put takes a file that nobody reads or writes any more.
func (p *memFiles) put(f *os.File) {
	if f == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.done {
		_ = f.Close()
		return
	}
	p.idle = append(p.idle, f)
	if len(p.idle) > maxIdle {
		_ = p.idle[0].Close()
		p.idle = slices.Delete(p.idle, 0, 1)
	}
}

func (p *memFiles) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.done = true
	closeFiles(p.idle)
	p.idle = nil
}

// arrivals are packs that come over streams of their own, by name: a message that names one waits here for it.
type arrivals struct {
	files *memFiles

	mu      sync.Mutex // guards the rest
	packs   map[string]*arrival
	dropped []string // names of the last maxDropped that came and went, oldest first
	closed  bool
}

// maxDropped is how many names are remembered of packs that are done. One comes again if its sender could not hear that it is here.
const maxDropped = 1024

// arrival is one of them. What it has besides done is set before done is closed.
type arrival struct {
	done  chan struct{}
	file  *os.File // nil after done: it did not come
	size  int64
	tries int   // that failed; the arrivals' lock guards it
	err   error // why the last of them did
}

func newArrivals(files *memFiles) *arrivals {
	return &arrivals{files: files, packs: map[string]*arrival{}}
}

func (a *arrivals) of(name string) *arrival {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.ofLocked(name)
}

func (a *arrivals) ofLocked(name string) *arrival {
	p := a.packs[name]
	if p == nil {
		p = &arrival{done: make(chan struct{})}
		if a.closed {
			close(p.done)
			return p
		}
		a.packs[name] = p
	}
	return p
}

// accept takes a pack from its stream. The end of this end's half tells the sender that the pack is here, a reset that it is not.
func (a *arrivals) accept(s Stream) error {
	err := a.take(s)
	if err != nil {
		_ = s.Reset()
	}
	return err
}

// take reads a pack from its stream.
func (a *arrivals) take(s io.Reader) error {
	f, err := readFrame(s)
	if err != nil {
		return err
	}
	if f.T != tPack || f.Name == "" || f.Size < 0 {
		return errFrame("a stream of a pack begins with %q", f.T)
	}
	if a.isDropped(f.Name) {
		_, err := io.CopyN(io.Discard, s, f.Size)
		return err
	}
	file, err := a.files.get("pack", f.Size)
	if err == nil {
		err = receive(s, file, f.Size)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if slices.Contains(a.dropped, f.Name) { // in the meantime
		closeFiles([]*os.File{file})
		return err
	}
	p := a.ofLocked(f.Name)
	select {
	case <-p.done: // twice, or too late
		closeFiles([]*os.File{file})
		return err
	default:
	}
	if err != nil {
		closeFiles([]*os.File{file})
		p.err = fmt.Errorf("take in the pack %s of %d bytes: %w", f.Name, f.Size, err)
		if p.tries++; p.tries < packTries {
			return err // its sender tries again
		}
		// Who waits is told: nobody else knows what it was to be.
	} else {
		p.file, p.size = file, f.Size
	}
	close(p.done)
	return err
}

// isDropped tells whether a pack has come and gone.
func (a *arrivals) isDropped(name string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Contains(a.dropped, name)
}

// wait waits until a pack is there, and gives its size. It stays the arrivals'.
func (p *arrival) wait(ctx context.Context, name string) (int64, error) {
	select {
	case <-p.done:
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	}
	switch {
	case p.file != nil:
		return p.size, nil
	case p.err != nil:
		return 0, p.err
	}
	return 0, errFrame("the pack %s did not come", name)
}

// drop gives up a pack, and hands out its file if it has come.
func (a *arrivals) drop(name string) *os.File {
	a.mu.Lock()
	defer a.mu.Unlock()
	p := a.packs[name]
	delete(a.packs, name)
	if p == nil {
		return nil
	}
	if len(a.dropped) == maxDropped {
		a.dropped = slices.Delete(a.dropped, 0, 1)
	}
	a.dropped = append(a.dropped, name)
	select {
	case <-p.done:
		return p.file
	default:
		close(p.done)
		return nil
	}
}

// close gives up all. Who waits is told.
func (a *arrivals) close() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.closed = true
	for name, p := range a.packs {
		select {
		case <-p.done:
			closeFiles([]*os.File{p.file})
		default:
			close(p.done)
		}
		delete(a.packs, name)
	}
}

// packTries is how often a pack is sent: a stream of it may fail where the link does not, be it that one of the ends has no room at this
// moment. The tries take about 3 s.
const packTries = 5

// laneFrom is from how many bytes on a pack goes by a lane: what the opening of one costs, about 2 ms of processor time, is saved with one MB.
const laneFrom = 4 << 20

// sendPack sends a pack over a stream of its own, as often as it takes up to packTries. passed is called when the link has all of it, if
// that is before it is there: the next may go. When it returns nil, the other end has all of it.
func sendPack(ctx context.Context, link Opener, name string, file *os.File, size int64, passed func()) error {
	bo := backoff.NewExponentialBackOff()
	bo.InitialInterval, bo.Multiplier = 200*time.Millisecond, 2
	lane := link.Lane
	if size < laneFrom {
		lane = nil
	}
	_, err := backoff.Retry(ctx, func() (struct{}, error) {
		if l := lane; l != nil {
			lane = nil // what has failed there goes the way that outlives outages
			if s, err := l(ctx, PackTarget); err == nil {
				// It is not passed before it is there: a lane does not give it back.
				return struct{}{}, sendOnce(ctx, s, name, file, size, func() {})
			}
		}
		s, err := link.Open(ctx, PackTarget)
		if err != nil {
			return struct{}{}, err
		}
		return struct{}{}, sendOnce(ctx, s, name, file, size, passed)
	}, backoff.WithBackOff(bo), backoff.WithMaxTries(packTries), backoff.WithMaxElapsedTime(0))
	return err
}

func sendOnce(ctx context.Context, s Stream, name string, file *os.File, size int64, passed func()) error {
	defer s.Close()
	defer context.AfterFunc(ctx, func() { _ = s.Reset() })()
	b, err := appendHead(&frame{head: head{T: tPack, Name: name, Size: size}})
	if err != nil {
		return backoff.Permanent(err)
	}
	if _, err = s.Write(b); err == nil {
		err = send(s, file, size)
	}
	if err == nil {
		err = s.CloseWrite()
	}
	if err == nil {
		passed()
		err = awaitClose(s)
	}
	if err != nil {
		_ = s.Reset()
	}
	return err
}

// awaitClose waits for the end of the other end's half, which is its word that it has the pack.
func awaitClose(s io.Reader) error {
	var b [1]byte
	switch n, err := s.Read(b[:]); {
	case n > 0:
		return errFrame("an answer to a pack")
	case errors.Is(err, io.EOF):
		return nil
	default:
		return err
	}
}
