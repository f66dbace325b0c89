"""Depends on a package that no index has."""
