"""Training tasks: classification, segmentation, masked image modeling."""
