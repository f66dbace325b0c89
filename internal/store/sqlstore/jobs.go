package sqlstore

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/store"
)

const jobColumns = "id, name, key, submitter, bundle, state, reason, cause, spec, created, started, ended"

// maxIndexed is the longest text by which a job can be found, in bytes: Postgres takes 2,704 in an index, and one has two of them.
const maxIndexed = 1000

// CreateJob stores a new job in state submitted, with the hub and the sites as absent parties and its
// first event. A zero ID or Created is filled in. If the same submitter has used the same non-empty
// key before, that job is given back, as it is now, and nothing is stored.
func (db *DB) CreateJob(ctx context.Context, j job.Job, sites []string) (job.Job, error) {
	if j.Created.IsZero() {
		if j.Created = j.ID.Created(); j.Created.IsZero() {
			j.Created = time.Now()
		}
	}
	if j.ID == "" {
		j.ID = job.NewID(j.Created)
	}
	if _, err := job.ParseID(string(j.ID)); err != nil {
		return job.Job{}, err
	}
	for _, s := range sites {
		if err := job.CheckName("site", s); err != nil {
			return job.Job{}, err
		}
	}
	for _, f := range []struct{ what, text string }{{"key", j.Key}, {"name", j.Name}, {"submitter", j.Submitter}, {"bundle", j.Bundle}} {
		if len(f.text) > maxIndexed {
			return job.Job{}, problem.New(problem.Usage, "shorten it", "the %s of the job has %d bytes; %d are the most", f.what, len(f.text), maxIndexed)
		}
	}
	spec, err := json.Marshal(j.Spec)
	if err != nil {
		return job.Job{}, fmt.Errorf("store job %s: %w", j.ID, err)
	}
	j.State, j.Cause, j.Started, j.Ended = job.Submitted, nil, time.Time{}, time.Time{}
	j.Created = stamp(nanos(j.Created))
	err = db.write(ctx, "store the job", func(ctx context.Context, tx *txn) ([]job.ID, error) {
		if j.Key != "" {
			old, err := scanJob(tx.QueryRowContext(ctx, "SELECT "+jobColumns+" FROM job WHERE submitter = ? AND key = ?", j.Submitter, j.Key))
			if err == nil {
				j = old
				return nil, nil
			}
			if !errors.Is(err, sql.ErrNoRows) {
				return nil, err
			}
		}
		var taken bool
		if err := tx.QueryRowContext(ctx, "SELECT EXISTS (SELECT 1 FROM job WHERE id = ?)", j.ID).Scan(&taken); err != nil {
			return nil, err
		}
		if taken {
			return nil, problem.New(problem.Exists, "submit it with a new ID", "job %s exists already", j.ID)
		}
		if _, err := tx.ExecContext(ctx, "INSERT INTO job ("+jobColumns+", priority) VALUES (?, ?, ?, ?, ?, ?, ?, '', ?, ?, 0, 0, ?)",
			j.ID, j.Name, j.Key, j.Submitter, j.Bundle, j.State, j.Reason, string(spec), nanos(j.Created), j.Spec.Priority); err != nil {
			return nil, err
		}
		if err := insertParties(ctx, tx, j.ID, 0, append([]string{job.HubParty}, sites...), j.Created); err != nil {
			return nil, err
		}
		return []job.ID{j.ID}, insertEvent(ctx, tx, j.ID, "", job.KindJobState, job.JobState{To: j.State, Reason: j.Reason}, j.Created)
	})
	if err != nil {
		return job.Job{}, err
	}
	return j, nil
}

// Job gives one job; a problem with code not-found if there is none.
func (db *DB) Job(ctx context.Context, id job.ID) (job.Job, error) {
	j, err := one(ctx, db, "read a job", scanJob, "SELECT "+jobColumns+" FROM job WHERE id = ?", id)
	if errors.Is(err, sql.ErrNoRows) {
		return job.Job{}, noJob(id)
	}
	return j, err
}

