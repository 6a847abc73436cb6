"""Where pictures come from: one call opens a folder, metadata, shards, parquet, a hub id, or a built-in set."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from triptych.data.columns import Columns, find_columns, read_labels
from triptych.data.example import Example
from triptych.data.folders import ID
from triptych.data.layouts import Spec, read_tables
from triptych.data.shards import MARK, read_member
from triptych.data.splits import choose_split, held_back
from triptych.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset


class Source(Protocol):
    """Examples by index, and what is known of all of them. `emoji` and `scenes` return one as well."""

    @property
    def classes(self) -> tuple[str, ...] | None: ...
    @property
    def mask_classes(self) -> tuple[str, ...] | None: ...
    @property
    def groupings(self) -> dict[str, tuple[str, ...]]: ...
    @property
    def labels(self) -> np.ndarray | None: ...
    @property
    def fingerprint(self) -> str: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Example: ...


class TableSource:
    """A table of `datasets` as a `Source`. Pictures come undecoded: bytes or a path.

    Attributes:
        name: what was opened, and its split.
        classes: name of each class, None where nothing is labelled.
        mask_classes: name of each class of the masks, None where there are no masks.
        groupings: coarser names of the classes; none here.
        labels: int64 (n,), None where nothing is labelled.
        columns: which column is what.
    """

    def __init__(
        self,
        table: "Dataset",
        columns: Columns,
        classes: tuple[str, ...] | None,
        labels: np.ndarray | None,
        name: str,
        root: Path,
    ):
        self.table, self.columns, self.name, self.root = table, columns, name, root
        self.classes = classes if labels is not None else None
        self.labels = labels
        self.mask_classes: tuple[str, ...] | None = None
        self.groupings: dict[str, tuple[str, ...]] = {}

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int, /) -> Example:
        row = self.table[int(index)]
        caption = row.get(self.columns.caption) if self.columns.caption else None
        if isinstance(caption, list):
            caption = caption[0] if caption else None
        image, path = self._image(row[self.columns.image])
        return Example(
            image=image,
            label=None if self.labels is None else int(self.labels[index]),
            caption=None if caption is None else str(caption),
            id=row.get(ID) or (f"{self.name}/{index}" + (f" ({path})" if path else "")),
        )

    def _image(self, value: Any) -> tuple[bytes | str, str | None]:
        """Bytes or a path, and what the picture was called."""
        content = (
            value.get("bytes") if isinstance(value, dict) else value if isinstance(value, bytes) else None
        )
        path = value.get("path") if isinstance(value, dict) else value if isinstance(value, str) else None
        if content is not None:
            return content, path
        if path is None:
            return b"", None  # refused by `decode`, as an empty file is
        if MARK in path:
            return read_member(path), None
        return str(self.root / path), path

    @property
    def fingerprint(self) -> str:
        """Hex digest of names, labels, captions and the pictures' sizes in bytes; no picture is read."""
        digest = hashlib.sha256(repr((len(self), self.classes)).encode())
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        for name in (ID, self.columns.caption):
            if name is not None and name in self.table.features:
                digest.update(repr(self.table[name][:]).encode())
        digest.update(repr(self._sizes()).encode())
        return digest.hexdigest()[:32]

    def _sizes(self) -> list[int | None]:
        import pyarrow
        from pyarrow import compute  # its functions are made at run time, unseen by type checkers

        cells = self.table.data.column(self.columns.image)
        paths = [None] * len(cells)
        if pyarrow.types.is_struct(cells.type):
            paths = compute.struct_field(cells, "path").to_pylist()  # type: ignore[attr-defined]
            cells = compute.struct_field(cells, "bytes")  # type: ignore[attr-defined]
        elif pyarrow.types.is_string(cells.type) or pyarrow.types.is_large_string(cells.type):
            return [self._size(path) for path in cells.to_pylist()]
        sizes = compute.binary_length(cells).to_pylist()  # type: ignore[attr-defined]
        return [self._size(path) if size is None else size for size, path in zip(sizes, paths, strict=True)]

    def _size(self, path: str | None) -> int | None:
        if path is not None and MARK in path:
            return int(path.rpartition("+")[2])
        try:
            return None if path is None else os.stat(self.root / path).st_size
        except OSError:
            return None

    def __repr__(self) -> str:
        classes = f" of {len(self.classes)} classes" if self.classes else ""
        return f"<{self.name}: {len(self)} images{classes}>"


