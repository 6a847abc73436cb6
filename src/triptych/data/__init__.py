"""Files to batches: sources, decoding, loading, augmentation."""
