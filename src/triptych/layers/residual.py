"""Layers between a block's branch and the residual stream: stochastic depth, dropout, layer scale."""

import torch
from torch import Tensor, nn

from triptych import distributed


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training the branch of a sample is dropped with probability `rate`, and
    the others are scaled by 1 / (1 - rate)."""

    def __init__(self, rate: float = 0.0):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        ones = (1,) * (x.ndim - 1)
        mask = distributed.draw_rows(len(x), lambda n: torch.rand((n, *ones), device=x.device)) < keep
        return x * (mask.to(x.dtype) / keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


class Dropout(nn.Dropout):
    """Dropout (Srivastava et al. 2014) whose random draws depend on a sample's index in the batch, not on its rank."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0.0 or distributed.current_shard() is None:
            return super().forward(input)
        shape = input.shape[1:]
        mask = distributed.draw_rows(len(input), lambda n: super(Dropout, self).forward(input.new_ones(n, *shape)))
        return input * mask


class Dropout2d(nn.Dropout2d):
    """`Dropout` of entire channels."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0.0 or distributed.current_shard() is None:
            return super().forward(input)
        ones = (1,) * (input.ndim - 2)
        mask = distributed.draw_rows(
            len(input), lambda n: super(Dropout2d, self).forward(input.new_ones(n, input.shape[1], *ones))
        )
        return input * mask


class LayerScale(nn.Module):
    """A trained gain for each channel of a branch, small at first (CaiT, Touvron et al. 2021, Equation 4)."""

    def __init__(self, dim: int, initial: float):
        super().__init__()
        self.initial = initial
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def fill(self) -> None:
        nn.init.constant_(self.gamma, self.initial)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma
