"""Tells what each client was given."""
