"""A table of `datasets` as a source of examples, and the images in its cells."""

import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from triptych.data import drawn_masks
from triptych.data.example import Example
from triptych.data.masks import NUMBERS, LabelMap
from triptych.data.sources.columns import Columns
from triptych.data.sources.folders import ID_COLUMN
from triptych.data.sources.tar import MEMBER_MARK, read_member

if TYPE_CHECKING:
    from datasets import Dataset


MAX_DIGESTS = 100_000  # images whose content is read at the start of a run
DIGESTED_BYTES = 4096  # at each end of a file


class TableSource:
    """A table of `datasets` as a `Source`. The images of its examples are not decoded, but bytes or a path; masks are
    arrays.

    Attributes:
        name: name of the data set and its split.
        classes: name of each class; None if there are no labels.
        mask_classes: name of each class of the masks; None if there are no masks.
        mask_colors: RGB of each class of the masks; None if they have no palette.
        groupings: empty.
        labels: int64 (n,), class of each example; None if there are no labels.
        columns: names of the columns.
    """

    def __init__(
        self,
        table: "Dataset",
        columns: Columns,
        classes: tuple[str, ...] | None,
        labels: np.ndarray | None,
        label_map: LabelMap | None,
        name: str,
        root: Path,
    ):
        self.table, self.columns, self.name, self.root = table, columns, name, root
        self.classes = classes if labels is not None else None
        self.labels = labels
        self.label_map = label_map
        self.mask_classes = None if label_map is None else label_map.classes
        self.mask_colors = None if label_map is None else label_map.colors
        self.groupings: dict[str, tuple[str, ...]] = {}

    def __len__(self) -> int:
        return len(self.table)

    @property
    def captions(self) -> list[tuple[str, ...]] | None:
        """All captions of each example, the first being `Example.caption`; None if no column holds captions."""
        name = self.columns.caption
        if name is None or name not in self.table.features:
            return None
        return [captions_in_cell(cell) for cell in self.table[name][:]]

    def __getitem__(self, index: int, /) -> Example:
        row = self.table[int(index)]
        captions = captions_in_cell(row.get(self.columns.caption)) if self.columns.caption else ()
        image, path = image_in_cell(row[self.columns.image], self.root)
        name = row.get(ID_COLUMN) or (f"{self.name}/{index}" + (f" ({path})" if path else ""))
        return Example(
            image=image,
            label=None if self.labels is None else int(self.labels[index]),
            caption=captions[0] if captions else None,
            id=name,
            mask=self._mask(row, name),
        )

    def _mask(self, row: dict[str, Any], name: str) -> np.ndarray | None:
        if self.label_map is None or self.columns.mask is None:
            return None
        return self.label_map.read(*mask_in_cell(row[self.columns.mask], self.root, name))

    @property
    def fingerprint(self) -> str:
        """Hex digest of names, labels, captions, the label map and the sizes of images and masks in bytes."""
        digest = hashlib.sha256(repr((len(self), self.classes)).encode())
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        for name in (ID_COLUMN, self.columns.caption):
            if name is not None and name in self.table.features:
                digest.update(repr(self.table[name][:]).encode())
        digest.update(repr(self._sizes(self.columns.image)).encode())
        if self.label_map is not None and self.columns.mask is not None:
            digest.update(repr((self.label_map.classes, self._sizes(self.columns.mask))).encode())
            digest.update(self.label_map.table.tobytes())
            if self.label_map.encoding != NUMBERS:
                digest.update(repr(self.label_map.encoding).encode())
        return digest.hexdigest()[:32]

    def contents(self) -> Iterator[tuple[str, tuple[Any, ...]]]:
        """Yield the name of each example and its part of the fingerprint: label, caption, sizes in bytes."""
        count = len(self)
        names = (
            self.table[ID_COLUMN][:]
            if ID_COLUMN in self.table.features
            else [f"row {row}" for row in range(count)]
        )
        columns: list[Any] = [[None] * count if self.labels is None else self.labels.tolist()]
        caption = self.columns.caption
        if caption is not None and caption in self.table.features:
            columns.append(self.table[caption][:])
        else:
            columns.append([None] * count)
        columns.append(self._sizes(self.columns.image))
        if self.label_map is not None and self.columns.mask is not None:
            columns.append(self._sizes(self.columns.mask))
        for name, *cells in zip(names, *columns, strict=True):
            yield name, tuple(cells)

    def image_digests(self) -> list[int] | None:
        """Return a checksum of the stored image of each example: of its size, its first and its last bytes. An image
        that cannot be read has that of an empty file. None if there are more than `MAX_DIGESTS`."""
        if len(self) > MAX_DIGESTS:
            return None
        rows: Any = self.table.select_columns([self.columns.image]).with_format(None)
        return [_digest(image_in_cell(row[self.columns.image], self.root)[0]) for row in rows]

    def _sizes(self, column: str) -> list[int | None]:
        import pyarrow
        from pyarrow import compute  # its functions are created at run time, which type checkers do not see

        cells = self.table.data.column(column)
        paths = [None] * len(cells)
        if pyarrow.types.is_struct(cells.type):
            paths = compute.struct_field(cells, "path").to_pylist()  # type: ignore[attr-defined]
            cells = compute.struct_field(cells, "bytes")  # type: ignore[attr-defined]
        elif pyarrow.types.is_string(cells.type) or pyarrow.types.is_large_string(cells.type):
            return [self._size(path) for path in cells.to_pylist()]
        if len(cells) and drawn_masks.is_drawn(cells[0].as_py()):
            return [drawn_masks.checksum(cell) for cell in cells.to_pylist()]
        sizes = compute.binary_length(cells).to_pylist()  # type: ignore[attr-defined]
        return [self._size(path) if size is None else size for size, path in zip(sizes, paths, strict=True)]

    def _size(self, path: str | None) -> int | None:
        if path is not None and MEMBER_MARK in path:
            return int(path.rpartition("+")[2])
        try:
            return None if path is None else os.stat(self.root / path).st_size
        except OSError:
            return None

    def __repr__(self) -> str:
        classes = self.classes or self.mask_classes
        return f"<{self.name}: {len(self)} images{f' of {len(classes)} classes' if classes else ''}>"


