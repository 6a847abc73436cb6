"""Reordering the cells of a map with a gradient that is a gather, too."""

from typing import Any

import torch
from torch import Tensor


def permuted(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Return `x[:, order]` for x of shape (B, cells, D), where `order` names each cell once and `inverse` undoes it.

    Its twin is `x.index_select(1, order)`, whose gradient adds up values, which is slow.
    """
    return _Permuted.apply(x, order, inverse)  # type: ignore[no-any-return]


class _Permuted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return x.index_select(1, order)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (dy,) = grad_outputs
        order, inverse = ctx.saved_tensors
        return permuted(dy, inverse, order), None, None
