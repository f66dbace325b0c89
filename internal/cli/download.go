package cli

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	human "github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/pergolafl/pergola/internal/api"
	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
	"github.com/pergolafl/pergola/internal/problem"
)

func newDownload(e env) *cobra.Command {
	h := &hubCommand{env: e}
	var out string
	var list bool
	c := &cobra.Command{
		Use: "download JOB [PATTERN...]", Short: "Fetch the results and logs of a job that is over",
		Long: `Download fetches what a job has left at the hub: results/, what its server app wrote and the metrics of all parties, and logs/.
A PATTERN chooses files by their path or by their last name: 'results/*', '*.npz'; a folder's name stands for all below it.
Each file's checksum (SHA-256) is compared with the hub's. A download that was cut short goes on where it was when it is repeated
with the same --out, and files that are there already and right are left alone. A hub that is away for a while is waited for.`,
		Example: "  pergola download 01k9\n  pergola download 01k9 'results/*.npz' --out models\n  pergola download 01k9 --list --json",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return problem.New(problem.Usage, "give a job's id, or the beginning of it", "no job was given")
			}
			return nil
		},
		ValidArgsFunction: completeFiles,
		RunE: func(cmd *cobra.Command, args []string) error {
			for _, p := range args[1:] {
				if _, err := path.Match(p, ""); err != nil || p == "" {
					return problem.New(problem.Usage, `write patterns like "*.npz" or "results/*"`, "%q is not a pattern", p)
				}
			}
			return h.with(cmd.Context(), func(ctx context.Context, c *api.Client) error {
				j, files, err := leftFiles(ctx, c, args[0], args[1:])
				if err != nil {
					return err
				}
				if list {
					return h.listFiles(files)
				}
				if len(files) == 0 && len(args) > 1 {
					return problem.New(problem.NotFound, "see what there is with: pergola download --list "+j.GetId(), "the job has left no file that matches %s", strings.Join(args[1:], " "))
				}
				dir := cmp.Or(out, j.GetName()+"-"+j.GetId())
				d := &download{hubCommand: h, c: c, job: j.GetId(), count: len(files), tty: !h.json && isTerminal(e.stderr)}
				for _, f := range files {
					d.total += f.GetSizeBytes()
				}
				if len(files) > 0 {
					if err := d.fetch(ctx, dir, files); err != nil {
						return err
					}
				}
				if h.json {
					return printList(e.stdout, files)
				}
				if len(files) == 0 {
					fmt.Fprintln(e.stderr, "the job has left no files")
					return nil
				}
				_, err = fmt.Fprintln(e.stdout, dir)
				return err
			})
		},
	}
	c.Flags().StringVarP(&out, "out", "o", "", "directory for the files (default ./NAME-JOB)")
	c.Flags().BoolVar(&list, "list", false, "only list them")
	must(c.MarkFlagDirname("out"))
	return h.add(c, "the files as a JSON list")
}

// leftFiles gives the files of a job that match one of the patterns; all without any.
func leftFiles(ctx context.Context, c *api.Client, id string, patterns []string) (*pb.Job, []*pb.ResultFile, error) {
	var job *pb.GetJobResponse
	var all *pb.ListResultsResponse
	err := again(ctx, func() (err error) {
		if job, err = c.Jobs.GetJob(ctx, &pb.GetJobRequest{Id: id}); err == nil {
			all, err = c.Jobs.ListResults(ctx, &pb.ListResultsRequest{Id: job.GetJob().GetId()})
		}
		return err
	})
	var files []*pb.ResultFile
	for _, f := range all.GetFiles() {
		if chosen(f.GetPath(), patterns) {
			files = append(files, f)
		}
	}
	return job.GetJob(), files, err
}

// chosen tells whether a file is meant: by its path, its last name, or a folder that it is in.
func chosen(file string, patterns []string) bool {
	for _, p := range patterns {
		p = strings.TrimSuffix(p, "/")
		if ok, err := path.Match(p, path.Base(file)); err == nil && ok {
			return true
		}
		for f := file; f != "."; f = path.Dir(f) {
			if ok, err := path.Match(p, f); err == nil && ok {
				return true
			}
		}
	}
	return len(patterns) == 0
}

// completeFiles completes a job's id, and behind it the files that the job has left.
func completeFiles(cmd *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
	if len(args) == 0 {
		return completeJobs(cmd, args, typed)
	}
	return fromHub(cmd, func(ctx context.Context, c *api.Client) ([]string, error) {
		_, files, err := leftFiles(ctx, c, args[0], nil)
		var out []string
		for _, f := range files {
			if strings.HasPrefix(f.GetPath(), typed) {
				out = append(out, f.GetPath())
			}
		}
		return out, err
	})
}

func (h *hubCommand) listFiles(files []*pb.ResultFile) error {
	if h.json {
		return printList(h.stdout, files)
	}
	tw := tabwriter.NewWriter(h.stdout, 0, 4, 2, ' ', 0)
	fmt.Fprintln(tw, "FILE\tBYTES\tCHECKSUM")
	for _, f := range files {
		fmt.Fprintf(tw, "%s\t%d\t%s\n", f.GetPath(), f.GetSizeBytes(), f.GetDigest())
	}
	return tw.Flush()
}

