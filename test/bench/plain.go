package main

import (
	"context"
	"fmt"
	"time"

	"github.com/pergolafl/pergola/internal/flower"
	"github.com/pergolafl/pergola/test/internal/plain"
)

// readApp fills in what the app says of itself. Of the run config it overrides what the app has.
func (o *options) readApp() (err error) {
	if o.loaded, err = flower.LoadApp(o.app); err != nil {
		return err
	}
	for _, want := range []struct {
		key   string
		value int
	}{{"num-server-rounds", o.rounds}, {"clients", o.sites}, {"min-sites", o.sites}} {
		if _, has := o.loaded.Config[want.key]; has {
			o.runConfig = append(o.runConfig, fmt.Sprintf("%s=%d", want.key, want.value))
		}
	}
	return nil
}

// runPlain measures one run on plain Flower.
func runPlain(ctx context.Context, o options, version, python, dir string) (measure, error) {
	c := clock{start: time.Now()}
	err := plain.Run(ctx, plain.Options{
		Version: version, Python: python, App: o.loaded, Dir: dir, Sites: o.sites, RunConfig: o.runConfig,
		OnBegin: func() { c.begin(time.Now()) }, OnLine: func(line string) { c.line(time.Now(), line) },
	})
	if err != nil {
		return measure{}, err
	}
	return c.measure(o.rounds, time.Now())
}
