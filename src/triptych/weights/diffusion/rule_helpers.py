"""Building blocks of the tables of latent diffusion: layers with bias, and fused layers that files store in parts."""

from collections.abc import Callable

import torch
from torch import Tensor

from triptych.weights.mapping.rules import (
    FUSE_QKV,
    Operation,
    Rule,
    compose,
    concatenate,
    convert,
    per_tensor,
    rename,
)

FUSE_PAIR = Operation(concatenate, lambda fused: fused[0].chunk(2))
"""Keys and values, each (D, C) <-> one (2D, C)."""
ONE_BY_ONE = per_tensor(lambda t: t.flatten(1), lambda t: t[..., None, None])
"""The kernel of a 1x1 convolution (o, i, 1, 1) <-> a matrix (o, i)."""
ALONG = per_tensor(lambda t: t.flatten(1), lambda t: t[..., None])
"""The kernel of a 1D convolution of size 1 (o, i, 1) <-> a matrix (o, i)."""


def layer(theirs: str, ours: str, bias: bool = True) -> list[Rule]:
    """Return the rules of a layer or norm that has other keys."""
    leaves = ("weight", "bias") if bias else ("weight",)
    return [rename(f"{theirs}.{leaf}", f"{ours}.{leaf}") for leaf in leaves]


def matrix(theirs: str, ours: str, operation: Operation) -> list[Rule]:
    """Return the rules of a linear layer whose weight, not its bias, is stored in another shape."""
    return [
        convert(f"{theirs}.weight", f"{ours}.weight", operation),
        rename(f"{theirs}.bias", f"{ours}.bias"),
    ]


def fused(theirs: tuple[str, ...], ours: str, bias: bool, shaped: Operation | None = None) -> list[Rule]:
    """Return the rules of two or three layers that are one of ours.

    Args:
        shaped: conversion of each weight, if it is stored in another shape."""
    join = FUSE_PAIR if len(theirs) == 2 else FUSE_QKV
    names = tuple(f"{name}.weight" for name in theirs)
    rules = [convert(names, f"{ours}.weight", join if shaped is None else compose(shaped, join))]
    if bias:
        rules.append(convert(tuple(f"{name}.bias" for name in theirs), f"{ours}.bias", join))
    return rules


def by_head(heads: int) -> Operation:
    """Return: rows of queries, keys and values head by head, [heads, 3, d] <-> one after the other, [3, heads, d]."""

    def turn(t: Tensor, first: int, second: int) -> Tensor:
        return t.reshape(first, second, -1, *t.shape[1:]).transpose(0, 1).reshape(t.shape)

    return per_tensor(lambda t: turn(t, heads, 3), lambda t: turn(t, 3, heads))


def default_groups(count: int) -> int:
    """Return the default number of groups of a norm over `count` channels: 32, in tiny networks fewer."""
    groups = 32
    while count % groups:
        groups //= 2
    return groups


Make = Callable[[], Tensor]


def scalar_factory(value: float) -> Make:
    """Return a function that creates a scalar tensor."""
    return lambda: torch.tensor(value)


def shortest_decimal(tensor: Tensor) -> float:
    """Return an fp32 number as its shortest decimal: 0.18215, not 0.18215000629425049."""
    return float(str(tensor.float().numpy().reshape(-1)[0]))
