package storetest

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/store"
)

func submit(t tb, db DB, j job.Job, sites ...string) job.Job {
	t.Helper()
	j, err := db.CreateJob(t.Context(), j, sites)
	ok(t, err)
	return j
}

func testFind(t *testing.T, open Opener) {
	db := start(t, open)
	id := func(tail string) job.ID { return job.ID("01jq0000000000000000000000"[:26-len(tail)] + tail) }
	for i, tail := range []string{"a0", "ab", "ac0", "b1", "b2", "b3", "b4", "b5", "b6"} {
		submit(t, db, job.Job{ID: id(tail), Name: fmt.Sprint("n", i), Created: t0})
	}
	for _, c := range []struct {
		prefix string
		want   job.ID
		code   problem.Code
		says   string // comma-separated
	}{
		{string(id("a0")), id("a0"), "", ""},
		{strings.ToUpper(string(id("a0"))), id("a0"), "", ""},
		{string(id("ac0"))[:24], id("ac0"), "", ""},
		{string(id("b1"))[:25], "", problem.Usage, string(id("b6")) + " (n8)," + string(id("b2")) + ",…"},
		{string(id("a0"))[:25], "", problem.Usage, string(id("a0")) + "," + string(id("ab")) + " (n1)"},
		{"01jr", "", problem.NotFound, "01jr"},
		{"%", "", problem.NotFound, "%"},
		{"_", "", problem.NotFound, ""},
		{"'", "", problem.NotFound, ""},
		{string(id("a0")) + "0", "", problem.NotFound, ""},
		{"", "", problem.Usage, ""},
	} {
		got, err := db.FindJob(t.Context(), c.prefix)
		if c.code == "" {
			ok(t, err)
		} else {
			code(t, err, c.code)
		}
		if got != c.want {
			t.Errorf("%q finds %q, want %q", c.prefix, got, c.want)
		}
		for _, s := range strings.Split(c.says, ",") {
			if err != nil && !strings.Contains(err.Error(), s) {
				t.Errorf("%q: %v does not say %q", c.prefix, err, s)
			}
		}
	}
	if _, err := db.FindJob(t.Context(), string(id("b1"))[:25]); strings.Contains(err.Error(), string(id("b1"))) {
		t.Errorf("%v names more than five", err)
	}
}

func testFilters(t *testing.T, open Opener) {
	db := start(t, open)
	var ids []job.ID
	for i := range 12 {
		j := submit(t, db, job.Job{
			ID: job.NewID(t0.Add(time.Duration(i) * time.Hour)), Name: []string{"cat", "dog", "Dog"}[i%3], Submitter: []string{"ada", "bob"}[i%2],
			Bundle: []string{"sha256:1", "sha256:2"}[i/6],
		})
		ids = append(ids, j.ID)
	}
	ok(t, db.Move(t.Context(), ids[1], job.Queued, nil, "", t0))
	for _, c := range []struct {
		f    store.Filter
		want []int
	}{
		{store.Filter{Submitter: "ada"}, []int{0, 2, 4, 6, 8, 10}},
		{store.Filter{Submitter: "ADA"}, nil},
		{store.Filter{Submitter: "ada", Limit: 2, After: ids[2]}, []int{4, 6}},
		{store.Filter{Submitter: "ada", Newest: true, Limit: 2}, []int{10, 8}},
		{store.Filter{Name: "dog"}, []int{1, 4, 7, 10}},
		{store.Filter{Name: "dog", Submitter: "bob"}, []int{1, 7}},
		{store.Filter{Name: "dog", Submitter: "bob", States: []job.State{job.Queued, job.Running}}, []int{1}},
		{store.Filter{Bundle: "sha256:1", Name: "dog"}, []int{1, 4}},
		{store.Filter{Bundle: "sha256:2", States: []job.State{job.Submitted}, Limit: 3}, []int{6, 7, 8}},
		{store.Filter{Bundle: "sha256"}, nil},
		{store.Filter{States: []job.State{job.Running, job.Queued, job.Submitted}, Limit: 3, After: ids[0]}, []int{1, 2, 3}},
		{store.Filter{States: []job.State{job.Submitted, job.Queued}, Limit: 3, After: ids[3], Newest: true}, []int{2, 1, 0}},
		{store.Filter{States: []job.State{job.Submitted, job.Submitted}, Limit: 2}, []int{0, 2}},
		{store.Filter{Prefix: string(ids[3])}, []int{3}},
		{store.Filter{Prefix: strings.ToUpper(string(ids[3]))}, []int{3}},
		{store.Filter{Prefix: string(ids[3]), Name: "dog"}, nil},
		{store.Filter{Prefix: "0", Newest: true, After: ids[2]}, []int{1, 0}},
		{store.Filter{Prefix: "z"}, nil},
	} {
		js, err := db.Jobs(t.Context(), c.f)
		ok(t, err)
		var got []int
		for _, j := range js {
			got = append(got, slices.Index(ids, j.ID))
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%+v gives %v, want %v", c.f, got, c.want)
		}
	}
}

