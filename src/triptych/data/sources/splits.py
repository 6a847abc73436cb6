"""Splits of data sets: recognize and choose them, and split data that has none."""

from pathlib import Path

import numpy as np

from triptych.data.sources.folders import list_visible
from triptych.errors import UserError

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval"), "test"),
}


def split_folders(folder: Path) -> dict[str, Path]:
    """Return the folder of each split ("train", "val", "test"); {} if the folder is not divided into splits.

    "train" may also be the name of a class: it is a split only if all folders are splits, or at least one other is.
    """
    names = {path.name: path for path in list_visible(folder) if path.is_dir()}
    matches = {SPLITS[name.lower()]: path for name, path in names.items() if name.lower() in SPLITS}
    if len(matches) == len(names) or ("train" in matches and len(matches) > 1):
        return matches
    return {}


def split_of_file(path: Path) -> str:
    """Return the split that a file name begins with, as in train-00000-of-00002.parquet; "" if it begins with none."""
    word = "".join(letter if letter.isalpha() else " " for letter in path.stem.lower()).partition(" ")[0]
    return SPLITS.get(word, "")


def choose_split(spec: str, splits: list[str], requested: str | None) -> str:
    """Choose one of `splits`.

    Args:
        spec: name of the data in errors.
        splits: names of the splits; [""] for data without splits.
        requested: a split, "eval" or None, as in `triptych.data.open.open_source`.

    Raises:
        UserError: the data has no such split.
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
    raise UserError(f"{spec} has no split {requested or 'train'!r}; {has}")


def choose_held_out(count: int, labels: np.ndarray | None, fraction: float, seed: int) -> np.ndarray:
    """Choose the examples to hold out for evaluation: at least one, and `fraction` of each class, but never all of it.

    The fraction of a class is rounded, and the difference is carried over to the next class, so that a tenth of 50
    classes with 2 examples each is 10 examples instead of none.

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
        held[group[:take]] = True
    if not held.any():
        held[rng.choice(max(groups, key=len))] = True
    return held
