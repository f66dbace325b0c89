package hub

import (
	"context"
	"encoding/json"
	"maps"
	"slices"

	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/pki"
)

// sawSite notes what a site's agent declares when it comes.
func (h *Hub) sawSite(ctx context.Context, name string, req *pb.WatchDesiredRequest) error {
	var info json.RawMessage
	if o := req.GetOffer(); o != nil {
		d := job.Declared{Resources: o.GetResources(), MaxJobs: int(o.GetMaxJobs())}
		if err := d.Check(); err != nil {
			return err
		}
		var err error
		if info, err = json.Marshal(d); err != nil {
			return err
		}
	}
	return patiently(ctx, func() error { return h.db.SawSite(ctx, name, info, req.GetAgentVersion(), h.wall()) })
}

// DrainSite implements the API.
func (s jobService) DrainSite(ctx context.Context, req *pb.DrainSiteRequest) (*pb.DrainSiteResponse, error) {
	who, err := caller(ctx, pki.KindUser)
	if err != nil {
		return nil, err
	}
	if err := s.enrolled(ctx, []string{req.GetName()}); err != nil {
		return nil, err
	}
	if err := s.db.SetDrained(ctx, req.GetName(), req.GetDrained()); err != nil {
		return nil, err
	}
	s.log.Info("a site was drained, or resumed", "site", req.GetName(), "drained", req.GetDrained(), "by", who.Name)
	s.sched.stale.Store(true)
	s.changed.Wake("")
	list, err := s.ListSites(ctx, &pb.ListSitesRequest{})
	if err != nil {
		return nil, err
	}
	for _, site := range list.GetSites() {
		if site.GetName() == req.GetName() {
			return &pb.DrainSiteResponse{Site: site}, nil
		}
	}
	return &pb.DrainSiteResponse{}, nil // it was removed meanwhile
}

// ListSites implements the API.
func (s jobService) ListSites(ctx context.Context, req *pb.ListSitesRequest) (*pb.ListSitesResponse, error) {
	if _, err := caller(ctx, pki.KindUser); err != nil {
		return nil, err
	}
	list, err := s.siteList(ctx, req.GetAll())
	if err != nil {
		return nil, err
	}
	used, jobs := s.inUse()
	out := &pb.ListSitesResponse{}
	for _, i := range list {
		site := &pb.Site{
			Name: i.Name, Drained: i.Drained, Version: i.Version, Used: used[i.Name], Jobs: jobs[i.Name], EnrolledTime: stamp(i.Enrolled), RemovedTime: stamp(i.Removed),
		}
		since, ok := s.away(i.Name)
		if since.IsZero() {
			since = i.Seen // not since this hub was started
		}
		site.Connected, site.Since = ok, stamp(since)
		var d job.Declared
		if len(i.Info) > 0 && json.Unmarshal(i.Info, &d) == nil { // the scheduler complains of others
			site.Offer = &pb.SiteOffer{Resources: d.Resources, MaxJobs: int32(d.MaxJobs)}
		}
		out.Sites = append(out.Sites, site)
	}
	return out, nil
}

// inUse gives what jobs have of each site, and which.
func (h *Hub) inUse() (used map[string]job.Resources, jobs map[string][]string) {
	used, jobs = map[string]job.Resources{}, map[string][]string{}
	active := h.sched.view().active
	for _, id := range slices.Sorted(maps.Keys(active)) {
		for _, r := range active[id].Holds {
			if used[r.Site] == nil {
				used[r.Site] = job.Resources{}
			}
			for k, n := range r.Ask {
				used[r.Site][k] += n
			}
			jobs[r.Site] = append(jobs[r.Site], string(id))
		}
	}
	return used, jobs
}

// explain says of a job in the queue why it is there, as it is now.
func (h *Hub) explain(j *pb.Job) {
	v := h.sched.view()
	w := v.waits[job.ID(j.GetId())]
	if w == nil || j.GetState() != string(job.Queued) {
		return
	}
	j.Reason = w.Text(len(v.waits), func(id job.ID) string { return v.who[id] })
	j.Wait = &pb.Wait{Place: int32(w.Place), Queued: int32(len(v.waits)), Able: int32(w.Able), Needed: int32(w.Needed), Never: w.Never}
	for _, l := range w.Lacks {
		x := &pb.Lack{Site: l.Site, Kind: string(l.Kind), Resource: l.Resource, Asked: l.Asked, Free: l.Free, Declared: l.Has}
		for _, id := range l.By {
			x.Jobs = append(x.Jobs, string(id))
		}
		j.Wait.Lacks = append(j.Wait.Lacks, x)
	}
}