func testCount(t *testing.T, open Opener) {
	db := start(t, open)
	want := map[job.State]int{}
	for i, s := range append(job.States(), job.Running, job.Queued) {
		lead(t, db, submit(t, db, job.Job{ID: job.NewID(t0.Add(time.Duration(i)))}).ID, s)
		want[s]++
	}
	got, err := db.CountJobs(t.Context())
	ok(t, err)
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("CountJobs (-want +got):\n%s", d)
	}
}

func testDelete(t *testing.T, open Opener) {
	db := start(t, open)
	keep := create(t, db, "s1")
	_, _, err := db.Append(t.Context(), job.Event{Job: keep.ID, Kind: job.KindNote, At: t0}, 0)
	ok(t, err)
	for _, s := range job.States() {
		j := submit(t, db, job.Job{Key: string(s), Submitter: "ada", Created: t0}, "s1")
		lead(t, db, j.ID, s)
		last, _, err := db.Append(t.Context(), job.Event{Job: j.ID, Party: "s1", Kind: job.KindNote, At: t0}, 1)
		ok(t, err)
		_, err = db.Claim(t.Context(), j.ID, "me", t0.Add(time.Hour), t0)
		ok(t, err)
		wake, cancel := db.Subscribe(j.ID)
		err = db.DeleteJob(t.Context(), j.ID)
		cancel()
		if !s.Terminal() {
			code(t, err, problem.Usage)
			if get(t, db, j.ID).State != s {
				t.Errorf("a refused deletion changed the job")
			}
			continue
		}
		ok(t, err)
		if len(wake) == 0 {
			t.Error("the subscribers of a deleted job sleep")
		}
		_, err = db.Job(t.Context(), j.ID)
		code(t, err, problem.NotFound)
		_, err = db.Parties(t.Context(), j.ID)
		code(t, err, problem.NotFound)
		code(t, db.DeleteJob(t.Context(), j.ID), problem.NotFound)
		if es := events(t, db, j.ID); len(es) != 0 {
			t.Errorf("%d events of the deleted job are there", len(es))
		}
		if n, err := db.PartySeq(t.Context(), j.ID, "s1"); n != 0 || err != nil {
			t.Errorf("PartySeq of a deleted job: %d, %v", n, err)
		}
		next, _, err := db.Append(t.Context(), job.Event{Job: keep.ID, Kind: job.KindNote, At: t0}, 0)
		ok(t, err)
		if next <= last {
			t.Errorf("the number %d of an event is given after %d was", next, last)
		}
		if again := submit(t, db, job.Job{Key: string(s), Submitter: "ada", Created: t0}); again.ID == j.ID {
			t.Error("the key of a deleted job gives it")
		}
	}
	if es := events(t, db, keep.ID); len(es) < 2 {
		t.Errorf("another job has lost its events: %d are left", len(es))
	}
}

