"""The maths of diffusion: processes, samplers, guidance, losses. Tensors in, tensors out; no network."""