def _digest(image: bytes | str) -> int:
    try:
        with io.BytesIO(image) if isinstance(image, bytes) else open(image, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            ends = (
                file.seek(0),
                file.read(DIGESTED_BYTES),
                file.seek(max(0, size - DIGESTED_BYTES)),
                file.read(),
            )
    except OSError:
        size, ends = 0, (0, b"", 0, b"")
    return int.from_bytes(hashlib.blake2b(repr((size, *ends)).encode(), digest_size=8).digest(), "little")


def captions_in_cell(cell: Any) -> tuple[str, ...]:
    """Return the captions in a cell, which holds a caption, a list of captions, or None."""
    captions = cell if isinstance(cell, list) else [cell]
    return tuple(str(caption) for caption in captions if caption is not None)


def image_in_cell(cell: Any, root: Path) -> tuple[bytes | str, str | None]:
    """Return the image in a cell, as bytes or a path, and its path as written in the data.

    Args:
        cell: bytes, a path relative to `root`, a place in a shard, or {"bytes": ..., "path": ...}.
    """
    content = cell.get("bytes") if isinstance(cell, dict) else cell if isinstance(cell, bytes) else None
    path = cell.get("path") if isinstance(cell, dict) else cell if isinstance(cell, str) else None
    if content is not None:
        return content, path
    if path is None:
        return b"", None  # `decode` rejects it as an empty file
    if MEMBER_MARK in path:
        return read_member(path), None
    return str(root / path), path


def mask_in_cell(cell: Any, root: Path, example: str) -> tuple[bytes | str, str]:
    """Return the mask in a cell, as bytes or a path, and its name in errors."""
    content, path = image_in_cell(cell, root)
    return content, content if isinstance(content, str) else path or f"the mask of {example}"


def empty_rows(table: "Dataset", column: str) -> np.ndarray:
    """Return the indices of rows without an image in a column. No image is read."""
    import pyarrow
    from pyarrow import compute

    cells = table.data.column(column)
    if pyarrow.types.is_struct(cells.type):
        parts = [compute.struct_field(cells, part) for part in ("bytes", "path")]  # type: ignore[attr-defined]
        return np.flatnonzero(np.logical_and(*(part.is_null().to_numpy() for part in parts)))
    return np.flatnonzero(cells.is_null().to_numpy())
