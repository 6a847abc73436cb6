"""A source that does not fit in memory: examples are read in place, and the index of all of them stays on disk."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, overload

import numpy as np

from triptych.atomic_write import write_atomically
from triptych.data.disk_index import RecordFile
from triptych.data.example import Example
from triptych.data.loading.permutation import hashed_integers
from triptych.data.masks import Color, LabelMap
from triptych.data.sources.columns import Columns
from triptych.data.sources.table import captions_in_cell, image_in_cell, mask_in_cell

LABEL_CHUNK = 1 << 20  # labels at a time
LABEL_DTYPE = np.dtype("<i4")


class RowCells(NamedTuple):
    """The cells of a row: the arguments of `image_in_cell`, `captions_in_cell` and `mask_in_cell`, and its name."""

    image: Any
    name: str
    caption: Any = None
    mask: Any = None


class RowReader(Protocol):
    """The rows of some files by index, and their index on disk."""

    columns: Columns
    """Names of the columns."""
    bounds: np.ndarray
    """int64 (runs + 1,): first row of each run of rows that are stored contiguously, and the number of rows."""
    numbering: dict[str, Any] | None
    """Summary of the labels (`triptych.data.disk_index.LabelWriter`); None if there are none."""
    names: tuple[str, ...] | None
    """Class names, if the files contain them."""
    labels_file: Path
    """File with the label of each row."""
    fingerprint: str
    """Hex digest of names, labels and the position and size of everything."""

    def __len__(self) -> int: ...
    def cells(self, row: int, /) -> RowCells: ...
    def hold(self, rows: int, window: int, /) -> None: ...


class StreamSource:
    """The rows of a `RowReader` as a `Source` whose memory does not depend on their number.

    Attributes:
        bounds: int64 (runs + 1,), first row of each run, and the number of rows; for
            `triptych.data.loading.stream_order.StreamOrder`.
        fingerprint: hex digest of names, labels and the position and size of everything.
    """

    def __init__(
        self,
        rows: RowReader,
        classes: tuple[str, ...] | None,
        labels: Path | None,
        label_map: LabelMap | None,
        name: str,
        root: Path,
    ):
        self._rows, self.name, self.root, self.label_map = rows, name, root, label_map
        self.classes = classes if labels is not None else None
        self._labels_file = labels
        self._label = None if labels is None else RecordFile(labels, LABEL_DTYPE)
        self.mask_classes: tuple[str, ...] | None = None if label_map is None else label_map.classes
        self.mask_colors: tuple[Color, ...] | None = None if label_map is None else label_map.colors
        self.groupings: dict[str, tuple[str, ...]] = {}
        self.bounds, self.hold = rows.bounds, rows.hold
        self.fingerprint = hashlib.sha256(repr((rows.fingerprint, self.classes)).encode()).hexdigest()[:32]

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def labels(self) -> np.ndarray | None:
        """int32 (n,): class of each example, memory-mapped from its file; None if there are no labels."""
        return None if self._labels_file is None else np.memmap(self._labels_file, LABEL_DTYPE, "r")

    @property
    def captions(self) -> "Sequence[tuple[str, ...]] | None":
        """All captions of each example, read on access; None if no column holds captions."""
        if self._rows.columns.caption is None:
            return None
        return _LazyCaptions(lambda row: captions_in_cell(self._rows.cells(row).caption), range(len(self)))

    def __getitem__(self, index: int, /) -> Example:
        cells = self._rows.cells(int(index))
        captions = captions_in_cell(cells.caption)
        mask = None
        if self.label_map is not None and cells.mask is not None:
            mask = self.label_map.read(*mask_in_cell(cells.mask, self.root, cells.name))
        return Example(
            image=image_in_cell(cells.image, self.root)[0],
            label=None if self._label is None else int(self._label[int(index)]),
            caption=captions[0] if captions else None,
            id=cells.name,
            mask=mask,
        )

    def contents(self) -> None:
        """Return None: listing the examples is expensive, and the fingerprint shows whether the data has changed."""

    def image_digests(self) -> None:
        """Return None: reading all images takes too long."""

    def __repr__(self) -> str:
        return f"<{self.name}: a stream of {len(self)} images>"


class StreamSplit:
    """A split of a stream that needs no memory: of every `step` consecutive examples one, chosen at random, or all the
    others.

    Since it is spread evenly over the stream, it contains about the same fraction of each class, even if the data is
    sorted by class.

    Args:
        source: the stream.
        step: number of consecutive examples of which one is chosen.
        seed: seed of the choice.
        others: contain the examples that are not chosen.
    """

    def __init__(self, source: StreamSource, step: int, seed: int, *, others: bool = False):
        self.source, self.step, self.seed, self.others = source, step, seed, others
        self.classes, self.groupings = source.classes, source.groupings
        self.mask_classes, self.mask_colors = source.mask_classes, source.mask_colors
        self.hold = source.hold
        self.bounds = self._below(source.bounds)

    def _below(self, row: Any) -> Any:
        """Return how many examples of the split come before a row of the source."""
        block, at = np.divmod(row, self.step)
        count_before = block + (hashed_integers(block, self.step, self.seed) < at)
        return row - count_before if self.others else count_before

    def row(self, index: Any) -> Any:
        """Return the row of an example in the source."""
        if not self.others:
            return index * self.step + hashed_integers(index, self.step, self.seed)
        block, at = np.divmod(index, self.step - 1)
        return block * self.step + at + (at >= hashed_integers(block, self.step, self.seed))

    def __len__(self) -> int:
        return int(self._below(len(self.source)))

    def __getitem__(self, index: int, /) -> Example:
        return self.source[int(self.row(int(index)))]

    @property
    def labels(self) -> np.ndarray | None:
        full = self.source.labels
        return None if full is None else full[self.row(np.arange(len(self)))]

    @property
    def captions(self) -> "Sequence[tuple[str, ...]] | None":
        """All captions of each example."""
        full = self.source.captions
        return None if full is None else _LazyCaptions(lambda i: full[int(self.row(i))], range(len(self)))

    @property
    def fingerprint(self) -> str:
        """Hex digest of the source's fingerprint and the choice of examples."""
        which = (self.source.fingerprint, self.step, self.seed, self.others)
        return hashlib.sha256(repr(which).encode()).hexdigest()[:32]

    def contents(self) -> None:
        """Return None, as for the full stream."""

    def image_digests(self) -> None:
        """Return None: reading all images takes too long."""


