"""Operations on a list of tensors in as few launches as PyTorch has a call for."""

from collections.abc import Sequence

import torch
from torch import Tensor

from triptych.kernels import dispatch


def norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the 2-norm of each tensor."""
    if dispatch.ENABLED:
        return list(torch._foreach_norm(list(tensors)))
    return [torch.linalg.vector_norm(tensor) for tensor in tensors]


def lerp_(inputs: Sequence[Tensor], ends: Sequence[Tensor], weight: Tensor) -> None:
    """Move each input toward its end in place: x <- x + weight (end - x). `weight` is a scalar on their device."""
    if dispatch.ENABLED:
        torch._foreach_lerp_(list(inputs), list(ends), [weight] * len(inputs))
        return
    for x, end in zip(inputs, ends, strict=True):
        x.lerp_(end, weight)
