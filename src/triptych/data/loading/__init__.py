"""Batches from sources: order, buckets, worker processes, collation."""
