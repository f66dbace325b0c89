// Command pergola runs unmodified Flower apps as managed jobs across organisations.
package main

import (
	"os"

	"github.com/pergolafl/pergola/internal/cli"
)

func main() { os.Exit(cli.Main()) }