func testPartiesOf(t *testing.T, open Opener) {
	db := start(t, open)
	var ids []job.ID
	want := map[job.ID][]job.Party{}
	for i := range 7 {
		j := submit(t, db, job.Job{ID: job.NewID(t0.Add(time.Duration(i)))}, []string{"s2", "s1", "s10"}[:i%4]...)
		ok(t, db.MoveParty(t.Context(), j.ID, job.HubParty, job.PartyPreparing, nil, "", t0))
		ps, err := db.Parties(t.Context(), j.ID)
		ok(t, err)
		want[j.ID] = ps
		ids = append(ids, j.ID)
	}
	for n := range 600 { // more than one statement may name
		ids = append(ids, job.ID(fmt.Sprintf("01jq%022d", n)))
	}
	got, err := db.PartiesOf(t.Context(), ids)
	ok(t, err)
	if d := cmp.Diff(want, got, sameJob); d != "" {
		t.Errorf("PartiesOf (-want +got):\n%s", d)
	}
	if got, err := db.PartiesOf(t.Context(), nil); err != nil || len(got) != 0 {
		t.Errorf("PartiesOf nothing: %v, %v", got, err)
	}
}

func testDeleteBundle(t *testing.T, open Opener) {
	db := start(t, open)
	for _, s := range job.States() {
		d := "sha256:" + string(s)
		ok(t, db.PutBundle(t.Context(), d, 1, t0))
		lead(t, db, submit(t, db, job.Job{Bundle: d, Created: t0}).ID, s)
		err := db.DeleteBundle(t.Context(), d)
		if !s.Terminal() {
			code(t, err, problem.Usage)
			_, err = db.Bundle(t.Context(), d)
			ok(t, err)
			continue
		}
		ok(t, err)
		_, err = db.Bundle(t.Context(), d)
		code(t, err, problem.NotFound)
		ok(t, db.DeleteBundle(t.Context(), d))
	}
}

func testLease(t *testing.T, open Opener) {
	db := start(t, open)
	j, other := create(t, db), create(t, db)
	at := func(s int) time.Time { return t0.Add(time.Duration(s) * time.Second) }
	claim := func(id job.ID, owner string, until, now int, want bool) {
		t.Helper()
		got, err := db.Claim(t.Context(), id, owner, at(until), at(now))
		ok(t, err)
		if got != want {
			t.Errorf("at %d s: %s holds the lease: %v, want %v", now, owner, got, want)
		}
	}
	claim(j.ID, "a", 30, 0, true)
	claim(j.ID, "b", 60, 29, false)
	claim(other.ID, "b", 60, 29, true)
	claim(j.ID, "a", 60, 29, true) // renewed
	claim(j.ID, "b", 90, 31, false)
	claim(j.ID, "b", 90, 60, true) // over
	claim(j.ID, "a", 90, 61, false)
	ok(t, db.Release(t.Context(), j.ID, "a")) // not its own
	claim(j.ID, "a", 90, 61, false)
	wake, cancel := db.Subscribe(j.ID)
	defer cancel()
	ok(t, db.Release(t.Context(), j.ID, "b"))
	if len(wake) == 0 {
		t.Error("nobody hears of a lease that is given back")
	}
	claim(j.ID, "a", 90, 61, true)
	claim(j.ID, "a", 20, 10, true) // its clock was set back
	lead(t, db, j.ID, job.Failed)
	claim(j.ID, "a", 120, 62, true) // what is over may be looked at all the same
	_, err := db.Claim(t.Context(), job.NewID(t0), "a", at(1), at(0))
	code(t, err, problem.NotFound)
	ok(t, db.Release(t.Context(), job.NewID(t0), "a"))
	again := open()
	defer func() { ok(t, again.Close()) }()
	if held, err := again.Claim(t.Context(), j.ID, "b", at(200), at(100)); held || err != nil {
		t.Errorf("another process takes a lease that is held: %v, %v", held, err)
	}
}