// Jobs gives a page of jobs. There is an index for each thing that is asked for, so that a page costs the same in a table of any size.
func (db *DB) Jobs(ctx context.Context, f store.Filter) ([]job.Job, error) {
	where, args := "1 = 1", []any{}
	for _, w := range []struct{ column, value string }{{"submitter", f.Submitter}, {"name", f.Name}, {"bundle", f.Bundle}} {
		if w.value != "" {
			where += " AND " + w.column + " = ?"
			args = append(args, w.value)
		}
	}
	if !f.Ended.IsZero() {
		where += " AND ended > ?"
		args = append(args, nanos(f.Ended))
	}
	if f.Prefix != "" {
		p := strings.ToLower(f.Prefix)
		where += " AND id >= ? AND id < ?"
		args = append(args, p, p+afterAll)
	}
	order, beyond := " ORDER BY id", " AND id > ?"
	if f.Newest {
		order, beyond = " ORDER BY id DESC", " AND id < ?"
	}
	if f.After != "" {
		where += beyond
		args = append(args, f.After)
	}
	n := limit(f.Limit)
	q, all := "SELECT "+jobColumns+" FROM job WHERE "+where, args
	if len(f.States) > 0 {
		// A page of each state, in the order of its index, and the first of all these: else all jobs of the states would be sorted.
		var pages []string
		all = nil
		for i, s := range f.States {
			pages = append(pages, fmt.Sprintf("SELECT id FROM (SELECT id FROM job WHERE state = ? AND %s%s LIMIT ?) AS s%d", where, order, i))
			all = append(append(append(all, s), args...), n)
		}
		q = "SELECT " + jobColumns + " FROM job WHERE id IN (" + strings.Join(pages, " UNION ALL ") + ")"
	}
	rows, err := db.query(ctx, q+order+" LIMIT ?", append(all, n)...)
	return collect(db, rows, err, "list jobs", scanJob)
}

// afterAll sorts behind each character of an ID.
const afterAll = "~"

// FindJob gives the job whose ID is prefix or alone begins with it, in lower or upper case. If there are several, the
// problem has the code usage and names up to five of them, newest first; if there is none, not-found.
func (db *DB) FindJob(ctx context.Context, prefix string) (job.ID, error) {
	if prefix == "" {
		return "", problem.New(problem.Usage, "see the jobs with: pergola jobs", "no job was named")
	}
	const most = 5
	js, err := db.Jobs(ctx, store.Filter{Prefix: prefix, Limit: most + 1, Newest: true})
	switch {
	case err != nil:
		return "", err
	case len(js) == 0:
		return "", noJob(job.ID(prefix))
	case len(js) == 1:
		return js[0].ID, nil
	}
	var names []string
	for _, j := range js[:min(len(js), most)] {
		names = append(names, fmt.Sprintf("%s (%s)", j.ID, j.Name))
	}
	if len(js) > most {
		names = append(names, "…")
	}
	return "", problem.New(problem.Usage, "write more of the ID", "several jobs begin with %s: %s", prefix, strings.Join(names, ", "))
}

// CountJobs counts the jobs in each state; states that no job is in are missing.
func (db *DB) CountJobs(ctx context.Context) (map[job.State]int, error) {
	type count struct {
		state job.State
		n     int
	}
	rows, err := db.query(ctx, "SELECT state, count(*) FROM job GROUP BY state")
	cs, err := collect(db, rows, err, "count the jobs", func(r row) (c count, err error) {
		err = r.Scan(&c.state, &c.n)
		return c, err
	})
	out := map[job.State]int{}
	for _, c := range cs {
		out[c.state] = c.n
	}
	return out, err
}

// deleteAtOnce is how many events one transaction deletes: a job may have millions, and others want to write too.
const deleteAtOnce = 5000

// DeleteJob forgets a job that is over, with its parties and events. One that is not over is refused with code usage. When it
// is cut short, the job is still there, without some of its events.
func (db *DB) DeleteJob(ctx context.Context, id job.ID) error {
	for more := true; more; {
		if err := db.change(ctx, "delete a job", id, func(ctx context.Context, tx *txn, j job.Job) (bool, error) {
			if !j.State.Terminal() {
				return false, problem.New(problem.Usage, "end it first with: pergola abort "+string(id), "job %s is not over: it is %s", id, j.State)
			}
			res, err := tx.ExecContext(ctx, "DELETE FROM event WHERE seq IN (SELECT seq FROM event WHERE job = ? ORDER BY seq LIMIT ?)", id, deleteAtOnce)
			if err != nil {
				return false, err
			}
			n, err := res.RowsAffected()
			if more = n == deleteAtOnce; more || err != nil {
				return false, err
			}
			_, err = tx.ExecContext(ctx, "DELETE FROM job WHERE id = ?", id)
			return true, err
		}); err != nil {
			return err
		}
	}
	return nil
}

