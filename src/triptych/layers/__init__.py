"""Layers: the parts that the networks are built of."""