func testLeaseRace(t *testing.T, open Opener) {
	a, b := start(t, open), start(t, open)
	j := create(t, a)
	const n = 8
	held := make([]bool, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			var err error
			if held[i], err = []DB{a, b}[i%2].Claim(t.Context(), j.ID, fmt.Sprint("hub", i), t0.Add(time.Minute), t0); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if got := count(held); got != 1 {
		t.Errorf("%d hold the lease", got)
	}
}

func count(bs []bool) (n int) {
	for _, b := range bs {
		if b {
			n++
		}
	}
	return n
}

func testIdentities(t *testing.T, open Opener) {
	db := start(t, open)
	_, err := db.Identity(t.Context(), "user", "ada")
	code(t, err, problem.NotFound)
	ada := store.Identity{Kind: "user", Name: "ada", Enrolled: t0}
	ok(t, db.PutIdentity(t.Context(), ada))
	ok(t, db.PutIdentity(t.Context(), store.Identity{Kind: "site", Name: "ada", Enrolled: t0.Add(1)}))
	ok(t, db.PutIdentity(t.Context(), store.Identity{Kind: "user", Name: "Zoe", Enrolled: t0}))
	ok(t, db.PutIdentity(t.Context(), store.Identity{Kind: "user", Name: "abe", Enrolled: t0}))
	same := func(kind, name string, want store.Identity) {
		t.Helper()
		got, err := db.Identity(t.Context(), kind, name)
		ok(t, err)
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%s %s (-want +got):\n%s", kind, name, d)
		}
	}
	same("user", "ada", ada)
	wake, cancel := db.Subscribe("")
	defer cancel()
	ok(t, db.RemoveIdentity(t.Context(), "user", "ada", t0.Add(2)))
	if len(wake) == 0 {
		t.Error("nobody hears of a removal")
	}
	ada.Removed = t0.Add(2)
	same("user", "ada", ada)
	ok(t, db.RemoveIdentity(t.Context(), "user", "ada", t0.Add(3)))
	same("user", "ada", ada)
	same("site", "ada", store.Identity{Kind: "site", Name: "ada", Enrolled: t0.Add(1)})
	ok(t, db.RemoveIdentity(t.Context(), "site", "of-hub-toml", t0))
	same("site", "of-hub-toml", store.Identity{Kind: "site", Name: "of-hub-toml", Removed: t0})
	users, err := db.Identities(t.Context(), "user")
	ok(t, err)
	var names []string
	for _, u := range users {
		names = append(names, u.Name)
	}
	if want := []string{"Zoe", "abe", "ada"}; !slices.Equal(names, want) {
		t.Errorf("users %q, want %q", names, want)
	}
	ok(t, db.PutIdentity(t.Context(), store.Identity{Kind: "user", Name: "ada", Enrolled: t0.Add(4)}))
	same("user", "ada", store.Identity{Kind: "user", Name: "ada", Enrolled: t0.Add(4)})
	// One of whom the store has heard stays as it is.
	ok(t, db.Introduce(t.Context(), store.Identity{Kind: "user", Name: "ada", Enrolled: t0.Add(9)}))
	same("user", "ada", store.Identity{Kind: "user", Name: "ada", Enrolled: t0.Add(4)})
	ok(t, db.Introduce(t.Context(), store.Identity{Kind: "user", Name: "new", Enrolled: t0.Add(9)}))
	same("user", "new", store.Identity{Kind: "user", Name: "new", Enrolled: t0.Add(9)})
	code(t, db.PutIdentity(t.Context(), store.Identity{Kind: "site", Name: "x", Info: json.RawMessage("{")}), problem.Internal)
}

