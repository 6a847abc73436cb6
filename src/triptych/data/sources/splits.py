"""Train, val and test: how they are recognised, chosen, and made where the data has none."""

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
    """{"train": ..., "val" or "test": ...} where the folder is divided so, else {}.

    A class may be called "train" too: it is a split only if every folder beside it is one, or one more.
    """
    names = {path.name: path for path in list_visible(folder) if path.is_dir()}
    matches = {SPLITS[name.lower()]: path for name, path in names.items() if name.lower() in SPLITS}
    if len(matches) == len(names) or ("train" in matches and len(matches) > 1):
        return matches
    return {}


def split_of_file(path: Path) -> str:
    """The split that a file's name begins with, as in train-00000-of-00002.parquet; "" if none."""
    word = "".join(letter if letter.isalpha() else " " for letter in path.stem.lower()).partition(" ")[0]
    return SPLITS.get(word, "")


def choose_split(spec: str, splits: list[str], requested: str | None) -> str:
    """The one of `splits` that `asked` means; see `open_source`."""
    order = {None: ("train", ""), "eval": ("val", "test", "")}.get(requested)
    if order is None:
        order = (SPLITS.get(str(requested).lower(), str(requested)), str(requested))
    for split in order:
        if split in splits:
            return split
    if requested is None and len(splits) == 1:
        return splits[0]
    has = "it has no splits; leave the split out" if splits == [""] else f"it has {', '.join(splits)}"
    raise UserError(f"{spec} has no split {requested or 'train'!r}; {has}")


def choose_held_out(count: int, labels: np.ndarray | None, fraction: float, seed: int) -> np.ndarray:
    """Booleans (count,), at least one: what to evaluate on. Of each class its share, and never all of it.

    The share of a class is rarely a whole number; what one class is short of, the next makes up for, so that
    a tenth of 50 classes of 2 is 10 examples, not none.
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
        owed = min(owed - take, 1.0)  # many classes of one must not empty the next
        held[group[:take]] = True
    if not held.any():
        held[rng.choice(max(groups, key=len))] = True
    return held
