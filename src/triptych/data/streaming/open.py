"""Sources that are read in place: which files there are, in which splits, and what their labels mean together."""

import glob
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from triptych.data.masks import LabelMap
from triptych.data.sources.detect import Spec, data_files, group_by_split
from triptych.data.sources.folders import metadata_file
from triptych.data.sources.label_maps import find_label_map
from triptych.data.sources.mask_folders import dataset_root
from triptych.data.sources.splits import choose_split, split_folders
from triptych.data.sources.table import mask_in_cell
from triptych.data.streaming.folder import FolderRows
from triptych.data.streaming.parquet import ParquetRows
from triptych.data.streaming.source import RowReader, StreamSource, StreamSplit, label_file
from triptych.data.streaming.tar import TarRows
from triptych.errors import UserError

RequestedColumns = tuple[str | None, ...]


class OpenedStream:
    """What `spec` names, indexed once for all of its splits.

    Args:
        spec: tar shards or parquet files, as a folder (with splits, as in `open_source`), a glob or a file; or a folder
            of pictures.
        asked: the columns of image, label, caption and mask, where the user named them.

    Raises:
        UserError: another kind of data; files that are damaged or do not agree; as the kinds say.
    """

    def __init__(self, spec: Spec, requested: RequestedColumns, ignore_index: int, reduce_zero_label: bool):
        self.spec, self.ignore_index, self.reduce_zero_label = spec, ignore_index, reduce_zero_label
        path = Path(spec).expanduser().absolute()
        self.root = dataset_root(path) if path.is_dir() else path.parent
        self.splits: dict[str, RowReader] = {
            split: make(requested, self._name(split)) for split, make in _row_readers(path, spec).items()
        }
        self.classes = _classes(self.splits)
        self._legend: LabelMap | None = None

    def source(self, split: str | None) -> StreamSource:
        chosen = choose_split(os.fspath(self.spec), list(self.splits), split)
        rows = self.splits[chosen]
        if len(rows) == 0:
            raise UserError(
                f"{os.fspath(self.spec)} holds no images{f' in its split {chosen}' if chosen else ''}"
            )
        labels = None if self.classes is None or _is_unlabeled(rows) else label_file(rows, self.classes)
        legend = self._read_legend() if rows.columns.mask is not None else None
        return StreamSource(rows, self.classes, labels, legend, self._name(chosen), self.root)

    def split_off(self, fraction: float, seed: int) -> tuple[StreamSplit, StreamSplit]:
        """What to train on and what to evaluate on, of data without splits."""
        stream = self.source(None)
        if len(stream) < 2:
            raise UserError(
                f"{os.fspath(self.spec)} holds one image; give one to train and one to evaluate on"
            )
        step = min(max(2, round(1 / fraction)), len(stream))
        return StreamSplit(stream, step, seed, others=True), StreamSplit(stream, step, seed)

    def _name(self, split: str) -> str:
        return os.path.basename(os.path.normpath(self.spec)) + (f"/{split}" if split else "")

    def _read_legend(self) -> LabelMap:
        if self._legend is None:
            self._legend = find_label_map(self._masks, self.root, self.ignore_index, self.reduce_zero_label)
        return self._legend

    def _masks(self) -> Iterator[tuple[bytes | str, str]]:
        for rows in self.splits.values():
            for row in range(len(rows)) if rows.columns.mask is not None else ():
                cells = rows.cells(row)
                if cells.mask is not None:
                    yield mask_in_cell(cells.mask, self.root, cells.name)


def _row_readers(path: Path, spec: Spec) -> dict[str, Callable[[RequestedColumns, str], RowReader]]:
    """By split, what makes its rows."""
    if path.is_dir():
        folder = dataset_root(path)
        splits = split_folders(folder) or {"": folder}
        readers: dict[str, Any] = {}
        for split, below in splits.items():
            files = data_files(below)
            if files and not split:
                return _readers_of_files(files)
            if files:
                readers[split] = next(iter(_readers_of_files(files).values()))
            elif (lists := metadata_file(below)) is not None:
                raise UserError(
                    f"{lists} is read whole, not streamed; leave --loading.stream out, or make shards"
                )
            else:
                prefix = f"{below.name}/" if split else ""
                readers[split] = lambda requested, name, below=below, prefix=prefix: FolderRows(below, prefix)
        return readers
    if path.is_file():
        return _readers_of_files([path])
    if files := [Path(name) for name in sorted(glob.glob(str(path)))] if glob.has_magic(str(path)) else []:
        return _readers_of_files(files)
    raise UserError(f"{os.fspath(spec)} does not exist, and only files here can be streamed; check the path")


def _readers_of_files(files: list[Path]) -> dict[str, Any]:
    suffix, groups = group_by_split(files)

    def rows(some: list[Path]) -> Callable[[RequestedColumns, str], RowReader]:
        if suffix == ".parquet":
            return lambda requested, name: ParquetRows(some, requested, name)
        return lambda requested, name: TarRows(some, requested)

    return {split: rows(some) for split, some in groups.items()}


def _is_unlabeled(rows: RowReader) -> bool:
    """Without labels, or with -1 throughout, the hub's way to hide a test set's."""
    known = rows.numbering
    return known is None or (
        known["highest"] == known["lowest"] == -1 and not known["missing"] and not known["names"]
    )


def _classes(splits: dict[str, RowReader]) -> tuple[str, ...] | None:
    """The classes of all splits: those that the files name, else texts in order, else numbers from 0.

    Raises:
        UserError: labels that are missing, negative, beyond the named classes, or of another kind in another split.
    """
    labelled = {split: rows for split, rows in splits.items() if not _is_unlabeled(rows)}
    if not labelled:
        return None
    declared = next((rows.names for rows in labelled.values() if rows.names), None)
    texts: set[str] = set()
    highest = 0
    for split, rows in labelled.items():
        known, column = rows.numbering, rows.columns.label
        assert known is not None
        where = f" in split {split}" if split else ""
        if known["missing"]:
            raise UserError(
                f"{known['missing']} of {len(rows)} examples have no label in column {column}{where}, the first being "
                f"{known['first missing']}; label them or remove them (the files of an example follow one another)"
            )
        if known["lowest"] < 0:
            raise UserError(
                f"column {column}{where} holds the label {known['lowest']}; number the classes from 0"
            )
        texts.update(known["names"])
        highest = max(highest, known["highest"])
    if texts and any(not rows.numbering["names"] for rows in labelled.values() if rows.numbering):
        raise UserError("labels are text in one split and numbers in another; use one kind throughout")
    names = declared or (tuple(sorted(texts)) if texts else None)
    if names is None:
        return tuple(map(str, range(highest + 1)))
    if texts and not texts.issubset(names):
        raise UserError(f"label {min(texts.difference(names))!r} is none of the classes that the files name")
    if not texts and highest >= len(names):
        raise UserError(
            f"label {highest} is out of range: there are {len(names)} classes, numbered from 0; correct it"
        )
    return names
