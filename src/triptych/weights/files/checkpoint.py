"""An opened checkpoint: a table of its tensors, and the memory that they are read into or mapped to."""

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from triptych.errors import CheckpointError
from triptych.weights.files.sanitize import printable
from triptych.weights.files.tensor_entry import Shape, TensorEntry


@dataclass
class CheckpointFile:
    """The names, shapes and locations of a checkpoint's tensors, and the configs stored next to them."""

    path: Path
    """The file or folder that was opened."""
    entries: dict[str, TensorEntry]
    container: str
    """safetensors, pickle or npz."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Strings in the header of a safetensors file."""
    notes: list[str] = field(default_factory=list)
    """Choices made while opening: wrappers that were removed, parts that were left out."""
    settings: dict[str, Any] = field(default_factory=dict)
    """JSON next to the weights by name ("config", "preprocessor_config"); plain values in a pickle as "inside"."""
    everything: dict[str, TensorEntry] = field(default_factory=dict, repr=False)
    """All tensors of the file, also those outside of the dict that `entries` were taken from."""
    yaml: Path | None = None
    """YAML config next to the weights, as CompVis' files have; not read yet."""
    borrowed_from_file: bool = False
    """Whether all tensors of the last `borrow` are mapped pages of the file."""
    _maps: dict[Path, mmap.mmap] = field(default_factory=dict, repr=False)
    _scratch: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8), repr=False)
    _borrowed: list[str] = field(default_factory=list, repr=False)

    @property
    def shapes(self) -> Mapping[str, Shape]:
        return {name: entry.shape for name, entry in self.entries.items()}

    def read(self, name: str, index: int | None = None, into: Tensor | None = None) -> Tensor:
        """Read a tensor, or its slice `tensor[index]`, into memory.

        Raises:
            CheckpointError: the file is damaged there.
        """
        entry = self.entries[name]
        try:
            return entry.read(index, into)
        except Exception as problem:  # zipfile, zlib and NumPy raise unrelated exceptions
            raise CheckpointError(
                f"{entry.path} cannot be read at {name}: {printable(problem)}; fetch it again"
            ) from problem

    def mapped(self, name: str) -> Tensor:
        """Return a tensor that is mapped to the file: read when touched, copied when written to, never changed there.

        Tensors that cannot be mapped (compressed, not contiguous, not aligned) are read.
        """
        entry = self.entries[name]
        if not entry.mappable:
            return self.read(name)
        if entry.path not in self._maps:
            with entry.path.open("rb") as file:
                self._maps[entry.path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        pages = self._maps[entry.path]
        flat = torch.frombuffer(pages, dtype=entry.dtype, count=entry.numel, offset=entry.offset)
        return flat.view(entry.shape)

    def borrow(self, names: Sequence[tuple[str, int | None]]) -> tuple[Tensor, ...]:
        """Return tensors, or slices of them, that are valid until the next call.

        They are mapped to the file if possible, and otherwise read into a buffer that all calls share: new memory for
        each would fragment the heap and take half as much again as the weights.

        Args:
            names: pairs of a name and an index into the first axis; None for the tensor itself.
        """
        self._release()
        sizes = [self._scratch_bytes(name, index) for name, index in names]
        if sum(sizes) >= self._scratch.numel():
            # Larger than any tensor, so that no tensor has exactly this storage.
            self._scratch = torch.empty(sum(sizes) + 64, dtype=torch.uint8)
        tensors, start = [], 0
        for (name, index), size in zip(names, sizes, strict=True):
            if size:
                tensors.append(self.read(name, index, self._scratch[start : start + size]))
                start += size
            else:
                tensor = self.mapped(name)
                tensors.append(tensor if index is None else tensor[index])
        self._borrowed = [name for (name, _), size in zip(names, sizes, strict=True) if not size]
        self.borrowed_from_file = not sum(sizes)
        return tuple(tensors)

    def _scratch_bytes(self, name: str, index: int | None) -> int:
        """Return the aligned number of bytes that a tensor needs in the buffer: 0 if it can be mapped."""
        entry = self.entries[name]
        size = entry.nbytes if index is None else entry.nbytes // max(entry.shape[0], 1)
        return 0 if entry.mappable else -(-size // 64) * 64

    def _release(self) -> None:
        """Free the mapped pages of the last `borrow`. Those still in use are read again when touched."""
        for name in self._borrowed:
            entry = self.entries[name]
            if entry.path in self._maps and hasattr(mmap, "MADV_DONTNEED"):
                start = entry.offset // mmap.PAGESIZE * mmap.PAGESIZE
                self._maps[entry.path].madvise(mmap.MADV_DONTNEED, start, entry.offset + entry.nbytes - start)
        self._borrowed = []
