package hub

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	human "github.com/dustin/go-humanize"

	"github.com/pergolafl/pergola/internal/api"
	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/api/pergola/v1/pergolav1connect"
	"github.com/pergolafl/pergola/internal/bundle"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/keyed"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/store"
)

// A bundle lies at the hub as it was packed, which is what sites are sent, and unpacked, which is what the hub's own runners
// use. The packed file is what the hub keeps; the unpacked folder is there while jobs that are not over use it, and is made
// again of the packed file where it is missing:
//
//	bundles/HEX.tar.zst           whole, checked
//	bundles/HEX/                  unpacked
//	bundles/.upload-HEX-USER      what a user has uploaded so far

type bundleService struct{ *Hub }

// mayRead tells whether the caller may read a bundle: users may, and sites that have a part in a job of it.
func (h *Hub) mayRead(ctx context.Context, digest string) error {
	who, err := caller(ctx, pki.KindUser, pki.KindSite)
	if err != nil {
		return err
	}
	if err := checkDigest(digest); err != nil || who.Kind == pki.KindUser {
		return err
	}
	if err := h.enrolledSite(ctx, who.Name); err != nil {
		return err
	}
	js, err := h.openJobs(ctx, store.Filter{Bundle: digest})
	if err != nil {
		return err
	}
	for _, j := range js {
		if slices.Contains(j.Spec.Sites, who.Name) {
			return nil
		}
	}
	return problem.New(problem.Denied, "", "site %s has no part in a job of bundle %s", who.Name, digest)
}

// HasBundle implements the API. Who asks is about to use the bundle, so it is kept from the collector for a while.
func (s bundleService) HasBundle(ctx context.Context, req *pb.HasBundleRequest) (*pb.HasBundleResponse, error) {
	if err := s.mayRead(ctx, req.GetDigest()); err != nil {
		return nil, err
	}
	has, err := s.hasBundle(ctx, req.GetDigest())
	return &pb.HasBundleResponse{Present: has}, err
}

func (h *Hub) hasBundle(ctx context.Context, digest string) (bool, error) {
	release, err := h.holdBundles()
	if err != nil {
		return false, err
	}
	defer release()
	if _, err := h.db.Bundle(ctx, digest); err != nil {
		if problem.CodeOf(err) == problem.NotFound {
			err = nil
		}
		return false, err
	}
	now := time.Now()
	if err := os.Chtimes(h.bundlePath(digest), now, now); errors.Is(err, fs.ErrNotExist) {
		return false, nil // a store that came from a copy; it is to be uploaded again
	} else if err != nil {
		return false, err
	}
	return true, nil
}

// maxPacked is the most bytes of a packed bundle that an upload may bring: what cannot be compressed becomes a little larger.
// What it unpacks to has limits of its own.
const maxPacked = bundle.DefaultMaxBytes + bundle.DefaultMaxBytes/64

// upload gives the file of a caller's upload, which nobody else touches until unlock is called.
func (s bundleService) upload(ctx context.Context, digest string) (path string, unlock func(), err error) {
	who, err := caller(ctx, pki.KindUser)
	if err != nil {
		return "", nil, err
	}
	if err := checkDigest(digest); err != nil {
		return "", nil, err
	}
	path = filepath.Join(s.dir, "bundles", uploadPrefix+hexOf(digest)+uploadsOf(who.Name))
	unlock, err = s.locks.Lock(ctx, path)
	return path, unlock, err
}

const uploadPrefix = ".upload-"

// uploadsOf is how the names of a user's uploads end.
func uploadsOf(user string) string {
	sum := sha256.Sum256([]byte(user))
	return "-" + hex.EncodeToString(sum[:8])
}

// What of a user's may lie at the hub that is not whole yet. One to which nothing was added for justUsed gives way to new ones.
const (
	maxUploads     = 16
	maxUploadBytes = 4 * maxPacked
	uploadStep     = 64 << 20 // an upload's first byte, and each that many on, is taken if there is room
)

