package hub

import (
	"context"
	"encoding/json"

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
