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
	"slices"
	"strings"
	"time"

	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/api/pergola/v1/pergolav1connect"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/logs"
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
	spec := old.Spec
	if spec.EngineAuto { // which the job before may have fallen back from
		spec.Engine = job.EngineAuto
		if err := spec.ChooseEngine(spec.FlwrVersion); err != nil {
			return nil, err
		}
	}
	now := time.Now()
	j, err := s.db.CreateJob(ctx, job.Job{
		ID: job.NewID(now), Name: old.Name, Key: req.GetKey(), Submitter: who.Name, Bundle: old.Bundle, Spec: spec, Created: now,
	}, spec.Sites)
	if err != nil {
		return nil, err
	}
	out, err := s.withParties(ctx, j)
	return &pb.ResubmitJobResponse{Job: out}, err
}

// DeleteJob implements the API.
func (s jobService) DeleteJob(ctx context.Context, req *pb.DeleteJobRequest) (*pb.DeleteJobResponse, error) {
	j, err := s.job(ctx, req.GetId())
	if err != nil {
		return nil, err
	}
	defer s.sched.touch(j.ID)
	err = removeJob(ctx, s.dir, s.db, j.ID)
	if problem.CodeOf(err) == problem.NotFound { // the collector was quicker
		err = nil
	}
	return &pb.DeleteJobResponse{}, err
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
			if err != nil {
				return err
			}
			if err := ctx.Err(); err != nil {
				return err
			}
			if d.IsDir() && isLogFolder(p) {
				return listLogs(ctx, filepath.Join(s.jobDir(j.ID), filepath.FromSlash(p)), p, out)
			}
			// A link may lead anywhere: it stays at the hub. Logs are listed with their folder.
			if !d.Type().IsRegular() || isLogFolder(path.Dir(p)) && (logs.Part(d.Name()) || logs.ValidName(d.Name()) == nil) {
				return nil
			}
			f, err := root.Open(p)
			if err != nil {
				return err
			}
			defer f.Close()
			return addFile(ctx, p, f, out)
		})
		if err != nil {
			return nil, err
		}
	}
	slices.SortFunc(out.Files, func(a, b *pb.ResultFile) int { return strings.Compare(a.GetPath(), b.GetPath()) })
	return out, nil
}

// isLogFolder tells whether a path of a job's folder is that of a party's logs.
func isLogFolder(p string) bool { return path.Dir(p) == "logs" }

// listLogs adds a party's logs, each as one file.
func listLogs(ctx context.Context, dir, p string, out *pb.ListResultsResponse) error {
	ends, err := logs.Sizes(dir)
	if err != nil {
		return err
	}
	for name := range ends {
		w, err := logs.OpenWhole(dir, name)
		if err != nil {
			return err
		}
		err = addFile(ctx, p+"/"+name, io.NewSectionReader(w, 0, w.Size()), out)
		if e := w.Close(); err == nil {
			err = e
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func addFile(ctx context.Context, p string, r io.Reader, out *pb.ListResultsResponse) error {
	h := sha256.New()
	n, err := io.Copy(h, ctxReader{ctx, r})
	out.Files = append(out.Files, &pb.ResultFile{Path: p, SizeBytes: n, Digest: "sha256:" + hex.EncodeToString(h.Sum(nil))})
	return err
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
	var r io.ReaderAt
	var size int64
	if dir, name := path.Split(req.GetPath()); isLogFolder(path.Clean(dir)) && logs.ValidName(name) == nil {
		w, err := logs.OpenWhole(filepath.Join(s.jobDir(j.ID), filepath.FromSlash(dir)), name)
		if err != nil {
			return none
		}
		defer w.Close()
		r, size = w, w.Size()
	} else {
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
		r, size = f, info.Size()
	}
	return sendFrom(r, req.GetOffset(), size, req.GetPath(), func(data []byte) error {
		return out.Send(&pb.DownloadResultResponse{Data: data})
	})
}
