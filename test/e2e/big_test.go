package e2e

import (
	"flag"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/localrun"
)

// Run with -big, parameters are beyond the 2 GiB that a message of gRPC can have (`make soak` does).
var big = flag.Bool("big", false, "send 2.25 GiB of parameters instead of 256 MiB")

// Large parameters go to a site and come back, every number of them.
func TestLargeParameters(t *testing.T) {
	t.Parallel()
	parts := 2
	if *big {
		parts = 18
	}
	for _, engine := range []string{job.EngineFlower, job.EngineNative} {
		t.Run(engine, func(t *testing.T) { // one after the other: together they would need twice the memory
			r := start(t, spec{app: "big", args: []string{"--flwr", newest, "--engine", engine, "--sites", "1", "--run-config", fmt.Sprintf("mebibytes=%d", parts*128)}})
			res := r.end()
			if res.Code != 0 || res.Summary.State != job.Succeeded {
				t.Fatalf("exit %d, %s", res.Code, causeText(res.Summary))
			}
			want := fmt.Sprintf("came back: %d of %d parts, %d bytes seen by the client", parts, parts, parts<<27)
			if !slices.ContainsFunc(res.Events, func(e event) bool { return e.Kind == localrun.KindLog && strings.Contains(string(e.Body), want) }) {
				t.Errorf("the server app did not say %q", want)
			}
		})
	}
}
