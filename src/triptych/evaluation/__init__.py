"""Measure trained networks: classification, segmentation, reconstruction and generation."""
