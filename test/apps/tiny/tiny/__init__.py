"""The smallest app that trains and evaluates, in an API that all generations have."""
