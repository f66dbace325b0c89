//go:build fakeclock

package clock

import (
	"os"
	"strings"
	"time"
)

// wallClock is off by what the file named by PERGOLA_TEST_CLOCK says ("24h"), for tests of processes whose clock is set: of a
// real machine that would be everybody's. No binary that anybody is given is built with this.
func wallClock() time.Time {
	b, err := os.ReadFile(os.Getenv("PERGOLA_TEST_CLOCK"))
	if err != nil {
		return time.Now()
	}
	off, err := time.ParseDuration(strings.TrimSpace(string(b)))
	if err != nil {
		panic(err)
	}
	return time.Now().Add(off)
}
