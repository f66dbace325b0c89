package link

// ring is a queue of bytes whose memory grows with its content and is given back on request. Its owner bounds it.
type ring struct {
	buf   []byte
	start int // of the first byte
	n     int
}

// minRing is the least memory of a ring that holds anything, in bytes.
const minRing = 4 << 10

// write appends p.
func (r *ring) write(p []byte) {
	if len(p) > len(r.buf)-r.n {
		size := max(2*len(r.buf), minRing)
		for size < r.n+len(p) {
			size *= 2
		}
		buf := make([]byte, size)
		r.peek(buf[:r.n], 0)
		r.buf, r.start = buf, 0
	}
	at := r.start + r.n
	if at >= len(r.buf) {
		at -= len(r.buf)
	}
	copy(r.buf, p[copy(r.buf[at:], p):])
	r.n += len(p)
}

// peek fills b with what stands at offset from, which must be there.
func (r *ring) peek(b []byte, from int) {
	if len(b) == 0 {
		return
	}
	at := r.start + from
	if at >= len(r.buf) {
		at -= len(r.buf)
	}
	copy(b[copy(b, r.buf[at:]):], r.buf)
}

// read moves up to len(b) bytes into b.
func (r *ring) read(b []byte) int {
	n := min(len(b), r.n)
	r.peek(b[:n], 0)
	r.discard(n)
	return n
}

// discard drops the first n bytes, which must be there.
func (r *ring) discard(n int) {
	r.n -= n
	if r.n == 0 {
		r.start = 0
		return
	}
	if r.start += n; r.start >= len(r.buf) {
		r.start -= len(r.buf)
	}
}

// release gives back the memory of a ring that has been emptied.
func (r *ring) release() {
	if r.n == 0 {
		r.buf = nil
	}
}
