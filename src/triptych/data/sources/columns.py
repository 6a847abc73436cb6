"""Find the columns of a table that hold images, labels, captions and masks, and read class names and labels."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from triptych.data.sources.folders import ID_COLUMN, MASK_NAMES
from triptych.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, Features

IMAGE_NAMES = (
    "image",
    "img",
    "picture",  # words: quoted
    "photo",
    "pixels",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "file_name",
    "path",
)
LABEL_NAMES = ("label", "labels", "class", "class_name", "category", "target", "cls")
CAPTION_NAMES = ("caption", "captions", "text", "txt", "description", "prompt")
MAX_NUMERIC_CLASSES = 1_000_000


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a table; None if it has no such column."""

    image: str
    label: str | None
    caption: str | None
    mask: str | None = None


def find_columns(
    features: "Features",
    image: str | None = None,
    label: str | None = None,
    caption: str | None = None,
    mask: str | None = None,
) -> Columns:
    """Find the columns of a table by type and name.

    Args:
        features: names and types of the columns.
        image, label, caption, mask: names of the columns, where the user has given them.

    Raises:
        DataError: a given column does not exist, or no column or several could be meant.
    """
    mask = _mask_column(features, image, mask)
    images = [name for name in _image_columns(features) if name != mask]
    return Columns(
        image=_choose_column("image", images, image, features, IMAGE_NAMES[:1]) or _no_image(features),
        mask=mask,
        label=_choose_column(
            "label", [n for n in _label_columns(features) if n != mask], label, features, LABEL_NAMES[:1]
        ),
        # Several caption columns are no error, since a classifier needs none: the most common name is used.
        caption=_choose_column(
            "caption", [n for n in CAPTION_NAMES if n in features][:1], caption, features, ()
        ),
    )


def _choose_column(
    what: str, candidates: list[str], requested: str | None, features: "Features", first: tuple[str, ...]
) -> str | None:
    available = ", ".join(name for name in features if name != ID_COLUMN)
    if requested is not None:
        if requested not in features:
            raise DataError(f"there is no column {requested!r} for the {what}; the columns are {available}")
        return requested
    for name in first:
        if name in candidates:
            return name
    if len(candidates) > 1:
        several = ", ".join(candidates)
        raise DataError(f"each of the columns {several} could hold the {what}; choose one with {what}_column")
    return candidates[0] if candidates else None


def _mask_column(features: "Features", image: str | None, requested: str | None) -> str | None:
    """Return the given mask column, else one of images with a name of `MASK_NAMES`, if another column holds the
    images."""
    image_columns = [name for name in _image_columns(features) if name != image]
    if requested is None:
        called = [name for name in MASK_NAMES if name in image_columns]
        return called[0] if called and (image is not None or len(image_columns) > len(called)) else None
    mask = _choose_column("mask", [], requested, features, ())
    if mask not in image_columns and not _can_be_path(features[mask]):
        raise DataError(f"column {mask} holds {features[mask]}, but masks must be images or paths of files")
    return mask


def _no_image(features: "Features") -> str:
    available = ", ".join(name for name in features if name != ID_COLUMN)
    raise DataError(
        f"no column was recognized as images; the columns are {available}; give the right one as image_column"
    )


def _image_columns(features: "Features") -> list[str]:
    import datasets

    sure, likely = [], []
    for name, feature in features.items():
        is_struct = isinstance(feature, dict) and "bytes" in feature
        is_bytes = isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")
        if isinstance(feature, datasets.Image) or is_struct or is_bytes:
            sure.append(name)
        elif name.lower() in IMAGE_NAMES and _can_be_path(feature):
            likely.append(name)
    return sure or likely


def _can_be_path(feature: object) -> bool:
    import datasets

    return isinstance(feature, datasets.Value) and "string" in feature.dtype


def _label_columns(features: "Features") -> list[str]:
    import datasets

    typed = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    named = [name for name in features if name.lower() in LABEL_NAMES and _can_be_label(features[name])]
    return typed + [name for name in named if name not in typed]


def _can_be_label(feature: object) -> bool:
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return True
    types = ("int", "uint", "string", "large_string", "bool")
    return isinstance(feature, datasets.Value) and feature.dtype.rstrip("0123456789") in types


def check_label_column(column: str, features: "Features") -> None:
    """Raise a `DataError` if a column cannot hold labels."""
    if not _can_be_label(features[column]):
        raise DataError(f"column {column} holds {features[column]}, but labels must be integers or text")


def read_labels(
    tables: "dict[str, Dataset]", column: str
) -> tuple[tuple[str, ...], dict[str, np.ndarray | None]]:
    """Read the labels of all splits.

    Text labels become classes in alphabetical order. Integers are class indices; the classes are named "0", "1" and so
    on unless the data names them. A split in which all labels are -1, as in test sets of the hub, has no labels.

    Returns:
        The class names, the same for all splits, and int64 (n,), the class index of each row, for each split; None for
        a split without labels.

    Raises:
        DataError: labels of a wrong type, missing, negative, or beyond the named classes.
    """
    import datasets

    cells: dict[str, list] = {}
    names: list[str] = []
    for split, table in tables.items():
        feature = table.features.get(column)
        if feature is None:
            continue
        check_label_column(column, table.features)
        if isinstance(feature, datasets.ClassLabel):
            names = names or feature.names
        values = list(table[column][:])
        if any(value != -1 for value in values):
            cells[split] = values
            _need_all(values, column, table)
    distinct = {value for values in cells.values() for value in values}
    is_text = any(isinstance(value, str) for value in distinct)
    if is_text and not names:
        names = sorted(map(str, distinct))
    index = {name: i for i, name in enumerate(names)} if is_text else {}
    indices: dict[str, np.ndarray | None] = dict.fromkeys(tables)
    for split, values in cells.items():
        indices[split] = np.array([index[v] if is_text else int(v) for v in values], dtype=np.int64)
        names = names or [str(i) for i in range(_count(distinct, column))]
        _need_in_range(indices[split], names, column, tables[split])
    return tuple(names), indices


def _need_all(values: list, column: str, table: "Dataset") -> None:
    missing = [row for row, value in enumerate(values) if value is None or value == ""]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(values)} examples have no label in column {column}, the first of which is "
            f"{row_name(table, missing[0])}; label or remove them"
        )


def _need_in_range(indices: np.ndarray | None, names: list[str], column: str, table: "Dataset") -> None:
    assert indices is not None
    wrong = np.flatnonzero((indices < 0) | (indices >= len(names)))
    if len(wrong):
        raise DataError(
            f"label {indices[wrong[0]]} of {row_name(table, int(wrong[0]))} in column {column} is out of range: "
            f"the {len(names)} classes are numbered from 0; correct it"
        )


def _count(labels: set, column: str) -> int:
    most = max(map(int, labels))
    if most >= MAX_NUMERIC_CLASSES:
        raise DataError(f"column {column} goes up to {most}; number the classes from 0, or use their names")
    return max(1, most + 1)


def row_name(table: "Dataset", row: int) -> str:
    """Return the name of a row, for errors."""
    return table[row][ID_COLUMN] if ID_COLUMN in table.features else f"row {row}"
