package localrun

import (
	"bytes"
	"fmt"
	"time"

	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/metrics"
)

// programMetrics is the program of lines that are made of what an app's code logs.
const programMetrics = "metrics"

// metricsEvery is how often a party's metrics are shown at most: all of them are in the results.
const metricsEvery = 250 * time.Millisecond

// liveMetrics makes lines for people of some of the metrics that come in.
type liveMetrics struct {
	rest map[string][]byte    // by party: the beginning of a record whose end is to come
	next map[string]time.Time // by party: when one may be shown again
}

// show takes a piece of a metrics file, and gives lines to line.
func (l *liveMetrics) show(ch *pb.LogChunk, line func(party, program, text string)) {
	if l.rest == nil {
		l.rest, l.next = map[string][]byte{}, map[string]time.Time{}
	}
	party := ch.GetParty()
	b := append(l.rest[party], ch.GetData()...)
	end := bytes.LastIndexByte(b, '\n') + 1
	if rest := b[end:]; len(rest) <= maxLine {
		l.rest[party] = bytes.Clone(rest)
	} else {
		l.rest[party] = nil // no record; what follows it up to the end of the line is none either
	}
	var last metrics.Record
	found := false
	// Neither a broken line nor the file's reader has an error that matters to who looks on.
	_, _ = metrics.Read(bytes.NewReader(b[:end]), func(r metrics.Record) error {
		if r.Kind == metrics.Metric {
			last, found = r, true
		}
		return nil
	})
	if now := time.Now(); found && !now.Before(l.next[party]) {
		l.next[party] = now.Add(metricsEvery)
		text := fmt.Sprintf("%s=%.6g step %d", last.Name, last.Value, last.Step)
		if last.Run != "" {
			text += " (" + last.Run + ")"
		}
		line(party, programMetrics, text)
	}
}
