package hub

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pergolafl/pergola/internal/api"
	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/bundle"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/problem"
)

// An upload goes on at what the hub has on disk, belongs to its user, and is finished once, whatever was lost in between.
func TestUploads(t *testing.T) {
	s := serve(t)
	c, other := s.as(user), s.as(pki.Identity{Kind: pki.KindUser, Name: "other"})
	app := t.TempDir()
	if err := os.WriteFile(filepath.Join(app, "app.py"), []byte("app = 2\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	b, err := bundle.Build(app, bundle.Input{App: bundle.Meta{Name: "app", Version: "1"}, Lock: []byte("x"), Job: []byte("{}")})
	if err != nil {
		t.Fatal(err)
	}
	var packed bytes.Buffer
	if err := b.Write(&packed); err != nil {
		t.Fatal(err)
	}
	data := packed.Bytes()
	put := func(c *api.Client, at int, data []byte) (int64, problem.Code) {
		t.Helper()
		res, err := c.Bundles.UploadBundle(t.Context(), &pb.UploadBundleRequest{Digest: b.Digest, Offset: int64(at), Data: data})
		if err != nil {
			return 0, problem.CodeOf(err)
		}
		return res.GetOffset(), ""
	}
	found := func(c *api.Client) (int64, string) {
		t.Helper()
		res, err := c.Bundles.FindUpload(t.Context(), &pb.FindUploadRequest{Digest: b.Digest})
		if err != nil {
			t.Fatal(err)
		}
		return res.GetOffset(), res.GetPrefixDigest()
	}
	finish := func(c *api.Client) problem.Code {
		t.Helper()
		res, err := c.Bundles.FinishUpload(t.Context(), &pb.FinishUploadRequest{Digest: b.Digest})
		if err != nil {
			return problem.CodeOf(err)
		}
		if res.GetSizeBytes() != int64(len(data)) {
			t.Errorf("the bundle has %d bytes, want %d", res.GetSizeBytes(), len(data))
		}
		return ""
	}
	if n, _ := found(c); n != 0 {
		t.Errorf("%d bytes of nothing", n)
	}
	if code := finish(c); code != problem.NotFound {
		t.Errorf("nothing was finished: %q", code)
	}
	for _, step := range []struct {
		from, to int
		end      int64
		code     problem.Code
	}{
		{0, 10, 10, ""},
		{0, 20, 20, ""}, // from the beginning: the other is dropped
		{10, 30, 30, ""},
		{10, 20, 30, ""}, // a repetition
		{31, 40, 0, problem.Exists},
		{30, 50, 50, ""},
	} {
		if n, code := put(c, step.from, data[step.from:step.to]); n != step.end || code != step.code {
			t.Errorf("bytes %d to %d: %d, %q; want %d, %q", step.from, step.to, n, code, step.end, step.code)
		}
	}
	sum := sha256.Sum256(data[:50])
	if n, d := found(c); n != 50 || d != "sha256:"+hex.EncodeToString(sum[:]) {
		t.Errorf("the hub has %d bytes, %s", n, d)
	}
	if n, _ := found(other); n != 0 {
		t.Errorf("another user has %d bytes of it", n)
	}
	if _, code := put(c, int(maxPacked), []byte("x")); code != problem.BundleInvalid {
		t.Errorf("too large: %q", code)
	}
	if code := finish(c); code != problem.BundleInvalid {
		t.Errorf("half a bundle was finished: %q", code)
	}
	if n, _ := found(c); n != 0 {
		t.Errorf("%d bytes of what is no bundle are left", n)
	}
	for _, c := range []*api.Client{c, other} { // both at the same time
		put(c, 0, data)
	}
	for _, c := range []*api.Client{c, other, c} {
		if code := finish(c); code != "" {
			t.Errorf("finish: %q", code)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(s.dir, "bundles", uploadPrefix+"*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	// The hub was killed between the file and the store; and the unpacked folder is made again when it is needed.
	if err := s.hub.db.DeleteBundle(t.Context(), b.Digest); err != nil {
		t.Fatal(err)
	}
	if code := finish(c); code != "" {
		t.Errorf("finish what lies there: %q", code)
	}
	dir := s.hub.bundleDir(b.Digest)
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := s.hub.unpacked(t.Context(), b.Digest); err != nil {
			t.Error(err)
		}
	}
	if content, err := bundle.Read(dir); err != nil || content.Digest != b.Digest {
		t.Errorf("unpacked again: %v", err)
	}
	// A file that is gone is uploaded again, not promised.
	if err := os.Remove(s.hub.bundlePath(b.Digest)); err != nil {
		t.Fatal(err)
	}
	if res, err := c.Bundles.HasBundle(t.Context(), &pb.HasBundleRequest{Digest: b.Digest}); err != nil || res.GetPresent() {
		t.Errorf("a bundle without its file: %v, %v", res, err)
	}
}

// What a user has begun to upload and not finished has limits; what nobody goes on with gives way.
func TestUnfinishedUploads(t *testing.T) {
	s := serve(t)
	ann, bob := s.as(user), s.as(pki.Identity{Kind: pki.KindUser, Name: "bob"})
	upload := func(c *api.Client, n int, at int64) error {
		_, err := c.Bundles.UploadBundle(t.Context(), &pb.UploadBundleRequest{Digest: digestOf(n), Offset: at, Data: []byte("some")})
		return err
	}
	files := func(n int) []string {
		out, err := filepath.Glob(filepath.Join(s.dir, "bundles", uploadPrefix+hexOf(digestOf(n))+"-*"))
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	refused := func(what string, err error) {
		t.Helper()
		if problem.CodeOf(err) != problem.Denied || !strings.Contains(err.Error(), "user ann at the hub may be 16, and have 16 GiB") {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := upload(ann, 1, 4); problem.CodeOf(err) != problem.Exists || len(files(1)) > 0 {
		t.Errorf("an upload that nobody has begun goes on: %v, %v", err, files(1))
	}
	for n := range maxUploads {
		if err := upload(ann, n, 0); err != nil {
			t.Fatal(err)
		}
	}
	refused("one more", upload(ann, 100, 0))
	if len(files(100)) > 0 {
		t.Error("it has a file")
	}
	for what, err := range map[string]error{"one that goes on": upload(ann, 3, 4), "one that begins anew": upload(ann, 4, 0), "another user": upload(bob, 100, 0)} {
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	long := time.Now().Add(-justUsed - time.Minute)
	if err := os.Chtimes(files(5)[0], long, long); err != nil {
		t.Fatal(err)
	}
	if err := upload(ann, 101, 0); err != nil || len(files(5)) > 0 {
		t.Errorf("where one is given up: %v, %v", err, files(5))
	}
	if err := os.Remove(files(6)[0]); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(files(7)[0], maxUploadBytes-2); err != nil { // it has holes
		t.Fatal(err)
	}
	refused("too many bytes", upload(ann, 102, 0))
	if err := os.Truncate(files(8)[0], uploadStep-2); err != nil {
		t.Fatal(err)
	}
	refused("too many bytes of one that has begun", upload(ann, 8, uploadStep-2))
}
