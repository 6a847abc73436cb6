"""Low-rank updates of frozen products (LoRA, Hu et al. 2021)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from triptych.errors import ConfigError
from triptych.layers.attention import AttentionModule


class LowRank(nn.Module):
    """W + (alpha / r) B A (Section 4.1). A starts random and B at zero, so that the start is W itself.

    Args:
        weight: W, of which only the shape is used.
        rank: r.
        scale: alpha / r.
        parts: number of layers stacked in W, such as queries, keys and values; each has its own A and B.
    """

    def __init__(self, weight: Float[Tensor, "o i"], rank: int, scale: float = 2.0, parts: int = 1):
        super().__init__()
        outputs, inputs = weight.shape
        self.rank, self.scale, self.parts = rank, scale, parts
        self.a = nn.Parameter(torch.empty(parts * rank, inputs))
        self.b = nn.Parameter(torch.zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, weight: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        delta = [b @ a for a, b in self.pairs()]
        return weight + self.scale * (delta[0] if self.parts == 1 else torch.cat(delta))

    def pairs(self) -> list[tuple[Float[Tensor, "r i"], Float[Tensor, "rows r"]]]:
        """Return A and B of each part."""
        return list(zip(self.a.chunk(self.parts), self.b.chunk(self.parts), strict=True))


def add_low_rank(net: nn.Module, rank: int) -> None:
    """Give the projections of every attention module a low-rank update; everything else of `net` is frozen.

    Raises:
        ConfigError: there is no attention.
    """
    attentions = [part for part in net.modules() if isinstance(part, AttentionModule)]
    if not attentions:
        raise ConfigError(
            f"{type(net).__name__} has no attention to add low-rank updates to; train all weights, or the head"
        )
    net.requires_grad_(False)
    for attention in attentions:
        for linear in attention.projections().values():
            parametrize.register_parametrization(linear, "weight", LowRank(linear.weight, rank))


def merge_low_rank(net: nn.Module) -> None:
    """Add the updates to the weights in place, so that `net` has ordinary linear layers again. Copies of `net` made
    before keep their updates."""
    for module in list(net.modules()):
        for name, part in list(module.named_children()):
            if isinstance(part, nn.Linear) and parametrize.is_parametrized(part, "weight"):
                setattr(module, name, _merged(part))


@torch.no_grad()
def _merged(linear: nn.Linear) -> nn.Linear:
    """Return a linear layer with the sum as its weight."""
    # `remove_parametrizations` would take the weight out of a class that copies of the layer share.
    merged = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    trained = linear.parametrizations["weight"].original.requires_grad  # type: ignore[index, union-attr]
    merged.weight = nn.Parameter(linear.weight, requires_grad=trained)  # type: ignore[arg-type]
    merged.bias = linear.bias
    return merged.train(linear.training)
