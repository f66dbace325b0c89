// Package flower runs Flower apps with the programs that Flower itself ships: it reads and stages the
// app directory, finds out what an installed Flower understands, and starts, watches and stops the
// superlink, the server app and a supernode of one party of one job.
//
// It does not build Python environments, does not carry traffic between machines, does not know sites,
// jobs or the hub, and does not decide whether a client's failure ends a job.
//
// Start with [LoadApp] and [Stage] for the app, [Probe] for an installation, [StartServer] and
// [StartClient] for the programs. What differs between Flower's generations stands in install.go
// (what to look for), server.go and client.go (what to type) and control.go (how a run is started and
// asked about):
//
//	generation  flwr          run is started by                      its state is asked by
//	module      1.8 – 1.10    flower-server-app MODULE:ATTRIBUTE     that program's exit code
//	driver      1.11, 1.12    flower-server-app DIR                  the same
//	exec        1.13 – 1.20   StartRun of the Exec API (gRPC)        ListRuns
//	control     1.21 – 1.34   StartRun of the Control API (gRPC)     ListRuns
//	runtime     1.35, 1.36    the same; the Runtime API is HTTP      ListRuns
//	mixed       1.37 – 1.39   POST /v1/control/start-run             POST /v1/control/list-runs
//	http        1.40 and on   the same; the Fleet API is HTTP too    the same
//
// A run is started as `flwr run` does it, with a FAB (Flower app bundle) made by the same rules, but
// without that Python process: it would cost one to three seconds, and the command does not even start
// with some versions of click that flwr 1.13 – 1.18 allow. `flwr run` is used where its own options are
// wanted, and where the superlink does not understand the call.
package flower