// PartiesOf gives the parties of many jobs, each as Parties does. Jobs that do not exist are missing.
func (db *DB) PartiesOf(ctx context.Context, ids []job.ID) (map[job.ID][]job.Party, error) {
	out := make(map[job.ID][]job.Party, len(ids))
	for chunk := range slices.Chunk(ids, 500) { // databases bound the number of arguments
		args := make([]any, len(chunk))
		for i, id := range chunk {
			args[i] = id
		}
		rows, err := db.query(ctx, "SELECT "+partyColumns+" FROM party WHERE job IN (?"+strings.Repeat(", ?", len(chunk)-1)+") ORDER BY job, pos", args...)
		ps, err := collect(db, rows, err, "list the parties", scanParty)
		if err != nil {
			return nil, err
		}
		for _, p := range ps {
			out[p.Job] = append(out[p.Job], p)
		}
	}
	return out, nil
}

// Parties gives the parties of a job: the hub, then the sites in the order of their partitions.
func (db *DB) Parties(ctx context.Context, id job.ID) ([]job.Party, error) {
	rows, err := db.query(ctx, "SELECT "+partyColumns+" FROM party WHERE job = ? ORDER BY pos", id)
	ps, err := collect(db, rows, err, "list the parties", scanParty)
	if err == nil && len(ps) == 0 { // each job has the hub at least
		return nil, noJob(id)
	}
	return ps, err
}

// Party gives one party of a job; not-found if it has none of that name.
func (db *DB) Party(ctx context.Context, id job.ID, party string) (job.Party, error) {
	p, err := one(ctx, db, "read a party", scanParty, "SELECT "+partyColumns+" FROM party WHERE job = ? AND name = ?", id, party)
	if errors.Is(err, sql.ErrNoRows) {
		return p, noParty(id, party)
	}
	return p, err
}

func noParty(id job.ID, party string) error {
	return problem.New(problem.NotFound, "see its parties with: pergola show "+string(id), "job %s has no party %q", id, party)
}

// AddParty adds a site, absent, behind those that the job has. One that it has already stays as it is.
func (db *DB) AddParty(ctx context.Context, id job.ID, site string) error {
	if err := job.CheckName("site", site); err != nil {
		return err
	}
	return db.change(ctx, "add a party", id, func(ctx context.Context, tx *txn, j job.Job) (bool, error) {
		var n, pos int
		if err := tx.QueryRowContext(ctx, "SELECT count(*) FILTER (WHERE name = ?), coalesce(max(pos), -1) + 1 FROM party WHERE job = ?", site, id).Scan(&n, &pos); err != nil || n > 0 {
			return false, err
		}
		if j.State.Terminal() {
			return false, problem.New(problem.Usage, "submit it again", "job %s is over and takes no further site", id)
		}
		return true, insertParties(ctx, tx, id, pos, []string{site}, time.Now())
	})
}

// Move takes a job to another state and writes the event of it, in one transaction. Cause and reason
// are those of the new state; a cause that the job has is never replaced. A job that ends otherwise
// than well without any cause gets one that says so: none ends without. A job with a cause cannot
// succeed. Moving to the state in which it is does nothing and returns nil; a move that is not in
// the table is a *store.MoveError within a problem.
func (db *DB) Move(ctx context.Context, id job.ID, to job.State, cause *job.Cause, reason string, now time.Time) error {
	return db.change(ctx, "store a job's move", id, func(ctx context.Context, tx *txn, j job.Job) (bool, error) {
		return move(ctx, tx, j, to, cause, reason, now)
	})
}