func testSites(t *testing.T, open Opener) {
	db := start(t, open)
	is := func(name string, want store.Identity) {
		t.Helper()
		want.Kind, want.Name = "site", name
		got, err := db.Identity(t.Context(), "site", name)
		ok(t, err)
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("site %s (-want +got):\n%s", name, d)
		}
	}
	info := json.RawMessage(`{"resources":{"cpus":4},"hostname":"ä"}`)
	ok(t, db.SawSite(t.Context(), "a", info, "1.2.3", t0)) // one of the hub's configuration
	is("a", store.Identity{Info: info, Seen: t0, Version: "1.2.3"})
	ok(t, db.SetDrained(t.Context(), "a", true))
	ok(t, db.SetDrained(t.Context(), "b", true))
	ok(t, db.SawSite(t.Context(), "a", nil, "1.2.4", t0.Add(1)))
	is("a", store.Identity{Drained: true, Seen: t0.Add(1), Version: "1.2.4"})
	is("b", store.Identity{Drained: true})
	// Enrolled again because it had lost its key: it is still drained, …
	ok(t, db.PutIdentity(t.Context(), store.Identity{Kind: "site", Name: "a", Enrolled: t0.Add(2)}))
	is("a", store.Identity{Enrolled: t0.Add(2), Drained: true, Seen: t0.Add(1), Version: "1.2.4"})
	// … and not after it was removed. An agent that is not gone yet does not undo the removal.
	ok(t, db.RemoveIdentity(t.Context(), "site", "a", t0.Add(3)))
	ok(t, db.SawSite(t.Context(), "a", info, "1.2.4", t0.Add(4)))
	is("a", store.Identity{Enrolled: t0.Add(2), Removed: t0.Add(3), Drained: true, Info: info, Seen: t0.Add(4), Version: "1.2.4"})
	ok(t, db.PutIdentity(t.Context(), store.Identity{Kind: "site", Name: "a", Enrolled: t0.Add(5)}))
	is("a", store.Identity{Enrolled: t0.Add(5), Info: info, Seen: t0.Add(4), Version: "1.2.4"})
	ok(t, db.SetDrained(t.Context(), "b", false))
	is("b", store.Identity{})
	code(t, db.SawSite(t.Context(), "a", json.RawMessage("{"), "", t0), problem.Usage)
}

func testTokens(t *testing.T, open Opener) {
	db := start(t, open)
	tok := func(hash string) store.Token {
		return store.Token{Hash: hash, Kind: "site", Name: "a", Created: t0, Expires: t0.Add(time.Hour), By: "admin"}
	}
	for _, h := range []string{"aa", "bb", "cc"} {
		ok(t, db.PutToken(t.Context(), tok(h)))
	}
	code(t, db.PutToken(t.Context(), tok("aa")), problem.Exists)
	never := func(store.Token, time.Time) error {
		t.Error("something was signed for a token that is no good")
		return nil
	}
	use := func(hash string, now time.Time) (got store.Token, enrolled time.Time) {
		t.Helper()
		got, err := db.Enrol(t.Context(), hash, now, func(tok store.Token, at time.Time) error {
			if tok.Hash != hash || tok.Kind != "site" || tok.Name != "a" {
				t.Errorf("something is signed for %+v", tok)
			}
			enrolled = at
			return nil
		})
		ok(t, err)
		return got, enrolled
	}
	// What could not be signed has used up nothing.
	refused := problem.New(problem.Denied, "", "the request is for somebody else")
	_, err := db.Enrol(t.Context(), "aa", t0, func(store.Token, time.Time) error { return refused })
	if !errors.Is(err, refused) {
		t.Errorf("a refusal became %v", err)
	}
	_, err = db.Identity(t.Context(), "site", "a")
	code(t, err, problem.NotFound)
	now := t0.Add(time.Hour - 1)
	got, enrolled := use("aa", now)
	want := tok("aa")
	want.Used = now
	if d := cmp.Diff(want, got); d != "" || !enrolled.Equal(now) {
		t.Errorf("Enrol at %v (-want +got):\n%s", enrolled, d)
	}
	is := func(want store.Identity) {
		t.Helper()
		want.Kind, want.Name = "site", "a"
		got, err := db.Identity(t.Context(), "site", "a")
		ok(t, err)
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("site a (-want +got):\n%s", d)
		}
	}
	is(store.Identity{Enrolled: now})
	for hash, now := range map[string]time.Time{"aa": t0, "bb": t0.Add(time.Hour), "AA": t0, "dd": t0} {
		_, err := db.Enrol(t.Context(), hash, now, never)
		code(t, err, problem.Denied)
	}
	// Each enrolment is later than the one before and than the removal, also where the clock was set back.
	if _, again := use("bb", t0); !again.Equal(now.Add(1)) {
		t.Errorf("enrolled again by a clock that was set back: at %v, before at %v", again, now)
	}
	is(store.Identity{Enrolled: now.Add(1)})
	other := tok("ee")
	other.Kind = "user"
	ok(t, db.PutToken(t.Context(), other))
	ok(t, db.RemoveIdentity(t.Context(), "site", "a", now.Add(5)))
	// Tokens that were not used are gone with whom they are for.
	_, err = db.Enrol(t.Context(), "cc", t0, never)
	code(t, err, problem.Denied)
	ok(t, db.PutToken(t.Context(), tok("ff")))
	if _, again := use("ff", t0); !again.Equal(now.Add(6)) {
		t.Errorf("enrolled after a removal: at %v, removed at %v", again, now.Add(5))
	}
	is(store.Identity{Enrolled: now.Add(6)})
	ok(t, db.PutToken(t.Context(), tok("gg")))
	ok(t, db.RemoveToken(t.Context(), "gg"))
	code(t, db.RemoveToken(t.Context(), "gg"), problem.NotFound)
	_, err = db.Enrol(t.Context(), "gg", t0, never)
	code(t, err, problem.Denied)
	all, err := db.Tokens(t.Context())
	ok(t, err)
	var left []string
	for _, x := range all {
		left = append(left, x.Hash)
	}
	if want := []string{"aa", "bb", "ee", "ff"}; !slices.Equal(left, want) {
		t.Errorf("tokens %q, want %q", left, want)
	}
}

