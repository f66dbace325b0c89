package runner

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/pergolafl/pergola/internal/flower"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/problem"
)

// source gives the app that this party runs and its folder: the bundle's, or the one that the job names by app-path and
// that lies ready on this machine. The environment is the bundle's in any case.
func (r *runner) source(bundled *flower.App, dir string, inst *flower.Installation) (*flower.App, string, error) {
	name := r.spec.Spec.AppPathFor(r.spec.Party)
	if name == "" {
		return bundled, dir, nil
	}
	key := "site.app-path"
	if r.spec.IsHub() {
		key = "server.app-path"
	} else if inst.Caps.Generation > flower.GenDriver {
		return nil, "", problem.New(problem.AppInvalid, "use server.app-path, or flwr 1.12 at most",
			"site.app-path = %q has no effect at %s: with Flower %s the sites get the app from the hub", name, r.spec.Party, inst.Version)
	}
	dir, err := predeployed(r.spec.Apps, name)
	if err != nil {
		p := *problem.From(err)
		p.Msg = fmt.Sprintf("%s = %q cannot be used at %s: %s", key, name, r.spec.Party, p.Msg)
		return nil, "", &p
	}
	app, err := flower.LoadApp(dir)
	if err != nil {
		return nil, "", err
	}
	r.note(job.KindNote, job.Text{Message: fmt.Sprintf("%s runs the app %s that lies ready there (%s), not the bundle's", r.spec.Party, app.Name, name)})
	return app, dir, nil
}

// predeployed gives the folder of the app name below root, the party's own folder for such apps. What another user could
// put there or exchange is refused, and so is every symbolic link, on the way and within the app: nothing of what runs may
// come from elsewhere. Since only the party's own user and root can change what was looked at, it stays as it was.
func predeployed(root, name string) (string, error) {
	if root == "" {
		return "", problem.New(problem.AppInvalid, `name a folder there: apps = "/srv/pergola/apps" in site.toml or hub.toml`, "no folder for apps is configured there")
	}
	if !fs.ValidPath(name) || name == "." || strings.ContainsAny(name, "\\\x00") {
		return "", problem.New(problem.AppInvalid, "write it relative, with slashes, without . or ..", "it is not a path below the folder for apps")
	}
	if !filepath.IsAbs(root) {
		return "", problem.New(problem.AppInvalid, "write the absolute path for apps in site.toml or hub.toml", "the folder for apps %q is not absolute", root)
	}
	// The folder's own place is the administrator's affair.
	root, err := filepath.EvalSymlinks(root)
	if err != nil {
		return "", problem.Wrap(err, problem.AppInvalid, "make the folder, or correct apps in site.toml or hub.toml", "the folder for apps cannot be used")
	}
	dir := root
	for _, part := range append([]string{"."}, strings.Split(name, "/")...) {
		dir = filepath.Join(dir, part)
		info, err := os.Lstat(dir)
		if err != nil {
			return "", problem.Wrap(err, problem.AppInvalid, "put the app there, or correct the path", "it cannot be read")
		}
		if err := trusted(dir, info); err != nil {
			return "", err
		}
		if !info.IsDir() {
			return "", problem.New(problem.AppInvalid, "name the app's folder", "%s is not a folder", dir)
		}
	}
	return dir, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return problem.Wrap(err, problem.AppInvalid, "make the app readable for the user of Pergola", "it cannot be read")
		}
		info, err := d.Info()
		if err != nil {
			return problem.Wrap(err, problem.AppInvalid, "try again", "it was changed meanwhile")
		}
		return trusted(path, info)
	})
}

// trusted refuses what others than this process's user and root could have put there.
func trusted(path string, info fs.FileInfo) error {
	if info.Mode()&fs.ModeSymlink != 0 {
		return problem.New(problem.AppInvalid, "put the folder or file itself there", "%s is a symbolic link", path)
	}
	if mode := info.Mode(); !mode.IsRegular() && !mode.IsDir() {
		return problem.New(problem.AppInvalid, "remove it", "%s is neither a file nor a folder", path)
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Uid != 0 && int(st.Uid) != os.Geteuid() {
		return problem.New(problem.AppInvalid, fmt.Sprintf("chown it to root or to user %d", os.Geteuid()), "%s belongs to user %d", path, st.Uid)
	}
	if perm := info.Mode().Perm(); perm&0o022 != 0 {
		return problem.New(problem.AppInvalid, "take the others' right to write away: chmod -R go-w on it", "%s may be written by others than its owner (mode %#o)", path, perm)
	}
	return nil
}
