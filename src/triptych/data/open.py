"""Where pictures come from: one call opens a folder, metadata, shards, parquet, a hub id, or a built-in set."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from triptych.data.masks import LabelMap, MaskFormatError
from triptych.data.source import Source, Subset
from triptych.data.sources.columns import find_columns, read_labels, row_name
from triptych.data.sources.detect import Spec, read_tables
from triptych.data.sources.folders import ID_COLUMN
from triptych.data.sources.label_maps import find_label_map
from triptych.data.sources.mask_folders import dataset_root
from triptych.data.sources.splits import choose_held_out, choose_split
from triptych.data.sources.table import TableSource, empty_rows, mask_in_cell
from triptych.data.streaming.open import OpenedStream
from triptych.errors import UserError


def open_source(
    spec: Spec,
    split: str | None = None,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    caption_column: str | None = None,
    mask_column: str | None = None,
    ignore_index: int = 255,
    reduce_zero_label: bool = False,
    stream: bool = False,
) -> Source:
    """The pictures that `spec` names.

    Args:
        spec: "emoji" or "scenes" (or "emoji:FOLDER", made by `tools/make_emoji.py`); a folder of class folders, or of
            train/ and val/ or test/ with such; a folder with metadata.jsonl or metadata.csv (column
            file_name, and a label, caption or mask), or that file; a folder of images/ and masks/ (or img_dir/ and
            ann_dir/), with train/ and val/ in both or above both; ADE20K, Cityscapes or PASCAL VOC as they are
            unpacked; *.tar shards, as a folder, a glob
            or a file; *.parquet likewise; a folder of `save_to_disk`; or a hub id, "org/name" or "org/name:config".
        split: "train", "val", "test" or another that the data has. "eval" is val, else test, else all of
            data that has no splits. None is train, or all of data that has no splits.
        image_column, label_column, caption_column, mask_column: where the data has several that could be it, or one
            whose name does not tell.
        ignore_index: a number in masks that is no class, as 255 never is.
        reduce_zero_label: 0 in masks is no class, and 1 is the first.
        stream: tar shards, parquet or a folder of pictures are indexed on disk and read in place, so that memory does
            not grow with their number. The first examples of shards tell which columns there are.

    The classes of masks are named by a classes.txt (one a line, from 0), labels.json or id2label.json in the folder.
    Without one all masks are read once, for the largest number in them.

    Raises:
        UserError: nothing there, no pictures, no such split, ambiguous or unknown columns, labels missing or
            out of range, images without masks, masks in colors. Damaged pictures are found when they are decoded.
    """
    if is_built_in(spec):
        _need_files(spec, stream)
        return _open_built_in(spec, split)
    requested = (image_column, label_column, caption_column, mask_column)
    return _open(spec, requested, ignore_index, reduce_zero_label, stream).source(split)


def train_and_eval(
    spec: Spec,
    eval_fraction: float = 0.1,
    seed: int = 0,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    caption_column: str | None = None,
    mask_column: str | None = None,
    ignore_index: int = 255,
    reduce_zero_label: bool = False,
    stream: bool = False,
) -> tuple[Source, Source]:
    """What to train on and what to evaluate on: the data's own split, else a seeded one, even over classes.

    Args:
        spec, image_column, label_column, caption_column, mask_column, ignore_index, reduce_zero_label, stream: as in
            `open_source`.
        eval_fraction: share held back where the data has no split of its own; at least one example. Of a stream it is
            one of each n neighbours, n being the nearest to 1 / eval_fraction.
        seed: of that choice.

    Raises:
        UserError: as `open_source`; a single picture.
    """
    if is_built_in(spec):
        _need_files(spec, stream)
        return _open_built_in(spec, "train"), _open_built_in(spec, "eval")
    requested = (image_column, label_column, caption_column, mask_column)
    opened = _open(spec, requested, ignore_index, reduce_zero_label, stream)
    if "train" in opened.splits and ("val" in opened.splits or "test" in opened.splits):
        return opened.source("train"), opened.source("eval")
    if isinstance(opened, OpenedStream):
        return opened.split_off(eval_fraction, seed)
    source = opened.source(None)
    if len(source) < 2:
        raise UserError(
            f"{os.fspath(spec)} holds one image; give one to train and one to evaluate on at least"
        )
    held = choose_held_out(len(source), source.labels, eval_fraction, seed)
    return Subset(source, np.flatnonzero(~held)), Subset(source, np.flatnonzero(held))


def _open(
    spec: Spec, requested: tuple[str | None, ...], ignore_index: int, reduce_zero_label: bool, stream: bool
) -> "_Opened | OpenedStream":
    return (OpenedStream if stream else _Opened)(spec, requested, ignore_index, reduce_zero_label)


class _Opened:
    """What `spec` names, read once for all of its splits."""

    def __init__(
        self, spec: Spec, requested: tuple[str | None, ...], ignore_index: int, reduce_zero_label: bool
    ):
        self.spec, self.requested = spec, requested
        self.ignore_index, self.reduce_zero_label = ignore_index, reduce_zero_label
        image_column, _, _, mask_column = requested
        self.splits = read_tables(spec, image_column, mask_column)
        path = Path(spec).expanduser().absolute()
        self.root = dataset_root(path) if path.is_dir() else path.parent
        self._legends: dict[str, LabelMap] = {}

    def source(self, split: str | None) -> TableSource:
        chosen = choose_split(os.fspath(self.spec), list(self.splits), split)
        table = self.splits[chosen]
        if len(table) == 0:
            where = f" in its split {chosen}" if chosen else ""
            raise UserError(f"{os.fspath(self.spec)} holds no images{where}")
        image, label, caption, mask = self.requested
        if ID_COLUMN in table.features:  # of our own readers, which call the pictures "image"
            image = "image"
        if mask not in table.features and any(mask in other.features for other in self.splits.values()):
            mask = None  # a test set may lack what training sets have
        columns = find_columns(table.features, image, label, caption, mask)
        classes, labels = read_labels(self.splits, columns.label) if columns.label else (None, {})
        name = os.path.basename(os.path.normpath(self.spec)) + (f"/{chosen}" if chosen else "")
        legend = self._legend(chosen, columns.mask) if columns.mask else None
        source = TableSource(table, columns, classes, labels.get(chosen), legend, name, self.root)
        if legend is not None:
            try:
                source[0]
            except MaskFormatError:
                raise  # now, not one by one
            except UserError:
                pass
        return source

    def _legend(self, split: str, column: str) -> LabelMap | None:
        """What masks mean, the same for all splits; None for a split that has none."""
        lacking = empty_rows(self.splits[split], column)
        count = len(self.splits[split])
        if len(lacking) == count:
            return None
        if len(lacking):
            raise UserError(
                f"{len(lacking)} of {count} examples have no mask in column {column}, the first being "
                f"{row_name(self.splits[split], int(lacking[0]))}; give them masks or remove them"
            )
        if column not in self._legends:
            self._legends[column] = find_label_map(
                lambda: self._masks(column), self.root, self.ignore_index, self.reduce_zero_label
            )
        return self._legends[column]

    def _masks(self, column: str) -> Iterator[tuple[bytes | str, str]]:
        for table in self.splits.values():
            if column in table.features:
                cells = table.select_columns(column)
                for row in set(range(len(table))).difference(empty_rows(table, column)):
                    yield mask_in_cell(cells[row][column], self.root, row_name(table, row))


def is_built_in(spec: Spec) -> bool:
    """Whether `spec` names "emoji" or "scenes", and nothing on disk is called so."""
    return os.fspath(spec).partition(":")[0] in ("emoji", "scenes") and not Path(spec).exists()


def _need_files(spec: Spec, stream: bool) -> None:
    if stream:
        raise UserError(
            f"{os.fspath(spec)} is built in, and only files are streamed; leave --loading.stream out"
        )


def _open_built_in(spec: Spec, split: str | None) -> Source:
    from triptych.data.builtin.emoji import emoji
    from triptych.data.builtin.scenes import scenes

    name, _, folder = os.fspath(spec).partition(":")
    requested = {None: "train", "eval": "test", "val": "test"}.get(split, split)
    return {"emoji": emoji, "scenes": scenes}[name](requested, root=folder or None)
