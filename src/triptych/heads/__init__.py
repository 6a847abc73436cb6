"""Heads for dense prediction from the feature maps of any backbone."""
