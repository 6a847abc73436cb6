"""Checkpoint containers: safetensors, PyTorch zips, npz; read without running pickles."""
