package hub

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/pergolafl/pergola/internal/api"
	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/api/pergola/v1/pergolav1connect"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/problem"
)

// kept are the folders of a job's folder that its submitter may have: what the app wrote, and the logs of all parties.
var kept = []string{"results", "logs"}

// ResubmitJob implements the API.
func (s jobService) ResubmitJob(ctx context.Context, req *pb.ResubmitJobRequest) (*pb.ResubmitJobResponse, error) {
	who, err := caller(ctx, pki.KindUser)
	if err != nil {
		return nil, err
	}
	old, err := s.job(ctx, req.GetId())
	if err != nil {
		return nil, err
	}
	release, err := s.holdBundles()
	if err != nil {
		return nil, err
	}
	defer release()
	if _, err := s.db.Bundle(ctx, old.Bundle); err != nil {
		return nil, err
	}
	if err := s.enrolled(ctx, old.Spec.Sites); err != nil {
		return nil, err
	}
	if err := s.feasible(ctx, old.Spec); err != nil {
		return nil, err
	}
	now := time.Now()
	j, err := s.db.CreateJob(ctx, job.Job{
		ID: job.NewID(now), Name: old.Name, Key: req.GetKey(), Submitter: who.Name, Bundle: old.Bundle, Spec: old.Spec, Created: now,
	}, old.Spec.Sites)
	if err != nil {
		return nil, err
	}
	out, err := s.withParties(ctx, j)
	return &pb.ResubmitJobResponse{Job: out}, err
}

// DeleteJob implements the API. The files go first: a hub that is killed between leaves a job that can be deleted again, and
// never files that nobody knows.
func (s jobService) DeleteJob(ctx context.Context, req *pb.DeleteJobRequest) (*pb.DeleteJobResponse, error) {
	j, err := s.job(ctx, req.GetId())
	if err != nil {
		return nil, err
	}
	if !j.State.Terminal() {
		return nil, problem.New(problem.Usage, "end it first with: pergola abort "+string(j.ID), "job %s is %s", j.ID, j.State)
	}
	if err := os.RemoveAll(s.jobDir(j.ID)); err != nil {
		return nil, diskProblem(err)
	}
	defer s.sched.touch(j.ID)
	return &pb.DeleteJobResponse{}, s.db.DeleteJob(ctx, j.ID)
}

// ListResults implements the API.
func (s jobService) ListResults(ctx context.Context, req *pb.ListResultsRequest) (*pb.ListResultsResponse, error) {
	j, err := s.job(ctx, req.GetId())
	if err != nil {
		return nil, err
	}
	if !j.State.Terminal() {
		return nil, problem.New(problem.Usage, "wait for its end: pergola events --follow "+string(j.ID), "job %s is %s, and its files are still written", j.ID, j.State)
	}
	out := &pb.ListResultsResponse{}
	root, err := os.OpenRoot(s.jobDir(j.ID))
	if errors.Is(err, fs.ErrNotExist) {
		return out, nil // it never began
	}
	if err != nil {
		return nil, err
	}
	defer root.Close()
	for _, dir := range kept {
		err := fs.WalkDir(root.FS(), dir, func(p string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) && p == dir {
				return nil
			}
			if err != nil || !d.Type().IsRegular() { // a link may lead anywhere: it stays at the hub
				return err
			}
			if err := ctx.Err(); err != nil {
				return err
			}
			f, err := root.Open(p)
			if err != nil {
				return err
			}
			defer f.Close()
			h := sha256.New()
			n, err := io.Copy(h, f)
			out.Files = append(out.Files, &pb.ResultFile{Path: p, SizeBytes: n, Digest: "sha256:" + hex.EncodeToString(h.Sum(nil))})
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}

// DownloadResult implements the API.
func (s jobService) DownloadResult(ctx context.Context, req *pb.DownloadResultRequest, out pergolav1connect.JobServiceDownloadResultServerStream) error {
	j, err := s.job(ctx, req.GetId())
	if err != nil {
		return err
	}
	none := problem.New(problem.NotFound, "see them with: pergola download --list "+string(j.ID), "job %s has no file %q", j.ID, req.GetPath())
	first, _, _ := strings.Cut(req.GetPath(), "/")
	if !filepath.IsLocal(req.GetPath()) || path.Clean(req.GetPath()) != req.GetPath() || (first != kept[0] && first != kept[1]) {
		return none
	}
	root, err := os.OpenRoot(s.jobDir(j.ID))
	if err != nil {
		return none
	}
	defer root.Close()
	info, err := root.Lstat(req.GetPath())
	if err != nil || !info.Mode().IsRegular() {
		return none
	}
	f, err := root.Open(req.GetPath())
	if err != nil {
		return none
	}
	defer f.Close()
	if req.GetOffset() < 0 || req.GetOffset() > info.Size() {
		return problem.New(problem.Usage, "begin at 0", "%s has %d bytes, and cannot be sent from byte %d on", req.GetPath(), info.Size(), req.GetOffset())
	}
	if _, err := f.Seek(req.GetOffset(), io.SeekStart); err != nil {
		return err
	}
	buf := make([]byte, api.MaxChunk)
	for {
		n, err := io.ReadFull(f, buf)
		if n > 0 {
			if err := out.Send(&pb.DownloadResultResponse{Data: buf[:n]}); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
