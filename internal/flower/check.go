package flower

import (
	"path/filepath"

	"github.com/pergolafl/pergola/internal/problem"
)

// Check tells beforehand whether the programs are there that will be started, by Pergola or by Flower itself: an
// installation that lost one would fail in the middle of a run otherwise. Hub asks for the server's side; flwr tells that
// `flwr run` is needed. [Probe] has seen to superlink and supernode. The error has the code program-failed.
func (i *Installation) Check(hub, flwr bool) error {
	for _, name := range i.needed(hub, flwr) {
		if _, err := executable(i.program(name)); err != nil {
			p := *problem.From(err)
			p.Next = pipHint(i.Bin, i.Version)
			return &p
		}
	}
	return nil
}

// needed gives the executables that a party's programs start, apart from those that have been probed.
func (i *Installation) needed(hub, flwr bool) []string {
	var names []string
	switch {
	case i.Caps.Generation <= GenDriver && hub:
		names = append(names, ProgramServerApp)
	case i.Caps.Generation <= GenDriver: // the supernode runs the client app itself
	case hub:
		names = append(names, appProcess)
		if flwr {
			names = append(names, "flwr")
		}
	default:
		names = append(names, "flwr-clientapp")
	}
	return names
}

// pipHint is how to mend an installation.
func pipHint(bin, version string) string {
	what := "flwr"
	if version != "" {
		what += "==" + version
	}
	return "install Flower anew: " + filepath.Join(bin, "python3") + " -m pip install --force-reinstall " + what + ", or let Pergola build the environment"
}
