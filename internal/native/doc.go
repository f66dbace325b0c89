// Package native runs a job's app without Flower's programs: it hands the messages of a ServerApp's process to warm worker
// processes that have the ClientApp loaded, and their replies back. docs/native-protocol.md has who says what to whom.
//
//	ServerApp ══ fd 3 ══ Hub ══ link: a control stream, a stream per pack ══ Site ══ fd 3 ══ workers
//
// Messages are opaque bytes here. Arrays lie beside them in memory files (packs), whose bytes pass through this process in
// pieces only: what it holds of them is a descriptor. Nothing polls: every step is taken when a frame comes, a process ends
// or a message's time is over.
//
// It starts no process by itself and knows neither jobs nor the store. Start with [NewHub] and [NewSite]; [Install] writes down
// the Python side.
package native
