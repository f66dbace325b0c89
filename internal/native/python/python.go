// Package python holds the Python side of the native engine: what hosts a ServerApp or a ClientApp in a process of its own and speaks to
// the runner over descriptor 3, as docs/native-protocol.md has it. It needs nothing but the app's own environment; boot.py is the way in,
// and the other modules are imported from beside it under a name that no app uses. It starts no process: package native does.
package python

import "embed"

// Files has the modules, all in its root. Written to a folder, they run as `python FOLDER/boot.py server`, `client` or `check`.
//
//go:embed *.py
var Files embed.FS
