"""Tensor in, tensor out: the parts that the networks are built of."""
