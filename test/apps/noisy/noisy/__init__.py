"""Its clients print a lot in every fit."""
