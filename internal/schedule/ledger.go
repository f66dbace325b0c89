package schedule

import (
	"math"
	"time"
)

// HalfLife is after which time what somebody has used counts half.
const HalfLife = 12 * time.Hour

// Ledger sums up what submitters have used: shares of sites (see Share) times hours, of which older ones count less. The zero value
// is empty.
type Ledger struct {
	epoch time.Time
	sums  map[string]float64 // as seen from epoch
}

// grown is how much more than one at the epoch a share-hour at t counts.
func (l *Ledger) grown(t time.Time) float64 {
	return math.Exp2(t.Sub(l.epoch).Hours() / HalfLife.Hours())
}

// scale makes share-hours of differences of grown: the integral of 2^(t/H) is its growth times H/ln 2.
const scale = float64(HalfLife) / float64(time.Hour) / math.Ln2

// Add notes that a submitter had a share from one time to another.
func (l *Ledger) Add(who string, share float64, from, to time.Time) {
	if l.sums == nil {
		l.sums, l.epoch = map[string]float64{}, to
	}
	if to.Sub(l.epoch) > 100*HalfLife { // before numbers become too large
		f := 1 / l.grown(to)
		for k := range l.sums {
			if l.sums[k] *= f; l.sums[k] < 1e-9 {
				delete(l.sums, k)
			}
		}
		l.epoch = to
	}
	if share > 0 && to.After(from) {
		l.sums[who] += share * scale * (l.grown(to) - l.grown(from))
	}
}

// Lately gives what submitters have used, as it counts at now: share-hours.
func (l *Ledger) Lately(now time.Time) map[string]float64 {
	out := make(map[string]float64, len(l.sums))
	for who, n := range l.sums {
		out[who] = n / l.grown(now)
	}
	return out
}

// Used gives what a share from one time to now counts at now.
func Used(share float64, from, now time.Time) float64 {
	if !now.After(from) {
		return 0
	}
	return share * scale * (1 - math.Exp2(-now.Sub(from).Hours()/HalfLife.Hours()))
}
