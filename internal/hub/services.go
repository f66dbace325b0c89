package hub

import (
	"context"
	"encoding/json"
	"errors"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"connectrpc.com/connect/v2/connecthttp"

	"github.com/pergolafl/pergola/internal/api"
	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/api/pergola/v1/pergolav1connect"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/runner"
	"github.com/pergolafl/pergola/internal/store"
)

// caller gives who calls, if that is one of kinds.
func caller(ctx context.Context, kinds ...pki.Kind) (pki.Identity, error) {
	info, ok := connecthttp.ServerInfoForContext(ctx)
	if !ok || info.TLS() == nil {
		return pki.Identity{}, problem.New(problem.Denied, "", "the call came without TLS")
	}
	return pki.Expect(*info.TLS(), kinds...)
}

var digestForm = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)

func checkDigest(d string) error {
	if !digestForm.MatchString(d) {
		return problem.New(problem.Usage, "", "%q is not a digest (sha256: and 64 hexadecimal digits)", d)
	}
	return nil
}

func hexOf(digest string) string { return strings.TrimPrefix(digest, "sha256:") }

type jobService struct{ *Hub }

// SubmitJob implements the API.
func (s jobService) SubmitJob(ctx context.Context, req *pb.SubmitJobRequest) (*pb.SubmitJobResponse, error) {
	who, err := caller(ctx, pki.KindUser)
	if err != nil {
		return nil, err
	}
	if err := checkDigest(req.GetBundleDigest()); err != nil {
		return nil, err
	}
	release, err := s.holdBundles()
	if err != nil {
		return nil, err
	}
	defer release()
	if _, err := s.db.Bundle(ctx, req.GetBundleDigest()); err != nil {
		return nil, err
	}
	if err := job.CheckName("job", req.GetName()); err != nil {
		return nil, err
	}
	var spec job.Spec
	dec := json.NewDecoder(strings.NewReader(req.GetSpecJson()))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&spec); err != nil {
		return nil, problem.New(problem.Usage, "", "the job's settings cannot be read: %v", err)
	}
	if err := spec.Validate(); err != nil {
		return nil, err
	}
	spec = spec.WithDefaults()
	spec.LogQuota = spec.LogQuota.Least(s.conf.LogQuota)
	if err := s.enrolled(ctx, spec.Sites); err != nil {
		return nil, err
	}
	if len(spec.Sites) == 0 {
		if spec.Sites, err = s.siteNames(ctx); err != nil {
			return nil, err
		}
	}
	for _, n := range spec.MandatorySites {
		if !slices.Contains(spec.Sites, n) {
			return nil, problem.New(problem.Usage, "name one of the job's sites", "the mandatory site %q is none of the job's%s", n, problem.DidYouMean(n, spec.Sites))
		}
	}
	if len(spec.Sites) == 0 {
		return nil, problem.New(problem.Usage, "enrol a site first", "the hub has no sites")
	}
	if err := s.feasible(ctx, spec); err != nil {
		return nil, err
	}
	now := s.wall()
	j, err := s.db.CreateJob(ctx, job.Job{ID: job.NewID(now), Name: req.GetName(), Key: req.GetKey(), Submitter: who.Name, Bundle: req.GetBundleDigest(), Spec: spec, Created: now}, spec.Sites)
	if err != nil {
		return nil, err
	}
	out, err := s.withParties(ctx, j)
	return &pb.SubmitJobResponse{Job: out}, err
}

func (s jobService) withParties(ctx context.Context, j job.Job) (*pb.Job, error) {
	ps, err := s.db.Parties(ctx, j.ID)
	out := api.Job(j, ps)
	s.explain(out)
	return out, err
}

func (s jobService) job(ctx context.Context, text string) (job.Job, error) {
	if _, err := caller(ctx, pki.KindUser); err != nil {
		return job.Job{}, err
	}
	id, err := s.db.FindJob(ctx, text)
	if err != nil {
		return job.Job{}, err
	}
	return s.db.Job(ctx, id)
}

