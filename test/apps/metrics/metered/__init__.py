"""Logs what it measures."""
