"""Read files of a folder: its images, their captions, and a metadata file with the paths of images.

The result is a table of `datasets` for each split, whose column "image" holds paths. No image is decoded, so damaged
ones are not reported here, and nothing is cached on disk, so that changes of the folder are noticed.
"""

import csv
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triptych.data.image_formats import KNOWN_SUFFIXES, is_image_name
from triptych.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

ID_COLUMN = "__id__"  # column that our readers add: name of each example
METADATA = ("metadata.jsonl", "metadata.csv")
DELIMITERS = (",", ";", "\t")
# Names of columns that hold masks, if their type or values are images.
MASK_NAMES = (
    *("mask", "masks", "mask_file_name", "mask_path", "segmentation_mask", "semantic_mask", "semantic_map"),
    *("segmentation", "segmentation_map", "annotation", "annotations", "annotation_file_name"),
    *("seg", "gt", "label", "labels"),
)


def list_visible(folder: Path) -> list[Path]:
    """Return the sorted contents of a folder, without files of operating systems such as .DS_Store and __MACOSX.

    Raises:
        DataError: the folder cannot be read.
    """
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith((".", "__MACOSX")))
    except OSError as problem:
        raise DataError(f"{folder} cannot be read ({problem.strerror}); check its permissions") from problem


def has_images(folder: Path) -> bool:
    """Return whether there are image files directly in a folder."""
    try:
        with os.scandir(folder) as entries:
            return any(is_image_name(entry.name) and entry.is_file() for entry in entries)
    except OSError as problem:
        raise DataError(f"{folder} cannot be read ({problem.strerror}); check its permissions") from problem


def metadata_file(folder: Path) -> Path | None:
    """Return the metadata.jsonl or metadata.csv of a folder; None if it has none.

    A metadata.csv without a column file_name in a folder of images is another program's table.

    Raises:
        DataError: it has both.
    """
    result = [folder / name for name in METADATA if (folder / name).is_file()]
    result = [file for file in result if not (file.suffix == ".csv" and _is_foreign(file))]
    if len(result) > 1:
        raise DataError(f"{folder} holds both {METADATA[0]} and {METADATA[1]}; remove one of them")
    return result[0] if result else None


def _is_foreign(file: Path) -> bool:
    """Return whether a table in a folder of images has no column file_name."""
    with open(file, encoding="utf-8-sig", errors="replace") as lines:
        head = lines.readline(10_000)
    return head.isascii() and "file_name" not in head and next(find_images(file.parent), None) is not None