// GetJob implements the API.
func (s jobService) GetJob(ctx context.Context, req *pb.GetJobRequest) (*pb.GetJobResponse, error) {
	j, err := s.job(ctx, req.GetId())
	if err != nil {
		return nil, err
	}
	out, err := s.withParties(ctx, j)
	return &pb.GetJobResponse{Job: out}, err
}

// ListJobs implements the API.
func (s jobService) ListJobs(ctx context.Context, req *pb.ListJobsRequest) (*pb.ListJobsResponse, error) {
	if _, err := caller(ctx, pki.KindUser); err != nil {
		return nil, err
	}
	f := store.Filter{Limit: min(int(req.GetLimit()), 1000), Newest: true}
	for _, t := range req.GetStates() {
		if !job.State(t).Known() {
			return nil, problem.New(problem.Usage, "", "no state is called %q", t)
		}
		f.States = append(f.States, job.State(t))
	}
	if req.GetAfter() != "" {
		id, err := job.ParseID(req.GetAfter())
		if err != nil {
			return nil, err
		}
		f.After = id
	}
	f.Submitter, f.Name, f.Prefix = req.GetSubmitter(), req.GetName(), strings.ToLower(req.GetPrefix())
	js, err := s.db.Jobs(ctx, f)
	if err != nil {
		return nil, err
	}
	var ids []job.ID
	for _, j := range js {
		ids = append(ids, j.ID)
	}
	ps, err := s.db.PartiesOf(ctx, ids)
	if err != nil {
		return nil, err
	}
	out := &pb.ListJobsResponse{}
	for _, j := range js {
		shown := api.Job(j, ps[j.ID])
		s.explain(shown)
		out.Jobs = append(out.Jobs, shown)
	}
	return out, nil
}

// AbortJob implements the API.
func (s jobService) AbortJob(ctx context.Context, req *pb.AbortJobRequest) (*pb.AbortJobResponse, error) {
	who, err := caller(ctx, pki.KindUser)
	if err != nil {
		return nil, err
	}
	j, err := s.job(ctx, req.GetId())
	if err != nil {
		return nil, err
	}
	cause := problem.New(problem.AbortedByUser, "submit it again when you want it to run", "%s aborted the job", who.Name)
	if err := s.stop(ctx, j, cause); err != nil {
		return nil, err
	}
	if req.GetNow() {
		s.mu.Lock()
		c := s.jobs[j.ID]
		s.mu.Unlock()
		if c != nil {
			c.killNow()
			s.changed.Wake("")
		}
	}
	if j, err = s.db.Job(ctx, j.ID); err != nil {
		return nil, err
	}
	out, err := s.withParties(ctx, j)
	return &pb.AbortJobResponse{Job: out}, err
}

// stop begins a job's end for cause (nil: it is finished); a job that is ending or over stays as it is.
func (h *Hub) stop(ctx context.Context, j job.Job, cause *job.Cause) error {
	for !j.State.Terminal() && j.State != job.Stopping {
		to := job.Stopping
		if !j.State.Active() { // nothing runs yet
			to = j.State.Outcome(cause)
		}
		err := h.db.Move(ctx, j.ID, to, cause, "", h.wall())
		if _, ok := errors.AsType[*store.MoveError](err); !ok {
			return err
		}
		// Somebody was quicker, for example to start it: look again, or the end would be forgotten.
		if j, err = h.db.Job(ctx, j.ID); err != nil {
			return err
		}
	}
	return nil
}

// ignoreMoved forgives a move that somebody else was quicker to make impossible.
func ignoreMoved(err error) error {
	if _, ok := errors.AsType[*store.MoveError](err); ok {
		return nil
	}
	return err
}