class Subset:
    """Some of a source's examples, in a given order."""

    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray):
        self.source, self.indices = source, np.asarray(indices, dtype=np.int64)
        self.classes, self.groupings = source.classes, source.groupings
        self.mask_classes = source.mask_classes
        self.labels = None if source.labels is None else source.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int, /) -> Example:
        return self.source[int(self.indices[index])]

    @property
    def fingerprint(self) -> str:
        """Of the source, and of which examples these are."""
        return hashlib.sha256(self.source.fingerprint.encode() + self.indices.tobytes()).hexdigest()[:32]


def open_source(
    spec: Spec,
    split: str | None = None,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    caption_column: str | None = None,
) -> Source:
    """The pictures that `spec` names.

    Args:
        spec: "emoji" or "scenes" (or "emoji:FOLDER", made by `tools/make_emoji.py`); a folder of class folders, or of
            train/ and val/ or test/ with such; a folder with metadata.jsonl or metadata.csv (column
            file_name, and a label or caption), or that file; *.tar shards, as a folder, a glob or a file;
            *.parquet likewise; a folder of `save_to_disk`; or a hub id, "org/name" or "org/name:config".
        split: "train", "val", "test" or another that the data has. "eval" is val, else test, else all of
            data that has no splits. None is train, or all of data that has no splits.
        image_column, label_column, caption_column: where the data has several that could be it.

    Raises:
        UserError: nothing there, no pictures, no such split, ambiguous or unknown columns, labels missing or
            out of range. Damaged pictures are found when they are decoded.
    """
    if is_built_in(spec):
        return _open_built_in(spec, split)
    return _from_tables(
        spec, read_tables(spec, image_column), split, image_column, label_column, caption_column
    )


def train_and_eval(
    spec: Spec,
    eval_fraction: float = 0.1,
    seed: int = 0,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    caption_column: str | None = None,
) -> tuple[Source, Source]:
    """What to train on and what to evaluate on: the data's own split, else a seeded one, even over classes.

    Args:
        spec, image_column, label_column, caption_column: as in `open_source`.
        eval_fraction: share held back where the data has no split of its own; at least one example.
        seed: of that choice.

    Raises:
        UserError: as `open_source`; a single picture.
    """
    if is_built_in(spec):
        return _open_built_in(spec, "train"), _open_built_in(spec, "eval")
    tables = read_tables(spec, image_column)

    def of(split: str | None) -> Source:
        return _from_tables(spec, tables, split, image_column, label_column, caption_column)

    if "train" in tables and ("val" in tables or "test" in tables):
        return of("train"), of("eval")
    whole = of(None)
    if len(whole) < 2:
        raise UserError(
            f"{os.fspath(spec)} holds one image; give one to train and one to evaluate on at least"
        )
    held = held_back(len(whole), whole.labels, eval_fraction, seed)
    return Subset(whole, np.flatnonzero(~held)), Subset(whole, np.flatnonzero(held))


def _from_tables(
    spec: Spec,
    tables: "dict[str, Dataset]",
    split: str | None,
    image_column: str | None,
    label_column: str | None,
    caption_column: str | None,
) -> "TableSource":
    chosen = choose_split(os.fspath(spec), list(tables), split)
    table = tables[chosen]
    if len(table) == 0:
        raise UserError(f"{os.fspath(spec)} holds no images" + (f" in its split {chosen}" if chosen else ""))
    ours = ID in table.features  # of our own readers, which call the pictures "image"
    columns = find_columns(table.features, "image" if ours else image_column, label_column, caption_column)
    classes, labels = read_labels(tables, columns.label) if columns.label else (None, {})
    name = os.path.basename(os.path.normpath(spec)) + (f"/{chosen}" if chosen else "")
    path = Path(spec).expanduser().absolute()
    return TableSource(
        table, columns, classes, labels.get(chosen), name, path if path.is_dir() else path.parent
    )


def is_built_in(spec: Spec) -> bool:
    """Whether `spec` names "emoji" or "scenes", and nothing on disk is called so."""
    return os.fspath(spec).partition(":")[0] in ("emoji", "scenes") and not Path(spec).exists()


def _open_built_in(spec: Spec, split: str | None) -> Source:
    from triptych.data.emoji import emoji
    from triptych.data.scenes import scenes

    name, _, folder = os.fspath(spec).partition(":")
    asked = {None: "train", "eval": "test", "val": "test"}.get(split, split)
    return {"emoji": emoji, "scenes": scenes}[name](asked, root=folder or None)