func testTokenRace(t *testing.T, open Opener) {
	a, b := start(t, open), start(t, open)
	ok(t, a.PutToken(t.Context(), store.Token{Hash: "aa", Expires: t0.Add(1)}))
	const n = 8
	used := make([]bool, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			_, err := []DB{a, b}[i%2].Enrol(t.Context(), "aa", t0, func(store.Token, time.Time) error { return nil })
			if used[i] = err == nil; !used[i] {
				code(t, err, problem.Denied)
			}
		})
	}
	wg.Wait()
	if got := count(used); got != 1 {
		t.Errorf("%d used the token", got)
	}
}

// A party begins anew in another attempt, and nothing that an earlier one says of itself counts after that.
func testAttempts(t *testing.T, open Opener) {
	ctx := t.Context()
	db := start(t, open)
	now := time.Now()
	j, err := db.CreateJob(ctx, job.Job{ID: job.NewID(now), Name: "x"}, []string{"a"})
	if err != nil {
		t.Fatal(err)
	}
	is := func(s job.PartyState, attempt int, caused bool) {
		t.Helper()
		ps, err := db.Parties(ctx, j.ID)
		if err != nil {
			t.Fatal(err)
		}
		if p := ps[1]; p.State != s || p.Attempt != attempt || (p.Cause != nil) != caused {
			t.Errorf("the party is %s in attempt %d, cause %v; want %s in %d", p.State, p.Attempt, p.Cause, s, attempt)
		}
	}
	refused := func(what string, err error) {
		t.Helper()
		if _, ok := errors.AsType[*store.MoveError](err); !ok {
			t.Errorf("%s: %v, want a refused move", what, err)
		}
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Error(err)
		}
	}
	refused("a new attempt of one that has not begun", db.Again(ctx, j.ID, "a", "", now))
	for _, s := range []job.State{job.Queued, job.Preparing} {
		must(db.Move(ctx, j.ID, s, nil, "", now))
	}
	must(db.MoveAttempt(ctx, j.ID, "a", 0, job.PartyPreparing, nil, "", now))
	must(db.MoveAttempt(ctx, j.ID, "a", 0, job.PartyFailed, nil, "", now))
	is(job.PartyFailed, 0, true)
	must(db.Again(ctx, j.ID, "a", "it is back", now))
	is(job.PartyAbsent, 1, false)
	must(db.MoveAttempt(ctx, j.ID, "a", 0, job.PartyDone, nil, "", now))
	is(job.PartyAbsent, 1, false)
	must(db.MoveAttempt(ctx, j.ID, "a", 1, job.PartyPreparing, nil, "", now))
	is(job.PartyPreparing, 1, false)
	es, err := db.Events(ctx, j.ID, 0, 0)
	must(err)
	var last job.PartyStateChange
	for _, e := range es {
		if c := (job.PartyStateChange{}); e.Kind == job.KindPartyState && e.Decode(&c) == nil && c.To == job.PartyAbsent {
			last = c
		}
	}
	if last.Attempt != 1 || last.From != job.PartyFailed || last.Reason != "it is back" {
		t.Errorf("the event says %+v", last)
	}
	if err := db.Again(ctx, j.ID, "nobody", "", now); problem.CodeOf(err) != problem.NotFound {
		t.Errorf("a new attempt of nobody: %v", err)
	}
	choice := job.EngineChoice{Engine: job.EngineFlower, Flwr: "1.30.0", Why: "the other does not work"}
	must(db.SetEngine(ctx, j.ID, choice, now))
	must(db.SetEngine(ctx, j.ID, choice, now)) // changes nothing
	if have, err := db.Job(ctx, j.ID); err != nil || have.Spec.Engine != choice.Engine || have.Spec.EngineWhy != choice.Why || !slices.Equal(have.Spec.Sites, j.Spec.Sites) {
		t.Errorf("the job is %+v, %v", have.Spec, err)
	}
	es, err = db.Events(ctx, j.ID, 0, 0)
	must(err)
	var told []job.EngineChoice
	for _, e := range es {
		if c := (job.EngineChoice{}); e.Kind == job.KindEngine && e.Decode(&c) == nil {
			told = append(told, c)
		}
	}
	if len(told) != 1 || told[0] != choice {
		t.Errorf("the events say %+v", told)
	}
	must(db.Move(ctx, j.ID, job.Stopping, nil, "", now))
	refused("a new attempt in a job that ends", db.Again(ctx, j.ID, "a", "", now))
}

