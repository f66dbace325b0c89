// Command pergola runs unmodified Flower apps as managed jobs across organisations. All of its commands are in
// internal/cli; `pergola --help` lists them.
package main

import (
	"os"

	"github.com/pergolafl/pergola/internal/cli"
)

func main() { os.Exit(cli.Main()) }
