"""Fast paths: the only place for private PyTorch calls and for tuning to a CPU, each with a twin in public PyTorch.

`TRIPTYCH_KERNELS=0` in the environment turns all of them off; `tests/kernels/test_twins.py` compares each with its
twin.
"""
