package runner

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/pergolafl/pergola/internal/api"
	"github.com/pergolafl/pergola/internal/compat"
	"github.com/pergolafl/pergola/internal/job"
)

// Names of the files in a party's directory.
const (
	specFile    = "spec.json"     // what to run, written by the starter
	journalFile = "journal.jsonl" // what happened, written by the runner
	runnerFile  = "runner.json"   // who the runner is, written by the runner
	controlSock = "control.sock"  // RunnerService
	linkSock    = "link.sock"     // hub's party: spliced link connections
	outputFile  = "runner.log"    // what the runner itself prints
	ballastFile = "reserve"       // space for the last words on a full disk
	certName    = "party"         // party.crt, party.key, ca.crt: the job-scoped identity of a site's runner
)

// CertName is the name under which the starter saves the party's key pair in the party's directory (see pki.SaveKeypair).
const CertName = certName

// LinkSocket is the path of the socket to which the hub splices the links of the job whose hub party is in dir.
func LinkSocket(dir string) string { return filepath.Join(dir, linkSock) }

// OutputFile is where a runner's own log is in its party's directory.
func OutputFile(dir string) string { return filepath.Join(dir, outputFile) }

// TempDir gives the TMPDIR of the party in dir; "" if nothing was started there.
func TempDir(dir string) string {
	s, err := readSpec(dir)
	if err != nil {
		return ""
	}
	return s.Tmp
}

// AttemptIn gives the attempt of the party that was started in dir; 0 if nothing was.
func AttemptIn(dir string) int {
	s, err := readSpec(dir)
	if err != nil {
		return 0
	}
	return s.Attempt
}

// GPUsIn gives the devices of the party that was started in dir; nil if nothing was, or it was given none.
func GPUsIn(dir string) []string {
	s, err := readSpec(dir)
	if err != nil {
		return nil
	}
	return s.GPUs
}

// Spec is what a starter hands to a runner. Paths are absolute.
type Spec struct {
	Job   job.ID   `json:"job"`
	Party string   `json:"party"` // job.HubParty or the site's name
	Index int      `json:"index"` // the site's place among the job's sites
	Count int      `json:"count"` // their number
	Spec  job.Spec `json:"spec"`

	Attempt int `json:"attempt,omitempty"` // of the party, from 0

	Bundle   string `json:"bundle"`              // folder of the unpacked bundle, never written to
	Logs     string `json:"logs"`                // folder for the programs' logs
	LogQuota int64  `json:"log-quota,omitempty"` // bytes of its logs that are kept; 0 = all
	Results  string `json:"results,omitempty"`   // hub's party: the server app's working directory
	Cache    string `json:"cache"`               // environments and probes, shared by jobs

	Python   string   `json:"python,omitempty"`   // interpreter to build environments with; "" = the best of PATH
	Existing bool     `json:"existing,omitempty"` // use Python as it is and build nothing
	Apps     string   `json:"apps,omitempty"`     // the party's folder with apps that lie ready, for app-path
	Hub      []string `json:"hub,omitempty"`      // site's party: addresses of the hub, tried in turn; see package uplink
	Proxy    string   `json:"proxy,omitempty"`    // site's party: the proxy on the way; "" = what the environment says

	// GPUs are the ids of the devices that are the party's alone while it lives. nil: the site declares none, and the environment
	// stays as it is; empty: the site has some, and none is for this party.
	GPUs []string `json:"gpus"`

	Starter compat.Range `json:"starter"` // what the starter speaks of the runner protocol; set by Start

	Tmp  string `json:"tmp"`  // TMPDIR of the runner and its programs, removed with them; made by Start if empty
	Mark string `json:"mark"` // in the environment of every program, so that none is overlooked
}

// deviceEnv is by what programs are told which devices they may see; see
// https://docs.nvidia.com/cuda/cuda-c-programming-guide/#env-vars.
const deviceEnv = "CUDA_VISIBLE_DEVICES"

// DeviceEnv gives the variable by which the party's programs see its own devices and no others. It comes last in their environment,
// so that neither the job nor the site's settings give away what is another job's. ok is false where the site declares no devices.
func (s Spec) DeviceEnv() (kv string, ok bool) {
	return deviceEnv + "=" + strings.Join(s.GPUs, ","), s.GPUs != nil
}

// IsHub tells whether this is the hub's side of the job.
func (s Spec) IsHub() bool { return s.Party == job.HubParty }

func readSpec(dir string) (Spec, error) {
	var s Spec
	b, err := os.ReadFile(filepath.Join(dir, specFile))
	if err != nil {
		return s, err
	}
	if err := json.Unmarshal(b, &s); err != nil {
		return s, fmt.Errorf("%s: %w", filepath.Join(dir, specFile), err)
	}
	return s, nil
}

// identity says which process the runner is: a pid alone may be somebody else's by now.
type identity struct {
	Pid   int    `json:"pid"`
	Start uint64 `json:"start"`          // see proc.StartTime
	Boot  string `json:"boot,omitempty"` // see proc.BootID; a start time counts from there

	// Speaks is what the runner speaks of the runner protocol: its socket, its journal, its directory. Without it, version 1.
	Speaks *compat.Range `json:"speaks,omitempty"`
	Build  string        `json:"build,omitempty"` // of its Pergola
}

// spoken gives the version that this Pergola and the runner have in common, or the refusal.
func (id identity) spoken() (int, error) {
	theirs := compat.First
	if id.Speaks != nil {
		theirs = *id.Speaks
	}
	v, ok := api.Runner.Common(theirs)
	if !ok {
		return 0, compat.Refusal("runner", compat.Side{Name: "this pergola", Build: api.BuildVersion(), Speaks: api.Runner}, compat.Side{Name: "the runner", Build: id.Build, Speaks: theirs})
	}
	return v, nil
}

// writeFile replaces a file as a whole, durably.
func writeFile(path string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*")
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(f.Name()) }() // it was renamed if all went well
	_, err = f.Write(append(b, '\n'))
	if err == nil {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
