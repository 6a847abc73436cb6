"""Ours beside a peer: the same work, in turn, checked equal, written as tables.

Read `timing.py` first (how a comparison is made), then `vit.py` (what is compared).
"""