// testTexts has what apps and people write: databases differ in what they take.
func testTexts(t *testing.T, open Opener) {
	db := start(t, open)
	for i, s := range []string{"a\x00b", "c\xffd", "\xc3", "a\u2028b", "👩‍🔬", "'; DROP TABLE job; --", "$1 ? %s \\", strings.Repeat("ä", 500)} {
		want := strings.ReplaceAll(strings.ToValidUTF8(s, "\ufffd"), "\x00", "\ufffd")
		j := submit(t, db, job.Job{ID: job.NewID(t0.Add(time.Duration(i))), Name: s, Key: s, Submitter: s, Bundle: s, Reason: s}, "s1")
		if again := submit(t, db, job.Job{Key: s, Submitter: s, Created: t0}); again.ID != j.ID {
			t.Errorf("%.20q: the same key gives another job", s)
		}
		ok(t, db.MoveParty(t.Context(), j.ID, "s1", job.PartyFailed, problem.New(problem.AppError, s, "%s", s), s, t0))
		_, _, err := db.Append(t.Context(), job.Event{Job: j.ID, Party: "s1", Kind: s, At: t0}, 1)
		ok(t, err)
		got := get(t, db, j.ID)
		if got.Name != want || got.Reason != want || got.Submitter != want {
			t.Errorf("%.20q is read back as %.20q, %.20q, %.20q", s, got.Name, got.Reason, got.Submitter)
		}
		ps, err := db.Parties(t.Context(), j.ID)
		ok(t, err)
		if ps[1].Reason != want || ps[1].Cause == nil {
			t.Errorf("%.20q is read back as %.20q", s, ps[1].Reason)
		}
		ok(t, db.SetReason(t.Context(), j.ID, strings.Repeat(s, 1000)))
		if js, err := db.Jobs(t.Context(), store.Filter{Name: s, Submitter: s}); err != nil || len(js) != 1 {
			t.Errorf("%.20q finds %d jobs, %v", s, len(js), err)
		}
		_, err = db.Job(t.Context(), job.ID(s))
		code(t, err, problem.NotFound)
	}
}

