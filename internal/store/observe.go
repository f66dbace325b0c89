package store

import (
	"time"

	"github.com/pergolafl/pergola/internal/job"
)

// Observer hears of what a store does, for measurements. Its functions are called by whoever called the store, must be quick, and may be nil.
type Observer struct {
	// Call hears of each call of the database: what it was for, whether it may write, how long it took, and how it ended. What it was
	// for is one of a few texts, in which nobody is named: measurements go by it.
	Call func(doing string, write bool, took time.Duration, err error)
	// Event hears of each event after it was stored, among them every move of a job or party.
	Event func(job.Event)
}
