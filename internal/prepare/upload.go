package prepare

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/cenkalti/backoff/v5"
	human "github.com/dustin/go-humanize"
	"golang.org/x/sync/errgroup"

	"github.com/pergolafl/pergola/internal/api"
	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/bundle"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/problem"
)

const (
	// uploadPatience is how long nothing may move while a bundle is brought to a hub that cannot be reached.
	uploadPatience = 5 * time.Minute
	tellEvery      = 5 * time.Second
)

// Upload brings a bundle to the hub, unless that has it. What the hub has of it on disk, from an earlier call that was cut
// short, by whatever, is not sent again; of each cut that is api.MaxUpload at most. tell, if there is one, hears how far it is.
func Upload(ctx context.Context, c *api.Client, packed *bundle.Bundle, tell func(kind string, body any)) error {
	has, err := c.Bundles.HasBundle(ctx, &pb.HasBundleRequest{Digest: packed.Digest})
	if err != nil || has.GetPresent() {
		return err
	}
	u := &upload{c: c, packed: packed, tell: tell, told: time.Now()}
	for try := 0; ; try++ {
		err := u.once(ctx)
		// Another upload of the same user may have been at it, or the hub has lost the end of it with its power; and a bundle that
		// was put together from pieces of two versions' packing is no bundle. From the beginning, then, once.
		again := problem.CodeOf(err) == problem.Exists || problem.CodeOf(err) == problem.BundleInvalid && u.resumed
		if err == nil || !again || try == 2 {
			return err
		}
	}
}

type upload struct {
	c       *api.Client
	packed  *bundle.Bundle
	tell    func(kind string, body any)
	told    time.Time
	resumed bool // it goes on where an earlier one was cut
}

// once packs the bundle from its beginning and sends what the hub has not.
func (u *upload) once(ctx context.Context) error {
	found, err := patiently(ctx, func() (*pb.FindUploadResponse, error) {
		return u.c.Bundles.FindUpload(ctx, &pb.FindUploadRequest{Digest: u.packed.Digest})
	})
	if err != nil {
		return err
	}
	sent, err := u.send(ctx, found.GetOffset(), found.GetPrefixDigest())
	if errors.Is(err, errOtherBytes) { // another version packed that; the bundle is the same
		sent, err = u.send(ctx, 0, "")
	}
	if err != nil {
		return err
	}
	u.say("all %s of the bundle are at the hub, which looks through them", human.IBytes(uint64(sent)))
	_, err = patiently(ctx, func() (*pb.FinishUploadResponse, error) {
		return u.c.Bundles.FinishUpload(ctx, &pb.FinishUploadRequest{Digest: u.packed.Digest})
	})
	return err
}

// errOtherBytes says that what the hub has is not how this upload begins.
var errOtherBytes = errors.New("the hub has other bytes")

// send sends the packed bundle from an offset on; what lies before has to have the digest.
func (u *upload) send(ctx context.Context, from int64, digest string) (size int64, err error) {
	pr, pw := io.Pipe()
	var g errgroup.Group
	g.Go(func() error {
		err := u.packed.Write(pw)
		pw.CloseWithError(err) // nil: end of file
		return err
	})
	size, err = u.pieces(ctx, pr, from, digest)
	_ = pr.Close() // never fails
	if e := g.Wait(); e != nil && !errors.Is(e, io.ErrClosedPipe) {
		return size, e
	}
	return size, err
}

func (u *upload) pieces(ctx context.Context, r io.Reader, from int64, digest string) (at int64, err error) {
	if from > 0 {
		h := sha256.New()
		n, err := io.CopyN(h, r, from)
		if errors.Is(err, io.EOF) || err == nil && "sha256:"+hex.EncodeToString(h.Sum(nil)) != digest {
			return n, errOtherBytes
		}
		if err != nil {
			return n, err
		}
		u.say("%s of the bundle are at the hub already", human.IBytes(uint64(from)))
	}
	u.resumed = from > 0
	buf := make([]byte, api.MaxUpload)
	for at = from; ; {
		n, err := io.ReadFull(r, buf)
		if n > 0 {
			res, e := patiently(ctx, func() (*pb.UploadBundleResponse, error) {
				return u.c.Bundles.UploadBundle(ctx, &pb.UploadBundleRequest{Digest: u.packed.Digest, Offset: at, Data: buf[:n]})
			})
			if e != nil {
				return at, e
			}
			if at += int64(n); res.GetOffset() != at {
				return at, problem.New(problem.Exists, "submit the app again", "somebody else uploads the same bundle as the same user")
			}
			if time.Since(u.told) > tellEvery {
				u.say("%s of the packed bundle are at the hub", human.IBytes(uint64(at)))
			}
		}
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return at, nil
		case err != nil:
			return at, err
		}
	}
}

// say tells of what takes long enough.
func (u *upload) say(format string, args ...any) {
	if u.tell != nil && u.packed.Manifest.Size() > 8*api.MaxUpload {
		u.told = time.Now()
		u.tell(job.KindNote, job.Text{Message: fmt.Sprintf(format, args...)})
	}
}

// patiently repeats a call that is harmless to repeat while the hub is not there.
func patiently[T any](ctx context.Context, call func() (T, error)) (T, error) {
	bo := &backoff.ExponentialBackOff{InitialInterval: 100 * time.Millisecond, Multiplier: 1.5, RandomizationFactor: 0.5, MaxInterval: 3 * time.Second}
	return backoff.Retry(ctx, func() (T, error) {
		v, err := call()
		if p, ok := errors.AsType[*problem.Error](err); ok && p.Code != problem.HubUnreachable && p.Code != problem.Unavailable && p.Code != problem.ProxyFailed {
			err = backoff.Permanent(err)
		}
		return v, err
	}, backoff.WithBackOff(bo), backoff.WithMaxElapsedTime(uploadPatience))
}
