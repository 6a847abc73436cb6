"""One tensor's place in a file: where its bytes are and how to read them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Broken(Exception):
    """A reader's complaint about a file; `open_checkpoint` adds the name and the remedy."""


@dataclass(frozen=True)
class Entry:
    """A tensor that has not been read yet."""

    path: Path
    offset: int
    """First byte in the file."""
    shape: Shape
    dtype: torch.dtype
    strides: Shape | None = None
    """In elements, where the tensor does not lie row by row."""
    unpack: Callable[[], Tensor] | None = None
    """Reads a tensor whose bytes are compressed."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def mappable(self) -> bool:
        """Whether the file's bytes are the tensor's, aligned."""
        return (
            self.unpack is None
            and self.strides is None
            and self.numel > 0
            and self.offset % self.dtype.itemsize == 0
        )

    def read(self, slab: int | None = None, into: Tensor | None = None) -> Tensor:
        """The tensor, or slab number `slab` of its first axis, in memory of its own.

        Args:
            into: bytes to read to instead, if they are enough; what is returned then lives there.
        """
        if self.unpack is not None:
            whole = self.unpack()
            return whole if slab is None else whole[slab].clone()
        if self.strides is not None:
            span = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
            flat = self._numbers(self.offset, span if self.numel else 0, None)
            whole = flat.as_strided(self.shape, self.strides).contiguous()
            return whole if slab is None else whole[slab].clone()
        shape, offset = self.shape, self.offset
        if slab is not None:
            shape = shape[1:]
            offset += slab * math.prod(shape) * self.dtype.itemsize
        return self._numbers(offset, math.prod(shape), into).view(shape)

    def _numbers(self, offset: int, count: int, into: Tensor | None) -> Tensor:
        size = count * self.dtype.itemsize
        raw = torch.empty(size, dtype=torch.uint8) if into is None or into.numel() < size else into[:size]
        buffer = memoryview(raw.numpy().data)
        with self.path.open("rb") as file:
            file.seek(offset)
            while buffer:
                got = file.readinto(buffer)
                if not got:
                    raise Broken(f"{self.path} ends inside a tensor")
                buffer = buffer[got:]
        return raw.view(self.dtype)


def contiguous(shape: Shape, strides: Shape) -> bool:
    """Whether strides are those of a tensor that lies row by row."""
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


@dataclass
class Contents:
    """What a reader found in one file."""

    entries: dict[str, Entry]
    container: str
    metadata: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
