"""Pixels and strings in, results out."""
