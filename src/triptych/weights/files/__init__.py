"""Checkpoint containers: safetensors, PyTorch's zips and .npz, read without running pickles.

`open_checkpoint` (in `opening`) is the entry point. Readers return a table of every tensor's name, shape and location
before any tensor is read.
"""
