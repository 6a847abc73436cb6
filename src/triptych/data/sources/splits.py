"""Splits of data sets: recognize and choose them, and split data that has none."""

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from triptych.data.sources.folders import list_visible
from triptych.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval"), "test"),
}
SPLIT_COLUMNS = ("split", "set", "subset", "partition")
# Names of a split only next to another one: "tr" and "te", "train" and "test1".
SHORT_SPLITS = {
    "tr": "train",
    "trn": "train",
    "va": "val",
    "vl": "val",
    "te": "test",
    "tst": "test",
    "ts": "test",
}
SHORT_SPLITS |= {
    "train_val": "train",
    "trainval": "train",
    "holdout": "test",
    "test1": "test",
    "test2": "test",
}
MASK_WORDS = {"mask", "masks", "label", "labels", "annot", "annotation", "annotations", "gt", "seg", "truth"}
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")


def split_folders(folder: Path) -> dict[str, Path]:
    """Return the folder of each split ("train", "val", "test"); {} if the folder is not divided into splits.

    A folder is a split if its name is that of one ("train", "Testing"), or has it as one of its words
    ("training_set", "seg_test", "val2017"). "train" may also be the name of a class: it is a split only if all folders
    are splits, or at least one other is. Longer names are splits only if their other words agree, as in "seg_train" and
    "seg_test", or if at least half of their subfolders have equal names: "test tube" and "train station" are classes.

    A split that holds nothing but one folder is that folder, as in seg_train/seg_train/CLASS.

    Raises:
        DataError: two folders for one split.
    """
    folders = [path for path in list_visible(folder) if path.is_dir()]
    exact = _by_split((SPLITS.get(path.name.lower(), ""), path) for path in folders)
    if exact and len(exact) == len(folders):
        return {split: _innermost(path) for split, path in exact.items()}
    if "train" in exact and len(exact) > 1:
        return {split: _innermost(path) for split, path in exact.items()}
    short = _by_split(
        (SPLITS.get(path.name.lower()) or SHORT_SPLITS.get(path.name.lower(), ""), path) for path in folders
    )
    if "train" in short and len(short) == len(folders) > 1:
        return {split: _innermost(path) for split, path in short.items()}
    words = {path: _words(path.name) for path in folders}
    plain = {split for split, others in words.values() if not MASK_WORDS.intersection(others)}
    # train_masks next to train holds the masks of that split.
    longer = _by_split(
        ("" if split in plain and MASK_WORDS.intersection(others) else split, path)
        for path, (split, others) in words.items()
    )
    if "train" in longer and len(longer) > 1 and _agree(longer, {words[path][1] for path in longer.values()}):
        return {split: _innermost(path) for split, path in longer.items()}
    return {}


def split_notes(folder: Path) -> list[str]:
    """Return lines that say which folders were taken for splits, and which were left out."""
    splits = split_folders(folder)
    notes = []
    if any(SPLITS.get(path.name.lower()) is None or path.parent != folder for path in splits.values()):
        origins = ", ".join(f"{split} from {path.relative_to(folder)}" for split, path in splits.items())
        notes.append(f"{folder} is divided into splits: {origins}")
    others = [
        path.name
        for path in (list_visible(folder) if splits else [])
        if path.is_dir() and not any(path == split or path in split.parents for split in splits.values())
    ]
    if others:
        notes.append(
            f"{', '.join(others)} in {folder} {'is' if len(others) == 1 else 'are'} no split and left out"
        )
    return notes


