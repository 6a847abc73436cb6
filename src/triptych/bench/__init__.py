"""Benchmarks against reference implementations: the same work in alternation, outputs checked equal, results as tables.

Read `harness/timing.py` first (how a comparison is made), then `suites/vit.py` (what is compared).
"""
