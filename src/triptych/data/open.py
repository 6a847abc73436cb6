"""Open data sets: folders, metadata files, tar shards, parquet files, the Hugging Face hub, and the built-in sets."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from triptych.data.image_formats import log_left_out
from triptych.data.masks import LabelMap, MaskFormatError, MaskOptions
from triptych.data.source import Source, Subset
from triptych.data.sources.columns import find_columns, read_labels, row_name
from triptych.data.sources.detect import Spec, read_tables
from triptych.data.sources.folders import ID_COLUMN
from triptych.data.sources.label_maps import find_label_map, named_label_map
from triptych.data.sources.mask_folders import dataset_root, log_layout
from triptych.data.sources.splits import choose_held_out, choose_split, split_folders
from triptych.data.sources.table import TableSource, empty_rows, mask_in_cell
from triptych.data.streaming.open import OpenedStream
from triptych.errors import ConfigError, DataError, TriptychError

log = logging.getLogger(__name__)


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
    mask_threshold: float | None = None,
    mask_palette: str | None = None,
    stream: bool = False,
) -> Source:
    """Open the data set that `spec` names.

    The names of mask classes are read from a classes.txt (one per line, from 0), labels.json or id2label.json in the
    folder. If there is none, all masks are read once to find the largest class number.

    Args:
        spec: one of

            - "emoji" or "scenes", or "emoji:FOLDER" with a folder written by `tools/make_emoji.py`;
            - a folder of class folders, or a folder with train/ and val/ or test/ that hold class folders;
            - a folder with a metadata.jsonl or metadata.csv, whose columns are file_name and a label, caption or mask,
              or the path of that file;
            - a folder with images/ and masks/ (or img_dir/ and ann_dir/); train/ and val/ may lie in both or above
              both;
            - a folder of images with their masks next to them (x.jpg, x_mask.png), or with train/ and train_masks/;
            - the unpacked ADE20K, Cityscapes or PASCAL VOC, or masks of CVAT in that layout;
            - a folder of images with COCO json (or the path of the json file), YOLO segmentation text or labelme json;
            - tar shards or parquet files: a folder, a glob or a file;
            - a folder written by `save_to_disk` of `datasets`;
            - the id of a data set on the hub, "org/name" or "org/name:config".
        split: "train", "val", "test" or another split of the data. "eval" means val if there is one, else test. None
            means train. For data without splits, "eval" and None mean all of it.
        image_column, label_column, caption_column, mask_column: names of the columns; needed if several columns could
            be meant or if the name of a column does not tell.
        ignore_index: a mask value that is ignored, in addition to 255.
        reduce_zero_label: ignore 0 in masks and take 1 as the first class.
        mask_threshold: masks have two classes, and pixels brighter than this are the second one; for JPEG masks and
            soft edges.
        mask_palette: file with the name and color of each class, for masks of colors
            (`triptych.data.sources.class_files`); by default one in the folder.
        stream: index tar shards, parquet files or a folder of images on disk and read them in place, in constant
            memory. The columns of shards are those of their first examples.

    Raises:
        DataError: the data does not exist, holds no images or lacks the split; columns are unknown or ambiguous; labels
            are missing or out of range; or masks are missing or hold colors. Damaged images are reported when they are
            decoded.
    """
    if is_built_in(spec):
        _need_files(spec, stream)
        return _open_built_in(spec, split)
    requested = (image_column, label_column, caption_column, mask_column)
    options = MaskOptions(ignore_index, reduce_zero_label, mask_threshold, mask_palette)
    return _open(spec, requested, options, stream).source(split)


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
    mask_threshold: float | None = None,
    mask_palette: str | None = None,
    stream: bool = False,
) -> tuple[Source, Source]:
    """Open the sources to train and evaluate on: the splits of the data, else a random split that is balanced over
    classes.

    Args:
        spec, image_column, label_column, caption_column, mask_column, ignore_index, reduce_zero_label, mask_threshold,
            mask_palette, stream: as in `open_source`.
        eval_fraction: fraction held out for evaluation if the data has no splits; at least one example. From a stream
            one of every n consecutive examples is held out, where n is 1 / eval_fraction, rounded.
        seed: seed of the random split.

    Returns:
        The training source and the evaluation source.

    Raises:
        DataError: as `open_source`, or the data holds a single image.
    """
    if is_built_in(spec):
        _need_files(spec, stream)
        return _open_built_in(spec, "train"), _open_built_in(spec, "eval")
    requested = (image_column, label_column, caption_column, mask_column)
    options = MaskOptions(ignore_index, reduce_zero_label, mask_threshold, mask_palette)
    opened = _open(spec, requested, options, stream)
    if "train" in opened.splits and ("val" in opened.splits or "test" in opened.splits):
        training, evaluation = opened.source("train"), opened.source("eval")
        lacks_labels = len(training) > 1 and _lacks_labels(training, evaluation)
        if isinstance(opened, OpenedStream) or not lacks_labels:
            return training, evaluation
        log.warning(
            "the split for evaluation has no labels; %g of the training data are held out instead",
            eval_fraction,
        )
    if isinstance(opened, OpenedStream):
        return opened.split_off(eval_fraction, seed)
    source = opened.source(None)
    if len(source) < 2:
        raise DataError(
            f"{os.fspath(spec)} holds only one image; give at least one to train on and one to evaluate on"
        )
    held = choose_held_out(len(source), source.labels, eval_fraction, seed)
    return Subset(source, np.flatnonzero(~held)), Subset(source, np.flatnonzero(held))


def _lacks_labels(training: Source, evaluation: Source) -> bool:
    """Return whether the evaluation split has no labels or masks, as in the test sets of competitions."""
    if training.mask_classes is not None:
        return evaluation.mask_classes is None
    return training.labels is not None and evaluation.labels is None


def _open(
    spec: Spec, requested: tuple[str | None, ...], options: MaskOptions, stream: bool
) -> "_Opened | OpenedStream":
    return (OpenedStream if stream else _Opened)(spec, requested, options)


class _Opened:
    """The data set that `spec` names, read once for all of its splits."""

    def __init__(self, spec: Spec, requested: tuple[str | None, ...], options: MaskOptions):
        self.spec, self.requested, self.options = spec, requested, options
        image_column, _, _, mask_column = requested
        self.splits, self.mask_classes = read_tables(spec, image_column, mask_column)
        path = Path(spec).expanduser().absolute()
        self.root = dataset_root(path) if path.is_dir() else path.parent
        if path.is_dir():
            log_layout(path, self.root)
            log_left_out(split_folders(self.root) or {"": self.root})
        self._label_maps: dict[str, LabelMap] = {}

    def source(self, split: str | None) -> TableSource:
        chosen = choose_split(os.fspath(self.spec), list(self.splits), split)
        table = self.splits[chosen]
        if len(table) == 0:
            where = f" in split {chosen}" if chosen else ""
            raise DataError(f"{os.fspath(self.spec)} holds no images{where}")
        image, label, caption, mask = self.requested
        if ID_COLUMN in table.features:  # written by our own readers, whose image column is "image"
            image = "image"
        if mask not in table.features and any(mask in other.features for other in self.splits.values()):
            mask = None  # the test set has no masks
        columns = find_columns(table.features, image, label, caption, mask)
        classes, labels = read_labels(self.splits, columns.label) if columns.label else (None, {})
        name = os.path.basename(os.path.normpath(self.spec)) + (f"/{chosen}" if chosen else "")
        label_map = self._label_map(chosen, columns.mask) if columns.mask else None
        source = TableSource(table, columns, classes, labels.get(chosen), label_map, name, self.root)
        if label_map is not None:
            try:
                source[0]
            except MaskFormatError:
                raise  # at once, rather than for each mask
            except TriptychError:
                pass
        return source

    def _label_map(self, split: str, column: str) -> LabelMap | None:
        """Return the label map of all splits; None if this split has no masks."""
        lacking = empty_rows(self.splits[split], column)
        count = len(self.splits[split])
        if len(lacking) == count:
            return None
        if len(lacking):
            raise DataError(
                f"{len(lacking)} of {count} examples have no mask in column {column}, the first of which is "
                f"{row_name(self.splits[split], int(lacking[0]))}; add the masks or remove the examples"
            )
        if column not in self._label_maps:
            self._label_maps[column] = self._find_label_map(column)
        return self._label_maps[column]

    def _find_label_map(self, column: str) -> LabelMap:
        if self.mask_classes is not None:
            return named_label_map(self.mask_classes, self.options)
        return find_label_map(lambda: self._masks(column), self.root, self.options)

    def _masks(self, column: str) -> Iterator[tuple[bytes | str, str]]:
        for table in self.splits.values():
            if column in table.features:
                cells = table.select_columns(column)
                for row in set(range(len(table))).difference(empty_rows(table, column)):
                    yield mask_in_cell(cells[row][column], self.root, row_name(table, row))


def is_built_in(spec: Spec) -> bool:
    """Return whether `spec` names a built-in data set, and no file or folder of that name exists."""
    return os.fspath(spec).partition(":")[0] in ("emoji", "scenes") and not Path(spec).exists()


def _need_files(spec: Spec, stream: bool) -> None:
    if stream:
        raise ConfigError(
            f"{os.fspath(spec)} is built in, but only files can be streamed; omit --loading.stream"
        )


def _open_built_in(spec: Spec, split: str | None) -> Source:
    from triptych.data.builtin.emoji import emoji
    from triptych.data.builtin.scenes import scenes

    name, _, folder = os.fspath(spec).partition(":")
    requested = {None: "train", "eval": "test", "val": "test"}.get(split, split)
    return {"emoji": emoji, "scenes": scenes}[name](requested, root=folder or None)
