"""Fast paths for CPUs: private PyTorch calls, each with a twin in public PyTorch."""
