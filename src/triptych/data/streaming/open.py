"""Open sources that are read in place: their files, splits, classes and masks."""

import glob
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from triptych.data.image_formats import log_left_out
from triptych.data.masks import LabelMap, MaskOptions
from triptych.data.sources.annotations import find_annotations
from triptych.data.sources.detect import Spec, data_files, group_by_split
from triptych.data.sources.folders import metadata_file
from triptych.data.sources.label_maps import find_label_map
from triptych.data.sources.mask_folders import dataset_root, has_masks, log_layout
from triptych.data.sources.splits import choose_split, split_folders
from triptych.data.sources.table import mask_in_cell
from triptych.data.streaming.folder import FolderRows
from triptych.data.streaming.parquet import ParquetRows
from triptych.data.streaming.source import RowReader, StreamSource, StreamSplit, label_file
from triptych.data.streaming.tar import TarRows
from triptych.errors import ConfigError, DataError

RequestedColumns = tuple[str | None, ...]


class OpenedStream:
    """A data set that is read in place, indexed once for all of its splits.

    Args:
        spec: tar shards or parquet files (a folder, which may have splits as in `open_source`, a glob or a file), or a
            folder of images.
        requested: names of the image, label, caption and mask columns; None where the user has given none.
        options: what the user says about masks.

    Raises:
        DataError: data that cannot be streamed, or files that are damaged or disagree.
    """

    def __init__(self, spec: Spec, requested: RequestedColumns, options: MaskOptions):
        self.spec, self.options = spec, options
        path = Path(spec).expanduser().absolute()
        self.root = dataset_root(path) if path.is_dir() else path.parent
        if path.is_dir():
            log_layout(path, self.root)
            log_left_out(split_folders(self.root) or {"": self.root})
        self.splits: dict[str, RowReader] = {
            split: make(requested, self._name(split)) for split, make in _row_readers(path, spec).items()
        }
        self.classes = _classes(self.splits)
        self._label_map: LabelMap | None = None

    def source(self, split: str | None) -> StreamSource:
        chosen = choose_split(os.fspath(self.spec), list(self.splits), split)
        rows = self.splits[chosen]
        if len(rows) == 0:
            raise DataError(
                f"{os.fspath(self.spec)} holds no images{f' in split {chosen}' if chosen else ''}"
            )
        labels = None if self.classes is None or _is_unlabeled(rows) else label_file(rows, self.classes)
        label_map = self._read_label_map() if rows.columns.mask is not None else None
        return StreamSource(rows, self.classes, labels, label_map, self._name(chosen), self.root)

    def split_off(self, fraction: float, seed: int) -> tuple[StreamSplit, StreamSplit]:
        """Split data without splits into a source to train on and one to evaluate on."""
        stream = self.source(None)
        if len(stream) < 2:
            raise DataError(
                f"{os.fspath(self.spec)} holds only one image; give at least one to train on and one to evaluate on"
            )
        step = min(max(2, round(1 / fraction)), len(stream))
        return StreamSplit(stream, step, seed, others=True), StreamSplit(stream, step, seed)

    def _name(self, split: str) -> str:
        return os.path.basename(os.path.normpath(self.spec)) + (f"/{split}" if split else "")

    def _read_label_map(self) -> LabelMap:
        if self._label_map is None:
            self._label_map = find_label_map(self._masks, self.root, self.options)
        return self._label_map

    def _masks(self) -> Iterator[tuple[bytes | str, str]]:
        for rows in self.splits.values():
            for row in range(len(rows)) if rows.columns.mask is not None else ():
                cells = rows.cells(row)
                if cells.mask is not None:
                    yield mask_in_cell(cells.mask, self.root, cells.name)


