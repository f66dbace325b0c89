package schedule

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pergolafl/pergola/internal/job"
)

var t0 = time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)

// site reads "a cpus=8 gpus=1 max=2 drained away silent".
func site(text string) *Site {
	words := strings.Fields(text)
	s := &Site{Name: words[0], Up: true, Known: true, Declared: job.Declared{Resources: job.Resources{}}}
	for _, w := range words[1:] {
		switch k, v, _ := strings.Cut(w, "="); k {
		case "drained":
			s.Drained = true
		case "away":
			s.Up = false
		case "removed":
			s.Removed = true
		case "silent":
			s.Known = false
		case "max":
			s.MaxJobs = number(v)
		default:
			s.Resources[k] = int64(number(v))
		}
	}
	return s
}

func number(s string) (n int) {
	if _, err := fmt.Sscan(s, &n); err != nil {
		panic(err)
	}
	return n
}

// request reads "a cpus=4".
func request(text string) Request {
	s := site(text)
	return Request{s.Name, s.Resources}
}

// queued reads "1 ann +5 a cpus=4 & b | need=1 must=a join=60 limit=600 since=-30": ID, submitter, priority, sites, the rest.
func queued(text string) *Job {
	head, tail, _ := strings.Cut(text, "|")
	words := strings.Fields(head)
	j := &Job{ID: job.ID(words[0]), Submitter: words[1], Since: t0, Shape: &Shape{}}
	rest := words[2:]
	if strings.HasPrefix(rest[0], "+") || strings.HasPrefix(rest[0], "-") {
		j.Priority = number(strings.TrimPrefix(rest[0], "+"))
		rest = rest[1:]
	}
	for _, r := range strings.Split(strings.Join(rest, " "), "&") {
		j.Sites = append(j.Sites, request(r))
	}
	j.Need = len(j.Sites)
	seconds := func(v string) time.Duration { return time.Duration(number(v)) * time.Second }
	for _, w := range strings.Fields(tail) {
		switch k, v, _ := strings.Cut(w, "="); k {
		case "need":
			j.Need = number(v)
		case "must":
			j.Mandatory = append(j.Mandatory, v)
		case "join":
			j.JoinWait = seconds(v)
		case "limit":
			j.Limit = seconds(v)
		case "since":
			j.Since = t0.Add(seconds(v))
		case "enough":
			j.Enough = t0.Add(seconds(v))
		}
	}
	return j
}

// running reads "9 bob a cpus=4 & b / c cpus=1": what it holds, and where it may join.
func running(text string) *Active {
	head, late, _ := strings.Cut(text, "/")
	j := queued(head)
	a := &Active{ID: j.ID, Submitter: j.Submitter, Priority: j.Priority, Started: t0.Add(-time.Hour), Holds: j.Sites}
	if strings.TrimSpace(late) != "" {
		for _, r := range strings.Split(late, "&") {
			a.Late = append(a.Late, request(r))
		}
	}
	return a
}

func input(sites, active, jobs []string) Input {
	in := Input{Now: t0, Sites: map[string]*Site{}, Patience: 10 * time.Minute}
	for _, s := range sites {
		x := site(s)
		in.Sites[x.Name] = x
	}
	for _, a := range active {
		in.Active = append(in.Active, running(a))
	}
	for _, q := range jobs {
		in.Queued = append(in.Queued, queued(q))
	}
	return in
}

// show writes a decision as "start 1@a,b 2@a; join 9@c; expired 4; 3: text; 5: text".
func show(d *Decision) string {
	var out []string
	put := func(what string, ps []Placement) {
		if len(ps) == 0 {
			return
		}
		for _, p := range ps {
			what += fmt.Sprintf(" %s@%s", p.ID, strings.Join(p.Sites, ","))
		}
		out = append(out, what)
	}
	put("start", d.Start)
	put("join", d.Join)
	for _, w := range d.Expired {
		out = append(out, fmt.Sprintf("expired %s", w.ID))
	}
	for _, w := range d.Cannot {
		out = append(out, fmt.Sprintf("cannot %s", w.ID))
	}
	for _, w := range d.Waits {
		out = append(out, fmt.Sprintf("%s: %s", w.ID, w.Text(len(d.Waits), func(id job.ID) string { return map[job.ID]string{"9": "bob"}[id] })))
	}
	if !d.Next.IsZero() {
		out = append(out, "next +"+d.Next.Sub(t0).String())
	}
	return strings.Join(out, "\n")
}

