"""Handwritten digits, learnt across sites that keep their data."""
