"""Interfaces of data sources: `Source`, and `Streamable` if the examples are read in place from disk."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from triptych.data.example import Example
from triptych.data.masks import Color


class Source(Protocol):
    """Examples by index, with the classes, labels and captions of all of them. `triptych.data.open.open_source` returns
    one.

    A subclass must define `__len__` and `__getitem__`, and `fingerprint` to be trained on. By default there are no
    labels, masks or captions.
    """

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Name of each class; None if there are no labels."""
        return None

    @property
    def mask_classes(self) -> tuple[str, ...] | None:
        """Name of each class of the masks; None if there are no masks."""
        return None

    @property
    def mask_colors(self) -> tuple[Color, ...] | None:
        """RGB of each class of the masks, from 0 to 255; None if the masks have no palette."""
        return None

    @property
    def groupings(self) -> dict[str, tuple[str, ...]]:
        """Coarser names of the classes: {name of the grouping: group of each class}."""
        return {}

    @property
    def labels(self) -> np.ndarray | None:
        """Integers (n,): class of each example; None if there are no labels."""
        return None

    @property
    def captions(self) -> Sequence[tuple[str, ...]] | None:
        """All captions of each example, the first being `Example.caption`; None if there are none."""
        return None

    @property
    def fingerprint(self) -> str:
        """Hex digest of names, labels, captions and sizes, which changes if the data changes."""
        raise NotImplementedError

    def contents(self) -> Iterator[tuple[str, tuple[Any, ...]]] | None:
        """Return the name of each example and its part of the fingerprint: label, caption, sizes in bytes; None if
        listing them is expensive."""
        return None

    def image_digests(self) -> list[int] | None:
        """Return a checksum of the stored image of each example, which does not depend on its name; None if reading
        them is expensive."""
        return None

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Example: ...


@runtime_checkable
class Streamable(Protocol):
    """A source whose examples are read in place from disk, cheapest in the order in which they are stored."""

    @property
    def bounds(self) -> np.ndarray:
        """int64 (runs + 1,): first row of each run of rows that are stored contiguously, and the number of rows."""
        ...

    def hold(self, rows: int, window: int, /) -> None:
        """Keep the last `rows` decoded rows in memory, for reading in random order within windows of `window` rows."""
        ...


@runtime_checkable
class PartOfSource(Protocol):
    """A source whose examples are a part of those of another source."""

    @property
    def source(self) -> Source:
        """The other source."""
        ...


def full_source(source: Source) -> Source:
    """Return the source that `source` is, directly or indirectly, a part of; itself if it is not a part."""
    while isinstance(source, PartOfSource):
        source = source.source
    return source


class Subset:
    """Some examples of a source, in a given order.

    Args:
        source: the full source.
        indices: integers (m,), indices of the examples.
    """

    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray):
        self.source, self.indices = source, np.asarray(indices, dtype=np.int64)
        self.classes, self.groupings = source.classes, source.groupings
        self.mask_classes, self.mask_colors = source.mask_classes, source.mask_colors
        self.labels = None if source.labels is None else source.labels[self.indices]

    @property
    def captions(self) -> Sequence[tuple[str, ...]] | None:
        """All captions of each example."""
        captions = self.source.captions
        return None if captions is None else [captions[i] for i in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int, /) -> Example:
        return self.source[int(self.indices[index])]

    @property
    def fingerprint(self) -> str:
        """Hex digest of the source's fingerprint and the indices."""
        return hashlib.sha256(self.source.fingerprint.encode() + self.indices.tobytes()).hexdigest()[:32]

    def contents(self) -> Iterator[tuple[str, tuple[Any, ...]]] | None:
        """As `Source.contents`, for the examples of the subset."""
        contents = self.source.contents()
        if contents is None:
            return None
        examples = list(contents)
        return (examples[i] for i in self.indices)

    def image_digests(self) -> list[int] | None:
        """As `Source.image_digests`, for the examples of the subset."""
        digests = self.source.image_digests()
        return None if digests is None else [digests[i] for i in self.indices]
