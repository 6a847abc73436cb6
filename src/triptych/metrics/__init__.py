"""Accumulators with `update()` and `compute()`, and what a network costs."""
