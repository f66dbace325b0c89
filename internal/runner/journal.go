package runner

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/pergolafl/pergola/internal/job"
)

// Entry is one line of a journal. Seq counts from 1 without gaps.
type Entry struct {
	Seq   int64     `json:"seq"`
	Event job.Event `json:"event"`
}

// Final tells whether the runner says with this entry that its party is over; and how.
func (e Entry) Final() (job.PartyStateChange, bool) {
	var c job.PartyStateChange
	if e.Event.Kind != job.KindPartyState || e.Event.Decode(&c) != nil {
		return c, false
	}
	return c, c.To.Terminal()
}

// ballastBytes is what a runner sets aside at its start, so that its last words fit on a full disk.
const ballastBytes = 64 << 10

// journal is what happened in a party: written to disk before anybody hears of it, kept in memory for those who watch.
// On a full disk the reserve is given up; if even that does not help, entries still reach who watches.
type journal struct {
	job   job.ID
	party string
	path  string

	mu      sync.Mutex // guards the rest
	file    *os.File
	entries []Entry
	wake    chan struct{} // closed and replaced at each append
	full    error
}

func openJournal(dir string, id job.ID, party string) (*journal, error) {
	if err := reserve(filepath.Join(dir, ballastFile)); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, journalFile), os.O_CREATE|os.O_WRONLY|os.O_APPEND|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	return &journal{job: id, party: party, path: dir, file: f, wake: make(chan struct{})}, nil
}

func reserve(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	// Real zeros, since not every file system can set blocks aside.
	if _, err := f.Write(make([]byte, ballastBytes)); err != nil {
		return err
	}
	return f.Sync()
}

// add appends an event. Its error says that the disk did not take it; watchers got it all the same.
func (j *journal) add(kind string, body any) error {
	ev, err := job.NewEvent(j.job, j.party, kind, body, time.Now())
	if err != nil {
		return err
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	e := Entry{Seq: int64(len(j.entries)) + 1, Event: ev}
	line, err := json.Marshal(e)
	if err != nil {
		return err
	}
	err = j.writeLocked(append(line, '\n'))
	j.entries = append(j.entries, e)
	close(j.wake)
	j.wake = make(chan struct{})
	return err
}

func (j *journal) writeLocked(line []byte) error {
	if j.full != nil {
		return j.full
	}
	_, err := j.file.Write(line)
	if errors.Is(err, syscall.ENOSPC) {
		if os.Remove(filepath.Join(j.path, ballastFile)) == nil {
			// The broken piece of the first try ends its own line; readers skip what is not JSON.
			_, err = j.file.Write(append([]byte{'\n'}, line...))
		}
	}
	if err == nil {
		err = j.file.Sync()
	}
	if err != nil {
		j.full = err
	}
	return err
}

// next gives the entries after seq, and a channel that is closed when there are more.
func (j *journal) next(seq int64) ([]Entry, <-chan struct{}) {
	j.mu.Lock()
	defer j.mu.Unlock()
	seq = max(0, min(seq, int64(len(j.entries))))
	return j.entries[seq:], j.wake
}

// watch calls fn for each entry after seq until the final one was given.
func (j *journal) watch(ctx context.Context, seq int64, fn func(Entry) error) error {
	for {
		es, more := j.next(seq)
		for _, e := range es {
			if err := fn(e); err != nil {
				return err
			}
			seq = e.Seq
			if _, final := e.Final(); final {
				return nil
			}
		}
		if len(es) > 0 {
			continue
		}
		select {
		case <-more:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// readJournal gives what a runner that is gone has left. A torn last line, of a runner that was killed, is no error.
func readJournal(dir string) ([]Entry, error) {
	f, err := os.Open(filepath.Join(dir, journalFile))
	if os.IsNotExist(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return parseJournal(f)
}

// ParseEntry reads one line of a journal.
func ParseEntry(line []byte) (Entry, error) {
	var e Entry
	err := json.Unmarshal(line, &e)
	return e, err
}

func parseJournal(r io.Reader) ([]Entry, error) {
	var out []Entry
	br := bufio.NewReader(r)
	for {
		line, err := br.ReadBytes('\n')
		if err == nil && len(bytes.TrimSpace(line)) > 0 {
			var e Entry
			if json.Unmarshal(line, &e) == nil && e.Seq == int64(len(out))+1 {
				out = append(out, e)
			}
		}
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return out, err
		}
	}
}
