package native

import (
	"cmp"
	"maps"
	"slices"
	"time"
)

// Stat sums up numbers of one name.
type Stat struct {
	Mean, Min, Max float64
	Count          int

	sum float64
}

func (s *Stat) add(x float64) {
	if s.Count == 0 {
		s.Min, s.Max = x, x
	}
	s.Min, s.Max = min(s.Min, x), max(s.Max, x) // NaN where one is
	s.Count++
	s.sum += x
	s.Mean = s.sum / float64(s.Count)
}

// Batch is what the replies of one site to the messages of one type in one round had in them: with one client its exact numbers,
// with many what they come to.
type Batch struct {
	Site    string
	Round   int // 0 where nobody says
	Type    string
	Replies int
	Errors  int // replies that were errors, and messages that got none
	Values  map[string]Stat
	Sent    int64         // bytes of the messages, packs counted with each
	Got     int64         // bytes of the replies
	Seconds Stat          // from a message's coming to its reply
	Worked  time.Duration // of the workers, together
}

// batches collects replies until their phase is over. The hub's lock guards it.
type batches struct {
	tell func(Batch)
	open map[batchKey]*Batch
}

type batchKey struct {
	site  string
	round int
	typ   string
}

func newBatches(tell func(Batch)) batches {
	return batches{tell: tell, open: map[batchKey]*Batch{}}
}

// add takes a reply in.
func (b *batches) add(p *pending, h head, got int64) {
	if b.tell == nil {
		return
	}
	typ := p.typ
	if typ == "" {
		typ = h.Type
	}
	round := h.Round
	if round == 0 {
		round = p.round
	}
	key := batchKey{p.to.site, round, typ}
	x := b.open[key]
	if x == nil {
		for _, k := range b.keys() { // the site has begun another round
			if k.site == key.site && k.typ == key.typ {
				b.close(k)
			}
		}
		x = &Batch{Site: key.site, Round: key.round, Type: typ, Values: map[string]Stat{}}
		b.open[key] = x
	}
	x.Replies++
	if h.Err != nil {
		x.Errors++
	}
	for name, v := range h.Numbers {
		s := x.Values[name]
		s.add(v)
		x.Values[name] = s
	}
	x.Sent += p.bytes
	x.Got += got
	x.Seconds.add(time.Since(p.at).Seconds())
	x.Worked += seconds(h.Seconds)
}

// flush tells of the batches that are over: all but those of the type that goes on.
func (b *batches) flush(goesOn string) {
	for _, k := range b.keys() {
		if goesOn == "" || k.typ != goesOn {
			b.close(k)
		}
	}
}

func (b *batches) close(k batchKey) {
	b.tell(*b.open[k])
	delete(b.open, k)
}

func (b *batches) keys() []batchKey {
	return slices.SortedFunc(maps.Keys(b.open), func(x, y batchKey) int {
		return cmp.Or(cmp.Compare(x.round, y.round), cmp.Compare(x.site, y.site), cmp.Compare(x.typ, y.typ))
	})
}
