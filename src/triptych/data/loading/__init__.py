"""Loading batches from sources: order, aspect-ratio buckets, worker processes, collation."""
