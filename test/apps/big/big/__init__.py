"""Parameters of any size."""
