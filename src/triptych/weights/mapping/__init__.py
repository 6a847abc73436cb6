"""Formats: rules that map foreign state dict keys to ours and back, defaults of publishers, and round-trip checks."""