func testLongTexts(t *testing.T, open Opener) {
	db := start(t, open)
	long := strings.Repeat("x", 1001)
	for _, j := range []job.Job{{Key: long}, {Name: long}, {Submitter: long}, {Bundle: long}} {
		j.Created = t0
		_, err := db.CreateJob(t.Context(), j, nil)
		code(t, err, problem.Usage)
	}
}

// testManyWriters is what a cursor is good for: no number comes to light below one that was seen.
func testManyWriters(t *testing.T, open Opener) {
	a, b := start(t, open), start(t, open)
	j := create(t, a)
	const each = 60
	stop, done := make(chan struct{}), make(chan []int64)
	go func() { // a reader that goes on from what it has seen
		var seen []int64
		last := false
		for {
			after := int64(0)
			if len(seen) > 0 {
				after = seen[len(seen)-1]
			}
			es, err := b.Events(t.Context(), "", after, 0)
			if err != nil {
				t.Error(err)
			}
			for _, e := range es {
				seen = append(seen, e.Seq)
			}
			if len(es) > 0 {
				continue
			}
			if last || err != nil {
				done <- seen
				return
			}
			select {
			case <-stop:
				last = true
			default:
			}
		}
	}()
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for range each {
				if _, _, err := []DB{a, b}[w%2].Append(t.Context(), job.Event{Job: j.ID, Kind: job.KindNote, At: t0}, 0); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	close(stop)
	if seen := <-done; len(seen) != 4*each+1 {
		t.Errorf("the reader has seen %d events of %d", len(seen), 4*each+1)
	}
}

func testGather(t *testing.T, open Opener) {
	db := start(t, open)
	g := db.Gather()
	a, b := create(t, db, "s1"), create(t, db, "s1")
	wait := func(want ...job.ID) {
		t.Helper()
		got := map[job.ID]bool{} // a database may tell of what is past as well
		for slices.ContainsFunc(want, func(id job.ID) bool { return !got[id] }) {
			select {
			case <-g.Wake():
			case <-time.After(10 * time.Second):
				t.Fatalf("woken for %v only, want %q", got, want)
			}
			ids, all := g.Take()
			if all {
				t.Fatal("news of any job")
			}
			for i, id := range ids {
				got[id] = true
				if slices.Contains(ids[:i], id) {
					t.Errorf("%s comes twice", id)
				}
			}
		}
	}
	wait(a.ID, b.ID)
	if p, err := db.Party(t.Context(), a.ID, "s1"); err != nil || p.Name != "s1" || p.State != job.PartyAbsent {
		t.Errorf("%+v, %v", p, err)
	}
	if _, err := db.Party(t.Context(), a.ID, "s2"); problem.CodeOf(err) != problem.NotFound {
		t.Errorf("a party that it does not have: %v", err)
	}
	ok(t, db.MoveParty(t.Context(), a.ID, "s1", job.PartyPreparing, nil, "", t0))
	wait(a.ID)
	ok(t, db.MoveParty(t.Context(), a.ID, "s1", job.PartyPreparing, nil, "", t0)) // changes nothing
	ok(t, db.SetReason(t.Context(), b.ID, "it waits"))
	wait(b.ID)
	g.Put([]job.ID{a.ID}, false)
	g.Put(nil, true)
	if ids, all := g.Take(); !all || !slices.Contains(ids, a.ID) {
		t.Errorf("what was put back: %q, %v", ids, all)
	}
	g.Close()
	ok(t, db.SetReason(t.Context(), b.ID, "it still waits"))
	if ids, all := g.Take(); len(ids) > 0 || all {
		t.Errorf("after its end: %q, %v", ids, all)
	}
}
