package site

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/bundle"
	"github.com/pergolafl/pergola/internal/keyed"
	"github.com/pergolafl/pergola/internal/problem"
)

// A bundle is fetched as it was packed into bundles/HEX.part, of which a cut costs what was on its way, and unpacked to
// bundles/HEX, which all jobs of it share. The packed file goes then.

func (a *Agent) bundleDir(digest string) string {
	return filepath.Join(a.dir, "bundles", strings.TrimPrefix(digest, "sha256:"))
}

const partSuffix = ".part"

// useBundle notes that a bundle is used now, so that it is not collected. It tells whether it is there.
func (a *Agent) useBundle(dst string) (bool, error) {
	unlock, err := keyed.File(bundleLock(a.dir), true)
	if err != nil {
		return false, err
	}
	defer unlock()
	now := time.Now()
	err = os.Chtimes(dst, now, now)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// fetch gives the folder of the unpacked bundle. Jobs of one bundle fetch it once; those of others are not held up.
func (p *part) fetch(ctx context.Context, digest string) (string, error) {
	a := p.agent
	dst := a.bundleDir(digest)
	if filepath.Dir(dst) != filepath.Join(a.dir, "bundles") || !filepath.IsLocal(filepath.Base(dst)) {
		return "", problem.New(problem.BundleInvalid, "", "%q is no digest", digest)
	}
	unlock, err := a.locks.Lock(ctx, digest)
	if err != nil {
		return "", err
	}
	defer unlock()
	if has, err := a.useBundle(dst); has || err != nil {
		return dst, err
	}
	for try := 0; ; try++ {
		resumed, err := p.download(ctx, digest, dst+partSuffix)
		if err != nil {
			return "", err
		}
		err = unpack(dst+partSuffix, dst, digest)
		if err == nil || problem.CodeOf(err) == problem.BundleInvalid {
			err = errors.Join(err, os.Remove(dst+partSuffix))
		}
		// What an earlier agent has left may have been damaged with the power.
		if problem.CodeOf(err) == problem.BundleInvalid && resumed && try == 0 {
			p.log.Warn("a bundle that was fetched in pieces is damaged, and is fetched again", "err", err)
			continue
		}
		return dst, err
	}
}

// download brings the packed bundle into a file, going on where that ends. It tells whether there was anything of it.
func (p *part) download(ctx context.Context, digest, path string) (resumed bool, err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return false, err
	}
	defer func() {
		if e := f.Close(); err == nil {
			err = e
		}
	}()
	at, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return false, err
	}
	resumed = at > 0
	_, err = retry(ctx, p.log, final, func() (struct{}, error) {
		s, err := p.agent.client.Bundles.DownloadBundle(ctx, &pb.DownloadBundleRequest{Digest: digest, Offset: at})
		if err != nil {
			return struct{}{}, err
		}
		defer s.Close()
		for {
			m, err := s.Receive()
			if errors.Is(err, io.EOF) {
				return struct{}{}, nil
			}
			if at > 0 && problem.CodeOf(err) == problem.Usage {
				// The hub's is shorter: packed anew by another version. From the beginning, then.
				resumed, at = false, 0
				if _, err := f.Seek(0, io.SeekStart); err != nil {
					return struct{}{}, problem.From(err)
				}
				return struct{}{}, errors.Join(fmt.Errorf("begin the bundle anew: %s", problem.From(err).Msg), f.Truncate(0)) // no problem: it is tried again
			}
			if err != nil {
				return struct{}{}, err
			}
			n, err := f.Write(m.GetData())
			at += int64(n)
			if err != nil {
				return struct{}{}, problem.From(p.disk(err)) // asking the hub again is of no use
			}
		}
	})
	return resumed, err
}

func unpack(path, dst, digest string) (err error) {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = bundle.Extract(f, dst, digest, bundle.Limits{})
	return err
}
