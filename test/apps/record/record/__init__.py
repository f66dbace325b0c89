"""Writes down every number and every setting that it sees; test/parity compares two runs of it."""
