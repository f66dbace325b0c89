package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/pergolafl/pergola/internal/nvflare"
	"github.com/pergolafl/pergola/internal/problem"
)

// imported is what `pergola import --json` prints.
type imported struct {
	App      string           `json:"app"` // the directory that was written
	Job      string           `json:"job"` // the job's name there
	Settings nvflare.Settings `json:"settings"`
	Warnings []string         `json:"warnings"`
}

func newImport(e env) *cobra.Command {
	var out string
	var asJSON bool
	c := &cobra.Command{
		Use:   "import JOBDIR -o APPDIR",
		Short: "Make a Flower app with its settings of a Flower job of NVIDIA FLARE",
		Long: `Import reads the job folder of a Flower job of NVIDIA FLARE and writes the equivalent app: the files of its custom folder,
and what the folder's configurations say as [tool.pergola] at the end of pyproject.toml, of which nothing else changes.
What has no effect in Pergola is named in a warning. JOBDIR is never written to.`,
		Example: `  pergola import /jobs/blood -o blood
  pergola import /jobs/blood -o blood --json
  pergola run blood`,
		Args: exactArgs(1, "a job folder"),
		RunE: func(_ *cobra.Command, args []string) error { return importJob(e, args[0], out, asJSON) },
		ValidArgsFunction: func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			if len(args) > 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			return nil, cobra.ShellCompDirectiveFilterDirs
		},
	}
	c.Flags().StringVarP(&out, "out", "o", "", "new or empty directory for the app")
	c.Flags().BoolVar(&asJSON, "json", false, "print what was made as one JSON object")
	must(c.MarkFlagDirname("out"))
	return c
}

func importJob(e env, dir, out string, asJSON bool) (err error) {
	if out == "" {
		return problem.New(problem.Usage, "name a new directory with -o", "it is not said where the app is to go")
	}
	if in, err := inside(out, dir); err == nil && in {
		return problem.New(problem.Usage, "choose one outside of it", "-o %s lies in the job folder, which is never written to", out)
	}
	switch es, err := os.ReadDir(out); {
	case err == nil && len(es) > 0:
		return problem.New(problem.Usage, "choose a new or an empty directory with -o", "%s is not empty", out)
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return problem.Wrap(err, problem.Usage, "choose a new or an empty directory with -o", "-o %s cannot be used", out)
	}
	if info, err := os.Stat(dir); err != nil || !info.IsDir() {
		return problem.New(problem.Usage, "give the folder that has meta.json in it", "%s is no folder that can be read", dir)
	}
	if _, err := os.Stat(filepath.Join(dir, "pyproject.toml")); err == nil && !nvflare.Is(dir) {
		return problem.New(problem.Usage, "run it as it is: pergola run "+dir, "%s is a Flower app already", dir)
	}
	j, err := loadJob(dir)
	if err != nil {
		return err
	}
	// Nothing half-made is left: it becomes the directory when it is whole.
	if err := os.MkdirAll(filepath.Dir(filepath.Clean(out)), 0o755); err != nil {
		return problem.Wrap(err, problem.Usage, "choose another directory with -o", "%s cannot be made", out)
	}
	tmp, err := os.MkdirTemp(filepath.Dir(filepath.Clean(out)), ".pergola-import-")
	if err != nil {
		return problem.Wrap(err, problem.Usage, "choose another directory with -o", "%s cannot be made", out)
	}
	defer func() {
		if e := os.RemoveAll(tmp); e != nil && err == nil {
			err = problem.Wrap(e, problem.Internal, "remove it by hand", "%s is left", tmp)
		}
	}()
	made := filepath.Join(tmp, filepath.Base(filepath.Clean(out)))
	if err := j.Write(made); err != nil {
		return err
	}
	if err := os.Rename(made, out); err != nil {
		return problem.Wrap(err, problem.Usage, "choose another directory with -o", "%s cannot be made", out)
	}
	r := imported{App: out, Job: j.Name, Settings: j.Settings, Warnings: j.Warnings}
	if r.Warnings == nil {
		r.Warnings = []string{} // a list for whoever reads it, even if it is empty
	}
	if asJSON {
		return json.NewEncoder(e.stdout).Encode(r)
	}
	for _, w := range r.Warnings {
		fmt.Fprintf(e.stderr, "warning: %s\n", w)
	}
	_, err = fmt.Fprintf(e.stdout, "%s is the app of the job %s; run it with: pergola run %s\n", out, j.Name, out)
	return err
}
