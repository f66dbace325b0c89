//go:build !fakeclock

package clock

import "time"

// wallClock is the machine's wall clock.
func wallClock() time.Time { return time.Now() }