def _by_split(pairs: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    splits: dict[str, Path] = {}
    for split, path in pairs:
        if split and split in splits:
            raise DataError(
                f"{splits[split]} and {path.name} are both named like the split {split!r}; rename or move one of them"
            )
        if split:
            splits[split] = path
    return splits


def _words(name: str) -> tuple[str, tuple[str, ...]]:
    """Return the split that one word of a name stands for ("" if none or several do), and the other words."""
    words = [word.lower() for word in WORD.findall(name)]
    splits = [word for word in words if word in SPLITS]
    if len(splits) != 1:
        return "", ()
    return SPLITS[splits[0]], tuple(word for word in words if word not in SPLITS)


def _agree(splits: dict[str, Path], other_words: set[tuple[str, ...]]) -> bool:
    """Return whether folders with split words in their names are the splits of one data set."""
    if len(other_words) == 1:
        return True
    classes = [{path.name for path in list_visible(_innermost(p)) if path.is_dir()} for p in splits.values()]
    return len(set.intersection(*classes)) * 2 >= max(1, len(set.union(*classes)))


def _innermost(folder: Path) -> Path:
    """Return the folder, or the one in it of the same name, if it holds nothing else."""
    inside = list_visible(folder)
    while len(inside) == 1 and inside[0].is_dir() and inside[0].name.lower() == folder.name.lower():
        folder = inside[0]
        inside = list_visible(folder)
    return folder


def split_of_file(path: Path) -> str:
    """Return the split that a file name begins with, as in train-00000-of-00002.parquet; "" if it begins with none."""
    word = "".join(letter if letter.isalpha() else " " for letter in path.stem.lower()).partition(" ")[0]
    return SPLITS.get(word, "")


def by_split_column(table: "Dataset") -> "dict[str, Dataset]":
    """Divide a table by its column of splits, if it has one; else return it as the split ""."""
    for name in table.features:
        if name.lower() not in SPLIT_COLUMNS:
            continue
        cells = [SPLITS.get(str(cell).lower(), "") for cell in table[name][:]]
        if "train" in cells and "" not in cells and len(set(cells)) > 1:
            log.warning("the data is divided into splits by its column %s", name)
            return {
                split: table.select([row for row, cell in enumerate(cells) if cell == split])
                for split in dict.fromkeys(cells)
            }
    return {"": table}


def choose_split(spec: str, splits: list[str], requested: str | None) -> str:
    """Choose one of `splits`.

    Args:
        spec: name of the data in errors.
        splits: names of the splits; [""] for data without splits.
        requested: a split, "eval" or None, as in `triptych.data.open.open_source`.

    Raises:
        DataError: the data has no such split.
    """
    order = {None: ("train", ""), "eval": ("val", "test", "")}.get(requested)
    if order is None:
        order = (SPLITS.get(str(requested).lower(), str(requested)), str(requested))
    for split in order:
        if split in splits:
            return split
    if requested is None and len(splits) == 1:
        return splits[0]
    has = "it has no splits; omit the split" if splits == [""] else f"it has {', '.join(splits)}"
    raise DataError(f"{spec} has no split {requested or 'train'!r}; {has}")


def choose_held_out(count: int, labels: np.ndarray | None, fraction: float, seed: int) -> np.ndarray:
    """Choose the examples to hold out for evaluation: `fraction` of each class, but never all of it, and at least one
    of each class that has two.

    The fraction of a class is rounded, and the difference is carried over to the next class, so that a tenth of 50
    classes with 14 examples each is 70 examples instead of 50.

    Args:
        count: number of examples.
        labels: class of each example; None if there are none.
        fraction: fraction to hold out, between 0 and 1.
        seed: seed of the choice.

    Returns:
        Booleans (count,), true for the held-out examples.
    """
    rng = np.random.default_rng(seed)
    held = np.zeros(count, bool)
    groups = (
        [np.arange(count)] if labels is None else [np.flatnonzero(labels == c) for c in np.unique(labels)]
    )
    owed = 0.0
    for number in rng.permutation(len(groups)):
        group = rng.permutation(groups[number])
        owed += len(group) * fraction
        take = max(0, min(round(owed), len(group) - 1))
        owed = min(owed - take, 1.0)  # else many classes of one example would use up the next class
        held[group[: max(take, min(1, len(group) - 1))]] = (
            True  # none of a rare class would leave it unmeasured
        )
    if not held.any():
        held[rng.choice(max(groups, key=len))] = True
    return held
