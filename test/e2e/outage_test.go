package e2e

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/localrun"
)

// tinyRoundsOf are tinyRounds for any number of them.
func tinyRoundsOf(n int) (out []localrun.RoundMetrics) {
	for r := 1; r <= n; r++ {
		loss := float64(6 * r)
		out = append(out, localrun.RoundMetrics{Round: r, Phases: map[string]job.Values{
			"train": {"sum": loss - 6}, "evaluate": {"loss": loss, "accuracy": 1 / (1 + loss)},
		}})
	}
	return out
}

// The network between a site and the hub goes away in the middle of rounds, for longer and longer: no program notices more than
// a pause, and the numbers are those of an undisturbed run.
func TestOutages(t *testing.T) {
	t.Parallel()
	for _, v := range []string{oldest, "1.18.0", "1.30.0", newest} {
		for _, how := range []netState{cut, hole} {
			name := map[netState]string{cut: "cut", hole: "hole"}[how]
			if how == hole && v != newest {
				continue // what a site or hub notices late is the link's affair, the same for every version
			}
			t.Run(fmt.Sprintf("%s %s", v, name), func(t *testing.T) {
				t.Parallel()
				hub := freeAddress(t)
				n := forward(t, hub)
				r := start(t, spec{app: "tiny", args: []string{
					"--flwr", v, "--run-config", "num-server-rounds=4", "--listen", hub, "--site-dials", "site-1=" + n.addr(),
				}, idle: true})
				for i, d := range []time.Duration{time.Second, 20 * time.Second, 130 * time.Second} {
					r.round(i + 1)
					n.set(how)
					time.Sleep(d) // the outage is what is tested
					n.set(up)
				}
				res := r.end()
				r.succeeded(res, v, 4)
				sameRounds(t, res.Summary.Rounds, tinyRoundsOf(4))
				told := 0
				for _, w := range res.Summary.Warnings {
					if strings.Contains(w, "site-1") && strings.Contains(w, "re-sent") {
						told++
					}
				}
				if told < 2 {
					t.Errorf("of three outages, %d were told: %q", told, res.Summary.Warnings)
				}
			})
		}
	}
}

// Both sites have a bad line: 200 ms there and back, 10 Mbit/s, 2 % of packets lost.
func TestBadLine(t *testing.T) {
	t.Parallel()
	for _, v := range []string{oldest, "1.30.0", newest} {
		t.Run(v, func(t *testing.T) {
			t.Parallel()
			hub := freeAddress(t)
			args := []string{"--flwr", v, "--listen", hub}
			for i, site := range []string{"site-1", "site-2"} {
				n := forwardSlowly(t, hub, &slowness{delay: 100 * time.Millisecond, rate: 10e6 / 8, loss: 0.02, rand: rand.New(rand.NewPCG(1, uint64(i)))})
				args = append(args, "--site-dials", site+"="+n.addr())
			}
			r := start(t, spec{app: "tiny", args: args, idle: true})
			res := r.end()
			r.succeeded(res, v, 2)
			sameRounds(t, res.Summary.Rounds, tinyRounds)
		})
	}
}
