"""What the tables of latent diffusion are made of: layers with their bias, and products that files store in parts."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from triptych.weights.mapping.rules import CONCATENATE, Operation, Rule, each, joined, rule, same, then

PAIR = Operation(joined, lambda whole: whole[0].chunk(2))
"""Keys and values, each (D, C), are one (2D, C)."""
ONE_BY_ONE = each(lambda t: t.flatten(1), lambda t: t[..., None, None])
"""A 1x1 convolution's kernel (o, i, 1, 1) as the matrix (o, i) that it is."""
ALONG = each(lambda t: t.flatten(1), lambda t: t[..., None])
"""The same of a convolution over a sequence, (o, i, 1)."""


def layer(theirs: str, ours: str, bias: bool = True) -> list[Rule]:
    """A layer or norm under another name."""
    leaves = ("weight", "bias") if bias else ("weight",)
    return [same(f"{theirs}.{leaf}", f"{ours}.{leaf}") for leaf in leaves]


def matrix(theirs: str, ours: str, operation: Operation) -> list[Rule]:
    """A linear layer whose weight is stored in another shape; its bias is not."""
    return [rule(f"{theirs}.weight", f"{ours}.weight", operation), same(f"{theirs}.bias", f"{ours}.bias")]


def fused(theirs: tuple[str, ...], ours: str, bias: bool, shaped: Operation | None = None) -> list[Rule]:
    """Two or three layers that are one of ours, each weight stored in another shape where `shaped` is given."""
    join = PAIR if len(theirs) == 2 else CONCATENATE
    names = tuple(f"{name}.weight" for name in theirs)
    rules = [rule(names, f"{ours}.weight", join if shaped is None else then(shaped, join))]
    if bias:
        rules.append(rule(tuple(f"{name}.bias" for name in theirs), f"{ours}.bias", join))
    return rules


def by_head(heads: int) -> Operation:
    """Rows of queries, keys and values head by head, [heads, 3, d], as one after the other, [3, heads, d]."""

    def turn(t: Tensor, first: int, second: int) -> Tensor:
        return t.reshape(first, second, -1, *t.shape[1:]).transpose(0, 1).reshape(t.shape)

    return each(lambda t: turn(t, heads, 3), lambda t: turn(t, 3, heads))


def inside(rules: Iterable[Rule], theirs: str = "", ours: str = "") -> list[Rule]:
    """The same rules for a part of a larger file, and of a larger network."""
    return [
        replace(one, theirs=tuple(theirs + n for n in one.theirs), ours=tuple(ours + n for n in one.ours))
        for one in rules
    ]


def halves_of(count: int) -> int:
    """Groups of a norm over so many channels, where the file does not say: 32, in tiny networks fewer."""
    groups = 32
    while count % groups:
        groups //= 2
    return groups


Make = Callable[[], Tensor]


def number(value: float) -> Make:
    """Makes a tensor of one number."""
    return lambda: torch.tensor(value)


def shortest(tensor: Tensor) -> float:
    """A number of fp32 as the shortest decimal that it is: 0.18215, not 0.18215000629425049."""
    return float(str(tensor.float().numpy().reshape(-1)[0]))