func move(ctx context.Context, tx *txn, j job.Job, to job.State, cause *job.Cause, reason string, now time.Time) (changed bool, err error) {
	if j.State == to {
		return false, nil
	}
	if j.Cause != nil {
		cause = j.Cause
	}
	if !j.State.Can(to) || to == job.Succeeded && cause != nil {
		return false, (&store.MoveError{Job: j.ID, From: string(j.State), To: string(to)}).Problem()
	}
	if cause == nil && to.Terminal() && to != job.Succeeded {
		cause = untold(to)
	}
	raw, err := causeText(cause)
	if err != nil {
		return false, err
	}
	started, ended := nanos(j.Started), int64(0)
	if to == job.Preparing {
		started = nanos(now)
	}
	if to.Terminal() {
		ended = nanos(now)
	}
	if _, err := tx.ExecContext(ctx, "UPDATE job SET state = ?, reason = ?, cause = ?, started = ?, ended = ? WHERE id = ?",
		to, reason, raw, started, ended, j.ID); err != nil {
		return false, err
	}
	return true, insertEvent(ctx, tx, j.ID, "", job.KindJobState, job.JobState{From: j.State, To: to, Cause: cause, Reason: reason}, now)
}

func untold(to job.State) *job.Cause {
	switch to {
	case job.Aborted:
		return problem.New(problem.AbortedByUser, "", "the job was aborted; nothing was recorded about by whom")
	case job.Rejected:
		return problem.New(problem.PolicyDenied, "ask the hub's operator", "the job was rejected; nothing was recorded about why")
	}
	return problem.New(problem.Internal, "please report this with the job's events", "the job failed, and nothing was recorded about why")
}

// SetReason replaces the reason of the state in which the job is, so that one that waits says for
// what, now. It is no move and no event; subscribers are woken. A job that is over keeps its reason.
func (db *DB) SetReason(ctx context.Context, id job.ID, reason string) error {
	return db.change(ctx, "store a job's reason", id, func(ctx context.Context, tx *txn, j job.Job) (bool, error) {
		if j.Reason == reason || j.State.Terminal() {
			return false, nil
		}
		_, err := tx.ExecContext(ctx, "UPDATE job SET reason = ? WHERE id = ?", reason, id)
		return true, err
	})
}

// SetEngine changes how a job runs, and writes the event of it, in one transaction. A job that is over keeps its engine.
func (db *DB) SetEngine(ctx context.Context, id job.ID, c job.EngineChoice, now time.Time) error {
	return db.change(ctx, "store a job's engine", id, func(ctx context.Context, tx *txn, j job.Job) (bool, error) {
		if j.State.Terminal() || j.Spec.Engine == c.Engine {
			return false, nil
		}
		j.Spec.Engine, j.Spec.EngineWhy = c.Engine, c.Why
		spec, err := json.Marshal(j.Spec)
		if err != nil {
			return false, err
		}
		if _, err := tx.ExecContext(ctx, "UPDATE job SET spec = ? WHERE id = ?", string(spec), id); err != nil {
			return false, err
		}
		return true, insertEvent(ctx, tx, id, "", job.KindEngine, c, now)
	})
}

// MoveParty takes a party to another state, under the same rules as Move. A party that failed
// without a cause gets one that says so.
func (db *DB) MoveParty(ctx context.Context, id job.ID, party string, to job.PartyState, cause *job.Cause, reason string, now time.Time) error {
	return db.moveParty(ctx, id, party, -1, to, cause, reason, now)
}

// MoveAttempt is MoveParty for what an attempt of a party says of itself: nothing is done, and nil returned, if that is not
// the party's present one.
func (db *DB) MoveAttempt(ctx context.Context, id job.ID, party string, attempt int, to job.PartyState, cause *job.Cause, reason string, now time.Time) error {
	return db.moveParty(ctx, id, party, attempt, to, cause, reason, now)
}