// makeRoom refuses an upload of the caller's that is to have so many bytes, if there would be too much with what else they have begun.
// Nobody begins another one of theirs until what it gives is called.
func (s bundleService) makeRoom(ctx context.Context, digest string, bytes int64) (_ func(), err error) {
	who, err := caller(ctx, pki.KindUser)
	if err != nil {
		return nil, err
	}
	dir, mine := filepath.Join(s.dir, "bundles"), uploadsOf(who.Name)
	unlock, err := s.locks.Lock(ctx, filepath.Join(dir, uploadPrefix+mine))
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			unlock()
		}
	}()
	es, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var others []fs.FileInfo
	for _, e := range es {
		if !strings.HasPrefix(e.Name(), uploadPrefix) || !strings.HasSuffix(e.Name(), mine) || e.Name() == uploadPrefix+hexOf(digest)+mine {
			continue
		}
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue // it is finished
		}
		if err != nil {
			return nil, err
		}
		others = append(others, info)
		bytes += info.Size()
	}
	slices.SortFunc(others, func(a, b fs.FileInfo) int { return a.ModTime().Compare(b.ModTime()) })
	for ; len(others) >= maxUploads || bytes > maxUploadBytes; others = others[1:] {
		if len(others) == 0 || time.Since(others[0].ModTime()) < justUsed {
			return nil, problem.New(problem.Denied, fmt.Sprintf("wait until they are finished; one to which nothing is added for %s gives way", job.Duration(justUsed)),
				"the unfinished uploads of %s at the hub may be %d, and have %s together", who, maxUploads, human.IBytes(maxUploadBytes))
		}
		if err := s.dropUpload(ctx, filepath.Join(dir, others[0].Name())); err != nil {
			return nil, err
		}
		bytes -= others[0].Size()
	}
	return unlock, nil
}

// dropUpload removes an upload that nobody goes on with.
func (s bundleService) dropUpload(ctx context.Context, path string) error {
	unlock, err := s.locks.Lock(ctx, path)
	if err != nil {
		return err
	}
	defer unlock()
	if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// FindUpload implements the API.
func (s bundleService) FindUpload(ctx context.Context, req *pb.FindUploadRequest) (*pb.FindUploadResponse, error) {
	path, unlock, err := s.upload(ctx, req.GetDigest())
	if err != nil {
		return nil, err
	}
	defer unlock()
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return &pb.FindUploadResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	h := sha256.New()
	n, err := io.Copy(h, ctxReader{ctx, f})
	return &pb.FindUploadResponse{Offset: n, PrefixDigest: "sha256:" + hex.EncodeToString(h.Sum(nil))}, err
}

// ctxReader reads until a context ends.
type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (r ctxReader) Read(p []byte) (int, error) {
	if r.ctx.Err() != nil {
		return 0, context.Cause(r.ctx)
	}
	return r.r.Read(p)
}

// UploadBundle implements the API. What it answers is on disk.
func (s bundleService) UploadBundle(ctx context.Context, req *pb.UploadBundleRequest) (_ *pb.UploadBundleResponse, err error) {
	at, data := req.GetOffset(), req.GetData()
	end := at + int64(len(data))
	if at < 0 || end > maxPacked {
		return nil, problem.New(problem.BundleInvalid, "leave data out of the app's directory, with exclude of [tool.pergola]", "a packed bundle may have %s at most", human.IBytes(maxPacked))
	}
	if at == 0 || at/uploadStep != end/uploadStep {
		unlock, err := s.makeRoom(ctx, req.GetDigest(), end)
		if err != nil {
			return nil, err
		}
		defer unlock()
	}
	path, unlock, err := s.upload(ctx, req.GetDigest())
	if err != nil {
		return nil, err
	}
	defer unlock()
	flags := os.O_RDWR
	if at == 0 {
		flags |= os.O_CREATE
	}
	f, err := os.OpenFile(path, flags, 0o600)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, problem.New(problem.Exists, "ask for the offset again", "the hub has nothing of the upload, and cannot go on at %d", at)
	}
	if err != nil {
		return nil, diskProblem(err)
	}
	defer func() {
		if e := f.Close(); err == nil {
			err = diskProblem(e)
		}
	}()
	if at == 0 {
		if err := f.Truncate(0); err != nil {
			return nil, diskProblem(err)
		}
	}
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	have := info.Size()
	if at > have {
		return nil, problem.New(problem.Exists, "ask for the offset again", "the hub has %d bytes of the upload, and cannot go on at %d", have, at)
	}
	if skip := have - at; skip < int64(len(data)) {
		if _, err := f.WriteAt(data[skip:], have); err != nil {
			return nil, diskProblem(errors.Join(err, f.Truncate(have)))
		}
		have = end
	}
	if err := f.Sync(); err != nil {
		return nil, diskProblem(err)
	}
	return &pb.UploadBundleResponse{Offset: have}, nil
}