func TestDecide(t *testing.T) {
	type list = []string
	for _, c := range []struct {
		name                string
		sites, active, jobs list
		more                func(*Input)
		want                list
	}{
		{
			"what fits starts, in order",
			list{"a cpus=4", "b cpus=4"},
			nil,
			list{"1 ann a cpus=3", "2 ann a cpus=2", "3 ann b cpus=2", "4 ann a cpus=1"},
			nil,
			list{"start 1@a 3@b 4@a", "2: place 1 of 1: a has 1 of 4 cpus free, and 2 are asked for, in use by 1"},
		},
		{
			"two jobs that each need all of a site run one after the other",
			list{"a cpus=4"},
			nil,
			list{"1 ann a cpus=4", "2 ann a cpus=4"},
			nil,
			list{"start 1@a", "2: place 1 of 1: a has 0 of 4 cpus free, and 4 are asked for, in use by 1"},
		},
		{
			"a gang starts together or not at all",
			list{"a cpus=4", "b cpus=4"},
			list{"9 bob b cpus=1"},
			list{"1 ann a cpus=4 & b cpus=4"},
			nil,
			list{"1: place 1 of 1: b has 3 of 4 cpus free, and 4 are asked for, in use by 9 of bob"},
		},
		{
			"two gangs of the same sites do not hold half each",
			list{"a cpus=4", "b cpus=4"},
			nil,
			list{"1 ann a cpus=4 & b cpus=4", "2 bea b cpus=4 & a cpus=4"},
			nil,
			list{"start 1@a,b", "2: place 1 of 1: b has 0 of 4 cpus free, and 4 are asked for, in use by 1; a has 0 of 4 cpus free, and 4 are asked for, in use by 1"},
		},
		{
			"who asks for nothing needs nothing",
			list{"a", "b silent"},
			list{"9 bob a cpus=8"},
			list{"1 ann a & b"},
			nil,
			list{"start 1@a,b"},
		},
		{
			"each site says what it lacks",
			list{"a away", "b drained", "c silent", "d cpus=4 max=1", "e cpus=2"},
			list{"9 bob d"},
			list{"1 ann a & b & c gpus=1 & d cpus=1 & e cpus=3 & f | need=2"},
			nil,
			list{"1: place 1 of 1: waiting for a to connect; b is drained; f was removed; the agent of c does not say what it has; d has as many jobs as it takes (1): 9 of bob; e has 2 cpus, and 3 are asked for"},
		},
		{
			"many of a kind are counted",
			list{"a away", "b away", "c away", "d away", "e away", "f away", "g away"},
			nil,
			list{"1 ann a & b & c & d & e & f & g"},
			nil,
			list{"1: place 1 of 1: waiting for a, b, c, d, e and 2 more to connect"},
		},
		{
			"what can never be is said so",
			list{"a cpus=4 memory=1073741824", "b cpus=4"},
			nil,
			list{"1 ann a cpus=1 memory=8589934592", "2 ann a gpus=1 & b | need=1", "3 ann a gpus=1 & b | need=1 must=a"},
			nil,
			list{"start 2@b", "1: can never start: a has 1GiB memory, and 8GiB is asked for", "3: can never start: a has 0 gpus, and 1 is asked for"},
		},
		{
			"higher priorities come first, whoever is older",
			list{"a max=1"},
			nil,
			list{"1 ann a", "2 ann +5 a", "3 bob -5 a"},
			nil,
			list{"start 2@a", "1: place 1 of 2: a has as many jobs as it takes (1): 2", "3: place 2 of 2: a has as many jobs as it takes (1): 2"},
		},
		{
			"who has used less comes first",
			list{"a max=1"},
			nil,
			list{"1 ann a", "2 bea a", "3 cid a"},
			func(in *Input) { in.Lately = map[string]float64{"ann": 5, "bea": 3, "cid": 4} },
			list{"start 2@a", "3: place 1 of 2: a has as many jobs as it takes (1): 2", "1: place 2 of 2: a has as many jobs as it takes (1): 2"},
		},
		{
			"what runs counts",
			list{"a max=4"},
			list{"9 ann a", "8 ann a"},
			list{"1 ann a", "2 ann a", "3 bea a", "4 bea a"},
			nil,
			list{"start 3@a 4@a", "1: place 1 of 2: a has as many jobs as it takes (4): 9 of bob, 8, 3 and 1 more", "2: place 2 of 2: a has as many jobs as it takes (4): 9 of bob, 8, 3 and 1 more"},
		},
		{
			"one with many jobs does not keep the others waiting",
			list{"a max=2"},
			nil,
			list{"1 ann a", "2 ann a", "3 ann a", "4 bea a", "5 bea a"},
			nil,
			list{"start 1@a 4@a", "2: place 1 of 3: *", "5: place 2 of 3: *", "3: place 3 of 3: *"},
		},
		{
			"later jobs fill what one before them cannot use yet",
			list{"a cpus=4", "b cpus=4"},
			list{"9 bob b cpus=4"},
			list{"1 ann a cpus=4 & b cpus=4", "2 ann a cpus=1", "3 cid a cpus=3"},
			nil,
			list{"start 2@a 3@a", "1: place 1 of 1: b has 0 of 4 cpus free, and 4 are asked for, in use by 9 of bob"},
		},
		{
			"but not for ever",
			list{"a cpus=4", "b cpus=4", "c cpus=4"},
			list{"9 bob b cpus=4"},
			list{"1 ann a cpus=3 & b cpus=4 | since=-600", "2 ann a cpus=1", "3 cid a cpus=1", "4 cid c cpus=4"},
			nil,
			list{"start 2@a 4@c", "1: place 1 of 2: b has *", "3: place 2 of 2: a has 3 of 4 cpus free, but keeps them for jobs before this one: 1"},
		},
		{
			"lower priorities never fill what a higher one needs",
			list{"a cpus=4", "b cpus=4"},
			list{"9 bob b cpus=4"},
			list{"1 ann +1 a cpus=4 & b cpus=4", "2 ann a cpus=1", "3 cid +1 a cpus=1"},
			nil,
			list{"start 3@a", "1: *", "2: place 2 of 2: a has 3 of 4 cpus free, but keeps them for jobs before this one: 1"},
		},
		{
			"nothing is kept for a job whose site is away",
			list{"a cpus=4", "b away"},
			nil,
			list{"1 ann +1 a cpus=4 & b | since=-6000", "2 ann a cpus=4"},
			nil,
			list{"start 2@a", "1: place 1 of 1: waiting for b to connect"},
		},
		{
			"of jobs that ask for the same the first alone keeps",
			list{"a cpus=4", "b cpus=4"},
			list{"9 bob b cpus=4"},
			list{"1 ann +1 a cpus=2 & b cpus=4", "2 ann +1 a cpus=2 & b cpus=4", "3 ann a cpus=2"},
			func(in *Input) { in.Queued[1].Shape = in.Queued[0].Shape },
			list{"start 3@a", "1: *", "2: *"},
		},
		{
			"as many as it needs start, when the others have had their time",
			list{"a", "b", "c away"},
			nil,
			list{"1 ann a & b & c | need=2 join=60 enough=-60"},
			nil,
			list{"start 1@a,b"},
		},
		{
			"until then it waits for them, and keeps what it has",
			list{"a max=1", "b", "c away"},
			nil,
			list{"1 ann a & b & c | need=2 join=60 enough=-20", "2 bea a"},
			nil,
			list{"1: place 1 of 2: 2 of 3 sites could begin, and others are waited for until 05:06:47 UTC: waiting for c to connect", "2: place 2 of 2: a takes 1 jobs, and what is left is kept for jobs before this one: 1", "next +40s"},
		},
		{
			"the first look begins its time", list{"a", "b away"}, nil, list{"1 ann a & b | need=1 join=60"}, nil, list{"1: place 1 of 1: 1 of 2 sites could begin, and others are waited for until 05:07:07 UTC: *", "next +1m0s"},
		},
		{
			"without join-wait it waits until all are there", list{"a", "b away"}, nil, list{"1 ann a & b | need=1 enough=-6000"}, nil, list{"1: place 1 of 1: 1 of 2 sites could begin, and others are waited for: *"},
		},
		{
			"nobody waits for a site that is drained", list{"a", "b drained"}, nil, list{"1 ann a & b | need=1 join=60"}, nil, list{"start 1@a"},
		},
		{
			"a drained mandatory site is waited for", list{"a", "b drained"}, nil, list{"1 ann a & b | need=1 must=b"}, nil, list{"1: place 1 of 1: b is drained"},
		},
		{
			"too few sites are too few", list{"a", "b away", "c away"}, nil, list{"1 ann a & b & c | need=2 join=1 enough=-60"}, nil, list{"1: place 1 of 1: waiting for b, c to connect"},
		},
		{
			"the time in the queue has an end",
			list{"a away"},
			nil,
			list{"1 ann a | limit=60 since=-60", "2 ann a | limit=60 since=-59"},
			nil,
			list{"expired 1", "2: place 1 of 1: waiting for a to connect", "next +1s"},
		},
		{
			"at its end it starts with those that are there", list{"a", "b away"}, nil, list{"1 ann a & b | need=1 limit=60 since=-60"}, nil, list{"start 1@a"},
		},
		{
			"without its removed sites it can or cannot",
			list{"a", "b removed", "c away"},
			nil,
			list{"1 ann a & b", "2 ann a & b | need=1", "3 ann a & b | need=1 must=b", "4 ann b & c | need=1"},
			nil,
			list{"start 2@a", "cannot 1", "cannot 3", "4: place 1 of 1: waiting for c to connect; b was removed"},
		},
		{
			"the hub takes no more than it may",
			list{"a", "b"},
			list{"9 bob a"},
			list{"1 ann a", "2 ann b"},
			func(in *Input) { in.MaxJobs = 2 },
			list{"start 1@a", "2: place 1 of 1: the hub runs as many jobs as it may"},
		},
		{
			"a site that comes late joins, before anybody else",
			list{"a cpus=4", "b cpus=4"},
			list{"9 bob a cpus=1 / b cpus=4"},
			list{"1 ann b cpus=1"},
			nil,
			list{"join 9@b", "1: place 1 of 1: b has 0 of 4 cpus free, and 1 is asked for, in use by 9 of bob"},
		},
		{
			"one that is drained does not", list{"a cpus=4", "b cpus=4 drained"}, list{"9 bob a cpus=1 / b cpus=4"}, nil, nil, list{""},
		},
		{
			"a site that declares less than is used takes no more",
			list{"a cpus=2"},
			list{"9 bob a cpus=4"},
			list{"1 ann a cpus=1"},
			nil,
			list{"1: place 1 of 1: a has 0 of 2 cpus free, and 1 is asked for, in use by 9 of bob"},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			in := input(c.sites, c.active, c.jobs)
			if c.more != nil {
				c.more(&in)
			}
			got := strings.Split(show(Decide(in)), "\n")
			same := len(got) == len(c.want)
			for i := 0; same && i < len(got); i++ {
				head, tail, star := strings.Cut(c.want[i], "*")
				same = got[i] == c.want[i] || star && strings.HasPrefix(got[i], head) && strings.HasSuffix(got[i], tail)
			}
			if !same {
				t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(c.want, "\n"))
			}
		})
	}
}