def _row_readers(path: Path, spec: Spec) -> dict[str, Callable[[RequestedColumns, str], RowReader]]:
    """Return for each split a function that creates its rows."""
    if path.is_dir():
        folder = dataset_root(path)
        _refuse_masks_in_folders(folder)
        splits = split_folders(folder) or {"": folder}
        readers: dict[str, Any] = {}
        for split, below in splits.items():
            files = data_files(below)
            if files and not split:
                return _readers_of_files(files)
            if files:
                readers[split] = next(iter(_readers_of_files(files).values()))
            elif (lists := metadata_file(below)) is not None:
                raise ConfigError(
                    f"{lists} cannot be streamed, since metadata files are read into memory; omit --loading.stream, or "
                    "write shards"
                )
            else:
                prefix = f"{below.name}/" if split else ""
                readers[split] = lambda requested, name, below=below, prefix=prefix: FolderRows(below, prefix)
        return readers
    if path.is_file():
        return _readers_of_files([path])
    if files := [Path(name) for name in sorted(glob.glob(str(path)))] if glob.has_magic(str(path)) else []:
        return _readers_of_files(files)
    raise DataError(f"{os.fspath(spec)} does not exist, but only local files can be streamed; check the path")


def _refuse_masks_in_folders(folder: Path) -> None:
    if metadata_file(folder) or data_files(folder):
        return
    layout = "masks" if has_masks(folder) else find_annotations(folder)
    if layout is not None:
        raise ConfigError(
            f"{folder} holds images with {layout}{'' if layout == 'masks' else ' annotations'}, which cannot be "
            "streamed; omit --loading.stream, or write shards of images and masks"
        )


def _readers_of_files(files: list[Path]) -> dict[str, Any]:
    suffix, groups = group_by_split(files)

    def rows(paths: list[Path]) -> Callable[[RequestedColumns, str], RowReader]:
        if suffix == ".parquet":
            return lambda requested, name: ParquetRows(paths, requested, name)
        return lambda requested, name: TarRows(paths, requested)

    return {split: rows(paths) for split, paths in groups.items()}


def _is_unlabeled(rows: RowReader) -> bool:
    """Return whether rows have no labels, or -1 throughout, as in test sets of the hub."""
    numbering = rows.numbering
    return numbering is None or (
        numbering["highest"] == numbering["lowest"] == -1
        and not numbering["missing"]
        and not numbering["names"]
    )


def _classes(splits: dict[str, RowReader]) -> tuple[str, ...] | None:
    """Return the classes of all splits: those that the files name, else the sorted text labels, else "0", "1" ...

    Raises:
        DataError: labels are missing, negative or beyond the named classes, or their type differs between splits.
    """
    labeled = {split: rows for split, rows in splits.items() if not _is_unlabeled(rows)}
    if not labeled:
        return None
    declared = next((rows.names for rows in labeled.values() if rows.names), None)
    texts: set[str] = set()
    highest = 0
    for split, rows in labeled.items():
        numbering, column = rows.numbering, rows.columns.label
        assert numbering is not None
        where = f" in split {split}" if split else ""
        if numbering["missing"]:
            raise DataError(
                f"{numbering['missing']} of {len(rows)} examples have no label in column {column}{where}, the first of "
                f"which is {numbering['first missing']}; label or remove them, and store the files of an example in "
                "succession"
            )
        if numbering["lowest"] < 0:
            raise DataError(
                f"column {column}{where} holds the label {numbering['lowest']}; number the classes from 0"
            )
        texts.update(numbering["names"])
        highest = max(highest, numbering["highest"])
    if texts and any(not rows.numbering["names"] for rows in labeled.values() if rows.numbering):
        raise DataError("labels are text in one split and numbers in another; use one type throughout")
    names = declared or (tuple(sorted(texts)) if texts else None)
    if names is None:
        return tuple(map(str, range(highest + 1)))
    if texts and not texts.issubset(names):
        raise DataError(
            f"label {min(texts.difference(names))!r} is not among the classes that the files name; correct it"
        )
    if not texts and highest >= len(names):
        raise DataError(
            f"label {highest} is out of range: the {len(names)} classes are numbered from 0; correct it"
        )
    return names