// Again begins a new attempt of a party, which is absent then and has no cause, and writes the event of it, in one
// transaction. From a state that does not allow it (see job.PartyState.Again), and in a job that does not run, it is a
// *store.MoveError within a problem. A party that was over holds nothing of its site any more, and has to be given it again,
// unless its job begins anew on Flower's programs.
func (db *DB) Again(ctx context.Context, id job.ID, party, reason string, now time.Time) error {
	return db.change(ctx, "store a party's new attempt", id, func(ctx context.Context, tx *txn, j job.Job) (bool, error) {
		p, err := db.party(ctx, tx, id, party)
		if err != nil {
			return false, err
		}
		if !p.State.Again() || j.State != job.Preparing && j.State != job.Running {
			return false, (&store.MoveError{Job: id, Party: party, From: string(p.State), To: string(job.PartyAbsent)}).Problem()
		}
		holds := j.Holds(p) && (!p.State.Terminal() || j.Spec.Engine == job.EngineFlower)
		if _, err := tx.ExecContext(ctx, "UPDATE party SET state = ?, attempt = ?, reason = ?, cause = '', updated = ?, allocated = ? WHERE job = ? AND name = ?",
			job.PartyAbsent, p.Attempt+1, reason, nanos(now), flag(holds), id, party); err != nil {
			return false, err
		}
		return true, insertEvent(ctx, tx, id, party, job.KindPartyState, job.PartyStateChange{From: p.State, To: job.PartyAbsent, Reason: reason, Attempt: p.Attempt + 1}, now)
	})
}

const partyColumns = "job, name, state, attempt, reason, cause, updated, allocated"

func (db *DB) party(ctx context.Context, tx *txn, id job.ID, party string) (job.Party, error) {
	p, err := scanParty(tx.QueryRowContext(ctx, "SELECT "+partyColumns+" FROM party WHERE job = ? AND name = ?", id, party))
	if errors.Is(err, sql.ErrNoRows) {
		return p, noParty(id, party)
	}
	return p, err
}

func (db *DB) moveParty(ctx context.Context, id job.ID, party string, attempt int, to job.PartyState, cause *job.Cause, reason string, now time.Time) error {
	return db.change(ctx, "store a party's move", id, func(ctx context.Context, tx *txn, _ job.Job) (bool, error) {
		p, err := db.party(ctx, tx, id, party)
		if err != nil || p.State == to || attempt >= 0 && attempt != p.Attempt {
			return false, err
		}
		if !p.State.Can(to) {
			return false, (&store.MoveError{Job: id, Party: party, From: string(p.State), To: string(to)}).Problem()
		}
		if p.Cause != nil {
			cause = p.Cause
		}
		if cause == nil && to == job.PartyFailed {
			cause = problem.New(problem.Internal, "please report this with the job's events", "the party failed, and nothing was recorded about why")
			cause.Party = party
		}
		raw, err := causeText(cause)
		if err != nil {
			return false, err
		}
		if _, err := tx.ExecContext(ctx, "UPDATE party SET state = ?, reason = ?, cause = ?, updated = ? WHERE job = ? AND name = ?",
			to, reason, raw, nanos(now), id, party); err != nil {
			return false, err
		}
		return true, insertEvent(ctx, tx, id, party, job.KindPartyState, job.PartyStateChange{From: p.State, To: to, Cause: cause, Reason: reason}, now)
	})
}

// PutBundle notes that the hub has a bundle; one that is known stays as it is.
func (db *DB) PutBundle(ctx context.Context, digest string, size int64, now time.Time) error {
	return db.write(ctx, "note a bundle", func(ctx context.Context, tx *txn) ([]job.ID, error) {
		_, err := tx.ExecContext(ctx, "INSERT INTO bundle (digest, size, created) VALUES (?, ?, ?) ON CONFLICT DO NOTHING", digest, size, nanos(now))
		return nil, err
	})
}

// Bundle gives the bookkeeping of one bundle; a problem with code not-found if there is none.
func (db *DB) Bundle(ctx context.Context, digest string) (store.Bundle, error) {
	b, err := one(ctx, db, "read about a bundle", scanBundle, "SELECT digest, size, created FROM bundle WHERE digest = ?", digest)
	if errors.Is(err, sql.ErrNoRows) {
		return store.Bundle{}, problem.New(problem.NotFound, "submit it again", "the hub has no bundle %s", digest)
	}
	return b, db.trouble(ctx, err, "read a bundle")
}

