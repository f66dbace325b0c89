package cli

import (
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/pergolafl/pergola/internal/flower"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/localrun"
	"github.com/pergolafl/pergola/internal/nvflare"
	"github.com/pergolafl/pergola/internal/problem"
)

// input gives how an app is made of what the user named: nil if that is a directory, or nothing that could be an app, which
// whoever loads it says.
func input(arg string) (*localrun.Input, error) {
	info, err := os.Stat(arg)
	switch {
	case err != nil:
		return nil, nil //nolint:nilerr // see above
	case info.Mode().IsRegular() && isZip(arg):
		name := strings.TrimSuffix(filepath.Base(arg), ".fab")
		return &localrun.Input{Name: name, Shown: arg, Write: func(dir string) error { return flower.UnpackFAB(arg, dir) }}, nil
	case !info.IsDir() || !nvflare.Is(arg):
		return nil, nil
	}
	j, err := loadJob(arg)
	if err != nil {
		return nil, err
	}
	return &localrun.Input{Name: filepath.Base(j.Dir), Shown: j.AppDir, Write: j.Write, Warnings: j.Warnings}, nil
}

// isZip tells whether a file is meant to be a FAB: by its name, or by how it begins.
func isZip(path string) bool {
	if strings.HasSuffix(strings.ToLower(path), ".fab") {
		return true
	}
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	var head [4]byte
	_, err = io.ReadFull(f, head[:])
	return err == nil && string(head[:]) == "PK\x03\x04"
}

// loadJob reads a job folder, and finds what is wrong with its app and with the settings while messages can name the files
// that the user has.
func loadJob(dir string) (*nvflare.Job, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	j, err := nvflare.Load(filepath.Clean(dir))
	if err != nil {
		return nil, err
	}
	app, err := flower.LoadApp(j.AppDir)
	if err != nil {
		return nil, err
	}
	spec, err := job.ParseSpec([]byte(j.Settings.TOML()), "what is to be [tool.pergola], made of "+abs)
	if err != nil {
		return nil, err
	}
	if err := app.Override(spec.RunConfig); err != nil {
		p := *problem.From(err)
		p.Msg = "run_config of the job folder " + j.Dir + ": " + p.Msg
		return nil, &p
	}
	return j, nil
}

// completeApp offers directories, and FABs below the one that is being typed.
func completeApp(_ *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	// Error: the pattern is well-formed unless what is typed is not; then there is nothing to offer.
	fabs, _ := filepath.Glob(typed + "*.fab")
	if len(fabs) == 0 {
		return nil, cobra.ShellCompDirectiveFilterDirs
	}
	dirs, _ := filepath.Glob(typed + "*/") // as above
	return append(fabs, dirs...), cobra.ShellCompDirectiveNoSpace | cobra.ShellCompDirectiveNoFileComp
}
