"""From files to batches: sources, decoding, loading, augmentation."""
