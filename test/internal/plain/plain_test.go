package plain

import (
	"slices"
	"strings"
	"testing"

	"github.com/pergolafl/pergola/internal/flower"
)

func TestAtLeast(t *testing.T) {
	for version, want := range map[string]bool{"1.30.0": false, "1.40": true, "1.41.0": true, "2.0": true, "main": false} {
		if AtLeast(version, 1, 40) != want {
			t.Errorf("AtLeast(%q, 1, 40) = %v", version, !want)
		}
	}
}

// What is typed for a version; that each is right is shown by running it.
func TestCommands(t *testing.T) {
	for version, want := range map[string][3]string{
		"1.8.0":  {"--driver-api-address 127.0.0.1:1 --grpc-rere --grpc-rere-fleet-api-address 127.0.0.1:2", "flower-client-app --insecure --server 127.0.0.1:2 --dir APP c:a", "flower-server-app --insecure --server 127.0.0.1:1 --dir APP s:a"},
		"1.10.0": {"--driver-api-address 127.0.0.1:1 --fleet-api-address 127.0.0.1:2", "--node-config partition-id=1,num-partitions=2,x=0.5 --dir APP c:a", "flower-server-app --insecure --superlink 127.0.0.1:1 --dir APP s:a"},
		"1.12.0": {"--driver-api-address", "--node-config partition-id=1 num-partitions=2 x=0.5 --supernode-address 127.0.0.1:9 APP", "flower-server-app --insecure --superlink 127.0.0.1:1 APP"},
		"1.18.0": {"--exec-api-address 127.0.0.1:3 --simulationio-api-address 127.0.0.1:4", "--clientappio-api-address 127.0.0.1:9", "flwr run APP local --stream --run-config r=1"},
		"1.36.0": {"--host 127.0.0.1 --port 1 --fleet-api-address 127.0.0.1:2 --control-api-address 127.0.0.1:3 --disable-runtime", "--host 127.0.0.1 --port 9", "flwr run"},
		"1.41.0": {"--insecure --host 127.0.0.1 --port 1 --disable-runtime", "--superlink 127.0.0.1:2", "flwr run"},
	} {
		o := Options{Version: version, Sites: 2, App: &flower.App{ServerApp: "s:a", ClientApp: "c:a"}, RunConfig: []string{"r=1"}, NodeConfig: map[string]string{"x": "0.5"}}
		p := ports{1, 2, 3, 4}
		for i, args := range [][]string{o.superlink(p), o.supernode("APP", 1, p, 9), o.starter("APP", p)} {
			if got := strings.Join(args, " "); !strings.Contains(got, want[i]) {
				t.Errorf("%s: %q lacks %q", version, got, want[i])
			}
			if slices.Contains(args, "") {
				t.Errorf("%s: an empty argument in %q", version, args)
			}
		}
	}
}
