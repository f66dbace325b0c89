"""tiny in the style of flwr 1.9."""