// Bundles gives all bundles, oldest first.
func (db *DB) Bundles(ctx context.Context) ([]store.Bundle, error) {
	rows, err := db.query(ctx, "SELECT digest, size, created FROM bundle ORDER BY created, digest")
	return collect(db, rows, err, "list bundles", scanBundle)
}

// DeleteBundle forgets a bundle. One that a job needs which is not over is refused with code usage; one that is not
// known is no error.
func (db *DB) DeleteBundle(ctx context.Context, digest string) error {
	return db.write(ctx, "delete a bundle", func(ctx context.Context, tx *txn) ([]job.ID, error) {
		states, args := openStates()
		var id job.ID
		err := tx.QueryRowContext(ctx, "SELECT id FROM job WHERE bundle = ? AND state IN "+states+" LIMIT 1", append([]any{digest}, args...)...).Scan(&id)
		if err == nil {
			return nil, problem.New(problem.Usage, "wait until the job is over", "the bundle %s is needed by job %s", digest, id)
		}
		if !errors.Is(err, sql.ErrNoRows) {
			return nil, err
		}
		_, err = tx.ExecContext(ctx, "DELETE FROM bundle WHERE digest = ?", digest)
		return nil, err
	})
}

// openStates gives the states of jobs that are not over, as a list for SQL's IN.
func openStates() (list string, args []any) {
	for _, s := range job.States() {
		if !s.Terminal() {
			args = append(args, s)
		}
	}
	return "(?" + strings.Repeat(", ?", len(args)-1) + ")", args
}

// insertAtOnce is how many parties one statement stores: databases bound the number of arguments.
const insertAtOnce = 500

// insertParties adds absent parties, the first at position pos.
func insertParties(ctx context.Context, tx *txn, id job.ID, pos int, names []string, now time.Time) error {
	for chunk := range slices.Chunk(names, insertAtOnce) {
		args := make([]any, 0, 5*len(chunk))
		for _, name := range chunk {
			args = append(args, id, pos, name, job.PartyAbsent, nanos(now))
			pos++
		}
		const one = "(?, ?, ?, ?, '', '', ?)"
		if _, err := tx.ExecContext(ctx, "INSERT INTO party (job, pos, name, state, reason, cause, updated) VALUES "+one+strings.Repeat(", "+one, len(chunk)-1), args...); err != nil {
			return err
		}
	}
	return nil
}

func noJob(id job.ID) error {
	return problem.New(problem.NotFound, "see the jobs with: pergola jobs", "there is no job %s", id)
}

func scanJob(r row) (job.Job, error) {
	var j job.Job
	var cause, spec string
	var created, started, ended int64
	if err := r.Scan(&j.ID, &j.Name, &j.Key, &j.Submitter, &j.Bundle, &j.State, &j.Reason, &cause, &spec, &created, &started, &ended); err != nil {
		return job.Job{}, err
	}
	j.Created, j.Started, j.Ended = stamp(created), stamp(started), stamp(ended)
	if err := json.Unmarshal([]byte(spec), &j.Spec); err != nil {
		return job.Job{}, fmt.Errorf("spec of job %s: %w", j.ID, err)
	}
	var err error
	j.Cause, err = parseCause(cause)
	return j, err
}

func scanParty(r row) (job.Party, error) {
	var p job.Party
	var cause string
	var updated, allocated int64
	if err := r.Scan(&p.Job, &p.Name, &p.State, &p.Attempt, &p.Reason, &cause, &updated, &allocated); err != nil {
		return job.Party{}, err
	}
	p.Updated, p.Allocated = stamp(updated), allocated != 0
	var err error
	p.Cause, err = parseCause(cause)
	return p, err
}

func scanBundle(r row) (b store.Bundle, err error) {
	var created int64
	err = r.Scan(&b.Digest, &b.Size, &created)
	b.Created = stamp(created)
	return b, err
}

func causeText(c *job.Cause) (string, error) {
	if c == nil {
		return "", nil
	}
	b, err := json.Marshal(c)
	return string(b), err
}

func parseCause(s string) (*job.Cause, error) {
	if s == "" {
		return nil, nil
	}
	var c job.Cause
	if err := json.Unmarshal([]byte(s), &c); err != nil {
		return nil, fmt.Errorf("cause %q: %w", s, err)
	}
	return &c, nil
}
