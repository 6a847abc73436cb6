"""Explanations of classifiers: attention, windows, filters."""