// FinishUpload implements the API.
func (s bundleService) FinishUpload(ctx context.Context, req *pb.FinishUploadRequest) (*pb.FinishUploadResponse, error) {
	digest := req.GetDigest()
	path, unlock, err := s.upload(ctx, digest)
	if err != nil {
		return nil, err
	}
	defer unlock()
	unlockBundle, err := s.locks.Lock(ctx, digest) // another user may finish the same one
	if err != nil {
		return nil, err
	}
	defer unlockBundle()
	has, err := s.hasBundle(ctx, digest)
	if err != nil {
		return nil, err
	}
	if has {
		b, err := s.db.Bundle(ctx, digest)
		if err != nil {
			return nil, err
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		return &pb.FinishUploadResponse{Digest: digest, SizeBytes: b.Size}, nil
	}
	from := path
	if !exists(path) && exists(s.bundlePath(digest)) {
		from = s.bundlePath(digest) // a call before this one came so far
	}
	size, err := s.check(from, digest)
	if problem.CodeOf(err) == problem.BundleInvalid {
		err = errors.Join(err, os.Remove(from)) // nothing can be made of it
	}
	if err != nil {
		return nil, diskProblem(err)
	}
	release, err := s.holdBundles()
	if err != nil {
		return nil, err
	}
	defer release()
	if err := os.Rename(from, s.bundlePath(digest)); err != nil {
		return nil, diskProblem(err)
	}
	if err := syncDir(filepath.Dir(path)); err != nil {
		return nil, err
	}
	if err := s.db.PutBundle(ctx, digest, size, time.Now()); err != nil {
		return nil, err
	}
	return &pb.FinishUploadResponse{Digest: digest, SizeBytes: size}, nil
}

// check unpacks an upload, or only looks through it where that has been done before.
func (h *Hub) check(path, digest string) (size int64, err error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, problem.New(problem.NotFound, "upload it first", "the hub has nothing of bundle %s", digest)
	}
	if err != nil {
		return 0, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	if _, err := os.Stat(h.bundleDir(digest)); err == nil {
		_, err := bundle.Check(f, digest, bundle.Limits{})
		return info.Size(), err
	}
	_, err = bundle.Extract(f, h.bundleDir(digest), digest, bundle.Limits{})
	return info.Size(), err
}

// unpacked makes sure that a bundle's folder is there for the hub's own runner.
func (h *Hub) unpacked(ctx context.Context, digest string) error {
	unlock, err := h.locks.Lock(ctx, digest)
	if err != nil {
		return err
	}
	defer unlock()
	release, err := h.holdBundles()
	if err != nil {
		return err
	}
	defer release()
	dir := h.bundleDir(digest)
	now := time.Now()
	if err := os.Chtimes(dir, now, now); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.Open(h.bundlePath(digest))
	if errors.Is(err, fs.ErrNotExist) {
		return problem.New(problem.NotFound, "submit the app again", "the hub has lost the bundle %s", digest)
	}
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = bundle.Extract(f, dir, digest, bundle.Limits{})
	return err
}

// holdBundles keeps collectors, in this process and in others, from removing bundles until release is called: between the
// look whether one is there and the job that needs it nothing may go.
func (h *Hub) holdBundles() (release func(), err error) {
	release, err = keyed.File(bundleLock(h.dir), true)
	return release, diskProblem(err)
}

func bundleLock(dir string) string { return filepath.Join(dir, "bundles", ".lock") }

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// DownloadBundle implements the API.
func (s bundleService) DownloadBundle(ctx context.Context, req *pb.DownloadBundleRequest, out pergolav1connect.BundleServiceDownloadBundleServerStream) error {
	if err := s.mayRead(ctx, req.GetDigest()); err != nil {
		return err
	}
	f, err := os.Open(s.bundlePath(req.GetDigest()))
	if err != nil {
		return problem.New(problem.NotFound, "upload it first", "the hub has no bundle %s", req.GetDigest())
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	return sendFrom(f, req.GetOffset(), info.Size(), "bundle "+req.GetDigest(), func(data []byte) error {
		return out.Send(&pb.DownloadBundleResponse{Data: data})
	})
}

// sendFrom sends what there is of a file from an offset on. What says what it is.
func sendFrom(r io.ReaderAt, offset, size int64, what string, send func([]byte) error) error {
	if offset < 0 || offset > size {
		return problem.New(problem.Usage, "begin at 0", "%s has %d bytes, and cannot be sent from byte %d on", what, size, offset)
	}
	in := io.NewSectionReader(r, offset, size-offset)
	buf := make([]byte, api.MaxChunk)
	for {
		n, err := io.ReadFull(in, buf)
		if n > 0 {
			if err := send(buf[:n]); err != nil {
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
