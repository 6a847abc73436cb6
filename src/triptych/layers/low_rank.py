"""Low-rank updates of frozen products (LoRA, Hu et al. 2021)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from triptych.layers.attention import Attention


class LowRank(nn.Module):
    """W + (alpha / r) B A, Section 4.1: A random, B zero, so that the start is W itself. alpha is 2 r here."""

    def __init__(self, weight: Float[Tensor, "o i"], rank: int):
        super().__init__()
        outputs, inputs = weight.shape
        self.a = nn.Parameter(torch.empty(rank, inputs))
        self.b = nn.Parameter(torch.zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, weight: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        return weight + 2.0 * (self.b @ self.a)


def add_low_rank(net: nn.Module, rank: int) -> None:
    """Give the products of every attention a low-rank update; all else of `net` stops learning."""
    net.requires_grad_(False)
    for part in net.modules():
        if isinstance(part, Attention):
            for linear in (part.qkv, part.proj):
                parametrize.register_parametrization(linear, "weight", LowRank(linear.weight, rank))


def merge_low_rank(net: nn.Module) -> None:
    """Write the updates into the weights; `net` is then an ordinary network again."""
    for part in list(net.modules()):
        if isinstance(part, nn.Linear) and parametrize.is_parametrized(part, "weight"):
            parametrize.remove_parametrizations(part, "weight", leave_parametrized=True)