// Two waits are the same to people if the same sites lack the same.
func TestWaitKey(t *testing.T) {
	of := func(active ...string) string {
		d := Decide(input([]string{"a cpus=4", "b"}, active, []string{"1 ann a cpus=4 & b"}))
		return d.Waits[0].Key()
	}
	if of("9 bob a cpus=1") != of("9 bob a cpus=2", "8 bob a cpus=1") {
		t.Error("other numbers are another reason")
	}
	if d := Decide(input([]string{"a cpus=4", "b away"}, []string{"9 bob a cpus=1"}, []string{"1 ann a cpus=4 & b"})); d.Waits[0].Key() == of("9 bob a cpus=1") {
		t.Error("another site is no other reason")
	}
}

// What was used counts half after each half-life, also over a long time.
func TestLedger(t *testing.T) {
	var l Ledger
	at := t0
	for range 2000 { // 1,000 days
		at = at.Add(HalfLife)
	}
	l.Add("old", 1, t0.Add(-time.Hour), t0)
	l.Add("ann", 0.5, at.Add(-time.Hour), at)
	l.Add("bea", 1, at.Add(-time.Hour), at)
	l.Add("cid", 1, at.Add(-HalfLife-time.Hour), at.Add(-HalfLife))
	l.Add("dan", 1, at, at.Add(-time.Hour)) // by a clock that was set back
	got := l.Lately(at)
	for who, want := range map[string]float64{"ann": 0.4858, "bea": 0.9717, "cid": 0.4858, "old": 0, "dan": 0} {
		if d := got[who] - want; d > 0.001 || d < -0.001 {
			t.Errorf("%s has used %.4f share-hours, want %.4f", who, got[who], want)
		}
	}
	if half := l.Lately(at.Add(HalfLife))["bea"]; half < 0.485 || half > 0.487 {
		t.Errorf("after the half-life it is %.4f", half)
	}
	if u := Used(1, at.Add(-time.Hour), at); u != got["bea"] && (u-got["bea"] > 1e-6 || got["bea"]-u > 1e-6) {
		t.Errorf("what runs counts %f, what has ended %f", u, got["bea"])
	}
	if Used(1, at, at.Add(-time.Hour)) != 0 || len(new(Ledger).Lately(at)) != 0 {
		t.Error("nothing counts something")
	}
}

// A decision does not change what it was given.
func TestDecideIsPure(t *testing.T) {
	in := input([]string{"a cpus=4", "b cpus=4"}, []string{"9 bob b cpus=4 / a cpus=1"}, []string{"1 ann a cpus=3 & b cpus=4 | since=-600", "2 ann a cpus=1", "3 cid -1 a cpus=1"})
	order := slices.Clone(in.Queued)
	first := show(Decide(in))
	if second := show(Decide(in)); first != second || !slices.Equal(order, in.Queued) {
		t.Errorf("twice the same gives\n%s\nand\n%s", first, second)
	}
}

// A queue of 10,000 is decided on without looking at each site of each job.
func BenchmarkDecide(b *testing.B) {
	in := Input{Now: t0, Sites: map[string]*Site{}, Patience: time.Minute}
	shape := &Shape{}
	for i := range 100 {
		s := site(fmt.Sprintf("s%d cpus=4", i))
		in.Sites[s.Name] = s
		shape.Sites = append(shape.Sites, Request{s.Name, job.Resources{job.CPUs: 4}})
	}
	shape.Need = 100
	for i := range 10000 {
		in.Queued = append(in.Queued, &Job{ID: job.ID(fmt.Sprintf("%06d", i)), Submitter: fmt.Sprint("u", i%20), Since: t0, Shape: shape})
	}
	for b.Loop() {
		if d := Decide(in); len(d.Start) != 1 || len(d.Waits) != 9999 {
			b.Fatal(len(d.Start), len(d.Waits))
		}
	}
}
