package runner

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/pergolafl/pergola/internal/flower"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/problem"
)

// Reference row 25: the guard there was a plain prefix test, and looked for links at the path's last part only.
func TestPredeployed(t *testing.T) {
	for _, c := range []struct {
		name string
		ask  string // "" = ct/app
		root string // "" = the folder
		prep func(root string) error
		want string // in what and next; "" = it is taken
	}{
		{name: "as it should be"},
		{name: "a folder for apps that is reached by a link is the administrator's choice", root: "link"},
		{name: "no folder is configured", root: "-", want: "no folder for apps is configured there; next: name a folder there: apps = "},
		{name: "a relative folder", root: "apps", want: "is not absolute"},
		{name: "a folder that is not there", root: "/nowhere/apps", want: "the folder for apps cannot be used"},
		{name: "an absolute path", ask: "/etc", want: "not a path below"},
		{name: "up and away", ask: "ct/../../secret", want: "not a path below"},
		{name: "up and back", ask: "../apps/ct/app", want: "not a path below"},
		{name: "the folder itself", ask: ".", want: "not a path below"},
		{name: "an empty part", ask: "ct//app", want: "not a path below"},
		{name: "a name that begins as the folder does", ask: "../apps-of-others/app", want: "not a path below"},
		{name: "nothing there", ask: "ct/none", want: "no such file or directory; next: put the app there"},
		{name: "a file", ask: "ct/app/pyproject.toml", want: "is not a folder"},
		{
			name: "a link at the end", ask: "ct/other", want: "ct/other is a symbolic link",
			prep: func(root string) error { return os.Symlink("app", filepath.Join(root, "ct/other")) },
		},
		{
			name: "a link on the way", ask: "also/app", want: "also is a symbolic link",
			prep: func(root string) error { return os.Symlink("ct", filepath.Join(root, "also")) },
		},
		{
			name: "a link within the app", want: "app/data.py is a symbolic link",
			prep: func(root string) error { return os.Symlink("/etc/passwd", filepath.Join(root, "ct/app/data.py")) },
		},
		{
			name: "a part that others may write to", want: "may be written by others than its owner (mode 0777); next: take the others' right",
			prep: func(root string) error { return os.Chmod(filepath.Join(root, "ct"), 0o777) },
		},
		{
			name: "a file that the group may write to", want: "may be written by others",
			prep: func(root string) error { return os.Chmod(filepath.Join(root, "ct/app/pyproject.toml"), 0o664) },
		},
		{
			name: "a folder for apps that others may write to", want: "may be written by others",
			prep: func(root string) error { return os.Chmod(root, 0o1777) },
		},
		{
			name: "something else than a file", want: "neither a file nor a folder",
			prep: func(root string) error { return syscall.Mkfifo(filepath.Join(root, "ct/app/pipe"), 0o600) },
		},
		{
			name: "a file of another user", want: "belongs to user 65534",
			prep: func(root string) error { return os.Lchown(filepath.Join(root, "ct/app/pyproject.toml"), 65534, -1) },
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			base := t.TempDir()
			root := filepath.Join(base, "apps")
			if err := os.MkdirAll(filepath.Join(root, "ct", "app"), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(root, "ct/app/pyproject.toml"), nil, 0o644); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink("apps", filepath.Join(base, "link")); err != nil {
				t.Fatal(err)
			}
			if c.prep != nil {
				if err := c.prep(root); os.IsPermission(err) {
					t.Skip(err) // only root can give files away
				} else if err != nil {
					t.Fatal(err)
				}
			}
			ask, from := c.ask, root
			if ask == "" {
				ask = "ct/app"
			}
			switch c.root {
			case "":
			case "-":
				from = ""
			case "link":
				from = filepath.Join(base, "link")
			default:
				from = c.root
			}
			dir, err := predeployed(from, ask)
			if c.want == "" {
				if err != nil || dir != filepath.Join(root, "ct", "app") {
					t.Errorf("%q, %v", dir, err)
				}
				return
			}
			if problem.CodeOf(err) != problem.AppInvalid || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want %q", err, c.want)
			}
		})
	}
}

// Which party's key counts for which generation.
func TestAppPathOfASite(t *testing.T) {
	spec := job.Spec{Site: job.Site{AppPath: "ct/app"}}
	r := &runner{spec: Spec{Party: "st-anna", Spec: spec, Apps: t.TempDir()}}
	_, _, err := r.source(nil, "bundle", &flower.Installation{Version: "1.30.0", Caps: flower.Caps{Generation: flower.GenControl}})
	if problem.CodeOf(err) != problem.AppInvalid || !strings.Contains(err.Error(), `site.app-path = "ct/app" has no effect at st-anna: with Flower 1.30.0 the sites get the app from the hub; next: use server.app-path`) {
		t.Error(err)
	}
	_, _, err = r.source(nil, "bundle", &flower.Installation{Version: "1.12.0", Caps: flower.Caps{Generation: flower.GenDriver}})
	if problem.CodeOf(err) != problem.AppInvalid || !strings.Contains(err.Error(), `site.app-path = "ct/app" cannot be used at st-anna: it cannot be read`) {
		t.Error(err)
	}
	r.spec.Party = job.HubParty // what is said for sites is not the hub's
	if _, dir, err := r.source(nil, "bundle", nil); dir != "bundle" || err != nil {
		t.Errorf("%q, %v", dir, err)
	}
}
