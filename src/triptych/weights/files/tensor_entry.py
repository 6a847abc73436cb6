"""The location of one tensor in a file, and how to read it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]


class DamagedFileError(Exception):
    """Raised by readers of single files; `open_checkpoint` turns it into a `CheckpointError` that names the file."""


@dataclass(frozen=True)
class TensorEntry:
    """A tensor that has not been read yet."""

    path: Path
    offset: int
    """Position of the first byte in the file."""
    shape: Shape
    dtype: torch.dtype
    strides: Shape | None = None
    """In elements; None if the tensor is contiguous."""
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
        """Whether the bytes in the file are those of the tensor, aligned."""
        return (
            self.unpack is None
            and self.strides is None
            and self.numel > 0
            and self.offset % self.dtype.itemsize == 0
        )

    def read(self, index: int | None = None, into: Tensor | None = None) -> Tensor:
        """Read the tensor, or the slice `tensor[index]`, into memory of its own.

        Args:
            into: uint8 buffer to read into. It is used if it is large enough, and the result is then a view of it.
        """
        if self.unpack is not None:
            tensor = self.unpack()
            return tensor if index is None else tensor[index].clone()
        if self.strides is not None:
            span = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
            flat = self._read_elements(self.offset, span if self.numel else 0, None)
            tensor = flat.as_strided(self.shape, self.strides).contiguous()
            return tensor if index is None else tensor[index].clone()
        shape, offset = self.shape, self.offset
        if index is not None:
            shape = shape[1:]
            offset += index * math.prod(shape) * self.dtype.itemsize
        return self._read_elements(offset, math.prod(shape), into).view(shape)

    def _read_elements(self, offset: int, count: int, into: Tensor | None) -> Tensor:
        size = count * self.dtype.itemsize
        raw = torch.empty(size, dtype=torch.uint8) if into is None or into.numel() < size else into[:size]
        buffer = memoryview(raw.numpy().data)
        with self.path.open("rb") as file:
            file.seek(offset)
            while buffer:
                count_read = file.readinto(buffer)
                if not count_read:
                    raise DamagedFileError(f"{self.path} ends inside a tensor")
                buffer = buffer[count_read:]
        return raw.view(self.dtype)


def is_contiguous(shape: Shape, strides: Shape) -> bool:
    """Return whether strides are those of a contiguous (row-major) tensor."""
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


@dataclass
class FileContents:
    """The tensors and metadata of one file. What each reader returns."""

    entries: dict[str, TensorEntry]
    container: str
    """safetensors, pickle or npz."""
    metadata: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
