"""A package that is no Flower app."""
