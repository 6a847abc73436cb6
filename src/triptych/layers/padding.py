"""Zeros at the right and the bottom, up to whole patches or windows."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def pad_to_multiple(x: Tensor, multiple: tuple[int, int], axes: tuple[int, int]) -> Tensor:
    """Zeros after the end of two axes, so that each is a multiple; nothing is copied where both are already.

    A size that torch.export left open cannot be asked whether it is one, so there a gather appends the zeros: one is
    put at the end, and taken as often as it is needed.
    """
    for axis, side in zip(axes, multiple, strict=True):
        size = side_of(x, axis)
        whole = (size + side - 1) // side * side
        if not isinstance(size, int):
            place = torch.arange(whole, device=x.device)
            x = F.pad(x, _after(x, axis, 1)).index_select(axis, place.clamp(max=size))
        elif whole != size:
            x = F.pad(x, _after(x, axis, whole - size))
    return x


def side_of(x: Tensor, axis: int) -> Any:
    """The size of an axis: a number, or torch.export's symbol of one, for all sizes. torch.jit.trace has it as a
    tensor, which becomes a number here: a trace is for maps of one size, and warns of it."""
    size = x.shape[axis]
    return int(size) if isinstance(size, Tensor) else size


def _after(x: Tensor, axis: int, count: int) -> list[int]:
    """What F.pad calls `count` at the end of one axis."""
    pads = [0, 0] * (x.ndim - axis)
    pads[-1] = count
    return pads