class _LazyCaptions(Sequence[tuple[str, ...]]):
    def __init__(self, read: Callable[[int], tuple[str, ...]], rows: range):
        self.read, self.rows = read, rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> tuple[str, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> "_LazyCaptions": ...
    def __getitem__(self, index: int | slice) -> "tuple[str, ...] | _LazyCaptions":
        if isinstance(index, slice):
            return _LazyCaptions(self.read, self.rows[index])
        return self.read(self.rows[index])


def label_file(rows: RowReader, classes: tuple[str, ...]) -> Path:
    """Return the file with the class index of each row.

    It is `rows.labels_file`, unless that numbers text labels in another order than `classes`: then a converted file is
    written next to it once.
    """
    assert rows.numbering is not None
    index = {name: i for i, name in enumerate(classes)}
    order = [index[name] for name in rows.numbering["names"]]
    if order == list(range(len(order))):
        return rows.labels_file
    digest = hashlib.sha256(repr((rows.fingerprint, classes)).encode()).hexdigest()[:16]
    path = rows.labels_file.with_name(f"labels-{digest}.bin")
    if not path.exists():
        table = np.array(order, LABEL_DTYPE)

        def write(file: Any) -> None:
            with open(rows.labels_file, "rb") as labels:
                while content := labels.read(LABEL_CHUNK * LABEL_DTYPE.itemsize):
                    file.write(table[np.frombuffer(content, LABEL_DTYPE)].tobytes())

        write_atomically(path, write)
    return path