def find_images(folder: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the path of each image in sorted order, and the parts of its path relative to the folder.

    Raises:
        DataError: a file name that is not UTF-8.
    """
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        for name in sorted(names):
            if is_image_name(name):
                path = Path(root, name)
                if not _is_utf8(path):
                    raise DataError(f"{str(path)!r} has a name that is not UTF-8; rename it")
                yield str(path), path.relative_to(folder).parts


def read_captions(paths: list[str]) -> list[list[str] | None]:
    """Read the captions of each image NAME.png, the lines of NAME.txt or NAME.caption; None if there is no such
    file."""
    texts: dict[str, str] = {}
    for folder in {os.path.dirname(path) for path in paths}:
        for name in sorted(os.listdir(folder), reverse=True):  # .txt overrides .caption
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in (".txt", ".caption"):
                texts[os.path.join(folder, stem)] = os.path.join(folder, name)
    result: list[list[str] | None] = []
    for path in paths:
        text = texts.get(os.path.splitext(path)[0])
        result.append(None if text is None else read_lines(Path(text)))
    return result


def read_lines(text: Path) -> list[str]:
    """Return the lines of a file that are not empty."""
    return [line.strip() for line in read_text(text).splitlines() if line.strip()]


def _is_utf8(path: Path) -> bool:
    try:
        return bool(str(path).encode())
    except UnicodeEncodeError:
        return False


def read_metadata(file: Path, prefix: str = "", mask_column: str | None = None) -> "Dataset":
    """Read a metadata file as a table. Its column file_name becomes "image"; the other columns are kept.

    Args:
        file: a .jsonl or .csv file. The paths of images and masks in it are relative to its folder.
        prefix: prepended to the names of examples.
        mask_column: name of the column of masks; by default one of `MASK_NAMES` that holds paths of images.

    Raises:
        DataError: a file without rows, a line that cannot be read, or a row without file_name.
    """
    rows = _csv_rows(file) if file.suffix.lower() == ".csv" else _jsonl_rows(file)
    if not rows:
        raise DataError(
            f"{file} has no rows; write one for each image, with file_name and a label or caption"
        )
    names = list(dict.fromkeys(name for row in rows for name in row))
    if "file_name" not in names:
        raise DataError(f"{file} has no column file_name, which names each image; it has {', '.join(names)}")
    columns = {name: [row.get(name) for row in rows] for name in names}
    paths = columns.pop("file_name")
    if None in paths or "" in paths:
        at = next(i for i, path in enumerate(paths) if not path)
        raise DataError(f"{file} has no file_name in row {at + 1}; give it one or remove the row")
    columns = {name: values for name, values in columns.items() if all(map(_is_plain, values))}
    columns["image"] = [str(file.parent / str(path)) for path in paths]
    columns[ID_COLUMN] = [prefix + str(path) for path in paths]
    masks = next(
        (n for n in (mask_column, *MASK_NAMES) if n in columns and _are_image_paths(columns[n])), None
    )
    if masks is not None:
        columns[masks] = [str(file.parent / path) if path else None for path in columns[masks]]
    return make_table(columns, masks=masks)


def _are_image_paths(values: list[Any]) -> bool:
    paths = [value for value in values if value]
    return bool(paths) and all(
        isinstance(path, str) and os.path.splitext(path)[1].lower() in KNOWN_SUFFIXES for path in paths
    )


def _is_plain(value: Any) -> bool:
    """Return whether a value is a scalar or a list of captions. Columns of other values, such as boxes, are dropped."""
    return isinstance(value, str | int | float | bool | None) or (
        isinstance(value, list) and all(isinstance(item, str) for item in value)
    )


def _jsonl_rows(file: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as problem:
            raise DataError(f"{file} line {number} is not JSON ({problem}); repair it") from problem
        if not isinstance(row, dict):
            raise DataError(f"{file} line {number} is {line[:40]!r}, but must be an object such as {{...}}")
        rows.append(row)
    return rows


def _csv_rows(file: Path) -> list[dict[str, Any]]:
    """Read the rows of a CSV file. A column in which all values are integers is converted to integers."""
    head, *cells = read_rows(read_text(file)) or [[]]
    rows: list[dict[str, Any]] = [dict(zip(head, row, strict=False)) for row in cells]
    for name in head if rows else ():
        values = [row.get(name) for row in rows]
        if name != "file_name" and are_integers(values):
            for row in rows:
                row[name] = int(row[name])
    return rows


def are_integers(values: Sequence[Any]) -> bool:
    """Return whether texts are all integers."""
    return all(isinstance(value, str) and value.lstrip("-").isdecimal() for value in values)


def read_rows(text: str) -> list[list[str]]:
    """Read the rows of a table whose cells are divided by commas, semicolons or tabs: what is most frequent in the
    first line."""
    first = text.partition("\n")[0]
    delimiter = max(DELIMITERS, key=first.count)
    return [row for row in csv.reader(text.splitlines(keepends=True), delimiter=delimiter) if row]


def read_text(file: Path) -> str:
    """Read a UTF-8 text file.

    Raises:
        DataError: the file cannot be read, or is no text.
    """
    try:
        text = file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(f"{file} cannot be read ({problem}); save it as UTF-8 text") from problem
    if "\0" in text:
        raise DataError(
            f"{file} contains a NUL character, so it is damaged or no text; save it as UTF-8 text"
        )
    return text


def make_table(
    columns: dict[str, list[Any]], classes: list[str] | None = None, masks: str | None = None
) -> "Dataset":
    """Create an in-memory table of `datasets`.

    Args:
        columns: values of each column; those of "image" and `masks` are not decoded.
        classes: class names of the column "label".
        masks: name of the column of masks.

    Raises:
        DataError: a column with values of different types, or with a NUL character in its name.
    """
    import datasets
    import pyarrow

    fixed: dict[str, Any] = {"image": datasets.Image(decode=False)}
    if masks is not None:
        fixed[masks] = datasets.Image(decode=False)
    if classes is not None:
        fixed["label"] = datasets.ClassLabel(names=classes)
    for name in columns:
        if "\0" in name:  # Arrow ends names there, so the column would not be found again
            raise DataError(f"the column name {name!r} contains a NUL character; rename the column")
    plain = {name: _check_types(name, values) for name, values in columns.items() if name not in fixed}
    features = datasets.Features.from_arrow_schema(pyarrow.table(plain).schema)
    features.update({name: feature for name, feature in fixed.items() if name in columns})
    return datasets.Dataset.from_dict({**columns, **plain}, features=features)


def _check_types(name: str, values: list[Any]) -> list[Any]:
    types = {type(value) for value in values if value is not None}
    if types == {int, float}:
        return [None if value is None else float(value) for value in values]
    if len(types) > 1:
        mixed = " and ".join(sorted(value_type.__name__ for value_type in types))
        raise DataError(f"column {name} mixes {mixed}; use one type throughout")
    return values