// download brings files of a job into a folder.
type download struct {
	*hubCommand
	c     *api.Client
	job   string
	count int
	total int64
	tty   bool

	n     int   // files that are there
	have  int64 // their bytes
	shown time.Time
}

// partSuffix is on the name of a file that is not whole yet.
const partSuffix = ".part"

func (d *download) fetch(ctx context.Context, dir string, files []*pb.ResultFile) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return d.local(err, dir)
	}
	// Nothing is written outside of the folder, whatever the hub's names are and whatever links are in it.
	root, err := os.OpenRoot(dir)
	if err != nil {
		return d.local(err, dir)
	}
	defer root.Close()
	for _, f := range files {
		if !filepath.IsLocal(filepath.FromSlash(f.GetPath())) {
			return problem.New(problem.Denied, "ask the hub's operator", "the hub offers a file named %q", f.GetPath())
		}
	}
	for _, f := range files {
		if err := d.one(ctx, root, dir, f); err != nil {
			d.clear()
			return err
		}
		d.n++
		d.have += f.GetSizeBytes()
		if !d.json {
			d.clear()
			fmt.Fprintf(d.stderr, "%s (%d bytes)\n", f.GetPath(), f.GetSizeBytes())
		}
	}
	return nil
}

// local says what is wrong with this machine's disk.
func (d *download) local(err error, dir string) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return problem.Wrap(err, problem.DiskFull, fmt.Sprintf("make room (%s in all), and repeat the command: it goes on where it was", human.IBytes(uint64(max(d.total, 0)))), "no space is left in %s", dir)
	}
	return problem.Wrap(err, problem.Usage, "choose another directory with --out", "cannot write to %s", dir)
}

// one brings one file, checked.
func (d *download) one(ctx context.Context, root *os.Root, dir string, f *pb.ResultFile) error {
	to := filepath.FromSlash(f.GetPath())
	if sum, err := digest(root, to); err == nil && sum == f.GetDigest() {
		return nil
	}
	if err := root.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return d.local(err, dir)
	}
	part, err := root.OpenFile(to+partSuffix, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return d.local(err, dir)
	}
	defer part.Close()
	info, err := part.Stat()
	if err == nil && info.Size() > f.GetSizeBytes() {
		err = part.Truncate(0)
	}
	if err != nil {
		return d.local(err, dir)
	}
	if err := d.bytes(ctx, part, f, dir); err != nil {
		return err
	}
	if err := part.Sync(); err != nil {
		return d.local(err, dir)
	}
	sum, err := digest(root, to+partSuffix)
	if err != nil {
		return d.local(err, dir)
	}
	if sum != f.GetDigest() {
		if err := root.Remove(to + partSuffix); err != nil {
			return d.local(err, dir)
		}
		return problem.New(problem.Internal, "download it again", "%s arrived with the checksum %s; the hub says %s", f.GetPath(), sum, f.GetDigest())
	}
	if err := root.Rename(to+partSuffix, to); err != nil {
		return d.local(err, dir)
	}
	return nil
}

// bytes fetches what part lacks, over as many connections as it takes while something comes.
func (d *download) bytes(ctx context.Context, part *os.File, f *pb.ResultFile, dir string) error {
	for {
		came := false
		err := again(ctx, func() error {
			at, err := part.Seek(0, io.SeekEnd)
			if err != nil {
				return d.local(err, dir)
			}
			if at == f.GetSizeBytes() {
				return nil
			}
			s, err := d.c.Jobs.DownloadResult(ctx, &pb.DownloadResultRequest{Id: d.job, Path: f.GetPath(), Offset: at})
			if err != nil {
				return err
			}
			defer s.Close()
			for {
				m, err := s.Receive()
				if errors.Is(err, io.EOF) {
					return nil
				}
				if err != nil {
					if !isProblem(err) {
						err = &problem.Error{Code: problem.HubUnreachable, Msg: "the connection to the hub broke", Err: err, Next: "repeat the command: it goes on where it was"}
					}
					return err
				}
				n, err := part.Write(m.GetData())
				at, came = at+int64(n), true
				if err != nil {
					return d.local(err, dir)
				}
				d.show(f.GetPath(), at)
			}
		})
		if err == nil || !came || ctx.Err() != nil || problem.CodeOf(err) != problem.HubUnreachable {
			return err
		}
	}
}

func isProblem(err error) bool {
	_, ok := errors.AsType[*problem.Error](err)
	return ok
}

// show says on a terminal how far it is.
func (d *download) show(name string, at int64) {
	if !d.tty || time.Since(d.shown) < 200*time.Millisecond {
		return
	}
	d.shown = time.Now()
	fmt.Fprintf(d.stderr, "\r\x1b[K%d of %d files, %s of %s: %s", d.n+1, d.count, human.IBytes(uint64(max(d.have+at, 0))), human.IBytes(uint64(max(d.total, 0))), clip(name, 40))
}

func (d *download) clear() {
	if d.tty {
		fmt.Fprint(d.stderr, "\r\x1b[K")
	}
}

func digest(root *os.Root, name string) (string, error) {
	f, err := root.Open(name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return "sha256:" + hex.EncodeToString(h.Sum(nil)), nil
}