// WatchJob implements the API.
func (s jobService) WatchJob(ctx context.Context, req *pb.WatchJobRequest, out pergolav1connect.JobServiceWatchJobServerStream) error {
	j, err := s.job(ctx, req.GetId())
	if err != nil {
		return err
	}
	id := j.ID
	wake, cancel := s.db.Subscribe(id)
	defer cancel()
	after := req.GetAfter()
	for {
		if err := patiently(ctx, func() (err error) { j, err = s.db.Job(ctx, id); return err }); err != nil {
			return err
		}
		// The state was read before the events, so a final state means that the last event is among them.
		for {
			var es []job.Event
			if err := patiently(ctx, func() (err error) { es, err = s.db.Events(ctx, id, after, 500); return err }); err != nil {
				return err
			}
			for _, e := range es {
				p, err := api.Event(e)
				if err != nil {
					return err
				}
				if err := out.Send(&pb.WatchJobResponse{Event: p}); err != nil {
					return err
				}
				after = e.Seq
			}
			if len(es) < 500 {
				break
			}
		}
		if j.State.Terminal() || req.GetOnce() {
			return nil
		}
		if c := s.controller(j.ID); c != nil {
			if p := c.unstorable(); p != nil {
				return p // the end is decided and cannot be stored: at least who watches hears of it
			}
		}
		select {
		case <-wake:
		case <-time.After(2 * time.Second): // for the end that cannot be stored
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (h *Hub) controller(id job.ID) *control {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.jobs[id]
}

// TailLogs implements the API.
func (s jobService) TailLogs(ctx context.Context, req *pb.TailLogsRequest, out pergolav1connect.JobServiceTailLogsServerStream) error {
	j, err := s.job(ctx, req.GetId())
	if err != nil {
		return err
	}
	ps, err := s.db.Parties(ctx, j.ID)
	if err != nil {
		return err
	}
	for _, n := range req.GetParties() {
		if !slices.ContainsFunc(ps, func(p job.Party) bool { return p.Name == n }) {
			var names []string
			for _, p := range ps {
				names = append(names, p.Name)
			}
			return problem.New(problem.Usage, "name one of: "+strings.Join(names, ", "), "job %s has no party %q%s", j.ID, n, problem.DidYouMean(n, names))
		}
	}
	if len(req.GetParties()) > 0 {
		ps = slices.DeleteFunc(ps, func(p job.Party) bool { return !slices.Contains(req.GetParties(), p.Name) })
	}
	return s.tail(ctx, j, ps, req, out.Send)
}

func diskProblem(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		p := problem.Wrap(err, problem.DiskFull, "make room on the hub's disk", "the hub has no space left")
		p.Party = job.HubParty
		return p
	}
	return err
}

func isShortage(err error) bool {
	return errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) || errors.Is(err, syscall.ENOBUFS) || errors.Is(err, syscall.ENOMEM) || errors.Is(err, syscall.ECONNABORTED)
}

type siteService struct{ *Hub }

// site gives the calling site, which must be enrolled.
func (s siteService) site(ctx context.Context) (string, error) {
	id, err := caller(ctx, pki.KindSite)
	if err != nil {
		return "", err
	}
	return id.Name, s.enrolledSite(ctx, id.Name)
}

// part gives a job in which the calling site takes part.
func (s siteService) part(ctx context.Context, text string) (job.Job, string, error) {
	name, err := s.site(ctx)
	if err != nil {
		return job.Job{}, "", err
	}
	id, err := job.ParseID(text)
	if err != nil {
		return job.Job{}, "", err
	}
	j, err := s.db.Job(ctx, id)
	if err != nil {
		return job.Job{}, "", err
	}
	if !slices.Contains(j.Spec.Sites, name) {
		return job.Job{}, "", problem.New(problem.Denied, "", "site %s has no part in job %s", name, id)
	}
	return j, name, nil
}

// hasPart tells whether a site's party in a job is alive.
func (h *Hub) hasPart(ctx context.Context, j job.Job, site string) error {
	if site != job.HubParty && j.State.Active() {
		p, err := h.db.Party(ctx, j.ID, site)
		if err != nil && problem.CodeOf(err) != problem.NotFound {
			return err
		}
		if err == nil && p.Allocated && !p.State.Terminal() {
			return nil
		}
	}
	return problem.New(problem.Denied, "", "site %s has no running part in job %s", site, j.ID)
}

// WatchDesired implements the API.
func (s siteService) WatchDesired(ctx context.Context, req *pb.WatchDesiredRequest, out pergolav1connect.SiteServiceWatchDesiredServerStream) error {
	name, err := s.site(ctx)
	if err != nil {
		return err
	}
	if err := s.sawSite(ctx, name, req); err != nil {
		return err
	}
	w := s.wants.watch(name)
	defer w.close()
	s.siteUp(name)
	defer s.siteDown(name)
	for {
		select {
		case <-w.wake:
		case <-ctx.Done():
			return ctx.Err()
		}
		if err := out.Send(&pb.WatchDesiredResponse{Parties: s.wants.of(name)}); err != nil {
			return err
		}
	}
}

// Report implements the API.
func (s siteService) Report(ctx context.Context, req *pb.ReportRequest) (*pb.ReportResponse, error) {
	j, name, err := s.part(ctx, req.GetJobId())
	if err != nil {
		return nil, err
	}
	var last int64
	for _, e := range req.GetEntries() {
		ev, err := api.FromEvent(e.GetEvent())
		if err != nil {
			return nil, err
		}
		ev.Job, ev.Party = j.ID, name // a site speaks for itself alone
		if err := s.record(ctx, int(req.GetAttempt()), runner.Entry{Seq: e.GetSeq(), Event: ev}); err != nil {
			return nil, s.endIfFull(j.ID, err)
		}
		last = e.GetSeq()
	}
	return &pb.ReportResponse{Seq: last}, nil
}

// endIfFull ends a job of which something could not be stored for want of space, and gives err back.
func (h *Hub) endIfFull(id job.ID, err error) error {
	if problem.CodeOf(err) == problem.DiskFull {
		if c := h.controller(id); c != nil {
			c.full()
		}
	}
	return err
}

// seqBits are those of a journal's numbers in the numbers under which its entries are stored; the attempt stands above them.
const seqBits = 40

// record stores what a runner wrote into its journal; twice is harmless. What an earlier attempt of a party says of its
// state comes too late and is left out; the rest has happened and is kept.
func (h *Hub) record(ctx context.Context, attempt int, e runner.Entry) error {
	if attempt < 0 || attempt > 1<<20 || e.Seq < 0 || e.Seq >= 1<<seqBits {
		return problem.New(problem.Usage, "", "entry %d of attempt %d cannot be", e.Seq, attempt)
	}
	var c job.PartyStateChange
	if e.Event.Kind == job.KindPartyState {
		if err := e.Event.Decode(&c); err != nil {
			return problem.New(problem.Usage, "", "entry %d cannot be read: %v", e.Seq, err)
		}
		return ignoreMoved(h.db.MoveAttempt(ctx, e.Event.Job, e.Event.Party, attempt, c.To, c.Cause, c.Reason, h.wall()))
	}
	if e.Event.Kind == job.KindJobState {
		return problem.New(problem.Denied, "", "a party does not decide the job's state")
	}
	seq := e.Seq
	if seq > 0 {
		seq |= int64(attempt) << seqBits
	}
	_, _, err := h.db.Append(ctx, e.Event, seq)
	return err
}

// IssueCertificate implements the API. The certificate is of the site's own enrolment, and the agent has it renewed while the part lives.
func (s siteService) IssueCertificate(ctx context.Context, req *pb.IssueCertificateRequest) (*pb.IssueCertificateResponse, error) {
	j, name, err := s.part(ctx, req.GetJobId())
	if err != nil {
		return nil, err
	}
	if err := s.hasPart(ctx, j, name); err != nil {
		return nil, err
	}
	want := pki.Identity{Kind: pki.KindParty, Name: name, Job: string(j.ID)}
	cert, err := s.auth.Sign([]byte(req.GetCsrPem()), func(id pki.Identity) error {
		if id != want {
			return problem.New(problem.Denied, "", "site %s may not be %s", name, id)
		}
		return nil
	}, pki.Grant{TTL: s.conf.certTTL(), Enrolled: enrolledOf(ctx)})
	if err != nil {
		return nil, err
	}
	return &pb.IssueCertificateResponse{CertificatePem: string(cert)}, nil
}
