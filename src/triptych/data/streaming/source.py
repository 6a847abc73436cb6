"""A source too large to hold: examples are read where they lie, and what is known of all of them stays on disk."""

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
    """What is read of an example, as `picture_in`, `captions_in` and `mask_in` take it."""

    image: Any
    name: str
    caption: Any = None
    mask: Any = None


class RowReader(Protocol):
    """The examples of some files by number, and what an index knows of them."""

    columns: Columns
    bounds: np.ndarray
    """int64 (runs + 1,): where each stretch that is read one after the other begins, and the number of rows."""
    numbering: dict[str, Any] | None
    """What `places.Numbering` said of the labels; None without any."""
    names: tuple[str, ...] | None
    """The classes, where the files themselves say them."""
    labels_file: Path
    fingerprint: str

    def __len__(self) -> int: ...
    def cells(self, row: int, /) -> RowCells: ...
    def hold(self, rows: int, window: int, /) -> None: ...


class StreamSource:
    """Examples of `Rows` as a `Source`; see `triptych.data.open`. Nothing grows with their number but files.

    Attributes:
        bounds: where each run of rows begins, and the number of rows; for `data.loading.stream_order.LaneOrder`.
        fingerprint: hex digest of names, labels and where everything lies, sizes included; pictures are not read.
    """

    def __init__(
        self,
        rows: RowReader,
        classes: tuple[str, ...] | None,
        labels: Path | None,
        legend: LabelMap | None,
        name: str,
        root: Path,
    ):
        self._rows, self.name, self.root, self.legend = rows, name, root, legend
        self.classes = classes if labels is not None else None
        self._labels_file = labels
        self._label = None if labels is None else RecordFile(labels, LABEL_DTYPE)
        self.mask_classes: tuple[str, ...] | None = None if legend is None else legend.classes
        self.mask_colors: tuple[Color, ...] | None = None if legend is None else legend.colors
        self.groupings: dict[str, tuple[str, ...]] = {}
        self.bounds, self.hold = rows.bounds, rows.hold
        self.fingerprint = hashlib.sha256(repr((rows.fingerprint, self.classes)).encode()).hexdigest()[:32]

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def labels(self) -> np.ndarray | None:
        """int32 (n,), mapped from its file; None where nothing is labelled."""
        return None if self._labels_file is None else np.memmap(self._labels_file, LABEL_DTYPE, "r")

    @property
    def captions(self) -> "Sequence[tuple[str, ...]] | None":
        """All that each example may be called, read when it is asked for; None where no column holds any."""
        if self._rows.columns.caption is None:
            return None
        return _LazyCaptions(lambda row: captions_in_cell(self._rows.cells(row).caption), range(len(self)))

    def __getitem__(self, index: int, /) -> Example:
        cells = self._rows.cells(int(index))
        captions = captions_in_cell(cells.caption)
        mask = None
        if self.legend is not None and cells.mask is not None:
            mask = self.legend.read(*mask_in_cell(cells.mask, self.root, cells.name))
        return Example(
            image=image_in_cell(cells.image, self.root)[0],
            label=None if self._label is None else int(self._label[int(index)]),
            caption=captions[0] if captions else None,
            id=cells.name,
            mask=mask,
        )

    def contents(self) -> None:
        """None: only the fingerprint says whether the data changed."""

    def __repr__(self) -> str:
        return f"<{self.name}: a stream of {len(self)} images>"


class StreamSplit:
    """Of each `step` neighbours in a stream one, drawn by `seed`, or all others: a split that takes no memory.

    Being spread evenly, it has of every class its share, however the data is sorted.
    """

    def __init__(self, source: StreamSource, step: int, seed: int, *, others: bool = False):
        self.source, self.step, self.seed, self.others = source, step, seed, others
        self.classes, self.groupings = source.classes, source.groupings
        self.mask_classes, self.mask_colors = source.mask_classes, source.mask_colors
        self.hold = source.hold
        self.bounds = self._below(source.bounds)

    def _below(self, row: Any) -> Any:
        """How many of these come before a row of the source."""
        block, at = np.divmod(row, self.step)
        count_before = block + (hashed_integers(block, self.step, self.seed) < at)
        return row - count_before if self.others else count_before

    def row(self, index: Any) -> Any:
        """The row of the source."""
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
        """All that each example may be called."""
        full = self.source.captions
        return None if full is None else _LazyCaptions(lambda i: full[int(self.row(i))], range(len(self)))

    @property
    def fingerprint(self) -> str:
        """Of the source, and of which examples these are."""
        which = (self.source.fingerprint, self.step, self.seed, self.others)
        return hashlib.sha256(repr(which).encode()).hexdigest()[:32]

    def contents(self) -> None:
        """None, as of the full stream."""


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
    """The file of class indices of all rows: as they were noted, or where text turned up in another order than that of
    `classes`, written once beside them."""
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
            with open(rows.labels_file, "rb") as noted:
                while content := noted.read(LABEL_CHUNK * LABEL_DTYPE.itemsize):
                    file.write(table[np.frombuffer(content, LABEL_DTYPE)].tobytes())

        write_atomically(path, write)
    return path
