package api

import "runtime/debug"

// BuildVersion is this Pergola's version, "devel" where it was built from a folder.
func BuildVersion() string {
	if bi, ok := debug.ReadBuildInfo(); ok && bi.Main.Version != "" && bi.Main.Version != "(devel)" {
		return bi.Main.Version
	}
	return "devel"
}
