"""Pipelines: from images and strings to results."""
