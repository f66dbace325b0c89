package job

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"

	"github.com/pergolafl/pergola/internal/problem"
)

// The engines, and what is chosen by itself.
const (
	EngineAuto   = "auto"
	EngineNative = "native"
	EngineFlower = "flower"
)

// Engines are the values of the setting.
var Engines = []string{EngineAuto, EngineNative, EngineFlower}

// Isolations are the values of the setting: what one message's code sees of what the one before has left in its process.
var Isolations = []string{"auto", "warm", "fork", "process"}

// The releases of Flower with which the native engine's numbers and behaviour were compared with Flower's own programs.
const (
	nativeOldest = 12 // 1.12
	nativeNewest = 41 // 1.41
)

// MaxClients is how many clients a job may have: more than any one machine works through in a day.
const MaxClients = 100_000

// maxWorkers is more than any site can make use of.
const maxWorkers = 1024

var minorForm = regexp.MustCompile(`^1\.(\d+)(?:\.|$)`)

// minorOf gives the 30 of 1.30.0; ok is false for what is no release of Flower 1.
func minorOf(flwr string) (int, bool) {
	m := minorForm.FindStringSubmatch(flwr)
	if m == nil {
		return 0, false
	}
	n, err := strconv.Atoi(m[1])
	return n, err == nil
}

// onlyFlower names the settings of the job that are for Flower's own programs and have no counterpart in the native engine.
func (s Spec) onlyFlower() string {
	paths := s.Site.AppPath
	for _, one := range s.Site.Named {
		paths += one.AppPath
	}
	for _, c := range []struct {
		set  bool
		name string
	}{
		{len(s.Server.Args) > 0, "server.args"},
		{s.Server.Database != "", "server.database"},
		{s.Server.Restarts > 0, "server.restarts"},
		{s.FlowerInstalls, "flower-installs"},
		{s.Server.AppPath != "", "server.app-path"},
		{paths != "", "site.app-path"},
	} {
		if c.set {
			return c.name
		}
	}
	return ""
}

// ChooseEngine decides how the job runs with a version of Flower, and sets Engine, EngineAuto and EngineWhy. A choice of the job's that
// cannot be kept is an error.
func (s *Spec) ChooseEngine(flwr string) error {
	minor, release := minorOf(flwr)
	known := release && minor >= nativeOldest && minor <= nativeNewest
	only := s.onlyFlower()
	s.EngineAuto = s.Engine == "" || s.Engine == EngineAuto
	switch {
	case s.Engine == EngineFlower && s.Clients > 0:
		return problem.New(problem.Usage, "leave --clients out, or use --engine native", "many clients at a site are of the native engine only: with Flower's programs each is a supernode")
	case s.Engine == EngineFlower:
		s.EngineWhy = "as asked for"
	case only != "" && (s.Engine == EngineNative || s.Clients > 0):
		return problem.New(problem.Usage, "leave one of them out", "%s is a setting of Flower's own programs, which the native engine does without", only)
	case s.Engine == EngineNative:
		s.EngineWhy = "as asked for"
		if !known {
			s.EngineWhy += fmt.Sprintf(", though it was not compared with Flower's programs for flwr %s", flwr)
		}
	case s.Clients > 0:
		s.Engine, s.EngineAuto, s.EngineWhy = EngineNative, false, fmt.Sprintf("for %d clients", s.Clients)
	case only != "":
		s.Engine, s.EngineWhy = EngineFlower, only+" is a setting of Flower's own programs"
	case !known:
		s.Engine, s.EngineWhy = EngineFlower, fmt.Sprintf("the native engine is known to behave the same for flwr 1.%d to 1.%d, not for %s", nativeOldest, nativeNewest, flwr)
	default:
		s.Engine, s.EngineWhy = EngineNative, fmt.Sprintf("known to behave as Flower's programs do with flwr %s", flwr)
	}
	return nil
}

// IsolationFor gives what is done between two messages, for a version of Flower: what plain Flower does. From 1.13 on it starts a process for
// each message, of which a fork is the cheap equal. Up to 1.12 its supernode runs client apps in itself but loads their modules anew for
// each message, so that globals and seeds of a module begin anew there too: a fork is nearer to that than a warm worker. Many clients are
// for what Flower's simulation engine does, whose actors are warm.
func (s Spec) IsolationFor(flwr string) string {
	if s.Isolation != "" && s.Isolation != Isolations[0] {
		return s.Isolation
	}
	if s.Clients > 0 {
		return "warm"
	}
	return "fork"
}

// Partitions gives how many clients a job with n sites has.
func (s Spec) Partitions(n int) int {
	if s.Clients > 0 {
		return s.Clients
	}
	return n
}

// ClientsAt gives the clients of the site with a place among n, as the number of its first one and how many there are: as even as can be.
func (s Spec) ClientsAt(index, n int) (first, clients int) {
	total := s.Partitions(n)
	each, more := total/n, total%n
	first = index*each + min(index, more)
	if index < more {
		each++
	}
	return first, each
}

func (s Spec) nativeFaults(add func(msg, next string, key ...string)) {
	if s.Isolation != "" && !slices.Contains(Isolations, s.Isolation) {
		add(fmt.Sprintf("there is no isolation %q", s.Isolation)+problem.DidYouMean(s.Isolation, Isolations), "choose auto, warm, fork or process", "isolation")
	}
	if s.Workers < 0 || s.Workers > maxWorkers {
		add(fmt.Sprintf("%d is no number of workers", s.Workers), fmt.Sprintf("give 1 to %d, or leave it out", maxWorkers), "workers")
	}
	if s.Clients < 0 || s.Clients > MaxClients {
		add(fmt.Sprintf("%d is no number of clients", s.Clients), fmt.Sprintf("give 1 to %d, or leave it out for one at each site", MaxClients), "clients")
	}
	if s.Clients > 0 && s.Clients < len(s.Sites) {
		add(fmt.Sprintf("%d clients cannot be spread over %d sites", s.Clients, len(s.Sites)), "give one for each site at least, or fewer sites", "clients")
	}
	if g := s.GPUsPerWorker; g < 0 || g > 64 || g != g || g > 1 && g != float64(int(g)) {
		add(fmt.Sprintf("%v is no share of devices", g), "write 0.5 for two workers on one device, 1 for a device each, or a whole number of devices", "gpus-per-worker")
	}
}
