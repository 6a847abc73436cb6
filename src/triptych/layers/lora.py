"""Low-rank updates of frozen products (LoRA, Hu et al. 2021)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from triptych.errors import UserError


class LowRank(nn.Module):
    """W + (alpha / r) B A, Section 4.1: A random, B zero, so that the start is W itself.

    Args:
        weight: W, which is not kept.
        scale: alpha / r.
        parts: layers that W is made of, one below the other, such as queries, keys and values: each has an A and a B of
            its own.
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
        """A and B of each part."""
        return list(zip(self.a.chunk(self.parts), self.b.chunk(self.parts), strict=True))


def add_low_rank(net: nn.Module, rank: int) -> None:
    """Give the products of every attention a low-rank update; all else of `net` stops learning.

    An attention is a module that has a `tap`: of tokens, of windows, of a prompt, or of a pooling probe. Its products
    are the linear layers that it holds itself.

    Raises:
        UserError: there is no attention.
    """
    attentions = [part for part in net.modules() if hasattr(part, "tap")]
    if not attentions:
        raise UserError(
            f"{type(net).__name__} has no attention, whose products low-rank updates are of; train all, or the head"
        )
    net.requires_grad_(False)
    for attention in attentions:
        for part in attention.children():
            if isinstance(part, nn.Linear):
                parametrize.register_parametrization(part, "weight", LowRank(part.weight, rank))


def merge_low_rank(net: nn.Module) -> None:
    """Write the updates into the weights; `net` is then an ordinary network again, and what it is a copy of is not."""
    for part in list(net.modules()):
        if isinstance(part, nn.Linear) and parametrize.is_parametrized(part, "weight"):
            # Copies share the class that was made for the part, and removing takes the weight out of that class.
            own = {k: v for k, v in vars(type(part)).items() if k not in ("__dict__", "__weakref__")}
            part.__class__ = type(type(part).__name__, type(part).__bases__, own)  # type: ignore[assignment]
            parametrize.remove_parametrizations(part, "weight", leave_parametrized=True)
