"""Zero padding at the right and the bottom, up to full patches or windows."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def pad_to_multiple(x: Tensor, multiple: tuple[int, int], axes: tuple[int, int]) -> Tensor:
    """Pad two axes with zeros at their ends to multiples; return `x` itself where both are multiples already.

    A dynamic size of torch.export must not be compared, so there a gather appends the zeros: one is put at the end, and
    read as often as needed.
    """
    for axis, side in zip(axes, multiple, strict=True):
        size = side_of(x, axis)
        padded = (size + side - 1) // side * side
        if not isinstance(size, int):
            index = torch.arange(padded, device=x.device)
            x = F.pad(x, _after(x, axis, 1)).index_select(axis, index.clamp(max=size))
        elif padded != size:
            x = F.pad(x, _after(x, axis, padded - size))
    return x


def side_of(x: Tensor, axis: int) -> Any:
    """Return the size of an axis: an int, or a symbol of torch.export for dynamic sizes. torch.jit.trace represents it
    as a tensor, which becomes an int here: a trace is for maps of one size, and warns about it."""
    size = x.shape[axis]
    return int(size) if isinstance(size, Tensor) else size


def _after(x: Tensor, axis: int, count: int) -> list[int]:
    """Return the argument of F.pad for `count` zeros at the end of one axis."""
    pads = [0, 0] * (x.ndim - axis)
    pads[-1] = count
    return pads
