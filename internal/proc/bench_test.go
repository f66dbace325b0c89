package proc

import "testing"

// BenchmarkRun is what a one-shot command costs with all that is done to leave nothing behind.
func BenchmarkRun(b *testing.B) {
	for b.Loop() {
		if _, err := Run(b.Context(), Spec{Args: sh("exit 0")}); err != nil {
			b.Fatal(err)
		}
	}
}
