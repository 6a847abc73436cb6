"""Read tables that describe images of a folder: a .csv, .tsv or .txt whose rows name the images in some column.

labels.csv                  id, breed                        + train/ID.jpg         (Kaggle)
train.csv                   filename, label                  + images/NAME.jpg
train/_classes.csv          filename, cat, dog (0 or 1)      + train/NAME.jpg       (Roboflow)
val/val_annotations.txt     val_0.JPEG, n01443537, box       + val/images/*.JPEG    (Tiny ImageNet)
LOC_val_solution.csv        ImageId, n01443537 box ...       + val/*.JPEG           (ImageNet on Kaggle)
"""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from triptych.data.sources.columns import LABEL_NAMES
from triptych.data.sources.folders import list_visible, read_rows, read_text
from triptych.data.sources.splits import split_of_file
from triptych.errors import DataError

log = logging.getLogger(__name__)

SUFFIXES = (".csv", ".tsv", ".txt")
MAX_TABLES = 20  # of a folder that are looked at
FEW_ROWS = 50  # from which it shows whether a table names images


class LabelTable(NamedTuple):
    """Columns of a table, and what they hold for each of the images that it names."""

    file: Path
    columns: tuple[str, ...]
    rows: dict[str, tuple[str, ...]]
    """Cells by the path of the image."""


def read_label_tables(
    places: Iterable[Path], images: dict[str, list[str]], classes: Iterable[str] = ()
) -> dict[str, dict[str, str]]:
    """Read what the tables in some folders say about images.

    The column of labels is called "label" if it is plain which one it is: it has a name such as class, or holds the
    names of class folders, or there is one column for each class with 0 and 1 in it, or only one column repeats values.

    Args:
        places: folders of the tables.
        images: paths of the images of each split.
        classes: names of class folders of other images.

    Returns:
        Cells by column, by the path of the image; {} without tables.
    """
    result: dict[str, dict[str, str]] = {}
    total = sum(map(len, images.values()))
    index = _index([path for of_split in images.values() for path in of_split])
    for file in dict.fromkeys(file for place in places for file in _candidates(place, index)):
        near = images.get(split_of_file(file)) if split_of_file(file) else None
        near = near or [
            path for of_split in images.values() for path in of_split if file.parent in Path(path).parents
        ]
        if (table := _read_table(file, _index(near) if near else index)) is None:
            continue
        labeled = _with_label(table, set(classes))
        log.warning("%s describes %d of %d images", file, len(table.rows), total)
        for path, cells in labeled.rows.items():
            result.setdefault(path, {}).update(zip(labeled.columns, cells, strict=True))
    return result


def _index(images: list[str]) -> dict[str, str]:
    """Return the path of each image by its name, with and without suffix and folder; "" where several have the name."""
    index: dict[str, str] = {}
    for path in images:
        name, stem, parent = Path(path).name, Path(path).stem, Path(path).parent.name
        for key in {name, stem, f"{parent}/{name}", f"{parent}/{stem}"}:
            index[key] = path if key not in index else ""
    return index


def _candidates(folder: Path, index: dict[str, str]) -> list[Path]:
    """Return the tables in a folder; the text with the name of an image is its caption."""
    files = [path for path in list_visible(folder) if path.suffix.lower() in SUFFIXES and path.is_file()]
    tables = [path for path in files if path.suffix.lower() != ".txt" or path.stem not in index]
    return [path for path in tables if "submission" not in path.stem.lower()][:MAX_TABLES]  # to be filled in


def _read_table(file: Path, index: dict[str, str]) -> LabelTable | None:
    """Read a table; None if no column names images."""
    try:
        rows = read_rows(read_text(file))
    except DataError:
        return None  # something else
    width = len(rows[0]) if rows else 0
    sample = [row for row in rows[: FEW_ROWS + 1] if len(row) == width]
    matches = [sum(bool(_find(row[k], index)) for row in sample) for k in range(width)]
    if width < 2 or 2 * max(matches) < len(sample) - 1 or not max(matches):
        return None
    at = matches.index(max(matches))
    has_head = not _find(rows[0][at], index)
    head = rows[0] if has_head else [f"column {k}" for k in range(width)]
    named = {path: row for row in rows[has_head:] if len(row) == width and (path := _find(row[at], index))}
    columns = tuple(name.strip() for k, name in enumerate(head) if k != at)
    return LabelTable(
        file,
        columns,
        {path: tuple(cell.strip() for k, cell in enumerate(row) if k != at) for path, row in named.items()},
    )


def _find(cell: str, index: dict[str, str]) -> str:
    """Return the image that a cell names by a path of any operating system or a URL; "" if there is none."""
    *_, parent, name = ("", *cell.strip().replace("\\", "/").split("/"))
    return index.get(f"{parent}/{name}") or index.get(name, "")


def _with_label(table: LabelTable, classes: set[str]) -> LabelTable:
    """Return the table with its column of labels called "label", if it is plain which one that is."""
    cells = {name: [row[k] for row in table.rows.values()] for k, name in enumerate(table.columns)}
    if named := [name for name in table.columns if name.lower() in LABEL_NAMES]:
        return _renamed(table, named[0]) if len(named) == 1 else table
    for name, values in cells.items():
        if classes and all(value.split(" ")[0] in classes for value in values):
            return _renamed(table, name, first_word=True)
    flags = {name: [_flag(value) for value in values] for name, values in cells.items()}
    if len(flags) > 1 and all(sum(row) == 1 and min(row) == 0 for row in zip(*flags.values(), strict=True)):
        labels = [table.columns[row.index(1)] for row in zip(*flags.values(), strict=True)]
        return LabelTable(
            table.file, ("label",), {p: (label,) for p, label in zip(table.rows, labels, strict=True)}
        )
    repeating = [name for name, values in cells.items() if 1 < len(set(values)) <= max(2, len(values) // 2)]
    if len(repeating) == 1:
        return _renamed(table, repeating[0])
    if repeating:
        log.warning(
            "each of the columns %s of %s could hold labels; choose one with label_column",
            ", ".join(repeating),
            table.file,
        )
    return table


def _renamed(table: LabelTable, label: str, *, first_word: bool = False) -> LabelTable:
    at = table.columns.index(label)
    if label != "label":
        log.warning("labels are read from column %s of %s", label, table.file)
    columns = tuple("label" if k == at else name for k, name in enumerate(table.columns))
    if not first_word:
        return table._replace(columns=columns)
    rows = {path: (*row[:at], row[at].split(" ")[0], *row[at + 1 :]) for path, row in table.rows.items()}
    return table._replace(columns=columns, rows=rows)


def _flag(value: str) -> float:
    """Return 0 or 1, or -1 for all other values."""
    return float(value) if value in ("0", "1", "0.0", "1.0") else -1.0
