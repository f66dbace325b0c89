package pyenv

import (
	"context"

	"github.com/pergolafl/pergola/internal/proc"
)

// command is a program that is run to its end.
type command struct {
	name   string // for messages: "uv pip compile"
	args   []string
	dir    string
	env    []string
	onLine func(string) // each line of both streams as it comes; nil ok
}

// result is what a command left behind.
type result struct {
	stdout, stderr string
	exit           proc.Exit
}

func (r result) ok() bool { return r.exit.OK() }

// output is everything it said, errors last.
func (r result) output() string { return r.stdout + "\n" + r.stderr }

// run runs c to its end. An error means that it could not be started, or is the cause of ctx's end, which ends all of
// the command's processes too; a failing exit status is in the result.
func run(ctx context.Context, c command) (result, error) {
	out, err := proc.Run(ctx, proc.Spec{Name: c.name, Args: c.args, Dir: c.dir, Env: c.env, OnLine: c.onLine})
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return result{}, err
	}
	return result{stdout: out.Stdout, stderr: out.Stderr, exit: out.Exit}, nil
}
